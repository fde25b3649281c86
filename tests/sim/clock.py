"""Virtual time, and the moment at which a simulated process stops."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

EPOCH: Final = 1_800_000_000.0


class Crash(BaseException):
    """The process stops at this very point."""


class Clock:
    """Virtual seconds since the begin; one queue of what is to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, delay: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + max(0.0, delay), self._number, act))

    def step(self, until: float) -> bool:
        """Do the next thing that is due before `until`; False when there is none."""
        if not self._queue or self._queue[0][0] > until:
            self.now = until
            return False
        self.now, _, act = heapq.heappop(self._queue)
        act()
        return True
