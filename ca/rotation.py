"""How members of the authority come and go: prepare, activate, taint, revoke, by command and by time.

By time (the rules of SPIRE's server, with our lifetimes): a successor is prepared when half of the life is left, at most
30 days; it signs when a sixth is left, at most 7 days. So nothing issued is ever cut short by its issuer's end as long as
it lives for less than a sixth of the issuer's life. Roots are changed by command only: their keys are elsewhere.

Every step writes keys and certificates first and the manifest last; a step that was interrupted did not happen.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from cryptography import x509

from ca.keyring import GOOD, KEY_TYPES, Kind, Member
from ca.signer import Signer
from identity import certs
from identity.certs import INTERMEDIATE, LINK, ROOT
from identity.errors import BadInput, BadState, Conflict, RetinueError
from identity.revocation import spki_hash

if TYPE_CHECKING:
    from ca.authority import Authority

PREPARE_LEFT: Final = 30 * certs.DAY
ACTIVATE_LEFT: Final = 7 * certs.DAY
SPREAD_S: Final = 600  # over which what hangs from a tainted authority is renewed, unless said otherwise
ROTATED: Final[tuple[Kind, ...]] = ("intermediate", "records", "policy")  # by time
RECORD_KEYS: Final[tuple[Kind, ...]] = ("records", "policy")
SLACK_S: Final = 60  # a manifest's times are whole seconds of a clock that may be set


@contextmanager
def changing(authority: Authority, now: float) -> Iterator[None]:
    """One change at a time, from the newest state, whichever process makes it."""
    fd = os.open(authority.directory / "authority.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        authority.refresh(now)
        yield
    finally:
        os.close(fd)


def prepare(authority: Authority, kind: Kind, now: float) -> Member:
    """Make the successor of the active member of a kind and publish it; it does not sign yet.

    Raises Conflict ``authority.prepared`` when there is one, BadState ``ca.root_offline`` without the root's key.
    """
    ring = authority.ring
    if (there := ring.prepared(kind)) is not None:
        raise Conflict(
            "authority.prepared", f"{there.name} is prepared already", hint=f"retinue-ca authority activate {kind}"
        )
    if kind in {"root", "intermediate"}:
        _need_root(authority)
    name = ring.new_name(kind)
    authority.keys.destroy(name)  # of a step that was interrupted
    signer = authority.keys.make(name, KEY_TYPES[kind])
    member = Member(name, kind, "prepared", int(now), int(now))
    if kind == "root":
        _prepare_root(authority, member, signer, now)
    elif kind == "intermediate":
        by = ring.active("root").name
        authority.adopt(name, signer, [authority.sign_authority(INTERMEDIATE, signer, now, by)])
    else:
        authority.ring = ring.put(member)
        authority.adopt(name, signer, authority.chain(ring.active(kind).name))  # replaced by `certify`
        authority.certify(name, now)
    authority.save(ring.put(member))
    return member


def _prepare_root(authority: Authority, member: Member, signer: Signer, now: float) -> None:
    """The new root, the old one's word on it, and its word on every old one, so that either is found from the other."""
    from identity.keys import write_file

    cert = authority.sign_authority(ROOT, signer, now, None)
    authority.adopt(member.name, signer, [cert])
    active = authority.ring.active("root").name
    links = [
        authority.sign_authority(LINK, signer, now, active),
        authority.sign_authority(LINK, authority.signer(active), now, member.name),
    ]
    text = "".join(certs.pem(link) for link in links)
    write_file(authority.directory / f"{member.name}.links.pem", text.encode())


def activate(authority: Authority, kind: Kind, now: float) -> Member:
    """Let the prepared member sign; the one before is old. With a root comes an intermediate below it.

    Raises Conflict ``authority.not_prepared``.
    """
    ring = authority.ring
    coming = ring.prepared(kind)
    if coming is None:
        raise Conflict(
            "authority.not_prepared", f"no {kind} is prepared", hint=f"first: retinue-ca authority prepare {kind}"
        )
    changed = [replace(coming, state="active", since=int(now))]
    changed.append(replace(ring.active(kind), state="old", since=int(now)))
    if kind == "root":
        # What was prepared under the old root would not do any more.
        waiting = ring.prepared("intermediate")
        if waiting is not None:
            ring = ring.without(waiting.name)
        name = ring.new_name("intermediate")
        authority.keys.destroy(name)
        signer = authority.keys.make(name, KEY_TYPES["intermediate"])
        authority.adopt(name, signer, [authority.sign_authority(INTERMEDIATE, signer, now, coming.name)])
        changed.append(Member(name, "intermediate", "active", int(now), int(now)))
        changed.append(replace(ring.active("intermediate"), state="old", since=int(now)))
    authority.save(ring.put(*changed))
    settle(authority, now)
    return authority.ring.get(coming.name)


def taint(authority: Authority, name: str, now: float, spread: int = SPREAD_S) -> Member:
    """Have everything below an authority renewed within `spread` seconds, each at a moment of its own.

    Raises Conflict ``authority.state`` for one that still signs, BadInput ``authority.kind`` for a record key.
    """
    member = authority.ring.get(name)
    if member.kind not in {"root", "intermediate"}:
        raise BadInput(
            "authority.kind", f"{name} is a record key: nothing below it is renewed by others",
            hint=f"retinue-ca authority revoke {name}",
        )  # fmt: skip
    if member.state == "tainted":
        return member
    if member.state != "old":
        raise _wrong_state(member, "tainted")
    changed = replace(member, state="tainted", since=int(now), until=int(now) + max(1, spread))
    authority.save(authority.ring.put(changed))
    return changed


