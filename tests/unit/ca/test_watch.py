from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ca import audit, transparency
from ca.plane import Plane
from ca.transparency import Entry, Log
from ca.watch import Monitor, Pins, Seen, about, concerns, load, save, told
from identity import certs
from identity.errors import BadState, NotVerified
from identity.names import TrustDomain
from identity.records import Heartbeat
from identity.transparency import TreeHead

TD = TrustDomain("reg.test")
T0 = 1_800_000_000


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
    assert kinds("a").count("placement") == 2  # who holds them, too
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


def test_what_an_entry_is_about_is_what_its_leaf_covers(entries) -> None:
    """Subject, kind of record and name of actor of a row are the CA's to write as it likes: nobody is kept from seeing."""
    for entry in entries:
        names = about(entry)
        for lie in (dataclasses.replace(entry, subject="other"), dataclasses.replace(entry, actor="x", action="y", at=9)):
            if transparency.computed(lie).hex() == entry.hash:
                assert about(lie) == names
    placed = next(e for e in entries if e.kind == "placement")
    for kind in ("policy", "bundle", "endpoint", "made-up"):
        hidden = dataclasses.replace(placed, kind=kind, subject="nothing")
        Monitor().take([dataclasses.replace(hidden, leaf=0)])  # the leaf holds
        assert concerns(hidden, "shop/api")
    for broken in ("", "a.b", "a.!!.c", "a.W10.c"):
        assert about(dataclasses.replace(placed, detail=broken)) == frozenset()


@pytest.fixture
def ca(tmp_path):
    def make(name: str) -> Plane:
        Plane.create(tmp_path / name, TD, T0)
        opened[name] = Plane.open(tmp_path / name, lambda: float(T0))
        opened[name].seal()
        return opened[name]

    opened: dict[str, Plane] = {}
    yield make
    for plane in opened.values():
        plane.close()


def shown(plane: Plane, **changed) -> tuple[str, str, float]:
    """(bundle, signed head, now) as GET /v1/log answers."""
    with plane.store.read() as tx:
        head = plane.log.head(tx)
    said = {"trust_domain": str(TD), "timeline": plane.store.timeline, "size": head.size, "root": head.root, "time": T0}
    return plane.bundle, plane.sign(TreeHead(**{**said, **changed})), T0


def test_only_a_head_that_a_pinned_root_stands_behind_is_believed(ca) -> None:
    plane, stranger = ca("a"), ca("b")
    for trusted in (plane.authority.root_fingerprint, plane.authority.roots):
        pins = Pins(TD, trusted)
        head = pins.head(*shown(plane))
        assert (head.timeline, head.size > 0) == (plane.store.timeline, True)
        assert pins.head(*shown(plane, size=9)).size == 9
        bundle, signed, now = shown(plane)
        for lie in (shown(stranger), (bundle, shown(stranger)[1], now), (shown(stranger)[0], signed, now), (bundle, "x.y.z", now),
                    (bundle, plane.sign(Heartbeat(trust_domain=str(TD), timeline="t", revision=1, time=T0)), now)):  # fmt: skip
            with pytest.raises(NotVerified):
                pins.head(*lie)
        kept = pins.remember(Seen())
        assert Pins(TD, certs.parse_chain(kept.roots), kept.sequence).head(*shown(plane)).size == head.size
        with pytest.raises(NotVerified) as e:
            Pins(TD, certs.parse_chain(kept.roots), kept.sequence + 1).head(*shown(plane))
        assert e.value.code == "bundle.rollback"
    with pytest.raises(NotVerified):
        Pins(TD, "ab" * 32).head(*shown(plane))


def test_another_timeline_is_told(ca) -> None:
    plane = ca("a")
    pins, monitor = Pins(TD, plane.authority.root_fingerprint), Monitor()
    monitor.begin(pins.head(*shown(plane)))
    again = Monitor(monitor.seen)
    again.begin(pins.head(*shown(plane)))
    with pytest.raises(NotVerified) as e:
        again.begin(pins.head(*shown(plane, timeline="another")))
    assert e.value.code == "log.restarted"
