"""The table of flow records: names, verdicts, bounds, sums that add up; the ring on disk; the kernel's own counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.compile import compile_plan
from mesh.flow_store import FlowStore
from mesh.flows import Accounts, Directory, FlowTable
from mesh.netfilter import Conversation
from policy.flows import FlowRecord, ProcessInfo, summarize
from policy.program import Alert, Audit, Named
from tests.unit.mesh.plans import TD, allow, endpoint, facts, placement, program, snapshot

WORLD = snapshot([placement("web", "h0", 1), placement("api", "h1", 2), placement("db", "h1", 3)], endpoints=[endpoint("h0"), endpoint("h1")])
WEB, API, DB, NOBODY = (str(TD.overlay(n)[0]) for n in (1, 2, 3, 99))
WEB6, API6 = (str(TD.overlay(n)[1]) for n in (1, 2))
ALERTS = (Alert("s", Named(frozenset({"web"})), "page", 60), Alert("t", Named(frozenset({"api"})), "page", 60), Alert("t", Named(frozenset({"api"})), "log", 60))


def directory(*, alerts: tuple[Alert, ...] = (), audits: tuple[Audit, ...] = ()) -> Directory:
    from dataclasses import replace

    prog = replace(program(allow("web", "api", "tcp/80")), alerts=alerts, audits=audits)
    plan = compile_plan(WORLD, facts("web/0"), program=prog)
    return Directory("h0", plan, WORLD, prog)


def conversation(dport: int = 80, *, src: str = WEB, dst: str = API, proto: int = 6) -> Conversation:
    return Conversation(src, dst, proto, 40_000, dport)


def test_names_and_verdicts() -> None:
    here = directory()
    assert (here.end(WEB).name, here.end(WEB).local, here.end(API6).name, here.end(API).local) == ("web", "web/0", "api", None)
    assert (here.end(NOBODY).name, here.end(NOBODY).known) == (NOBODY, False)
    assert here.verdict(conversation()) == ("allow", "r0") == here.verdict(conversation(src=WEB6, dst=API6))
    assert here.verdict(conversation(81)) == ("deny", "default") == here.verdict(conversation(dst=NOBODY))
    assert here.verdict(conversation(0, proto=47)) == ("deny", "default")
    assert here.knows(conversation(dst=NOBODY))
    assert not here.knows(conversation(src=NOBODY, dst=NOBODY))
    audited = directory(audits=(Audit("s", Named(frozenset({"web", "api"})), 1 << 31),))
    assert audited.verdict(conversation(81)) == ("audit", "default")
    assert Directory("h0", compile_plan(WORLD, facts("web/0")), WORLD, None).verdict(conversation()) == ("deny", "default")


def test_alerts_go_once_to_each_sink() -> None:
    here, table = directory(alerts=ALERTS), FlowTable()
    flow = conversation(81)
    record, _ = table.add(5, here, flow, "deny", "default", count=1)
    assert [(a.segment, a.sink) for a in here.alerts(record, flow)] == [("s", "page"), ("t", "log")]
    allowed, _ = table.add(5, here, conversation(), "allow", "r0", count=1)
    assert list(here.alerts(allowed, conversation())) == []
    stranger = conversation(81, src=NOBODY, dst=DB)
    record, _ = table.add(5, here, stranger, "deny", "default", count=1)
    assert list(here.alerts(record, stranger)) == []


def test_a_record_says_who_and_what_is_not_known() -> None:
    here, table = directory(), FlowTable()
    record, fresh = table.add(100, here, conversation(), "allow", "r0", count=1)
    assert fresh
    assert record == FlowRecord(100, "web", "api", 6, 80, 0, 0, "allow", 100, 1, "r0", 0, 0, "h0", ProcessInfo(), None)
    again, fresh = table.add(90, here, conversation(), "allow", "r0", count=1, packets=3, size=500)
    assert (fresh, again.time, again.first, again.count, again.packets, again.bytes) == (False, 100, 100, 2, 3, 500)
    table.name_process(again, source=True, found=ProcessInfo("/bin/x", "x.service", 7))
    table.name_process(again, source=False, found=ProcessInfo("/bin/y"))
    (known,) = table.records()
    assert (known.src_process, known.dst_process) == (ProcessInfo("/bin/x", "x.service", 7), ProcessInfo("/bin/y"))
    table.name_process(FlowRecord(1, "a", "b", 6, 1), source=True, found=ProcessInfo())  # long gone
    odd, _ = table.add(100, here, conversation(0), "deny", "default")
    assert (odd.proto, odd.port) == (255, None)  # port 0 is nobody's
    ping, _ = table.add(100, here, conversation(0, src=WEB6, dst=API6, proto=58), "deny", "default")
    assert (ping.proto, ping.port) == (1, None)


def test_a_flooding_source_pushes_out_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh import flows

    monkeypatch.setattr(flows, "PER_SOURCE", 50)
    here, table = directory(), FlowTable(size=100)
    table.add(1, here, conversation(9, src=API, dst=WEB), "deny", "default", count=1)
    table.add(1, here, conversation(), "allow", "r0", count=1)
    for port in range(1, 10_001):
        table.add(2, here, conversation(port), "deny", "default", count=1)
    records = table.records()
    assert len([r for r in records if r.src == "web" and r.verdict == "deny"]) == 50
    assert {(r.src, r.verdict) for r in records} == {("web", "deny"), ("api", "deny"), ("web", "allow")}
    assert table.evicted == 9950
    assert sum(r.count for r in table.take()) <= 10_002
    for n in range(500):
        table.add(3, here, conversation(5, src=f"100.64.9.{n}"), "deny", "default", count=1)
    assert len(table.records()) <= 101
    assert set(table._of_source) <= {r.src for r in table.records()}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=40))
@settings(max_examples=100, deadline=None)
def test_what_is_taken_adds_up(steps: list[tuple[int, int, int, int, bool]]) -> None:
    here, table, taken, now = directory(), FlowTable(size=3), [], 0
    total = [0, 0, 0]
    for port, count, packets, size, take in steps:
        now += 1
        table.add(now, here, conversation(port), "deny", "default", count=count, packets=packets, size=size)
        total = [total[0] + count, total[1] + packets, total[2] + size]
        if take:
            taken += table.take()
    taken += table.take()
    assert table.take() == []
    assert [sum(r.count for r in taken), sum(r.packets for r in taken), sum(r.bytes for r in taken)] == total
    assert all(r.started <= r.time <= now for r in taken)
    rows = table.take_summary()
    assert {(r.port, r.count) for r in rows} == {(r.port, r.count) for r in summarize(taken)}
    assert table.take_summary() == []
    table.give_back(rows)
    assert sum(r.count for r in table.take_summary(2)) + sum(r.count for r in table.take_summary()) == total[0]


def test_the_kernels_counts_become_news() -> None:
    accounts, one, two = Accounts(), conversation(81), conversation(82)
    one, two = (Conversation(f.src, f.dst, f.proto, 0, f.dport) for f in (one, two))
    assert list(accounts.news([(one, 7)])) == []  # from before: nobody knows when
    assert list(accounts.news([(one, 9), (two, 1)])) == [(one, 2), (two, 1)]
    accounts.logged(Conversation(WEB, API, 6, 1234, 81))
    assert list(accounts.news([(one, 10), (two, 1)])) == []
    assert list(accounts.news([(one, 3)])) == [(one, 3)]  # forgotten and begun again
    fresh = Accounts()
    fresh.logged(one)
    assert list(fresh.news([(one, 4)])) == [(one, 3)]


# ---- disk


def records(count: int, start: int = 1000) -> list[FlowRecord]:
    return [FlowRecord(start + n, "web", "api", 6, 80, by="r0", host="h0", first=start) for n in range(count)]


def test_the_ring_is_bounded_and_reads_back(tmp_path: Path) -> None:
    store = FlowStore(tmp_path, files=3, file_bytes=2000)
    for n in range(50):
        store.append(records(5, 1000 + 5 * n))
    files = sorted((tmp_path / "flows").iterdir())
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) < 3 * 3000
    assert all(f.stat().st_mode & 0o777 == 0o600 for f in files)
    found = store.read()
    assert found == sorted(found, key=lambda r: r.time)
    assert found[-1].time == 1249
    assert [r.time for r in store.read(since=1248)] == [1248, 1249]
    assert len(store.read(limit=3)) == 3
    store.append([])
    assert (store.lost, store.damaged) == (0, 0)


def test_forged_and_damaged_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    store = FlowStore(tmp_path)
    store.append(records(2))
    with open(tmp_path / "flows/00000001.jsonl", "a") as file:
        file.write('{"time": 5, "src": "a\\u0000", "verdict": "maybe"}\nnot json\n{"time": 1e999}\n\xff\n' + "x" * 70_000 + "\n")
    (tmp_path / "flows/notes.jsonl").write_text("ours? no")
    os.symlink("/etc/passwd", tmp_path / "flows/00000009.jsonl")
    assert store.read() == records(2)
    assert store.damaged == 5
    (tmp_path / "flows/00000009.jsonl").unlink()
    store.append(records(1, 5000))
    assert store.read()[-1].time == 5000


def test_a_disk_that_takes_nothing_costs_only_the_records(tmp_path: Path) -> None:
    (tmp_path / "flows").write_text("in the way")
    store = FlowStore(tmp_path)
    store.append(records(3))
    assert store.lost == 3
    assert store.read() == []
