"""What one workload may send to another, by classes of workloads. Pure.

Subjects are put into classes (equal under every selector of the program), and each pair of classes is evaluated once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from identity.records import PlacementRecord
from policy.evaluate import Bound, bounds, enforced, matches, permitted
from policy.ports import NOTHING, PortMap
from policy.program import Program, Selector, Subject


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one class may send to another: all that is forwarded, what of it is enforced, and on which conditions."""

    ports: PortMap
    enforced: PortMap
    bounds: tuple[Bound, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ports)


NO_VERDICT: Final = Verdict(NOTHING, NOTHING)


class Classes:
    """Verdicts of one program, computed once per pair of subject classes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._selectors = tuple(selectors(program))
        self._class_of: dict[tuple[str, str, tuple[tuple[str, str], ...]], int] = {}
        self._subjects: list[Subject] = []
        self._by_signature: dict[int, int] = {}
        self._verdicts: dict[tuple[int, int], Verdict] = {}
        rules = [rule for tier in program.tiers for rule in tier.rules]
        self._audits = bool(program.audits) or any(rule.audit for rule in rules)
        self._bound = any(rule.max_rate is not None or rule.processes or rule.idle_timeout is not None for rule in rules)

    def class_of(self, record: PlacementRecord) -> int:
        """Number of the class of the identity of a placement."""
        key = (record.name, record.spiffe_id, tuple(sorted(record.labels.items())))
        if (known := self._class_of.get(key)) is not None:
            return known
        subject = Subject(record.name, dict(record.labels), record.spiffe_id)
        signature = 0
        for bit, selector in enumerate(self._selectors):
            if matches(selector, subject):
                signature |= 1 << bit
        number = self._by_signature.setdefault(signature, len(self._subjects))
        if number == len(self._subjects):
            self._subjects.append(subject)
        self._class_of[key] = number
        return number

    def permitted(self, src: PlacementRecord, dst: PlacementRecord) -> PortMap:
        """All that is forwarded from `src` to `dst`."""
        return self.verdict(src, dst).ports

    def verdict(self, src: PlacementRecord, dst: PlacementRecord) -> Verdict:
        """The same with what of it is enforced, and bounds."""
        pair = (self.class_of(src), self.class_of(dst))
        if (known := self._verdicts.get(pair)) is None:
            one, other = self._subjects[pair[0]], self._subjects[pair[1]]
            ports = permitted(self.program, one, other)
            sure = enforced(self.program, one, other) if self._audits else ports
            limits = bounds(self.program, one, other) if self._bound else ()
            known = self._verdicts[pair] = Verdict(ports, sure, limits)
        return known

    @property
    def count(self) -> int:
        """Classes seen so far."""
        return len(self._subjects)


def selectors(program: Program) -> Iterable[Selector]:
    found: dict[Selector, None] = {}
    for tier in program.tiers:
        for rule in tier.rules:
            found.update(dict.fromkeys((rule.src, rule.dst)))
            if rule.concerns is not None:
                found[rule.concerns] = None
        found.update(dict.fromkeys(tier.isolates.values()))
    for audit in program.audits:
        found.update(dict.fromkeys(s for s in (audit.members, audit.within, audit.concerns) if s is not None))
    found[program.held] = None
    return found
