"""Administrators in the store: their names, roles and scopes, and whether a certificate is theirs and in force."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from ca import audit, schema
from ca.contradiction import check_row
from ca.desk import Desk
from ca.roles import Principal
from identity.certs import Svid
from identity.errors import BadInput, Conflict, NotFound, Refused
from identity.names import SpiffeId, host_name, workload_path
from identity.records import Payload
from identity.wire.people import AdminInfo, Role

_SCOPE = re.compile(r"(?P<path>[a-z0-9._/-]{1,253})(/\*)?")


@dataclass(frozen=True, slots=True)
class AdminRow:
    """One administrator."""

    name: str
    role: Role
    scopes: tuple[str, ...]
    created: int
    created_by: str
    revoked_at: int | None
    record: str = ""

    @classmethod
    def of(cls, row: RowMapping) -> AdminRow:
        return cls(**{**row, "scopes": tuple(json.loads(row["scopes"]))})


def check_scopes(scopes: Sequence[str]) -> tuple[str, ...]:
    """Subtrees (``payments/*``) or names. Raises BadInput ``admin.scope``."""
    for scope in scopes:
        match = _SCOPE.fullmatch(scope)
        if match is None:
            raise BadInput("admin.scope", f"not a subtree: {ascii(scope)[:80]}", hint="write payments/* or shop/api")
        workload_path(scope.removesuffix("/*"))
    return tuple(dict.fromkeys(scopes))


class AdminRecord(Payload):
    """What an administrator may, as the control plane keeps it: never sent, verified at every call."""

    typ: ClassVar[str] = "admin"
    role: ClassVar[str] = "records"

    name: str
    may: Role
    scopes: list[str]


class Admins:
    """Transactions over administrators. `now` is seconds since the epoch, `actor` goes to the audit."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def spiffe_id(self, name: str) -> SpiffeId:
        """``spiffe://TD/admin/NAME``. Raises BadInput."""
        return SpiffeId(self._desk.trust_domain, ("admin", host_name(name)))

    def add(self, tx: Connection, name: str, role: Role, scopes: Sequence[str], now: int, actor: str) -> AdminRow:
        """Raises Conflict ``admin.exists``, BadInput. A name that was ever used stays used: the audit names people by it."""
        self.spiffe_id(name)
        checked = check_scopes(scopes)
        if role == "ca-admin" and checked:
            raise BadInput("admin.scope", "a ca-admin has no scopes", hint="leave --scope out, or give another role")
        if self._find(tx, name) is not None:
            raise Conflict("admin.exists", f"there is or was an administrator named {name}", hint="choose another name, or: retinue-ca admin certify")
        values = {
            "name": name, "role": role, "scopes": json.dumps(list(checked)), "created": now, "created_by": actor[:255],
            "record": self._desk.sign(self._record(name, role, checked)),
        }  # fmt: skip
        tx.execute(insert(schema.admins).values(**values))
        audit.append(tx, now, actor, "admin.add", name, role=role, scopes=list(checked))
        return self.get(tx, name)

    def get(self, tx: Connection, name: str) -> AdminRow:
        """Raises NotFound."""
        row = self._find(tx, name)
        if row is None:
            raise NotFound("admin.unknown", f"no administrator named {ascii(name)[:80]}", hint="see: retinue-ca admin list")
        return row

    def living(self, tx: Connection, name: str) -> AdminRow:
        """Raises NotFound, Refused ``admin.revoked``."""
        row = self.get(tx, name)
        if row.revoked_at is not None:
            raise Refused("admin.revoked", f"the administrator {name} was revoked")
        return row

    def all(self, tx: Connection) -> list[AdminRow]:
        return [AdminRow.of(row) for row in tx.execute(select(schema.admins).order_by(schema.admins.c.name)).mappings()]

    def any(self, tx: Connection) -> bool:
        """Is there an administrator beside root?"""
        return tx.execute(select(schema.admins.c.name).where(schema.admins.c.revoked_at.is_(None)).limit(1)).first() is not None

    def revoke(self, tx: Connection, name: str, now: int, actor: str) -> AdminRow:
        """Put one out with all certificates. Idempotent. Raises NotFound."""
        row = self.get(tx, name)
        if row.revoked_at is not None:
            return row
        tx.execute(update(schema.admins).where(schema.admins.c.name == name).values(revoked_at=now))
        s = schema.serials.c
        mine = (s.spiffe_id == str(self.spiffe_id(name)), s.revoked_at.is_(None))
        tx.execute(update(schema.serials).where(*mine).values(revoked_at=now))
        audit.append(tx, now, actor, "admin.revoke", name)
        return self.get(tx, name)

    def caller(self, tx: Connection, svid: Svid) -> Principal:
        """The person whose verified certificate this is. Raises Refused ``admin.kind``, ``admin.certificate``, ``admin.revoked``."""
        if svid.spiffe_id.kind != "admin":
            raise Refused("admin.kind", f"{svid.spiffe_id} is not an administrator", hint="use an administrator's certificate")
        row = self._find(tx, svid.spiffe_id.name)
        kept = tx.execute(select(schema.serials).where(schema.serials.c.serial == f"{svid.serial:x}")).mappings().first()
        if row is not None and row.revoked_at is not None:
            raise Refused("admin.revoked", f"the administrator {row.name} was revoked")
        own = kept is not None and kept["profile"] == "admin" and kept["spiffe_id"] == str(svid.spiffe_id) and kept["revoked_at"] is None
        if row is None or not own:
            raise Refused("admin.certificate", f"this certificate of {svid.spiffe_id} is not in force", hint="get a new one: retinue-ca admin certify")
        check_row(self._desk, f"administrator {row.name}", row.record, self._record(row.name, row.role, row.scopes))
        return Principal(f"admin/{row.name}", row.role, row.scopes, name=row.name)

    def info(self, tx: Connection, row: AdminRow) -> AdminInfo:
        s = schema.serials.c
        name = str(self.spiffe_id(row.name))
        newest = tx.execute(select(func.max(s.not_after)).where(s.spiffe_id == name, s.revoked_at.is_(None))).scalar()
        return AdminInfo(
            name=row.name, spiffe_id=name, role=row.role, scopes=list(row.scopes), created=row.created, created_by=row.created_by,
            state="active" if row.revoked_at is None else "revoked", expires=newest,
        )  # fmt: skip

    def _record(self, name: str, role: Role, scopes: Sequence[str]) -> AdminRecord:
        return AdminRecord(trust_domain=str(self._desk.trust_domain), name=name, may=role, scopes=list(scopes))

    @staticmethod
    def _find(tx: Connection, name: str) -> AdminRow | None:
        row = tx.execute(select(schema.admins).where(schema.admins.c.name == name)).mappings().first()
        return None if row is None else AdminRow.of(row)
