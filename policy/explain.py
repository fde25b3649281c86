"""Why a flow is allowed or denied: what decided, which rules nearly did, and the smallest change that would flip it.

Every change that is offered has been applied to the program and evaluated: it does flip the verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from policy import foreign
from policy.compile import GUARDRAILS, SEGMENTS, Inactive
from policy.document import quote
from policy.evaluate import Decision, bounds, evaluate, matches, possible, show_flow, strict
from policy.ports import ICMP, ICMPV6, PortMap, proto_name, single
from policy.program import (
    BOTH,
    Action,
    AllOf,
    AnyOf,
    Everything,
    Exists,
    In,
    Named,
    Nets,
    Not,
    Program,
    Rule,
    Selector,
    Subject,
    Tier,
    Under,
)  # fmt: skip

if TYPE_CHECKING:
    from identity.wire.admin import ExplainReply

MAX_NEAR_MISSES = 10
End = Literal["source", "destination"]


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A rule that would have decided otherwise but for one thing. `failed` says what, in words."""

    rule: Rule
    failed: str


@dataclass(frozen=True, slots=True)
class SetLabel:
    """Give the subject a label, or take it away (`value` None)."""

    subject: str
    key: str
    value: str | None


@dataclass(frozen=True, slots=True)
class ChangePorts:
    """Replace the ports of a rule."""

    rule_id: str
    ports: PortMap


@dataclass(frozen=True, slots=True)
class DropRule:
    rule_id: str


@dataclass(frozen=True, slots=True)
class AddRule:
    """Put a rule first in the tier of that name (a tier that does not exist is added at the end)."""

    rule: Rule
    tier: str


Edit = SetLabel | ChangePorts | DropRule | AddRule


