"""Joining with a certificate that this machine was given by somebody else (attestor x509pop)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from identity import certs
from identity.device import ATTESTOR, DeviceKey, prove_device
from identity.enrollment import FINGERPRINT, JoinToken, Offer
from identity.errors import BadInput
from identity.keys import b64
from identity.wire.enroll import EnrollRequest


@dataclass(frozen=True, slots=True)
class Device:
    """A certificate with its issuers, leaf first, and its key."""

    chain: tuple[x509.Certificate, ...]
    key: DeviceKey = field(repr=False)

    def onto(self, request: EnrollRequest, offer: Offer) -> EnrollRequest:
        """The request with the device's proof of the offer. Raises BadInput ``device.key``."""
        return request.model_copy(update={
            "attestor": ATTESTOR, "device_chain": [certs.pem(c) for c in self.chain],
            "device_proof": b64(prove_device(offer, self.chain[0], self.key)),
        })  # fmt: skip


def device_pin(root_fingerprint: str) -> str:
    """What stands in for a token's text: it pins the root. Raises BadInput ``root.fingerprint``."""
    if not FINGERPRINT.fullmatch(root_fingerprint):
        raise BadInput("root.fingerprint", "not a fingerprint: 64 hexadecimal digits", hint="retinue-ca info prints it")
    return JoinToken(ATTESTOR, os.urandom(32), root_fingerprint).format()


def load_device(chain: Path, key: Path) -> Device:
    """Read a device certificate with its issuers, and its key (PEM). Raises BadInput ``device.file``."""
    try:
        certificates = tuple(x509.load_pem_x509_certificates(chain.read_bytes()))
        private = load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as e:
        why = getattr(e, "strerror", None) or "not PEM"
        raise BadInput("device.file", f"cannot use {chain} with {key}: {why}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey | Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise BadInput("device.file", f"{key} holds a kind of key that is not used here")
    return Device(certificates, private)
