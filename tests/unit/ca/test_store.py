from __future__ import annotations

import ctypes
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, text

from ca import schema as tables
from ca.schema import SCHEMA_VERSION
from ca.store import Store, any_of
from identity.errors import BadInput, BadState, Unreachable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ca.db"
    Store.create(path, "reg.test").settle()
    return path


def code(path: Path) -> str:
    with pytest.raises(BadState) as e:
        Store.open(path)
    assert e.value.hint
    return e.value.code


def test_create_and_open_agree(tmp_path: Path) -> None:
    made = Store.create(tmp_path / "ca.db", "reg.test")
    made.close()
    opened = Store.open(tmp_path / "ca.db")
    assert (opened.timeline, opened.trust_domain) == (made.timeline, "reg.test")
    assert (tmp_path / "ca.db").stat().st_mode & 0o777 == 0o600
    opened.close()


def test_create_refuses_an_existing_file(path: Path) -> None:
    with pytest.raises(BadInput) as e:
        Store.create(path, "other.test")
    assert e.value.code == "ca.exists"


def test_the_engine_runs_as_promised(path: Path) -> None:
    store = Store.open(path)
    with store.read() as tx:
        pragmas = {
            p: tx.exec_driver_sql(f"PRAGMA {p}").scalar_one()
            for p in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    store.close()


def test_a_missing_database(tmp_path: Path) -> None:
    assert code(tmp_path / "none.db") == "store.missing"


def test_a_database_others_can_read(path: Path) -> None:
    path.chmod(0o644)
    assert code(path) == "store.mode"


def test_a_link_or_directory(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    assert code(tmp_path / "link") == "store.file"


def test_an_empty_file(path: Path) -> None:
    os.truncate(path, 0)
    assert code(path) == "store.damaged"


def test_a_foreign_database(tmp_path: Path) -> None:
    foreign = tmp_path / "x.db"
    connection = sqlite3.connect(foreign)
    connection.execute("create table t (a)")
    connection.commit()
    connection.close()
    foreign.chmod(0o600)
    assert code(foreign) == "store.damaged"


@pytest.mark.parametrize(("version", "word"), [(SCHEMA_VERSION + 1, "newer"), (0, "restore")])
def test_a_database_of_another_version(path: Path, version: int, word: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("update meta set value = ? where key = 'schema_version'", (str(version),))
    connection.commit()
    connection.close()
    with pytest.raises(BadState) as e:
        Store.open(path)
    assert e.value.code == "store.version"
    assert word in e.value.hint


def test_a_missing_table(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("drop table tokens")
    connection.commit()
    connection.close()
    assert code(path) == "store.damaged"


def test_a_truncated_database(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8192)
    assert code(path) == "store.damaged"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 120_000), noise=st.binary(min_size=64, max_size=64))
def test_a_damaged_database_is_refused_or_right(path: Path, at: int, noise: bytes) -> None:
    good = path.read_bytes()
    at %= len(good) - len(noise)
    try:
        path.write_bytes(good[:at] + noise + good[at + len(noise) :])
        try:
            store = Store.open(path)
        except BadState:
            pass
        else:
            with store.read() as tx:
                assert store.revision(tx) == 0
            store.close()
    finally:
        path.write_bytes(good)
        for rest in path.parent.glob("ca.db-*"):
            rest.unlink()


def test_changes_come_in_commit_order_and_only_when_committed(path: Path) -> None:
    store = Store.open(path)
    with store.write() as tx:
        first = store.log(tx, 1, "endpoint", "a")
    with pytest.raises(ZeroDivisionError), store.write() as tx:
        store.log(tx, 1, "endpoint", "lost")
        raise ZeroDivisionError
    with store.write() as tx:
        second = store.log(tx, 1, "endpoint", "b")
    with store.read() as tx:
        assert [(c.revision, c.key) for c in store.changes_after(tx, 0)] == [(first, "a"), (second, "b")]
        assert [c.key for c in store.changes_after(tx, first)] == ["b"]
        assert store.revision(tx) == second > first
    store.close()


def test_a_reader_sees_one_moment(path: Path) -> None:
    store = Store.open(path)
    with store.read() as tx:
        assert store.revision(tx) == 0
        with store.write() as other:
            store.log(other, 1, "endpoint", "a")
        assert store.revision(tx) == 0
    store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "delete from ledger",
        "update ledger set actor = 'x'",
        "update ledger set actor = 'x', leaf = 1",
        "update ledger set leaf = null",
        "delete from changes",
        "update changes set key = 'x'",
    ],
)
def test_the_past_cannot_be_rewritten(path: Path, statement: str) -> None:
    store = Store.open(path)
    with store.write() as tx:
        store.log(tx, 1, "endpoint", "a")
        tx.execute(
            insert(tables.ledger).values(
                kind="act", at=1, actor="a", action="b", subject="c", outcome="ok", detail="{}", hash="1"
            )
        )
    with pytest.raises(Exception, match="append-only"), store.write() as tx:
        tx.execute(text(statement))
    with store.read() as tx:
        assert store.revision(tx) == 1
    store.close()


