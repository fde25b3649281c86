"""The one evaluator. Pure and total: a program, two subjects, a protocol and a port in; a decision with its reason out.

`evaluate` decides one flow and names what decided; `permitted` gives everything a pair may use, by set algebra over
the same matching rules. Tests, simulation, audit, explain, the gateway and the compiled firewall all stand on these
two.

Who a selector matches:
    an inside subject (no `nets`)  Everything, Named, Under, In, Exists by its name and labels; never Nets
    a foreign subject              Named and Under by its SPIFFE ID; never Everything or a label
    an outside subject (`nets`)    Named, Under, In, Exists by its own name and labels; Nets when all of its addresses
                                   are in; never Everything
    Not, AllOf, AnyOf              plain Boolean algebra over the above (an empty AllOf is true, an empty AnyOf false)
An outside subject whose addresses a program treats differently is decided part by part: what is permitted is what is
permitted to every part, and a denial names the first part that is denied.

Audit. What enforcement would say comes first (`strict`). A denial of it is only recorded, and the flow is allowed, when
    the rules that are not in audit allow the flow, or
    they deny it by default alone and an audit covers the pair (`covered`): both ends are members of one auditing
    segment, or one end is and the rules permit the two something already; and neither end is a member of an enforcing
    segment.
So an audit never makes two workloads acquainted of which neither rules nor a common segment say anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from policy import nets
from policy.ports import (
    ANYTHING,
    FLOWING,
    ICMP,
    ICMPV6,
    MAX_PORT,
    NOTHING,
    PORTED,
    PortMap,
    proto_name,
    ranges,
    union,
)
from policy.program import (
    BOTH,
    Action,
    AllOf,
    AnyOf,
    Audit,
    Direction,
    Everything,
    Exists,
    In,
    Named,
    Nets,
    Not,
    Process,
    Program,
    Rule,
    Selector,
    Subject,
    Tier,
    Under,
)  # fmt: skip
from policy.windows import show_instant


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict and what decided it.

    rule:      the deciding rule, None when a tier's isolation, its `otherwise` or the default decided
    reason:    one sentence for people
    direction: the direction that decided (for an allow: the one whose rule is named)
    tier:      the tier that decided, empty for the program's default
    would:     the denial that enforcement would give, for a flow that is allowed only while something audits
    """

    verdict: Literal["allow", "deny"]
    rule: Rule | None
    reason: str
    digest: str
    direction: Direction
    tier: str = ""
    would: Decision | None = None

    @property
    def allowed(self) -> bool:
        return self.verdict == "allow"

    @property
    def audited(self) -> bool:
        """Is it allowed only because something audits?"""
        return self.would is not None

    @property
    def by(self) -> str:
        """What decided, in one word: the rule's id, ``tier NAME`` or ``default``; for an audited flow its denial's."""
        one = self.would or self
        return one.rule.id if one.rule is not None else f"tier {one.tier}" if one.tier else "default"


def matches(selector: Selector, subject: Subject) -> bool:
    """Does the selector select the subject? Raises BadInput only for addresses that are none."""
    if isinstance(selector, In):
        value = subject.labels.get(selector.key)
        return value is not None and value in selector.values
    if isinstance(selector, AllOf):
        return all(matches(term, subject) for term in selector.terms)
    if isinstance(selector, AnyOf):
        return any(matches(term, subject) for term in selector.terms)
    if isinstance(selector, Named):
        return subject.name in selector.names
    if isinstance(selector, Not):
        return not matches(selector.term, subject)
    if isinstance(selector, Everything):
        return not subject.nets and not subject.foreign
    if isinstance(selector, Exists):
        return selector.key in subject.labels
    if isinstance(selector, Under):
        return subject.name == selector.prefix or subject.name.startswith(selector.prefix + "/")
    if isinstance(selector, Nets):
        return bool(subject.nets) and nets.covers(
            nets.ranges_of(selector.cidrs, selector.excluding), nets.ranges_of(subject.nets)
        )
    return False  # Nothing


@dataclass(frozen=True, slots=True)
class TierMatch:
    """The rules of one tier that select a pair in one direction, in order; whether the tier isolates its subject."""

    tier: Tier
    rules: tuple[Rule, ...]
    isolated: bool


def applies(rule: Rule, direction: Direction, src: Subject, dst: Subject) -> bool:
    """Does the rule select this pair in this direction (ports aside)?"""
    if direction not in rule.directions or not matches(rule.src, src) or not matches(rule.dst, dst):
        return False
    return rule.concerns is None or matches(rule.concerns, src) or matches(rule.concerns, dst)


