"""Changes of the authority's members with everything that follows from them: the bundle, the records, the block list.

Each function runs in the plane's worker thread. A change is made in the directory first and published from there, so one
that was interrupted in between is published at the next start or tick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import Connection, delete, insert, select

from ca import audit, resign, rotation, schema
from ca.following import keeper_only
from ca.keyring import GOOD, Kind, Member
from identity import certs
from identity.errors import Conflict
from identity.revocation import MAX_ENTRIES, BlockList, serial_entry, spki_hash
from identity.wire.authority import AuthorityInfo, MemberInfo

if TYPE_CHECKING:
    from ca.plane import Plane

log = structlog.get_logger("retinue.ca.authority")

BLOCK_LIMIT: Final = MAX_ENTRIES - 64  # the rest is for members of the authority


def blocked(tx: Connection, now: int) -> list[str]:
    """The block list: revoked certificates that have not ended, and what administrators blocked. Longest-lived first."""
    s, b = schema.serials.c, schema.blocks.c
    own = tx.execute(select(b.entry, b.until).where(b.until > now).order_by(b.until.desc()).limit(BLOCK_LIMIT)).all()
    query = (
        select(s.issuer, s.serial).where(s.revoked_at.is_not(None), s.not_after > now).order_by(s.not_after.desc(), s.serial)
    )
    room = BLOCK_LIMIT - len(own)
    return [row.entry for row in own] + [serial_entry(r.issuer, r.serial) for r in tx.execute(query.limit(room))]


def in_force(tx: Connection, now: int) -> dict[str, int]:
    """How many newest certificates of endpoints and workloads each issuer (key identifier, hex) has made."""
    s = schema.serials.c
    rows = tx.execute(
        select(s.issuer, s.spiffe_id, s.endpoint)
        .where(s.not_after > now, s.revoked_at.is_(None), s.profile.in_(["endpoint", "workload", "admin"]))
        .order_by(s.issued, s.not_after)
    )
    newest = {(r.spiffe_id, r.endpoint): r.issuer for r in rows}
    count: dict[str, int] = {}
    for issuer in newest.values():
        count[issuer] = count.get(issuer, 0) + 1
    return count


def show(plane: Plane, changed: str = "") -> AuthorityInfo:
    """All members, what hangs from them, and the block list."""
    with plane.store.read() as tx:
        sequence = int(plane.store.get(tx, "bundle_sequence") or 0)
        count, out = in_force(tx, plane.now), blocked(tx, plane.now)
    members = [_info(plane, m, count) for m in plane.authority.ring.members]
    return AuthorityInfo(
        trust_domain=str(plane.trust_domain), sequence=sequence, members=members, blocked=out, changed=changed
    )


def _info(plane: Plane, member: Member, count: dict[str, int]) -> MemberInfo:
    authority = plane.authority
    good = member.state in GOOD
    return MemberInfo(
        name=member.name, kind=member.kind, state=member.state, since=member.since, until=member.until,
        not_after=rotation.life(authority, member)[1] if good else member.ends,
        key=spki_hash(authority.certificate(member.name)) if good else member.key,
        here=good and authority.keys.has(member.name), certificates=_below(plane, member, count),
    )  # fmt: skip


def _below(plane: Plane, member: Member, count: dict[str, int]) -> int:
    authority = plane.authority
    if member.state not in GOOD:
        return 0
    cert = authority.certificate(member.name)
    if member.kind == "intermediate":
        return count.get(certs.key_id(authority.signer_key(cert)).hex(), 0)
    if member.kind == "root":
        below = [m for m in authority.ring.of("intermediate", GOOD) if authority.certificate(m.name).issuer == cert.subject]
        return sum(_below(plane, m, count) for m in below)
    return 0


def prepare(plane: Plane, kind: Kind, actor: str) -> AuthorityInfo:
    """Raises what `rotation.prepare` raises."""
    keeper_only(plane)
    with rotation.changing(plane.authority, plane.clock()):
        member = rotation.prepare(plane.authority, kind, plane.clock())
    return _published(plane, member, "prepare", actor)


def activate(plane: Plane, kind: Kind, actor: str) -> AuthorityInfo:
    """Also signs every record anew when a record key changed. Raises what `rotation.activate` raises."""
    keeper_only(plane)
    with rotation.changing(plane.authority, plane.clock()):
        member = rotation.activate(plane.authority, kind, plane.clock())
    return _published(plane, member, "activate", actor)


def taint(plane: Plane, name: str, spread: int, actor: str) -> AuthorityInfo:
    """Raises what `rotation.taint` raises."""
    keeper_only(plane)
    with rotation.changing(plane.authority, plane.clock()):
        member = rotation.taint(plane.authority, name, plane.clock(), spread)
    return _published(plane, member, "taint", actor, spread=spread)


def revoke(plane: Plane, name: str, actor: str, *, force: bool = False, compromised: bool = False) -> AuthorityInfo:
    """Raises Conflict ``authority.in_use`` while certificates hang from it, unless `force`; what `rotation.revoke` raises."""
    keeper_only(plane)
    member = plane.authority.ring.get(name)
    with plane.store.read() as tx:
        left = _below(plane, member, in_force(tx, plane.now))
    if left and not force and not compromised and member.state != "active":
        raise Conflict(
            "authority.in_use", f"{left} certificates in force hang from {name}",
            hint=f"first: retinue-ca authority taint {name}, then wait; --force cuts them off",
        )  # fmt: skip
    with rotation.changing(plane.authority, plane.clock()):
        member = rotation.revoke(plane.authority, name, plane.clock(), compromised=compromised)
    return _published(plane, member, "revoke", actor, compromised=compromised, left=left)


def block(plane: Plane, entry: str, until: int, actor: str) -> AuthorityInfo:
    """Refuse a key, a certificate or what an identity was given. Raises BadInput ``revocation.form``."""
    BlockList.parse([entry])
    end = until or plane.now + certs.ROOT_LIFETIME
    with plane.store.write() as tx:
        tx.execute(delete(schema.blocks).where((schema.blocks.c.entry == entry) | (schema.blocks.c.until <= plane.now)))
        tx.execute(insert(schema.blocks).values(entry=entry, at=plane.now, until=end))
        _count_block(plane, tx)
        audit.append(tx, plane.now, actor, "authority.block", entry, until=end)
    plane.refresh_bundle()
    return show(plane)


def unblock(plane: Plane, entry: str, actor: str) -> AuthorityInfo:
    """Take an administrator's entry off the list. Idempotent."""
    with plane.store.write() as tx:
        gone = tx.execute(delete(schema.blocks).where(schema.blocks.c.entry == entry)).rowcount
        _count_block(plane, tx)
        audit.append(tx, plane.now, actor, "authority.unblock", entry, found=bool(gone))
    plane.refresh_bundle()
    return show(plane)


