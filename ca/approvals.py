"""Two persons for what cannot be taken back: an act is asked for, approved by somebody else, and then done once.

An approval is bound to one request: who asked, the route and the exact body. It is good for an hour, once.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, insert, select, update

from ca import audit, schema
from ca.roles import Principal, Rule
from identity.errors import Conflict, NotFound, Refused
from identity.wire.people import Approval, Role

LIFE: Final = 3600  # seconds
MAX_OPEN: Final = 100  # that one person may have waiting
MAX_SHOWN: Final = 500


class ApprovalPending(Conflict):
    """The act was not done: it waits for a second person."""


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    asked_by: str
    asked_at: int
    expires: int
    role: Role
    act: str
    digest: str
    summary: str
    approved_by: str | None
    approved_at: int | None
    used_at: int | None

    @classmethod
    def of(cls, row: RowMapping) -> _Row:
        return cls(**row)

    def shown(self, now: int) -> Approval:
        state: Any = "used" if self.used_at is not None else "expired" if self.expires <= now else "approved" if self.approved_by else "pending"
        return Approval(
            id=self.id, act=self.act, summary=self.summary, asked_by=self.asked_by, asked_at=self.asked_at, expires=self.expires,
            role=self.role, state=state, approved_by=self.approved_by,
        )  # fmt: skip


def digest_of(act: str, body: bytes) -> str:
    """SHA-256 (hex) of a request: method and path, and its body as sent."""
    return hashlib.sha256(f"{act}\0".encode() + body).hexdigest()


def take(tx: Connection, who: Principal, act: str, body: bytes, now: int) -> str | None:
    """Use up the approval of this request and return who approved it; None when nobody did."""
    c = schema.approvals.c
    mine = (c.digest == digest_of(act, body), c.asked_by == who.actor, c.expires > now, c.used_at.is_(None))
    for row in [_Row.of(r) for r in tx.execute(select(schema.approvals).where(*mine).order_by(c.asked_at)).mappings()]:
        if row.approved_by is not None:
            won = tx.execute(update(schema.approvals).where(c.id == row.id, c.used_at.is_(None)).values(used_at=now)).rowcount
            if won == 1:
                audit.append(tx, now, who.actor, "approval.use", row.id, act=act, approved_by=row.approved_by)
                return row.approved_by
    return None


def ask(tx: Connection, who: Principal, rule: Rule, act: str, body: bytes, summary: str, now: int) -> Approval:
    """Note that this request waits for a second person; the same one again is the same. Raises Conflict ``approval.many``."""
    c = schema.approvals.c
    digest = digest_of(act, body)
    open_ = [_Row.of(r) for r in tx.execute(select(schema.approvals).where(c.asked_by == who.actor, c.expires > now, c.used_at.is_(None))).mappings()]
    for row in open_:
        if row.digest == digest:
            return row.shown(now)
    if len(open_) >= MAX_OPEN:
        raise Conflict("approval.many", f"{who.actor} has {len(open_)} acts waiting", hint="let them be approved, or expire")
    row_id = f"a-{secrets.token_hex(5)}"
    tx.execute(insert(schema.approvals).values(
        id=row_id, asked_by=who.actor, asked_at=now, expires=now + LIFE, role=rule.role, act=act, digest=digest, summary=summary[:1000],
    ))  # fmt: skip
    audit.append(tx, now, who.actor, "approval.ask", row_id, act=act, summary=summary[:200])
    return _get(tx, row_id).shown(now)


def waiting(approval: Approval) -> ApprovalPending:
    """The error that tells the first person what to do."""
    return ApprovalPending(
        "approval.pending", f"{approval.act} wants a second person: nothing was done yet",
        hint=f"another {approval.role}: retinue-ca approve {approval.id}; then run the same command again within the hour",
    )  # fmt: skip


def approve(tx: Connection, approval_id: str, who: Principal, now: int) -> Approval:
    """The second person's word.

    Raises NotFound, Refused ``approval.same`` for the one who asked, ``admin.role``, ``admin.scope``, ``approval.expired``;
    Conflict ``approval.done`` when it has one already.
    """
    row = _get(tx, approval_id)
    if row.expires <= now:
        raise Refused("approval.expired", f"{row.id} has expired", hint="let it be asked for again")
    if who.actor == row.asked_by:
        raise Refused("approval.same", "who asked cannot approve", hint="this wants another person")
    if not who.reaches(row.role):
        raise Refused("admin.role", f"this wants the role {row.role}; {who.actor} is {who.role}", hint="ask someone who has it")
    if who.scopes:
        raise Refused("admin.scope", f"{who.actor} has scopes and approves nothing", hint="ask an administrator of the whole")
    c = schema.approvals.c
    fresh = (c.id == row.id, c.approved_by.is_(None), c.used_at.is_(None))
    if tx.execute(update(schema.approvals).where(*fresh).values(approved_by=who.actor, approved_at=now)).rowcount != 1:
        raise Conflict("approval.done", f"{row.id} was approved by {row.approved_by}")
    audit.append(tx, now, who.actor, "approval.give", row.id, act=row.act, asked_by=row.asked_by)
    return _get(tx, row.id).shown(now)


def listed(tx: Connection, now: int) -> list[Approval]:
    """The newest ones, whatever became of them."""
    c = schema.approvals.c
    found = tx.execute(select(schema.approvals).order_by(c.asked_at.desc(), c.id).limit(MAX_SHOWN)).mappings()
    return [_Row.of(r).shown(now) for r in found]


def _get(tx: Connection, approval_id: str) -> _Row:
    row = tx.execute(select(schema.approvals).where(schema.approvals.c.id == approval_id)).mappings().first()
    if row is None:
        raise NotFound("approval.unknown", f"no approval {ascii(approval_id)[:40]}", hint="see: retinue-ca approvals")
    return _Row.of(row)
