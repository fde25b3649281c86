"""The audit trail: append-only rows, each bound to the one before by SHA-256, written in the transaction of the act.

hash = SHA-256 over the canonical JSON of [prev, seq, at, actor, action, subject, outcome, detail]. The newest hash also
stands in `meta`, so that a cut tail shows. Secrets never come here: callers pass names, serials and codes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import Connection, insert, select

from ca import schema
from ca.store import Store
from identity.errors import BadState

GENESIS: Final = "0" * 64
HEAD: Final = "audit_head"


@dataclass(frozen=True, slots=True)
class Entry:
    """One audited act. `outcome` is ``ok`` or the code of the error."""

    seq: int
    at: int
    actor: str
    action: str
    subject: str
    outcome: str
    detail: dict[str, Any]
    prev: str
    hash: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verified:
    """An intact chain: how many rows, and the hash of the newest (note it elsewhere to prove later that none was cut)."""

    rows: int
    head: str


def append(
    tx: Connection, now: int, actor: str, action: str, subject: str, *, outcome: str = "ok", **detail: Any
) -> None:
    """Append one entry inside the caller's transaction."""
    last = tx.execute(
        select(schema.audit.c.seq, schema.audit.c.hash).order_by(schema.audit.c.seq.desc()).limit(1)
    ).first()
    seq, prev = (last.seq + 1, last.hash) if last else (1, GENESIS)
    row: dict[str, Any] = {
        "seq": seq, "at": now, "actor": actor[:255], "action": action, "subject": subject[:320], "outcome": outcome,
        "detail": json.dumps(detail, sort_keys=True, separators=(",", ":")), "prev": prev,
    }  # fmt: skip
    digest = _hash(row)
    tx.execute(insert(schema.audit).values(**row, hash=digest))
    Store.put(tx, HEAD, digest)


def entries(tx: Connection, *, after: int = 0, limit: int = 1000, subject: str | None = None) -> list[Entry]:
    """Entries with a sequence number above `after`, oldest first."""
    query = select(schema.audit).where(schema.audit.c.seq > after).order_by(schema.audit.c.seq).limit(limit)
    if subject is not None:
        query = query.where(schema.audit.c.subject == subject)
    return [Entry(**{**row, "detail": json.loads(row["detail"])}) for row in tx.execute(query).mappings()]


def verify(tx: Connection, noted: str | None = None) -> Verified:
    """Walk the whole chain. Raises BadState ``audit.broken`` naming the first row that does not fit, ``audit.cut`` when
    rows are missing at the end: before the recorded head, or before a head that was `noted` elsewhere.
    """
    seq, prev, seen = 0, GENESIS, noted in {None, GENESIS}
    for row in tx.execute(select(schema.audit).order_by(schema.audit.c.seq)).mappings().yield_per(1000):
        if row["seq"] != seq + 1 or row["prev"] != prev or _hash(dict(row)) != row["hash"]:
            raise BadState(
                "audit.broken",
                f"the audit trail does not hold at row {seq + 1}",
                hint="compare with a backup; from here on the rows prove nothing",
            )
        seq, prev = row["seq"], row["hash"]
        seen = seen or prev == noted
    if (Store.get(tx, HEAD) or GENESIS) != prev:
        raise BadState(
            "audit.cut",
            f"the audit trail ends at row {seq}, before its recorded head",
            hint="rows were removed; compare with a backup",
        )
    if not seen:
        raise BadState(
            "audit.cut",
            "the head noted earlier is not part of this audit trail",
            hint="rows were removed or replaced, or the head is of another CA",
        )
    return Verified(seq, prev)


def _hash(row: dict[str, Any]) -> str:
    parts = [row[k] for k in ("prev", "seq", "at", "actor", "action", "subject", "outcome", "detail")]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()
