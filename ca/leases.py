"""Grants of life: identities and registration entries that end by themselves, at a time or with another workload.

The time is in the signed placement and entry records, so every agent acts on it without the CA. What is done here, once
a heartbeat, makes it last: the placement is withdrawn at the next epoch, the entry gives nothing more, and both are audited
as expired. An end with another workload is known to the CA alone: it comes when that workload has no instance left.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, or_, select

from ca import audit, rows, schema
from ca.contradiction import CONTRADICTION
from ca.entries import ENDED, Entries
from ca.life import alive
from ca.placements import Placements
from identity.errors import BadState

ACTOR: Final = "ca"


def expire(tx: Connection, placements: Placements, entries: Entries, now: int) -> list[str]:
    """End what is due, and what ends with it, inside the caller's transaction. Returns instances and entry ids."""
    done: list[str] = []
    spoilt: set[str] = set()  # somebody changed the database: said there; agents act on the signed end by themselves
    while due := [found for found in _due_instances(tx, now) if found.key not in spoilt]:
        for found in due:
            try:
                with tx.begin_nested():
                    settled = placements.give_up(tx, found, now, "expired") if found.state == "moving" else found
                    row = placements.withdraw(tx, settled, now, final=True)
            except BadState as e:
                if e.code != CONTRADICTION:
                    raise
                spoilt.add(found.key)
                continue
            audit.append(tx, now, ACTOR, "workload.expire", row.key, epoch=row.epoch, ends_at=row.ends_at, ends_with=row.ends_with)
            done.append(row.key)
    for entry in entries.due(tx, now, lambda name: alive(tx, name)):
        try:
            with tx.begin_nested():
                entries.end(tx, entry, now)
        except BadState as e:
            if e.code != CONTRADICTION:
                raise
            continue
        audit.append(tx, now, ACTOR, "entry.expire", entry.id, name=entry.name, ends_at=entry.ends_at, ends_with=entry.ends_with)
        done.append(entry.id)
    return done


def anything_due(tx: Connection, now: int) -> bool:
    """Is there anything for `expire`? A read, so that an idle heartbeat writes nothing."""
    c = schema.entries.c
    if _due_instances(tx, now):
        return True
    timed = tx.execute(select(c.id).where(c.ends_at <= now, c.ends_at > ENDED).limit(1)).first() is not None
    linked = tx.execute(select(c.ends_with).where(c.ends_with.is_not(None)).distinct()).scalars()
    return timed or any(not alive(tx, name) for name in linked)


def _due_instances(tx: Connection, now: int) -> list[rows.InstanceRow]:
    c = schema.instances.c
    query = select(schema.instances).where(c.state != "revoked", or_(c.ends_at <= now, c.ends_with.is_not(None)))
    found = [rows.InstanceRow.of(row) for row in tx.execute(query.order_by(c.name, c.instance)).mappings()]
    return [
        r for r in found
        if (r.ends_at is not None and r.ends_at <= now) or (r.ends_with is not None and not alive(tx, r.ends_with))
    ]  # fmt: skip
