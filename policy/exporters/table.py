"""The truth table that an exporter writes down: who may send what to whom, by classes of workloads and address ranges.

Foreign systems have other rule orders, tiers and denies, or none. What all of them can say is a list of permissions, so
everything else is settled here, by the evaluator, before a word is written.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from identity.errors import Refused
from policy import nets
from policy.classes import Classes
from policy.evaluate import applies, split
from policy.ports import PortMap
from policy.program import BOTH, Action, Direction, Program, Subject

NAMED_RULES: Final = 3  # at most so many rules are named in a refusal


class NotExpressible(Refused):
    """The target has no words for a part of the policy; the message names the part."""

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"export.{code}", message, hint=hint)


@dataclass(frozen=True, slots=True)
class Opening:
    """What one class may send (egress) or be sent (ingress) on equal ports: the classes and addresses at the other end."""

    ports: PortMap
    classes: tuple[int, ...]
    spans: tuple[nets.Range, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of an outside subject that the program treats alike."""

    subject: Subject
    number: int
    spans: tuple[nets.Range, ...]


class Table:
    """A program over an inventory. `inside`: networks of the workloads themselves, never meant by an outside range."""

    def __init__(self, program: Program, subjects: Sequence[Subject], inside: Sequence[str] = ()) -> None:
        own = nets.ranges_of(tuple(inside))
        self.program = program
        self.inner = [s for s in subjects if not s.nets]
        self.outer = []
        for one in subjects:
            left = nets.subtract(nets.ranges_of(one.nets), own) if one.nets else ()
            if left:
                self.outer.append(replace(one, nets=tuple(nets.show(span) for span in left)))
        self.classes = Classes(program, self.inner)
        self._parts = [
            _Part(part, self.classes.part(part), nets.ranges_of(part.nets))
            for one in self.outer
            for part in split(program, one)
        ]
        self._overlaps = [
            (one, other)
            for index, one in enumerate(self._parts)
            for other in self._parts[:index]
            if one.number != other.number and _meet(one.spans, other.spans)
        ]

    def numbers(self) -> list[int]:
        """The classes that have members, in the order of the inventory."""
        return list(dict.fromkeys(self.classes.class_of(s.name) for s in self.inner))

    def openings(self, number: int, way: Direction) -> list[Opening]:
        """All that is open to a class in one direction, itself included. Raises NotExpressible."""
        peers: dict[PortMap, list[int]] = {}
        spans: dict[PortMap, list[nets.Range]] = {}
        others = self.classes.targets(number) if way == "egress" else self.classes.sources(number)
        for other in others:
            peers.setdefault(self._between(number, other, way), []).append(other)
        for one, other_part in self._overlaps:
            first, second = (self._between(number, p.number, way) for p in (one, other_part))
            if first != second:
                name = self.example(number).name
                raise NotExpressible(
                    "outside_overlap",
                    f"{one.subject.name} and {other_part.subject.name} share addresses, and {name} treats them differently "
                    f"({first} and {second}); the target goes by addresses only",
                    hint="give them networks that do not overlap",
                )
        for part in self._parts:
            if ports := self._between(number, part.number, way):
                spans.setdefault(ports, []).extend(part.spans)
        found = [
            Opening(p, tuple(sorted(peers.get(p, ()))), nets.merge(spans.get(p, ())))
            for p in {**peers, **spans}
        ]
        return sorted(found, key=lambda o: str(o.ports))

    def _between(self, number: int, other: int, way: Direction) -> PortMap:
        ends = (number, other) if way == "egress" else (other, number)
        return self.classes.between(*ends)

    def example(self, number: int) -> Subject:
        """The first member of a class."""
        return next(iter(self.classes.members[number].values()))

    def blame(self, number: int, opening: Opening, way: Direction) -> str:
        """Words for an opening that cannot be written: one pair, its ports, and the rules that open it."""
        mine = self.example(number)
        part = next((p.subject for p in self._parts if opening.spans and _meet(p.spans, opening.spans)), None)
        other = self.example(opening.classes[0]) if opening.classes else part
        assert other is not None  # an opening has an end
        src, dst = (mine, other) if way == "egress" else (other, mine)
        named = [
            f"{rule.id} ({rule.where})" if rule.where else rule.id
            for tier in self.program.tiers
            for rule in tier.rules
            if rule.action is Action.ALLOW
            and rule.ports & opening.ports
            and any(applies(rule, d, src, dst) for d in BOTH)
        ]
        more = f" and {len(named) - NAMED_RULES} more" if len(named) > NAMED_RULES else ""
        by = f"by rule {', '.join(named[:NAMED_RULES])}{more}" if named else "by default"
        return f"{src.name} may send {opening.ports} to {dst.name} ({by})"


def _meet(one: Iterable[nets.Range], other: Sequence[nets.Range]) -> bool:
    return any(a <= d and c <= b for a, b in one for c, d in other)


def cidrs(spans: Iterable[nets.Range]) -> Iterator[str]:
    """Ranges as networks in CIDR form, which is all that firewalls of clouds read."""
    for low, high in spans:
        family, base = (ipaddress.IPv4Address, 0) if low < nets.V6 else (ipaddress.IPv6Address, nets.V6)
        for network in ipaddress.summarize_address_range(family(low - base), family(high - base)):
            yield str(network)
