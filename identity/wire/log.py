"""Asking the transparency log: where the tree is now, and that what one was given is in it.

    POST /v1/log   LogRequest -> LogReply      with an endpoint's certificate

Hashes are lower hex. `consistency` leads from the asked size to the head's (backwards when the head is the older one);
a leaf that has no place yet is left out of `proofs`.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from identity.wire import Message

MAX_LEAVES: Final = 256

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Path = Annotated[list[Hash], Field(max_length=128)]


class LogRequest(Message):
    """`timeline` and `size` of the head that the asker remembers; None and 0 before the first."""

    timeline: str | None = None
    size: int = Field(default=0, ge=0, le=(1 << 62))
    leaves: list[Hash] = Field(default=[], max_length=MAX_LEAVES)


class LeafProof(Message):
    """The place of a leaf and the path from there to the root."""

    index: int
    path: Path


class LogReply(Message):
    """`head` is a signed identity.transparency.TreeHead."""

    head: str
    consistency: Path
    proofs: dict[str, LeafProof]
