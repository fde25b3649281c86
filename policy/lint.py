"""Lints: what is allowed to be written but is probably not meant. Pure; each has a code, a threshold and a fix.

    L01 shadowed rule            L06 group of one               L11 audit past its date
    L02 redundant rule           L07 groups that are the same   L12 a test that covers nothing
    L03 selects nobody           L08 any to any                 L13 a label that nobody can carry
    L04 not hit in N days        L09 grant expired or endless   L14 more rules than the budget
    L05 broader than observed    L10 one-sided consent          L15 a way round to a sensitive segment

L03, L06, L12, L13 and L15 need an inventory, L04 and L05 observed flows; without them they say nothing. A budget that a
segment states itself (rules, unused_ratio) is an error when it is spent; the ones here are advice. All judge what is
enforced once every audit has ended. The numbers behind L05, L06, L07 and L14 are policy/segmentation.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from policy.algebra import implies, witness
from policy.classes import Classes, reach
from policy.compile import GUARDRAILS, agree, compile_policy
from policy.evaluate import applies, matches
from policy.foreign import trust_domains
from policy.model import Policy, Segment
from policy.ports import PortMap, whole
from policy.program import Action, Everything, Program, Rule, Selector, Subject, Where
from policy.segmentation import OVER, RULES, numbers
from policy.selector_index import SelectorIndex, SubjectIndex
from policy.selectors import both
from policy.test import run_tests
from policy.windows import DAY, show_instant

Severity = Literal["error", "warning", "info"]
ORDER: Final[Mapping[Severity, int]] = {"error": 0, "warning": 1, "info": 2}

NEVER_HIT_DAYS: Final = 30
UNUSED_RATIO: Final = 0.5  # share of permitted pairs nobody used
GRANT_DAYS: Final = 90
SEGMENT_RULES: Final = RULES
MANY_GROUPS: Final = 4  # fewer groups are no pattern
MANY_PORTS: Final = whole(6)


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. `fix` says what to do."""

    code: str
    severity: Severity
    message: str
    where: Where | None
    fix: str


@dataclass(frozen=True, slots=True)
class Flow:
    """An observed flow between named subjects; `last_seen` in seconds since the epoch."""

    src: str
    dst: str
    proto: int
    port: int | None
    last_seen: int


def lint(
    policy: Policy, subjects: Sequence[Subject] = (), now: int | None = None, flows: Sequence[Flow] | None = None,
    label_keys: Iterable[str] | None = None,
) -> list[Finding]:  # fmt: skip
    """All findings, worst first. label_keys: the keys that the authority issues, where that is known."""
    program = compile_policy(policy, now, audit=False)
    found = [
        *_shadowed(program),
        *_empty(policy, program, subjects),
        *_groups(policy, subjects),
        *_any_any(program),
    ]
    found += [*_grants(policy, now), *_consents(policy), *_segments(policy, now)]
    found += [*_labels(policy, subjects, label_keys), *_ways_round(policy, program, subjects)]
    if subjects:
        found += _tests(policy, program, subjects)
        found += _numbers(policy, program, subjects, flows)
    if flows is not None:
        found += _observed(program, subjects, flows, now)
    return sorted(found, key=lambda f: (ORDER[f.severity], f.code, str(f.where), f.message))


def _rules(program: Program) -> Iterator[tuple[str, Rule]]:
    for tier in program.tiers:
        for rule in tier.rules:
            yield tier.name, rule


def _covers(wide: Rule, narrow: Rule) -> bool:
    if not implies(narrow.src, wide.src) or not implies(narrow.dst, wide.dst) or narrow.ports - wide.ports:
        return False
    return wide.concerns is None or (narrow.concerns is not None and implies(narrow.concerns, wide.concerns)) or (
        implies(narrow.src, wide.concerns) or implies(narrow.dst, wide.concerns)
    )  # fmt: skip


def _binds(rule: Rule, other: Rule) -> bool:
    """Has the rule a condition that `other` does not have as narrow, or `other` one that the rule lifts?"""
    narrower = any(
        mine is not None and (theirs is None or mine < theirs)
        for mine, theirs in ((rule.max_rate, other.max_rate), (rule.idle_timeout, other.idle_timeout))
    )
    return narrower or (bool(other.processes) and not (rule.processes and set(rule.processes) <= set(other.processes)))


