"""The change feed, without I/O: positions and scoped sets in, frames for each endpoint out.

One Feed lives in one thread. A frame is one line of JSON, ready to be written. An endpoint whose scope cannot be
computed gets no frame and no heartbeat until it can be: it keeps what it has and its freshness runs out; the others
notice nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from ca.scope import Touched, View, World
from identity.errors import Unreachable
from identity.wire.feed import Beat, Delta, Snapshot

log = structlog.get_logger("retinue.ca.feed")

JOURNAL: Final = 256  # changes an endpoint may have missed and still get a delta
LINGER_S: Final = 300  # how long the view of an endpoint that went away is kept up to date

SignBeat = Callable[[int, int], str]  # (revision, now) -> Heartbeat envelope


@dataclass(slots=True)
class Seat:
    """One endpoint's place in the feed.

    sent:    revision of the newest frame; a delta continues from it
    floor:   oldest revision from which the journal is complete
    behind:  a change could not be applied to the view: it may be half-way and is not shown
    """

    view: View
    sent: int
    floor: int
    journal: deque[tuple[int, frozenset[str]]] = field(default_factory=deque)
    behind: bool = False
    turn: int = 0  # which of its connections has the seat
    connected: bool = False
    left: int = 0


class Feed:
    """All seats over one world. `now` is seconds since the epoch."""

    def __init__(self, world: World, timeline: str, revision: int, sign: SignBeat) -> None:
        self.world = world
        self.timeline = timeline
        self.revision = revision
        self._sign = sign
        self._seats: dict[str, Seat] = {}
        self._turn = 0
        self._beat: tuple[tuple[int, int], str] | None = None

    @property
    def connected(self) -> set[str]:
        """Endpoints with an open stream."""
        return {name for name, seat in self._seats.items() if seat.connected}

    def connect(
        self, endpoint: str, timeline: str | None, revision: int | None, now: int
    ) -> tuple[bytes, int]:
        """Take the seat and get the first frame: a delta from a position the journal still covers, else a snapshot.

        The number returned names this connection to `leave`.

        Raises Unreachable ``feed.scope`` when its scope cannot be computed now.
        """
        seat = self._seats.get(endpoint)
        try:
            if seat is None:
                seat = Seat(self.world.view(endpoint), self.revision, self.revision)
            elif seat.behind:
                self._renew(seat)
        except Exception as e:
            log.critical(
                "the scope of an endpoint cannot be computed",
                endpoint=endpoint,
                why=f"{type(e).__name__}: {e}",
            )
            raise Unreachable(
                "feed.scope",
                "what this endpoint may see cannot be computed now",
                hint="keep what you have; try again",
            ) from e
        self._seats[endpoint] = seat
        frame = (
            self._delta(seat, revision, now) if timeline == self.timeline and revision is not None else None
        )
        if frame is None:
            frame = self._snapshot(seat, now)
        self._turn += 1
        seat.sent, seat.connected, seat.turn = self.revision, True, self._turn
        return frame, seat.turn

    def leave(self, endpoint: str, turn: int, now: int) -> None:
        """That connection is closed; the seat is kept for a while so that a return costs a delta."""
        seat = self._seats.get(endpoint)
        if seat is not None and seat.turn == turn:
            seat.connected, seat.left = False, now

    def drop(self, endpoint: str) -> None:
        """Forget a revoked endpoint."""
        self._seats.pop(endpoint, None)

    def advance(self, revision: int, touched: Touched, now: int) -> dict[str, bytes]:
        """The world is at `revision` now; frames for the connected endpoints whose scoped set is different."""
        self.revision = revision
        frames: dict[str, bytes] = {}
        for name, seat in list(self._seats.items()):
            if not seat.connected and now - seat.left > LINGER_S:
                del self._seats[name]
                continue
            try:
                changed = self._renew(seat) if seat.behind else self._follow(seat, touched)
                if changed and seat.connected:
                    frame = self._delta(seat, seat.sent, now) or self._snapshot(seat, now)
                    frames[name], seat.sent = frame, revision
            except Exception as e:
                seat.behind = True
                log.critical(
                    "the scope of an endpoint cannot be computed; it keeps what it has",
                    endpoint=name,
                    why=f"{type(e).__name__}: {e}",
                )
        return frames

    def audience(self, key: str) -> set[str]:
        """Connected endpoints that may see an instance."""
        return self.world.audience(key) & self.connected

    def beat(self, now: int) -> tuple[bytes, set[str]]:
        """The heartbeat frame of all, and who gets it: connected and not behind."""
        names = {name for name, seat in self._seats.items() if seat.connected and not seat.behind}
        return _line(Beat(heartbeat=self._heartbeat(now))), names

    # ---- inside

    def _follow(self, seat: Seat, touched: Touched) -> bool:
        changed = self.world.update(seat.view, touched)
        if changed:
            seat.journal.append((self.revision, frozenset(changed)))
            if len(seat.journal) > JOURNAL:
                seat.floor = seat.journal.popleft()[0]
        return bool(changed)

    def _renew(self, seat: Seat) -> bool:
        """After a failure: the view is made anew and continues from no earlier frame."""
        seat.view = self.world.view(seat.view.endpoint)
        seat.journal.clear()
        seat.floor, seat.behind = self.revision, False
        seat.sent = min(seat.sent, self.revision - 1)
        return True

    def _delta(self, seat: Seat, revision: int, now: int) -> bytes | None:
        """A delta from `revision`, or None when it cannot be made or a snapshot is no larger."""
        if not seat.floor <= revision <= self.revision:
            return None
        changed: set[str] = set()
        for at, keys in seat.journal:
            if at > revision:
                changed |= keys
        objects = seat.view.objects
        upserts = {key: objects[key] for key in sorted(changed) if key in objects}
        if len(upserts) > 16 and 2 * len(upserts) > len(objects):
            return None
        return _line(
            Delta(
                timeline=self.timeline, from_revision=revision, revision=self.revision, upserts=upserts,
                removes=sorted(changed - upserts.keys()), hash=seat.view.hash(), heartbeat=self._heartbeat(now),
            )
        )  # fmt: skip

    def _snapshot(self, seat: Seat, now: int) -> bytes:
        return _line(
            Snapshot(
                timeline=self.timeline, revision=self.revision, objects=dict(seat.view.objects), hash=seat.view.hash(),
                heartbeat=self._heartbeat(now),
            )
        )  # fmt: skip

    def _heartbeat(self, now: int) -> str:
        """One signature for all endpoints at one position in one second."""
        at = (self.revision, now)
        if self._beat is None or self._beat[0] != at:
            self._beat = at, self._sign(*at)
        return self._beat[1]


def _line(frame: Snapshot | Delta | Beat) -> bytes:
    return frame.model_dump_json().encode() + b"\n"
