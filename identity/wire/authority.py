"""The authority's members over the administrators' socket.

    GET  /v1/authority                              AuthorityInfo
    POST /v1/authority/{prepare,activate}           KindRef      -> AuthorityInfo
    POST /v1/authority/{taint,revoke}               MemberRef    -> AuthorityInfo
    POST /v1/authority/block, /v1/authority/unblock BlockRef     -> AuthorityInfo
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from identity.wire import Message

Kind = Literal["root", "intermediate", "records", "policy"]


class KindRef(Message):
    kind: Kind


class MemberRef(Message):
    """spread: seconds over which what hangs from a tainted member is renewed; force: although certificates in force
    hang from it; compromised: others have its key.
    """

    name: str = Field(max_length=64)
    spread: int = Field(default=600, ge=1, le=7 * 86400)
    force: bool = False
    compromised: bool = False


class BlockRef(Message):
    """An entry of identity.revocation; `until`: when nothing it blocks is valid any more (seconds since the epoch)."""

    entry: str = Field(max_length=2200)
    until: int = Field(default=0, ge=0)


class MemberInfo(Message):
    """`certificates`: newest certificates of endpoints and workloads that hang from it; `here`: is its key here."""

    name: str
    kind: Kind
    state: str
    since: int
    until: int
    not_after: int
    key: str
    here: bool
    certificates: int


class AuthorityInfo(Message):
    trust_domain: str
    sequence: int
    members: list[MemberInfo]
    blocked: list[str] = []
    changed: str = ""  # the member that the request was about
