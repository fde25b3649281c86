"""Every record in force, signed anew with the record keys that sign now; what the records say stays the same.

Same generation, epoch and revision, another signature: receivers compare what is said, so nothing moves and nothing is
refused, and the key before can be revoked afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from sqlalchemy import Connection, select, update

from ca import audit, schema, transparency
from ca.admins import AdminRecord
from ca.contradiction import CONTRADICTION
from ca.store import Store
from identity.entries import EntriesRecord, EntryRecord
from identity.errors import NotVerified
from identity.records import EndpointRecord, ForeignBundle, Payload, PlacementRecord, PolicyRecord

log = structlog.get_logger("retinue.ca.authority")

Open = Callable[[type[Any], str], Payload]
Sign = Callable[[Payload], str]

_ENDPOINTS, _INSTANCES = schema.endpoints, schema.instances


def all_records(tx: Connection, open_: Open, sign: Sign, now: int, actor: str) -> int:
    """Inside the caller's transaction; how many. `open_` verifies one of our own.

    A record that no key of ours signed is left as it is, and told: endpoints refuse it anyway, and one such row must not keep
    a key that leaked in use. Raises NotVerified ``authority.resign`` when there is nothing but such records.
    """
    count = 0
    spoilt: list[str] = []
    rows = tx.execute(select(_ENDPOINTS).where(_ENDPOINTS.c.state == "enrolled")).mappings().all()
    for row in rows:
        changed = _signed(row, {"record": EndpointRecord, "entries": EntriesRecord}, open_, sign, spoilt)
        if changed:
            tx.execute(update(_ENDPOINTS).where(_ENDPOINTS.c.name == row["name"]).values(changed))
            _note(tx, now, "endpoint", row["name"], changed)
            count += len(changed)
    for row in tx.execute(select(_INSTANCES)).mappings().all():
        changed = _signed(row, {"placement": PlacementRecord, "prepare": PlacementRecord}, open_, sign, spoilt)
        if changed:
            mine = (_INSTANCES.c.name == row["name"]) & (_INSTANCES.c.instance == row["instance"])
            tx.execute(update(_INSTANCES).where(mine).values(changed))
            _note(tx, now, "instance", f"{row['name']}/{row['instance']}", changed)
            count += len(changed)
    c = schema.policies.c
    newest = tx.execute(select(schema.policies).order_by(c.revision.desc()).limit(1)).mappings().first()
    if newest is not None and (changed := _signed(newest, {"record": PolicyRecord}, open_, sign, spoilt)):
        tx.execute(update(schema.policies).where(c.revision == newest["revision"]).values(changed))
        _note(tx, now, "policy", "policy", changed)
        count += len(changed)
    for row in tx.execute(select(schema.federations)).mappings().all():
        changed = _signed(row, {"record": ForeignBundle}, open_, sign, spoilt)
        if changed:
            name = row["trust_domain"]
            tx.execute(update(schema.federations).where(schema.federations.c.trust_domain == name).values(changed))
            _note(tx, now, "federation", name, changed)
            count += len(changed)
    for table, key, kind in ((schema.entries, schema.entries.c.id, EntryRecord), (schema.admins, schema.admins.c.name, AdminRecord)):
        for row in tx.execute(select(table)).mappings().all():  # kept here and never sent: no change to note
            if changed := _signed(row, {"record": kind}, open_, sign, spoilt):
                tx.execute(update(table).where(key == row[key.name]).values(changed))
                count += 1
    if spoilt and not count:
        raise NotVerified(
            "authority.resign", f"no record in the database was signed by a key of ours, first {spoilt[0]}",
            hint="the database was altered; restore it from a backup",
        )  # fmt: skip
    if spoilt:
        log.critical("records in the database were signed by no key of ours; they are left as they are", count=len(spoilt), first=spoilt[0])
        audit.append(tx, now, actor, "authority.resign", f"{len(spoilt)} records", outcome=CONTRADICTION, first=spoilt[0][:200])
    audit.append(tx, now, actor, "authority.resign", f"{count} records")
    return count


def _signed(row: Any, columns: dict[str, type[Payload]], open_: Open, sign: Sign, spoilt: list[str]) -> dict[str, str]:
    changed: dict[str, str] = {}
    for column, kind in columns.items():
        envelope = row[column]
        if envelope is not None:
            try:
                changed[column] = sign(open_(kind, envelope))
            except NotVerified as e:
                spoilt.append(f"{kind.typ}: {e.message}")
    return changed


def _note(tx: Connection, now: int, kind: str, key: str, changed: dict[str, str]) -> None:
    Store.log(tx, now, kind, key)
    for column, envelope in changed.items():
        what = {"record": kind, "prepare": "placement"}.get(column, column)
        transparency.record(tx, now, what, key, envelope)