def revoke(authority: Authority, name: str, now: float, *, compromised: bool = False) -> Member:
    """Refuse a member everywhere from now on, and destroy its key here. Idempotent.

    A revoked root still vouches for its successor, so that a machine that was away finds its way; not when it is
    `compromised`, because then others can make it vouch for anything.
    Raises Conflict ``authority.state`` for one that still signs.
    """
    member = authority.ring.get(name)
    if member.state == "revoked":
        return member
    if member.state == "active":
        raise _wrong_state(member, "revoked")
    cert = authority.certificate(name)
    changed = [replace(member, state="revoked", since=int(now), key=spki_hash(cert), ends=certs.not_after(cert), until=0)]
    if member.kind == "root":
        below = [m for m in authority.ring.of("intermediate", GOOD) if authority.certificate(m.name).issuer == cert.subject]
        if any(m.state == "active" for m in below):
            raise _wrong_state(member, "revoked")
        for one in below:
            under = authority.certificate(one.name)
            changed.append(
                replace(one, state="revoked", since=int(now), key=spki_hash(under), ends=certs.not_after(under), until=0)
            )
    authority.save(authority.ring.put(*changed))
    if member.kind == "root" and compromised:
        _drop_links(authority, cert)
    for one in changed:
        authority.forget(one.name)
    return changed[0]


def _drop_links(authority: Authority, cert: x509.Certificate) -> None:
    """Its word on others counts for nothing now, nor does theirs on it."""
    from identity.keys import write_file

    for member in authority.ring.of("root"):
        path = authority.directory / f"{member.name}.links.pem"
        if path.exists():
            links = certs.parse_chain(path.read_text("ascii"))
            kept = [c for c in links if cert.subject not in {c.subject, c.issuer}]
            if kept:
                write_file(path, "".join(map(certs.pem, kept)).encode())
            else:
                path.unlink()


def settle(authority: Authority, now: float) -> bool:
    """Every good record key has a certificate under the intermediate that issues, with at least half of its life left."""
    changed = False
    issuer = authority.intermediate
    if certs.not_after(issuer) <= now:
        return False
    for kind in RECORD_KEYS:
        for member in authority.ring.of(kind, GOOD):
            chain = authority.chain(member.name)
            if chain[1] != issuer or (member.state != "old" and now >= _middle(chain[0])):
                authority.certify(member.name, now)
                changed = True
    return changed


def by_time(authority: Authority, now: float) -> bool:
    """The steps that are due. True when what is published changed."""
    with changing(authority, now):
        before = authority.ring
        for kind in ROTATED:
            _advance(authority, kind, now)
        changed = settle(authority, now)
        for member in authority.ring.members:
            if _over(authority, member, now):
                authority.save(authority.ring.without(member.name))
                authority.forget(member.name)
                (authority.directory / f"{member.name}.links.pem").unlink(missing_ok=True)
        return changed or authority.ring != before


def _advance(authority: Authority, kind: Kind, now: float) -> None:
    start, end = life(authority, authority.ring.active(kind))
    left, whole = end - now, end - start
    try:
        if left <= min(whole / 2, PREPARE_LEFT) and authority.ring.prepared(kind) is None:
            prepare(authority, kind, now)
        if left <= min(whole / 6, ACTIVATE_LEFT) and authority.ring.prepared(kind) is not None:
            activate(authority, kind, now)
    except RetinueError as e:
        # Without the root's key there is no successor: said by `doctor` and `authority show`, and tried again.
        if e.code not in {"ca.root_offline", "ca.intermediate_expired"}:
            raise


def life(authority: Authority, member: Member) -> tuple[int, int]:
    """From when until when a member is of use: its certificate's life; a record key's own, which certificates follow."""
    if KEY_TYPES[member.kind] == "ed25519":
        return member.made, member.made + authority.lifetimes.record_key
    cert = authority.certificate(member.name)
    return certs.not_before(cert), certs.not_after(cert)


def _over(authority: Authority, member: Member, now: float) -> bool:
    if member.state == "revoked":
        return member.ends + SLACK_S < now
    if member.state == "old" and member.kind in RECORD_KEYS:
        # Everything was signed anew when it became old; whoever was away that long gets a fresh set anyhow.
        return member.since + authority.lifetimes.signer < now
    if member.state in {"old", "tainted"}:
        return certs.not_after(authority.certificate(member.name)) + SLACK_S < now
    return False


def _middle(cert: x509.Certificate) -> float:
    return (certs.not_before(cert) + certs.not_after(cert)) / 2


def _need_root(authority: Authority) -> None:
    name = authority.ring.active("root").name
    if not authority.keys.has(name):
        raise BadState(
            "ca.root_offline", f"the key of {name} is not here",
            hint=f"bring {name}.key back to the CA directory for this step",
        )  # fmt: skip


def _wrong_state(member: Member, wanted: str) -> Conflict:
    return Conflict(
        "authority.state", f"{member.name} is {member.state} and cannot be {wanted}",
        hint=f"first let another sign: retinue-ca authority prepare {member.kind}, then activate",
    )  # fmt: skip