def matching(program: Program, direction: Direction, src: Subject, dst: Subject) -> tuple[TierMatch, ...]:
    """Tier by tier, the rules that select the pair."""
    return tuple(
        TierMatch(
            tier,
            tuple(rule for rule in tier.rules if applies(rule, direction, src, dst)),
            isolates(tier, direction, src, dst),
        )
        for tier in program.tiers
    )


def isolates(tier: Tier, direction: Direction, src: Subject, dst: Subject) -> bool:
    """Is the direction's subject (the source for egress, the destination for ingress) isolated by the tier?"""
    selector = tier.isolates.get(direction)
    return selector is not None and matches(selector, src if direction == "egress" else dst)


def ports_of(found: Iterable[TierMatch], default: Action) -> PortMap:
    """All that one direction allows, given the matching rules of each tier."""
    allowed, left = NOTHING, ANYTHING
    for step in found:
        passed, taken = NOTHING, NOTHING
        if step.tier.order == "first-match":
            for rule in step.rules:
                here = rule.ports - taken
                taken = taken | here
                if rule.action is Action.ALLOW:
                    allowed = allowed | (here & left)
                elif rule.action is Action.PASS:
                    passed = passed | here
        elif step.rules:
            denied, passing, allowing = (
                union(r.ports for r in step.rules if r.action is a)
                for a in (Action.DENY, Action.PASS, Action.ALLOW)
            )
            passed = passing - denied
            allowed = allowed | ((allowing - denied - passed) & left)
            taken = denied | passing | allowing
        untouched = left - taken
        end = Action.DENY if step.isolated else step.tier.otherwise
        if end is Action.ALLOW:
            allowed = allowed | untouched
        left = (passed & left) | untouched if end is Action.PASS else passed & left
        if not left:
            return allowed
    return allowed | left if default is Action.ALLOW else allowed


def permitted(program: Program, src: Subject, dst: Subject) -> PortMap:
    """All that is forwarded from `src` to `dst`: both directions must allow it, or only an audit holds it open."""
    firm = in_force(program)
    out = _permitted(firm, src, dst, firm.default)
    if program.audits and covered(program, src, dst):
        out = out | _permitted(firm, src, dst, Action.ALLOW)
    return out


def enforced(program: Program, src: Subject, dst: Subject) -> PortMap:
    """What `src` may send to `dst` once every audit has ended; the rest of `permitted` is recorded."""
    return _permitted(program, src, dst, program.default)


def _permitted(program: Program, src: Subject, dst: Subject, default: Action) -> PortMap:
    out = ANYTHING
    for one, other in _parts(program, src, dst):
        for direction in BOTH:
            out = out & ports_of(matching(program, direction, one, other), default)
            if not out:
                return out
    return out


def covered(program: Program, src: Subject, dst: Subject) -> Audit | None:
    """The audit that holds the pair open where the rules deny by default alone."""
    if src.nets or dst.nets or src.foreign or dst.foreign or matches(program.held, src) or matches(program.held, dst):
        return None
    known: bool | None = None
    for audit in program.audits:
        if audit.within is not None and not (matches(audit.within, src) and matches(audit.within, dst)):
            continue
        if audit.concerns is not None and not (matches(audit.concerns, src) or matches(audit.concerns, dst)):
            continue
        one, other = matches(audit.members, src), matches(audit.members, dst)
        if one and other:
            return audit
        if one or other:
            if known is None:
                firm = in_force(program)
                known = any(_permitted(firm, *ends, firm.default) for ends in ((src, dst), (dst, src)))
            if known:
                return audit
    return None


def strict(program: Program) -> Program:
    """The program without its audits: every denial is one."""
    tiers = tuple(
        replace(t, rules=tuple(replace(r, audit=False) if r.audit else r for r in t.rules)) if _audited(t) else t
        for t in program.tiers
    )
    return replace(program, tiers=tiers, audits=())


def in_force(program: Program) -> Program:
    """The rules that hold now: without those that are only recorded."""
    global _firm  # a memo by identity; programs are immutable
    if _firm is not None and _firm[0] is program:
        return _firm[1]
    firm = program
    if any(_audited(tier) for tier in program.tiers):
        tiers = (replace(t, rules=tuple(r for r in t.rules if not r.audit)) for t in program.tiers)
        firm = replace(program, tiers=tuple(tiers))
    _firm = program, firm
    return firm


_firm: tuple[Program, Program] | None = None


def _audited(tier: Tier) -> bool:
    return any(rule.audit for rule in tier.rules)


@dataclass(frozen=True, slots=True)
class Bound:
    """A condition on part of what a pair may use: a ceiling in bytes a second, processes at the source, or the seconds
    of silence after which a flow is ended (of TCP and UDP only).
    """

    rule: str
    ports: PortMap
    max_rate: int | None = None
    processes: tuple[Process, ...] = ()
    idle_timeout: int | None = None


