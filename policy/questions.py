"""Questions about a program and an inventory: who may talk to whom, who reaches what, what would a change do. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from policy import nets
from policy.classes import Classes, reach
from policy.evaluate import permitted, split
from policy.ports import ALL_PORTS, NOTHING, PORTED, PortMap, proto_name, show_ports, single, whole
from policy.program import Program, Subject


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
    inner = [s for s in subjects if not s.nets]
    outer = [s for s in subjects if s.nets]
    classes = Classes(program, inner)
    rows = []
    for src in inner:
        number = classes.class_of(src.name)
        for other in classes.targets(number):
            ports = classes.between(number, other)
            rows += [Row(src.name, dst, ports) for dst in classes.members[other] if dst != src.name]
    parts = {s.name: [(part, classes.part(part)) for part in split(program, s)] for s in outer}
    for one in outer:
        for other_subject in inner:
            alone = [(other_subject, classes.class_of(other_subject.name))]
            rows += _outside(classes, parts[one.name], alone)
            rows += _outside(classes, alone, parts[one.name])
        for another in outer:
            if another is not one:
                rows += _outside(classes, parts[one.name], parts[another.name])
    return sorted(rows, key=lambda r: (r.src, r.dst, r.src_net, r.dst_net))


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
    """What pairs of inside subjects gain and lose from one program (and inventory) to another."""
    old = _pairs(before, subjects)
    new = _pairs(after, subjects if subjects_after is None else subjects_after)
    out: list[Difference] = []
    for pair in sorted(set(old) | set(new)):
        had, has = old.get(pair, NOTHING), new.get(pair, NOTHING)
        if has - had:
            out.append(Difference("gains", *pair, has - had))
        if had - has:
            out.append(Difference("loses", *pair, had - has))
    return out


def _pairs(program: Program, subjects: Sequence[Subject]) -> dict[tuple[str, str], PortMap]:
    out: dict[tuple[str, str], PortMap] = {}
    for row in matrix(program, subjects):
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
