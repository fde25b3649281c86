"""Sums of the flows of this endpoint on their way to the CA: what a rollout is watched by and a replay is run on.

Whoever records flows calls `note`; the uplink takes a batch with each report and puts it back when the report fails.
Bounded: beyond MAX_KEPT distinct flows new ones are only counted, known ones go on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal

from identity.wire.flows import MAX, FlowSummary

MAX_KEPT: Final = 20_000
EVERY: Final = 10.0  # seconds at most until what was seen is told
APART: Final = 1.0  # seconds at least between reports that are sent for their flows alone

Verdict = Literal["allow", "audit", "deny"]
_Key = tuple[str, str, int, int, Verdict]


class Summaries:
    """Thread-safe. `on_denial` is called for the first sight of a refused flow: it is worth a report of its own."""

    def __init__(self, on_denial: Callable[[], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, FlowSummary] = OrderedDict()
        self._on_denial = on_denial
        self.dropped = 0

    def note(
        self, src: str, dst: str, proto: int, port: int | None, verdict: Verdict, at: int, *, rule: str = "", count: int = 1,
        first: int | None = None,
    ) -> None:  # fmt: skip
        """Count one flow (or `count` of them, from `first` to `at`)."""
        begun = at if first is None else first
        one = FlowSummary(
            src=src, dst=dst, proto=proto, port=port or 0, verdict=verdict, count=count, first=begun, last=at, rule=rule[:300]
        )
        new = self._add(one)
        if new and verdict == "deny" and self._on_denial is not None:
            self._on_denial()

    def _add(self, one: FlowSummary) -> bool:
        key: _Key = (one.src, one.dst, one.proto, one.port, one.verdict)
        with self._lock:
            old = self._kept.get(key)
            if old is None and len(self._kept) >= MAX_KEPT:
                self.dropped += one.count
                return False
            if old is not None:
                one = one.model_copy(update={
                    "count": min(old.count + one.count, 1 << 53), "first": min(old.first, one.first),
                    "last": max(old.last, one.last), "rule": one.rule or old.rule,
                })  # fmt: skip
            self._kept[key] = one
            return old is None

    def take(self) -> list[FlowSummary]:
        """At most MAX of them, denials first; they are gone from here."""
        with self._lock:
            keys = sorted(self._kept, key=lambda k: k[4] != "deny")[:MAX]
            return [self._kept.pop(key) for key in keys]

    def give_back(self, batch: list[FlowSummary]) -> None:
        """A report that failed: count them again."""
        for one in batch:
            self._add(one)

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)
