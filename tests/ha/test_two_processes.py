"""Two CA processes on one PostgreSQL database: one truth, whoever is asked, and nobody is lost when one stops."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import select

from ca import rows, schema
from ca.processes import all_of
from ca.store import Store
from ca.transparency import Log
from identity.errors import Conflict, RetinueError
from identity.records import PlacementRecord, unverified
from identity.wire.admin import (
    Host,
    HostRef,
    MoveReply,
    Token,
    TokenCreate,
    Workload,
    WorkloadAdd,
    WorkloadMove,
    WorkloadRef,
)
from identity.wire.feed import Report
from mesh.enroll import Enrollment, enroll
from mesh.sync import Accepted, SyncMachine
from tests.ha.claims import rounds
from tests.ha.processes import TD, Process, wait_for
from tests.postgres_server import Server

pytestmark = pytest.mark.timeout(240)


class Machine:
    """An endpoint that follows the feed of whichever process answers, and reports what it has."""

    def __init__(self, enrollment: Enrollment) -> None:
        self.enrollment = enrollment
        self.sync = SyncMachine(enrollment.bundle, enrollment.endpoint)
        self.problems: list[str] = []
        self.removed: list[set[str]] = []
        self.attached: list[str] = []
        self.at = ""
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            resume = self.sync.resume
            params = {"timeline": resume.timeline, "revision": str(resume.revision)} if resume else None
            client = self.enrollment.client(self.sync.trust)
            try:
                async with client, client.stream("/v1/feed", params=params, idle=3.0) as lines:
                    async for line in lines:
                        before = set(self.sync.objects)
                        events = self.sync.receive(line, wall=time.time(), mono=time.monotonic())
                        self.at = client.url
                        gone = before - set(self.sync.objects)
                        if gone:
                            self.removed.append(gone)
                        for event in events:
                            if isinstance(event, Accepted):
                                await self._report(event)
                            elif type(event).__name__ in {"FrameRefused", "RecordRefused", "NeedSnapshot"}:
                                self.problems.append(repr(event))
            except RetinueError:
                self.at = ""
                await asyncio.sleep(0.1)

    async def _report(self, event: Accepted) -> None:
        async with self.enrollment.client(self.sync.trust) as client:
            await client.send("/v1/report", Report(
                timeline=event.position.timeline, revision=event.position.revision, hash=self.sync.received_hash,
                attached=self.attached,
            ))  # fmt: skip

    @property
    def epochs(self) -> dict[str, int]:
        return {
            f"{p.name}/{p.instance}": p.epoch
            for p in self.sync.view(time.monotonic()).snapshot.placements.values()
            if p.state == "active"
        }

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def joined(two: list[Process], path: Path, *names: str) -> AsyncIterator[list[Machine]]:
    url = ",".join(p.url for p in two)
    made: list[Machine] = []
    for name in names:
        token = await asyncio.to_thread(two[0].admin.post, "/v1/tokens", TokenCreate(host=name), Token)
        done = await enroll(two[1].url, token.token, path / name, ["127.0.0.1:51820"], ["chacha20poly1305"])
        # What endpoint.json would say had it been enrolled with both addresses.
        object.__setattr__(done, "ca_url", url)
        made.append(Machine(done))
    try:
        yield made
    finally:
        await asyncio.gather(*(m.stop() for m in made))
        # A handshake that was cancelled half-way may keep its socket until it is collected, in somebody else's test.
        for transport in list(getattr(asyncio.get_running_loop(), "_transports", {}).values()):
            transport.abort()
        await asyncio.sleep(0)


async def act(process: Process, path: str, message: object, reply: type) -> object:
    return await asyncio.to_thread(process.admin.post, path, message, reply)


async def outcome(call: object) -> str:
    try:
        await call  # type: ignore[misc]
    except RetinueError as e:
        return e.code
    return "ok"


async def test_one_token_and_many_machines(two: list[Process]) -> None:
    address = (two[0].directory / "store.url").read_text().strip()
    assert await rounds(two, address, 3, 20) == []


async def test_both_serve_the_same_and_what_one_does_the_other_tells(two: list[Process], tmp_path: Path) -> None:
    async with joined(two, tmp_path, "a", "b", "c", "d") as machines:
        await wait_for(lambda: all(m.at for m in machines))
        assert isinstance(await act(two[0], "/v1/workloads", WorkloadAdd(name="web", host="a"), Workload), Workload)
        await wait_for(lambda: machines[0].epochs.get("web/0") == 1)
        machines[1].attached.append("web/0")
        # The mover may be at the process to which the target is not connected.
        for process, to, back in ((two[0], "b", "a"), (two[1], "a", "b")):
            target = next(m for m in machines if m.enrollment.endpoint == to)
            target.attached[:] = ["web/0"]
            done = await act(process, "/v1/workloads/move", WorkloadMove(name="web", instance=0, to=to, wait=10.0), MoveReply)
            assert isinstance(done, MoveReply)
            assert done.workload.host == to
            await wait_for(lambda target=target, done=done: target.epochs.get("web/0") == done.workload.epoch)
            assert back != to
        assert [m.problems for m in machines] == [[], [], [], []]
        await act(two[1], "/v1/hosts/revoke", HostRef(name="d"), Host)
        await wait_for(lambda: machines[3].at == "")


async def test_racing_moves_have_one_winner_and_no_epoch_is_signed_twice(two: list[Process], tmp_path: Path) -> None:
    async with joined(two, tmp_path, "a", "b", "c") as machines:
        await wait_for(lambda: all(m.at for m in machines))
        for n in range(3):
            await act(two[n % 2], "/v1/workloads", WorkloadAdd(name=f"w{n}", host="a"), Workload)
        seen: Counter[str] = Counter()
        for turn in range(8):
            name = f"w{turn % 3}"
            moves = [
                outcome(act(p, "/v1/workloads/move", WorkloadMove(name=name, instance=0, to=to, force=True, wait=0.0), MoveReply))
                for p, to in ((two[0], "b"), (two[1], "c"), (two[0], "a"), (two[1], "b"))
            ]
            if turn == 7:
                moves.append(outcome(act(two[0], "/v1/workloads/revoke", WorkloadRef(name=name, instance=0), Workload)))
                moves.append(outcome(act(two[1], "/v1/workloads/revoke", WorkloadRef(name=name, instance=0), Workload)))
            seen.update(await asyncio.gather(*moves))
        allowed = {"ok", "move.running", "move.same", "move.lost", "placement.changed", "workload.revoked"}
        assert set(seen) <= allowed, seen
        assert seen["ok"] >= 8
        store = Store.open_shared((two[0].directory / "store.url").read_text().strip())
        with store.read() as tx:
            envelopes = tx.execute(select(schema.ledger.c.detail).where(schema.ledger.c.kind == "placement")).scalars().all()
            said = [unverified(PlacementRecord, e, trust_domain=str(TD)) for e in envelopes]
            newest = {r.key: r for r in rows.instances(tx)}
        store.close()
        # An epoch is signed once as prepare and once as what it prepared, never for two holders.
        holders: dict[tuple[str, int], set[str]] = {}
        for one in said:
            holders.setdefault((f"{one.name}/{one.instance}", one.epoch), set()).add(one.endpoint)
        assert all(len(found) == 1 for found in holders.values())
        states = Counter((one.name, one.epoch, one.state) for one in said)
        assert max(states.values()) == 1
        gone = [k for k, r in newest.items() if r.state == "revoked"]
        assert len(gone) == 1
        await wait_for(lambda: all(gone[0] not in m.epochs for m in machines))
        assert [m.problems for m in machines] == [[], [], []]


async def test_a_killed_process_loses_nobody(two: list[Process], tmp_path: Path) -> None:
    async with joined(two, tmp_path, *(f"h{n}" for n in range(6))) as machines:
        await wait_for(lambda: all(m.at for m in machines))
        await act(two[0], "/v1/workloads", WorkloadAdd(name="web", host="h0"), Workload)
        acknowledged: list[int] = []

        async def load() -> None:
            """Changes all the time, at the process that stays."""
            n = 0
            while True:
                to = f"h{(n := n + 1) % 6}"
                if await outcome(act(two[1], "/v1/workloads/move", WorkloadMove(name="web", instance=0, to=to, force=True, wait=0.0), MoveReply)) == "ok":
                    acknowledged.append(n)

        loading = asyncio.create_task(load())
        await wait_for(lambda: len(acknowledged) > 3)
        two[0].kill()
        began = time.monotonic()
        await wait_for(lambda: all(m.at == two[1].url for m in machines), 10.0)
        assert time.monotonic() - began <= 10.0
        after = len(acknowledged)
        await wait_for(lambda: len(acknowledged) > after + 3)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        store = Store.open_shared((two[1].directory / "store.url").read_text().strip())
        with store.read() as tx:
            row = rows.instance(tx, "web", 0)
            known = {p.listen for p in all_of(tx)}
        with store.write() as tx:
            Log().verify(tx, Log().seal(tx, 1, store.timeline))
        store.close()
        assert len(known) == 2
        holder = next(m for m in machines if m.enrollment.endpoint == row.endpoint)
        await wait_for(lambda: holder.epochs.get("web/0") == row.epoch)
        assert [m.problems for m in machines] == [[]] * 6
        two[0].start()


async def test_a_stopped_database_removes_nothing(two: list[Process], postgres: Server, tmp_path: Path) -> None:
    async with joined(two, tmp_path, "a", "b") as machines:
        await wait_for(lambda: all(m.at for m in machines))
        for n in range(3):
            await act(two[n % 2], "/v1/workloads", WorkloadAdd(name=f"w{n}", host="ab"[n % 2]), Workload)
        await wait_for(lambda: len(machines[0].epochs) + len(machines[1].epochs) == 3)
        before = [dict(m.sync.objects) for m in machines]
        postgres.stop(signal.SIGQUIT)
        try:
            beats = [m.sync.heartbeat for m in machines]
            with pytest.raises(RetinueError) as e:
                await act(two[0], "/v1/workloads/revoke", WorkloadRef(name="w0", instance=0), Workload)
            assert e.value.code == "store.unreachable"
            await asyncio.sleep(2.0)  # some heartbeats long: whatever would be said, would have been
            assert [dict(m.sync.objects) for m in machines] == before
            # A process that cannot read vouches for nothing: at most the beat that was on its way.
            silent = [m.sync.heartbeat for m in machines]
            await asyncio.sleep(1.0)
            assert [m.sync.heartbeat for m in machines] == silent
            assert len(beats) == 2
        finally:
            postgres.start()
        await wait_for(lambda: all(m.at for m in machines))
        with pytest.raises(Conflict):
            await act(two[0], "/v1/workloads", WorkloadAdd(name="w1", host="a"), Workload)
        await act(two[1], "/v1/workloads/revoke", WorkloadRef(name="w0", instance=0), Workload)
        await wait_for(lambda: all("w0/0" not in m.epochs for m in machines))
        assert [m.problems for m in machines] == [[], []]
        # Nothing ever left a set but what was revoked: that leaves as a record that says so.
        assert all(key.startswith("prepare/") for m in machines for gone in m.removed for key in gone)
