"""Registration entries: `retinue-ca entry` <-> CA (administration).

    GET  /v1/entries                        -> EntryList
    POST /v1/entries         EntryCreate    -> EntryInfo
    POST /v1/entries/delete  EntryRef       -> EntryInfo
"""

from __future__ import annotations

from pydantic import Field

from identity.wire import Message

MAX_LIFE = 10 * 366 * 86400


class EntryCreate(Message):
    """selectors are ``kind:value`` words; ends_in is seconds from now on the CA's clock; ttl is of certificates."""

    name: str = Field(max_length=255)
    parent: str = Field(max_length=63)
    selectors: list[str] = Field(max_length=24)
    labels: dict[str, str] = {}
    hint: str = Field(default="", max_length=128)
    ttl: int | None = Field(default=None, ge=60, le=86400)
    ends_at: int | None = Field(default=None, ge=0, le=1 << 40)
    ends_in: int | None = Field(default=None, ge=1, le=MAX_LIFE)
    ends_with: str | None = Field(default=None, max_length=255)


class EntryInfo(Message):
    """One entry; `hosts` are the endpoints it is in force on now."""

    id: str
    name: str
    parent: str
    selectors: list[str]
    labels: dict[str, str]
    hint: str
    ttl: int | None
    ends_at: int | None
    ends_with: str | None
    created: int
    created_by: str
    hosts: list[str] = []


class EntryList(Message):
    entries: list[EntryInfo]


class EntryRef(Message):
    id: str = Field(max_length=32)
