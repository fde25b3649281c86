"""Joining: the token text, the transcript and its three proofs, one implementation for both ends.

The token's secret is the seed of an Ed25519 key of which the CA keeps the public half only; it never travels. All
proofs are over one transcript that names everything the two ends exchanged, with the certificate the server showed in
it, so no proof is worth anything on another connection, for another key or for another token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from identity.errors import BadInput, NotVerified
from identity.keys import b64, ed25519_public, unb64

TOKEN_PREFIX: Final = "rt1"
SECRET_LEN: Final = 32
NONCE_LEN: Final = 32
TOKEN_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
MAX_TOKEN: Final = 256

# One label a purpose, so a proof of one kind is never one of another (domain separation).
_TRANSCRIPT: Final = b"retinue enrol v1 transcript"
_TOKEN_PROOF: Final = b"retinue enrol v1 token\0"
_TUNNEL_PROOF: Final = b"retinue enrol v1 tunnel key"
_ENROLL_PROOF: Final = b"retinue enrol v1 enrol key\0"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """`rt1.<id>.<secret>.<root fingerprint>`; the secret is not in the repr."""

    id: str
    secret: bytes = field(repr=False)
    root_fingerprint: str

    def __str__(self) -> str:
        # Only `format` shows the secret; a token in a log line does not.
        return f"{TOKEN_PREFIX}.{self.id}.***"

    def format(self) -> str:
        """The text handed to the machine that joins. It is a secret."""
        return f"{TOKEN_PREFIX}.{self.id}.{b64(self.secret)}.{self.root_fingerprint}"

    @property
    def key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.secret)

    @property
    def public_key(self) -> bytes:
        """What the CA stores, 32 bytes."""
        return ed25519_public(self.key)

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Parse a token as pasted or read from a file (surrounding white space is dropped).

        Raises BadInput ``token.malformed``; the message never repeats the text.
        """
        parts = text.strip().split(".") if isinstance(text, str) and len(text) <= MAX_TOKEN else []
        try:
            if len(parts) != 4 or parts[0] != TOKEN_PREFIX:
                raise BadInput("token.malformed", "")
            if not TOKEN_ID.fullmatch(parts[1]) or not FINGERPRINT.fullmatch(parts[3]):
                raise BadInput("token.malformed", "")
            return cls(parts[1], unb64(parts[2], length=SECRET_LEN), parts[3])
        except BadInput:
            raise BadInput(
                "token.malformed", "this is not a join token",
                hint="a token is one line, rt1.ID.SECRET.FINGERPRINT; make one with: retinue-ca token create",
            ) from None  # fmt: skip


@dataclass(frozen=True, slots=True)
class Offer:
    """Everything one enrolment attempt says, before it is proved. Byte strings are raw; `csr` is the PEM as sent.

    `server_leaf` is the DER of the TLS certificate the server showed (client: saw; server: had when it made the nonce).
    """

    token_id: str
    nonce: bytes
    server_leaf: bytes
    server_key: bytes  # ephemeral X25519
    csr: str
    tunnel_key: bytes  # X25519
    enroll_key: bytes  # Ed25519
    underlay: Sequence[str]
    ciphers: Sequence[str]


def transcript(offer: Offer) -> bytes:
    """SHA-256 over every field, each with its length before it, so that no two offers share one input."""
    digest = hashlib.sha256()
    fields = (
        _TRANSCRIPT, offer.token_id.encode(), offer.nonce, hashlib.sha256(offer.server_leaf).digest(), offer.server_key,
        hashlib.sha256(offer.csr.encode()).digest(), offer.tunnel_key, offer.enroll_key,
        _packed(offer.underlay), _packed(offer.ciphers),
    )  # fmt: skip
    for one in fields:
        digest.update(len(one).to_bytes(4, "big") + one)
    return digest.digest()


def _packed(items: Sequence[str]) -> bytes:
    encoded = [item.encode() for item in items]
    return b"".join(len(one).to_bytes(4, "big") + one for one in encoded)


@dataclass(frozen=True, slots=True)
class Proofs:
    """Raw bytes: an Ed25519 signature under the token's key, a MAC by the tunnel key, a signature by the enrol key."""

    token: bytes
    tunnel: bytes
    enroll: bytes


def prove(offer: Offer, token: JoinToken, tunnel: X25519PrivateKey, enroll: Ed25519PrivateKey) -> Proofs:
    """The joining side's proofs. Raises NotVerified when the server's ephemeral key is not a usable one."""
    said = transcript(offer)
    return Proofs(
        token=token.key.sign(_TOKEN_PROOF + said),
        tunnel=_tunnel_mac(tunnel, offer.server_key, offer.nonce, said),
        enroll=enroll.sign(_ENROLL_PROOF + said),
    )


def check_token(offer: Offer, proofs: Proofs, token_public: bytes) -> None:
    """Raises NotVerified ``token.refused``."""
    if not _signed(token_public, proofs.token, _TOKEN_PROOF + transcript(offer)):
        raise refused()


def check_keys(offer: Offer, proofs: Proofs, server: X25519PrivateKey) -> None:
    """Possession of the tunnel key and of the enrol key. `server` is the private half of `offer.server_key`.

    Raises NotVerified ``enroll.tunnel_proof`` or ``enroll.key_proof``.
    """
    said = transcript(offer)
    expected = _tunnel_mac(server, offer.tunnel_key, offer.nonce, said)
    if not hmac.compare_digest(expected, proofs.tunnel):
        raise NotVerified("enroll.tunnel_proof", "the request does not prove that it holds the tunnel key")
    if not _signed(offer.enroll_key, proofs.enroll, _ENROLL_PROOF + said):
        raise NotVerified("enroll.key_proof", "the request does not prove that it holds the enrolment key")


def refused() -> NotVerified:
    """The one answer to an unknown token and to a wrong proof: a caller who cannot prove learns nothing."""
    return NotVerified(
        "token.refused", "the join token was not accepted",
        hint="make a new one with: retinue-ca token create",
    )  # fmt: skip


def _signed(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _tunnel_mac(mine: X25519PrivateKey, theirs: bytes, nonce: bytes, said: bytes) -> bytes:
    """HMAC-SHA256 under HKDF-SHA256 of the shared secret: only the holder of either private key can make it."""
    try:
        shared = mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise NotVerified("enroll.tunnel_proof", "a key of the tunnel proof is not usable") from None
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=nonce, info=_TUNNEL_PROOF).derive(shared)
    return hmac.digest(key, said, "sha256")
