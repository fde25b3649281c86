from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import inspect

from ca import audit, schema, transparency
from ca.migrations import migrate, plan
from ca.store import Store
from ca.transparency import Log
from identity.errors import BadInput, BadState

# What version 1 wrote, word for word; a few columns that no step touches are left as they were.
VERSION_1 = """
    CREATE TABLE meta (key VARCHAR(32) NOT NULL, value TEXT NOT NULL, PRIMARY KEY (key));
    CREATE TABLE changes (revision INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, at BIGINT NOT NULL,
        kind VARCHAR(16) NOT NULL, key VARCHAR(320) NOT NULL);
    CREATE TABLE endpoints (name VARCHAR(63) NOT NULL, kind VARCHAR(8) NOT NULL, spiffe_id VARCHAR(2048) NOT NULL,
        workload VARCHAR(255), parent VARCHAR(63), tunnel_key VARCHAR(64) NOT NULL, enroll_key VARCHAR(64) NOT NULL,
        underlay TEXT NOT NULL, ciphers TEXT NOT NULL, generation BIGINT NOT NULL, state VARCHAR(8) NOT NULL,
        enrolled BIGINT NOT NULL, svid_expires BIGINT NOT NULL, record TEXT, PRIMARY KEY (name),
        CONSTRAINT endpoint_state CHECK (state in ('pending', 'enrolled', 'revoked')),
        CONSTRAINT endpoint_kind CHECK (kind in ('host', 'sidecar')), UNIQUE (spiffe_id),
        FOREIGN KEY(parent) REFERENCES endpoints (name));
    CREATE UNIQUE INDEX endpoint_tunnel_key ON endpoints (tunnel_key) WHERE state != 'revoked';
    CREATE TABLE tokens (id VARCHAR(64) NOT NULL, public_key VARCHAR(64) NOT NULL, endpoint VARCHAR(63) NOT NULL,
        kind VARCHAR(8) NOT NULL, workload VARCHAR(255), asked_by VARCHAR(63), replace BOOLEAN NOT NULL,
        created BIGINT NOT NULL, expires BIGINT NOT NULL, used_at BIGINT, enroll_key VARCHAR(64), PRIMARY KEY (id),
        FOREIGN KEY(asked_by) REFERENCES endpoints (name));
    CREATE TABLE serials (serial VARCHAR(40) NOT NULL, issuer VARCHAR(64) NOT NULL, profile VARCHAR(16) NOT NULL,
        spiffe_id VARCHAR(2048) NOT NULL, spki VARCHAR(64) NOT NULL, endpoint VARCHAR(63), issued BIGINT NOT NULL,
        not_after BIGINT NOT NULL, revoked_at BIGINT, PRIMARY KEY (serial),
        FOREIGN KEY(endpoint) REFERENCES endpoints (name));
    CREATE INDEX serial_endpoint ON serials (endpoint);
    CREATE TABLE instances (name VARCHAR(255) NOT NULL, instance BIGINT NOT NULL, spiffe_id VARCHAR(2048) NOT NULL,
        labels TEXT NOT NULL, fence VARCHAR(16) NOT NULL, overlay BIGINT NOT NULL, state VARCHAR(16) NOT NULL,
        endpoint VARCHAR(63), epoch BIGINT NOT NULL, epoch_top BIGINT NOT NULL, target VARCHAR(63), target_epoch BIGINT,
        placement TEXT, prepare TEXT, created BIGINT NOT NULL, PRIMARY KEY (name, instance),
        CONSTRAINT instance_state CHECK (state in ('unplaced', 'active', 'moving', 'revoked')),
        CONSTRAINT instance_prepare CHECK ((target is null) = (prepare is null)), UNIQUE (overlay),
        FOREIGN KEY(endpoint) REFERENCES endpoints (name), FOREIGN KEY(target) REFERENCES endpoints (name));
    CREATE INDEX instance_endpoint ON instances (endpoint);
    CREATE TABLE holdings (endpoint VARCHAR(63) NOT NULL, name VARCHAR(255) NOT NULL, instance BIGINT NOT NULL,
        PRIMARY KEY (endpoint, name, instance), FOREIGN KEY(endpoint) REFERENCES endpoints (name));
    CREATE INDEX holding_instance ON holdings (name, instance);
    CREATE TABLE policies (revision BIGINT NOT NULL, digest VARCHAR(64) NOT NULL, files TEXT NOT NULL,
        author VARCHAR(255) NOT NULL, issued BIGINT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (revision));
    CREATE TABLE audit (seq INTEGER NOT NULL, at BIGINT NOT NULL, actor VARCHAR(255) NOT NULL,
        action VARCHAR(64) NOT NULL, subject VARCHAR(320) NOT NULL, outcome VARCHAR(64) NOT NULL, detail TEXT NOT NULL,
        prev VARCHAR(64) NOT NULL, hash VARCHAR(64) NOT NULL, PRIMARY KEY (seq), UNIQUE (hash));
    CREATE TRIGGER audit_no_update BEFORE update ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END;
    CREATE TRIGGER audit_no_delete BEFORE delete ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END;
    CREATE TRIGGER changes_no_update BEFORE update ON changes BEGIN SELECT RAISE(ABORT, 'changes is append-only'); END;
    CREATE TRIGGER changes_no_delete BEFORE delete ON changes BEGIN SELECT RAISE(ABORT, 'changes is append-only'); END;
"""


