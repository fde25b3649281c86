"""Policy -> Program: one guardrail tier, top-down by scope, then one segment tier where deny beats allow, then default deny.

Time is an argument: rules whose window is closed or whose grant has ended are left out. Whoever compiles must compile
again at `next_change`. Without a time the narrowest reading holds: nothing that depends on time allows, all of it denies,
and no audit runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from policy import foreign
from policy.model import Consent, Policy, PolicyRule, Segment
from policy.program import (
    Action,
    Alert,
    AnyOf,
    Audit,
    Everything,
    Nothing,
    Program,
    Rule,
    Selector,
    Tier,
    Under,
)
from policy.selectors import both, inside
from policy.windows import show_instant

GUARDRAILS = "guardrails"
SEGMENTS = "segments"


@dataclass(frozen=True, slots=True)
class Inactive:
    """A rule that is written but not in force, and why."""

    rule: Rule
    reason: str
    guardrail: bool = False


def compile_policy(
    policy: Policy, now: int | None = None, running: Collection[str] | None = None, *, audit: bool = True
) -> Program:
    """The program in force at `now` (seconds since the epoch).

    running: names of the workloads that exist, for grants that end with one; without it such grants are not in force.
    audit:   False for the program as if every audit had ended: what tests, lints and replays judge.
    """
    clock = now if audit else None
    guardrails = sorted(
        (g for g in policy.guardrails if _closed(g.rule, now) is None),
        # Ancestors first; in one scope deny beats pass; the id only settles which of two equal denies is named.
        key=lambda g: (g.scope.count("/") + bool(g.scope), g.rule.action is not Action.DENY, g.rule.id),
    )
    first = tuple(
        _rule(g.rule, g.rule.src, g.rule.dst, _under(g.scope), audit=_audits(g.rule, clock)) for g in guardrails
    )
    rest = sorted(
        (r for r, reason in _segment_tier(policy, now, running, clock) if not reason), key=lambda r: r.id
    )
    tiers = (Tier(GUARDRAILS, first, order="first-match"),) if first else ()
    audits = tuple(_audit(s) for s in policy.segments if auditing(s, clock))
    return Program(
        (*tiers, Tier(SEGMENTS, tuple(rest))), digest=policy.digest, audits=audits,
        held=_held(policy, clock) if audits else Nothing(), alerts=_alerts(policy),
        ends=frozenset(g.ends_with for g in policy.grants if g.ends_with is not None),
    )  # fmt: skip


def auditing(segment: Segment, now: int | None) -> bool:
    """Does the segment audit at `now`? From its end date on it enforces, and so does one without members."""
    if segment.mode != "audit" or segment.members is None or segment.audit_until is None:
        return False
    return now is not None and now < segment.audit_until


def _audits(rule: PolicyRule, now: int | None) -> bool:
    return rule.action is Action.DENY and rule.audit_until is not None and now is not None and now < rule.audit_until


def _audit(segment: Segment) -> Audit:
    assert segment.members is not None
    assert segment.audit_until is not None
    return Audit(segment.name, segment.members, segment.audit_until, _under(segment.scope), segment.where)


def _held(policy: Policy, now: int | None) -> Selector:
    """Members of segments that enforce; rules without members speak for nobody."""
    holding = [s for s in policy.segments if s.members is not None and s.mode != "draft" and not auditing(s, now)]
    terms = tuple(dict.fromkeys(both(s.members, _under(s.scope)) for s in holding))
    return AnyOf(terms) if terms else Nothing()


def _alerts(policy: Policy) -> tuple[Alert, ...]:
    return tuple(
        Alert(s.name, both(s.members or Everything(), _under(s.scope)), s.alert.sink, s.alert.collapse)
        for s in policy.segments
        if s.alert is not None and s.mode != "draft"
    )


def inactive(
    policy: Policy, now: int | None = None, running: Collection[str] | None = None
) -> tuple[Inactive, ...]:
    """The rules that `compile_policy` leaves out, with the reason."""
    out = [
        Inactive(_rule(g.rule, g.rule.src, g.rule.dst, _under(g.scope)), reason, guardrail=True)
        for g in policy.guardrails
        if (reason := _closed(g.rule, now))
    ]
    out += [Inactive(rule, reason) for rule, reason in _segment_tier(policy, now, running) if reason]
    return tuple(sorted(out, key=lambda i: i.rule.id))


def next_change(policy: Policy, now: int) -> int | None:
    """The next instant at which `compile_policy` may give something else; nothing changes before it. None: never."""
    instants = [
        instant for g in policy.grants for instant in (g.not_before, g.not_after) if instant is not None
    ]
    for rule in policy.rules():
        if rule.window is not None and (change := rule.window.next_change(now)) is not None:
            instants.append(change)
        if rule.audit_until is not None:
            instants.append(rule.audit_until)
    instants += [s.audit_until for s in policy.segments if s.audit_until is not None]
    return min((instant for instant in instants if instant > now), default=None)


def _segment_tier(
    policy: Policy, now: int | None, running: Collection[str] | None, clock: int | None = None
) -> Iterator[tuple[Rule, str | None]]:
    for segment in policy.segments:
        whole = auditing(segment, clock)
        for rule in segment.rules:
            audit = _audits(rule, clock) or (whole and rule.action is Action.DENY)
            made = _segment_rule(segment, rule, audit)
            if whole and (made.processes or made.max_rate is not None or made.idle_timeout is not None):
                made = replace(made, processes=(), max_rate=None, idle_timeout=None)  # an audit holds nothing back
            yield made, _off(segment, rule) or _closed(rule, now)
    for grant in policy.grants:
        rule, under = grant.rule, _under(grant.scope)
        reason = _closed(rule, now) or _ended(grant.not_before, grant.not_after, now)
        if (
            reason is None
            and grant.ends_with is not None
            and (running is None or grant.ends_with not in running)
        ):
            reason = f"workload {grant.ends_with} has ended"
        yield _rule(rule, both(rule.src, _source(rule.src, under)), both(rule.dst, under), None), reason
    offers = [c for c in policy.consents if c.kind == "offer"]
    accepts = [c for c in policy.consents if c.kind == "accept"]
    for offer in offers:
        for accept in accepts:
            if agree(offer, accept):
                yield _consented(offer, accept), None


def _segment_rule(segment: Segment, rule: PolicyRule, audit: bool) -> Rule:
    under = _under(segment.scope)
    concerns = both(segment.members, under) if segment.members is not None or under is not None else None
    if rule.action is Action.ALLOW and under is not None:
        # Nobody opens a door of somebody else's scope: both ends are inside, whatever the selectors say.
        return _rule(rule, both(rule.src, _source(rule.src, under)), both(rule.dst, under), concerns)
    return _rule(rule, rule.src, rule.dst, concerns, audit=audit)


def _source(src: Selector, under: Selector | None) -> Selector | None:
    """Where the source of an allow may lie. A foreign identity lies in nobody's scope: who is asked alone decides."""
    return AnyOf((under, foreign.EVERY)) if under is not None and foreign.trust_domains(src) else under


