"""Questions about a program and an inventory: who may talk to whom, who reaches what, what would a change do. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from policy import nets
from policy.classes import Classes, bits, reach
from policy.evaluate import permitted, split
from policy.ports import ALL_PORTS, NOTHING, PORTED, PortMap, proto_name, show_ports, single, whole
from policy.program import Program, Rule, Subject

MAX_MOVED: Final = 100  # groups; beyond it everybody is looked at
Group = tuple[int | None, int | None]  # class before and after


@dataclass(frozen=True, slots=True)
class Row:
    """What one subject may send to another. The nets say which part of an outside subject is meant."""

    src: str
    dst: str
    ports: PortMap
    src_net: str = ""
    dst_net: str = ""


def matrix(program: Program, subjects: Sequence[Subject]) -> list[Row]:
    """Everything that is permitted over all ordered pairs of different subjects."""
    inner = _inside(subjects)
    classes = Classes(program, inner)
    rows = _outer_rows(classes, subjects)
    for src in inner:
        number = classes.class_of(src.name)
        for other in classes.targets(number):
            ports = classes.between(number, other)
            rows += [Row(src.name, dst, ports) for dst in classes.members[other] if dst != src.name]
    return sorted(rows, key=lambda r: (r.src, r.dst, r.src_net, r.dst_net))


def _inside(subjects: Sequence[Subject]) -> list[Subject]:
    return [s for s in subjects if not s.nets]


def _outer_rows(classes: Classes, subjects: Sequence[Subject]) -> list[Row]:
    """Rows of all ordered pairs with an outside subject at one end or both; the inside ones are in `classes`."""
    inner, outer = _inside(subjects), [s for s in subjects if s.nets]
    rows: list[Row] = []
    program = classes.program
    parts = {s.name: [(part, classes.part(part)) for part in split(program, s)] for s in outer}
    for one in outer:
        for other_subject in inner:
            alone = [(other_subject, classes.class_of(other_subject.name))]
            rows += _outside(classes, parts[one.name], alone)
            rows += _outside(classes, alone, parts[one.name])
        for another in outer:
            if another is not one:
                rows += _outside(classes, parts[one.name], parts[another.name])
    return rows


def _outside(
    classes: Classes, sources: Sequence[tuple[Subject, int]], targets: Sequence[tuple[Subject, int]]
) -> Iterator[Row]:
    """Rows of pairs with an outside end, parts of equal answer joined. Nothing passes from one address family to the other."""
    by_ports: dict[tuple[tuple[nets.Range, ...], PortMap], list[nets.Range]] = {}
    for src, number in sources:
        if identity(src) == identity(targets[0][0]):
            return
        joined: dict[PortMap, list[nets.Range]] = {}
        for dst, other_number in targets:
            ports = classes.between(number, other_number)
            if ports:
                joined.setdefault(ports, []).extend(nets.ranges_of(dst.nets))
        for ports, spans in joined.items():
            by_ports.setdefault((nets.merge(spans), ports), []).extend(nets.ranges_of(src.nets))
    for (dst_spans, ports), src_spans in by_ports.items():
        for one in nets.merge(src_spans) or (None,):
            for other in dst_spans or (None,):
                if one is None or other is None or (one[0] < nets.V6) == (other[0] < nets.V6):
                    ends = (nets.show(end) if end is not None else "" for end in (one, other))
                    yield Row(identity(sources[0][0]), identity(targets[0][0]), ports, *ends)


def identity(subject: Subject) -> str:
    """Who answers for a subject: itself, or for addresses behind a gateway (label ``via``) that gateway."""
    return subject.labels.get("via", subject.name) if subject.nets else subject.name


def rows_json(rows: Iterable[Row]) -> dict[str, list[dict[str, str]]]:
    """``{"allow": [{"src", "dst", "proto", "ports", "src_net", "dst_net"}]}``; one row a protocol, absent keys mean all."""
    out = []
    for row in rows:
        for proto, ports in _protocols(row.ports):
            item = {"src": row.src, "dst": row.dst, "proto": proto}
            if ports:
                item["ports"] = ports
            if row.src_net:
                item["src_net"] = row.src_net
            if row.dst_net:
                item["dst_net"] = row.dst_net
            out.append(item)
    return {"allow": out}


def _protocols(ports: PortMap) -> Iterator[tuple[str, str]]:
    if ports.rest and not ports.ports:
        yield "any", ""
        return
    numbers = sorted({*ports.ports, *(range(256) if ports.rest else ())} - {58})
    for number in numbers:
        held = ports.bits(number)
        if held:
            yield proto_name(number), "" if number not in PORTED or held == ALL_PORTS else show_ports(held)


def who_can_reach(
    program: Program,
    subjects: Sequence[Subject],
    dst: Subject,
    proto: int | None = None,
    port: int | None = None,
) -> list[Row]:
    """Who may send to `dst` directly, on this protocol and port (None: on anything)."""
    wanted = None if proto is None else whole(proto) if port is None else single(proto, port)
    inner = [s for s in subjects if not s.nets]
    classes = Classes(program, inner) if dst in inner else None
    rows = []
    for src in subjects:
        if src.name != dst.name:
            if classes is None or src.nets:
                ports = permitted(program, src, dst)
            else:
                ports = classes.between(classes.class_of(src.name), classes.class_of(dst.name))
            ports = ports if wanted is None else ports & wanted
            if ports:
                rows.append(Row(src.name, dst.name, ports))
    return sorted(rows, key=lambda r: r.src)


@dataclass(frozen=True, slots=True)
class Reached:
    """One subject inside a blast radius and the shortest chain that leads there, both ends included."""

    name: str
    chain: tuple[str, ...]

    @property
    def hops(self) -> int:
        return len(self.chain) - 1


def blast_radius(
    program: Program, subjects: Sequence[Subject], name: str, depth: int | None = None
) -> list[Reached]:
    """All that whoever holds `name` could reach, step by step. Raises KeyError for an unknown name."""
    found = reach(Classes(program, subjects), name, depth)
    return sorted((Reached(n, chain) for n, chain in found.items()), key=lambda r: (r.hops, r.name))


@dataclass(frozen=True, slots=True)
class Difference:
    """What a pair gains or loses."""

    kind: Literal["gains", "loses"]
    src: str
    dst: str
    ports: PortMap


def difference(
    before: Program,
    after: Program,
    subjects: Sequence[Subject],
    subjects_after: Sequence[Subject] | None = None,
) -> list[Difference]:
    """What pairs gain and lose from one program (and inventory) to another, by name."""
    later = subjects if subjects_after is None else subjects_after
    found = GroupChanges(before, after, _inside(subjects), _inside(later))
    pairs = [
        ((src, dst), had, has)
        for one, changes in found.changes.items()
        for other, had, has in changes
        for src in found.names[one]
        for dst in found.names[other]
        if src != dst
    ]
    if any(s.nets for s in (*subjects, *later)):
        old, new = _outer_pairs(found.before, subjects), _outer_pairs(found.after, later)
        pairs += [(pair, old.get(pair, NOTHING), new.get(pair, NOTHING)) for pair in old.keys() | new.keys()]
    out: list[Difference] = []
    for pair, had, has in sorted(pairs, key=lambda one: one[0]):
        if more := has - had:
            out.append(Difference("gains", *pair, more))
        if less := had - has:
            out.append(Difference("loses", *pair, less))
    return out


class GroupChanges:
    """What changes between groups of inside subjects: those that neither program tells apart, before and after.

    names: group -> its subjects in order; changes: group -> (group it may send to, what it might, what it may), those that
    differ. A group is its class before and its class after; None where the subjects are not there.
    """

    def __init__(self, before: Program, after: Program, subjects: Sequence[Subject], later: Sequence[Subject]) -> None:
        self.before = old = Classes(before, subjects)
        self.after = new = Classes(after, later)
        were, are = ({s.name: classes.class_of(s.name) for s in given} for classes, given in ((old, subjects), (new, later)))
        self.names: dict[Group, list[str]] = defaultdict(list)
        for name in sorted(were.keys() | are.keys()):
            self.names[were.get(name), are.get(name)].append(name)
        of_old, of_new = defaultdict[int | None, list[Group]](list), defaultdict[int | None, list[Group]](list)
        for group in self.names:
            of_old[group[0]].append(group)
            of_new[group[1]].append(group)
        rules = _other_rules(before, after)
        there = {s.name: s for s in subjects}
        same = {s.name for s in later if there.get(s.name) == s}
        moved = {group for group, names in self.names.items() if same.isdisjoint(names)}
        either = bool(before.audits or after.audits)  # an audit may hold open what only the other direction allows
        self.changes: dict[Group, list[tuple[Group, PortMap, PortMap]]] = {}
        for group in self.names:
            was, now = group
            if rules is None or group in moved or len(moved) > MAX_MOVED:
                others = {g for number in (() if was is None else old.targets(was)) for g in of_old[number]}
                others |= {g for number in (() if now is None else new.targets(now)) for g in of_new[number]}
            else:  # nothing is new to it but rules, and who is new
                others = moved.union(*(of_old[number] for number in _touched(old, was, rules[0], either)),
                                     *(of_new[number] for number in _touched(new, now, rules[1], either)))  # fmt: skip
            pairs = ((g, _between(old, was, g[0]), _between(new, now, g[1])) for g in others)
            self.changes[group] = [one for one in pairs if one[1] != one[2]]


def _touched(classes: Classes, number: int | None, rules: int, either: bool) -> Iterator[int]:
    return bits(0 if number is None else classes.touched(number, rules, either=either))


def _other_rules(before: Program, after: Program) -> tuple[int, int] | None:
    """Bits (policy.classes) of the rules that only `before` and only `after` has; None: they differ in more than rules."""
    if before is after:
        return 0, 0
    if _frame(before) != _frame(after):
        return None
    found, start = [0, 0], [0, 0]
    for sides in zip(before.tiers, after.tiers, strict=True):
        ids = [[rule.id for rule in tier.rules] for tier in sides]
        kept: set[str] = set()  # the same before and after; in a tier of ordered rules there are none once the order is another
        if sides[0].order != "first-match" or ids[0] == ids[1]:
            counts = [Counter(names) for names in ids]
            theirs = {rule.id: rule for rule in sides[1].rules}
            for rule in sides[0].rules:
                if counts[0][rule.id] == counts[1][rule.id] == 1 and _decides(rule) == _decides(theirs[rule.id]):
                    kept.add(rule.id)
        for side, names in enumerate(ids):
            found[side] |= sum(1 << start[side] + n for n, name in enumerate(names) if name not in kept)
            start[side] += len(names)
    return found[0], found[1]


def _frame(program: Program) -> object:
    """All that decides besides rules."""
    audits = [replace(audit, where=None) for audit in program.audits]
    return program.default, program.held, audits, [(t.order, t.isolates, t.otherwise) for t in program.tiers]


def _decides(rule: Rule) -> object:
    """All of a rule that decides."""
    return rule.action, rule.ports, rule.directions, rule.audit, rule.src, rule.dst, rule.concerns


def _between(classes: Classes, one: int | None, other: int | None) -> PortMap:
    return NOTHING if one is None or other is None else classes.between(one, other)


def _outer_pairs(classes: Classes, subjects: Sequence[Subject]) -> dict[tuple[str, str], PortMap]:
    out: dict[tuple[str, str], PortMap] = {}
    for row in _outer_rows(classes, subjects):
        pair = (row.src + _net(row.src_net), row.dst + _net(row.dst_net))
        out[pair] = out.get(pair, NOTHING) | row.ports
    return out


def _net(text: str) -> str:
    return f"[{text}]" if text else ""


def what_if(
    program: Program, subjects: Sequence[Subject], name: str, labels: Mapping[str, str | None]
) -> list[Difference]:
    """What changes when the subject `name` gets these labels (None takes one away). A new name is a new subject."""
    found = next((s for s in subjects if s.name == name), Subject(name))
    merged = {**found.labels, **labels}
    changed = replace(found, labels={k: v for k, v in merged.items() if v is not None})
    others = [s for s in subjects if s.name != name]
    return difference(program, program, subjects, [*others, changed])
