"""What a move says while it goes on, and what is known about a holder that does not answer.

A holder that has acknowledged the prepare is alive and follows. One that has not is *silent*: dead, stopped or cut off,
and nobody here can tell which. Every receiver that hears of the new epoch refuses it from then on; one that does not hear
of it either may go on talking with it, until the holder's lease is over and it fences itself.

    fence strict      COMMIT waits for the end of that lease, unless forced
    fence available   COMMIT goes ahead, as its owner chose; `wait_lease` waits here too
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ca.rows import InstanceRow
from identity.wire.moves import MoveStep, Step

LEASE_S: Final = 30.0  # the agents' --lease: a strict identity is dark after so long without a heartbeat
STALE_MAX_S: Final = 12 * 3600.0  # their --stale-max: the same for an available one
MARGIN_S: Final = 2.0  # for looking at the clock and taking the addresses away
MAX_LEASE_WAIT_S: Final = 120.0  # a longer lease is not waited out; the caller is told when it ends

Tell = Callable[[MoveStep], None]


@dataclass(frozen=True, slots=True)
class Leases:
    """How long holders serve without hearing anything, in seconds: what the agents were started with."""

    strict: float = LEASE_S
    available: float = STALE_MAX_S

    def of(self, row: InstanceRow) -> float:
        """From the last heartbeat until nobody serves the instance any more."""
        return (min(self.strict, self.available) if row.fence == "strict" else self.available) + MARGIN_S


@dataclass(slots=True)
class Progress:
    """Tells the steps of one move, with the time since it began."""

    key: str
    tell: Tell | None = None
    began: float = field(default_factory=time.monotonic)

    def say(self, step: Step, text: str, **more: object) -> None:
        """One step; `more` are fields of MoveStep."""
        if self.tell is not None:
            self.tell(MoveStep.model_validate({"instance": self.key, "step": step, "text": text, "ms": self.ms} | more))

    @property
    def ms(self) -> float:
        """Milliseconds since it began."""
        return round((time.monotonic() - self.began) * 1000, 3)


class Contacts:
    """When each endpoint could last have heard a heartbeat, on the monotonic clock; the start of this process for others."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last: dict[str, float] = {}

    def lost(self, endpoint: str) -> None:
        """Its stream is over now."""
        self._last[endpoint] = time.monotonic()

    def silence(self, endpoint: str) -> float:
        """Seconds since then, for an endpoint without a stream."""
        return time.monotonic() - self._last.get(endpoint, self._started)
