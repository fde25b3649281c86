r"""The attestor ``x509pop``: hosts that already hold a device certificate enrol with it, without a token.

x509pop.json in the CA's directory says which authorities' devices may come, and how a device's subject becomes the name of
a host:

    {"roots": "device-ca.pem", "reenroll": false,
     "rules": [{"field": "common-name", "pattern": "node-([a-z0-9]+)", "host": "dev-\\1"}]}

The first rule whose whole pattern matches decides. A device has one host name; whether it may enrol again, with new keys,
is `reenroll`. A lost reply is repeated to the same enrolment key for five minutes, as with a token.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ca.enroll import Granted
from identity.device import MAX_CHAIN, MAX_INTERMEDIATES, RSA_BITS, check_device
from identity.enrollment import Offer, Proofs
from identity.errors import BadInput, BadState, NotVerified, Refused
from identity.keys import b64, unb64
from identity.names import host_name
from identity.wire.enroll import EnrollRequest

FILE: Final = "x509pop.json"
_UNREADABLE: Final = (ValueError, TypeError, x509.InvalidVersion, x509.DuplicateExtension)

Grant = Callable[[str, str, bool], None]  # (token id, host, may it exist): a token nobody else can use


class Rule(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    field: Literal["common-name", "serial-number", "dns", "uri"]
    pattern: str = Field(min_length=1, max_length=512)
    host: str = Field(min_length=1, max_length=128)


class DeviceRules(BaseModel):
    """x509pop.json. `roots`: PEM file, relative to the CA's directory."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    roots: str
    rules: list[Rule] = Field(min_length=1, max_length=64)
    reenroll: bool = False


class DeviceAttestor:
    """Evidence: a device certificate and a signature under its key. `grant` readies the claim."""

    def __init__(self, directory: Path, grant: Grant) -> None:
        self._directory, self._grant = directory, grant

    def attest(self, request: EnrollRequest, offer: Offer, proofs: Proofs, now: float) -> Granted:  # noqa: ARG002 -- the token's proof is none of its evidence
        """Raises NotVerified ``device.*``, Refused ``device.rule``, BadInput ``attestor.unknown`` when it is not set up."""
        rules, roots = self._read()
        chain = _chain(request.device_chain)
        try:
            proof = unb64(request.device_proof)
        except BadInput:
            raise NotVerified("device.proof", "the device's proof cannot be read") from None
        _check_keys(chain)
        _verify(chain, roots, now)
        check_device(offer, chain[0], proof)
        host = _host(rules, chain[0])
        key = chain[0].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        # The same device with the same enrolment key is the same attempt: its reply was lost.
        token_id = "device-" + b64(hashlib.sha256(key + offer.enroll_key).digest())
        self._grant(token_id, host, rules.reenroll)
        return Granted(host, "host", None, token_id)

    def _read(self) -> tuple[DeviceRules, list[x509.Certificate]]:
        path = self._directory / FILE
        try:
            rules = DeviceRules.model_validate_json(path.read_bytes())
            roots = x509.load_pem_x509_certificates((self._directory / rules.roots).read_bytes())
            for rule in rules.rules:
                re.compile(rule.pattern)
        except FileNotFoundError:
            raise BadInput("attestor.unknown", "this CA takes no device certificates", hint="enrol with a token") from None
        except (OSError, ValidationError, re.error, *_UNREADABLE):
            raise BadState("device.rules", f"{path} or its roots cannot be used") from None
        return rules, roots


def _chain(texts: list[str]) -> tuple[x509.Certificate, ...]:
    text = "\n".join(texts)
    if not 1 <= text.count("-----BEGIN") <= 1 + MAX_INTERMEDIATES or len(text) > MAX_CHAIN:
        raise NotVerified("device.chain", f"a device shows one certificate and at most {MAX_INTERMEDIATES} intermediates")
    try:
        chain = tuple(x509.load_pem_x509_certificates(text.encode("ascii")))
        for cert in chain:
            _ = (list(cert.extensions), cert.public_key(), cert.not_valid_after_utc)
    except _UNREADABLE:
        raise NotVerified("device.chain", "the device's certificates cannot be read") from None
    return chain


def _check_keys(chain: tuple[x509.Certificate, ...]) -> None:
    """Before any signature is checked: a large key costs the one who checks."""
    for cert in chain:
        key: Any = cert.public_key()
        if isinstance(key, rsa.RSAPublicKey) and RSA_BITS[0] <= key.key_size <= RSA_BITS[1]:
            continue
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
            continue
        if not isinstance(key, Ed25519PublicKey):
            raise NotVerified("device.key", "a device certificate has a kind or size of key that is not accepted")


def _verify(chain: tuple[x509.Certificate, ...], roots: list[x509.Certificate], now: float) -> None:
    # What a device certificate is for, its maker knows: path, times and signatures are what counts here.
    policy = PolicyBuilder().store(Store(roots)).time(datetime.fromtimestamp(int(now), UTC)).max_chain_depth(MAX_INTERMEDIATES + 1)
    leaves = ExtensionPolicy.permit_all()
    verifier = policy.extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=leaves).build_client_verifier()
    try:
        verifier.verify(chain[0], list(chain[1:]))
    except (VerificationError, *_UNREADABLE):
        raise NotVerified("device.untrusted", "the device's certificate leads to no authority whose devices may enrol") from None


def _host(rules: DeviceRules, leaf: x509.Certificate) -> str:
    for rule in rules.rules:
        for value in _values(leaf, rule.field):
            found = re.fullmatch(rule.pattern, value)
            if found is not None:
                try:
                    return host_name(found.expand(rule.host))
                except (BadInput, re.error, IndexError):
                    break
    raise Refused("device.rule", "no rule of this CA gives that device a host name", hint=f"an administrator writes it into {FILE}")


def _values(leaf: x509.Certificate, field: str) -> list[str]:
    oids = {"common-name": x509.NameOID.COMMON_NAME, "serial-number": x509.NameOID.SERIAL_NUMBER}
    if field in oids:
        # More than one would let a device choose among rules.
        found = [str(a.value) for a in leaf.subject.get_attributes_for_oid(oids[field])]
        return found if len(found) == 1 else []
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    listed = names.get_values_for_type(x509.DNSName if field == "dns" else x509.UniformResourceIdentifier)
    return list(listed) if len(listed) == 1 else []
