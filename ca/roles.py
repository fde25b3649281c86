"""Who may ask for what: one table of every administrative route. Pure.

    viewer      reads; no answer to a read carries a secret
    registrar   tokens, workloads, moves, registration entries; with scopes, only below its own subtrees
    operator    policy, revocations, everything a registrar may, everywhere
    ca-admin    the authority itself, administrators

Some acts want two persons: the first asks, another one approves, the first asks again within the hour and it is done. A
route that the table does not name is for ca-admins with two persons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from identity.errors import Refused
from identity.wire.people import Role

RANK: Final[Mapping[str, int]] = {"viewer": 0, "registrar": 1, "operator": 2, "ca-admin": 3}
SOON: Final = 3600  # an end within this many seconds is as good as a revocation

VIEWER, REGISTRAR, OPERATOR, CA_ADMIN = "viewer", "registrar", "operator", "ca-admin"

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. actor: as the audit names it; local: over the unix socket, which is break-glass and may do everything."""

    actor: str
    role: Role
    scopes: tuple[str, ...] = ()
    local: bool = False
    name: str = ""

    def reaches(self, role: str) -> bool:
        """Is its role at least this one?"""
        return RANK[self.role] >= RANK[role]

    def covers(self, name: str) -> bool:
        """Does a workload name lie in its scopes?"""
        return not self.scopes or any(inside(name, scope) for scope in self.scopes)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route wants. subject: the field of the body with the workload it is about, None for no workload (then an
    administrator with scopes may not write there); by_id: the route itself checks the scope. two: wants a second person.
    """

    role: Role
    subject: str | None = None
    by_id: bool = False
    two: bool | Callable[[Body, int], bool] = False

    def wants_two(self, body: Body, now: int) -> bool:
        return self.two(body, now) if callable(self.two) else self.two


def _forced(body: Body, _: int) -> bool:
    return body.get("force") is True


def _soon(body: Body, now: int) -> bool:
    """An end that comes at once is a revocation by another name."""
    within, at = body.get("ends_in"), body.get("ends_at")
    return (isinstance(within, int) and within < SOON) or (isinstance(at, int) and at < now + SOON) or body.get("ends_with") is not None


TABLE: Final[Mapping[tuple[str, str], Rule]] = {
    ("GET", "/v1/info"): Rule("viewer"),
    ("GET", "/v1/hosts"): Rule("viewer"),
    ("GET", "/v1/workloads"): Rule("viewer"),
    ("GET", "/v1/entries"): Rule("viewer"),
    ("GET", "/v1/policy"): Rule("viewer"),
    ("GET", "/v1/policy/history"): Rule("viewer"),
    **{("GET", f"/v1/policy/{read}"): Rule("viewer") for read in (
        "authority", "bundle", "compare", "rollout", "ask", "flows", "inventory", "export-history",
    )},
    ("GET", "/v1/explain"): Rule("viewer"),
    ("GET", "/v1/explain/identity"): Rule("viewer"),
    ("GET", "/v1/audit"): Rule("viewer"),
    ("GET", "/v1/audit/verify"): Rule("viewer"),
    ("GET", "/v1/log"): Rule("viewer"),
    ("GET", "/v1/log/proof"): Rule("viewer"),
    ("GET", "/v1/admins"): Rule("viewer"),
    ("GET", "/v1/approvals"): Rule("viewer"),
    ("POST", "/v1/approvals"): Rule("registrar", by_id=True),  # and the role that the act itself wants
    ("POST", "/v1/admins/renew"): Rule("viewer", by_id=True),  # one's own
    ("POST", "/v1/tokens"): Rule("registrar", subject="workload"),
    ("POST", "/v1/workloads"): Rule("registrar", subject="name"),
    ("POST", "/v1/workloads/move"): Rule("registrar", subject="name", two=_forced),
    ("POST", "/v1/workloads/move/steps"): Rule("registrar", subject="name", two=_forced),
    ("POST", "/v1/workloads/abort"): Rule("registrar", subject="name"),
    ("POST", "/v1/orchestrator/events"): Rule("registrar", subject="workload"),
    ("POST", "/v1/hosts/drain"): Rule("operator", two=_forced),
    ("POST", "/v1/hosts/undrain"): Rule("operator"),
    ("POST", "/v1/workloads/life"): Rule("registrar", subject="name", two=_soon),
    ("POST", "/v1/entries"): Rule("registrar", subject="name"),
    ("POST", "/v1/entries/delete"): Rule("registrar", by_id=True),
    ("POST", "/v1/workloads/revoke"): Rule("operator", subject="name", two=True),
    ("POST", "/v1/hosts/revoke"): Rule("operator", two=True),
    ("POST", "/v1/policy"): Rule("operator"),
    ("POST", "/v1/policy/plan"): Rule("viewer", by_id=True),  # tries, and changes nothing
    ("POST", "/v1/policy/rollback"): Rule("operator"),
    ("POST", "/v1/policy/rollout/start"): Rule("operator"),
    ("POST", "/v1/policy/rollout/promote"): Rule("operator"),
    ("POST", "/v1/policy/rollout/abort"): Rule("operator"),
    ("POST", "/v1/policy/authority"): Rule("ca-admin", two=True),  # who may sign policy
    ("GET", "/v1/authority"): Rule("viewer"),
    ("GET", "/v1/federation"): Rule("viewer"),
    ("GET", "/v1/federation/own"): Rule("viewer"),
    ("POST", "/v1/federation"): Rule("ca-admin"),
    ("POST", "/v1/federation/remove"): Rule("ca-admin"),
    ("POST", "/v1/federation/refresh"): Rule("operator"),
    ("GET", "/v1/hosts/standing"): Rule("viewer"),
    ("POST", "/v1/hosts/recover"): Rule("operator"),
    ("POST", "/v1/hosts/unquarantine"): Rule("operator"),
    ("POST", "/v1/authority/prepare"): Rule("ca-admin"),
    ("POST", "/v1/authority/activate"): Rule("ca-admin"),
    ("POST", "/v1/authority/taint"): Rule("ca-admin", two=True),
    ("POST", "/v1/authority/revoke"): Rule("ca-admin", two=True),
    ("POST", "/v1/authority/block"): Rule("ca-admin", two=True),
    ("POST", "/v1/authority/unblock"): Rule("ca-admin", two=True),
    ("POST", "/v1/admins"): Rule("ca-admin", two=True),
    ("POST", "/v1/admins/certify"): Rule("ca-admin", two=True),
    ("POST", "/v1/admins/revoke"): Rule("ca-admin", two=True),
}
UNKNOWN: Final = Rule("ca-admin", two=True)


def rule_of(method: str, path: str) -> Rule:
    """The rule of a route; HEAD is asked as GET is."""
    return TABLE.get(("GET" if method == "HEAD" else method, path), UNKNOWN)


def inside(name: str, scope: str) -> bool:
    """Is a workload name in a subtree (``payments/*``), or is it the very name?"""
    return name.startswith(scope[:-1]) and len(name) > len(scope) - 1 if scope.endswith("/*") else name == scope


def permit(who: Principal, rule: Rule, method: str, body: Body) -> None:
    """May this person ask this at all? Raises Refused ``admin.role``, ``admin.scope``."""
    if not who.reaches(rule.role):
        raise Refused("admin.role", f"this wants the role {rule.role}; {who.actor} is {who.role}", hint="ask someone who has it")
    if not who.scopes or method in {"GET", "HEAD"} or rule.by_id:
        return
    subject = body.get(rule.subject) if rule.subject is not None else None
    if not isinstance(subject, str) or not who.covers(subject):
        raise out_of_scope(who, who.scopes)


def out_of_scope(who: Principal, scopes: Sequence[str]) -> Refused:
    """The refusal for what lies outside of an administrator's subtrees."""
    return Refused("admin.scope", f"{who.actor} may do this below {', '.join(scopes)} only", hint="ask an administrator of the whole")
