"""The change feed, without I/O: positions and scoped sets in, frames for each endpoint out.

One Feed lives in one thread. A frame is one line of JSON as parts to be written one after the other: what is equal for
many endpoints is encoded once, and they share the bytes. An endpoint whose scope cannot be computed gets no frame and
no heartbeat until it can be: it keeps what it has and its freshness runs out; the others notice nothing.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from ca.scope import Shared, Touched, View, World
from identity.errors import Unreachable
from identity.wire.feed import Beat

log = structlog.get_logger("retinue.ca.feed")

JOURNAL: Final = 256  # changes an endpoint may have missed and still get a delta
LINGER_S: Final = 300  # how long the view of an endpoint that went away is kept up to date

SignBeat = Callable[[int, int], str]  # (revision, now) -> Heartbeat envelope
Frame = tuple[bytes, ...]


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


class Feed:
    """All seats over one world. `now` is seconds since the epoch."""

    def __init__(self, world: World, timeline: str, revision: int, sign: SignBeat) -> None:
        self.world = world
        self.timeline = timeline
        self.revision = revision
        self._sign = sign
        self._seats: dict[str, Seat] = {}
        self._behind: set[str] = set()
        self._away: dict[str, int] = {}  # endpoint -> when it left, oldest first
        self._turn = 0
        self._beat: tuple[tuple[int, int], str] | None = None

    @property
    def connected(self) -> set[str]:
        """Endpoints with an open stream."""
        return {name for name, seat in self._seats.items() if seat.connected}

    def connect(
        self, endpoint: str, timeline: str | None, revision: int | None, now: int, *, older: bool = False
    ) -> tuple[Frame, int]:
        """Take the seat and get the first frame: a delta from a position the journal still covers, else a snapshot.

        The number returned names this connection to `leave`.

        Raises Unreachable ``feed.scope`` when its scope cannot be computed now.
        """
        if older != (endpoint in self.world.older):
            # Another release reads another set: it starts with all of it.
            (self.world.older.add if older else self.world.older.discard)(endpoint)
            self._seats.pop(endpoint, None)
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
        encoder = _Encoder(self.timeline, self.revision, self._heartbeat(now))
        frame = (
            self._delta(seat, revision, encoder)
            if timeline == self.timeline and revision is not None
            else None
        )
        if frame is None:
            frame = encoder.snapshot(seat.view)
        self._turn += 1
        seat.sent, seat.connected, seat.turn = self.revision, True, self._turn
        self._away.pop(endpoint, None)
        return frame, seat.turn

    def leave(self, endpoint: str, turn: int, now: int) -> None:
        """That connection is closed; the seat is kept for a while so that a return costs a delta."""
        seat = self._seats.get(endpoint)
        if seat is not None and seat.turn == turn:
            seat.connected = False
            self._away.pop(endpoint, None)
            self._away[endpoint] = now

    def drop(self, endpoint: str) -> None:
        """Forget a revoked endpoint."""
        self._seats.pop(endpoint, None)
        self._away.pop(endpoint, None)
        self._behind.discard(endpoint)

    def advance(self, revision: int, touched: Touched, now: int) -> dict[str, Frame]:
        """The world is at `revision` now; frames for the connected endpoints whose scoped set is different."""
        self.revision = revision
        self._forget(now)
        again, self._behind = self._behind, set()
        outcome = self.world.update(touched)
        for view, error in outcome.failed.items():
            if (seat := self._seat_of(view)) is not None and not seat.behind:
                self._fall_behind(seat, error)
        new: list[Seat] = []
        for view, changed in outcome.changed.items():
            if (seat := self._seat_of(view)) is not None and not seat.behind:
                self._note(seat, changed)
                new.append(seat)
        for name in again:
            seat = self._seats[name]
            try:
                self._renew(seat)
                new.append(seat)
            except Exception as e:
                self._fall_behind(seat, e)
        return self._frames([seat for seat in new if seat.connected], now)

    def _frames(self, seats: list[Seat], now: int) -> dict[str, Frame]:
        if not seats:
            return {}
        frames: dict[str, Frame] = {}
        encoder = _Encoder(self.timeline, self.revision, self._heartbeat(now))
        for seat in seats:
            try:
                frame = self._delta(seat, seat.sent, encoder) or encoder.snapshot(seat.view)
            except Exception as e:
                self._fall_behind(seat, e)
            else:
                frames[seat.view.endpoint], seat.sent = frame, self.revision
        return frames

    def audience(self, key: str) -> set[str]:
        """Connected endpoints that may see an instance."""
        return self.world.audience(key) & self.connected

    def beat(self, now: int) -> tuple[Frame, set[str]]:
        """The heartbeat frame of all, and who gets it: connected and not behind."""
        names = {name for name, seat in self._seats.items() if seat.connected and not seat.behind}
        return (Beat(heartbeat=self._heartbeat(now)).model_dump_json().encode() + b"\n",), names

    # ---- inside

    def _seat_of(self, view: View) -> Seat | None:
        seat = self._seats.get(view.endpoint)
        return seat if seat is not None and seat.view is view else None

    def _forget(self, now: int) -> None:
        while self._away:
            name, left = next(iter(self._away.items()))
            if now - left <= LINGER_S:
                return
            self.drop(name)

    def _fall_behind(self, seat: Seat, error: Exception) -> None:
        seat.behind = True
        self._behind.add(seat.view.endpoint)
        log.critical(
            "the scope of an endpoint cannot be computed; it keeps what it has",
            endpoint=seat.view.endpoint,
            why=f"{type(error).__name__}: {error}",
        )

    def _note(self, seat: Seat, changed: frozenset[str]) -> None:
        seat.journal.append((self.revision, changed))
        if len(seat.journal) > JOURNAL:
            seat.floor = seat.journal.popleft()[0]

    def _renew(self, seat: Seat) -> None:
        """After a failure: the view is made anew and continues from no earlier frame."""
        seat.view = self.world.view(seat.view.endpoint)
        seat.journal.clear()
        seat.floor, seat.behind = self.revision, False
        seat.sent = min(seat.sent, self.revision - 1)
        self._behind.discard(seat.view.endpoint)

    def _delta(self, seat: Seat, revision: int, encoder: _Encoder) -> Frame | None:
        """A delta from `revision`, or None when it cannot be made or a snapshot is no larger."""
        if not seat.floor <= revision <= self.revision:
            return None
        missed = [keys for at, keys in reversed(seat.journal) if at > revision]
        return encoder.delta(seat.view, revision, missed[0] if len(missed) == 1 else frozenset().union(*missed))

    def _heartbeat(self, now: int) -> str:
        """One signature for all endpoints at one position in one second."""
        at = (self.revision, now)
        if self._beat is None or self._beat[0] != at:
            self._beat = at, self._sign(*at)
        return self._beat[1]


class _Encoder:
    """Frames at one position (identity.wire.feed.Snapshot and Delta); equal parts are made once."""

    def __init__(self, timeline: str, revision: int, heartbeat: str) -> None:
        self._position = f'"timeline":{json.dumps(timeline)},'
        self._revision = f'"revision":{revision},'
        self._heartbeat = heartbeat
        self._tails: dict[str, bytes] = {}
        self._heads: dict[int, bytes] = {}
        self._bodies: dict[tuple[frozenset[str], frozenset[str]], bytes] = {}
        self._splits: dict[tuple[Shared, frozenset[str]], frozenset[str]] = {}

    def snapshot(self, view: View) -> Frame:
        """The whole set: its shared part is encoded once for all who share it."""
        head = f'{{"kind":"snapshot",{self._position}{self._revision}"objects":{{'.encode()
        shared, extra = view.shared.json(), _members(view.extra())
        comma = b"," if shared and extra else b""
        return head, shared, comma + extra + b"},", self._tail(view)

    def delta(self, view: View, since: int, changed: frozenset[str]) -> Frame | None:
        """What changed since a revision; None when a snapshot is no larger."""
        upserts = self._present(view, changed)
        if len(upserts) > 16 and 2 * len(upserts) > len(view):
            return None
        body = self._bodies.get((upserts, changed))
        if body is None:
            put = {key: value for key in sorted(upserts) if (value := view.get(key)) is not None}
            removes = json.dumps(sorted(changed - upserts), separators=(",", ":")).encode()
            body = b'"upserts":{' + _members(put) + b'},"removes":' + removes + b","
            self._bodies[upserts, changed] = body
        return self._head(since), body, self._tail(view)

    def _present(self, view: View, changed: frozenset[str]) -> frozenset[str]:
        """The keys of `changed` that the view has now."""
        at = (view.shared, changed)
        found = self._splits.get(at)
        if found is None:
            found = self._splits[at] = frozenset(key for key in changed if key in view.shared.objects)
        own = {key for key in view.own if key in changed and key not in found}
        return found | own if own else found

    def _head(self, since: int) -> bytes:
        found = self._heads.get(since)
        if found is None:
            text = f'{{"kind":"delta",{self._position}"from_revision":{since},{self._revision}'
            found = self._heads[since] = text.encode()
        return found

    def _tail(self, view: View) -> bytes:
        stated = view.hash()
        found = self._tails.get(stated)
        if found is None:
            text = f'"hash":"{stated}","heartbeat":{json.dumps(self._heartbeat)}}}\n'
            found = self._tails[stated] = text.encode()
        return found


def _members(objects: Mapping[str, str]) -> bytes:
    return json.dumps(objects, separators=(",", ":")).encode()[1:-1]
