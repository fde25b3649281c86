"""The order in which a committed move is told: make before break.

    new holder -> receivers -> old holder

A receiver that knows the new epoch sends to the new holder only, so that one has to serve by then; the old holder goes on
serving those that have not heard yet, and withdraws last. Fencing does not rest on this: a receiver takes packets from
the holder it knows and from nobody else, at every moment. So the order is a courtesy with a limit, and a change that comes
after it never waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HAND_OVER_S: Final = 0.2  # seconds each step may wait for the one before


@dataclass(frozen=True, slots=True)
class Handover:
    """Who is told first, and who last (None: nobody held it)."""

    new: str
    old: str | None
