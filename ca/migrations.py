"""From one schema version to the next, and one step back, each in one transaction.

A runner of our own: there is one line of versions, every step is a function that both engines run, a step back has to
keep rows that the older program does not know, and an SQLite database is copied first. What Alembic would add (branches,
templates, a second version table, generated scripts) would be the larger part.

    1 -> 2   the audit chain becomes the ledger (leaves of the transparency log); entries, admins, processes
    2 -> 1   the audit chain is made again from the ledger; what only version 2 knows stays where it is, unused, and
             is taken up again by the next step forward
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Table, inspect, select, text
from sqlalchemy.schema import CreateColumn, CreateIndex

from ca import schema, transparency
from ca.schema import SCHEMA_VERSION, meta
from ca.store import Store
from identity.errors import BadInput, BadState
from identity.transparency import record_leaf

NEW_COLUMNS_2: Final = (
    ("instances", "mover"), ("instances", "ends_at"), ("instances", "ends_with"), ("endpoints", "entries"),
    ("endpoints", "entries_generation"), ("endpoints", "draining"), ("policies", "kind"), ("policies", "trial"),
)  # fmt: skip
NEW_TABLES_2: Final = (
    "ledger", "ledger_nodes", "ledger_heads", "processes", "readiness", "entries", "admins", "approvals",
    "policy_authority", "rollouts", "flow_edges", "flow_denials",
    "credentials", "blocks", "federations", "orchestrated", "orchestrator_events",
)  # fmt: skip

_AUDIT_1: Final = """
    CREATE TABLE audit (seq INTEGER NOT NULL, at BIGINT NOT NULL, actor VARCHAR(255) NOT NULL, action VARCHAR(64) NOT NULL,
        subject VARCHAR(320) NOT NULL, outcome VARCHAR(64) NOT NULL, detail TEXT NOT NULL, prev VARCHAR(64) NOT NULL,
        hash VARCHAR(64) NOT NULL, PRIMARY KEY (seq), UNIQUE (hash))
"""
_GENESIS: Final = "0" * 64
_INSERT_1: Final = text(
    "INSERT INTO audit (seq, at, actor, action, subject, outcome, detail, prev, hash) "
    "VALUES (:seq, :at, :actor, :action, :subject, :outcome, :detail, :prev, :hash)"
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: from a version to a neighbour; `what` says it to people."""

    source: int
    target: int
    what: str
    run: Callable[[Connection], None]


def plan(version: int, target: int) -> list[Step]:
    """The steps from one version to another. Raises BadInput ``store.migration`` when there is no way."""
    steps: list[Step] = []
    while version != target:
        step = next((s for s in _STEPS if s.source == version and (s.target > version) == (target > version)), None)
        if step is None:
            raise BadInput(
                "store.migration", f"there is no way from schema version {version} to {target}",
                hint=f"this program knows the versions 1 to {SCHEMA_VERSION}",
            )  # fmt: skip
        steps.append(step)
        version = step.target
    return steps


def version_of(where: Path | str) -> int:
    """The schema version of an SQLite file or a PostgreSQL address. Raises BadState, Unreachable."""
    for version in range(1, SCHEMA_VERSION + 1):
        try:
            store = Store.open(where, version=version) if isinstance(where, Path) else Store.open_shared(where, version=version)
        except BadState as e:
            if e.code != "store.version" or version == SCHEMA_VERSION:
                raise
        else:
            store.close()
            return version
    raise BadState("store.version", "the database has no schema version that this program knows")


def copy_aside(path: Path, version: int) -> Path:
    """A copy of the database file, 0600 and synced, beside it. Raises BadState."""
    target = path.with_name(f"{path.name}.v{version}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE").close()
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except (OSError, sqlite3.Error) as e:
        target.unlink(missing_ok=True)
        raise BadState("store.copy", f"cannot copy the database first: {e}", hint="free space; nothing was changed") from None
    return target


def migrate(store: Store, target: int) -> list[Step]:
    """Run every step in one transaction. Raises BadInput, BadState; then nothing has changed."""
    with store.write() as tx:
        version = int(Store.get(tx, "schema_version") or 0)
        steps = plan(version, target)
        for step in steps:
            step.run(tx)
            Store.put(tx, "schema_version", str(step.target))
        return steps


# ---- 1 -> 2


def _forward_2(tx: Connection) -> None:
    if tx.dialect.name != "sqlite":
        raise BadState("store.migration", "version 1 was for SQLite only")
    present = set(inspect(tx).get_table_names())
    for name in NEW_TABLES_2:
        if name not in present:
            schema.metadata.tables[name].create(tx)
    for table, column in NEW_COLUMNS_2:
        _add_column(tx, schema.metadata.tables[table], column)
    for statement in schema.triggers("sqlite", [t for t in schema.APPEND_ONLY if t in NEW_TABLES_2 and t not in present]):
        tx.exec_driver_sql(statement)
    _take_audit(tx)
    _take_records(tx)


