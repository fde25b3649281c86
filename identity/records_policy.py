"""Documents that operators sign with keys of their own, outside the CA: who may sign policy, and what they signed.

A document is sealed like a record (identity/records.py), with many signatures over one payload: each covers the exact
bytes ``b64(header).b64(payload)``, so a signature for one type, version or trust domain is worth nothing for another.
Keys are raw Ed25519 public keys in b64. Nothing here decides who may sign what: that is policy/signing.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from identity.errors import BadInput, NotVerified
from identity.keys import b64, unb64
from identity.records import SIGNATURE_LEN, Count, Payload, Seconds, SignsBytes, header

KEY_LEN: Final = 32
MAX_DOCUMENT: Final = 64 * 1024  # characters of a sealed document
MAX_SIGNATURES: Final = 64

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
Hash = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Scope = Annotated[str, Field(max_length=255)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class PolicySigner(_Part):
    """An operator's key and the roles that policy files may call it by (``owners: [role:payments-lead]``)."""

    key: Key
    roles: list[Name] = Field(default=[], max_length=16)


class ScopeSigners(_Part):
    """Who signs for one subtree (the empty scope is the whole mesh), and how many of them it takes."""

    scope: Scope
    signers: list[Name] = Field(min_length=1, max_length=32)
    threshold: int = Field(ge=1, le=20)


class AuthorityDocument(Payload):
    """The policy authority: its root signers, everybody's keys, and who signs for which scope.

    version:  1, 2, ...; `previous` is the hash of the version before (empty for the first)
    root:     who may change this document; a new version needs `threshold` of the old root and of the new one
    """

    typ: ClassVar[str] = "policy-authority"
    role: ClassVar[str] = "operators"
    limit: ClassVar[int] = MAX_DOCUMENT

    version: Annotated[int, Field(ge=1, le=100_000)]
    previous: Hash = ""
    signers: dict[Name, PolicySigner] = Field(min_length=1, max_length=200)
    root: list[Name] = Field(min_length=1, max_length=32)
    threshold: int = Field(ge=1, le=20)
    scopes: list[ScopeSigners] = Field(min_length=1, max_length=200)
    issued: Seconds


class FileHash(_Part):
    """A file of a part: its name and the SHA-256 (hex) of its exact text in UTF-8."""

    name: str = Field(min_length=1, max_length=255)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PartStatement(Payload):
    """All files of one scope of the authority, as its signers want them: the part of the policy that they speak for.

    serial:   grows by one with each statement about the scope; `previous` is the hash of the one before
    sees:     the serials of the other scopes that the signers had before them; a bundle may not go behind these
    files:    an empty list takes the scope's part back
    """

    typ: ClassVar[str] = "policy-part"
    role: ClassVar[str] = "operators"
    limit: ClassVar[int] = MAX_DOCUMENT

    scope: Scope
    serial: Annotated[int, Field(ge=1, le=(1 << 53))]
    previous: Hash = ""
    sees: dict[Scope, Count] = Field(default={}, max_length=200)
    files: list[FileHash] = Field(max_length=256)
    issued: Seconds


class Sealed(_Part):
    """One document and its signatures: payload in b64, and a signature in b64 by the key that made it."""

    payload: str = Field(max_length=MAX_DOCUMENT)
    signatures: dict[Key, str] = Field(default={}, max_length=MAX_SIGNATURES)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the exact payload; signatures may be added without changing it."""
        return hashlib.sha256(self.payload.encode()).hexdigest()


D = TypeVar("D", bound=Payload)


def seal(document: Payload) -> Sealed:
    """A document that nobody has signed yet. Raises BadInput when it is too large."""
    payload = b64(document.model_dump_json().encode())
    if len(payload) > document.limit:
        raise BadInput("record.large", f"a {document.typ} of {len(payload)} characters; at most {document.limit}")
    return Sealed(payload=payload)


def signed_bytes(kind: type[Payload], sealed: Sealed) -> bytes:
    """What a signature covers."""
    return f"{b64(header(kind.typ))}.{sealed.payload}".encode()


def add_signature(kind: type[Payload], sealed: Sealed, key: SignsBytes, public: str) -> Sealed:
    """The same document with one signature more; `public` is the key's public half in b64."""
    signature = b64(key.sign(signed_bytes(kind, sealed)))
    return Sealed(payload=sealed.payload, signatures={**sealed.signatures, public: signature})


def signed_by(kind: type[Payload], sealed: Sealed, keys: Mapping[str, str]) -> frozenset[str]:
    """The names in `keys` (name -> public key in b64) whose signature holds. Two names with one key count once."""
    message = signed_bytes(kind, sealed)
    good: dict[str, str] = {}
    for name, public in sorted(keys.items()):
        signature = sealed.signatures.get(public)
        if signature is None or public in good:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(unb64(public, length=KEY_LEN)).verify(
                unb64(signature, length=SIGNATURE_LEN), message
            )
        except (InvalidSignature, BadInput, ValueError):
            continue
        good[public] = name
    return frozenset(good.values())


def claimed(kind: type[D], sealed: Sealed, trust_domain: str) -> D:
    """What a document says, believed or not: the caller checks the signatures before it acts on a word of it.

    Raises NotVerified.
    """
    try:
        document = kind.model_validate_json(unb64(sealed.payload))
    except (BadInput, ValidationError):
        raise NotVerified("record.schema", f"a {kind.typ} does not fit its schema") from None
    if document.trust_domain != trust_domain:
        raise NotVerified("record.trust_domain", f"a {kind.typ} of another trust domain")
    return document


def parse_sealed(text: str) -> Sealed:
    """A sealed document from its JSON text. Raises NotVerified."""
    try:
        if not isinstance(text, str) or len(text) > 2 * MAX_DOCUMENT:
            raise BadInput("record.large", "too large")
        return Sealed.model_validate_json(text)
    except (BadInput, ValidationError, ValueError):
        raise NotVerified("record.schema", "a sealed document cannot be read") from None
