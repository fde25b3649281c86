"""JWT-SVIDs: endpoint <-> CA (mTLS), for instances placed on the caller.

    POST /v1/jwt   JwtRequest -> JwtReply
"""

from __future__ import annotations

from pydantic import Field

from identity.wire import Message


class JwtRequest(Message):
    workload: str = Field(max_length=255)
    instance: int = Field(ge=0)
    audience: list[str] = Field(min_length=1, max_length=16)


class JwtReply(Message):
    """The token is a secret while it lasts."""

    spiffe_id: str
    token: str
    expires: int
