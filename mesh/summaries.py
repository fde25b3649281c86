"""Sums of the flows of this endpoint on their way to the CA: what a rollout is watched by and a replay is run on.

The uplink collects what the recorder summarized, takes a batch with each report and puts it back when the report fails.
Bounded: beyond MAX_KEPT distinct flows new ones are only counted, known ones go on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from identity.wire.flows import MAX, FlowSummary
from policy import flows

MAX_KEPT: Final = 20_000
EVERY: Final = 2.0  # seconds at most until what was summarized is told
APART: Final = 1.0  # seconds at least between reports that are sent for their flows alone

_Key = tuple[str, str, int, int, str]


class Summaries:
    """What is still to be told; `dropped` counts what found no room."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, FlowSummary] = OrderedDict()
        self.dropped = 0

    def collect(self, rows: Iterable[flows.FlowSummary]) -> None:
        """Take over what was recorded; a row that says nothing was counted, or has names that no workload has, stays out."""
        for row in rows:
            if row.count < 1 or max(len(row.src), len(row.dst)) > 255 or not 0 <= row.proto <= 255:
                continue
            self._add(
                FlowSummary(
                    src=row.src, dst=row.dst, proto=row.proto, port=row.port or 0, verdict=row.verdict,
                    count=min(row.count, 1 << 53), first=row.first, last=max(row.last, row.first), rule=row.by[:300],
                )
            )  # fmt: skip

    def _add(self, one: FlowSummary) -> None:
        key: _Key = (one.src, one.dst, one.proto, one.port, one.verdict)
        old = self._kept.get(key)
        if old is None and len(self._kept) >= MAX_KEPT:
            self.dropped += one.count
            return
        if old is not None:
            one = one.model_copy(update={
                "count": min(old.count + one.count, 1 << 53), "first": min(old.first, one.first),
                "last": max(old.last, one.last), "rule": one.rule or old.rule,
            })  # fmt: skip
        self._kept[key] = one

    def take(self) -> list[FlowSummary]:
        """At most MAX of them, denials first; they are gone from here."""
        keys = sorted(self._kept, key=lambda k: k[4] != "deny")[:MAX]
        return [self._kept.pop(key) for key in keys]

    def give_back(self, batch: Iterable[FlowSummary]) -> None:
        """A report that failed: count them again."""
        for one in batch:
            self._add(one)

    def __len__(self) -> int:
        return len(self._kept)
