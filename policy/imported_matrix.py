"""The whole truth table of a program over an inventory, by classes: subjects that the same rules select are one.

Every verdict comes from policy/evaluate.py; here is only the grouping. A pair's answer depends on nothing but the rules
that select it and the tiers that isolate its ends, so each such combination is decided once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from policy import nets
from policy.evaluate import TierMatch, matches, ports_of, split
from policy.ports import ANYTHING, ICMP, ICMPV6, PORTED, SCTP, TCP, UDP, PortMap, proto_name, show_ports
from policy.program import BOTH, Direction, Program, Subject


@dataclass(frozen=True, slots=True)
class _Class:
    """One subject, or one part of an outside one: the rules that select it, as bits of their numbers."""

    subject: Subject
    spans: tuple[nets.Range, ...]  # empty for an inside subject
    src: int
    dst: int
    concerned: int
    isolated: tuple[tuple[bool, ...], ...]  # per direction, per tier


class Table:
    """Answers for pairs of a fixed program and set of subjects. Raises BadInput for addresses that are none."""

    def __init__(self, program: Program, subjects: Sequence[Subject]) -> None:
        self.program = program
        self.rules = [rule for tier in program.tiers for rule in tier.rules]
        self.ways: dict[Direction, int] = {
            d: sum(1 << i for i, r in enumerate(self.rules) if d in r.directions) for d in BOTH
        }
        self.unconcerned = sum(1 << i for i, r in enumerate(self.rules) if r.concerns is None)
        # addresses behind a gateway (label ``via``) are told by that gateway's name
        self.identity = {s.name: s.labels.get("via", s.name) if s.nets else s.name for s in subjects}
        self.classes = {s.name: [self.classify(part) for part in split(program, s)] for s in subjects}
        self._decided: dict[tuple[Any, ...], PortMap] = {}

    def classify(self, subject: Subject) -> _Class:
        src = dst = concerned = 0
        for i, rule in enumerate(self.rules):
            bit = 1 << i
            src |= bit * matches(rule.src, subject)
            dst |= bit * matches(rule.dst, subject)
            if rule.concerns is not None:
                concerned |= bit * matches(rule.concerns, subject)
        isolated = tuple(
            tuple(d in t.isolates and matches(t.isolates[d], subject) for t in self.program.tiers)
            for d in BOTH
        )
        return _Class(subject, nets.ranges_of(subject.nets), src, dst, concerned, isolated)

    def permitted(self, src: _Class, dst: _Class) -> PortMap:
        """What one class may send to another."""
        hits = src.src & dst.dst & (self.unconcerned | src.concerned | dst.concerned)
        key = (hits, src.isolated[0], dst.isolated[1])
        if key not in self._decided:
            out = ANYTHING
            for direction, isolated in zip(BOTH, key[1:], strict=True):
                out = out & ports_of(self._found(hits & self.ways[direction], isolated), self.program.default)
            self._decided[key] = out
        return self._decided[key]

    def _found(self, hits: int, isolated: Sequence[bool]) -> Iterator[TierMatch]:
        number = 0
        for tier, alone in zip(self.program.tiers, isolated, strict=True):
            rules = []
            for rule in tier.rules:
                if hits >> number & 1:
                    rules.append(rule)
                number += 1
            yield TierMatch(tier, tuple(rules), alone)


def matrix(program: Program, subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Everything that is allowed over all ordered pairs of different subjects, as rows for JSON.

    A row is src, dst, proto (a name, a number or ``any``) and ports (``*`` or a list); ``src_net`` and ``dst_net`` are the
    addresses of an outside end. Traffic between address families is no traffic and gives no row.
    """
    table = Table(program, subjects)
    rows: list[dict[str, Any]] = []
    words: dict[PortMap, list[dict[str, str]]] = {}
    for src, sources in table.classes.items():
        for dst, destinations in table.classes.items():
            if table.identity[src] == table.identity[dst]:
                continue
            for src_spans, dst_spans, ports in _joined(table, sources, destinations):
                if ports not in words:
                    words[ports] = list(_words(ports))
                ends = {"src": table.identity[src], "dst": table.identity[dst]}
                for one in src_spans or (None,):
                    for other in dst_spans or (None,):
                        if one and other and (one[0] < nets.V6) != (other[0] < nets.V6):
                            continue
                        where = {k: nets.show(s) for k, s in (("src_net", one), ("dst_net", other)) if s}
                        rows += [{**ends, **where, **word} for word in words[ports]]
    return rows


def _joined(
    table: Table, sources: Sequence[_Class], destinations: Sequence[_Class]
) -> Iterator[tuple[tuple[nets.Range, ...], tuple[nets.Range, ...], PortMap]]:
    """The parts of a pair that are allowed something, with neighbours of equal answer joined."""
    for one in sources:
        by_ports: dict[PortMap, list[nets.Range]] = {}
        for other in destinations:
            ports = table.permitted(one, other)
            if ports:
                by_ports.setdefault(ports, []).extend(other.spans)
        for ports, spans in by_ports.items():
            yield one.spans, nets.merge(spans), ports


def _words(ports: PortMap) -> Iterator[dict[str, str]]:
    if ports == ANYTHING:
        yield {"proto": "any", "ports": "*"}
        return
    named = [TCP, UDP, SCTP, ICMP]
    numbers = [*named, *(p for p in (range(256) if ports.rest else ports.ports) if p not in {*named, ICMPV6})]
    for proto in numbers:
        bits = ports.bits(proto)
        if bits:
            yield {"proto": proto_name(proto), **({"ports": show_ports(bits)} if proto in PORTED else {})}
