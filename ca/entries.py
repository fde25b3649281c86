"""Registration entries in the store, and the signed set of each endpoint they are for.

A set is signed anew, at its next generation, in the transaction of the change that made it different; the change log then
carries it to its endpoint. An endpoint that never had an entry has no set.

An entry whose end has come stays in the set, at ENDED: it gives nobody anything, and goes on keeping the rest of the
namespace out. Only an administrator's `delete` takes it away, so no end by time ever lets more processes in.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, delete, insert, or_, select, update

from ca import audit, rows, schema, transparency
from ca.contradiction import check_row, check_set
from ca.desk import Desk
from identity.entries import (
    MAX_ENTRIES,
    EntriesRecord,
    Entry,
    EntryRecord,
    Selectors,
    check_entry,
    check_parent,
    describe,
    is_parent,
    parse_selectors,
)
from identity.errors import BadInput, Conflict, NotFound
from identity.wire.entries import EntryCreate, EntryInfo

ENDED: Final = 0  # `ends_at` of an entry that is over


@dataclass(frozen=True, slots=True)
class EntryRow:
    """One entry as stored."""

    id: str
    name: str
    parent: str
    selectors: Selectors
    labels: Mapping[str, str]
    hint: str
    ttl: int | None
    ends_at: int | None
    ends_with: str | None
    created: int
    created_by: str
    record: str = ""

    @classmethod
    def of(cls, row: RowMapping) -> EntryRow:
        selectors = Selectors.model_validate_json(row["selectors"])
        return cls(**{**row, "selectors": selectors, "labels": json.loads(row["labels"])})

    @property
    def ended(self) -> bool:
        return self.ends_at == ENDED

    def signed(self) -> Entry:
        """As it goes into a record."""
        return Entry(
            id=self.id, name=self.name, selectors=self.selectors, labels=dict(self.labels), hint=self.hint, ends=self.ends_at
        )


class Entries:
    """Transactions over entries. `now` is seconds since the epoch, `actor` goes to the audit."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def create(self, tx: Connection, request: EntryCreate, ends_at: int | None, ends_with: str | None, now: int, actor: str) -> EntryRow:
        """Add one. Raises BadInput ``entry.*``, NotFound for an unknown workload, Conflict ``entry.exists``, ``entry.many``."""
        row = EntryRow(
            f"e-{secrets.token_hex(5)}", request.name, check_parent(request.parent), parse_selectors(request.selectors),
            request.labels, request.hint, request.ttl, ends_at, ends_with, now, actor[:255],
        )  # fmt: skip
        check_entry(row.signed())
        if not rows.instances(tx, name=row.name):
            raise NotFound(
                "workload.unknown", f"no workload named {ascii(row.name)[:80]}", hint=f"add it first: retinue-ca workload add {row.name} --host HOST"
            )
        replaced: list[str] = []
        for other in self.all(tx):
            if other.ended:
                if (other.name, other.parent, other.selectors) == (row.name, row.parent, row.selectors):
                    tx.execute(delete(schema.entries).where(schema.entries.c.id == other.id))  # this one takes its place
                    replaced.append(other.id)
                continue
            if (other.name, other.parent, other.selectors) == (row.name, row.parent, row.selectors):
                raise Conflict("entry.exists", f"entry {other.id} says the same", hint=f"see: retinue-ca entry show {other.id}")
            if row.hint and other.hint == row.hint and other.name != row.name:
                raise Conflict("entry.hint", f"the hint {row.hint} belongs to {other.name}", hint="choose another --hint")
        values: dict[str, Any] = {
            "id": row.id, "name": row.name, "parent": row.parent, "selectors": row.selectors.model_dump_json(exclude_defaults=True),
            "labels": json.dumps(dict(row.labels)), "hint": row.hint, "ttl": row.ttl, "ends_at": ends_at, "ends_with": ends_with,
            "created": now, "created_by": row.created_by, "record": self._desk.sign(record_of(self._desk, row)),
        }  # fmt: skip
        tx.execute(insert(schema.entries).values(**values))
        self._follow(tx, row.parent, now, added=row.id, removed=replaced)
        audit.append(tx, now, actor, "entry.create", row.id, name=row.name, parent=row.parent, selectors=describe(row.selectors))
        return row

    def all(self, tx: Connection) -> list[EntryRow]:
        """By workload, then by id."""
        c = schema.entries.c
        return [EntryRow.of(row) for row in tx.execute(select(schema.entries).order_by(c.name, c.id)).mappings()]

    def get(self, tx: Connection, entry_id: str) -> EntryRow:
        """Raises NotFound."""
        row = tx.execute(select(schema.entries).where(schema.entries.c.id == entry_id)).mappings().first()
        if row is None:
            raise NotFound("entry.unknown", f"no entry {ascii(entry_id)[:40]}", hint="see: retinue-ca entry list")
        return EntryRow.of(row)

    def delete(self, tx: Connection, entry_id: str, now: int, actor: str) -> EntryRow:
        """Take one away. Raises NotFound."""
        row = self.get(tx, entry_id)
        self.remove(tx, row, now)
        audit.append(tx, now, actor, "entry.delete", row.id, name=row.name, parent=row.parent)
        return row

    def remove(self, tx: Connection, row: EntryRow, now: int) -> None:
        """Take one away without a word to the audit."""
        tx.execute(delete(schema.entries).where(schema.entries.c.id == row.id))
        self._follow(tx, row.parent, now, removed=[row.id])

    def end(self, tx: Connection, row: EntryRow, now: int) -> None:
        """Its end has come. Raises BadState ``store.contradiction``."""
        check_row(self._desk, f"entry {row.id}", row.record, record_of(self._desk, row))
        over = replace(row, ends_at=ENDED, ends_with=None)
        values = {"ends_at": ENDED, "ends_with": None, "record": self._desk.sign(record_of(self._desk, over))}
        tx.execute(update(schema.entries).where(schema.entries.c.id == row.id).values(values))
        self._follow(tx, row.parent, now)

    def opens(self, tx: Connection, row: EntryRow) -> list[str]:
        """Endpoints on which this is the last entry of its workload."""
        others = [e.parent for e in self.all(tx) if e.name == row.name and e.id != row.id]
        return [name for name in self.hosts(tx, row) if not any(is_parent(parent, name) for parent in others)]

    def due(self, tx: Connection, now: int, alive: Callable[[str], bool]) -> list[EntryRow]:
        """Entries whose end has come."""
        c = schema.entries.c
        query = select(schema.entries).where(or_(c.ends_at <= now, c.ends_with.is_not(None)))
        found = [r for row in tx.execute(query.order_by(c.id)).mappings() if not (r := EntryRow.of(row)).ended]
        return [r for r in found if (r.ends_at is not None and r.ends_at <= now) or (r.ends_with is not None and not alive(r.ends_with))]

    def ttl(self, tx: Connection, workload: str, endpoint: str) -> int | None:
        """The shortest certificate life that the entries of a workload on an endpoint ask for."""
        found = [r.ttl for r in self.all(tx) if r.name == workload and r.ttl is not None and not r.ended and is_parent(r.parent, endpoint)]
        return min(found, default=None)

    def hosts(self, tx: Connection, row: EntryRow) -> list[str]:
        """Enrolled endpoints it is for."""
        return [name for name in _enrolled(tx) if is_parent(row.parent, name)]

    def info(self, tx: Connection, row: EntryRow) -> EntryInfo:
        return EntryInfo(
            id=row.id, name=row.name, parent=row.parent, selectors=describe(row.selectors).split(" "), labels=dict(row.labels),
            hint=row.hint, ttl=row.ttl, ends_at=row.ends_at, ends_with=row.ends_with, created=row.created,
            created_by=row.created_by, hosts=self.hosts(tx, row), ended=row.ended,
        )  # fmt: skip

    def log_sets(self, now: int) -> int:
        """Put sets into the transparency log that were signed before sets were logged. Returns how many."""
        c, store = schema.endpoints.c, self._desk.store
        with store.read() as tx:
            found = tx.execute(select(c.name, c.entries).where(c.entries.is_not(None), c.state == "enrolled")).all()
            missing = [row for row in found if not transparency.is_logged(tx, "entries", row.name, row.entries)]
        if missing:
            with store.write() as tx:
                for row in missing:
                    transparency.record(tx, now, "entries", row.name, row.entries)
        return len(missing)

    def _follow(self, tx: Connection, parent: str, now: int, *, added: str | None = None, removed: Collection[str] = ()) -> None:
        for name in _enrolled(tx):
            if is_parent(parent, name):
                sign_for(self._desk, tx, name, now, change=Change(added, frozenset(removed)))


