"""The signed history as it leaves the CA: the transparency log with its policies, placements and bundles (policy/history.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select

from ca.schema import ledger
from policy.history import KINDS, Line, dump_history

if TYPE_CHECKING:
    from ca.plane import Plane


@dataclass(frozen=True, slots=True)
class Head:
    """The file's first line, and how many leaves follow it."""

    first: str
    size: int


def head(plane: Plane) -> Head:
    """Seal what waits, and sign the head that the file will be checked against."""
    plane.seal()
    with plane.store.read() as tx:
        newest = plane.log.head(tx)
    (first, *_) = dump_history(str(plane.trust_domain), plane.tree_head(newest), ())
    return Head(first, newest.size)


def lines(plane: Plane, first: int, limit: int, size: int) -> list[str]:
    """So many lines from leaf `first` on, none beyond the head."""
    c = ledger.c
    query = select(c.leaf, c.hash, c.kind, c.detail).where(c.leaf >= first, c.leaf < size).order_by(c.leaf).limit(limit)
    with plane.store.read() as tx:
        found = [Line(r.leaf, r.hash, r.kind, r.detail) if r.kind in KINDS else Line(r.leaf, r.hash) for r in tx.execute(query)]
    return list(dump_history("", "", found))[1:]
