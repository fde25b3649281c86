"""Federation over the administrators' socket.

    GET  /v1/federation            FederationList
    POST /v1/federation            FederationAdd -> FederationInfo
    POST /v1/federation/refresh    FederationRef -> FederationInfo
    POST /v1/federation/remove     FederationRef -> FederationInfo
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from identity.wire import Message


class FederationRef(Message):
    trust_domain: str = Field(max_length=255)


class FederationAdd(Message):
    """bundle: the other's bundle as a person brought it, JSON; endpoint_id: the SPIFFE ID that serves it (https_spiffe)."""

    trust_domain: str = Field(max_length=255)
    url: str = Field(max_length=1024)
    profile: Literal["https_web", "https_spiffe"]
    endpoint_id: str | None = Field(default=None, max_length=2048)
    bundle: str = Field(max_length=262144)


class FederationInfo(Message):
    trust_domain: str
    url: str
    profile: str
    endpoint_id: str | None = None
    sequence: int
    roots: list[str]  # fingerprints
    fetched_at: int
    hint: int
    error: str | None = None


class FederationList(Message):
    federations: list[FederationInfo]
