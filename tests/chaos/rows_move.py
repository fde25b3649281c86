"""Rows about moves: one holder at every receiver, whatever becomes of the old one, and how long nobody answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator

from identity.errors import RetinueError
from mesh.lab_process import run as run_command
from tests.chaos.registry import Run, row
from tests.chaos.stage import Samples, Stage, worst


def last_heard(stage: Stage, host: str, since: float) -> float:
    """When the newest packet of api's place on `host` arrived at web; 0 for never."""
    return max((f.log.arrived(n) for f in stage.permitted(f"api-{host[-1]}") for n in range(f.since(since), f.next)), default=0.0)


def first_heard(stage: Stage, host: str, since: float) -> float:
    """When the first packet of that place after `since` arrived."""
    found = [f.log.arrived(n) for f in stage.permitted(f"api-{host[-1]}") for n in range(f.since(since), f.next) if f.log.arrived(n)]
    return min(found, default=float("inf"))


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """This process goes before others, as the probes do: the hypervisor that it plays does not share two cores with fifty agents."""

    def all_threads(nice: int) -> None:
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(task), nice)

    usual = os.getpriority(os.PRIO_PROCESS, 0)
    all_threads(-15)
    try:
        yield
    finally:
        all_threads(usual)


class Handing:
    """Open TCP connections go along with a planned move: frozen at the old place, thawed at the new one (tcp(7), repair).

    From before the move until after it, neither place may answer for a connection that it does not have (yet, any more).
    """

    QUIET = "table inet pause { chain out { type filter hook output priority 0; tcp sport 9001 tcp flags & rst == rst drop; }; }"

    def __init__(self, stage: Stage, old: tuple[str, str], new: tuple[str, str]) -> None:
        """`old` and `new`: the name of the receiver in api's place, and its host."""
        self.stage, self.old, self.new = stage, old[0], new[0]
        self.spaces = [stage.spaces["api", host] for _, host in (old, new)]
        self.host = new[1]
        self.said = ""

    def begin(self) -> None:
        for space in self.spaces:
            run_command(["nft", "-f", "-"], netns=space, stdin=self.QUIET)

    async def run(self) -> None:
        """Wait until the new place is active, then hand over; what a hypervisor does when the copy is complete."""
        await self.stage.lab.until(self.host, lambda s: any(a.name == "api" and a.state == "active" for a in s.attachments), timeout=20)
        await asyncio.to_thread(self._over)

    def _over(self) -> None:
        path = self.stage.lab.dir / f"frozen-{time.monotonic_ns()}"
        frozen = self.stage.command(self.old, f"freeze {path}")
        self.said = self.stage.command(self.new, f"thaw {path}") if frozen == "frozen" else frozen

    def over(self) -> None:
        """Nobody sends to the old place any more."""
        for space in self.spaces:
            with contextlib.suppress(RetinueError):  # it was never made quiet
                run_command(["nft", "delete", "table", "inet", "pause"], netns=space)


@row("M1", "Planned move, address kept", "0 lost, 0 lost TCP connections (handed over), longest gap <= 100 ms, 0 from the old holder after the new one", fast=True)
async def planned(stage: Stage, run: Run) -> None:
    rounds = 4 if run.seconds is None else 30
    gaps, lost, tcp_delay, mixed = Samples(), 0, 0.0, 0
    union_gap = 0.0
    released = Samples()
    await stage.flowing()
    broken = stage.connections()[1]
    for k in range(rounds):
        old, new = ("host-b", "host-c") if k % 2 == 0 else ("host-c", "host-b")
        handing = Handing(stage, (f"api-{old[-1]}", old), (f"api-{new[-1]}", new))
        try:
            await asyncio.to_thread(handing.begin)
            began = time.time()
            moved, _ = await asyncio.gather(stage.move(new), handing.run())
        finally:
            await asyncio.to_thread(handing.over)
        run.check(f"handed over: {handing.said}", handing.said.startswith("thawed"))
        released.values.append(moved["released_ms"] - moved["committed_ms"])
        await stage.flowing("web-api", "web-tcp", f"api-{new[-1]}")
        await asyncio.sleep(0.5)
        end = time.time() - 0.5
        udp, tcp = stage.tallies(began, end, "web-api"), stage.tallies(began, end, "web-tcp")
        lost += sum(t.lost for t in (*udp, *tcp))
        gaps.values.append(max(t.gap_ms for t in udp))
        tcp_delay = max(tcp_delay, *(t.delay_ms for t in tcp))
        mixed += int(last_heard(stage, old, began) > first_heard(stage, new, began) + 0.001)
        union_gap = max(union_gap, 1000 * (first_heard(stage, new, began) - last_heard(stage, old, began)))
    run.note(moves=rounds, lost=lost, gap_ms=max(gaps.values), tcp_broken=stage.connections()[1] - broken, tcp_longest_stall_ms=tcp_delay,
             from_api_gap_ms=union_gap, old_after_new=mixed, released_p99_ms=released.p(99))  # fmt: skip
    run.check("0 lost, UDP and TCP, v4 and v6", lost == 0)
    run.check("0 TCP connections lost", run.figures["tcp_broken"] == 0)
    run.check("longest gap 100 ms", max(gaps.values) <= 100 and tcp_delay <= 250)
    run.check("from api: gap 100 ms", union_gap <= 100)
    run.check("0 accepted from the old holder once the new one was heard", mixed == 0)


