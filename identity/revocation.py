"""Block lists: which certificates and keys are out although their time is not over.

Each entry is one line of text, three kinds:

    key:SPKI                   any certificate over this key (SHA-256 of the SubjectPublicKeyInfo, hex), authorities too
    serial:ISSUER:SERIAL       one certificate: its authority key identifier and its serial number, both hex
    id:BEFORE:SPIFFE-ID        every certificate of this identity that was made before a time (seconds since the epoch)

None names a digest of a whole certificate: an ECDSA signature (r, s) has the twin (r, n - s), so one certificate has two
such digests and a list of digests is evaded by turning one into the other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from identity import certs
from identity.errors import BadInput, NotVerified
from identity.names import SpiffeId

MAX_ENTRIES: Final = 2048
MAX_ENTRY: Final = 2100  # bytes: a SPIFFE ID has at most 2048

_KEY: Final = re.compile(r"key:([0-9a-f]{64})")
_SERIAL: Final = re.compile(r"serial:([0-9a-f]{2,128}):([0-9a-f]{1,40})")
_ID: Final = re.compile(r"id:([0-9]{1,12}):(spiffe://.+)")


def spki_hash(cert: x509.Certificate) -> str:
    """SHA-256 of a certificate's SubjectPublicKeyInfo, hex."""
    return hashlib.sha256(cert.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def key_entry(cert: x509.Certificate) -> str:
    """Blocks the certificate's key, and with an authority everything below it."""
    return f"key:{spki_hash(cert)}"


def serial_entry(issuer: str, serial: int | str) -> str:
    """Blocks one certificate. `issuer` is the authority key identifier, hex; `serial` a number or its hex."""
    return f"serial:{issuer}:{serial if isinstance(serial, str) else format(serial, 'x')}"


def id_entry(spiffe_id: SpiffeId | str, before: int) -> str:
    """Blocks what an identity was given before a time."""
    return f"id:{before}:{spiffe_id}"


@dataclass(frozen=True, slots=True)
class BlockList:
    """Parsed entries; empty by default."""

    keys: frozenset[str] = frozenset()
    serials: frozenset[tuple[str, int]] = frozenset()
    identities: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, entries: Iterable[str]) -> BlockList:
        """Raises BadInput ``revocation.form``: an entry that is not understood may not be passed over."""
        keys: set[str] = set()
        serials: set[tuple[str, int]] = set()
        identities: dict[str, int] = {}
        for number, text in enumerate(entries):
            if number >= MAX_ENTRIES:
                raise BadInput("revocation.many", f"a block list has at most {MAX_ENTRIES} entries")
            if found := _KEY.fullmatch(text):
                keys.add(found[1])
            elif found := _SERIAL.fullmatch(text):
                serials.add((found[1], int(found[2], 16)))
            elif (found := _ID.fullmatch(text)) and len(text) <= MAX_ENTRY:
                name = str(SpiffeId.parse(found[2]))
                identities[name] = max(identities.get(name, 0), int(found[1]))
            else:
                raise BadInput("revocation.form", f"not an entry of a block list: {ascii(text)[:80]}")
        return cls(frozenset(keys), frozenset(serials), identities)

    def __bool__(self) -> bool:
        return bool(self.keys or self.serials or self.identities)

    def union(self, other: BlockList) -> BlockList:
        """Blocks what either blocks."""
        both = dict(self.identities)
        for name, before in other.identities.items():
            both[name] = max(both.get(name, 0), before)
        return BlockList(self.keys | other.keys, self.serials | other.serials, both)

    def check(self, path: Sequence[x509.Certificate], spiffe_id: SpiffeId | None = None) -> None:
        """Is no certificate of a verified path (leaf first) blocked? Raises NotVerified ``cert.revoked``."""
        if self:
            self.check_named([certs.revocation_id(cert) for cert in path], spiffe_id, certs.not_before(path[0]))

    def check_named(self, path: Sequence[certs.RevocationId], spiffe_id: SpiffeId | None, issued: int) -> None:
        """The same by what names the certificates of a path; `issued` is when the leaf begins, in seconds since the epoch."""
        for named in path:
            if named.spki in self.keys:
                raise NotVerified("cert.revoked", "a key in the certificate chain was revoked")
            if (named.issuer, named.serial) in self.serials:
                raise NotVerified("cert.revoked", "a certificate in the chain was revoked")
        if spiffe_id is not None and issued < self.identities.get(str(spiffe_id), 0):
            raise NotVerified("cert.revoked", f"what {spiffe_id} was given before was revoked")