class Version1:
    """What the program of version 1 does to its database: its audit chain and its statements."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path)

    def append(self, db: sqlite3.Connection, action: str, subject: str, **detail: object) -> None:
        last = db.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
        seq, prev = (last[0] + 1, last[1]) if last else (1, "0" * 64)
        said = json.dumps(detail, sort_keys=True, separators=(",", ":"))
        parts = [prev, seq, 100 + seq, "admin:root", action, subject, "ok", said]
        digest = hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()
        db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*(parts[1:]), prev, digest))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('audit_head', ?)", (digest,))

    def verify(self, db: sqlite3.Connection) -> int:
        """Walk the chain as version 1 does at `audit verify`."""
        seq, prev = 0, "0" * 64
        for row in db.execute("SELECT prev, seq, at, actor, action, subject, outcome, detail, hash FROM audit ORDER BY seq"):
            assert (row[0], row[1]) == (prev, seq + 1)
            prev, seq = hashlib.sha256(json.dumps(list(row[:8]), separators=(",", ":")).encode()).hexdigest(), row[1]
            assert prev == row[8]
        assert db.execute("SELECT value FROM meta WHERE key = 'audit_head'").fetchone() == (prev,)
        return seq

    def work(self, tag: str) -> None:
        """Enrol a host and place a workload, with version 1's columns."""
        with closing(self.connect()) as db, db:
            db.execute("PRAGMA foreign_keys=ON")
            assert db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() == ("1",)
            db.execute(
                "INSERT INTO endpoints (name, kind, spiffe_id, tunnel_key, enroll_key, underlay, ciphers, generation, state,"
                " enrolled, svid_expires, record) VALUES (?, 'host', ?, ?, 'e', '[]', '[]', 1, 'enrolled', 1, 2, ?)",
                (tag, f"spiffe://reg.test/host/{tag}", tag, f"endpoint record of {tag}"),
            )
            db.execute(
                "INSERT INTO instances (name, instance, spiffe_id, labels, fence, overlay, state, endpoint, epoch, epoch_top,"
                " placement, created) VALUES (?, 0, ?, '{}', 'available', ?, 'active', ?, 1, 1, ?, 1)",
                (f"w/{tag}", f"spiffe://reg.test/w/{tag}", ord(tag[-1]), tag, f"placement of {tag}"),
            )
            db.execute(
                "INSERT INTO serials VALUES (?, 'i', 'endpoint', ?, 'k', ?, 1, 2, NULL)", (f"5e{ord(tag[-1]):x}", tag, tag)
            )
            db.execute("INSERT INTO changes (at, kind, key) VALUES (1, 'endpoint', ?)", (tag,))
            self.append(db, "enroll.finish", tag, generation=1)
            self.append(db, "workload.add", f"w/{tag}/0", host=tag)


