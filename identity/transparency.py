"""What stands in the transparency log, and what an endpoint remembers of it.

The log is a Merkle tree (identity/merkle.py) over every certificate, JWT-SVID, signed record and administrative act. Its leaves:

    record       ``record`` 0x00 envelope           whoever holds the envelope can make the leaf
    certificate  ``certificate`` 0x00 JSON          of issuer, serial, profile, spiffe_id, spki, not_after: from the certificate
    JWT-SVID     ``jwt`` 0x00 JSON                  of kid, spiffe_id, audience, issued, expires, sha256: from the token
    act          ``act`` 0x00 JSON                  of at, actor, action, subject, outcome, detail

JSON is with sorted keys and no spaces. A certificate is logged before it is signed (its serial is reserved in the same
transaction), a record in the transaction that publishes it, a token before anybody has it, without its signature, which
is what makes it a secret. Places in the tree are given out with the next head, at most one heartbeat later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from cryptography import x509

from identity import certs
from identity.errors import NotVerified
from identity.merkle import leaf_hash, verify_consistency
from identity.records import Count, Payload, Seconds

CERTIFICATE_FIELDS: Final = ("issuer", "serial", "profile", "spiffe_id", "spki", "not_after")
JWT_FIELDS: Final = ("kid", "spiffe_id", "audience", "issued", "expires", "sha256")


class TreeHead(Payload):
    """The state of the log: `root` (lower hex) over the first `size` leaves. Within one timeline it only grows."""

    typ: ClassVar[str] = "tree-head"
    role: ClassVar[str] = "records"

    timeline: str
    size: Count
    root: str
    time: Seconds


def record_leaf(envelope: str) -> bytes:
    """The leaf hash of a signed record."""
    return leaf_hash(b"record\0" + envelope.encode())


def certificate_leaf(about: Mapping[str, Any]) -> bytes:
    """The leaf hash of a certificate, from CERTIFICATE_FIELDS."""
    return leaf_hash(b"certificate\0" + canonical({k: about[k] for k in CERTIFICATE_FIELDS}).encode())


def about_certificate(leaf: x509.Certificate, profile: str) -> dict[str, Any]:
    """CERTIFICATE_FIELDS of a certificate of ours. Raises NotVerified for one without a SPIFFE ID."""
    named = certs.revocation_id(leaf)
    uris = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = uris.get_values_for_type(x509.UniformResourceIdentifier)
    if len(found) != 1:
        raise NotVerified("cert.uri", "the certificate does not name one SPIFFE ID")
    return {
        "issuer": named.issuer, "serial": f"{named.serial:x}", "profile": profile, "spiffe_id": found[0],
        "spki": named.spki, "not_after": certs.not_after(leaf),
    }  # fmt: skip


def jwt_leaf(about: Mapping[str, Any]) -> bytes:
    """The leaf hash of a JWT-SVID, from JWT_FIELDS (identity.jwt.about): whoever holds the token can make it."""
    return leaf_hash(b"jwt\0" + canonical({k: about[k] for k in JWT_FIELDS}).encode())


def act_leaf(at: int, actor: str, action: str, subject: str, outcome: str, detail: str) -> bytes:
    """The leaf hash of an act; `detail` is JSON text as stored."""
    return leaf_hash(b"act\0" + canonical([at, actor, action, subject, outcome, detail]).encode())


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest head that an endpoint or a monitor accepted. A new one has to continue it."""

    timeline: str
    size: int
    root: str

    @classmethod
    def of(cls, head: TreeHead) -> Seen:
        return cls(head.timeline, head.size, head.root)


def follow(seen: Seen | None, head: TreeHead, path: Sequence[bytes]) -> Seen:
    """The head to remember after a verified `head`. Raises NotVerified ``log.fork`` when it does not continue `seen`.

    The first head is taken as it is. A new timeline (a CA restored from a backup) begins anew: the caller says so aloud.
    """
    if seen is None or seen.timeline != head.timeline:
        return Seen.of(head)
    try:
        old, new = bytes.fromhex(seen.root), bytes.fromhex(head.root)
    except ValueError:
        raise NotVerified("log.head", "the head of the transparency log is not well formed") from None
    if head.size < seen.size:
        # An older head of the same history is no fork, and no news: a process that lags has it.
        verify_consistency(head.size, new, seen.size, old, path)
        return seen
    verify_consistency(seen.size, old, head.size, new, path)
    return Seen.of(head)
