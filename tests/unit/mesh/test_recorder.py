"""The recorder over a kernel that is a list of messages: what it makes of them, and that nothing makes it stop."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from mesh import recorder as module
from mesh.alerts import AlertDesk, Sink
from mesh.compile import compile_plan
from mesh.firewall import DeniedFlow
from mesh.flows import Directory
from mesh.netfilter import Conversation, Tracked
from mesh.recorder import Recorder
from policy.flows import ProcessInfo
from policy.program import Alert, Everything
from tests.unit.mesh.plans import facts, program
from tests.unit.mesh.test_flows import API, NOBODY, WEB, WORLD
from tests.unit.mesh.test_netfilter import attribute, tuple_of

CT, LOG = 1 << 8, 4 << 8
HEAD = b"\x02\0\0\0"


class Kernel:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.sets: dict[str, list[DeniedFlow]] = {"denied": [], "audited": []}
        self.listed: list[Tracked] = []

    def listen(self, handle: Any) -> tuple[list[Any], list[str]]:
        return [], ["refusals are not recorded: a test"]

    def connections(self, limit: int) -> list[Tracked]:
        return self.listed

    async def verdicts(self) -> dict[str, int]:
        return dict(self.counts)

    async def noted(self, kind: str) -> list[DeniedFlow]:
        return self.sets[kind]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def said() -> list[tuple[str, str | None]]:
    return []


@pytest.fixture
def recorder(kernel: Kernel, tmp_path: Path, said: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(module.sockets, "owner", lambda flow, source: ProcessInfo("/bin/x", "x.service", 7))
    monkeypatch.setattr(module.netns, "inside", lambda place, look: look())
    from dataclasses import replace

    from tests.unit.mesh.plans import allow

    prog = replace(program(replace(allow("web", "api", "tcp/80"), idle_timeout=60)), alerts=(Alert("s", Everything(), "page", 60),))
    plan = compile_plan(WORLD, facts("web/0"), program=prog)
    desk = AlertDesk("h0", [Sink.parse("page=unix:/nowhere")], tmp_path)
    one = Recorder("h0", kernel, tmp_path, desk, tell=lambda code, text: said.append((code, text)), clock=lambda: 1000.5)
    one.update(Directory("h0", plan, WORLD, prog), plan)
    return one


def new(dport: int, *, dst: str = API, flags: int = 0x400) -> tuple[int, int, bytes]:
    return CT, flags, HEAD + tuple_of(socket.AF_INET, WEB, dst, 6, 1234, dport) + attribute(12, b"abcd")


def end(dport: int, packets: int, size: int) -> tuple[int, int, bytes]:
    kind, _, body = new(dport)
    counters = attribute(9, attribute(1, struct.pack(">Q", packets)), attribute(2, struct.pack(">Q", size)))
    return kind | 2, 0, body + counters


def packet(dport: int, prefix: bytes = b"denied", *, dst: str = API) -> tuple[int, int, bytes]:
    raw = struct.pack(">BBHHHBBH4s4sHH", 0x45, 0, 60, 0, 0, 64, 6, 0, socket.inet_aton(WEB), socket.inet_aton(dst), 1234, dport)
    return LOG, 0, HEAD + attribute(10, prefix + b"\0") + attribute(9, raw) + attribute(11, struct.pack(">I", 5))


async def settled(recorder: Recorder) -> None:
    while recorder._tasks:
        await asyncio.gather(*recorder._tasks)


async def test_a_flow_that_was_ended_as_idle_is_told_by_its_rule_and_alerts_nobody(recorder: Recorder) -> None:
    for message in (packet(80, b"idled"), packet(80, b"idled"), packet(80, b"of a later version")):
        recorder._event(*message)
    await settled(recorder)
    (one,) = recorder.table.records()
    assert (one.verdict, one.by, one.count, one.port) == ("deny", "idle:r0", 2, 80)
    recorder.desk.flush()
    assert recorder.desk.spools["page"].waiting() == []
    recorder._event(*packet(81))
    recorder.desk.flush()
    assert len(recorder.desk.spools["page"].waiting()) == 1  # an attempt is told


async def test_connections_become_records_with_their_process(recorder: Recorder, kernel: Kernel) -> None:
    for message in (new(80), new(80), new(80, dst="9.9.9.9", flags=0), (CT, 0x400, b"junk"), (999, 0, b"")):
        recorder._event(*message)
    await settled(recorder)
    (one,) = [r for r in recorder.table.records() if r.dst == "api"]
    assert (one.count, one.by, one.time, one.src_process) == (2, "r0", 1000, ProcessInfo("/bin/x", "x.service", 7))
    kernel.listed = [Tracked("listed", Conversation(WEB, API, 6, 1234, 80), 3, 300, b"abcd")]
    await recorder._measure()
    await recorder._measure()
    recorder._event(*end(80, 5, 700))
    (one,) = [r for r in recorder.table.records() if r.dst == "api"]
    assert (one.packets, one.bytes, recorder._live) == (5, 700, {})
    recorder._event(*end(81, 1, 50))  # it was permitted when it began, and is not any more
    assert [r.by for r in recorder.table.records() if r.port == 81] == [""]


async def test_a_process_that_was_not_found_is_looked_for_again(recorder: Recorder, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [ProcessInfo(uid=7), ProcessInfo(), ProcessInfo("/bin/x", "x.service", 7)]
    now = 1000
    monkeypatch.setattr(recorder, "_clock", lambda: now)
    monkeypatch.setattr(module.sockets, "owner", lambda flow, source: answers.pop(0))
    seen = []
    for now in (1000, 1001, 1002, 1003, 1006, 1020):
        recorder._event(*new(80))
        await settled(recorder)
        (one,) = recorder.table.records()
        assert one.src_process is not None
        seen.append((now, one.src_process.executable, len(answers)))
    assert seen == [(1000, "unknown", 2), (1001, "unknown", 2), (1002, "unknown", 1), (1003, "unknown", 1),
                    (1006, "/bin/x", 0), (1020, "/bin/x", 0)]  # fmt: skip
    assert recorder.table.records()[0].src_process == ProcessInfo("/bin/x", "x.service", 7)


async def test_what_the_kernel_tells_of_a_state_that_is_just_coming_has_its_rule(recorder: Recorder) -> None:
    from tests.unit.mesh.plans import allow

    prog = program(allow("web", "api", "tcp/81"))
    plan = compile_plan(WORLD, facts("web/0"), program=prog)
    coming = Directory("h0", plan, WORLD, prog)
    recorder.expect(coming)
    recorder._event(*new(81))
    recorder._event(*packet(80))
    recorder.update(coming, plan)
    recorder._event(*new(80))  # neither of them says so any more
    await settled(recorder)
    assert {(r.port, r.verdict, r.by) for r in recorder.table.records()} == {(81, "allow", "r0"), (80, "deny", "default"), (80, "allow", "")}


async def test_refusals_become_records_and_alerts(recorder: Recorder) -> None:
    recorder._event(*packet(81))
    recorder._event(*packet(82, dst=NOBODY))
    recorder._event(*packet(80))  # refused though the rules allow it: another reason
    await settled(recorder)
    assert {(r.dst, r.port, r.by, r.count) for r in recorder.table.records()} == {
        ("api", 81, "default", 1), (NOBODY, 82, "default", 1), ("api", 80, "", 1)
    }  # fmt: skip
    recorder.desk.flush()
    assert len(recorder.desk.spools["page"].waiting()) == 2  # one a destination


async def test_the_kernels_counts_fill_what_was_not_logged(recorder: Recorder, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_SETS", 0.01)
    monkeypatch.setattr(module, "IDLE_SETS", 0.01)
    recorder._event(*packet(81))
    kernel.counts = {"denied": 9, "audited": 4, "unlogged": 2}
    kernel.sets = {"denied": [DeniedFlow(WEB, API, "tcp", 81, 9)], "audited": [DeniedFlow(WEB, API, "udp", 9, 4)]}
    task = asyncio.create_task(recorder._reading())
    async with asyncio.timeout(10):
        while recorder.losses["not_logged"] != 2 or not any(r.count == 9 for r in recorder.table.records()):  # noqa: ASYNC110 -- it has no event
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (one,) = [r for r in recorder.table.records() if r.port == 81]
    assert (one.count, one.packets) == (9, 9)


async def test_followers_history_and_summaries(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOWERS", 1)
    follow = recorder.follow()
    waiting = asyncio.ensure_future(anext(follow))
    await asyncio.sleep(0)
    for port in (80, 81, 82):
        recorder._event(*new(port))
    assert (await waiting).port == 80
    assert recorder.losses["followers"] >= 1
    await follow.aclose()
    await settled(recorder)
    found = await recorder.history(since=1000)
    assert [(r.port, r.count) for r in found] == [(80, 1), (81, 1), (82, 1)]
    assert await recorder.history(since=1001) == []
    assert [(s.port, s.count) for s in recorder.summary(2)] == [(80, 1), (81, 1)]
    assert len(recorder.summary(10)) == 1


async def test_it_starts_and_stops_without_a_kernel_that_talks(recorder: Recorder, said: list[tuple[str, str | None]]) -> None:
    recorder.start()
    assert said == [("flows.off", "refusals are not recorded: a test")]
    recorder._event(*packet(81))
    await recorder.stop()
    assert [r.port for r in recorder.store.read()] == [81]
    assert len(recorder.desk.spools["page"].waiting()) == 1
    recorder.directory = None
    recorder._event(*packet(81))  # before anything is in force there is nobody to name


async def test_a_flood_is_thrown_away_unread_and_counted(recorder: Recorder) -> None:
    class Source:
        skipped = overruns = 0

        def read(self, budget: int) -> int:
            assert budget >= 0
            self.skipped += budget == 0
            return budget and 10_000

    one: Any = Source()
    recorder._listeners.append(one)
    for _ in range(5):
        recorder._refilled = time.monotonic()
        recorder._readable(one)
    assert recorder.losses["events_skipped"] >= 4
    recorder._listeners.clear()


async def test_the_number_of_searches_for_a_process_is_bounded(recorder: Recorder) -> None:
    for port in range(100, 400):
        recorder._event(*packet(port))
    assert len(recorder._tasks) <= module.LOOKUPS
    await settled(recorder)