def _rule(rule: PolicyRule, src: Selector, dst: Selector, concerns: Selector | None, *, audit: bool = False) -> Rule:
    narrowed = None if isinstance(concerns, Everything) else concerns
    return Rule(rule.id, rule.action, src, dst, rule.ports, rule.where, rule.why, concerns=narrowed, audit=audit,
                max_rate=rule.max_rate, processes=rule.processes, idle_timeout=rule.idle_timeout)  # fmt: skip


def agree(offer: Consent, accept: Consent) -> bool:
    """Does each half name the other's scope (or a path inside it), with a port in common?"""
    offered = inside(offer.peer, accept.scope) or inside(accept.scope, offer.peer)
    accepted = inside(accept.peer, offer.scope) or inside(offer.scope, accept.peer)
    return offered and accepted and bool(offer.ports & accept.ports)


def _consented(offer: Consent, accept: Consent) -> Rule:
    src = both(offer.own, Under(offer.scope), Under(accept.peer))
    dst = both(accept.own, Under(accept.scope), Under(offer.peer))
    why = f"offered by {offer.scope}, accepted by {accept.scope} at {accept.where}"
    rule_id = f"consent:{offer.where}+{accept.where}"
    return Rule(rule_id, Action.ALLOW, src, dst, offer.ports & accept.ports, offer.where, why)


def _under(scope: str) -> Selector | None:
    return Under(scope) if scope else None


def _off(segment: Segment, rule: PolicyRule) -> str | None:
    if segment.mode == "draft":
        return f"segment {segment.name} is a draft"
    return "the rule is a draft" if rule.mode == "draft" else None


def _closed(rule: PolicyRule, now: int | None) -> str | None:
    if rule.mode == "draft":
        return "the rule is a draft"
    if rule.window is None:
        return None
    if now is None:
        return None if rule.action is Action.DENY else "it has a time window and no time was given"
    return None if rule.window.active(now) else f"its time window is closed at {show_instant(now)}"


def _ended(not_before: int | None, not_after: int | None, now: int | None) -> str | None:
    if not_before is None and not_after is None:
        return None
    if now is None:
        return "it is limited in time and no time was given"
    if not_before is not None and now < not_before:
        return f"it begins at {show_instant(not_before)}"
    return f"it ended at {show_instant(not_after)}" if not_after is not None and now >= not_after else None
