"""Enrolment, renewal and workload SVIDs: endpoint <-> CA (HTTPS; mTLS except the first two calls).

    POST /v1/enroll/challenge  ChallengeRequest -> Challenge     (no client certificate)
    POST /v1/enroll            EnrollRequest    -> EnrollReply   (no client certificate)
    POST /v1/renew             RenewRequest     -> RenewReply
    POST /v1/svid              SvidRequest      -> SvidReply     (only for instances placed on the caller)
    POST /v1/sidecar-token     SidecarTokenRequest -> SidecarTokenReply
    POST /v1/underlay          UnderlayUpdate   -> RenewReply's endpoint record refreshed; feed carries it
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from identity.grown import Grown
from identity.wire import WIRE_VERSION, Message

Cipher = Literal["chacha20poly1305", "aes-256-gcm"]


class ChallengeRequest(Message):
    version: int = WIRE_VERSION
    token_id: str = Field(max_length=64)


class Challenge(Message):
    """A nonce for one enrolment attempt; the answer is the same shape whether or not the token exists."""

    nonce: str = Field(max_length=64)
    server_key: str = Field(max_length=64)  # ephemeral X25519, b64
    expires_in: int  # seconds


class EnrollRequest(Message, Grown):
    """All proofs are over identity.enrollment.transcript(...)."""

    later: ClassVar[frozenset[str]] = frozenset({"attestor", "device_chain", "device_proof"})

    version: int = WIRE_VERSION
    token_id: str = Field(max_length=64)
    nonce: str = Field(max_length=64)
    csr: str = Field(max_length=8192)  # PEM; contributes a public key and nothing else
    tunnel_key: str = Field(max_length=64)
    enroll_key: str = Field(max_length=64)  # Ed25519, b64
    token_proof: str = Field(max_length=128)  # Ed25519 signature under the token's key
    tunnel_proof: str = Field(max_length=128)  # MAC under X25519(tunnel, server_key)
    enroll_proof: str = Field(max_length=128)  # Ed25519 signature under enroll_key
    underlay: list[str] = Field(max_length=16)
    ciphers: list[Cipher] = Field(max_length=2)
    attestor: str = Field(default="token", max_length=32)
    device_chain: list[str] = Field(default=[], max_length=5)  # PEM, of the attestor x509pop
    device_proof: str = Field(default="", max_length=2048)  # signature under the device key


class EnrollReply(Message, Grown):
    later: ClassVar[frozenset[str]] = frozenset({"authority"})

    trust_domain: str
    endpoint: str
    kind: Literal["host", "sidecar"]
    workload: str | None = None  # a sidecar's service
    chain: list[str]  # PEM, leaf first, without the root
    bundle: str  # BundleRecord envelope
    record: str  # EndpointRecord envelope
    authority: list[str] = Field(default=[], max_length=256)  # the policy authority, identity/records_policy.py


class RenewRequest(Message):
    csr: str = Field(max_length=8192)
    underlay: list[str] = Field(max_length=16)
    ciphers: list[Cipher] = Field(max_length=2)


class RenewReply(Message):
    chain: list[str]
    bundle: str
    record: str


class SvidRequest(Message):
    workload: str = Field(max_length=255)
    instance: int = Field(ge=0)
    csr: str = Field(max_length=8192)


class SvidReply(Message):
    spiffe_id: str
    chain: list[str]
    bundle: str


class SidecarTokenRequest(Message):
    workload: str = Field(max_length=255)


class SidecarTokenReply(Message):
    token: str
    endpoint: str
    expires_in: int
    ca: str = ""  # set by the host agent that passes the token on: where to use it


class UnderlayUpdate(Message):
    underlay: list[str] = Field(max_length=16)
