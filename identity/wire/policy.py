"""Administration of the policy: authority, signed bundles, rollouts, history; and questions to a running CA.

    GET  /v1/policy/authority                      -> AuthorityReply
    POST /v1/policy/authority    AuthorityApply    -> AuthorityReply
    GET  /v1/policy/bundle                         -> BundleReply     (what the next bundle is made from)
    GET  /v1/policy/compare?one=&other=            -> PolicyReply     (identity/wire/admin.py)
    POST /v1/policy/rollback     PolicyRollback    -> PolicyReply
    POST /v1/policy/plan         PolicyPlan        -> PlanReply
    GET  /v1/policy/rollout                        -> RolloutReply
    POST /v1/policy/rollout/start    RolloutStart  -> RolloutReply
    POST /v1/policy/rollout/promote  RolloutStep   -> RolloutReply
    POST /v1/policy/rollout/abort    RolloutStep   -> RolloutReply
    GET  /v1/policy/ask?question=&name=&on=        -> rows of the question, JSON
    GET  /v1/policy/flows                          -> recorded flows, {"text": JSON lines (policy/flows.py)}
    GET  /v1/policy/inventory                      -> the workloads there are, {"text": an inventory}
    GET  /v1/policy/export-history?after=&size=    -> lines of policy/history.py; without a place the first one and the size
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from identity.wire import Message
from identity.wire.admin import PolicyFileIn

_PARTS: Any = Field(default=[], max_length=200)


class AuthorityApply(Message):
    """The whole chain of documents; a bundle when the policy in force has to be signed anew for it."""

    chain: list[str] = Field(max_length=256)
    files: list[PolicyFileIn] = Field(default=[], max_length=256)
    parts: list[str] = _PARTS


class AuthorityReply(Message):
    """Version 0 and an empty chain: there is none, the CA's policy key alone signs."""

    version: int
    fingerprint: str
    chain: list[str]


class BundleReply(Message):
    trust_domain: str
    revision: int
    digest: str
    files: list[PolicyFileIn]
    parts: list[str]
    authority: list[str]


class PolicyRollback(Message):
    revision: int = Field(ge=1)
    author: str = Field(default="", max_length=255)
    parts: list[str] = _PARTS


class PolicyPlan(Message):
    files: list[PolicyFileIn] = Field(max_length=256)
    parts: list[str] = _PARTS
    budget: int = Field(default=0, ge=0)


class PlanReply(Message):
    """`good`: may it be published? `signed`: says why it is not signed well enough, empty when it is (or need not be)."""

    good: bool
    digest: str
    signed: str
    tests: list[dict[str, Any]]
    lints: list[dict[str, Any]]
    gained: list[dict[str, Any]]
    lost: list[dict[str, Any]]
    replayed: dict[str, Any]


class CanaryChoice(Message):
    """One of these."""

    labels: dict[str, str] = {}
    percent: int | None = None
    hosts: list[str] = Field(default=[], max_length=1000)
    everybody: bool = False


class RolloutStart(Message):
    files: list[PolicyFileIn] = Field(max_length=256)
    parts: list[str] = _PARTS
    author: str = Field(default="", max_length=255)
    canary: CanaryChoice
    watch: int = 3600  # seconds
    budget: int = 0  # distinct flows
    auto: bool = False
    force: bool = False


class RolloutStep(Message):
    canary: CanaryChoice | None = None
    why: str = Field(default="", max_length=400)


class RolloutReply(Message):
    """`rollout` is ca.rollouts.Rollout, None before the first; `counted` flows spend the budget."""

    rollout: dict[str, Any] | None
    counted: int = 0
    denials: list[dict[str, Any]] = []
