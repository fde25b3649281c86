"""The sync machine: frames of the change feed in, verified state out. No socket, no file, no clock.

    frame -> position (timeline, revision, signed heartbeat) -> whole-set hash -> each record on its own -> Snapshot

What it promises, whatever arrives:
  - a record is used only after its signature held, its key matches its payload and its epoch is not behind;
  - a frame that does not fit changes nothing; a record that does not hold leaves what was in force before;
  - something leaves the set only by an explicit tombstone, or by a complete snapshot whose hash matches and which
    still has this endpoint's own record, the bundle and (once there was one) the policy;
  - epochs and policy revisions never go back, neither across a removal nor across a restart.

`wall` is seconds since the epoch; `mono` is a clock that never steps (CLOCK_BOOTTIME), also in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from identity.bundle import TrustBundle
from identity.entries import EntriesRecord, Entry
from identity.errors import BadInput, BadState, NotVerified, RetinueError
from identity.records import (
    BundleRecord,
    EndpointRecord,
    ForeignBundle,
    Heartbeat,
    PlacementRecord,
    PolicyRecord,
    state_hash,
    unverified,
)
from identity.wire import feed
from mesh.acceptance import ENTRIES, TAKEN, Held, Mark, Rules, overtaken, settle_addresses
from mesh.snapshot import InstanceKey, Snapshot, instance_key
from policy.trust import PolicyTrust

LEASE: Final = 30.0  # seconds without a newer heartbeat until `fence: strict` instances are gone
STALE_MAX: Final = 12 * 3600.0  # the same for `fence: available`
DRIFT: Final = 1e-3  # how much faster than the CA's our clock may run
JITTER: Final = 3.0  # seconds a heartbeat may be late without a meaning: whole seconds are signed, and machines are busy
MAX_FUTURE: Final = 600.0  # a heartbeat further ahead of our wall clock is refused


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the CA's history; revisions only compare within one timeline."""

    timeline: str
    revision: int


# ---- events


@dataclass(frozen=True, slots=True)
class Accepted:
    """The position moved to `position`; `changed` are the object keys whose state in force is different now."""

    position: Position
    changed: frozenset[str]


@dataclass(frozen=True, slots=True)
class RecordRefused:
    """One record was not taken; whatever was in force under `key` stays."""

    key: str
    error: RetinueError


@dataclass(frozen=True, slots=True)
class FrameRefused:
    """A whole frame was not taken; nothing changed."""

    error: RetinueError


