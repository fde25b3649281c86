"""Coming back: how a machine whose certificate is of no use any more proves that it is the one that enrolled.

It signs with its enrolment key and answers with its tunnel key over one transcript, which names what both ends exchanged,
the certificate the server showed, and the newest certificate this machine holds: two machines that use one copied state
cannot both know the newest for long. The labels differ from those of enrolment, so neither proof is ever the other.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from identity.errors import NotVerified

_TRANSCRIPT: Final = b"retinue return v1 transcript"
_TUNNEL_PROOF: Final = b"retinue return v1 tunnel key"
_ENROLL_PROOF: Final = b"retinue return v1 enrol key\0"


@dataclass(frozen=True, slots=True)
class Return:
    """Everything one attempt says. Byte strings are raw; `csr` is the PEM as sent; `serial` hex of the newest
    certificate held; `server_leaf` the DER of the TLS certificate the server showed.
    """

    endpoint: str
    serial: str
    nonce: bytes
    server_leaf: bytes
    server_key: bytes  # ephemeral X25519
    csr: str
    tunnel_key: bytes  # X25519
    enroll_key: bytes  # Ed25519
    underlay: Sequence[str]
    ciphers: Sequence[str]


def transcript(said: Return) -> bytes:
    """SHA-256 over every field, each with its length before it."""
    digest = hashlib.sha256()
    packed = [b"".join(len(i).to_bytes(4, "big") + i for i in map(str.encode, part)) for part in (said.underlay, said.ciphers)]
    fields = (
        _TRANSCRIPT, said.endpoint.encode(), said.serial.encode(), said.nonce, hashlib.sha256(said.server_leaf).digest(),
        said.server_key, hashlib.sha256(said.csr.encode()).digest(), said.tunnel_key, said.enroll_key, *packed,
    )  # fmt: skip
    for one in fields:
        digest.update(len(one).to_bytes(4, "big") + one)
    return digest.digest()


def prove(said: Return, tunnel: X25519PrivateKey, enroll: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """The proofs of the tunnel key (32 bytes) and of the enrolment key (64 bytes). Raises NotVerified for a bad server key."""
    digest = transcript(said)
    return _mac(tunnel, said.server_key, said.nonce, digest), enroll.sign(_ENROLL_PROOF + digest)


def check(said: Return, tunnel_proof: bytes, enroll_proof: bytes, server: X25519PrivateKey) -> None:
    """Raises NotVerified ``recover.refused``; the same for every reason."""
    digest = transcript(said)
    try:
        Ed25519PublicKey.from_public_bytes(said.enroll_key).verify(enroll_proof, _ENROLL_PROOF + digest)
        fits = hmac.compare_digest(_mac(server, said.tunnel_key, said.nonce, digest), tunnel_proof)
    except (InvalidSignature, ValueError, NotVerified):
        fits = False
    if not fits:
        raise refused()


def refused() -> NotVerified:
    """The one answer to an unknown endpoint and to a wrong proof."""
    return NotVerified(
        "recover.refused", "the request does not prove that it is an endpoint of this trust domain",
        hint="enrol again: retinue-ca token create --host NAME --replace",
    )  # fmt: skip


def _mac(mine: X25519PrivateKey, theirs: bytes, nonce: bytes, digest: bytes) -> bytes:
    try:
        shared = mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise refused() from None
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=nonce, info=_TUNNEL_PROOF).derive(shared)
    return hmac.digest(key, digest, "sha256")