def _add_column(tx: Connection, table: Table, name: str) -> None:
    if name in {c["name"] for c in inspect(tx).get_columns(table.name)}:
        return
    tx.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {CreateColumn(table.c[name]).compile(tx.engine)}"))
    for index in table.indexes:
        if name in {c.name for c in index.columns}:
            tx.execute(CreateIndex(index))


def _take_audit(tx: Connection) -> None:
    """Every row of the chain that is not in the ledger yet becomes an entry of it; the chain is checked on the way."""
    known = int(Store.get(tx, "audit_taken") or 0)
    prev = _GENESIS
    for found in tx.execute(text("SELECT * FROM audit ORDER BY seq")).mappings().all():
        row = dict(found)
        if row["prev"] != prev or _chained(row) != row["hash"]:
            raise BadState(
                "audit.broken", f"the audit trail does not hold at row {row['seq']}",
                hint="compare with a backup; a broken trail is not carried into a newer version",
            )  # fmt: skip
        prev = row["hash"]
        if row["seq"] > known:
            transparency.record_act(
                tx, row["at"], row["actor"], row["action"], row["subject"], row["outcome"], row["detail"]
            )
    tx.exec_driver_sql("DROP TABLE audit")
    tx.execute(meta.delete().where(meta.c.key.in_(("audit_head", "audit_taken"))))


def _take_records(tx: Connection) -> None:
    """What is in force now, so that an endpoint that asks finds it in the log."""
    now = int(time.time())
    known = set(tx.execute(select(schema.ledger.c.hash)).scalars())

    def publish(kind: str, subject: str, envelope: str | None) -> None:
        if envelope is not None and record_leaf(envelope).hex() not in known:
            transparency.record(tx, now, kind, subject, envelope)

    publish("bundle", "bundle", Store.get(tx, "bundle"))
    c = schema.policies.c
    for revision, envelope in tx.execute(select(c.revision, c.record).order_by(c.revision)):
        publish("policy", f"revision {revision}", envelope)
    e = schema.endpoints.c
    for name, envelope in tx.execute(select(e.name, e.record).order_by(e.name)):
        publish("endpoint", name, envelope)
    i = schema.instances.c
    for name, number, placement, prepare in tx.execute(select(i.name, i.instance, i.placement, i.prepare)):
        publish("placement", f"{name}/{number}", placement)
        publish("placement", f"{name}/{number}", prepare)
    certificates = select(schema.ledger.c.detail).where(schema.ledger.c.kind == "certificate")
    logged = {json.loads(d)["serial"] for d in tx.execute(certificates).scalars()}
    for row in tx.execute(select(schema.serials).order_by(schema.serials.c.issued)).mappings().all():
        if row["serial"] not in logged:
            about = {k: row[k] for k in ("issuer", "serial", "profile", "spiffe_id", "spki", "not_after")}
            transparency.record_certificate(tx, row["issued"], row["endpoint"], about)


# ---- 2 -> 1


def _back_1(tx: Connection) -> None:
    if tx.dialect.name != "sqlite":
        raise BadState("store.migration", "version 1 knows SQLite only", hint="stay at version 2")
    tx.exec_driver_sql(_AUDIT_1)
    prev, seq = _GENESIS, 0
    acts = select(schema.ledger).where(schema.ledger.c.kind == transparency.ACT).order_by(schema.ledger.c.seq)
    for seq, found in enumerate(tx.execute(acts).mappings().all(), 1):
        row: dict[str, Any] = {k: found[k] for k in ("at", "actor", "action", "subject", "outcome", "detail")}
        row |= {"seq": seq, "prev": prev}
        prev = row["hash"] = _chained(row)
        tx.execute(_INSERT_1, row)
    for statement in schema.triggers("sqlite", ["audit"]):
        tx.exec_driver_sql(statement)
    Store.put(tx, "audit_head", prev)
    Store.put(tx, "audit_taken", str(seq))


def _chained(row: dict[str, Any]) -> str:
    """Version 1: SHA-256 over the row and the hash before it."""
    parts = [row[k] for k in ("prev", "seq", "at", "actor", "action", "subject", "outcome", "detail")]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


_STEPS: Final = (
    Step(1, 2, "the audit trail becomes the transparency log; entries, administrators, several processes", _forward_2),
    Step(2, 1, "the audit trail is made again from the log; what only version 2 knows stays, unused", _back_1),
)
