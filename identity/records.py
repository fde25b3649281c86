"""Signed records: the envelope and the payloads of everything that is not an X.509 certificate.

Envelope (compact JWS shape, RFC 7515 section 7.1): ``b64(header).b64(payload).b64(signature)``. The header of a type
is a constant, so it is compared, never parsed; the algorithm is pinned to EdDSA (Ed25519, RFC 8032); the signature
covers the exact bytes; the payload is parsed only after it held. Unknown fields are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal, Protocol, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from identity.errors import BadInput, NotVerified
from identity.grown import Grown
from identity.keys import b64, unb64

RECORD_VERSION: Final = 1
SIGNATURE_LEN: Final = 64

# Our limits, bytes of the whole envelope.
MAX_SMALL: Final = 16 * 1024
MAX_BUNDLE: Final = 512 * 1024
MAX_POLICY: Final = 12 * 1024 * 1024

Seconds = Annotated[int, Field(ge=0, le=1 << 40)]  # seconds since the epoch, UTC
Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]


class Payload(BaseModel):
    """Base of the record payloads. `typ` names the type in the protected header; `role` the key that may sign it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    typ: ClassVar[str]
    role: ClassVar[str]
    limit: ClassVar[int] = MAX_SMALL

    trust_domain: str


class EndpointRecord(Payload):
    """Which tunnel key an endpoint has. `underlay` are ``address:port`` hints, IPv6 in brackets."""

    typ: ClassVar[str] = "endpoint"
    role: ClassVar[str] = "records"

    endpoint: str
    kind: Literal["host", "sidecar"]
    tunnel_key: str  # canonical X25519, b64
    underlay: list[str] = Field(max_length=16)
    ciphers: list[Literal["chacha20poly1305", "aes-256-gcm"]] = Field(max_length=2)
    generation: Count
    issued: Seconds
    expires: Seconds


class PlacementRecord(Payload, Grown):
    """Where one instance of an identity is now, and the tunnel key that may speak for its addresses.

    state: ``prepare`` (a move to `endpoint` is being made ready; nothing may be accepted from it yet),
    ``active``, or ``revoked`` (nobody holds it). Receivers keep the highest epoch and refuse lower ones for ever.
    """

    later: ClassVar[frozenset[str]] = frozenset({"ends"})
    typ: ClassVar[str] = "placement"
    role: ClassVar[str] = "records"

    spiffe_id: str
    name: str
    instance: Count
    endpoint: str
    tunnel_key: str
    epoch: Annotated[int, Field(ge=1, le=(1 << 63) - 1)]
    state: Literal["prepare", "active", "revoked"]
    addresses: list[str] = Field(min_length=2, max_length=2)  # [IPv4, IPv6]
    labels: dict[str, str]
    fence: Literal["available", "strict"] = "available"
    issued: Seconds
    ends: Seconds | None = None  # from then on nobody holds it, whether or not a newer record says so


class PolicyFile(BaseModel):
    """One source file of a policy bundle."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    name: str
    text: str


class PolicyTrial(BaseModel):
    """Another policy that decides every flow with at least one end in the canary; all other flows stay with the record's own.

    The canary are the identities in `names`, those that carry all of `labels`, or `everybody`. `parts` as in the record.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    id: str = Field(max_length=64)
    digest: str
    files: list[PolicyFile]
    parts: list[str] = []
    names: list[str] = Field(default=[], max_length=20_000)
    labels: dict[str, str] = {}
    everybody: bool = False


class PolicyRecord(Payload, Grown):
    """The policy in force: its source files and the SHA-256 digest that names it.

    authority, parts: what operators signed (identity/records_policy.py), as texts; empty where no authority exists
    trial:            a policy that is being rolled out beside this one
    """

    later: ClassVar[frozenset[str]] = frozenset({"authority", "parts", "trial"})
    typ: ClassVar[str] = "policy"
    role: ClassVar[str] = "policy"
    limit: ClassVar[int] = MAX_POLICY

    revision: Count
    digest: str
    files: list[PolicyFile]
    author: str
    issued: Seconds
    authority: list[str] = Field(default=[], max_length=256)
    parts: list[str] = Field(default=[], max_length=200)
    trial: PolicyTrial | None = None


class Heartbeat(Payload):
    """Freshness of everything: the newest (timeline, revision) at `time`."""

    typ: ClassVar[str] = "heartbeat"
    role: ClassVar[str] = "records"

    timeline: str
    revision: Count
    time: Seconds


class SignerChain(BaseModel):
    """A record-signing key and its certificate chain (leaf first, PEM) to a root of the bundle."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    role: Literal["records", "policy"]
    chain: list[str] = Field(min_length=1, max_length=4)


class JwtAuthority(BaseModel):
    """A P-256 key that signs JWT-SVIDs, by its coordinates (b64, 32 bytes each)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    kid: str = Field(min_length=1, max_length=64)
    x: str = Field(max_length=43)
    y: str = Field(max_length=43)


