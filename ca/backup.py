"""Backup while the server runs, and restore onto a new timeline.

A backup is one SQLite file: the whole registry with its public records, no private key. The authority's own files
(``*.key``, ``*.pem``, authority.json) are the operator's to copy, once and after every renewal.

A restored database has forgotten what was acknowledged after the backup. So that nothing is given out twice, it goes on
as a new timeline on which every counter (epochs, generations, policy revision, bundle sequence, addresses) begins above
whatever may have been given out, and everything it holds is signed anew there: endpoints then end on the restored state,
which they would otherwise refuse as a step back.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast
from uuid import uuid4

from sqlalchemy import Connection, select, update

from ca import audit, postgres, processes, rows, schema, transparency
from ca.directory import DATABASE, NOBODY
from ca.highwater import FILE as HIGHWATER
from ca.highwater import HighWater, Mark
from ca.plane import Plane
from ca.policies import newest
from ca.store import Store
from identity.certs import BACKDATE
from identity.errors import BadInput, BadState, Conflict, NoPrivilege, RetinueError
from policy.language import digest

UNKNOWN: Final = 1 << 32  # how far counters jump when nobody knows what was given out
ADDRESSES: Final = 1 << 16  # the same for overlay addresses and sidecar names, of which there are fewer
NO_POLICY: Final = [("none.yaml", "meshpolicy: 1\n")]


@dataclass(frozen=True, slots=True)
class BackedUp:
    """What a backup holds."""

    file: str
    trust_domain: str
    timeline: str
    revision: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What is in force after a restore. `lost`: acknowledged changes that are missing, None when nobody can know.

    The lists compare with the database that was replaced, as far as it can still be read (`compared`): what was revoked
    since the backup and is not any more, and what was added since and is gone.
    """

    trust_domain: str
    timeline: str
    revision: int
    lost: int | None
    replaced: str | None
    compared: bool
    revoked_hosts: list[str] = field(default_factory=list)
    revoked_instances: list[str] = field(default_factory=list)
    gone_hosts: list[str] = field(default_factory=list)
    gone_instances: list[str] = field(default_factory=list)


def backup(directory: Path, target: Path, now: int) -> BackedUp:
    """Copy the registry to a new file, 0600, whole and synced before it has its name. The server may be running.

    Raises Conflict ``backup.exists``, BadInput ``backup.file``, and what `Store.open` raises.
    """
    if os.path.lexists(target):
        raise Conflict("backup.exists", f"{target} exists already", hint="choose another file name")
    if postgres.address_of(directory) is not None:
        raise BadState(
            "backup.engine", "the registry is in PostgreSQL",
            hint="back it up with its own tools (pg_dump, pgbackrest); after putting one back: retinue-ca restore --in-place --new-timeline",
        )  # fmt: skip
    source = Store.open(directory / DATABASE)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        with source.engine.connect() as connection:
            _copy(cast("sqlite3.Connection", connection.connection.dbapi_connection), temporary)
        with closing(sqlite3.connect(temporary)) as copy:
            copy.execute("insert or replace into meta (key, value) values ('backup_at', ?)", (str(now),))
            copy.commit()
            (revision,) = copy.execute("select coalesce(max(revision), 0) from changes").fetchone()
        _sync(temporary)
        os.link(temporary, target)  # unlike a rename, never over another file
        _sync(target.parent)
        return BackedUp(str(target), source.trust_domain, source.timeline, revision, target.stat().st_size)
    except FileExistsError:
        raise Conflict("backup.exists", f"{target} exists already", hint="choose another file name") from None
    except OSError as e:
        raise BadInput("backup.file", f"cannot write {target}: {e.strerror}", hint="choose another place") from None
    except sqlite3.Error as e:
        raise BadInput("backup.file", f"cannot write {target}: {e}", hint="see that its disk has room") from None
    finally:
        source.close()
        temporary.unlink(missing_ok=True)