def bounds(program: Program, src: Subject, dst: Subject) -> tuple[Bound, ...]:
    """Conditions on what `permitted` gives. The ports of each kind are disjoint.

    The lowest ceiling of the rules that allow a port holds, and the shortest idle timeout. A port that some rule allows
    to every process is bound to none, otherwise to the processes of all its rules together.
    """
    found = [
        r
        for t in in_force(program).tiers
        for r in t.rules
        if r.action is Action.ALLOW and applies(r, "egress", src, dst)
    ]
    if not any(r.max_rate is not None or r.processes or r.idle_timeout is not None for r in found):
        return ()
    out: list[Bound] = []
    left = ANYTHING
    for rule in sorted((r for r in found if r.max_rate is not None), key=lambda r: (r.max_rate, r.id)):
        if ports := rule.ports & left:
            out.append(Bound(rule.id, ports, rule.max_rate))
            left = left - ports
    left = FLOWING
    for rule in sorted((r for r in found if r.idle_timeout is not None), key=lambda r: (r.idle_timeout, r.id)):
        if ports := rule.ports & left:
            out.append(Bound(rule.id, ports, idle_timeout=rule.idle_timeout))
            left = left - ports
    free = union(r.ports for r in found if not r.processes)
    parts: list[Bound] = []
    for rule in sorted((r for r in found if r.processes), key=lambda r: r.id):
        ports, made = rule.ports - free, []
        for part in parts:
            if shared := part.ports & ports:
                together = tuple(sorted({*part.processes, *rule.processes}))
                made.append(Bound(f"{part.rule}+{rule.id}", shared, None, together))
            if rest := part.ports - ports:
                made.append(replace(part, ports=rest))
            ports = ports - part.ports
        parts = [*made, *([Bound(rule.id, ports, None, rule.processes)] if ports else [])]
    return (*out, *parts)


@dataclass(frozen=True, slots=True)
class Step:
    """What decided one direction: `by` is rule, isolation, otherwise or default."""

    allow: bool
    by: Literal["rule", "isolation", "otherwise", "default"]
    rule: Rule | None = None
    tier: str = ""


def decide(found: Iterable[TierMatch], default: Action, proto: int, port: int | None) -> Step:
    """One direction of one flow. `port` must be given for tcp, udp and sctp."""
    for step in found:
        hits = [rule for rule in step.rules if rule.ports.allows(proto, port)]
        rule = _winner(hits, step.tier.order)
        if rule is not None:
            if rule.action is Action.PASS:
                continue
            return Step(rule.action is Action.ALLOW, "rule", rule, step.tier.name)
        if step.isolated:
            return Step(False, "isolation", None, step.tier.name)
        if step.tier.otherwise is not Action.PASS:
            return Step(step.tier.otherwise is Action.ALLOW, "otherwise", None, step.tier.name)
    return Step(default is Action.ALLOW, "default")


def _winner(hits: Sequence[Rule], order: str) -> Rule | None:
    if order == "first-match":
        return hits[0] if hits else None
    for action in (Action.DENY, Action.PASS, Action.ALLOW):
        for rule in hits:
            if rule.action is action:
                return rule
    return None


def evaluate(program: Program, src: Subject, dst: Subject, proto: int, port: int | None = None) -> Decision:
    """Decide one flow. Never raises for a flow: a protocol or port that cannot exist is denied.

    Without a port, tcp, udp and sctp ask "any port at all?": allowed when one port is.
    """
    proto = ICMP if proto == ICMPV6 else proto
    verdict = _evaluate(program, src, dst, proto, port)
    if verdict.allowed or not possible(proto, port):
        return verdict
    firm = in_force(program)
    if firm is program and not program.audits:
        return verdict
    if port is None and proto in PORTED and (bits := permitted(program, src, dst).bits(proto)):
        port = next(ranges(bits))[0]
    now = verdict if firm is program else _evaluate(firm, src, dst, proto, port)
    if now.allowed:
        return replace(now, reason=f"audit: {now.reason}; would be denied: {verdict.reason}", would=verdict)
    # Denied now by default alone? Then nothing but the default keeps it from being allowed.
    open_end = None if now.rule or now.tier else _evaluate(replace(firm, default=Action.ALLOW), src, dst, proto, port)
    if open_end is not None and open_end.allowed and (audit := covered(program, src, dst)) is not None:
        until = show_instant(audit.until)
        reason = f"audit of segment {audit.segment} until {until}: would be denied: {verdict.reason}"
        return Decision("allow", None, reason, program.digest, now.direction, "", verdict)
    return now


