"""Signing behind one small interface: a key signs exact bytes, here a key file, later another process or PKCS#11.

A certificate is first signed with a throw-away key of the same kind and linted; the real key then signs exactly those
linted bytes, so what was checked is what is issued.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from identity.certs import Profile, PublicKey, lint
from identity.errors import BadState, Bug
from identity.keys import load_private, private_pem, write_secret
from identity.names import TrustDomain

_SEQUENCE, _BIT_STRING = 0x30, 0x03  # DER tags, X.690


class Signer(Protocol):
    """A private key that signs and is never seen."""

    @property
    def public_key(self) -> PublicKey:
        """The public half: P-256, P-384 or Ed25519."""

    def sign(self, data: bytes, /) -> bytes:
        """ECDSA (DER, SHA-256 for P-256, SHA-384 for P-384) or Ed25519 (64 bytes) over `data`."""


@runtime_checkable
class CertificateSigner(Protocol):
    """A signer that wants to know what it signs: another process, with a linter of its own."""

    def sign_certificate(self, tbs: bytes, issuer: x509.Certificate | None) -> bytes:
        """ECDSA over a TBSCertificate; `issuer` is None for a root. Raises what the signer answers."""


class FileSigner:
    """A key kept in a 0600 file and in memory."""

    def __init__(self, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"FileSigner({type(self._key).__name__})"

    @classmethod
    def load(cls, path: Path) -> FileSigner:
        """Raises BadState for a missing, readable-by-others or damaged file."""
        key = load_private(path)
        if not isinstance(key, ec.EllipticCurvePrivateKey | Ed25519PrivateKey):
            raise BadState("state.key", f"{path} does not hold a signing key")
        return cls(key)

    @classmethod
    def create(cls, path: Path, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> FileSigner:
        """Store a new key durably, then use it."""
        write_secret(path, private_pem(key))
        return cls(key)

    @property
    def public_key(self) -> PublicKey:
        return self._key.public_key()

    def sign(self, data: bytes, /) -> bytes:
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, ec.ECDSA(_digest(self._key.curve)))


def _digest(curve: ec.EllipticCurve) -> hashes.SHA256 | hashes.SHA384:
    return hashes.SHA384() if isinstance(curve, ec.SECP384R1) else hashes.SHA256()


def sign_certificate(
    builder: x509.CertificateBuilder, signer: Signer, profile: Profile,
    *, issuer: x509.Certificate | None, trust_domain: TrustDomain, announce: Callable[[x509.Certificate], None],
) -> x509.Certificate:  # fmt: skip
    """Lint what is to be signed, announce it, sign exactly that, check the result. `issuer` is None for a root.

    `announce` gets the draft (its signature is void) and stores its serial; when it raises, nothing is signed.

    Raises Bug ``cert.lint`` when the profile is broken and Bug ``cert.signature`` when the signer's answer does not
    hold under the issuer's key.
    """
    public = signer.public_key
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise Bug("cert.signer", "certificates are signed with P-256 or P-384 keys")
    draft = builder.sign(ec.generate_private_key(public.curve), _digest(public.curve))
    lint(draft, profile, issuer=issuer, trust_domain=trust_domain)
    announce(draft)
    tbs = draft.tbs_certificate_bytes
    signature = signer.sign_certificate(tbs, issuer) if isinstance(signer, CertificateSigner) else signer.sign(tbs)
    cert = x509.load_der_x509_certificate(_assemble(tbs, draft.public_bytes(Encoding.DER), signature))
    try:
        cert.verify_directly_issued_by(cert if issuer is None else issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise Bug("cert.signature", "the signer answered with a signature that does not hold") from None
    return cert


def draft_of(tbs: bytes, public: ec.EllipticCurvePublicKey) -> bytes:
    """A TBSCertificate as a certificate (DER) with a void signature, to be read and linted. Raises ValueError."""
    if len(tbs) < 8 or tbs[0] != _SEQUENCE:
        raise ValueError("not a TBSCertificate")
    oid = bytes.fromhex("06082a8648ce3d0403") + (b"\x03" if isinstance(public.curve, ec.SECP384R1) else b"\x02")
    return _tlv(_SEQUENCE, tbs + _tlv(_SEQUENCE, oid) + _tlv(_BIT_STRING, b"\0" + _tlv(_SEQUENCE, b"\x02\x01\x01" * 2)))


def _assemble(tbs: bytes, draft: bytes, signature: bytes) -> bytes:
    """Certificate ::= SEQUENCE { tbs, algorithm, BIT STRING } (RFC 5280 section 4.1), the algorithm as in the draft."""
    rest = draft[draft.index(tbs) + len(tbs) :]
    algorithm = rest[: 2 + rest[1]]  # a short identifier: its length is one byte
    return _tlv(_SEQUENCE, tbs + algorithm + _tlv(_BIT_STRING, b"\0" + signature))


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 128:
        return bytes([tag, size]) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + value
