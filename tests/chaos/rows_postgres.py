"""Row F37: the database of several CA processes is killed under load: restarted once, then a standby takes its place."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, select

from ca import rows, schema
from ca.store import Store
from ca.transparency import Log
from identity.errors import RetinueError
from identity.records import PlacementRecord, unverified
from identity.wire.admin import (
    MoveReply,
    PolicyApply,
    PolicyFileIn,
    PolicyReply,
    Workload,
    WorkloadAdd,
    WorkloadMove,
)
from tests.chaos.registry import Run, row
from tests.ha.processes import TD, Process, pair, wait_for
from tests.ha.test_two_processes import Machine, act, joined
from tests.postgres_server import server

HOSTS = ("a", "b", "c", "d")
POLICY = "meshpolicy: 1\nlabels: {keys: [role]}\nsegments:\n  - {name: s, allow: [{id: r, from: {role: w}, to: {role: w}, on: udp/1}]}\n"


class Writers:
    """Moves of one workload at each CA process, one after the other, all the time. `told`: (when, epoch, holder) acknowledged."""

    def __init__(self, processes: list[Process]) -> None:
        self.told: list[tuple[float, int, str, str]] = []
        self.refused: list[str] = []
        self.tasks = [asyncio.create_task(self._run(p, f"w{n}")) for n, p in enumerate(processes)]

    async def _run(self, process: Process, name: str) -> None:
        n = 0
        while True:
            to = HOSTS[(n := n + 1) % len(HOSTS)]
            move = WorkloadMove(name=name, instance=0, to=to, force=True, wait=0.0)
            try:
                done = await act(process, "/v1/workloads/move", move, MoveReply)
            except RetinueError as e:
                self.refused.append(e.code)
                await asyncio.sleep(0.05)
            else:
                assert isinstance(done, MoveReply)
                self.told.append((time.monotonic(), done.workload.epoch, name, done.workload.host))

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def gap(self, since: float) -> float:
        """Seconds from a time until each process had acknowledged something again."""
        return max(min(t for t, _, name, _ in self.told if t > since and name == w) for w in ("w0", "w1")) - since

    def again(self, since: float) -> bool:
        return {name for t, _, name, _ in self.told if t > since} == {"w0", "w1"}


async def beats(machines: list[Machine], longest: dict[str, float]) -> None:
    """How long each agent was without a new heartbeat, at most; and its revisions never go back."""
    seen = {m.enrollment.endpoint: (m.sync.heartbeat, time.monotonic(), -1) for m in machines}
    while True:
        for m in machines:
            name = m.enrollment.endpoint
            beat, when, revision = seen[name]
            now, resume = time.monotonic(), m.sync.resume
            at = resume.revision if resume else -1
            if at < revision:
                longest["back"] = 1
            longest[name] = max(longest.get(name, 0.0), now - when)
            seen[name] = (m.sync.heartbeat, now if m.sync.heartbeat != beat else when, at)
        await asyncio.sleep(0.02)


def judge(address: str, writers: Writers, run: Run) -> None:
    """Everything acknowledged is in the database that is left, signed once for one holder, in a log that verifies."""
    store = Store.open_shared(address)
    try:
        with store.read() as tx:
            envelopes = tx.execute(select(schema.ledger.c.detail).where(schema.ledger.c.kind == "placement")).scalars().all()
            said = [unverified(PlacementRecord, e, trust_domain=str(TD)) for e in envelopes]
            final = {r.key: r.epoch for r in rows.instances(tx)}
        with store.write() as tx:
            Log().verify(tx, Log().seal(tx, 1, store.timeline))
    finally:
        store.close()
    kept = {(one.name, one.epoch, one.endpoint) for one in said if one.state == "active"}
    lost = [told for told in writers.told if (told[2], told[1], told[3]) not in kept]
    holders: dict[tuple[str, int], set[str]] = {}
    for one in said:
        holders.setdefault((one.name, one.epoch), set()).add(one.endpoint)
    newest = {w: max(e for _, e, name, _ in writers.told if name == w) for w in ("w0", "w1")}
    run.note(acknowledged=len(writers.told), acknowledged_lost=len(lost), refused=len(writers.refused))
    run.check("0 acknowledged writes lost", not lost)
    run.check("no epoch signed for two holders", all(len(h) == 1 for h in holders.values()))
    run.check("epochs go on from the acknowledged ones", all(final[f"{w}/0"] >= e for w, e in newest.items()))


@row("F37", "PostgreSQL fail-over under load", "0 acknowledged writes lost (synchronous standby), revisions monotone, agents' gap <= 10 s", stage="none")
async def failover(_: Any, run: Run) -> None:
    """Two CA processes, four agents, moves at both: the primary is killed and restarted; killed, and its standby promoted."""
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary, server() as primary:
        Path(temporary).chmod(0o755)
        address = primary.database()
        standby = await asyncio.to_thread(primary.standby, Path(temporary) / "standby")
        try:
            database = make_url(address).database
            both = f"postgresql://retinue@/{database}?host=127.0.0.1:{primary.port}&host=127.0.0.1:{standby.port}"
            with pair(Path(temporary), both, time.time()) as two:
                async with joined(two, Path(temporary), *HOSTS) as machines:
                    writers = await _under_load(run, two, machines, primary, standby)
                    only = f"postgresql://retinue@127.0.0.1:{standby.port}/{database}"
                    await asyncio.to_thread(judge, only, writers, run)
        finally:
            standby.stop(signal.SIGQUIT)


async def _under_load(run: Run, two: list[Process], machines: list[Machine], primary: Any, standby: Any) -> Writers:
    await wait_for(lambda: all(m.at for m in machines))
    # Everybody may talk with everybody: whoever moves where, each host has to keep the whole set.
    await act(two[0], "/v1/policy", PolicyApply(files=[PolicyFileIn(name="p.yaml", text=POLICY)]), PolicyReply)
    for n, name in enumerate(("w0", "w1", *(f"s-{h}" for h in HOSTS))):
        request = WorkloadAdd(name=name, host=name[2:] if name[1] == "-" else "a", labels={"role": "w"})
        await act(two[n % 2], "/v1/workloads", request, Workload)
    everything = {f"placement/{name}/0" for name in ("w0", "w1", *(f"s-{h}" for h in HOSTS))}
    await wait_for(lambda: all(everything <= set(m.sync.objects) for m in machines))
    for m in machines:
        m.removed.clear()
    writers = Writers(two)
    longest: dict[str, float] = {}
    watching = asyncio.create_task(beats(machines, longest))
    try:
        await wait_for(lambda: len(writers.told) > 20)
        for what in ("restart", "promote"):
            longest.clear()
            killed = time.monotonic()
            await asyncio.to_thread(primary.stop, signal.SIGKILL)
            if what == "restart":
                await asyncio.to_thread(primary.start)
            else:
                await asyncio.to_thread(standby.promote)
            ready = time.monotonic()
            await wait_for(lambda killed=killed: writers.again(killed), 60)
            before = [m.sync.heartbeat for m in machines]
            await wait_for(lambda before=before: all(m.sync.heartbeat != b for m, b in zip(machines, before, strict=True)), 60)
            run.note(**{f"{what}_server_s": ready - killed, f"{what}_writes_again_s": writers.gap(killed),
                        f"{what}_agents_gap_s": max(v for k, v in longest.items() if k != "back")})  # fmt: skip
            run.check(f"{what}: agents' gap 10 s", run.figures[f"{what}_agents_gap_s"] <= 10)
            run.check(f"{what}: no revision went back", "back" not in longest)
            more = len(writers.told) + 20
            await wait_for(lambda more=more: len(writers.told) > more, 60)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await writers.stop()
    run.check("refused while it was away (control)", writers.refused)
    for m in machines:
        run.check(f"{m.enrollment.endpoint}: nothing was refused by the agent {m.problems[:1]}", not m.problems)
        gone = {k for gone in m.removed for k in gone if not k.startswith("prepare/")}
        run.check(f"{m.enrollment.endpoint}: nothing left its set {sorted(gone)[:3] or ''}".strip(), not gone)
    return writers
