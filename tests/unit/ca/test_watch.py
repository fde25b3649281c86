from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ca import audit, transparency
from ca.transparency import Entry, Log
from ca.watch import Monitor, concerns, load, save, told
from identity.errors import BadState, NotVerified


@pytest.fixture
def entries(bench) -> list[Entry]:
    bench.enrol("a")
    bench.add("shop/api", "a")
    bench.add("shop/api-2", "a")
    with bench.store.write() as tx:
        for n in range(20):
            audit.append(tx, n, "admin:root", "test", "thing", number=n)
        Log().seal(tx, 1, "t")
        return transparency.placed(tx, 0, 1000)


def head(bench) -> transparency.Head:
    with bench.store.read() as tx:
        return Log().head(tx)


def test_a_monitor_reads_the_whole_log_in_any_portions(bench, entries, tmp_path) -> None:
    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cuts=st.lists(st.integers(0, len(entries)), max_size=4))
    def run(cuts) -> None:
        path, at = tmp_path / "state.json", 0
        path.unlink(missing_ok=True)
        for cut in sorted([*cuts, len(entries)]):
            monitor = Monitor(load(path))
            monitor.take(entries[at:cut])
            save(path, monitor.seen)
            at = cut
        monitor = Monitor(load(path))
        monitor.check(head(bench).size, head(bench).root)
        assert len(monitor.seen.edge) <= monitor.size.bit_length()

    run()


def test_what_is_left_out_changed_or_replaced_is_told(bench, entries) -> None:
    with pytest.raises(NotVerified) as e:
        Monitor().take([*entries[:3], *entries[4:]])
    assert e.value.code == "log.gap"
    with pytest.raises(NotVerified) as e:
        Monitor().take([*entries[:3], dataclasses.replace(entries[3], actor="x", detail={}, kind="act")])
    assert e.value.code == "log.entry"
    for detail in ({}, "", []):
        with pytest.raises(NotVerified) as e:
            Monitor().take([*entries[:3], dataclasses.replace(entries[3], kind="certificate", detail=detail)])
        assert e.value.code == "log.entry"
    lie = dataclasses.replace(entries[-1], subject="other")
    lie = dataclasses.replace(lie, hash=transparency.computed(lie).hex())
    monitor = Monitor()
    monitor.take([*entries[:-1], lie])
    for size in (head(bench).size, head(bench).size - 1):
        with pytest.raises(NotVerified) as e:
            monitor.check(size, head(bench).root)
        assert e.value.code == "log.fork"


def test_what_concerns_a_name(entries) -> None:
    def kinds(name: str) -> list[str]:
        return [e.kind for e in entries if concerns(e, name)]

    assert kinds("shop/api") == kinds("shop/api/0") == ["placement", "act"]
    assert "endpoint" in kinds("a")
    assert kinds("shop") == kinds("api") == []
    shown = [told(e) for e in entries if concerns(e, "shop/api")]
    assert shown[0]["detail"]["endpoint"] == "a"


def test_a_damaged_memory_is_told(entries, tmp_path) -> None:
    path = tmp_path / "s.json"
    path.write_text("[]")
    with pytest.raises(BadState):
        load(path)
    monitor = Monitor()
    monitor.take(entries)
    with pytest.raises(BadState):
        Monitor(monitor.seen.model_copy(update={"root": "ab" * 32}))