@dataclass(frozen=True, slots=True)
class NeedSnapshot:
    """Reconnect without a position; what is in force stays in force meanwhile."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refreshed:
    """A newer heartbeat arrived."""

    time: int


Event = Accepted | RecordRefused | FrameRefused | NeedSnapshot | Refreshed


@dataclass(frozen=True, slots=True)
class View:
    """What may be acted on now. `fenced` are instances withheld because the state is too old to trust.

    deadline: the `mono` at which the view changes by itself, None when it does not. `ended` are instances whose end
    has come.
    """

    snapshot: Snapshot
    fenced: frozenset[InstanceKey]
    age: float | None
    deadline: float | None
    ended: frozenset[InstanceKey] = frozenset()


@dataclass(frozen=True, slots=True)
class _NextTrust:
    """The trust a frame leads to; `error` when it carries a bundle that was refused."""

    trust: TrustBundle
    bundle: Held | None
    error: RetinueError | None


class SyncMachine:
    """One endpoint's session with the control plane, across connections.

    check_policy: raises RetinueError for a signed policy this version cannot compile; it is then refused and the
    policy before stays in force.
    policy_trust: the operators whose signatures a policy needs, as this endpoint knows them.
    """

    def __init__(
        self,
        trust: TrustBundle,
        endpoint: str,
        *,
        marks: Mapping[InstanceKey, Mark] | None = None,
        policy_mark: Mark | None = None,
        check_policy: Callable[[PolicyRecord], None] | None = None,
        lease: float = LEASE,
        stale_max: float = STALE_MAX,
        policy_trust: PolicyTrust | None = None,
    ) -> None:
        self.trust = trust
        self.endpoint = endpoint
        self.policy_trust = policy_trust or PolicyTrust(trust.trust_domain.name)
        self.rules = Rules(
            trust.trust_domain, dict(marks or {}), policy_mark, check_policy, endpoint, self.policy_trust
        )
        self.position: Position | None = None
        self.heartbeat: Held | None = None  # the newest
        self.proof: Held | None = None  # the one that came with the position
        self.heard: float = 0.0  # mono at which the newest heartbeat was as fresh as it can be: received, less its lag
        self.lag: float = 0.0  # seconds by which the newest heartbeat was late on its connection
        self._pace: tuple[float, float] | None = None  # (mono, signed time) of the promptest heartbeat of the connection
        self.refused: dict[str, RetinueError] = {}
        self.lease, self.stale_max = lease, stale_max
        self._held: dict[str, Held] = {}
        self._received: dict[str, str] = {}
        self._resync = True
        self._domain = trust.trust_domain

    # ---- what the shell asks

    @property
    def marks(self) -> dict[InstanceKey, Mark]:
        """Highest epoch ever accepted of each instance."""
        return self.rules.marks

    @property
    def policy_mark(self) -> Mark | None:
        """Highest policy revision ever accepted."""
        return self.rules.policy_mark

    @property
    def resume(self) -> Position | None:
        """The position to ask deltas from; None asks for a snapshot."""
        return None if self._resync else self.position

    @property
    def objects(self) -> dict[str, str]:
        """Object key -> envelope of everything in force."""
        return {key: held.envelope for key, held in self._held.items()}

    @property
    def preparing(self) -> bool:
        """Is a move being prepared that this endpoint was told of?"""
        return any(key.startswith("prepare/") for key in self._held)

    @property
    def received_hash(self) -> str:
        """Hash of the set as received: what a report states."""
        return state_hash(self._received)

    def placement(self, key: InstanceKey) -> PlacementRecord | None:
        """The placement in force of an instance, also while it is fenced."""
        held = self._held.get(f"placement/{key}")
        return held.payload if held is not None and isinstance(held.payload, PlacementRecord) else None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The registration entries of this endpoint, those that have ended included."""
        held = self._held.get(str(ENTRIES))
        return tuple(held.payload.entries) if held is not None and isinstance(held.payload, EntriesRecord) else ()

    def age(self, mono: float) -> float | None:
        """Seconds since the newest heartbeat was received; None when there never was one."""
        return None if self.heartbeat is None else max(0.0, mono - self.heard)

    def view(self, mono: float) -> View:
        """The snapshot to act on at `mono`, without what is fenced."""
        age = self.age(mono)
        placements: dict[InstanceKey, PlacementRecord] = {}
        prepares: dict[InstanceKey, PlacementRecord] = {}
        endpoints: dict[str, EndpointRecord] = {}
        policy: PolicyRecord | None = None
        entries: tuple[Entry, ...] = ()
        foreign: list[ForeignBundle] = []
        for key, held in self._held.items():
            match held.payload:
                case PlacementRecord() as p if key.startswith("prepare/"):
                    prepares[instance_key(p.name, p.instance)] = p
                case PlacementRecord() as p:
                    placements[instance_key(p.name, p.instance)] = p
                case EndpointRecord() as e:
                    endpoints[e.endpoint] = e
                case PolicyRecord() as policy_record:
                    policy = policy_record
                case ForeignBundle() as foreign_bundle:
                    foreign.append(foreign_bundle)
                case EntriesRecord() as entries_record:
                    entries = tuple(entries_record.entries)
        deadlines: list[float] = []
        fenced: set[InstanceKey] = set()
        for instance, placement in list(placements.items()):
            limit = min(self.lease, self.stale_max) if placement.fence == "strict" else self.stale_max
            if age is None or age >= limit:
                fenced.add(instance)
                del placements[instance]
                prepares.pop(instance, None)
            else:
                deadlines.append(self.heard + limit)
        # What ends by time is measured on the CA's own signed clock, so a step of ours neither extends nor ends it.
        signed_now = self._signed_now(age)
        ended = {key for key, p in placements.items() if p.ends is not None and p.ends <= signed_now}
        for one in (placements, prepares):
            for instance in [key for key, p in one.items() if p.ends is not None and p.ends <= signed_now]:
                del one[instance]
        ends = [*(p.ends for p in (*placements.values(), *prepares.values())), *(e.ends for e in entries)]
        deadlines.extend(mono + end - signed_now for end in ends if end is not None and end > signed_now)
        for name, record in list(endpoints.items()):
            left = record.expires - self._signed_now(age)
            if left <= 0 and name != self.endpoint:
                del endpoints[name]
            elif left > 0:
                deadlines.append(mono + left)
        snapshot = Snapshot(
            trust_domain=self._domain.name,
            timeline=self.position.timeline if self.position else "",
            revision=self.position.revision if self.position else 0,
            policy=policy,
            placements=placements,
            prepares=prepares,
            endpoints=endpoints,
            state_hash=self.received_hash,
            entries=tuple(e for e in entries if e.ends is None or e.ends > signed_now),
            ruled=frozenset(e.name for e in entries),  # an end by time lets nobody else in
            foreign=tuple(sorted(foreign, key=lambda f: f.foreign)),
        )
        return View(snapshot, frozenset(fenced), age, min(deadlines, default=None), frozenset(ended))

    def _signed_now(self, age: float | None) -> float:
        payload = self.heartbeat.payload if self.heartbeat else None
        return payload.time + (age or 0.0) if isinstance(payload, Heartbeat) else 0.0

    # ---- what the shell tells

    def receive(self, line: bytes, *, wall: float, mono: float) -> list[Event]:
        """One line of the feed. Never raises for anything the peer can send."""
        try:
            frame = feed.parse_frame(line)
        except BadInput as e:
            return [FrameRefused(e), *self._need("a frame could not be read")]
        if isinstance(frame, feed.Beat):
            try:
                events = self._beat(self._heartbeat(self.trust, frame.heartbeat, wall), mono)
            except NotVerified as e:
                return [FrameRefused(e)]
            return [*events, *self._bundle_again(wall)]
        try:
            next_trust = self._next_trust(
                frame.objects if isinstance(frame, feed.Snapshot) else frame.upserts, wall
            )
            beat = self._heartbeat(next_trust.trust, frame.heartbeat, wall)
            if isinstance(frame, feed.Snapshot):
                return self._snapshot(frame, next_trust, beat, mono)
            return self._delta(frame, next_trust, beat, mono)
        except NotVerified as e:
            return [FrameRefused(e), *self._need("a frame was refused")]

    def restore(
        self,
        objects: Mapping[str, str],
        position: Position,
        proof: str,
        heartbeat: str,
        *,
        heard: float | None,
        wall: float,
        mono: float,
        stored_hash: str,
    ) -> None:
        """Take over what was saved, verifying everything again. Raises BadState and holds nothing when any part fails.

        proof: the heartbeat that came with the position; heartbeat: the newest of all.
        heard: the `mono` at which the newest heartbeat arrived, None when the machine was restarted since. Then only the
        wall clock can tell its age, and strict instances stay fenced until a newer one arrives.
        """
        try:
            # A clock that is behind (no battery, before NTP) is no reason to forget everything: a heartbeat that holds
            # under the trust it leads to says that this much time has passed.
            passed = unverified(Heartbeat, heartbeat, trust_domain=self._domain.name).time
            next_trust = self._next_trust(objects, max(wall, passed), restoring=True)
            beat = self._heartbeat(next_trust.trust, heartbeat, float("inf"))
            covers = self._heartbeat(next_trust.trust, proof, float("inf"))
            self._fits(covers, position.timeline, position.revision)
            self._complete(objects)
        except RetinueError as e:
            raise _bad_state(e.message) from None
        held, refused = self._judge(next_trust, objects, {})
        if refused:
            key, error = min(refused.items(), key=lambda item: item[0])
            raise _bad_state(f"{key}: {error.message}")
        self._commit(held, next_trust.trust)
        self._received = dict(objects)
        self.position = position
        self.proof = covers
        self.heartbeat = beat
        self.heard = heard if heard is not None else mono - max(wall - _beat_of(beat).time, self.lease)
        self._resync = state_hash(self._received) != stored_hash

    # ---- frames

    def _beat(self, beat: Held, mono: float) -> list[Event]:
        payload = _beat_of(beat)
        if self.position is None or payload.timeline != self.position.timeline:
            return [
                FrameRefused(
                    NotVerified("feed.timeline", "a heartbeat of another timeline than the state in force")
                ),
                *self._need("the timeline changed"),
            ]
        # While we know that changes are missing, a heartbeat is no proof that what we hold is current.
        return [] if self._resync else self._refresh(beat, mono)

    def _snapshot(self, frame: feed.Snapshot, next_trust: _NextTrust, beat: Held, mono: float) -> list[Event]:
        self._fits(beat, frame.timeline, frame.revision)
        self._forward(frame.timeline, frame.revision, beat)
        if state_hash(frame.objects) != frame.hash:
            raise NotVerified("feed.hash", "a snapshot does not have the hash it states")
        self._complete(frame.objects)
        return self._take(
            next_trust, frame.objects, self._held, Position(frame.timeline, frame.revision), beat, mono
        )

    def _delta(self, frame: feed.Delta, next_trust: _NextTrust, beat: Held, mono: float) -> list[Event]:
        here = self.position
        if (
            here is None
            or self._resync
            or (frame.timeline, frame.from_revision) != (here.timeline, here.revision)
        ):
            return self._need("a delta does not continue from the state held")
        self._fits(beat, frame.timeline, frame.revision)
        self._forward(frame.timeline, frame.revision, beat)
        gone = set(frame.removes) - set(frame.upserts)
        received = {k: v for k, v in self._received.items() if k not in gone} | frame.upserts
        if state_hash(received) != frame.hash:
            return self._need("the set after a delta does not have the stated hash")
        for key in sorted(gone & self._indispensable()):
            raise NotVerified("feed.tombstone", f"a delta removes {key}, which is never removed")
        base = {k: h for k, h in self._held.items() if k not in gone}
        return self._take(next_trust, received, base, Position(frame.timeline, frame.revision), beat, mono)

    def _take(
        self,
        next_trust: _NextTrust,
        received: Mapping[str, str],
        base: Mapping[str, Held],
        to: Position,
        beat: Held,
        mono: float,
    ) -> list[Event]:
        """Judge the records of a frame whose position and hash held, and make the outcome the state in force."""
        held, refused = self._judge(next_trust, received, base)
        changed = self._changes(held)
        news = [
            k for k, e in refused.items() if k not in self.refused or received[k] != self._received.get(k)
        ]
        self._commit(held, next_trust.trust)
        self._received = dict(received)
        self.refused = refused
        self.position = to
        self.proof = beat
        self._resync = False
        return [
            *(RecordRefused(k, refused[k]) for k in sorted(news)),
            *self._refresh(beat, mono, always=True),
            Accepted(to, changed),
        ]

    # ---- position and freshness

    @staticmethod
    def _heartbeat(trust: TrustBundle, envelope: str, wall: float) -> Held:
        payload = trust.verify(Heartbeat, envelope)
        if payload.time > wall + MAX_FUTURE:
            raise NotVerified(
                "heartbeat.future", f"a heartbeat {payload.time - wall:.0f} s ahead of this machine's clock",
                hint="set the clock of this machine or of the CA",
            )  # fmt: skip
        return Held(envelope, payload)

    @staticmethod
    def _fits(beat: Held, timeline: str, revision: int) -> None:
        payload = _beat_of(beat)
        if payload.timeline != timeline or payload.revision < revision or revision < 0:
            raise NotVerified(
                "feed.position", "the signed heartbeat does not cover the position of its frame"
            )

    def _forward(self, timeline: str, revision: int, beat: Held) -> None:
        """Is the position ahead of ours? Raises NotVerified."""
        here = self.position
        if here is None:
            return
        if timeline == here.timeline:
            if revision < here.revision:
                raise NotVerified(
                    "feed.rollback", f"revision {revision} is behind revision {here.revision} in force"
                )
        elif self.heartbeat is not None and _beat_of(beat).time <= _beat_of(self.heartbeat).time:
            raise NotVerified("feed.timeline", "another timeline without a newer heartbeat is refused")

    def _refresh(self, beat: Held, mono: float, *, always: bool = False) -> list[Event]:
        """Take a newer heartbeat. `always`: a frame came with it, so an old one is not worth an event."""
        new, old = _beat_of(beat), _beat_of(self.heartbeat) if self.heartbeat else None
        if old is not None and old.timeline == new.timeline and new.revision < old.revision:
            if always:
                return []
            error = NotVerified(
                "heartbeat.rollback", f"a heartbeat of revision {new.revision} after {old.revision}"
            )
            return [FrameRefused(error)]
        if old is not None and new.time <= old.time:
            return []
        self.lag = self._late(new.time, mono)
        self.heartbeat, self.heard = beat, max(self.heard, mono - self.lag) if old is not None else mono - self.lag
        return [Refreshed(new.time)]

    def connected(self) -> None:
        """A new connection to the CA begins: what its first heartbeat says is how late the others may be."""
        self._pace, self.lag = None, 0.0

    def _late(self, signed: float, mono: float) -> float:
        """Seconds by which a heartbeat signed at `signed` is behind the promptest one of this connection.

        Whoever holds back a connection, or a machine that slept on it, has old heartbeats arrive one after the other:
        each is newer than the one before, and none is fresh.
        """
        if self._pace is None:
            self._pace = mono, signed
            return 0.0
        since, first = self._pace
        expected = first + (mono - since) * (1 - DRIFT)
        if signed >= expected:
            self._pace = mono, signed
            return 0.0
        late = expected - signed
        return late if late > JITTER else 0.0

    def _bundle_again(self, wall: float) -> list[Event]:
        """A bundle that was refused by a wrong clock is asked for again as soon as it would hold: nobody sends it anew."""
        kept = self._received.get("bundle")
        if self._resync or kept is None or "bundle" not in self.refused or self._next_trust({"bundle": kept}, wall).error:
            return []
        return self._need("the bundle that was refused holds now")

    def _need(self, reason: str) -> list[Event]:
        self._resync = True
        return [NeedSnapshot(reason)]

    def _indispensable(self) -> set[str]:
        own = {"bundle", f"endpoint/{self.endpoint}"} | ({str(ENTRIES)} if ENTRIES in self.rules.marks else set())
        return own | {"policy"} if self.policy_mark else own

    def _complete(self, objects: Mapping[str, str]) -> None:
        missing = self._indispensable() - objects.keys()
        if missing:
            raise NotVerified(
                "feed.incomplete", f"a snapshot without {', '.join(sorted(missing))} is not complete"
            )

    # ---- records

    def _next_trust(self, objects: Mapping[str, str], wall: float, *, restoring: bool = False) -> _NextTrust:
        """What a frame's own bundle makes trusted: its records and its heartbeat may be signed by a new key.

        restoring: a saved set may be older than the bundle this machine began with; that one then stays in force.
        """
        envelope = objects.get("bundle")
        old = self._held.get("bundle")
        if envelope is None or (old is not None and old.envelope == envelope):
            return _NextTrust(self.trust, old, None)
        try:
            if (
                restoring
                and (saved := self.trust.verify(BundleRecord, envelope)).sequence < self.trust.sequence
            ):
                return _NextTrust(self.trust, Held(envelope, saved), None)
        except NotVerified:
            pass  # signed by a key that only it names itself
        try:
            trust = self.trust.accept_next(envelope, wall)
            return _NextTrust(trust, Held(envelope, trust.verify(BundleRecord, envelope)), None)
        except RetinueError as e:
            return _NextTrust(self.trust, old, e)

    def _judge(
        self, next_trust: _NextTrust, received: Mapping[str, str], base: Mapping[str, Held]
    ) -> tuple[dict[str, Held], dict[str, RetinueError]]:
        """The set in force that `received` leads to, starting from `base`, and what was refused. Changes nothing."""
        trust, bundle, bundle_error = next_trust.trust, next_trust.bundle, next_trust.error
        retrusted = trust is not self.trust
        held: dict[str, Held] = {"bundle": bundle} if bundle else {}
        refused: dict[str, RetinueError] = {"bundle": bundle_error} if bundle_error else {}
        for key, envelope in received.items():
            if key == "bundle":
                continue
            old = base.get(key)
            if old is not None and old.envelope == envelope and not retrusted:
                held[key] = old
                continue
            known = self.refused.get(key)
            if (
                known is not None
                and known.code != TAKEN
                and self._received.get(key) == envelope
                and not retrusted
            ):
                refused[key] = known
            else:
                try:
                    held[key] = self.rules.record(trust, key, envelope, old)
                    continue
                except RetinueError as e:
                    refused[key] = e
            if old is not None and (not retrusted or self._holds(trust, key, old.envelope)):
                held[key] = old
        refused |= settle_addresses(held, base)
        for key in [k for k in held if k.startswith("prepare/") and overtaken(held, k)]:
            del held[key]  # its move was committed or given up: not an error, just over
        return held, refused

    def _holds(self, trust: TrustBundle, key: str, envelope: str) -> bool:
        """May a record in force stay under a new bundle? Not when its signer is trusted no more."""
        try:
            self.rules.record(trust, key, envelope, None)
        except RetinueError:
            return False
        return True

    def _changes(self, held: Mapping[str, Held]) -> frozenset[str]:
        keys = held.keys() | self._held.keys()
        return frozenset(
            k
            for k in keys
            if k not in held or k not in self._held or held[k].envelope != self._held[k].envelope
        )

    def _commit(self, held: dict[str, Held], trust: TrustBundle) -> None:
        self.rules.note({key: one for key, one in held.items() if self._held.get(key) is not one})
        self._held = held
        self.trust = trust


def _beat_of(held: Held) -> Heartbeat:
    if not isinstance(held.payload, Heartbeat):
        raise NotVerified("record.type", f"a {held.payload.typ} record is no heartbeat")
    return held.payload


def _bad_state(why: str) -> BadState:
    return BadState(
        "state.snapshot", f"the saved state does not verify: {why}",
        hint="nothing of it is used; the next contact with the CA replaces it",
    )  # fmt: skip
