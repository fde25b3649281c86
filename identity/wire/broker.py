"""Agent -> broker: the few works that need more than CAP_NET_ADMIN, over a unix socket (SOCK_SEQPACKET).

One packet of JSON a request and one a reply; a namespace comes back as a file descriptor beside the reply (unix(7),
SCM_RIGHTS).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from identity.errors import BadInput
from identity.wire import Message

MAX_PACKET = 32 * 1024  # bytes

Place = Annotated[str, Field(min_length=1, max_length=4096)]
Mac = Annotated[str, StringConstraints(pattern=r"^02(:[0-9a-f]{2}){5}$")]  # locally administered, as ours are
Address = Annotated[str, StringConstraints(pattern=r"^[0-9a-f.:]{2,39}$")]
Prefix = Annotated[str, StringConstraints(pattern=r"^[0-9a-f.:]{2,39}/[0-9]{1,3}$")]


class Side(Message):
    """What a workload's end of a pair has to be: all the addresses it may have; both overlays go to the gateway."""

    netns: Place
    addresses: list[Address] = Field(max_length=256)
    gateway_mac: Mac
    mtu: int = Field(ge=1280, le=65535)
    overlay4: Prefix
    overlay6: Prefix


class Open(Message):
    """Give me the network namespace of this name or path."""

    op: Literal["open"] = "open"
    place: Place


class LinkAddress(Message):
    """The link address of our device in there."""

    op: Literal["mac"] = "mac"
    place: Place


class Configure(Message):
    """Bring that about; addresses and routes come with `add` only."""

    op: Literal["configure"] = "configure"
    side: Side
    add: bool


class Answer(Message):
    """`error` is identity.errors' form with its HTTP `status`; otherwise the work is done."""

    mac: str | None = None
    status: int = 200
    error: dict[str, Any] | None = None


Request = Annotated[Open | LinkAddress | Configure, Field(discriminator="op")]
_REQUEST: TypeAdapter[Open | LinkAddress | Configure] = TypeAdapter(Request)


def parse_request(packet: bytes) -> Open | LinkAddress | Configure:
    """Raises BadInput ``broker.request``."""
    try:
        return _REQUEST.validate_json(packet)
    except ValidationError:
        raise BadInput("broker.request", "not a request the broker knows") from None
