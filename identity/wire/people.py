"""Administrators and approvals: `retinue-ca admin`, `retinue-ca approve` <-> CA.

    GET  /v1/admins                        -> AdminList
    POST /v1/admins          AdminAdd      -> AdminCredential
    POST /v1/admins/certify  AdminCertify  -> AdminCredential   (a new certificate, for an expired or lost one)
    POST /v1/admins/renew    AdminRenew    -> AdminCredential   (one's own, over its own certificate)
    POST /v1/admins/revoke   AdminRef      -> AdminInfo
    GET  /v1/approvals                     -> ApprovalList
    POST /v1/approvals       ApprovalRef   -> Approval
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from identity.wire import Message

Role = Literal["viewer", "registrar", "operator", "ca-admin"]


class AdminAdd(Message):
    """scopes are subtrees such as ``payments/*``; none is everything. The request gives its key only."""

    name: str = Field(max_length=63)
    role: Role
    scopes: list[str] = Field(default=[], max_length=32)
    csr: str = Field(max_length=8192)


class AdminCertify(Message):
    name: str = Field(max_length=63)
    csr: str = Field(max_length=8192)


class AdminRenew(Message):
    csr: str = Field(max_length=8192)


class AdminRef(Message):
    name: str = Field(max_length=63)


class AdminInfo(Message):
    name: str
    spiffe_id: str
    role: Role
    scopes: list[str]
    created: int
    created_by: str
    state: Literal["active", "revoked"]
    expires: int | None = None  # of the newest certificate


class AdminList(Message):
    admins: list[AdminInfo]


class AdminCredential(Message):
    """What an administrator's directory holds beside the key."""

    admin: AdminInfo
    trust_domain: str
    chain: list[str]
    roots: str
    expires: int


class Approval(Message):
    """An act that waits for a second person, or had one."""

    id: str
    act: str
    summary: str
    asked_by: str
    asked_at: int
    expires: int
    role: Role
    state: Literal["pending", "approved", "used", "expired"]
    approved_by: str | None = None


class ApprovalList(Message):
    approvals: list[Approval]


class ApprovalRef(Message):
    id: str = Field(max_length=32)