def restore(directory: Path, source: Path, now: int, *, new_timeline: bool) -> Restored:
    """Put a backup in the place of the database. The caller holds the directory's lock; the old database is kept beside.

    Raises Conflict ``restore.timeline`` when something acknowledged would be missing and no new timeline is asked for;
    BadState for an unusable backup or a directory without the authority's files. Then nothing has changed.
    """
    if not (directory / "authority.json").exists():
        raise BadState(
            "ca.missing", f"{directory} does not hold the authority's files",
            hint="first put back the *.key, *.pem and authority.json of this CA",
        )  # fmt: skip
    water = HighWater(directory / HIGHWATER)
    temporary = directory / f".restore-{os.urandom(4).hex()}"
    try:
        _fetch(source, temporary)
        database = Store.open(temporary)
        try:
            lost = _lost(database, water.mark)
            missing = _Missing() if lost == 0 else _compare(directory / DATABASE, database)
            if lost != 0 and not new_timeline:
                what = "what was acknowledged after it" if lost is None else f"{lost} acknowledged changes"
                raise Conflict(
                    "restore.timeline", f"{source} may lack {what}",
                    hint="to give them up and go on from there, add --new-timeline",
                )  # fmt: skip
            plane = Plane.over(directory, database, lambda: float(now))
            if new_timeline:
                _begin(plane, water.mark, lost, now)
            with database.write() as tx:
                tx.execute(schema.meta.delete().where(schema.meta.c.key == "backup_at"))
                revision = database.revision(tx)
                timeline = database.get(tx, "timeline") or ""
        finally:
            database.settle()
        _sync(temporary)
        replaced = _aside(directory)
        os.rename(temporary, directory / DATABASE)
        _sync(directory)
    except OSError as e:
        raise BadState("ca.dir", f"cannot write in {directory}: {e.strerror}", hint="free space and try again") from None
    finally:
        for rest in ("", "-wal", "-shm"):
            temporary.with_name(temporary.name + rest).unlink(missing_ok=True)
        water.close()
    return Restored(
        database.trust_domain, timeline, revision, lost, replaced, missing.compared,
        missing.revoked_hosts, missing.revoked_instances, missing.gone_hosts, missing.gone_instances,
    )  # fmt: skip


def continue_in_place(directory: Path, now: int) -> Restored:
    """Begin a new timeline on a PostgreSQL database that was put back with its own tools. No process may run on it.

    Raises BadState ``backup.engine`` for SQLite, ``store.in_use``.
    """
    address = postgres.address_of(directory)
    if address is None:
        raise BadState("backup.engine", "the registry is in SQLite", hint="use: retinue-ca restore FILE --new-timeline")
    database, water = Store.open_shared(address), HighWater(directory / HIGHWATER)
    try:
        if processes.living(database):
            raise BadState("store.in_use", "CA processes work on that database", hint="stop all of them first")
        lost = _lost(database, water.mark)
        _begin(Plane.over(directory, database, lambda: float(now)), water.mark, lost, now)
        with database.read() as tx:
            return Restored(database.trust_domain, Store.get(tx, "timeline") or "", database.revision(tx), lost, None, compared=False)
    finally:
        database.close()
        water.close()


# ---- files


def _copy(source: sqlite3.Connection, target: Path) -> None:
    """A consistent copy in one file, by SQLite's online backup: writers go on meanwhile."""
    os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    with closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE").close()


def _fetch(source: Path, target: Path) -> None:
    if not source.is_file():
        raise BadInput("backup.missing", f"there is no file {source}", hint="name a file that retinue-ca backup made")
    if not os.access(source, os.R_OK):
        raise NoPrivilege("backup.read", f"may not read {source}", hint="run it as root or as the CA's own user")
    try:
        with closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            _copy(connection, target)
    except sqlite3.Error:
        raise BadState(
            "backup.damaged", f"{source} is not a readable backup", hint="use another backup"
        ) from None


def _aside(directory: Path) -> str | None:
    """Keep the database that is replaced, with its write-ahead log, under another name."""
    old = directory / DATABASE
    if not old.exists():
        return None
    name = f"{DATABASE}.replaced-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(2).hex()}"
    old.with_name(f"{DATABASE}-shm").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        os.rename(old.with_name(f"{DATABASE}-wal"), old.with_name(f"{name}-wal"))
    os.rename(old, old.with_name(name))
    return name


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- what is missing


@dataclass(slots=True)
class _Missing:
    compared: bool = False
    revoked_hosts: list[str] = field(default_factory=list)
    revoked_instances: list[str] = field(default_factory=list)
    gone_hosts: list[str] = field(default_factory=list)
    gone_instances: list[str] = field(default_factory=list)