@pytest.fixture
def old(tmp_path: Path) -> Version1:
    path = tmp_path / "ca.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
        rows = {"schema_version": "1", "timeline": "t", "trust_domain": "reg.test", "overlay_next": "1", "bundle": "the bundle"}
        db.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())
        db.commit()
    path.chmod(0o600)
    made = Version1(path)
    made.work("a")
    return made


def step(path: Path, source: int, target: int) -> None:
    store = Store.open(path, version=source)
    migrate(store, target)
    store.settle()


def shape(store: Store) -> dict[str, set[tuple[str, str, bool]]]:
    found = inspect(store.engine)
    return {
        table: {(c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(table)}
        | {(str(i["name"]), ",".join(map(str, i["column_names"])), bool(i["unique"])) for i in found.get_indexes(table)}
        for table in found.get_table_names()
        if not table.startswith("sqlite_")
    }


def kinds(store: Store) -> list[tuple[str, str]]:
    with store.read() as tx:
        return [(e.kind, e.subject) for e in transparency.entries(tx)]


def test_a_database_of_the_version_before_is_refused_with_the_way_out(old: Version1) -> None:
    with pytest.raises(BadState) as e:
        Store.open(old.path)
    assert e.value.code == "store.version"
    assert "retinue-ca migrate" in e.value.hint


def test_forward_gives_what_a_new_database_has_and_keeps_every_row(old: Version1, tmp_path: Path) -> None:
    step(old.path, 1, 2)
    store, fresh = Store.open(old.path), Store.create(tmp_path / "new.db", "reg.test")
    assert shape(store) == shape(fresh)
    assert kinds(store) == [
        ("act", "a"), ("act", "w/a/0"), ("bundle", "bundle"), ("endpoint", "a"), ("placement", "w/a/0"), ("certificate", "a"),
    ]  # fmt: skip
    with store.write() as tx:
        head = Log().seal(tx, 1, "t")
        assert Log().verify(tx) == head
        assert [r.name for r in tx.execute(schema.instances.select())] == ["w/a"]
    with pytest.raises(Exception, match="append-only"), store.write() as tx:
        tx.execute(schema.ledger.delete())
    store.close()
    fresh.close()


def test_one_step_back_the_old_program_goes_on_and_forward_again_nothing_is_lost(old: Version1) -> None:
    step(old.path, 1, 2)
    store = Store.open(old.path)
    with store.write() as tx:
        audit.append(tx, 500, "admin:root", "new", "thing", word="ä%")
        before = Log().seal(tx, 1, "t")
    store.settle()
    step(old.path, 2, 1)
    with closing(old.connect()) as db:
        assert old.verify(db) == 3
    old.work("b")
    with closing(old.connect()) as db:
        assert old.verify(db) == 5
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    step(old.path, 1, 2)
    store = Store.open(old.path)
    seen = kinds(store)
    assert sorted(seen) == sorted(set(seen))  # nothing twice
    assert {("act", "b"), ("placement", "w/b/0"), ("placement", "w/a/0"), ("act", "thing")} <= set(seen)
    with store.write() as tx:
        log = Log()
        after = log.seal(tx, 2, "t")
        assert after.size > before.size
        assert log.verify(tx, before) == after  # the tree goes on where it was
    store.close()


def test_a_broken_chain_is_not_carried_over(old: Version1) -> None:
    with closing(old.connect()) as db:
        db.execute("DROP TRIGGER audit_no_update")
        db.execute("UPDATE audit SET actor = 'x' WHERE seq = 1")
        db.commit()
    with pytest.raises(BadState) as e:
        step(old.path, 1, 2)
    assert e.value.code == "audit.broken"
    assert Store.open(old.path, version=1) is not None  # nothing has changed


@pytest.mark.parametrize("target", [0, 3, 99])
def test_there_is_no_way_to_other_versions(target: int) -> None:
    with pytest.raises(BadInput):
        plan(2, target)


def test_the_new_engine_has_no_way_back(tmp_path: Path, postgres) -> None:
    store = Store.create_shared(postgres.database(), "reg.test")
    with pytest.raises(BadState):
        migrate(store, 1)
    with store.read() as tx:
        assert Store.get(tx, "schema_version") == "2"
    store.close()
