"""Who is calling: from a client certificate or a bearer token to a configured caller. Unknown is unknown, without a why."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway import federation
from gateway.config import Caller
from gateway.federation import Bundles
from identity.bundle import TrustBundle
from identity.certs import Svid, claimed_id
from identity.errors import RetinueError

SCHEME = "bearer "
MAX_TOKEN = 4096  # characters
_SHA256 = hashes.SHA256()


Proof = Literal["spiffe-id", "federated-id", "spki", "token"]


@dataclass(frozen=True, slots=True)
class Proven:
    """A caller and how it proved itself; `consumed`: the Authorization header was ours and must not be forwarded.

    foreign: the identity of another trust domain that the caller stands in for
    """

    caller: Caller
    by: Proof
    consumed: bool
    foreign: Svid | None = None

    @property
    def spiffe_id(self) -> str | None:
        """Of a foreign identity."""
        return str(self.foreign.spiffe_id) if self.foreign is not None else None


def spki_sha256(certificate: x509.Certificate) -> str:
    """SHA-256 (hex) of the DER SubjectPublicKeyInfo (RFC 7469 section 2.4): survives renewal with the same key."""
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def by_token(callers: Sequence[Caller], authorization: str | None) -> Caller | None:
    """The caller whose token this Authorization header carries. Every configured digest is compared, in constant time."""
    if authorization is None or authorization[: len(SCHEME)].lower() != SCHEME:
        return None
    token = authorization[len(SCHEME) :].strip()
    if not token or len(token) > MAX_TOKEN:
        return None
    digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
    found: Caller | None = None
    for caller in callers:
        for known in caller.token_sha256:
            if hmac.compare_digest(digest, known):
                found = caller
    return found


def by_certificate(
    callers: Sequence[Caller], chain: Sequence[bytes], trust: TrustBundle | None, now: float, bundles: Bundles | None = None,
    notes: MutableMapping[str, Any] | None = None,
) -> tuple[Caller, Proof, Svid | None] | None:  # fmt: skip
    """The caller of a client certificate (DER chain, leaf first) whose chain the TLS layer has verified.

    A pinned public key decides by itself. A SPIFFE ID counts only when the chain verifies, here and again, as an SVID of
    the trust domain it names: ours, or one that ours federates with (`bundles`), each under its own roots. What any other
    CA wrote into a certificate is never read as a name. `notes` is told the code of a refusal, for the log.
    """
    if not chain:
        return None
    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        key = spki_sha256(certificates[0])
    except ValueError:
        return None
    for caller in callers:
        if any(hmac.compare_digest(key, known) for known in caller.spki_sha256):
            return caller, "spki", None
    if trust is None or not any(caller.spiffe_id or caller.federated for caller in callers):
        return None
    try:
        if claimed_id(certificates[0]).trust_domain != trust.trust_domain:
            svid = federation.verify(certificates, trust, bundles or {}, now)
            return federation.caller_of(callers, svid), "federated-id", svid
        roots = {root.fingerprint(_SHA256) for root in trust.roots}
        name = str(trust.verify_svid([c for c in certificates if c.fingerprint(_SHA256) not in roots], now).spiffe_id)
    except RetinueError as e:
        if notes is not None:
            notes["refused"] = e.code
        return None
    return next(((c, "spiffe-id", None) for c in callers if name in c.spiffe_id), None)


def identify(
    callers: Sequence[Caller], chain: Sequence[bytes], authorization: str | None, trust: TrustBundle | None, now: float,
    bundles: Bundles | None = None, notes: MutableMapping[str, Any] | None = None,
) -> Proven | None:  # fmt: skip
    """Certificate first, then token. A token of ours is consumed even when the certificate decided."""
    token = by_token(callers, authorization)
    certificate = by_certificate(callers, chain, trust, now, bundles, notes)
    if certificate is not None:
        return Proven(certificate[0], certificate[1], token is not None, certificate[2])
    return Proven(token, "token", True) if token is not None else None