def _shadowed(program: Program) -> Iterator[Finding]:
    rules = list(_rules(program))
    index = SelectorIndex([rule.src for _, rule in rules])
    for tier, rule in rules:
        for other_tier, other in (rules[number] for number in index.implied_by(rule.src)):
            if other is rule or not _covers(other, rule):
                continue
            above = other_tier == GUARDRAILS and tier != GUARDRAILS
            if (
                other.action is Action.DENY
                and rule.action is not Action.DENY
                and (above or other_tier == tier != GUARDRAILS)
            ):
                yield Finding("L01", "warning", f"rule {rule.id} never decides: {other.id} ({other.where}) denies all of it first",
                              rule.where, f"remove {rule.id}, or narrow {other.id}")  # fmt: skip
                break
            if (
                other.action is rule.action
                and other_tier == tier
                and (not _covers(rule, other) or other.id < rule.id or _binds(other, rule))
                and not _binds(rule, other)
            ):
                yield Finding("L02", "warning", f"rule {rule.id} says nothing that {other.id} ({other.where}) does not say",
                              rule.where, f"remove {rule.id}")  # fmt: skip
                break


def _empty(policy: Policy, program: Program, subjects: Sequence[Subject]) -> Iterator[Finding]:
    places: list[tuple[str, Selector, Where | None]] = [
        (f"group {g.name}", g.selector, g.where) for g in policy.groups
    ]
    places += [(f"members of {s.name}", s.members, s.where) for s in policy.segments if s.members is not None]
    for _, rule in _rules(program):
        places += [(f"from of {rule.id}", rule.src, rule.where), (f"to of {rule.id}", rule.dst, rule.where)]
    known = SubjectIndex(subjects)
    for what, selector, where in places:
        if witness(selector, "any") is None and not known.any(selector):
            yield Finding(
                "L03",
                "warning",
                f"{what} can select nobody",
                where,
                "it asks for things that exclude each other",
            )
        elif subjects and not trust_domains(selector) and not known.any(selector):
            yield Finding(
                "L03",
                "info",
                f"{what} selects nobody yet",
                where,
                "nothing to do if such workloads are still to come",
            )


def _groups(policy: Policy, subjects: Sequence[Subject]) -> Iterator[Finding]:
    for index, group in enumerate(policy.groups):
        members = {s.name for s in subjects if matches(group.selector, s)}
        if len(members) == 1:
            yield Finding(
                "L06",
                "info",
                f"group {group.name} has one member, {min(members)}",
                group.where,
                "name the workload, or use a wider group",
            )
        for other in policy.groups[:index]:
            same = implies(group.selector, other.selector) and implies(other.selector, group.selector)
            if same or (members and members == {s.name for s in subjects if matches(other.selector, s)}):
                yield Finding(
                    "L07",
                    "info",
                    f"groups {other.name} and {group.name} are the same",
                    group.where,
                    "keep one of them",
                )


def _any_any(program: Program) -> Iterator[Finding]:
    for _, rule in _rules(program):
        if rule.action is not Action.ALLOW:
            continue
        open_ends = isinstance(rule.src, Everything) + isinstance(rule.dst, Everything)
        if open_ends == 2:
            yield Finding(
                "L08",
                "error" if rule.concerns is None else "warning",
                f"rule {rule.id} allows everybody to everybody",
                rule.where,
                "say who",
            )
        elif open_ends and (rule.ports.rest or not MANY_PORTS - rule.ports):
            yield Finding(
                "L08",
                "warning",
                f"rule {rule.id} opens all ports to or from everybody",
                rule.where,
                "say which ports",
            )


