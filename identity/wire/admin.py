"""Administration: `retinue-ca` <-> CA over the local unix socket (root of the same machine only).

    GET  /v1/info                         -> Info
    POST /v1/tokens        TokenCreate    -> Token
    GET  /v1/hosts                        -> HostList
    POST /v1/workloads     WorkloadAdd    -> Workload
    GET  /v1/workloads                    -> WorkloadList
    POST /v1/workloads/move    WorkloadMove   -> MoveReply
    POST /v1/workloads/revoke  WorkloadRef    -> Workload
    POST /v1/workloads/life    WorkloadLife   -> Workload
    POST /v1/hosts/revoke      HostRef        -> Host
    POST /v1/policy        PolicyApply    -> PolicyReply
    GET  /v1/policy                       -> PolicyReply
    GET  /v1/explain?src=&dst=&proto=&port= -> ExplainReply (also on the endpoint API for members)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from identity.grown import Grown
from identity.wire import Message


class Info(Message):
    trust_domain: str
    timeline: str
    revision: int
    listen: str
    root_fingerprint: str
    pid: int


class TokenCreate(Message):
    """A join token for a host, or for the sidecar of a workload (then the instance is placed at enrolment)."""

    host: str | None = Field(default=None, max_length=63)
    workload: str | None = Field(default=None, max_length=255)  # sidecar of this workload
    replace: bool = False  # the host may be enrolled already; enrolling again then replaces its keys
    ttl: int = Field(default=600, ge=1, le=86400)  # seconds


class Token(Message):
    """The token, shown once; it is a secret."""

    token: str
    endpoint: str
    kind: Literal["host", "sidecar"]
    expires: int


class Host(Message):
    name: str
    kind: Literal["host", "sidecar"]
    spiffe_id: str
    tunnel_key: str
    underlay: list[str]
    generation: int
    state: Literal["enrolled", "quarantined", "revoked"]
    enrolled: int
    svid_expires: int
    revision: int | None = None  # last applied, as reported
    connected: bool = False
    draining: bool = False  # nothing is placed or moved there


class HostList(Message):
    hosts: list[Host]


class HostRef(Message):
    name: str = Field(max_length=63)


class WorkloadAdd(Message):
    """Create one instance of an identity. Without a host it stays unplaced until a sidecar enrols for it."""

    name: str = Field(max_length=255)
    host: str | None = Field(default=None, max_length=63)
    labels: dict[str, str] = {}
    fence: Literal["available", "strict"] = "available"
    replica: bool = False  # another instance of an identity that exists; its labels and fence are taken over
    ends_at: int | None = Field(default=None, ge=0, le=1 << 40)  # seconds since the epoch
    ends_in: int | None = Field(default=None, ge=1, le=1 << 30)  # seconds from now on the CA's clock
    ends_with: str | None = Field(default=None, max_length=255)  # the workload whose end is its own


class WorkloadLife(Message):
    """Give an instance another end, or none."""

    name: str = Field(max_length=255)
    instance: int = Field(default=0, ge=0)
    ends_at: int | None = Field(default=None, ge=0, le=1 << 40)
    ends_in: int | None = Field(default=None, ge=1, le=1 << 30)
    ends_with: str | None = Field(default=None, max_length=255)


class WorkloadRef(Message):
    name: str = Field(max_length=255)
    instance: int = Field(default=0, ge=0)


class WorkloadMove(Message):
    name: str = Field(max_length=255)
    instance: int = Field(default=0, ge=0)
    to: str = Field(max_length=63)
    wait: float = Field(default=5.0, ge=0, le=300)  # seconds for each phase
    force: bool = False  # commit even when the new holder did not report ready
    dry_run: bool = False  # check it and say who would be told
    wait_lease: bool = False  # wait until a holder that does not answer has fenced itself


class Workload(Message):
    name: str
    instance: int
    spiffe_id: str
    labels: dict[str, str]
    host: str | None
    epoch: int
    state: Literal["unplaced", "active", "moving", "revoked"]
    addresses: list[str]
    fence: Literal["available", "strict"]
    ends_at: int | None = None
    ends_with: str | None = None


class WorkloadList(Message):
    workloads: list[Workload]


class MoveReply(Message):
    """How a move went: milliseconds from the request to each step; None when the step was not waited out."""

    workload: Workload
    from_host: str | None
    prepared_ms: float | None
    committed_ms: float
    released_ms: float | None
    waiting_for: list[str] = []  # endpoints that had not reported when the wait was over
    applied: bool = True  # False for a dry run; `waiting_for` then names whom it would wait for
    silent: bool = False  # the old holder had not answered: peers that did not hear of the move may still hear it
    double_until: int | None = None  # seconds since the epoch: by then it has fenced itself


class PolicyFileIn(Message):
    name: str = Field(max_length=255)
    text: str


class PolicyApply(Message):
    files: list[PolicyFileIn] = Field(max_length=256)
    dry_run: bool = False
    author: str = Field(default="", max_length=255)
    parts: list[str] = Field(default=[], max_length=200)  # what operators signed, identity/records_policy.py


class PolicyReply(Message):
    """The policy in force (or that would be), and what it changes: pairs gained and lost."""

    revision: int
    digest: str
    files: list[PolicyFileIn]
    author: str
    issued: int
    gained: list[dict[str, Any]] = []  # {"src","dst","ports"}
    lost: list[dict[str, Any]] = []
    applied: bool = True
    kind: str = "apply"  # how it came: apply, rollback N, rollout ...


class ExplainReply(Message, Grown):
    """policy.explain's answer, as data; `verdict` is allow or deny."""

    later: ClassVar[frozenset[str]] = frozenset({"audited", "would_deny", "conditions"})

    src: str
    dst: str
    proto: str
    port: int | None
    verdict: Literal["allow", "deny"]
    reason: str
    rule: str | None
    where: str | None  # file:line of the rule
    digest: str
    near_misses: list[str] = []
    smallest_change: str | None = None
    audited: bool = False  # allowed only while something audits
    would_deny: str | None = None  # what denies it then: a rule's id, "default"
    conditions: list[str] = []  # on what an allowed flow depends: processes at the source, a ceiling, an idle timeout