def test_counters_only_grow(path: Path) -> None:
    store = Store.open(path)
    with store.write() as tx:
        assert [store.take_number(tx, "n") for _ in range(3)] == [1, 2, 3]
    with store.read() as tx:
        assert store.get(tx, "n") == "4"
        assert store.get(tx, "none") is None
    store.close()


def test_a_busy_database_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ca.store.BUSY_MS", 20)
    store = Store.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(Unreachable) as e, store.write() as tx:
        store.log(tx, 1, "endpoint", "a")
    assert e.value.code == "store.busy"
    other.execute("rollback")
    other.close()
    with store.write() as tx:
        store.log(tx, 1, "endpoint", "a")
    store.close()


def test_a_full_disk_changes_nothing_and_ends(path: Path) -> None:
    store = Store.open(path)

    def fill() -> None:
        with store.write() as tx:
            tx.exec_driver_sql(
                f"PRAGMA max_page_count={tx.exec_driver_sql('PRAGMA page_count').scalar_one()}"
            )
            for n in range(500):
                store.log(tx, 1, "endpoint", f"{n}" * 60)

    with pytest.raises(Unreachable) as e:
        fill()
    assert e.value.code == "store.full"
    with store.write() as tx:
        assert store.revision(tx) == 0
        tx.exec_driver_sql("PRAGMA max_page_count=1073741823")
    with store.write() as tx:
        store.log(tx, 1, "endpoint", "a")
    store.close()


def test_a_failed_write_is_final(path: Path) -> None:
    store = Store.open(path)
    with pytest.raises(BadState), store.write() as tx:
        tx.exec_driver_sql("PRAGMA query_only=ON")
        store.log(tx, 1, "endpoint", "a")
    with pytest.raises(BadState) as e, store.write():
        pytest.fail("a write was accepted after a failed one")
    assert e.value.code == "store.failed"
    store.close()


def test_close_names_are_offered() -> None:
    assert any_of(["web-1", "web-2", "db"], "web1") == "did you mean web-1 or web-2?"
    assert any_of(["db"], "zzz") == ""


SPILLS = """
import sqlite3, sys
from pathlib import Path
from ca.serve import harden
from ca.store import Store, _engine
path = Path(sys.argv[1])
plain = sqlite3.connect(path / 'plain.db', isolation_level=None)
engine = _engine(path / 'ours.db')
rows = [{'a': i, 'b': f'{i * 7919 % 1000003:09d}' * 10} for i in range(40000)]
harden(path)
plain.execute('create table t (a integer primary key, b text)')
plain.executemany('insert into t values (:a, :b)', rows)
try:
    plain.execute('select count(*) from (select b from t order by substr(b, 3) limit 39999)').fetchone()
except sqlite3.OperationalError as e:
    print('plain:', e)
with engine.begin() as tx:
    tx.exec_driver_sql('create table t (a integer primary key, b text unique)')
    tx.exec_driver_sql('insert into t values (:a, :b)', rows)
    print('sorted', tx.exec_driver_sql('select count(*) from (select b from t order by substr(b, 3) limit 39999)').scalar_one())
    print('changed', tx.exec_driver_sql("update t set b = b || 'x'").rowcount)
"""


def test_a_confined_ca_makes_large_changes(tmp_path: Path) -> None:
    """SQLite's temporary files have no place once the process is confined; thousands of rows need one."""
    done = subprocess.run([sys.executable, "-c", SPILLS, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["sorted 39999", "changed 40000"]
    confined = int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)) >= 1
    assert not confined or lines[0] == "plain: unable to open database file", "positive control"
