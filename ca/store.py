"""The store: the schema of ca/schema.py through SQLAlchemy Core, SQLite (WAL,
synchronous=FULL) as the embedded engine, PostgreSQL (ca/postgres.py) for more than one process.

Rules kept here:
    every change of what endpoints may be sent is a row of `changes`, written in the same transaction; a position is
    (timeline, revision); nothing is acknowledged before its transaction committed; a failed disk write is final until
    the process starts again (a later fsync that succeeds proves nothing about the earlier one).
There is one writer at a time on both engines: SQLite's own lock, PostgreSQL's advisory lock (ca/schema.py), which is held
until the commit is visible. So revision order is commit order, and a reader that saw revision N saw all before it. What
needs no order (serials before a signature, sightings) is written beside the writers, by `record`.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn
from uuid import uuid4

from sqlalchemy import Connection, Engine, bindparam, create_engine, event, func, insert, select, update
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, OperationalError

from ca import postgres
from ca.schema import SCHEMA_VERSION, WRITER_LOCK, changes, meta, metadata, triggers
from identity.errors import BadInput, BadState, Conflict, RetinueError, Unreachable

BUSY_MS: Final = 5000  # how long one writer waits for another process
_BROKEN: Final = frozenset({"store.failed", "store.damaged"})  # after these nothing more is written

# What every request runs is built once.
_INSERT_CHANGE: Final = insert(changes)
_REVISION: Final = select(func.coalesce(func.max(changes.c.revision), 0))
_CHANGES_AFTER: Final = (
    select(changes.c.revision, changes.c.kind, changes.c.key)
    .where(changes.c.revision > bindparam("after"))
    .order_by(changes.c.revision)
)
_VALUE: Final = select(meta.c.value).where(meta.c.key == bindparam("name"))


@dataclass(frozen=True, slots=True)
class Change:
    """One row of the change log."""

    revision: int
    kind: str
    key: str


class Store:
    """A database of one trust domain. Methods block; call them from one worker thread, not from an event loop."""

    def __init__(self, engine: Engine, timeline: str, trust_domain: str) -> None:
        self.engine = engine
        self.timeline = timeline
        self.trust_domain = trust_domain
        self._failed = False

    @property
    def shared(self) -> bool:
        """May other processes write to it? Then what is known here may be old without any sign of it."""
        return self.engine.dialect.name == "postgresql"

    @classmethod
    def create(cls, path: Path, trust_domain: str) -> Store:
        """Make a new database, mode 0600. Raises BadInput when one is there."""
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except FileExistsError:
            raise BadInput("ca.exists", f"{path} exists already", hint="choose an empty directory") from None
        engine = _engine(path)
        with _translated(), engine.begin() as tx:
            timeline = _make(tx, trust_domain)
        return cls(engine, timeline, trust_domain)

    @classmethod
    def create_shared(cls, url: str, trust_domain: str) -> Store:
        """Make the tables in an empty PostgreSQL database. Raises Conflict ``ca.exists``, Unreachable, BadState."""
        engine = postgres.engine(url)
        try:
            with _translated(), engine.begin() as tx:
                postgres.check_server(tx)
                tx.execute(select(func.pg_advisory_xact_lock(WRITER_LOCK)))
                if postgres.tables(tx) & set(metadata.tables):
                    raise Conflict(
                        "ca.exists", "that database holds a control plane already",
                        hint="use an empty database; for a further process copy the first one's directory",
                    )  # fmt: skip
                timeline = _make(tx, trust_domain)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, timeline, trust_domain)

    @classmethod
    def open_shared(cls, url: str, *, version: int = SCHEMA_VERSION) -> Store:
        """Open and check a PostgreSQL database. Raises Unreachable ``store.unreachable``, BadState."""
        engine = postgres.engine(url)
        try:
            with _translated(), engine.begin() as tx:
                postgres.check_server(tx)
                present = postgres.tables(tx)
                if "meta" not in present:
                    raise BadState("store.missing", "that database holds no control plane",
                                   hint="make one with: retinue-ca init --store-file FILE --trust-domain NAME")  # fmt: skip
                found = dict(tx.execute(select(meta.c.key, meta.c.value)).all())
                _check_version(int(found["schema_version"]), version, "the database")
                if version == SCHEMA_VERSION and set(metadata.tables) - present:
                    raise BadState("store.damaged", "the database lacks tables", hint="restore it from a backup")
            return cls(engine, found["timeline"], found["trust_domain"])
        except (KeyError, ValueError):
            engine.dispose()
            raise BadState("store.damaged", "the database does not say what it is", hint="restore it") from None
        except BaseException:
            engine.dispose()
            raise

    @classmethod
    def open(cls, path: Path, *, version: int = SCHEMA_VERSION) -> Store:
        """Open and check a database. Raises BadState when it is missing, unsafe, damaged or of another version.

        version: the one it has to have; another than SCHEMA_VERSION only for the sake of a migration.
        """
        try:
            info = os.lstat(path)
        except OSError:
            raise BadState(
                "store.missing",
                f"no database at {path}",
                hint="make one with: retinue-ca init --dir DIR --trust-domain NAME",
            ) from None
        if not stat.S_ISREG(info.st_mode):
            raise BadState(
                "store.file", f"{path} is not a regular file", hint="put the database itself there"
            )
        if stat.S_IMODE(info.st_mode) & 0o077:
            raise BadState("store.mode", f"{path} can be read by others", hint=f"chmod 600 {path}")
        if info.st_size == 0:
            raise BadState("store.damaged", f"{path} is empty", hint="restore it from a backup")
        engine = _engine(path)
        try:
            with engine.connect().execution_options(reads=True) as tx:
                found = dict(tx.execute(select(meta.c.key, meta.c.value)).all())
                _check_version(int(found["schema_version"]), version, str(path))
                verdict = tx.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
                tables = set(metadata.tables) if version == SCHEMA_VERSION else {"meta", "changes", "audit"}
                missing = tables - set(
                    tx.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars()
                )
                dangling = tx.exec_driver_sql("PRAGMA foreign_key_check").first()
            if verdict != "ok" or missing or dangling is not None:
                raise BadState(
                    "store.damaged", f"{path} does not pass its check", hint="restore it from a backup"
                )
            return cls(engine, found["timeline"], found["trust_domain"])
        except (DBAPIError, KeyError, ValueError, UnicodeDecodeError):
            engine.dispose()
            raise BadState(
                "store.damaged", f"{path} is not a readable Retinue database", hint="restore it from a backup"
            ) from None
        except RetinueError:
            engine.dispose()
            raise

    def fail(self, why: str) -> BadState:
        """No write is accepted from now on. Returns the error to raise."""
        self._failed = True
        return BadState("store.failed", why, hint="check the disk, then start retinue-ca again")

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One write transaction, alone among writers. Commits at the end, rolls back on any exception."""
        with self.record() as tx:
            if self.shared:
                tx.execute(select(func.pg_advisory_xact_lock(WRITER_LOCK)))
            yield tx

    @contextmanager
    def record(self) -> Iterator[Connection]:
        """One transaction that may run beside a writer (not on SQLite): for rows that nothing else depends on."""
        if self._failed:
            raise BadState(
                "store.failed",
                "the database failed to write earlier; nothing more is accepted",
                hint="check the disk, then start retinue-ca again",
            )
        try:
            with _translated(), self.engine.begin() as tx:
                yield tx
        except BadState as e:
            self._failed = self._failed or (e.code in _BROKEN and not self.shared)
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One read transaction: a consistent view that never waits for a writer."""
        with _translated(), self.engine.connect() as connection:
            yield connection.execution_options(**(postgres.READS if self.shared else {"reads": True}))

    def close(self) -> None:
        self.engine.dispose()

    def settle(self) -> None:
        """Fold the write-ahead log into the file and close, so that the file alone is the database (SQLite)."""
        if self.shared:
            self.close()
            return
        with self.engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        self.close()

    # ---- the change log

    @staticmethod
    def log(tx: Connection, now: int, kind: str, key: str) -> int:
        """Append one change inside the caller's transaction and return its revision."""
        result = tx.execute(_INSERT_CHANGE, {"at": now, "kind": kind, "key": key})
        assert result.inserted_primary_key is not None
        return int(result.inserted_primary_key[0])

    @staticmethod
    def revision(tx: Connection) -> int:
        """Newest committed (or own) revision; 0 before the first change."""
        return int(tx.execute(_REVISION).scalar_one())

    @staticmethod
    def changes_after(tx: Connection, revision: int) -> Sequence[Change]:
        """Changes after a revision, in commit order."""
        rows = tx.execute(_CHANGES_AFTER, {"after": revision})
        return [Change(*row) for row in rows]

    # ---- small values

    @staticmethod
    def get(tx: Connection, key: str) -> str | None:
        """A value of `meta`, or None."""
        value: str | None = tx.execute(_VALUE, {"name": key}).scalar_one_or_none()
        return value

    @staticmethod
    def put(tx: Connection, key: str, value: str) -> None:
        """Set a value of `meta`."""
        if not tx.execute(update(meta).where(meta.c.key == key).values(value=value)).rowcount:
            tx.execute(insert(meta).values(key=key, value=value))

    def floor(self, tx: Connection) -> int:
        """Epochs and generations begin above this: lower ones may have been given out on an earlier timeline."""
        return int(self.get(tx, "floor") or 0)

    def take_number(self, tx: Connection, key: str) -> int:
        """The next number of a counter that only grows."""
        number = int(self.get(tx, key) or 1)
        self.put(tx, key, str(number + 1))
        return number


