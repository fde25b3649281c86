"""The audit trail: what administrators, endpoints and the CA itself did or were refused, as entries of the ledger.

Append-only rows, written in the transaction of the act; the tree over them (ca/transparency.py) shows any change, and its
signed heads are remembered by every endpoint. Secrets never come here: callers pass names, serials and codes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from ca import transparency
from ca.transparency import Entry
from identity.transparency import canonical


def append(
    tx: Connection, now: int, actor: str, action: str, subject: str, *, outcome: str = "ok", **detail: Any
) -> None:
    """Append one entry inside the caller's transaction. `outcome` is ``ok`` or the code of the error."""
    transparency.record_act(tx, now, actor, action, subject, outcome, canonical(detail))


def entries(tx: Connection, *, after: int = 0, limit: int = 1000, subject: str | None = None) -> list[Entry]:
    """Acts, certificates and tokens with a sequence number above `after`, oldest first."""
    return transparency.entries(tx, after=after, limit=limit, subject=subject, kinds=transparency.TOLD)