@dataclass(frozen=True, slots=True)
class Change:
    """Edits that together flip the verdict; `text` for people, `snippet` ready to paste (may be empty)."""

    edits: tuple[Edit, ...]
    text: str
    snippet: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision with what surrounds it. `changes` are all verified, smallest first; `conditions` bind an allowed flow."""

    decision: Decision
    near_misses: tuple[NearMiss, ...]
    changes: tuple[Change, ...]
    conditions: tuple[str, ...] = ()

    @property
    def smallest_change(self) -> Change | None:
        """None only for a flow that cannot exist (such as port 70000)."""
        return self.changes[0] if self.changes else None


def explain(
    program: Program,
    src: Subject,
    dst: Subject,
    proto: int,
    port: int | None = None,
    *,
    asleep: Iterable[Inactive] = (),
) -> Explanation:
    """Explain one flow. `asleep`: rules that are written but not in force (policy.compile.inactive)."""
    proto = ICMP if proto == ICMPV6 else proto
    decision = evaluate(program, src, dst, proto, port)
    if not possible(proto, port):
        return Explanation(decision, (), ())
    if decision.audited:
        # What is asked is what to do before the audit ends.
        return replace(explain(strict(program), src, dst, proto, port, asleep=asleep), decision=decision)
    near, candidates = _nearly(program, decision, src, dst, proto, port)
    for one in asleep:
        if (
            _failures(one.rule, src, dst, proto, port) == []
            and (one.rule.action is Action.ALLOW) != decision.allowed
        ):
            near.append(NearMiss(one.rule, f"it is not in force: {one.reason}"))
            text = f"put rule {one.rule.id}{_at(one.rule)} in force: {one.reason}"
            tier = GUARDRAILS if one.guardrail else SEGMENTS
            candidates.append(Change((AddRule(one.rule, tier),), text))
    candidates += _blunt(program, decision, src, dst, proto, port)
    seen: set[tuple[Edit, ...]] = set()
    kept = []
    for change in candidates:
        if change.edits in seen:
            continue
        seen.add(change.edits)
        if evaluate(*apply(change.edits, program, src, dst), proto, port).allowed != decision.allowed:
            kept.append(change)
    kept.sort(key=lambda c: (len(c.edits), [_WEIGHT[type(e)] for e in c.edits]))
    return Explanation(decision, tuple(near[:MAX_NEAR_MISSES]), tuple(kept), conditions(program, src, dst, proto, port))


def conditions(program: Program, src: Subject, dst: Subject, proto: int, port: int | None) -> tuple[str, ...]:
    """On what an allowed flow depends besides its ends, for people: who may use it at the source, how fast, how silent."""
    if not evaluate(strict(program), src, dst, proto, port).allowed:
        return ()
    said = []
    for bound in (b for b in bounds(program, src, dst) if b.ports.allows(proto, port)):
        if bound.processes:
            said.append(f"only {' or '.join(map(str, bound.processes))} at the source by {bound.rule}")
        if bound.max_rate is not None:
            said.append(f"at most {8 * bound.max_rate} bit/s each way by {bound.rule}")
        if bound.idle_timeout is not None:
            said.append(f"ended after {bound.idle_timeout} s of silence by {bound.rule}")
    return tuple(said)


_WEIGHT = {ChangePorts: 0, SetLabel: 1, DropRule: 2, AddRule: 3}


def apply(
    edits: Iterable[Edit], program: Program, src: Subject, dst: Subject
) -> tuple[Program, Subject, Subject]:
    """The program and subjects after the edits."""
    for edit in edits:
        if isinstance(edit, SetLabel):
            src, dst = _labelled(src, edit), _labelled(dst, edit)
        elif isinstance(edit, AddRule):
            tiers = [
                replace(t, rules=(edit.rule, *t.rules)) if t.name == edit.tier else t for t in program.tiers
            ]
            if all(t.name != edit.tier for t in tiers):
                tiers.append(Tier(edit.tier, (edit.rule,)))
            program = replace(program, tiers=tuple(tiers))
        else:
            tiers = [replace(t, rules=tuple(_edited(t.rules, edit))) for t in program.tiers]
            program = replace(program, tiers=tuple(tiers))
    return program, src, dst


def _edited(rules: Iterable[Rule], edit: ChangePorts | DropRule) -> Iterator[Rule]:
    for rule in rules:
        if rule.id != edit.rule_id:
            yield rule
        elif isinstance(edit, ChangePorts):
            yield replace(rule, ports=edit.ports)


def _labelled(subject: Subject, edit: SetLabel) -> Subject:
    if subject.name != edit.subject:
        return subject
    labels = {k: v for k, v in subject.labels.items() if k != edit.key}
    if edit.value is not None:
        labels[edit.key] = edit.value
    return replace(subject, labels=labels)


def flips(change: Change, program: Program, src: Subject, dst: Subject, proto: int, port: int | None) -> bool:
    """Does the change turn the verdict round?"""
    before = evaluate(program, src, dst, proto, port).allowed
    return evaluate(*apply(change.edits, program, src, dst), proto, port).allowed != before


# ---- near misses


@dataclass(frozen=True, slots=True)
class _Failure:
    """One predicate that did not hold, and the edit that would make it hold, if there is one."""

    text: str
    edit: SetLabel | None = None
    ports: bool = False


def _nearly(
    program: Program, decision: Decision, src: Subject, dst: Subject, proto: int, port: int | None
) -> tuple[list[NearMiss], list[Change]]:
    near: list[NearMiss] = []
    changes: list[Change] = []
    other = {Action.DENY} if decision.allowed else {Action.ALLOW}
    for tier in program.tiers:
        for rule in tier.rules:
            if rule.action not in other or not (decision.allowed or decision.direction in rule.directions):
                continue
            failed = _failures(rule, src, dst, proto, port)
            if not failed:
                winner = (
                    f"rule {decision.rule.id}"
                    if decision.rule
                    else f"tier {decision.tier}"
                    if decision.tier
                    else "the default"
                )
                near.append(NearMiss(rule, f"it matches, but {winner}{_at(decision.rule)} decides first"))
            elif len(failed) == 1:
                near.append(NearMiss(rule, failed[0].text))
                changes += _repair(rule, failed[0], proto, port)
    return near, changes


def _repair(rule: Rule, failure: _Failure, proto: int, port: int | None) -> Iterator[Change]:
    if failure.ports:
        flow = show_flow(proto, port)
        yield Change(
            (ChangePorts(rule.id, rule.ports | single(proto, port)),),
            f"add {flow} to rule {rule.id}{_at(rule)}",
        )
    elif failure.edit is not None:
        edit = failure.edit
        word = (
            f"give {edit.subject} the label {edit.key}={edit.value}"
            if edit.value is not None
            else f"take the label {edit.key} from {edit.subject}"
        )
        yield Change((edit,), f"{word}, so that rule {rule.id}{_at(rule)} matches")


def _failures(rule: Rule, src: Subject, dst: Subject, proto: int, port: int | None) -> list[_Failure]:
    out = [*_unmet(rule.src, src, "source"), *_unmet(rule.dst, dst, "destination")]
    concerns = rule.concerns
    if concerns is not None and not matches(concerns, src) and not matches(concerns, dst):
        ends = (_unmet(concerns, src, "source"), _unmet(concerns, dst, "destination"))
        nearer = min(ends, key=len)
        text = f"neither end is one of the workloads it is about ({show(concerns)})"
        out += [replace(nearer[0], text=text)] if len(nearer) == 1 else [_Failure(text), _Failure(text)]
    if not rule.ports.allows(proto, port):
        out.append(_Failure(f"it is about {rule.ports}, not {show_flow(proto, port)}", ports=True))
    return out


def _unmet(selector: Selector, subject: Subject, end: End) -> list[_Failure]:
    """The fewest predicates that keep the selector from matching."""
    if matches(selector, subject):
        return []
    if isinstance(selector, AllOf):
        return [failure for term in selector.terms for failure in _unmet(term, subject, end)]
    if isinstance(selector, AnyOf) and selector.terms:
        return min((_unmet(term, subject, end) for term in selector.terms), key=len)
    edit = None
    if isinstance(selector, In) and not subject.nets and not subject.foreign and selector.values:
        edit = SetLabel(subject.name, selector.key, min(selector.values))
    elif isinstance(selector, Not) and isinstance(selector.term, In | Exists):
        edit = SetLabel(subject.name, selector.term.key, None)
    return [_Failure(f"the {end} {subject.name} {_lacks(selector, subject)}", edit)]


def _lacks(selector: Selector, subject: Subject) -> str:
    if isinstance(selector, In):
        have = subject.labels.get(selector.key)
        found = f"it has {selector.key}={have}" if have is not None else f"it has no label {selector.key}"
        return f"does not match {show(selector)}: {found}"
    return f"does not match {show(selector)}"


def show(selector: Selector) -> str:
    """A selector in one line for people."""
    if isinstance(selector, In):
        values = sorted(selector.values)
        return (
            f"{selector.key}={values[0]}" if len(values) == 1 else f"{selector.key} in [{', '.join(values)}]"
        )
    if isinstance(selector, Exists):
        return f"{selector.key} present"
    if isinstance(selector, Not):
        return f"not ({show(selector.term)})"
    if isinstance(selector, AllOf):
        return (
            " and ".join(f"({show(t)})" if isinstance(t, AnyOf) else show(t) for t in selector.terms)
            or "everybody"
        )
    if isinstance(selector, AnyOf):
        return " or ".join(show(t) for t in selector.terms) or "nobody"
    if isinstance(selector, Named):
        names = ", ".join(sorted(selector.names))
        return names if all(map(foreign.is_foreign, selector.names)) else f"workload {names}"
    if isinstance(selector, Under):
        return f"below {selector.prefix}"
    if isinstance(selector, Nets):
        minus = f" except {', '.join(selector.excluding)}" if selector.excluding else ""
        return f"address in {', '.join(selector.cidrs)}{minus}"
    return "everybody inside" if isinstance(selector, Everything) else "nobody"


def _at(rule: Rule | None) -> str:
    return f" ({rule.where})" if rule is not None and rule.where else ""


# ---- changes that always work


def _blunt(
    program: Program, decision: Decision, src: Subject, dst: Subject, proto: int, port: int | None
) -> list[Change]:
    """Remove what blocks and add what is missing (or the reverse), step by step until the verdict flips."""
    edits: list[Edit] = []
    texts: list[str] = []
    snippet = ""
    now = program
    action = Action.DENY if decision.allowed else Action.ALLOW
    step = decision
    for _ in range(2 * sum(len(t.rules) for t in program.tiers) + 2 * len(program.tiers) + 4):
        edit: Edit
        if step.rule is not None and not any(
            isinstance(e, DropRule) and e.rule_id == step.rule.id for e in edits
        ):
            left = step.rule.ports - single(proto, port)
            if step.rule.action is Action.ALLOW and left:
                edit = ChangePorts(step.rule.id, left)
                texts.append(f"take {show_flow(proto, port)} from rule {step.rule.id}{_at(step.rule)}")
            else:
                edit = DropRule(step.rule.id)
                texts.append(f"remove rule {step.rule.id}{_at(step.rule)}, or except this pair from it")
        else:
            tier = step.tier or (program.tiers[-1].name if program.tiers else SEGMENTS)
            rule = _new_rule(now, action, src, dst, proto, port)
            edit, snippet = AddRule(rule, tier), _snippet(rule, src, dst, proto, port)
            texts.append(f"{action} it: add rule {rule.id} from {src.name} to {dst.name} on {rule.ports}")
        edits.append(edit)
        now, _, _ = apply((edit,), now, src, dst)
        step = evaluate(now, src, dst, proto, port)
        if step.allowed != decision.allowed:
            found = [Change(tuple(edits), ", and ".join(texts), snippet)]
            if decision.allowed and not isinstance(edits[0], AddRule):
                rule = _new_rule(program, Action.DENY, src, dst, proto, port)
                text = f"deny it: add rule {rule.id} from {src.name} to {dst.name} on {rule.ports}"
                found.append(
                    Change(
                        (AddRule(rule, decision.tier or SEGMENTS),),
                        text,
                        _snippet(rule, src, dst, proto, port),
                    )
                )
            return found
    return []  # a flow that cannot exist


def _new_rule(
    program: Program, action: Action, src: Subject, dst: Subject, proto: int, port: int | None
) -> Rule:
    taken = {rule.id for tier in program.tiers for rule in tier.rules}
    stem = f"{_slug(src.name)}-{'not-' if action is Action.DENY else ''}to-{_slug(dst.name)}"
    rule_id = next(i for i in (stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 3))) if i not in taken)
    return Rule(
        rule_id,
        action,
        Named(frozenset({src.name})),
        Named(frozenset({dst.name})),
        single(proto, port),
        directions=BOTH,
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "x"


def _snippet(rule: Rule, src: Subject, dst: Subject, proto: int, port: int | None) -> str:
    """A file's `segments:` section with the rule; it can be merged into a file or added as one."""
    source = quote(src.name) if src.foreign else f"{{workload: {quote(src.name)}}}"
    ends = f"from: {source}, to: {{workload: {quote(dst.name)}}}"
    flow = show_flow(proto, port)
    on = flow if not flow.isdigit() else quote(flow)
    return f"segments:\n  - name: {_segment_name(rule.id)}\n    {rule.action}:\n      - {{id: {rule.id}, {ends}, on: {on}}}\n"