def _count_block(plane: Plane, tx: Connection) -> None:
    """So that the process which publishes bundles sees it, wherever it was done."""
    plane.store.put(tx, "blocks", str(int(plane.store.get(tx, "blocks") or 0) + 1))


def _published(plane: Plane, member: Member, act: str, actor: str, **detail: Any) -> AuthorityInfo:
    follow(plane, actor)
    with plane.store.write() as tx:
        audit.append(tx, plane.now, actor, f"authority.{act}", member.name, **detail)
    log.info("the authority changed", act=act, member=member.name, actor=actor)
    return show(plane, member.name)


def follow(plane: Plane, actor: str) -> None:
    """Publish what the directory says, and sign the records anew when other keys sign now than those they carry.

    The keys that signed last are kept in the database, in the transaction that signs anew: a crash repeats it.
    """
    # The bundle first: a key must be known before its signatures are.
    plane.refresh_bundle()
    if plane.replica:
        return
    names = " ".join(plane.authority.ring.active(kind).name for kind in rotation.RECORD_KEYS)
    with plane.store.read() as tx:
        known = plane.store.get(tx, "record_keys")
    if known == names or (known is None and names == " ".join(rotation.RECORD_KEYS)):
        return
    with plane.store.write() as tx:
        resign.all_records(tx, plane.open_record, plane.sign, plane.now, actor)
        plane.store.put(tx, "record_keys", names)
