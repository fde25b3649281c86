"""Coming back: endpoint -> CA, without a client certificate.

    GET  /v1/bundle                                    BundleReply: public, it proves itself
    POST /v1/recover/challenge  RecoverChallengeRequest -> Challenge
    POST /v1/recover            RecoverRequest          -> RenewReply
"""

from __future__ import annotations

from pydantic import Field

from identity.wire import WIRE_VERSION, Message
from identity.wire.enroll import Cipher


class BundleReply(Message):
    bundle: str


class RecoverChallengeRequest(Message):
    version: int = WIRE_VERSION
    endpoint: str = Field(max_length=63)


class RecoverRequest(Message):
    """Proofs are over identity.recovery.transcript(...). `serial`: hex, of the newest certificate held."""

    version: int = WIRE_VERSION
    endpoint: str = Field(max_length=63)
    serial: str = Field(pattern=r"^[0-9a-f]{1,40}$")
    nonce: str = Field(max_length=64)
    csr: str = Field(max_length=8192)
    tunnel_proof: str = Field(max_length=128)
    enroll_proof: str = Field(max_length=128)
    underlay: list[str] = Field(max_length=16)
    ciphers: list[Cipher] = Field(max_length=2)


class HostRecover(Message):
    """Administrators: so many more automatic recoveries within the window that runs."""

    name: str
    budget: int = Field(default=1, ge=0, le=1000)


class HostStanding(Message):
    """What is known of an endpoint's credentials."""

    name: str
    serial: str | None = None
    quarantined_at: int | None = None
    reason: str | None = None
    recoveries: list[int] = []
    budget: int = 1