@dataclass(frozen=True, slots=True)
class Change:
    """By what a set is to differ from the one signed before: ids."""

    added: str | None
    removed: frozenset[str]


def sign_for(desk: Desk, tx: Connection, endpoint: str, now: int, *, change: Change | None = None) -> bool:
    """Sign an endpoint's set anew at its next generation; False when it never had an entry and has none now.

    change: compare with the set before; None when the endpoint was away meanwhile. Raises Conflict ``entry.many``,
    BadState ``store.contradiction`` for entries that came, went or changed without us: somebody writes in the database.
    """
    row = rows.endpoint(tx, endpoint)
    mine = [e for e in Entries(desk).all(tx) if is_parent(e.parent, endpoint)]
    for entry in mine:
        check_row(desk, f"entry {entry.id}", entry.record, record_of(desk, entry))
    if not mine and row.entries is None:
        return False
    if change is not None:
        check_set(desk, endpoint, row.entries, {e.id for e in mine}, change.added, change.removed)
    if len(mine) > MAX_ENTRIES:
        raise Conflict("entry.many", f"{endpoint} would have {len(mine)} entries; at most {MAX_ENTRIES}", hint="delete some, or spread them")
    generation = max(row.entries_generation, desk.store.floor(tx)) + 1
    record = desk.sign(
        EntriesRecord(
            trust_domain=str(desk.trust_domain), endpoint=endpoint, generation=generation,
            entries=[e.signed() for e in mine], issued=now,
        )
    )  # fmt: skip
    changed = {"entries": record, "entries_generation": generation}
    tx.execute(update(schema.endpoints).where(schema.endpoints.c.name == endpoint).values(**changed))
    transparency.record(tx, now, "entries", endpoint, record)
    desk.store.log(tx, now, "endpoint", endpoint)
    return True


def record_of(desk: Desk, row: EntryRow) -> EntryRecord:
    """What of an entry is signed when it is made."""
    return EntryRecord(
        trust_domain=str(desk.trust_domain), parent=row.parent, entry=row.signed(), ttl=row.ttl, ends_with=row.ends_with
    )


def check_known(request: EntryCreate) -> None:
    """What can be said about a request before anything is looked up. Raises BadInput."""
    if not request.selectors:
        raise BadInput("entry.selectors", "an entry needs selectors", hint="for example --select uid:33 --select unit:nginx.service")


def _enrolled(tx: Connection) -> list[str]:
    c = schema.endpoints.c
    return list(tx.execute(select(c.name).where(c.state == "enrolled").order_by(c.name)).scalars())
