"""PostgreSQL (15 or newer) as the store of several CA processes: connections, what a server has to promise, its errors.

The address is a file beside the keys, ``store.url`` (0600), because a password in argv can be read by everybody. A
process that cannot reach the server serves what it has and says nothing new: see ca/service.py.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from identity.errors import BadInput, BadState, RetinueError, Unreachable
from identity.keys import write_secret

FILE: Final = "store.url"
ENVIRONMENT: Final = "RETINUE_CA_STORE"
VERSION: Final = 15
CONNECT_S: Final = 3
LOCK_MS: Final = 5000  # how long a writer waits for another process
# A process that stops in the middle of a transaction must not hold the writer's lock against everybody else.
SETTINGS: Final = (
    f"-c lock_timeout={LOCK_MS} -c idle_in_transaction_session_timeout=5000 -c statement_timeout=60000 "
    "-c search_path=public"
)
READS: Final = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}

_BUSY: Final = {"55P03", "40001", "40P01", "57014", "25P03"}  # lock timeout, serialisation, deadlock, cancelled, idle
_FULL: Final = {"53100", "53200"}  # disk, memory


def parse(address: str) -> URL:
    """``postgresql://[user[:password]]@host[:port]/database[?...]``. Raises BadInput ``store.url``; never shows it."""
    try:
        url = make_url(address.strip())
    except ArgumentError:
        raise _bad("it is not one") from None
    if url.drivername not in {"postgresql", "postgres", "postgresql+psycopg"}:
        raise _bad("it does not begin with postgresql://")
    if not url.database:
        raise _bad("it names no database")
    return url.set(drivername="postgresql+psycopg")


def _bad(why: str) -> BadInput:
    return BadInput(
        "store.url", f"that is not the address of a database: {why}",
        hint="write postgresql://user@host/database, with a password only in a file or in " + ENVIRONMENT,
    )  # fmt: skip


def chosen(argument: str | None, file: Path | None) -> str | None:
    """The address that an operator gave: as argument (without a password), in a file, or in the environment.

    Raises BadInput ``store.password`` for a password in argv, ``store.url`` for an unusable file.
    """
    if argument is not None:
        if parse(argument).password is not None:
            raise BadInput(
                "store.password", "a password on a command line can be read by everybody on this machine",
                hint=f"put the address into a file of mode 0600 and give --store-file FILE, or into {ENVIRONMENT}",
            )  # fmt: skip
        return argument
    if file is not None:
        return _read(file)
    return os.environ.get(ENVIRONMENT) or None


def address_of(directory: Path) -> str | None:
    """The address that a CA's directory names; None when its store is SQLite. Raises BadState."""
    path = directory / FILE
    return _read(path) if os.path.lexists(path) else None


def write_address(directory: Path, address: str) -> None:
    """Keep the address beside the keys, 0600."""
    write_secret(directory / FILE, address.strip().encode() + b"\n")


def _read(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(fd) as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise BadState("store.mode", f"{path} can be read by others", hint=f"chmod 600 {path}")
            found = file.read(4096).strip()
    except OSError as e:
        raise BadState("store.url", f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise _bad("the file is not text") from None
    parse(found)
    return found


def engine(address: str) -> Engine:
    """Connections to the server. Raises BadInput ``store.url``, BadState ``store.driver``."""
    url = parse(address)
    try:
        import psycopg  # noqa: F401  - the driver is an extra: say which one, not that a module is missing
    except ImportError:
        raise BadState(
            "store.driver", "the driver for PostgreSQL is not installed", hint="pip install 'retinue[postgres]'"
        ) from None
    return create_engine(
        url, pool_size=4, max_overflow=4, pool_timeout=CONNECT_S, pool_pre_ping=True, hide_parameters=True,
        connect_args=connect_arguments(),
    )  # fmt: skip


def connect_arguments() -> dict[str, Any]:
    """How every connection is made: to a primary, with limits on waiting."""
    return {
        "connect_timeout": CONNECT_S, "options": SETTINGS, "application_name": "retinue-ca",
        "target_session_attrs": "read-write", "tcp_user_timeout": 5000, "keepalives_idle": 5,
        "keepalives_interval": 2, "keepalives_count": 3,
    }  # fmt: skip


def check_server(tx: Connection) -> None:
    """Raises BadState ``store.server`` for a server too old, or one that acknowledges what it may lose."""
    version = int(tx.execute(text("SHOW server_version_num")).scalar_one()) // 10000
    if version < VERSION:
        raise BadState("store.server", f"PostgreSQL {version} is too old", hint=f"use PostgreSQL {VERSION} or newer")
    for setting in ("fsync", "full_page_writes", "synchronous_commit"):
        if tx.execute(text(f"SHOW {setting}")).scalar_one() == "off":
            raise BadState(
                "store.server", f"the server runs with {setting}=off: it acknowledges what it may lose",
                hint=f"set {setting}=on",
            )  # fmt: skip


def tables(tx: Connection) -> set[str]:
    """Names of the tables there are."""
    query = text("SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema()")
    return set(tx.execute(query).scalars())


def translated(e: DBAPIError) -> RetinueError | None:
    """The error that an error of the driver stands for; None when it is not PostgreSQL's."""
    if not type(e.orig).__module__.startswith("psycopg"):
        return None
    state = getattr(e.orig, "sqlstate", None)
    if state in _BUSY:
        return Unreachable("store.busy", "the database is busy", hint="try again")
    if state in _FULL:
        return Unreachable(
            "store.full", "the disk of the database is full: nothing was changed", hint="free space and try again"
        )
    if state == "25006":
        return Unreachable("store.standby", "the database is a standby and takes no writes", hint="try again")
    if state in {"28000", "28P01", "3D000", "42501"}:
        return BadState(
            "store.refused", f"the database refuses this CA: {_first_line(e)}", hint="see its role, password and grants"
        )
    if e.connection_invalidated or isinstance(e, OperationalError):
        return Unreachable(
            "store.unreachable", f"the database cannot be reached: {_first_line(e)}", hint="see that the server runs"
        )
    return BadState("store.damaged", f"the database answers unexpectedly: {_first_line(e)}", hint="see its log")


def _first_line(e: DBAPIError) -> str:
    lines = str(e.orig).strip().splitlines() or ["no reason given"]
    return lines[0][:200]
