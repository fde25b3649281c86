"""Registration entries: `retinue-ca entry` <-> CA (administration).

    GET  /v1/entries                        -> EntryList
    POST /v1/entries         EntryCreate    -> EntryInfo
    POST /v1/entries/delete  EntryRef       -> EntryInfo

The two POSTs answer after the commit and, for at most `wait` seconds, after every connected endpoint concerned has applied
it. Until an endpoint has, it answers its programs as before: `waiting_for` names those of which that is not known.
"""

from __future__ import annotations

from typing import ClassVar, Final

from pydantic import Field

from identity.grown import Grown
from identity.wire import Message

MAX_LIFE: Final = 10 * 366 * 86400
WAIT_S: Final = 5.0  # seconds, unless asked otherwise


class EntryCreate(Grown, Message):
    """selectors are ``kind:value`` words; ends_in is seconds from now on the CA's clock; ttl is of certificates."""

    later: ClassVar[frozenset[str]] = frozenset({"wait"})

    name: str = Field(max_length=255)
    parent: str = Field(max_length=63)
    selectors: list[str] = Field(max_length=24)
    labels: dict[str, str] = {}
    hint: str = Field(default="", max_length=128)
    ttl: int | None = Field(default=None, ge=60, le=86400)
    ends_at: int | None = Field(default=None, ge=0, le=1 << 40)
    ends_in: int | None = Field(default=None, ge=1, le=MAX_LIFE)
    ends_with: str | None = Field(default=None, max_length=255)
    wait: float = Field(default=WAIT_S, ge=0, le=60)


class EntryInfo(Grown, Message):
    """One entry. `hosts`: endpoints it is for; `waiting_for`: those not known to have applied the change. `ended`: its end
    has come, it gives nothing and goes on keeping others out. `opens`: hosts on which the deleted one was the workload's last.
    """

    later: ClassVar[frozenset[str]] = frozenset({"waiting_for", "ended", "opens"})

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
    waiting_for: list[str] = []
    ended: bool = False
    opens: list[str] = []


class EntryList(Message):
    entries: list[EntryInfo]


class EntryRef(Grown, Message):
    later: ClassVar[frozenset[str]] = frozenset({"wait"})

    id: str = Field(max_length=32)
    wait: float = Field(default=WAIT_S, ge=0, le=60)
