"""Recorded flows against a policy: what was forwarded and would be denied. Pure.

A recording only knows what it saw: a job that runs once a quarter is in no recording of thirty days. So a replay that
finds nothing says that nothing seen would break, not that nothing would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from policy.evaluate import Decision, evaluate, show_flow, strict
from policy.flows import Edge, FlowRecord, Seen
from policy.program import Program, Subject


@dataclass(frozen=True, slots=True)
class Broken:
    """One recorded flow that would be denied, and by what."""

    edge: Edge
    seen: Seen
    decision: Decision

    def __str__(self) -> str:
        src, dst, proto, port = self.edge
        return f"{src} -> {dst} {show_flow(proto, port)} (seen {self.seen.count} times): {self.decision.reason}"


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcome.

    flows:    distinct flows of the recording that were judged
    broken:   of those, the ones that would be denied and are forwarded by what is in force (or by nothing: all denied ones)
    unknown:  flows with an end that is not in the inventory any more; nothing can be said about them
    """

    flows: int
    broken: tuple[Broken, ...]
    unknown: int
    first: int = 0
    last: int = 0


@dataclass(slots=True)
class Recording:
    """Distinct flows that were forwarded, with when and how often. `now` is the moment they are replayed at."""

    edges: Mapping[Edge, Seen] = field(default_factory=dict)
    now: int = 0

    @classmethod
    def of(cls, records: Iterable[FlowRecord], now: int) -> Recording:
        """From records of a file; those that were denied already say nothing."""
        out: dict[Edge, Seen] = {}
        for one in records:
            if one.verdict == "allow":
                out.setdefault((one.src, one.dst, one.proto, one.port), Seen()).add(one)
        return cls(out, now)

    def since(self, seconds: int) -> dict[Edge, Seen]:
        """The flows that were last seen at most so long ago."""
        return {edge: seen for edge, seen in self.edges.items() if seen.last >= self.now - seconds}


def replay(
    after: Program, edges: Mapping[Edge, Seen], subjects: Sequence[Subject], before: Program | None = None
) -> Replayed:
    """Judge recorded flows by a program as it is once its audits have ended.

    before: what is in force; a flow that it denies as well is not newly broken.
    """
    known = {s.name: s for s in subjects}
    judge = strict(after)
    broken, unknown, judged = [], 0, 0
    for edge, seen in sorted(edges.items(), key=lambda item: (*item[0][:3], item[0][3] or 0)):
        src, dst = known.get(edge[0]), known.get(edge[1])
        if src is None or dst is None:
            unknown += 1
            continue
        judged += 1
        decision = evaluate(judge, src, dst, edge[2], edge[3])
        if decision.allowed or (before is not None and not evaluate(before, src, dst, edge[2], edge[3]).allowed):
            continue
        broken.append(Broken(edge, seen, decision))
    times = [(s.first, s.last) for s in edges.values()]
    return Replayed(
        judged, tuple(broken), unknown, min((f for f, _ in times), default=0), max((t for _, t in times), default=0)
    )
