"""A machine proves itself by a certificate that somebody gave it before: its device key signs the enrolment transcript.

The signature also names the device certificate, so it is no proof for another; the transcript names the server's
certificate, the nonce and every new key, so it is no proof on another connection (see identity/enrollment.py).
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from identity.enrollment import Offer, transcript
from identity.errors import BadInput, NotVerified

ATTESTOR: Final = "x509pop"
MAX_INTERMEDIATES: Final = 4
MAX_CHAIN: Final = 32 * 1024  # bytes of PEM
RSA_BITS: Final = (2048, 8192)  # smaller proves nothing, larger is a way to keep the CA busy
_PROOF: Final = b"retinue enrol v1 device key\0"

DeviceKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey | rsa.RSAPrivateKey


def _said(offer: Offer, leaf: x509.Certificate) -> bytes:
    return _PROOF + hashlib.sha256(leaf.public_bytes(Encoding.DER)).digest() + transcript(offer)


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


def prove_device(offer: Offer, leaf: x509.Certificate, key: DeviceKey) -> bytes:
    """ECDSA or RSA-PSS over SHA-256, or Ed25519. Raises BadInput ``device.key`` when the key is not the certificate's."""
    if key.public_key() != leaf.public_key():
        raise BadInput("device.key", "the device key is not the key of the device certificate")
    said = _said(offer, leaf)
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(said)
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(said, _pss(), hashes.SHA256())
    return key.sign(said, ec.ECDSA(hashes.SHA256()))


def check_device(offer: Offer, leaf: x509.Certificate, proof: bytes) -> None:
    """Raises NotVerified ``device.proof``."""
    key, said = leaf.public_key(), _said(offer, leaf)
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(proof, said)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(proof, said, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(proof, said, _pss(), hashes.SHA256())
        else:
            raise NotVerified("device.key", "a kind of device key that is not accepted")
    except InvalidSignature:
        raise NotVerified("device.proof", "the request does not prove that it holds the device key") from None
