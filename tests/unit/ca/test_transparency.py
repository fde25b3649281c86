from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from ca import audit, transparency
from ca.store import Store
from ca.transparency import Head, Log
from identity.errors import BadInput, BadState, NotFound
from identity.merkle import EMPTY, verify_consistency, verify_inclusion

T = "timeline"


def fill(store: Store, count: int = 5, start: int = 0) -> None:
    with store.write() as tx:
        for n in range(start, start + count):
            audit.append(tx, 100 + n, "admin:root", "test", f"thing-{n % 2}", number=n)


def seal(store: Store, log: Log | None = None) -> Head:
    with store.write() as tx:
        return (log or Log()).seal(tx, 1, T)


def verify(store: Store, noted: Head | None = None) -> Head:
    with store.read() as tx:
        return Log().verify(tx, noted)


def tamper(store: Store, *statements: str) -> None:
    """What somebody with the database can do: the triggers are no obstacle to them."""
    with store.write() as tx:
        shared = tx.dialect.name == "postgresql"
        names = "select tgname, tgrelid::regclass from pg_trigger where not tgisinternal"
        if not shared:
            names = "select name, '' from sqlite_master where type = 'trigger'"
        for name, table in tx.exec_driver_sql(names).all():
            tx.exec_driver_sql(f"drop trigger {name}" + (f" on {table}" if shared else ""))
        for statement in statements:
            tx.execute(text(statement))


def test_an_empty_log_has_the_empty_head(bench) -> None:
    assert seal(bench.store) == verify(bench.store) == Head(0, EMPTY.hex())


def test_entries_are_listed_in_order(bench) -> None:
    fill(bench.store)
    with bench.store.read() as tx:
        assert [e.seq for e in audit.entries(tx)] == [1, 2, 3, 4, 5]
        assert [e.seq for e in audit.entries(tx, after=2, limit=2)] == [3, 4]
        found = audit.entries(tx, subject="thing-1")
        with pytest.raises(NotFound):
            Log().find(tx, "00")
        assert Log().find(tx, found[0].hash) == found[0]
    assert [e.detail["number"] for e in found] == [1, 3]
    assert json.loads(json.dumps(found[0].as_dict()))["actor"] == "admin:root"


def test_an_entry_goes_with_its_transaction(bench) -> None:
    with pytest.raises(ZeroDivisionError), bench.store.write() as tx:
        audit.append(tx, 1, "a", "b", "c")
        raise ZeroDivisionError
    assert seal(bench.store).size == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
def test_heads_are_continuations_and_every_leaf_is_proved(make_bench, tmp_path_factory, batches, data) -> None:
    store = make_bench(tmp_path_factory.mktemp("log") / "ca.db").store
    log, heads, total = Log(), [Head(0, EMPTY.hex())], 0
    for count in batches:
        fill(store, count, total)
        total += count
        heads.append(seal(store, log))
        assert heads[-1].size == total
    one, other = sorted(data.draw(st.lists(st.sampled_from(heads), min_size=2, max_size=2)), key=lambda h: h.size)
    with store.read() as tx:
        fresh = Log()
        path = fresh.consistency(tx, one.size, other.size)
        verify_consistency(one.size, bytes.fromhex(one.root), other.size, bytes.fromhex(other.root), path)
        for entry in transparency.placed(tx, 0, 1000):
            proof = log.inclusion(tx, entry.hash, other.size)
            assert (proof is None) == (entry.leaf >= other.size)
            if proof is not None:
                verify_inclusion(bytes.fromhex(entry.hash), proof[0], other.size, proof[1], bytes.fromhex(other.root))
    assert verify(store, one) == heads[-1]


def test_what_waits_has_no_proof_yet(bench) -> None:
    fill(bench.store, 2)
    head = seal(bench.store)
    fill(bench.store, 1, 2)
    with bench.store.read() as tx:
        assert Log.waiting(tx)
        late = audit.entries(tx)[-1]
        assert late.leaf is None
        assert Log().inclusion(tx, late.hash, head.size) is None
        with pytest.raises(BadInput):
            Log().consistency(tx, 2, 3)
    assert seal(bench.store).size == 3


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("update ledger set actor = 'nobody' where seq = 3", "log.broken"),
        ("update ledger set detail = '{}' where seq = 5", "log.broken"),
        ("update ledger set at = 1 where seq = 1", "log.broken"),
        ("update ledger set kind = 'certificate' where seq = 3", "log.broken"),
        ("update ledger set kind = 'certificate', detail = '[]' where seq = 3", "log.broken"),
        ("update ledger set kind = 'jwt' where seq = 3", "log.broken"),
        ("update ledger set detail = replace(detail, 'db', 'qx') where kind = 'jwt'", "log.broken"),
        ("update ledger set kind = 'act' where kind = 'jwt'", "log.broken"),
        ("update ledger_nodes set hash = '0000000000000000000000000000000000000000000000000000000000000000' where level = 1 and position = 1", "log.broken"),
        ("update ledger_heads set root = '0000000000000000000000000000000000000000000000000000000000000000'", "log.broken"),
        ("delete from ledger where seq = 2", "log.broken"),
        ("delete from ledger where seq = 5", "log.cut"),
        ("delete from ledger", "log.cut"),
        ("delete from ledger_nodes", "log.broken"),
    ],
)
def test_tampering_shows(bench, statement: str, code: str) -> None:
    fill(bench.store, 3)
    with bench.store.write() as tx:
        transparency.record_jwt(tx, 103, "a", {
            "kid": "k", "spiffe_id": "spiffe://reg.test/wl/web", "audience": ["db"], "issued": 103, "expires": 403, "sha256": "00",
        })  # fmt: skip
    fill(bench.store, 1, 4)
    seal(bench.store)
    tamper(bench.store, statement)
    with pytest.raises(BadState) as e:
        verify(bench.store)
    assert e.value.code == code


def test_a_whole_other_history_shows_against_a_noted_head(bench, make_bench, tmp_path) -> None:
    fill(bench.store)
    noted = seal(bench.store)
    other = make_bench(tmp_path / "other.db").store
    fill(other, 4)
    fill(other, 3, 9)
    seal(other)
    assert verify(other).size == 7
    with pytest.raises(BadState) as e:
        verify(other, Head(5, noted.root))
    assert e.value.code == "log.cut"
    with pytest.raises(BadState):
        verify(other, Head(8, noted.root))
    with pytest.raises(BadState):  # a head that was never sealed there, but could have been
        verify(other, Head(6, noted.root))


def test_what_is_published_is_in_the_log(bench) -> None:
    bench.enrol("a")
    bench.add("shop/api", "a")
    bench.placements.revoke("shop/api", 0, bench.now, "test")
    with bench.store.read() as tx:
        kinds = [(e.kind, e.subject) for e in transparency.entries(tx, kinds=("endpoint", "placement"))]
        row = bench.placements.get("shop/api", 0)
        assert Log().find(tx, transparency.record_leaf(row.placement).hex()).subject == "shop/api/0"
    assert kinds == [("endpoint", "a"), ("placement", "shop/api/0"), ("placement", "shop/api/0")]
    assert seal(bench.store).size == verify(bench.store).size
