"""A policy as people wrote it, checked and resolved: values only. Made by policy/language.py, compiled by policy/compile.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from policy.ports import PortMap
from policy.program import Action, Process, Selector, Where
from policy.windows import Window

Mode = Literal["draft", "audit", "enforce"]


@dataclass(frozen=True, slots=True)
class Group:
    """A named selector; `uses` are the groups it names directly."""

    name: str
    scope: str
    selector: Selector
    where: Where
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Service:
    name: str
    scope: str
    ports: PortMap
    where: Where


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One allow, deny or pass as written. `words` are the source's own words for from, to and on, for people.

    max_rate: bytes a second; processes: who may use it at the source (empty: all); idle_timeout: seconds of silence after
    which a flow of it is ended.
    """

    id: str
    action: Action
    src: Selector
    dst: Selector
    ports: PortMap
    where: Where
    why: str = ""
    window: Window | None = None
    mode: Mode = "enforce"
    words: tuple[str, str, str] = ("", "", "")
    audit_until: int | None = None
    max_rate: int | None = None
    processes: tuple[Process, ...] = ()
    idle_timeout: int | None = None


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A deny or pass that nothing below its scope can override."""

    scope: str
    rule: PolicyRule


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that the lints hold a segment to."""

    rules: int | None = None
    unused_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class AlertOn:
    """Whom a segment tells of refused flows: the sink's name, and for how many seconds one incident collects."""

    sink: str
    collapse: int


@dataclass(frozen=True, slots=True)
class Review:
    """How many owners must approve a change of what lies at `paths` (empty: all of the scope)."""

    scope: str
    approvals: int
    paths: tuple[str, ...]
    where: Where


@dataclass(frozen=True, slots=True)
class Idle:
    """What becomes of workloads that are powered down: they stay members for `keep_membership` seconds (None: always)."""

    scope: str
    keep_membership: int | None
    on_return: str
    where: Where


@dataclass(frozen=True, slots=True)
class Segment:
    """Rules that only concern flows with at least one end among `members` (None: everybody in the scope)."""

    name: str
    scope: str
    members: Selector | None
    mode: Mode
    rules: tuple[PolicyRule, ...]
    where: Where
    audit_until: int | None = None
    budget: Budget = Budget()
    sensitive: bool = False
    alert: AlertOn | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """A temporary allow: it ends at `not_after` or when the workload `ends_with` ends, whichever is first."""

    scope: str
    rule: PolicyRule
    not_before: int | None = None
    not_after: int | None = None
    ends_with: str | None = None
    approved_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Consent:
    """One half of a flow between two scopes: an offer (of the source's scope) or an accept (of the destination's)."""

    kind: Literal["offer", "accept"]
    scope: str
    own: Selector
    peer: str  # the path in the other scope
    ports: PortMap
    where: Where


@dataclass(frozen=True, slots=True)
class FlowTest:
    """Every flow from `src` to `dst` on `ports` must be allowed, or none of them."""

    src: Selector
    dst: Selector
    ports: PortMap
    expect: Literal["allow", "deny"]
    where: Where
    by: str = ""
    at: int | None = None
    words: tuple[str, str, str] = ("", "", "")
    scope: str = ""


@dataclass(frozen=True, slots=True)
class ReachTest:
    """No chain of permitted flows of at most `depth` steps (None: any) leads from `src` to `never`."""

    src: Selector
    never: Selector
    depth: int | None
    where: Where
    words: tuple[str, str] = ("", "")
    scope: str = ""


@dataclass(frozen=True, slots=True)
class ReplayTest:
    """Of the flows that were recorded as forwarded in the last `seconds`, at most `max_new_denied` would be denied."""

    seconds: int
    max_new_denied: int
    where: Where
    words: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """All files as one policy. Sequences are sorted, so equal policies compare equal whatever their file order."""

    digest: str
    files: tuple[str, ...] = ()
    owners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # scope -> who signs for it
    label_keys: Mapping[str, Mapping[str, frozenset[str]]] = field(
        default_factory=dict
    )  # scope -> key -> values (empty: any)
    groups: tuple[Group, ...] = ()
    services: tuple[Service, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    segments: tuple[Segment, ...] = ()
    grants: tuple[Grant, ...] = ()
    consents: tuple[Consent, ...] = ()
    tests: tuple[FlowTest | ReachTest | ReplayTest, ...] = ()
    reviews: tuple[Review, ...] = ()
    idle: tuple[Idle, ...] = ()

    def rules(self) -> tuple[PolicyRule, ...]:
        """Every rule of every guardrail, segment and grant."""
        return (
            *(g.rule for g in self.guardrails),
            *(r for s in self.segments for r in s.rules),
            *(g.rule for g in self.grants),
        )
