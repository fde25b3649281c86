"""The asynchronous shell of the control plane: one worker thread for all state, streams and moves on the event loop.

Frames are handed to the loop from inside the job that made them, so they reach every stream in commit order and are
not lost when the request that caused them is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, Literal, TypeVar

import structlog

from ca import postgres, processes
from ca.doorbell import POLL_S, Doorbell
from ca.feed import Frame
from ca.handover import HAND_OVER_S, Handover
from ca.moves import MAX_LEASE_WAIT_S, Contacts, Leases, Progress, Tell
from ca.placements import Prepared
from ca.plane import Plane, Published
from ca.rows import EndpointRow, InstanceRow
from ca.streams import Stream
from ca.worker import Done, Worker, settle
from identity.errors import Bug, Conflict, RetinueError
from identity.wire.admin import Host, MoveReply, Workload, WorkloadMove
from identity.wire.enroll import EnrollReply, EnrollRequest
from identity.wire.feed import Report
from identity.wire.flows import FlowSummary

log = structlog.get_logger("retinue.ca")

T = TypeVar("T")

MAINTAIN_S: Final = 3600.0
RECHECK: Final = 64  # streams whose certificates are checked in one job
STOPS: Final = "the control plane stops"
SLICE: Final = 128  # streams that are told a heartbeat before everybody else has a turn


class Service:
    """Use between `start` and `stop`, on one event loop."""

    def __init__(
        self, plane: Plane, *, heartbeat: float = 2.0, upkeep: float = MAINTAIN_S, leases: Leases | None = None
    ) -> None:
        self.plane = plane
        self.leases = Leases() if leases is None else leases
        self.contacts = Contacts()
        self._taken_back: set[tuple[str, int]] = set()  # (instance, target epoch) of moves that `abort` ended here
        self.web_roots: str | None = None  # PEM file that bundle servers with web certificates are checked by
        self.upkeep = upkeep  # seconds between looks at what the authority needs
        self.heartbeat = heartbeat
        self.reports: dict[str, Report] = {}
        self.streams: dict[str, Stream] = {}
        self._worker = Worker("retinue-ca")
        self._bell: Doorbell | None = None
        self._elsewhere: dict[str, processes.Ready] = {}  # reports of move targets to other processes
        self._current = True  # could the change log be read the last time?
        self._loop: asyncio.AbstractEventLoop
        self._tasks: list[asyncio.Task[None]] = []
        self._handovers: set[asyncio.Task[None]] = set()
        self._news: asyncio.Event
        self.trust_changed: asyncio.Event  # set when the bundle is another one; who watches it clears it
        self.stopping = False

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self.trust_changed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._beats()), asyncio.create_task(self._upkeep())]
        address = postgres.address_of(self.plane.directory)
        if address is not None:
            rung = asyncio.Event()
            self._bell = Doorbell(address, lambda: _wake(self._loop, rung))
            self._bell.start()
            self._tasks.append(asyncio.create_task(self._follow(rung)))

    def hang_up(self) -> None:
        """End every stream at once: this process stops, so nobody's seat is kept."""
        self.stopping = True
        if self.streams:
            log.info("feeds are closed", count=len(self.streams))
        for stream in list(self.streams.values()):
            stream.close(STOPS)

    async def stop(self) -> None:
        """End the streams, finish what administrators asked for and what runs, close the store."""
        self.hang_up()
        if self._bell is not None:
            await self._loop.run_in_executor(None, self._bell.stop)
        tasks = [*self._tasks, *self._handovers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._worker.abandon()
        await asyncio.wrap_future(self._worker.stop(self.plane.close))

    # ---- jobs

    async def read(self, job: Callable[[], T]) -> T:
        """Run a job that changes nothing."""
        return await asyncio.wrap_future(self._worker.submit(job))

    async def serve(self, job: Callable[[], T]) -> T:
        """`read` for endpoints: however many they are, administrators, heartbeats and moves go first."""
        return await asyncio.wrap_future(self._worker.submit(job, second=True))

    async def change(self, job: Callable[[], T], order: Handover | None = None) -> tuple[T, set[str]]:
        """Run a job that may change the store, then publish. Returns its result and who was sent a frame."""

        def run() -> tuple[T, set[str]]:
            try:
                result = job()
            finally:
                published = self._publish(order)  # part of a job may be committed before it fails
            if published.failed is not None:
                raise published.failed
            return result, set(published.frames)

        return await asyncio.wrap_future(self._worker.submit(run))

    async def accept(self, job: Callable[[], T]) -> T:
        """`change` for endpoints; those that wait together are published together, and answered after that."""
        return await asyncio.wrap_future(self._worker.submit(job, second=True, finish=self._accepted))

    def _accepted(self, ran: list[Done]) -> None:
        try:
            failed: BaseException | None = self._publish(None).failed
        except BaseException as e:
            failed = e
        settle([d if d.error is not None or failed is None else Done(d.future, None, failed) for d in ran])

    def _publish(self, order: Handover | None) -> Published:
        """After whatever may have changed the store, in the worker's thread."""
        before = self.plane.mirror.revision
        published = self.plane.publish()
        self._current = published.current
        if self._bell is not None and self.plane.mirror.revision != before:
            self._bell.ring()
        self._loop.call_soon_threadsafe(self._deliver, published, order, self.plane.feed.revision)
        return published

    def _deliver(self, published: Published, order: Handover | None, revision: int) -> None:
        held: dict[str, Stream] = {}
        for name, frame in published.frames.items():
            if (stream := self.streams.get(name)) is not None:
                stream.release()  # nothing that comes later waits behind an earlier handover
                if order is not None and name != order.new:
                    stream.held, held[name] = [], stream
                stream.put(frame)
        if order is not None:
            task = asyncio.create_task(self._hand_over(order, revision, held))
            self._handovers.add(task)
            task.add_done_callback(self._handovers.discard)
        self._close(published.closed, "revoked")
        if published.trust:
            self.trust_changed.set()
            self._spawn(self._recheck_trust())
        if self.plane.store.shared and published.endpoints & self.streams.keys():
            self._spawn(self._recheck(published.endpoints))
        self._tell()

    async def _hand_over(self, order: Handover, revision: int, held: dict[str, Stream]) -> None:
        """Tell the receivers once the new holder serves, and the old holder once they have followed; none waits long."""
        try:
            await self._until(lambda: not self._lagging({order.new}, revision), HAND_OVER_S)
            told = {name for name in held if name != order.old}
            for name in told:
                held[name].release()
            if order.old in held:
                await self._until(lambda: not self._lagging(told & self.streams.keys(), revision), HAND_OVER_S)
        finally:
            for stream in held.values():
                stream.release()

    def _close(self, names: Iterable[str], why: str) -> None:
        for name in names:
            if name in self.streams:
                self.streams[name].close(why)

    # ---- feed

    async def open_stream(self, stream: Stream, timeline: str | None, revision: int | None) -> None:
        """Take the endpoint's seat; its first frame is in the queue afterwards. Raises Unreachable."""

        def run() -> None:
            if self.plane.store.shared and (revision is None or revision > self.plane.feed.revision):
                # Another process enrolled it, or told it of something, that this one has not read yet.
                self._loop.call_soon_threadsafe(self._deliver, self.plane.publish(), None, self.plane.feed.revision)
            frame, stream.turn = self.plane.feed.connect(stream.endpoint, timeline, revision, self.plane.now, older=stream.older)
            self._loop.call_soon_threadsafe(self._seat, stream, frame)

        await self.serve(run)

    def _seat(self, stream: Stream, frame: Frame) -> None:
        old = self.streams.get(stream.endpoint)
        if old is not None:
            old.close("replaced by a newer connection")
        self.streams[stream.endpoint] = stream
        stream.put(frame)

    async def close_stream(self, stream: Stream) -> None:
        """The connection is gone."""
        stream.close("closed")
        if self.streams.get(stream.endpoint) is stream:
            del self.streams[stream.endpoint]
            self.contacts.lost(stream.endpoint)
        if self.stopping:
            return
        self._tell()
        with contextlib.suppress(RuntimeError):  # the worker has stopped already
            await self.serve(lambda: self.plane.feed.leave(stream.endpoint, stream.turn, self.plane.now))

    def report(self, endpoint: str, report: Report) -> None:
        """Note what an endpoint has applied. Raises Conflict for another timeline."""
        if report.timeline != self.plane.store.timeline:
            raise Conflict(
                "report.timeline", "that report is of another timeline", hint="ask the feed for a snapshot"
            )
        self.reports[endpoint] = report.model_copy(update={"flows": []})
        self._tell()
        if report.flows:
            self._spawn(self._observe(endpoint, report.flows))
        if endpoint in self.plane.targets.values() or endpoint in self.plane.leaving.values():
            self._spawn(self._share(endpoint, report))

    async def _observe(self, endpoint: str, flows: list[FlowSummary]) -> None:
        """Keep what it carried and refused; a rollout is judged at once."""
        plane = self.plane
        try:
            noted = await self.serve(lambda: plane.rollouts.observe(endpoint, flows, plane.now))
            if noted.foreign:
                log.warning("flows of others' workloads were reported", endpoint=endpoint, count=noted.foreign)
            if any(one.verdict == "deny" for one in flows):
                await self.change(lambda: plane.rollouts.tick(plane.now))
        except RetinueError as e:
            log.warning("what an endpoint saw could not be kept", endpoint=endpoint, code=e.code)

    async def _share(self, endpoint: str, report: Report) -> None:
        """The process that makes the move may be another one."""
        plane = self.plane
        try:
            await self.read(lambda: processes.note_ready(
                plane.store, endpoint, plane.process, report.revision, report.attached, plane.now
            ))  # fmt: skip
            if self._bell is not None:
                self._bell.ring()
        except RetinueError as e:
            log.warning("a report could not be shared", endpoint=endpoint, code=e.code)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._handovers.add(task)
        task.add_done_callback(self._handovers.discard)

    async def _follow(self, rung: asyncio.Event) -> None:
        """What other processes committed: at every bell, and once a second without one."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await rung.wait()
            rung.clear()
            try:
                await self.change(self._look_elsewhere)
            except Exception as e:
                log.critical("the change log cannot be followed", why=f"{type(e).__name__}: {e}")

    def _look_elsewhere(self) -> None:
        targets = {*self.plane.targets.values(), *self.plane.leaving.values()} - self.streams.keys()
        found = {name: processes.ready(self.plane.store, name) for name in targets}
        self._elsewhere = {name: ready for name, ready in found.items() if ready is not None}

    async def _recheck_trust(self) -> None:
        """After a change of the bundle: whose certificate is believed no more has no stream either."""
        waiting = [s for s in self.streams.values() if s.chain]
        for start in range(0, len(waiting), RECHECK):
            batch = waiting[start : start + RECHECK]
            with contextlib.suppress(RuntimeError):  # the worker has stopped already
                for stream in await self.read(lambda batch=batch: [s for s in batch if not self.plane.believes(s.chain)]):  # type: ignore[misc]  # a default binds the loop's value
                    stream.close("its certificate is not believed any more")

    async def _recheck(self, names: frozenset[str]) -> None:
        """Streams of endpoints whose record changed: after enrolling anew elsewhere, the old certificate is out."""
        for name in names & self.streams.keys():
            stream = self.streams.get(name)
            if stream is None or stream.serial is None:
                continue
            serial = stream.serial
            with contextlib.suppress(RetinueError):
                if not await self.read(lambda name=name, serial=serial: self.plane.still_in_force(name, serial)):  # type: ignore[misc]  # defaults bind the loop's values
                    stream.close("enrolled anew")

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait for reports until `done`; False when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not done():
                    await self._news.wait()
        return done()

    # ---- enrolment

    async def enroll(self, request: EnrollRequest) -> EnrollReply:
        reply = await self.accept(lambda: self.plane.enroll(request))
        # Whoever holds the keys before this enrolment is out.
        self._close([reply.endpoint], "enrolled anew")
        self.reports.pop(reply.endpoint, None)
        return reply

    # ---- moving

    async def move(self, request: WorkloadMove, actor: str, tell: Tell | None = None) -> MoveReply:
        """PREPARE, wait until the new holder is ready, COMMIT, wait until the receivers have it.

        Raises Conflict ``move.not_ready`` or ``move.lease`` (then nothing changed) when the new holder does not report
        the instance attached within `wait`, or the old one may still serve it, unless `force`; ``move.aborted``; and
        what `Placements.prepare` and `commit` raise. `tell` gets every step.
        """
        if request.dry_run:
            return await self._plan(request)
        progress = Progress(f"{request.name}/{request.instance}", tell)
        self.plane.moving[progress.key] += 1  # whatever becomes of it, `tick` takes back what is left when it is over
        try:
            return await self._move(request, actor, progress)
        finally:
            self.plane.moving.subtract([progress.key])
            if not self.plane.moving[progress.key]:
                del self.plane.moving[progress.key]

    async def _move(self, request: WorkloadMove, actor: str, progress: Progress) -> MoveReply:
        plane = self.plane
        prepared, told = await self.change(
            lambda: plane.placements.prepare(request.name, request.instance, request.to, plane.now, actor)
        )
        progress.say("prepare", f"prepared on {request.to}; peers warm a tunnel to it", epoch=prepared.instance.target_epoch)
        try:
            ready = await self._make_ready(request, prepared, told, progress)
            prepared_ms = progress.ms if ready else None
            silent = await self._answered(request, prepared, progress)
            forced = {"forced": True} if request.force and (silent or not ready) else {}
            quiet = {"silent": prepared.holder} if silent else {}
            order = Handover(prepared.target, prepared.holder) if ready else None
            (row, revision), told = await asyncio.shield(
                asyncio.ensure_future(
                    self.change(lambda: plane.placements.commit(prepared, plane.now, actor, **forced, **quiet), order)
                )
            )
        except BaseException as e:
            error = self._why_lost(prepared, e)
            if not isinstance(error, Conflict) or error.code not in {"move.lost", "move.aborted", "placement.changed"}:
                await asyncio.shield(asyncio.ensure_future(self._abort(prepared, actor, error)))
            progress.say("aborted", "nothing was changed")
            if error is e:
                raise
            raise error from None
        committed_ms = progress.ms
        progress.say("commit", f"{request.to} holds it; every receiver that hears of it refuses the old place", epoch=row.epoch)
        released = await self._until(
            lambda: not self._lagging(told & self.streams.keys(), revision), request.wait
        )
        late = self._lagging(told, revision)
        until = None
        if silent:
            left = max(0.0, self._lease_left(row, prepared.holder))
            until = plane.now + int(left) + 1
            progress.say(
                "fenced", f"{prepared.holder} has not said that it follows: it may serve peers that cannot hear of the move either,"
                f" for up to {left:.0f} s", waiting_for=sorted(late), seconds=round(left, 1),
            )  # fmt: skip
        elif released and not late:
            progress.say("released", "everybody concerned has followed")
        return MoveReply(
            workload=self.workload(row), from_host=prepared.holder, prepared_ms=prepared_ms, committed_ms=committed_ms,
            released_ms=progress.ms if released and not late else None, waiting_for=sorted(late), silent=silent,
            double_until=until,
        )  # fmt: skip

    async def _make_ready(self, request: WorkloadMove, prepared: Prepared, told: set[str], progress: Progress) -> bool:
        """Wait for the new holder, and a while for those who were told. Raises Conflict ``move.not_ready``."""
        if missing := self._missing(prepared):
            progress.say("waiting", f"{request.to}: {missing}", seconds=request.wait, waiting_for=[request.to])
        over = self._is_taken_back(prepared)
        ready = await self._until(lambda: over() or self._ready(prepared, told), request.wait)
        if over():
            raise Conflict("move.lost", "taken back")
        if ready:
            progress.say("ready", f"{request.to} is ready")
            return True
        missing = self._missing(prepared)
        if missing and not request.force:
            raise Conflict(
                "move.not_ready", f"{request.to} is not ready for {prepared.instance.key}: {missing}; nothing was changed",
                hint=f"on {request.to}: retinue attach {request.name} --instance {request.instance}; or give --force",
            )  # fmt: skip
        lagging = sorted(self._lagging(told & self.streams.keys(), prepared.revision))
        progress.say("not_ready", f"goes on without: {missing or 'peers that have not answered'}", waiting_for=lagging)
        return False

    async def _answered(self, request: WorkloadMove, prepared: Prepared, progress: Progress) -> bool:
        """Is the old holder silent? Waits for its lease where that is asked or its fence is strict.

        Raises Conflict ``move.lease`` when that takes too long, ``move.aborted``.
        """
        row, holder = prepared.instance, prepared.holder
        if holder is None:
            return False
        over = self._is_taken_back(prepared)
        if self.plane.store.shared and holder not in self.streams:  # it may be another process's
            await self._until(lambda: over() or self._follows(prepared), request.wait)
        if self._follows(prepared):
            return False
        known = "does not answer" if holder in self.streams else "is not connected"
        progress.say("holder_silent", f"{holder} {known}: dead, stopped or cut off", waiting_for=[holder])
        if request.force or (row.fence == "available" and not request.wait_lease):
            return True
        stream = self.streams.get(holder)
        if stream is not None:
            # It gets no further heartbeat. Alive after all, it connects anew, and then it answers.
            stream.close("did not answer a move")
            await self.close_stream(stream)
        left = self._lease_left(row, holder)
        if left > MAX_LEASE_WAIT_S:
            raise Conflict(
                "move.lease", f"{holder} {known} and may serve {row.key} for another {left:.0f} s; nothing was changed",
                hint="wait for it to come back, or give --force: peers that cannot hear of the move may then hear both",
            )  # fmt: skip
        if left > 0:
            progress.say("lease", f"waiting for {holder}'s lease to end", seconds=round(left, 1), waiting_for=[holder])
        while (left := self._lease_left(row, holder)) > 0:
            if await self._until(lambda: over() or self._follows(prepared), left):
                if over():
                    raise Conflict("move.lost", "taken back")
                return False
        return False  # the lease is over: whoever held it is dark by itself

    def _follows(self, prepared: Prepared) -> bool:
        """Has the old holder acknowledged the prepare, to this process or another?"""
        if prepared.holder is None:
            raise Bug("placement.holder", f"nobody held {prepared.instance.key}, so nobody follows")
        report: Report | processes.Ready | None = self.reports.get(prepared.holder)
        if prepared.holder not in self.streams:
            report = self._elsewhere.get(prepared.holder)
        return report is not None and report.revision >= prepared.revision

    def _lease_left(self, row: InstanceRow, holder: str | None) -> float:
        """Seconds until a silent holder has fenced itself. On a shared store another process may still send to it."""
        if holder is None:
            return 0.0
        silence = 0.0 if holder in self.streams else self.contacts.silence(holder)
        if self.plane.store.shared:
            return self.leases.of(row) + MAX_LEASE_WAIT_S
        return self.leases.of(row) - silence

    async def abort_move(self, name: str, instance: int, actor: str) -> InstanceRow:
        """Take back a move that is being made ready, whoever makes it. Raises NotFound, Conflict ``move.none``."""
        plane = self.plane
        (row, epoch), _ = await self.change(lambda: plane.placements.take_back(name, instance, plane.now, actor))
        self._taken_back.add((row.key, epoch))
        self._tell()
        return row

    def _is_taken_back(self, prepared: Prepared) -> Callable[[], bool]:
        return lambda: (prepared.instance.key, prepared.instance.target_epoch) in self._taken_back

    def _why_lost(self, prepared: Prepared, error: BaseException) -> BaseException:
        mine = (prepared.instance.key, prepared.instance.target_epoch or 0)
        if mine in self._taken_back and isinstance(error, Conflict) and error.code in {"move.lost", "placement.changed"}:
            self._taken_back.discard(mine)
            return Conflict("move.aborted", f"the move of {prepared.instance.key} was taken back; nothing was changed")
        return error

    async def _plan(self, request: WorkloadMove) -> MoveReply:
        def run() -> tuple[InstanceRow, set[str]]:
            row = self.plane.placements.plan(request.name, request.instance, request.to)
            return row, (self.plane.feed.audience(row.key) | {request.to}) & self.plane.feed.connected

        row, audience = await self.read(run)
        return MoveReply(
            workload=self.workload(row), from_host=row.endpoint, prepared_ms=None, committed_ms=0.0, released_ms=None,
            waiting_for=sorted(audience), applied=False,
        )  # fmt: skip

    async def _abort(self, prepared: Prepared, actor: str, error: BaseException) -> None:
        why = error.code if isinstance(error, RetinueError) else type(error).__name__
        plane = self.plane
        try:
            await self.change(lambda: plane.placements.abort(prepared, plane.now, actor, why))
        except RetinueError as e:
            # Committed after all, or changed by someone else: then there is nothing to take back.
            log.info("a move was not taken back", instance=prepared.instance.key, code=e.code)

    def _ready(self, prepared: Prepared, told: set[str]) -> bool:
        return not self._missing(prepared) and not self._lagging(
            told & self.streams.keys(), prepared.revision
        )

    def _missing(self, prepared: Prepared) -> str:
        """What keeps the new holder from being ready; empty when nothing does."""
        report: Report | processes.Ready | None = self.reports.get(prepared.target)
        if prepared.target not in self.streams and prepared.target in self._elsewhere:
            report = self._elsewhere[prepared.target]
        elif prepared.target not in self.streams:
            return "it is not connected"
        if report is None or report.revision < prepared.revision:
            return "it has not applied the prepared placement"
        return "" if prepared.instance.key in report.attached else "nothing is attached there for it"

    async def followed(self, names: Iterable[str], revision: int, seconds: float) -> list[str]:
        """Wait until these endpoints have applied a revision; who then has not, those that are not connected included."""
        wanted = frozenset(names)
        await self._until(lambda: not self._lagging(wanted & self.streams.keys(), revision), seconds)
        return sorted(self._lagging(wanted, revision))

    def _lagging(self, names: Iterable[str], revision: int) -> set[str]:
        return {n for n in names if (r := self.reports.get(n)) is None or r.revision < revision}

    # ---- what administrators see

    def host(self, row: EndpointRow) -> Host:
        report = self.reports.get(row.name)
        return Host(
            name=row.name, kind=row.kind, spiffe_id=row.spiffe_id, tunnel_key=row.tunnel_key, underlay=row.underlay,
            generation=row.generation, state=self._state(row), enrolled=row.enrolled,
            svid_expires=row.svid_expires, revision=report.revision if report else None, connected=row.name in self.streams,
            draining=row.draining is not None,
        )  # fmt: skip

    def _state(self, row: EndpointRow) -> Literal["enrolled", "quarantined", "revoked"]:
        if row.state == "revoked":
            return "revoked"
        known = self.plane.mirror.world.endpoints.get(row.name)
        return "quarantined" if row.state == "enrolled" and known is not None and known.record is None else "enrolled"

    def workload(self, row: InstanceRow) -> Workload:
        return Workload(
            name=row.name, instance=row.instance, spiffe_id=row.spiffe_id, labels=dict(row.labels), host=row.endpoint,
            epoch=row.epoch, state=row.state, addresses=row.addresses(self.plane.trust_domain), fence=row.fence,
            ends_at=row.ends_at, ends_with=row.ends_with,
        )  # fmt: skip

    # ---- upkeep

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat)
            try:
                await self.change(self.plane.tick)
            except Exception as e:
                log.critical("upkeep failed", why=f"{type(e).__name__}: {e}")
            if self.plane.store.shared and not self._current:
                continue  # others may have committed what this process cannot see: it vouches for nothing
            # Said even when the store fails: nothing can be committed then, so what was said stays the newest.
            try:
                frame, names = await self.read(lambda: self.plane.feed.beat(self.plane.now))
            except Exception as e:
                log.critical("no heartbeat can be signed", why=f"{type(e).__name__}: {e}")
                continue
            await self._say(frame, names)
            over = [s.endpoint for s in self.streams.values() if s.expires <= self.plane.now]
            self._close(over, "its certificate has ended")

    async def _say(self, frame: Frame, names: set[str]) -> None:
        """A heartbeat to many, in slices: news goes first. Who was told news meanwhile has a newer one with it."""
        waiting = [(stream, stream.told) for name in names if (stream := self.streams.get(name)) is not None]
        for start in range(0, len(waiting), SLICE):
            for stream, told in waiting[start : start + SLICE]:
                if stream.told == told:
                    stream.put(frame)
            await asyncio.sleep(0)

    async def _upkeep(self) -> None:
        while True:
            await asyncio.sleep(self.upkeep)
            try:
                await self.change(self.plane.maintain)
            except Exception as e:
                log.critical("renewing the authority's certificates failed", why=f"{type(e).__name__}: {e}")


def _wake(loop: asyncio.AbstractEventLoop, rung: asyncio.Event) -> None:
    loop.call_soon_threadsafe(rung.set)
