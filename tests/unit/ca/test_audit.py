from __future__ import annotations

import json

import pytest
from sqlalchemy import text

from ca import audit
from ca.store import Store
from identity.errors import BadState


def fill(store: Store, count: int = 5) -> None:
    with store.write() as tx:
        for n in range(count):
            audit.append(tx, 100 + n, "admin:root", "test", f"thing-{n % 2}", number=n)


def verify(store: Store, noted: str | None = None) -> audit.Verified:
    with store.read() as tx:
        return audit.verify(tx, noted)


def tamper(store: Store, *statements: str) -> None:
    """What somebody with the database file can do: the triggers are no obstacle to them."""
    with store.write() as tx:
        for name in ("audit_no_update", "audit_no_delete"):
            tx.exec_driver_sql(f"drop trigger {name}")
        for statement in statements:
            tx.execute(text(statement))


def test_an_intact_trail_verifies(bench) -> None:
    assert verify(bench.store) == audit.Verified(0, audit.GENESIS)
    fill(bench.store)
    done = verify(bench.store)
    assert done.rows == 5
    fill(bench.store)
    assert verify(bench.store, done.head).rows == 10


def test_entries_are_listed_in_order(bench) -> None:
    fill(bench.store)
    with bench.store.read() as tx:
        assert [e.seq for e in audit.entries(tx)] == [1, 2, 3, 4, 5]
        assert [e.seq for e in audit.entries(tx, after=2, limit=2)] == [3, 4]
        found = audit.entries(tx, subject="thing-1")
    assert [e.detail["number"] for e in found] == [1, 3]
    assert json.loads(json.dumps(found[0].as_dict()))["actor"] == "admin:root"


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("update audit set actor = 'nobody' where seq = 3", "audit.broken"),
        ("update audit set detail = '{}' where seq = 5", "audit.broken"),
        ("update audit set at = 1 where seq = 1", "audit.broken"),
        ("delete from audit where seq = 2", "audit.broken"),
        ("delete from audit where seq = 1", "audit.broken"),
        ("delete from audit where seq = 5", "audit.cut"),
        ("delete from audit", "audit.cut"),
    ],
)
def test_tampering_shows(bench, statement: str, code: str) -> None:
    fill(bench.store)
    tamper(bench.store, statement)
    with pytest.raises(BadState) as e:
        verify(bench.store)
    assert e.value.code == code


def test_a_cut_that_also_moves_the_head_shows_against_a_noted_head(bench) -> None:
    fill(bench.store)
    noted = verify(bench.store).head
    tamper(
        bench.store, "delete from audit where seq > 3",
        "update meta set value = (select hash from audit where seq = 3) where key = 'audit_head'",
    )  # fmt: skip
    assert verify(bench.store).rows == 3
    with pytest.raises(BadState) as e:
        verify(bench.store, noted)
    assert e.value.code == "audit.cut"


def test_an_entry_goes_with_its_transaction(bench) -> None:
    with pytest.raises(ZeroDivisionError), bench.store.write() as tx:
        audit.append(tx, 1, "a", "b", "c")
        raise ZeroDivisionError
    assert verify(bench.store).rows == 0
