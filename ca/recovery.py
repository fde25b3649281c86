"""The newest certificate of every endpoint: renewals continue from it, machines that were away come back to it, and two
machines that use one copied identity are found by it.

A renewal must be asked for with the newest certificate. The one before it is accepted for the same new key only: then the
reply was lost. Anything else shows, after its proof held, that two machines use one identity: that one endpoint is put in
quarantine. Peers lose its tunnel, its certificate is refused; other endpoints, and other places of the same workloads,
notice nothing. Who cannot prove anything changes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from ca import audit, rows, schema
from ca.store import Store
from identity.errors import NotFound, Refused
from identity.wire.recovery import HostStanding

WINDOW_S: Final = 30 * 86400
BUDGET: Final = 1  # automatic recoveries in a window
_C: Final = schema.credentials.c
_CREDENTIAL: Final = select(schema.credentials).where(_C.endpoint == bindparam("endpoint"))
_OUT: Final = select(_C.endpoint).where(_C.endpoint == bindparam("endpoint"), _C.quarantined_at.is_not(None))


@dataclass(frozen=True, slots=True)
class Credential:
    """The newest certificate of one endpoint. `before`: the one renewed into it; serials in hex, `spki` SHA-256, hex."""

    endpoint: str
    serial: str
    spki: str
    before: str | None
    quarantined_at: int | None
    reason: str | None
    budget: int | None
    recoveries: tuple[int, ...]


def get(tx: Connection, endpoint: str) -> Credential | None:
    row = tx.execute(_CREDENTIAL, {"endpoint": endpoint}).mappings().first()
    return None if row is None else Credential(**{**row, "recoveries": tuple(json.loads(row["recoveries"]))})


def quarantined(tx: Connection, endpoint: str) -> bool:
    """Is an endpoint out until an administrator has looked at it?"""
    return tx.execute(_OUT, {"endpoint": endpoint}).first() is not None


def begin(tx: Connection, endpoint: str, serial: str, spki: str) -> None:
    """A first certificate, after an enrolment: whatever was held against the endpoint was against its old keys."""
    tx.execute(delete(schema.credentials).where(_C.endpoint == endpoint))
    tx.execute(insert(schema.credentials).values(endpoint=endpoint, serial=serial, spki=spki, recoveries="[]"))


def advance(tx: Connection, endpoint: str, serial: str, spki: str, shown: str) -> bool:
    """Compare and swap: the certificate `shown` is renewed into `serial`. False when another renewal was first."""
    known = get(tx, endpoint)
    if known is None:
        tx.execute(insert(schema.credentials).values(endpoint=endpoint, serial=serial, spki=spki, before=shown, recoveries="[]"))
        return True
    mine = (_C.endpoint == endpoint) & (_C.serial == known.serial)
    swapped = tx.execute(update(schema.credentials).where(mine).values(serial=serial, spki=spki, before=shown))
    return swapped.rowcount == 1


def repeats(known: Credential | None, shown: str, spki: str) -> bool:
    """Is this a request again whose reply was lost?"""
    return known is not None and known.before == shown and known.spki == spki and known.serial != shown


def current(tx: Connection, known: Credential | None, shown: str, spki: str) -> bool:
    """May the certificate `shown` be renewed for the key `spki`?

    One that the database knows nothing of was made in the time a restore has lost; the caller has judged that.
    """
    if known is None or known.serial == shown or repeats(known, shown, spki):
        return True
    return tx.execute(select(schema.serials.c.serial).where(schema.serials.c.serial == shown)).first() is None


def quarantine(store: Store, endpoint: str, reason: str, now: int) -> Refused:
    """Put one endpoint out. Returns what to raise."""
    with store.write() as tx:
        done = tx.execute(
            update(schema.credentials)
            .where(_C.endpoint == endpoint, _C.quarantined_at.is_(None))
            .values(quarantined_at=now, reason=reason)
        )
        if done.rowcount:
            store.log(tx, now, "endpoint", endpoint)
            audit.append(tx, now, endpoint, "host.quarantine", endpoint, reason=reason)
    return out(endpoint, reason)


def out(endpoint: str, reason: str | None = None) -> Refused:
    """The answer to an endpoint in quarantine."""
    return Refused(
        "caller.quarantined", f"{endpoint} is in quarantine" + (f": {reason}" if reason else ""),
        hint=f"an administrator decides: retinue-ca host unquarantine {endpoint}, or enrol it anew",
    )  # fmt: skip


def release(store: Store, endpoint: str, now: int, actor: str) -> None:
    """End a quarantine: the machine that holds the newest certificate goes on. Raises NotFound. Idempotent."""
    with store.write() as tx:
        rows.endpoint(tx, endpoint)
        values: dict[str, Any] = {"quarantined_at": None, "reason": None}
        done = tx.execute(
            update(schema.credentials).where(_C.endpoint == endpoint, _C.quarantined_at.is_not(None)).values(values)
        )
        if done.rowcount:
            store.log(tx, now, "endpoint", endpoint)
        audit.append(tx, now, actor, "host.unquarantine", endpoint, found=bool(done.rowcount))


def used(known: Credential, now: int) -> list[int]:
    """When the recoveries of the running window were."""
    return [at for at in known.recoveries if at > now - WINDOW_S]


def spend(tx: Connection, endpoint: str, now: int, actor: str) -> None:
    """One automatic recovery. Raises Refused ``recover.budget`` when there is none left."""
    known = get(tx, endpoint)
    if known is None:
        raise NotFound("host.unknown", f"nothing is known of certificates of {endpoint}")
    spent, budget = used(known, now), BUDGET if known.budget is None else known.budget
    if len(spent) >= budget:
        raise Refused(
            "recover.budget", f"{endpoint} has come back by itself {len(spent)} times in {WINDOW_S // 86400} days; {budget} is the limit",
            hint=f"on the CA: retinue-ca host recover {endpoint} --budget 1",
        )  # fmt: skip
    tx.execute(update(schema.credentials).where(_C.endpoint == endpoint).values(recoveries=json.dumps([*spent, now])))
    audit.append(tx, now, actor, "host.recover", endpoint, number=len(spent) + 1, budget=budget)


def grant(store: Store, endpoint: str, more: int, now: int, actor: str) -> HostStanding:
    """Allow so many more recoveries in the running window. Raises NotFound."""
    with store.write() as tx:
        rows.endpoint(tx, endpoint)
        known = get(tx, endpoint)
        if known is None:
            raise NotFound("host.unknown", f"nothing is known of certificates of {endpoint}")
        budget = len(used(known, now)) + more
        tx.execute(update(schema.credentials).where(_C.endpoint == endpoint).values(budget=budget))
        audit.append(tx, now, actor, "host.budget", endpoint, budget=budget)
    return standing(store, endpoint, now)


def standing(store: Store, endpoint: str, now: int) -> HostStanding:
    """What is known of an endpoint's credentials. Raises NotFound."""
    with store.read() as tx:
        rows.endpoint(tx, endpoint)
        known = get(tx, endpoint)
    if known is None:
        return HostStanding(name=endpoint)
    return HostStanding(
        name=endpoint, serial=known.serial, quarantined_at=known.quarantined_at, reason=known.reason,
        recoveries=used(known, now), budget=BUDGET if known.budget is None else known.budget,
    )  # fmt: skip