class Taint(BaseModel):
    """An authority on its way out: what hangs from it is renewed at a moment of its own between `since` and `until`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    key: str = Field(pattern=r"^[0-9a-f]{64}$")  # SHA-256 of its SubjectPublicKeyInfo
    since: Seconds
    until: Seconds


class BundleRecord(Payload, Grown):
    """The trust bundle: the roots of one trust domain and the keys that may sign records. `sequence` only grows.

    links: certificates by which one root vouches for another; a root that is new to the receiver needs one from a root
    it knows. revoked: entries of identity.revocation.
    """

    later: ClassVar[frozenset[str]] = frozenset({"jwt_authorities", "links", "tainted", "revoked"})
    typ: ClassVar[str] = "bundle"
    role: ClassVar[str] = "records"
    limit: ClassVar[int] = MAX_BUNDLE

    sequence: Count
    roots: list[str] = Field(min_length=1, max_length=8)  # PEM
    signers: list[SignerChain] = Field(max_length=8)
    issued: Seconds
    jwt_authorities: list[JwtAuthority] = Field(default=[], max_length=8)
    links: list[str] = Field(default=[], max_length=16)  # PEM
    tainted: list[Taint] = Field(default=[], max_length=16)
    revoked: list[str] = Field(default=[], max_length=2048)


class ForeignBundle(Payload):
    """The roots of another trust domain, as our control plane last took them from there; none: all are revoked."""

    typ: ClassVar[str] = "federation"
    role: ClassVar[str] = "records"
    limit: ClassVar[int] = MAX_BUNDLE

    foreign: str
    sequence: Count
    roots: list[str] = Field(max_length=16)  # PEM
    issued: Seconds
    jwt_authorities: list[JwtAuthority] = Field(default=[], max_length=16)


P = TypeVar("P", bound=Payload)


class SignsBytes(Protocol):
    """An Ed25519 key, or what stands before one (ca/signer.py)."""

    def sign(self, data: bytes, /) -> bytes: ...


def header(typ: str) -> bytes:
    """The protected header of a record type, exact bytes."""
    return f'{{"alg":"EdDSA","typ":"retinue-{typ}","v":{RECORD_VERSION}}}'.encode()


def sign(payload: Payload, key: SignsBytes) -> str:
    """Seal a payload. The bytes signed are the bytes sent and stored. Raises BadInput when it would be too large."""
    signed = f"{b64(header(payload.typ))}.{b64(payload.model_dump_json().encode())}"
    envelope = f"{signed}.{b64(key.sign(signed.encode()))}"
    if len(envelope) > payload.limit:
        raise BadInput("record.large", f"a {payload.typ} record of {len(envelope)} bytes; at most {payload.limit}")
    return envelope


def verify(kind: type[P], envelope: str, keys: Sequence[Ed25519PublicKey], *, trust_domain: str) -> P:
    """Check the signature against `keys` (any may match), then parse. Raises NotVerified; never returns unverified data."""
    if not isinstance(envelope, str) or len(envelope) > kind.limit:
        raise NotVerified("record.large", f"a {kind.typ} record is larger than {kind.limit} bytes")
    signed, dot, signature_text = envelope.rpartition(".")
    prefix = b64(header(kind.typ)) + "."
    if not dot or not signed.startswith(prefix):
        raise NotVerified("record.type", f"not a version {RECORD_VERSION} {kind.typ} record")
    try:
        signature = unb64(signature_text, length=SIGNATURE_LEN)
        message = signed.encode("ascii")
    except (BadInput, UnicodeEncodeError):
        raise NotVerified("record.signature", f"the signature of a {kind.typ} record is malformed") from None
    for key in keys:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            continue
        break
    else:
        raise NotVerified("record.signature", f"no {kind.role} key of this trust domain signed this {kind.typ} record")
    return _parse(kind, signed[len(prefix) :], trust_domain)


def unverified(kind: type[P], envelope: str, *, trust_domain: str) -> P:
    """Parse an envelope whose signer is named inside it (a bundle). The caller must `verify` before it believes a word.

    Raises NotVerified.
    """
    prefix = b64(header(kind.typ)) + "."
    if not isinstance(envelope, str) or len(envelope) > kind.limit:
        raise NotVerified("record.large", f"a {kind.typ} record is larger than {kind.limit} bytes")
    signed, dot, _ = envelope.rpartition(".")
    if not dot or not signed.startswith(prefix):
        raise NotVerified("record.type", f"not a version {RECORD_VERSION} {kind.typ} record")
    return _parse(kind, signed[len(prefix) :], trust_domain)


def _parse(kind: type[P], payload_text: str, trust_domain: str) -> P:
    try:
        payload = kind.model_validate_json(unb64(payload_text))
    except (BadInput, ValidationError) as e:
        why = e.errors()[0]["type"] if isinstance(e, ValidationError) else "encoding"
        raise NotVerified("record.schema", f"a signed {kind.typ} record does not fit its schema ({why})") from None
    if payload.trust_domain != trust_domain:
        raise NotVerified("record.trust_domain", f"a {kind.typ} record of another trust domain")
    return payload


def envelope_hash(envelope: str) -> str:
    """SHA-256 of the exact bytes, hex."""
    return hashlib.sha256(envelope.encode()).hexdigest()


def state_hash(objects: dict[str, str]) -> str:
    """SHA-256 over the sorted (key, envelope) pairs: equal on both ends of a feed when they hold the same set."""
    digest = hashlib.sha256()
    for key in sorted(objects):
        digest.update(f"{key}\0{envelope_hash(objects[key])}\n".encode())
    return digest.hexdigest()
