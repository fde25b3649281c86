"""When an identity or entry is over: reading and checking what a request says about its end."""

from __future__ import annotations

from sqlalchemy import Connection, select

from ca import schema
from identity.errors import BadInput, NotFound
from identity.names import workload_path


def end_of(tx: Connection, now: int, name: str, *, ends_at: int | None, ends_in: int | None, ends_with: str | None) -> tuple[int | None, str | None]:
    """(ends_at, ends_with) of a request for something of the workload `name`.

    Raises BadInput ``lease.*`` for an end that has passed, two times, or its own end; NotFound ``lease.with``.
    """
    if ends_at is not None and ends_in is not None:
        raise BadInput("lease.twice", "an end is one time", hint="give --ends-at once")
    at = now + ends_in if ends_in is not None else ends_at
    if at is not None and at <= now:
        raise BadInput("lease.past", "the end has passed already", hint="give a time to come, or +1h")
    if ends_with is not None:
        workload_path(ends_with)
        if ends_with == name:
            raise BadInput("lease.itself", f"{name} cannot end with itself")
        if not alive(tx, ends_with):
            raise NotFound("lease.with", f"no workload named {ascii(ends_with)[:80]} is there to end with", hint="see: retinue-ca workload list")
        _no_circle(tx, name, ends_with)
    return at, ends_with


def _no_circle(tx: Connection, name: str, ends_with: str) -> None:
    seen, here = {name}, ends_with
    while True:
        if here in seen:
            raise BadInput("lease.circle", f"{name} and {ends_with} would end with each other")
        seen.add(here)
        c = schema.instances.c
        following = tx.execute(select(c.ends_with).where(c.name == here, c.ends_with.is_not(None), c.state != "revoked")).scalars().first()
        if following is None:
            return
        here = following


def alive(tx: Connection, name: str) -> bool:
    """Has a workload an instance that is not revoked?"""
    c = schema.instances.c
    return tx.execute(select(c.name).where(c.name == name, c.state != "revoked").limit(1)).first() is not None