def _lost(database: Store, mark: Mark | None) -> int | None:
    """How many acknowledged changes the database lacks; None when that cannot be known."""
    if mark is None or mark.timeline != database.timeline:
        return None
    with database.read() as tx:
        return max(0, mark.revision - database.revision(tx))


def _compare(old: Path, database: Store) -> _Missing:
    if not old.exists():
        return _Missing()
    try:
        before = Store.open(old)
    except RetinueError:
        return _Missing()
    try:
        with before.read() as tx:
            hosts, instances = _states(tx)
        with database.read() as tx:
            hosts_now, instances_now = _states(tx)
    except (RetinueError, ValueError):
        return _Missing()
    finally:
        before.close()

    def revoked(was: dict[str, str], now: dict[str, str]) -> list[str]:
        return sorted(k for k, state in was.items() if state == "revoked" and now.get(k, "revoked") != "revoked")

    return _Missing(
        True, revoked(hosts, hosts_now), revoked(instances, instances_now),
        sorted(k for k, state in hosts.items() if state == "enrolled" and k not in hosts_now),
        sorted(k for k, state in instances.items() if state != "revoked" and k not in instances_now),
    )  # fmt: skip


def _states(tx: Connection) -> tuple[dict[str, str], dict[str, str]]:
    c = schema.endpoints.c
    hosts = {row.name: row.state for row in tx.execute(select(c.name, c.state))}
    return hosts, {row.key: row.state for row in rows.instances(tx)}


# ---- the new timeline


def _begin(plane: Plane, mark: Mark | None, lost: int | None, now: int) -> None:
    """Turn the database into the start of a new timeline, in one transaction."""
    database = plane.store
    with database.write() as tx:
        revision = database.revision(tx)
        top = int(database.get(tx, "base") or 0) + revision
        floor = max(top, mark.top) + 1 if mark is not None else top + UNKNOWN
        spare = lost if lost is not None else mark.revision if mark is not None else ADDRESSES
        made_at = database.get(tx, "backup_at")
        newest_change = tx.execute(select(schema.changes.c.at).order_by(schema.changes.c.revision.desc()).limit(1))
        values = {
            "timeline": str(uuid4()), "floor": floor, "base": floor - revision,
            "overlay_next": int(database.get(tx, "overlay_next") or 1) + spare,
            "sidecar_next": int(database.get(tx, "sidecar_next") or 1) + spare + ADDRESSES,
            "lost_from": int(made_at or newest_change.scalar() or 0) - BACKDATE, "lost_until": now,
        }  # fmt: skip
        if mark is not None:
            values |= {"supersedes": mark.timeline, "supersedes_revision": mark.revision}
        for key, value in values.items():
            database.put(tx, key, str(value))
        tx.execute(update(schema.instances).values(epoch_top=floor))
        tx.execute(update(schema.endpoints).values(generation=floor))
        _sign_anew(plane, tx, floor, now)
        audit.append(tx, now, NOBODY, "restore", f"revision {revision}", earlier=database.timeline, lost=lost)


def _sign_anew(plane: Plane, tx: Connection, floor: int, now: int) -> None:
    database = plane.store
    envelope = plane.authority.bundle(floor + 1, now)
    database.put(tx, "bundle", envelope)
    transparency.record(tx, now, "bundle", f"sequence {floor + 1}", envelope)
    database.put(tx, "bundle_sequence", str(floor + 1))
    database.log(tx, now, "bundle", "bundle")
    current = newest(tx)
    if current is not None:
        plane.policies.verify(current)
    files = current.files if current is not None else NO_POLICY
    author = current.author if current is not None else NOBODY
    parts = current.said(str(plane.trust_domain)).parts if current is not None else []
    plane.policies.insert(tx, floor + 1, digest(files), files, author, now, parts=parts, kind="restore")
    for row in rows.instances(tx, state="moving"):
        plane.placements.give_up(tx, row, now, "restore")
    plane.registry.sign_anew(tx, now)
    for row in rows.instances(tx):
        if row.placement is not None:
            plane.placements.sign_anew(tx, row, now)