def _segment_name(rule_id: str) -> str:
    return rule_id[:63].strip("-") if rule_id[:1].isalpha() else f"s-{rule_id}"[:63].strip("-")


def to_json(found: Explanation) -> dict[str, object]:
    """The explanation as JSON-able data, for ``-o json`` and the local API."""
    decision = found.decision
    return {
        "verdict": decision.verdict,
        "reason": decision.reason,
        "rule": decision.rule.id if decision.rule else None,
        "where": str(decision.rule.where) if decision.rule and decision.rule.where else None,
        "tier": decision.tier,
        "direction": decision.direction,
        "audited": decision.audited,
        "would_be_denied_by": decision.by if decision.audited else None,
        "digest": decision.digest,
        "conditions": list(found.conditions),
        "near_misses": [
            {"rule": m.rule.id, "where": str(m.rule.where) if m.rule.where else None, "failed": m.failed}
            for m in found.near_misses
        ],
        "changes": _changes(found.changes),
    }


def to_reply(found: Explanation, src: str, dst: str, proto: int, port: int | None) -> ExplainReply:
    """The explanation as the CA and the agents send it; src and dst as they were asked for."""
    from identity.wire.admin import ExplainReply

    decision, rule = found.decision, found.decision.rule
    return ExplainReply(
        src=src, dst=dst, proto=proto_name(proto), port=port, verdict=decision.verdict, reason=decision.reason,
        rule=rule.id if rule else None, where=str(rule.where) if rule and rule.where else None, digest=decision.digest,
        near_misses=[f"{m.rule.id}: {m.failed}" for m in found.near_misses],
        smallest_change=str(found.smallest_change) if found.smallest_change else None,
        audited=decision.audited, would_deny=decision.by if decision.audited else None, conditions=list(found.conditions),
    )  # fmt: skip


def _changes(changes: Sequence[Change]) -> list[dict[str, str]]:
    return [{"text": c.text, "snippet": c.snippet} if c.snippet else {"text": c.text} for c in changes]