def _grants(policy: Policy, now: int | None) -> Iterator[Finding]:
    for grant in policy.grants if now is not None else ():
        assert now is not None
        end = grant.not_after
        if end is not None and end <= now:
            yield Finding(
                "L09",
                "warning",
                f"{grant.rule.id} ended at {show_instant(end)}",
                grant.rule.where,
                "remove it",
            )
        elif end is None or end - now > GRANT_DAYS * DAY:
            yield Finding(
                "L09",
                "warning",
                f"{grant.rule.id} lasts longer than {GRANT_DAYS} days",
                grant.rule.where,
                "set a nearer not_after, or write a rule",
            )


def _consents(policy: Policy) -> Iterator[Finding]:
    for one in policy.consents:
        others = [c for c in policy.consents if c.kind != one.kind]
        if not any(agree(one, c) if one.kind == "offer" else agree(c, one) for c in others):
            missing = "accept" if one.kind == "offer" else "offer"
            yield Finding("L10", "warning", f"the {one.kind} of {one.scope} to {one.peer} on {one.ports} has no matching {missing}"
                          if one.kind == "offer" else
                          f"the {one.kind} of {one.scope} from {one.peer} on {one.ports} has no matching {missing}",
                          one.where, f"ask the owners of {one.peer} for the {missing}, or remove this")  # fmt: skip


def _segments(policy: Policy, now: int | None) -> Iterator[Finding]:
    for segment in policy.segments:
        if (
            segment.mode == "audit"
            and now is not None
            and segment.audit_until is not None
            and segment.audit_until <= now
        ):
            yield Finding(
                "L11",
                "error",
                f"segment {segment.name} audits past {show_instant(segment.audit_until)}",
                segment.where,
                "enforce it",
            )
        limit = segment.budget.rules or SEGMENT_RULES
        if len(segment.rules) > limit:
            yield Finding(
                "L14",
                "error" if segment.budget.rules is not None else "warning",
                f"segment {segment.name} has {len(segment.rules)} rules; its budget is {limit}",
                segment.where,
                "merge rules, or split the segment",
            )


def _numbers(
    policy: Policy, program: Program, subjects: Sequence[Subject], flows: Sequence[Flow] | None
) -> Iterator[Finding]:
    found = numbers(policy, program, subjects, None if flows is None else [(f.src, f.dst, f.proto, f.port) for f in flows])
    if found.groups >= MANY_GROUPS and found.over > OVER:
        yield Finding("L07", "warning", f"{found.over:.0%} of {found.groups} groups have one member or the rights of another: over-segmented "
                      f"(budget {OVER:.0%}; {found.rights} different rights)", policy.groups[0].where, "merge groups that may do the same")  # fmt: skip
    where = {g.name: g.where for g in policy.groups}
    held = {g.name: {s.name for s in subjects if matches(g.selector, s)} for g in policy.groups}
    for one, other in found.same:
        if held[one] == held[other]:
            continue  # _groups has said so
        yield Finding("L07", "info", f"nothing in the policy tells group {other} from group {one}", where[other], f"merge {other} into {one}")
    by_name = {s.name: s for s in policy.segments}
    for segment in found.segments:
        # Without a budget of its own, L04 and L05 say it rule by rule.
        if segment.under and by_name[segment.name].budget.unused_ratio is not None:
            yield Finding(
                "L05", "error",
                f"{segment.unused:.0%} of the {segment.pairs} pairs that segment {segment.name} permits were never seen: under-segmented "
                f"(budget {segment.unused_budget:.0%})",
                by_name[segment.name].where, "narrow its rules: retinue policy draft shows the least that was used",
            )  # fmt: skip


def _tests(policy: Policy, program: Program, subjects: Sequence[Subject]) -> Iterator[Finding]:
    for result in run_tests(policy, program, subjects):
        if not result.covers or result.stand_in:
            yield Finding("L12", "info" if result.covers else "warning", f"a test covers no workload there is: {result.message}", result.where,
                          "fix its selectors, or leave it if the workloads are still to come")  # fmt: skip