@row("M2", "Crash move (old host dead)", "answered by the new holder <= 3 s after the order", fast=True)
async def crash(stage: Stage, run: Run) -> None:
    stage.agent("host-b").kill()
    os.kill(stage.engine_pid("host-b"), signal.SIGKILL)
    stage.cut("host-b", only="meta protocol { ip, ip6 }")
    try:
        await asyncio.sleep(0.5)
        began = time.time()
        await stage.move("host-c", "--wait", "1", "--force")
        ordered = time.time() - began
        await stage.flowing("web-api", "web-tcp", "api-c")
        run.note(command_s=ordered, udp_back_s=max(f.gap_from(began) for f in stage.permitted("web-api")),
                 tcp_back_s=max(f.gap_from(began) for f in stage.permitted("web-tcp")),
                 old_after=sum(f.arrivals_after(began + 3, f.since(began)) for f in stage.permitted("api-b")))  # fmt: skip
        run.check("UDP within 3 s", run.figures["udp_back_s"] <= 3)
        run.check("TCP within 3 s of the order", run.figures["tcp_back_s"] <= 3)
        run.check("nothing from the old holder", run.figures["old_after"] == 0)
    finally:
        stage.heal("host-b")
        await stage.restart_agent("host-b")


@row("F14", "Split brain", "informed peers accept only the highest epoch: 0 from the old holder; SIGSTOP 60 s, then it fences itself <= 1 s", fast=True)
async def split(stage: Stage, run: Run) -> None:
    seconds = 60.0 if run.seconds is not None else 3.0
    agent = stage.agent("host-b")
    began = time.time()
    agent.send(signal.SIGSTOP)
    try:
        await stage.move("host-c", "--wait", "1", "--force")
        fenced = time.time()
        await stage.flowing("api-c")
        first = first_heard(stage, "host-c", began)
        await asyncio.sleep(seconds)
        sent = sum(f.next - f.since(fenced) for f in stage.permitted("api-b"))
        accepted = sum(f.arrivals_after(first, f.since(began)) for f in stage.permitted("api-b"))
        run.note(old_sent=sent, old_accepted=accepted)
        run.check("the old holder went on sending (control)", sent > 100)
        run.check("0 accepted from it", accepted == 0)
    finally:
        agent.send(signal.SIGCONT)
    resumed = time.monotonic()
    await stage.lab.until("host-b", lambda s: all(a.state != "active" for a in s.attachments if a.name == "api"))
    run.note(self_fence_s=time.monotonic() - resumed, still_accepted=sum(f.arrivals_after(first, f.since(began)) for f in stage.permitted("api-b")))
    run.check("fences itself within 1 s", run.figures["self_fence_s"] <= 1.0)
    run.check("0 accepted afterwards", run.figures["still_accepted"] == 0)
    if seconds < 60:
        run.caveat(f"stopped for {seconds:g} s instead of 60 (ARGS=\"--seconds 60\")")


@row("F15", "Failed and lost moves, A->B->A", "right owner <= 3 s; blackout <= 500 ms planned", fast=True)
async def failed_moves(stage: Stage, run: Run) -> None:
    began = time.time()
    # a target without a place: refused, nothing changed
    refused = False
    try:
        await stage.move("host-a", "--wait", "1")
    except RetinueError:
        refused = True
    run.check("a target that is not ready is refused", refused)
    # a target that is cut off while it is being made ready: given up
    stage.cut_ca("host-c")
    try:
        lost_message = False
        try:
            await stage.move("host-c", "--wait", "1")
        except RetinueError:
            lost_message = True
        run.check("a move whose message is lost is given up", lost_message)
        home = await asyncio.to_thread(lambda: stage.home)
        run.check("and leaves the owner as it was", home == "host-b")
    finally:
        stage.heal("host-c")
    await stage.lab.until("host-c", lambda s: s.control == "connected", timeout=20)
    await asyncio.sleep(2.5)  # its heartbeat, after the cut
    run.note(lost_by_failures=worst(stage.tallies(began, time.time() - 0.4, "web-api"))["lost"])
    run.check("0 lost by moves that failed", run.figures["lost_by_failures"] == 0)
    # there and back at once; and both at once
    began = time.time()
    started = time.monotonic()
    await stage.move("host-c")
    await stage.move("host-b")
    run.note(there_and_back_s=time.monotonic() - started)
    racing = await asyncio.gather(stage.move("host-c"), stage.move("host-c"), return_exceptions=True)
    won = [r for r in racing if not isinstance(r, BaseException)]
    run.check("of two moves at once at most one wins", len(won) <= 1 or won[0]["workload"]["epoch"] != won[1]["workload"]["epoch"])
    with contextlib.suppress(RetinueError):
        await stage.move("host-b")
    await stage.flowing("web-api", "web-tcp", "api-b")
    figures = worst(stage.tallies(began, time.time() - 0.4, "web-api"))
    run.note(lost=figures["lost"], gap_ms=figures["gap_ms"])
    run.check("blackout 500 ms", figures["gap_ms"] <= 500)
    run.check("both families", all(f.gap_from(began) < 3 for f in stage.permitted("web-api")))


@row("F26", "Name staleness", "names right <= 5 s after a move; a wrong answer never grants access", fast=True)
async def names(stage: Stage, run: Run) -> None:
    """Addresses are for life, so a name cannot point at an old place; what a name resolves to grants nothing."""
    before = next(w for w in stage.lab.ca("workload", "list") if w["name"] == "api")["addresses"]
    moved = await stage.move("host-c")
    run.check("the address is the same after a move", moved["workload"]["addresses"] == before)
    await stage.flowing("web-api")
    run.note(addresses_changed=0)
    run.caveat("there is no resolver of our own to be stale; names are files with addresses that never change")


