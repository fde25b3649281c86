"""The flow recorder: what the kernel tells of connections and refusals, as records, on disk, and to the alert desk.

    conntrack events   a permitted or audited flow began, or ended with its packets and bytes
    log group          the first packet of a refused or audited flow
    sets of the table  counts of all noted flows, also of those that could not be logged

Work and memory are bounded whatever comes in: EVENTS a second are read, the rest is thrown away unread and counted;
tables, the ring on disk and the spool of alerts have fixed sizes. What is lost is told by `losses`, never hidden.
Nothing here decides anything: without it the firewall does the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import structlog

from identity.errors import RetinueError
from mesh import netns, sockets
from mesh.alerts import AlertDesk
from mesh.firewall import DeniedFlow
from mesh.flow_store import FlowStore
from mesh.flows import Accounts, Directory, FlowTable, unnamed
from mesh.netfilter import Conversation, Handler, Listener, Tracked, logged, tracked
from mesh.plan import Plan
from mesh.snapshot import InstanceKey
from policy.flows import FlowRecord, FlowSummary, ProcessInfo, Verdict
from policy.ports import PORTED, proto_number

EVENTS: Final = 4000  # parsed a second
AT_ONCE: Final = 256  # in one turn of the event loop
READ_SETS: Final = 2.0  # seconds, while something is refused; IDLE_SETS otherwise
IDLE_SETS: Final = 10.0
WRITE: Final = 5.0  # seconds between two writes to disk, and until the CA is told
MEASURE_SHARE: Final = 1000  # listing the tracked connections may take one part in so many of the time: the kernel walks its
MEASURE_MOST: Final = 60.0  # whole table, sized by the machine's memory, for however few; seconds between two, at most
LISTED: Final = 20_000  # connections measured while they go on; with more, only their ends are
LOOKUPS: Final = 20  # searches for a process, a second
KINDS: Final[Mapping[str, Verdict]] = {"denied": "deny", "audited": "audit", "idled": "deny"}  # what the firewall notes
IDLED: Final = "idled"  # a permitted flow that had fallen silent was ended
FOLLOWERS: Final = 1000  # records waiting for one reader

log = structlog.get_logger("retinue.flows")


class Kernel(Protocol):
    """Where records come from: mesh.dataplane.DataPlane."""

    def listen(self, handle: Handler) -> tuple[list[Listener], list[str]]: ...

    def connections(self, limit: int) -> list[Tracked]: ...

    async def verdicts(self) -> dict[str, int]: ...

    async def noted(self, kind: str) -> list[DeniedFlow]: ...


class Recorder:
    """Started with the data plane; `update` names what is in force."""

    def __init__(
        self, host: str, plane: Kernel, state_dir: Path, desk: AlertDesk, *,
        tell: Callable[[str, str | None], None] = lambda *_: None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.host, self.plane, self.desk = host, plane, desk
        self.table, self.store = FlowTable(), FlowStore(state_dir)
        self.directory: Directory | None = None
        self._coming: Directory | None = None
        self._tell, self._clock = tell, clock
        self._places: dict[InstanceKey, str | None] = {}
        self._listeners: list[Listener] = []
        self._accounts: dict[str, Accounts] = {kind: Accounts() for kind in KINDS}
        self._tokens, self._lookups = float(EVENTS), float(LOOKUPS)
        self._refilled = time.monotonic()
        self._unlogged = 0
        self._live: dict[bytes, tuple[int, int]] = {}  # counted already of connections that go on
        self._dirty = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._followers: set[asyncio.Queue[FlowRecord]] = set()
        self._missed = 0

    # ---- life

    def start(self) -> None:
        """Listen. A kernel or a missing privilege that does not let us is told and leaves the rest as it is."""
        self._listeners, missing = self.plane.listen(self._event)
        for why in missing:
            self._tell("flows.off", why)
        for one in self._listeners:
            asyncio.get_running_loop().add_reader(one.sock.fileno(), self._readable, one)

    def expect(self, directory: Directory) -> None:
        """What is being put into force: the kernel may tell of its first flows before anybody says that it is there."""
        self._coming = directory
        self.directory = self.directory or directory

    def update(self, directory: Directory, plan: Plan) -> None:
        """What is in force from now on."""
        self.directory, self._coming = directory, None
        self._places = {key: at.netns for key, at in plan.attachments.items()}

    async def run(self) -> None:
        """Read the sets, write to disk and deliver alerts, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reading())
            group.create_task(self._writing())
            group.create_task(self.desk.run())

    async def stop(self) -> None:
        """Write what is there and let go."""
        loop = asyncio.get_running_loop()
        for one in self._listeners:
            loop.remove_reader(one.sock.fileno())
            one.close()
        self._listeners.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.desk.tick()
        self.desk.flush()
        await asyncio.to_thread(self.store.append, self.table.take())

    # ---- from the kernel

    def _readable(self, one: Listener) -> None:
        now = time.monotonic()
        passed, self._refilled = now - self._refilled, now
        self._tokens = min(EVENTS, self._tokens + passed * EVENTS)
        self._lookups = min(LOOKUPS, self._lookups + passed * LOOKUPS)
        self._tokens -= one.read(max(0, int(min(AT_ONCE, self._tokens))))

    def _event(self, kind: int, flags: int, body: bytes) -> None:
        """One message of the kernel; what does not parse is nothing."""
        directory = self.directory
        if directory is None:
            return
        now = int(self._clock())
        if (packet := logged(kind, body)) is not None:
            if (verdict := KINDS.get(packet.prefix)) is None:
                return
            self._accounts[packet.prefix].logged(packet.flow)
            self._note(now, packet.flow, packet.prefix, packets=1, size=packet.length, count=int(verdict == "deny"), uid=packet.uid)
            self._dirty.set()
        elif (event := tracked(kind, flags, body)) is not None:
            self._account(now, event)

    def _account(self, now: int, event: Tracked) -> None:
        """A connection began, goes on or ended."""
        directory = self.directory
        if directory is None or not directory.knows(event.flow):
            return
        verdict, by = directory.verdict(event.flow)
        if verdict == "deny" and self._coming is not None:
            verdict, by = self._coming.verdict(event.flow)
        if verdict == "deny":
            # It was accepted by what was in force before, or ended because it is not permitted any more.
            verdict, by = "allow", ""
        if event.what == "new":
            record, _ = self.table.add(now, directory, event.flow, verdict, by, count=1)
            self._told(record)
        else:
            packets, size = self._live.pop(event.id, (0, 0))
            if event.what == "listed":
                self._live[event.id] = event.packets, event.size
            more = max(0, event.packets - packets), max(0, event.size - size)
            if not any(more):
                return
            record, _ = self.table.add(now, directory, event.flow, verdict, by, packets=more[0], size=more[1])
        if event.what != "end" and self._lookups >= 1 and self.table.look(record, now):
            self._find_processes(event.flow, record)

    def _note(
        self, now: int, flow: Conversation, kind: str, *, packets: int, size: int = 0, count: int, uid: int | None = None
    ) -> None:
        directory, verdict = self.directory, KINDS[kind]
        assert directory is not None
        if kind == IDLED:
            by = directory.idle(flow) or (self._coming.idle(flow) if self._coming is not None else "")
        else:
            says, by = directory.verdict(flow)
            if says != verdict and self._coming is not None:
                says, by = self._coming.verdict(flow)
            if says != verdict:
                # Another reason than the rules: a process that the rule does not name, or a policy that has changed since.
                by = ""
        record, fresh = self.table.add(now, directory, flow, verdict, by, count=count, packets=packets, size=size)
        if fresh and uid is not None and record.src_process is not None:
            self.table.name_process(record, source=True, found=ProcessInfo(uid=uid))
        if fresh:
            self._find_processes(flow, record)
        if kind == "denied":  # what fell silent was no attempt at anything
            for alert in directory.alerts(record, flow):
                self.desk.attempt(alert, record, count)
        self._told(record)

    # ---- the kernel's own counts

    async def _reading(self) -> None:
        seen: Mapping[str, int] = {}
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SETS):
                    await self._dirty.wait()
            self._dirty.clear()
            await asyncio.sleep(READ_SETS)
            with contextlib.suppress(RetinueError):
                counters = await self.plane.verdicts()
                self._unlogged = counters.get("unlogged", 0)
                moved = [n for n in KINDS if counters.get(n) != seen.get(n)]
                for kind in moved:
                    self._count(kind, await self.plane.noted(kind))
                    self._dirty.set()  # look again soon, until it is quiet
                seen = counters

    def _count(self, kind: str, noted: list[DeniedFlow]) -> None:
        """Packets of noted flows that were not logged one by one."""
        if self.directory is None:
            return
        now = int(self._clock())
        flows = [(Conversation(f.src, f.dst, proto_number(f.proto), 0, f.port), f.packets) for f in noted]
        for flow, new in self._accounts[kind].news(flows):
            if KINDS[kind] == "deny":
                self._note(now, flow, kind, packets=new, count=new)
            else:
                self._note(now, flow, kind, packets=0, count=0)

    # ---- processes

    def _find_processes(self, flow: Conversation, record: FlowRecord) -> None:
        """Look for the processes at the ends that are here, a few a second; the others stay unknown."""
        assert self.directory is not None
        for source, address, wanted in zip((True, False), (flow.src, flow.dst), unnamed(record), strict=True):
            key = self.directory.end(address).local
            if key is None or not wanted or self._lookups < 1 or flow.proto not in PORTED:
                continue
            self._lookups -= 1
            task = asyncio.ensure_future(self._find_process(flow, record, key, source=source))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _find_process(self, flow: Conversation, record: FlowRecord, key: InstanceKey, *, source: bool) -> None:
        place = self._places.get(key)

        def look() -> ProcessInfo:
            return sockets.owner(flow, source=source)

        try:
            found = await asyncio.to_thread(look if place is None else lambda: netns.inside(place, look))
        except (RetinueError, OSError):
            return
        if found != ProcessInfo():
            self.table.name_process(record, source=source, found=found)

    # ---- for others

    async def _writing(self) -> None:
        due = 0.0
        while True:
            await asyncio.sleep(WRITE)
            if (began := time.monotonic()) >= due:
                await self._measure()
                now = time.monotonic()
                due = now + min(MEASURE_MOST, MEASURE_SHARE * (now - began))
            records = self.table.take()
            await asyncio.to_thread(self.store.append, records)

    async def _measure(self) -> None:
        """Packets and bytes of connections that go on; their end alone would tell too late."""
        try:
            found = await asyncio.to_thread(self.plane.connections, LISTED)
        except (RetinueError, OSError):
            return
        if not found:
            return  # too many, or none: their ends tell
        now = int(self._clock())
        for one in found:
            self._account(now, one)
        for gone in self._live.keys() - {one.id for one in found}:
            del self._live[gone]

    def _told(self, record: FlowRecord) -> None:
        for queue in self._followers:
            try:
                queue.put_nowait(record)
            except asyncio.QueueFull:
                self._missed += 1

    async def follow(self) -> AsyncGenerator[FlowRecord, None]:
        """Records as they change; a reader that is too slow misses some (`losses`)."""
        queue: asyncio.Queue[FlowRecord] = asyncio.Queue(FOLLOWERS)
        self._followers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)

    async def history(self, *, since: int = 0, limit: int = 10_000) -> list[FlowRecord]:
        """Records from disk and of now, oldest first; those of one flow add up."""
        fresh = self.table.take()
        await asyncio.to_thread(self.store.append, fresh)
        return await asyncio.to_thread(lambda: self.store.read(since=since, limit=limit))

    def summary(self, limit: int) -> list[FlowSummary]:
        """Summaries since the last call, for the CA."""
        return self.table.take_summary(limit)

    @property
    def losses(self) -> dict[str, int]:
        """What was not recorded, by cause, since the start."""
        return {
            "not_logged": self._unlogged,
            "events_skipped": sum(one.skipped for one in self._listeners),
            "overruns": sum(one.overruns for one in self._listeners),
            "evicted": self.table.evicted,
            "disk": self.store.lost,
            "damaged_lines": self.store.damaged,
            "followers": self._missed,
            "alerts_dropped": sum(spool.dropped for spool in self.desk.spools.values()),
        }
