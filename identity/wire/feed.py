"""The change feed: CA -> endpoint, newline-delimited JSON frames on one long response.

    GET /v1/feed?timeline=T&revision=N   -> Snapshot | Delta | Beat, one a line
    POST /v1/report                      Report -> {}

Object keys: ``policy``, ``bundle``, ``endpoint/<name>``, ``placement/<workload>/<instance>``,
``prepare/<workload>/<instance>``. Values are signed envelopes. A removal needs an explicit key in `removes`; a gap or
a hash mismatch makes the endpoint ask again without a position and get a snapshot.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from identity.errors import BadInput
from identity.grown import Grown
from identity.wire import Message
from identity.wire.flows import MAX as FLOWS_MAX
from identity.wire.flows import FlowSummary


class Snapshot(Message):
    """The whole scoped set. `heartbeat` proves the position; `hash` is identity.records.state_hash(objects)."""

    kind: Literal["snapshot"] = "snapshot"
    timeline: str
    revision: int
    objects: dict[str, str]
    hash: str
    heartbeat: str


class Delta(Message):
    """Changes of the scoped set from one revision to the next sent; may be empty of changes."""

    kind: Literal["delta"] = "delta"
    timeline: str
    from_revision: int
    revision: int
    upserts: dict[str, str]
    removes: list[str]
    hash: str
    heartbeat: str


class Beat(Message):
    kind: Literal["beat"] = "beat"
    heartbeat: str


Frame = Annotated[Snapshot | Delta | Beat, Field(discriminator="kind")]
_FRAME: TypeAdapter[Snapshot | Delta | Beat] = TypeAdapter(Frame)
MAX_FRAME = 64 * 1024 * 1024


def parse_frame(line: bytes) -> Snapshot | Delta | Beat:
    """One line of the feed. Raises BadInput."""
    if len(line) > MAX_FRAME:
        raise BadInput("feed.large", "a feed frame is too large")
    try:
        return _FRAME.validate_json(line)
    except ValidationError:
        raise BadInput("feed.frame", "a feed frame does not fit its schema") from None


class Report(Message, Grown):
    """What the endpoint has applied to its data plane (not merely received)."""

    later: ClassVar[frozenset[str]] = frozenset({"flows"})

    timeline: str
    revision: int
    hash: str
    held: dict[str, int] = {}  # "<workload>/<instance>" -> epoch held here
    attached: list[str] = []  # "<workload>/<instance>" attached here, active or waiting
    flows: list[FlowSummary] = Field(default=[], max_length=FLOWS_MAX)  # since the last report that was answered
