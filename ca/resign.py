"""Every record in force, signed anew with the record keys that sign now; what the records say stays the same.

Same generation, epoch and revision, another signature: receivers compare what is said, so nothing moves and nothing is
refused, and the key before can be revoked afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select, update

from ca import audit, schema, transparency
from ca.admins import AdminRecord
from ca.store import Store
from identity.entries import EntriesRecord, EntryRecord
from identity.errors import NotVerified
from identity.records import EndpointRecord, ForeignBundle, Payload, PlacementRecord, PolicyRecord

Open = Callable[[type[Any], str], Payload]
Sign = Callable[[Payload], str]

_ENDPOINTS, _INSTANCES = schema.endpoints, schema.instances


def all_records(tx: Connection, open_: Open, sign: Sign, now: int, actor: str) -> int:
    """Inside the caller's transaction; how many. `open_` verifies one of our own.

    Raises NotVerified for a record in the database that no key of ours signed.
    """
    count = 0
    rows = tx.execute(select(_ENDPOINTS).where(_ENDPOINTS.c.state == "enrolled")).mappings().all()
    for row in rows:
        changed = _signed(row, {"record": EndpointRecord, "entries": EntriesRecord}, open_, sign)
        if changed:
            tx.execute(update(_ENDPOINTS).where(_ENDPOINTS.c.name == row["name"]).values(changed))
            _note(tx, now, "endpoint", row["name"], changed)
            count += len(changed)
    for row in tx.execute(select(_INSTANCES)).mappings().all():
        changed = _signed(row, {"placement": PlacementRecord, "prepare": PlacementRecord}, open_, sign)
        if changed:
            mine = (_INSTANCES.c.name == row["name"]) & (_INSTANCES.c.instance == row["instance"])
            tx.execute(update(_INSTANCES).where(mine).values(changed))
            _note(tx, now, "instance", f"{row['name']}/{row['instance']}", changed)
            count += len(changed)
    c = schema.policies.c
    newest = tx.execute(select(schema.policies).order_by(c.revision.desc()).limit(1)).mappings().first()
    if newest is not None:
        changed = _signed(newest, {"record": PolicyRecord}, open_, sign)
        tx.execute(update(schema.policies).where(c.revision == newest["revision"]).values(changed))
        _note(tx, now, "policy", "policy", changed)
        count += len(changed)
    for row in tx.execute(select(schema.federations)).mappings().all():
        changed = _signed(row, {"record": ForeignBundle}, open_, sign)
        if changed:
            name = row["trust_domain"]
            tx.execute(update(schema.federations).where(schema.federations.c.trust_domain == name).values(changed))
            _note(tx, now, "federation", name, changed)
            count += len(changed)
    for table, key, kind in ((schema.entries, schema.entries.c.id, EntryRecord), (schema.admins, schema.admins.c.name, AdminRecord)):
        for row in tx.execute(select(table)).mappings().all():  # kept here and never sent: no change to note
            tx.execute(update(table).where(key == row[key.name]).values(_signed(row, {"record": kind}, open_, sign)))
            count += 1
    audit.append(tx, now, actor, "authority.resign", f"{count} records")
    return count


def _signed(row: Any, columns: dict[str, type[Payload]], open_: Open, sign: Sign) -> dict[str, str]:
    changed: dict[str, str] = {}
    for column, kind in columns.items():
        envelope = row[column]
        if envelope is not None:
            try:
                changed[column] = sign(open_(kind, envelope))
            except NotVerified as e:
                raise NotVerified(
                    "authority.resign", f"a {kind.typ} record in the database was signed by no key of ours: {e.message}",
                    hint="the database was altered; restore it from a backup",
                ) from None  # fmt: skip
    return changed


def _note(tx: Connection, now: int, kind: str, key: str, changed: dict[str, str]) -> None:
    Store.log(tx, now, kind, key)
    for column, envelope in changed.items():
        what = {"record": kind, "prepare": "placement"}.get(column, column)
        transparency.record(tx, now, what, key, envelope)