def _make(tx: Connection, trust_domain: str) -> str:
    """All tables, triggers and first values. Returns the new timeline."""
    metadata.create_all(tx)
    for statement in triggers(tx.dialect.name):
        tx.exec_driver_sql(statement)
    timeline = str(uuid4())
    rows = {
        "schema_version": SCHEMA_VERSION,
        "timeline": timeline,
        "trust_domain": trust_domain,
        "overlay_next": 1,
    }
    tx.execute(insert(meta), [{"key": k, "value": str(v)} for k, v in rows.items()])
    return timeline


def _check_version(found: int, wanted: int, where: str) -> None:
    if found == wanted:
        return
    if found > wanted:
        hint = "run the newer retinue-ca that wrote it, or let that one go back: retinue-ca migrate --to VERSION"
    else:
        hint = "stop every retinue-ca on it, then: retinue-ca migrate" if found > 0 else "restore it from a backup"
    raise BadState(
        "store.version", f"{where} has schema version {found}; this program knows {wanted}", hint=hint
    )


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_MS / 1000})

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        # temp_store: a confined CA can write nowhere else, and SQLite chose its place for such files when it was loaded
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF", "temp_store=MEMORY"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


@contextmanager
def _translated() -> Iterator[None]:
    """Engine errors as the error tree says them: busy and full may be tried again, a failing disk may not."""
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as e:
        if (error := postgres.translated(e)) is not None:
            raise error from None
        _raise_sqlite(e)


def _raise_sqlite(e: DBAPIError) -> NoReturn:
    if isinstance(e, OperationalError):
        text = str(e.orig)
        if "locked" in text or "busy" in text:
            raise Unreachable("store.busy", "the database is busy", hint="try again") from None
        if "full" in text:
            raise Unreachable(
                "store.full",
                "the disk of the database is full: nothing was changed",
                hint="free space and try again",
            ) from None
        raise BadState(
            "store.failed",
            f"the database cannot be used: {text}",
            hint="check the disk, then start retinue-ca again",
        ) from None
    if isinstance(e, DatabaseError):
        raise BadState(
            "store.damaged", f"the database is damaged: {e.orig}", hint="restore it from a backup"
        ) from None
    raise e


def any_of(values: Sequence[str], wanted: str, *, limit: int = 3) -> str:
    """A hint with the known names closest to a mistyped one; empty when none is close."""
    import difflib

    close = difflib.get_close_matches(wanted, values, n=limit, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""