def _evaluate(program: Program, src: Subject, dst: Subject, proto: int, port: int | None) -> Decision:
    flow = f"{src.name} -> {dst.name} {show_flow(proto, port)}"
    if not possible(proto, port):
        return Decision("deny", None, f"no such protocol or port: {flow}", program.digest, "egress")
    parts = _parts(program, src, dst)
    found = [{d: matching(program, d, one, other) for d in BOTH} for one, other in parts]
    ports: Iterable[int | None] = (port,)
    if proto in PORTED and port is None:
        ports = _telling_ports(found, proto)
    best: Decision | None = None
    for candidate in ports:
        verdict = _all_parts(program, parts, found, proto, candidate, flow)
        if verdict.allowed or candidate == port:
            return verdict
        if best is None or (best.rule is None and verdict.rule is not None):
            best = verdict
    assert best is not None  # there is always port 1
    return best


def possible(proto: int, port: int | None) -> bool:
    """Is there such a protocol and port?"""
    return 0 <= proto <= 255 and (proto not in PORTED or port is None or 1 <= port <= MAX_PORT)


def _all_parts(
    program: Program, parts: Sequence[tuple[Subject, Subject]], found: Sequence[dict[Direction, tuple[TierMatch, ...]]],
    proto: int, port: int | None, flow: str,
) -> Decision:  # fmt: skip
    steps: dict[Direction, Step] = {}
    for (one, other), matched in zip(parts, found, strict=True):
        for direction in BOTH:
            step = decide(matched[direction], program.default, proto, port)
            if not step.allow:
                where = f"{one.name} -> {other.name} {show_flow(proto, port)}" if len(parts) > 1 else flow
                return Decision(
                    "deny", step.rule, _denial(step, direction, where), program.digest, direction, step.tier
                )
            steps.setdefault(direction, step)
    named: Direction = "egress" if steps["egress"].rule is not None else "ingress"
    step = steps[named]
    reason = f"allowed by {_by(step)}"
    other_step = steps["ingress"]
    if named == "egress" and other_step != step:
        reason = f"egress allowed by {_by(step)}, ingress by {_by(other_step)}"
    return Decision("allow", step.rule, reason, program.digest, named, step.tier)


def _denial(step: Step, direction: Direction, flow: str) -> str:
    if step.by == "rule":
        return f"denied by {_by(step)} ({direction})"
    if step.by == "isolation":
        end = "source" if direction == "egress" else "destination"
        return f"isolated by tier {step.tier}: it selects the {end} for {direction} and no rule there allows {flow}"
    if step.by == "otherwise":
        return f"denied by tier {step.tier}: no rule there allows {flow}"
    return f"default deny: no rule allows {flow}"


def _by(step: Step) -> str:
    if step.rule is None:
        return "the program's default" if step.by == "default" else f"the end of tier {step.tier}"
    where = f" ({step.rule.where})" if step.rule.where else ""
    why = f": {step.rule.why}" if step.rule.why else ""
    return f"rule {step.rule.id}{where}{why}"


def show_flow(proto: int, port: int | None) -> str:
    """``tcp/80``, ``tcp``, ``icmp``."""
    name = proto_name(proto)
    return f"{name}/{port}" if proto in PORTED and port is not None else name


def _telling_ports(found: Iterable[dict[Direction, tuple[TierMatch, ...]]], proto: int) -> list[int]:
    """Ports at which the verdict can change: 1 and each end of a run of a matching rule, plus one."""
    out = {1}
    for matched in found:
        for steps in matched.values():
            for step in steps:
                for rule in step.rules:
                    for first, last in ranges(rule.ports.bits(proto)):
                        out.update((first, last + 1))
    return sorted(port for port in out if port <= MAX_PORT)


# Memo of the last program that met an outside subject.
_cuts: tuple[Program | None, tuple[int, ...]] = (None, ())


def _parts(program: Program, src: Subject, dst: Subject) -> list[tuple[Subject, Subject]]:
    if not src.nets and not dst.nets:
        return [(src, dst)]
    return [(one, other) for one in split(program, src) for other in split(program, dst)]


def split(program: Program, subject: Subject) -> list[Subject]:
    """An outside subject as parts that the program treats alike; an inside subject as it is. Raises BadInput."""
    global _cuts  # a memo by identity; programs are immutable
    if not subject.nets:
        return [subject]
    if _cuts[0] is not program:
        _cuts = (program, nets.cut_points(program))
    parts = nets.cells(nets.ranges_of(subject.nets), _cuts[1])
    if len(parts) <= 1:
        return [subject]
    return [replace(subject, nets=(nets.show(part),)) for part in parts]
