"""Rows with 50 real agents: how soon the last receiver has followed a move, and a revocation."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from identity.wire.admin import WorkloadAdd, WorkloadMove, WorkloadRef
from mesh.lab import Lab
from tests.chaos.registry import Run, row
from tests.chaos.rows_move import Handing, ahead
from tests.chaos.stage import Flow, Samples, Stage

POLICY: Final = """\
meshpolicy: 1
segments:
  - name: crowd
    allow:
      - {id: news, from: {role: api}, to: {role: web}, on: udp/9002}
      - {id: asks, from: {role: web}, to: {role: api}, on: [udp/9000, tcp/9001]}
"""
PACE: Final = 20.0  # messages a second on each flow of old and new holder to each receiver
STREAMS: Final = 8  # receivers that have a TCP connection to api open, too


class Crowd(Stage):
    """`hosts` machines: api on the first, a place for it on the second, a web instance on every other."""

    def __init__(self, hosts: int) -> None:
        super().__init__([f"h{n:02}" for n in range(hosts)], lease=30.0)

    @property
    def receivers(self) -> list[str]:
        return self.hosts[2:]

    def _build(self) -> None:
        lab = self.lab
        lab.start_ca()

        def up(host: str) -> None:
            lab.enroll(host)
            lab.start_agent(host)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(up, self.hosts))
        asyncio.run(self._populate())
        for host in self.hosts[:2]:
            self.spaces["api", host] = self.mesh.place("api", host, wait=0)

        def place(host: str) -> None:
            space = self.spaces["web", host] = lab.add_workload(f"w-{host}")
            number = self.receivers.index(host)
            lab.retinue(host, "attach", "web", "--instance", str(number), "--netns", space)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(place, self.receivers))
        self._probes()
        path = lab.dir / "crowd.yaml"
        path.write_text(POLICY)
        lab.ca("policy", "apply", str(path))

    async def _populate(self) -> None:
        made = await self.lab.admin("POST", "/v1/workloads", WorkloadAdd(name="api", host=self.hosts[0], labels={"role": "api"}))
        self.mesh.addresses["api"] = made["addresses"]
        for n, host in enumerate(self.receivers):
            request = WorkloadAdd(name="web", host=host, labels={"role": "web"}, replica=n > 0)
            made = await self.lab.admin("POST", "/v1/workloads", request)
            self.mesh.addresses[host] = made["addresses"]

    def _probes(self) -> None:
        api = self.mesh.addresses["api"]
        for n, host in enumerate(self.receivers):
            family = n % 2
            for side in ("old", "new"):
                self.flow(f"{side}-{host}", "udp", self.mesh.addresses[host][family], 9002, bind=api[family], rate=PACE)
            self.flow(f"ask-{host}", "udp", api[family], 9000, bind=self.mesh.addresses[host][family], rate=PACE)
            mine = [f"ask-{host}"]
            if n < STREAMS:
                self.flow(f"tcp-{host}", "tcp", api[family], 9001, bind=self.mesh.addresses[host][family], rate=PACE)
                mine.append(f"tcp-{host}")
            self.receive(f"w-{host}", self.spaces["web", host], [self.flows[f"old-{host}"].spec, self.flows[f"new-{host}"].spec])
            self.send(f"w-{host}", self.spaces["web", host], [self.flows[tag].spec for tag in mine])
        asks = [f.spec for t, f in self.flows.items() if t.startswith(("ask-", "tcp-"))]
        for side, host in (("old", self.hosts[0]), ("new", self.hosts[1])):
            self.receive(side, self.spaces["api", host], asks)
            self.send(side, self.spaces["api", host], [f.spec for t, f in self.flows.items() if t.startswith(side)])

    def permitted(self, *prefixes: str) -> list[Flow]:
        return [f for t, f in self.flows.items() if t.startswith(prefixes or ("old-", "ask-", "tcp-"))]

    async def settle(self) -> None:
        await self.flowing(timeout=120, count=10)
        await asyncio.sleep(5)  # fifty agents that have only just started are still writing their state


async def move_timed(lab: Lab, to: str) -> tuple[float, dict[str, Any]]:
    """(when it was committed, the reply). The commit lies `committed_ms` after the request."""
    began = time.time()
    reply = await lab.admin("POST", "/v1/workloads/move", WorkloadMove(name="api", to=to, wait=20), timeout=60)
    return began + reply["committed_ms"] / 1000, reply


@row("M50", "Planned move before 48 receivers (50 agents)", "commit -> last reachable receiver fenced p99 <= 250 ms, 0 from the old holder after its fence, 0 lost TCP connections, gap <= 100 ms", stage="crowd")
async def crowd_move(stage: Crowd, run: Run) -> None:
    rounds = 4 if run.seconds is None else 20
    fenced, told, mixed, lost, gaps, sent = Samples(), Samples(), 0, 0, Samples(), 0
    broken, stalls = stage.connections()[1], Samples()
    for k in range(rounds):
        here, there = (("old", "new") if k % 2 == 0 else ("new", "old"))
        to = stage.hosts[1] if there == "new" else stage.hosts[0]
        places = {"old": ("old", stage.hosts[0]), "new": ("new", stage.hosts[1])}
        handing = Handing(stage, places[here], places[there])
        try:
            await asyncio.to_thread(handing.begin)
            began = time.time()
            with ahead():
                (committed, reply), _ = await asyncio.gather(move_timed(stage.lab, to), handing.run())
        finally:
            await asyncio.to_thread(handing.over)
        run.check(f"handed over: {handing.said}", handing.said.startswith("thawed"))
        told.values.append((reply["released_ms"] or float("inf")) - reply["committed_ms"])
        await stage.flowing(f"{there}-", "ask-", "tcp-", timeout=60, count=10)
        await asyncio.sleep(0.6)
        for host in stage.receivers:
            old, new = stage.flows[f"{here}-{host}"], stage.flows[f"{there}-{host}"]
            last = max((old.log.arrived(n) for n in range(old.since(began - 1), old.next)), default=0.0)
            first = min((new.log.arrived(n) for n in range(new.since(began), new.next) if new.log.arrived(n)), default=float("inf"))
            fenced.values.append(max(0.0, last - committed) * 1000)
            mixed += last > first + 0.001
        asks = stage.tallies(began, time.time() - 0.5, "ask-")
        lost += sum(t.lost for t in asks)
        sent += sum(t.sent for t in asks)
        gaps.values.append(max(t.gap_ms for t in asks))
        streams = stage.tallies(began, time.time() - 0.5, "tcp-")
        lost += sum(t.lost for t in streams)
        stalls.values.append(max(t.delay_ms for t in streams))
    run.note(agents=len(stage.hosts), moves=rounds, fenced_p50_ms=fenced.p(50), fenced_p99_ms=fenced.p(99), acknowledged_p99_ms=told.p(99),
             old_after_new=mixed, sent=sent, lost=lost, gap_ms=max(gaps.values))  # fmt: skip
    run.note(tcp_connections=len(stage.permitted("tcp-")), tcp_broken=stage.connections()[1] - broken, tcp_longest_stall_ms=max(stalls.values))
    run.check("0 TCP connections lost", run.figures["tcp_broken"] == 0)
    run.check("fenced p99 250 ms", fenced.p(99) <= 250)
    run.check("0 accepted from the old holder after its fence", mixed == 0)
    run.check("0 lost", lost == 0)
    run.check("longest gap 100 ms", max(gaps.values) <= 100)


@row("F23", "Revoked identity, open tunnels", "<= 1 s after commit p99 at 50 real agents", stage="crowd", final=True)
async def revoked(stage: Crowd, run: Run) -> None:
    """The identity that all 48 others hear from is revoked; last in the run, for it is final."""
    placed = next(w for w in stage.lab.ca("workload", "list") if w["name"] == "api")
    side = "old" if placed["host"] == stage.hosts[0] else "new"
    # Its own host is stopped: only the receivers can refuse it.

    stage.agent(placed["host"]).send(signal.SIGSTOP)
    cut = Samples()
    try:
        began = time.time()
        with contextlib.suppress(TimeoutError):
            await stage.lab.admin("POST", "/v1/workloads/revoke", WorkloadRef(name="api"), timeout=30)
        replied = time.time() - began
        await asyncio.sleep(3)
        for host in stage.receivers:
            flow = stage.flows[f"{side}-{host}"]
            last = max((flow.log.arrived(n) for n in range(flow.since(began - 1), flow.next)), default=0.0)
            cut.values.append(max(0.0, last - began) * 1000)
    finally:
        stage.agent(placed["host"]).send(signal.SIGCONT)
    run.note(agents=len(stage.hosts), command_ms=replied * 1000, cut_p50_ms=cut.p(50), cut_p99_ms=cut.p(99))
    run.check("p99 1 s", cut.p(99) <= 1000)
    run.check("still sent (control)", stage.flows[f"{side}-{stage.receivers[0]}"].next - stage.flows[f"{side}-{stage.receivers[0]}"].since(began) > 10)
