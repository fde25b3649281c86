"""The CA processes on one database: who is alive, and what the target of a move reported to another of them.

Every process has its own copy of the directory (keys and certificates) and writes a sighting at every heartbeat. Time is
the database's own, so that processes with different clocks agree.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Integer, cast, delete, func, insert, select, update

from ca.schema import processes, readiness
from ca.store import Store

ALIVE_S: Final = 15  # without a sighting for so long a process is taken for dead: its moves are given up
KEEP_S: Final = 86400


@dataclass(frozen=True, slots=True)
class Process:
    """One process as last seen; `seen_ago` in seconds."""

    id: str
    listen: str
    started: int
    seen_ago: int
    revision: int


def _now() -> Any:
    return cast(func.floor(func.extract("epoch", func.clock_timestamp())), Integer)


def sight(store: Store, process: str, listen: str, revision: int) -> None:
    """Write down that `process` lives (shared stores only). Beside the writers: waits for nobody."""
    with store.record() as tx:
        mine = processes.c.id == process
        now = int(tx.execute(select(_now())).scalar_one())
        if not tx.execute(update(processes).where(mine).values(seen=now, revision=revision)).rowcount:
            tx.execute(delete(processes).where(processes.c.seen < now - KEEP_S))
            tx.execute(insert(processes).values(id=process, listen=listen, started=now, seen=now, revision=revision))


def gone(store: Store, process: str) -> None:
    """A process stops in order."""
    with store.record() as tx:
        tx.execute(delete(processes).where(processes.c.id == process))


def all_of(tx: Connection) -> list[Process]:
    """Every process seen lately, oldest first."""
    now = int(tx.execute(select(_now())).scalar_one())
    rows = tx.execute(select(processes).order_by(processes.c.started, processes.c.id))
    return [Process(r.id, r.listen, r.started, now - r.seen, r.revision) for r in rows]


def living(store: Store) -> Collection[str]:
    """The processes that were seen within ALIVE_S."""
    with store.read() as tx:
        return {p.id for p in all_of(tx) if p.seen_ago <= ALIVE_S}


@dataclass(frozen=True, slots=True)
class Ready:
    """What an endpoint reported: the revision it applied and what is attached there."""

    revision: int
    attached: frozenset[str]


def note_ready(store: Store, endpoint: str, process: str, revision: int, attached: Collection[str], now: int) -> None:
    """Tell the other processes what the target of a move reported here."""
    values = {"process": process, "revision": revision, "attached": json.dumps(sorted(attached)), "at": now}
    with store.record() as tx:
        if not tx.execute(update(readiness).where(readiness.c.endpoint == endpoint).values(**values)).rowcount:
            tx.execute(insert(readiness).values(endpoint=endpoint, **values))


def ready(store: Store, endpoint: str) -> Ready | None:
    """The newest such report; None when there is none."""
    with store.read() as tx:
        row = tx.execute(select(readiness).where(readiness.c.endpoint == endpoint)).first()
    return None if row is None else Ready(row.revision, frozenset(json.loads(row.attached)))