def _labels(
    policy: Policy, subjects: Sequence[Subject], label_keys: Iterable[str] | None
) -> Iterator[Finding]:
    if not policy.label_keys:
        if policy.rules():
            first = policy.rules()[0].where
            yield Finding(
                "L13",
                "info",
                "no label keys are declared, so a misspelt key goes unnoticed",
                first,
                "add labels: {keys: [...]}",
            )
        return
    known = None if label_keys is None else set(label_keys)
    if known is None and subjects:
        known = {key for s in subjects for key in s.labels}
    for scope, keys in policy.label_keys.items() if known is not None else ():
        for key in sorted(set(keys) - (known or set())):
            what = "the authority does not issue" if label_keys is not None else "no workload carries"
            place = f" (scope {scope})" if scope else ""
            yield Finding(
                "L13",
                "warning" if label_keys is not None else "info",
                f"{what} the label {key}{place}",
                None,
                f"remove {key} from labels.keys, or issue it",
            )


def _ways_round(policy: Policy, program: Program, subjects: Sequence[Subject]) -> Iterator[Finding]:
    sensitive = [s for s in policy.segments if s.sensitive and s.members is not None]
    if not sensitive or not subjects:
        return
    classes = Classes(program, subjects)
    seen: set[tuple[str, int]] = set()
    for start in subjects:
        chains = reach(classes, start.name)
        for segment in sensitive:
            if (segment.name, classes.class_of(start.name)) in seen or _member(segment, start):
                continue
            seen.add((segment.name, classes.class_of(start.name)))
            chain = next(
                (c for n, c in chains.items() if len(c) > 2 and _member(segment, classes.subject(n))), None
            )
            if chain is not None:
                yield Finding("L15", "warning", f"sensitive segment {segment.name} can be reached by way of others: {' -> '.join(chain)}",
                              segment.where, "cut one of the steps, or accept it with a reach test of limited depth")  # fmt: skip


def _member(segment: Segment, subject: Subject) -> bool:
    assert segment.members is not None
    scoped = both(segment.members)
    return matches(scoped, subject) and (not segment.scope or subject.name.startswith(segment.scope + "/"))


def _observed(
    program: Program, subjects: Sequence[Subject], flows: Sequence[Flow], now: int | None
) -> Iterator[Finding]:
    by_name = {s.name: s for s in subjects}
    known = [(by_name[f.src], by_name[f.dst], f) for f in flows if f.src in by_name and f.dst in by_name]
    for tier, rule in _rules(program):
        if tier == GUARDRAILS or rule.action is not Action.ALLOW:
            continue
        hits = [
            (src, dst, flow) for src, dst, flow in known
            if rule.ports.allows(flow.proto, flow.port) and applies(rule, "egress", src, dst)
        ]  # fmt: skip
        recent = [h for h in hits if now is None or h[2].last_seen >= now - NEVER_HIT_DAYS * DAY]
        if not recent:
            yield Finding(
                "L04",
                "info",
                f"rule {rule.id} was not used in {NEVER_HIT_DAYS} days",
                rule.where,
                "remove it if nobody needs it",
            )
            continue
        yield from _too_broad(
            rule, subjects, {(src.name, dst.name) for src, dst, _ in recent}, (h[2] for h in recent)
        )


def _too_broad(
    rule: Rule, subjects: Sequence[Subject], used: set[tuple[str, str]], flows: Iterable[Flow]
) -> Iterator[Finding]:
    allowed = {
        (src.name, dst.name)
        for src in subjects if matches(rule.src, src)
        for dst in subjects if dst is not src and applies(rule, "egress", src, dst)
    }  # fmt: skip
    unused = 1 - len(used & allowed) / len(allowed) if allowed else 0.0
    if unused > UNUSED_RATIO:
        yield Finding(
            "L05",
            "info",
            f"{unused:.0%} of the pairs that rule {rule.id} allows were never seen",
            rule.where,
            "narrow its selectors",
        )
    seen = {(f.proto, f.port) for f in flows}
    if _wide(rule.ports) and len(seen) <= 3:
        yield Finding(
            "L05",
            "info",
            f"rule {rule.id} opens {rule.ports}, and {len(seen)} ports were seen",
            rule.where,
            "narrow its ports",
        )


def _wide(ports: PortMap) -> bool:
    return ports.rest or any(bits.bit_count() > 100 for bits in ports.ports.values())
