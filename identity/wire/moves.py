"""Administration of moves: what is said while they go on (newline-delimited JSON), taking them back, draining a host.

    POST /v1/workloads/move/steps  WorkloadMove -> MoveStep..., then MoveDone or MoveFailed
    POST /v1/workloads/abort       WorkloadRef  -> Workload
    POST /v1/hosts/drain           Drain        -> MoveStep..., DrainLine..., then DrainDone or MoveFailed
    POST /v1/hosts/undrain         HostRef      -> Host
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from identity.wire import Message
from identity.wire.admin import MoveReply

Step = Literal[
    "prepare", "waiting", "ready", "not_ready", "holder_silent", "lease", "commit", "fenced", "released", "aborted"
]


class MoveStep(Message):
    """One step of one move. ms: since the move began; waiting_for: endpoints; seconds: how long a wait may take."""

    event: Literal["step"] = "step"
    instance: str
    step: Step
    text: str
    ms: float
    epoch: int | None = None
    waiting_for: list[str] = []
    seconds: float | None = None


class MoveDone(Message):
    """The last line of a move that took place."""

    event: Literal["done"] = "done"
    move: MoveReply


class MoveFailed(Message):
    """The last line otherwise: `error` is identity.errors' form with its HTTP `status`."""

    event: Literal["error"] = "error"
    status: int
    error: dict[str, Any]


class Drain(Message):
    """Move everything off a host. to: only to these; parallel: so many at a time; wait: seconds for each phase."""

    name: str = Field(max_length=63)
    to: list[str] = Field(default=[], max_length=1000)
    parallel: int = Field(default=1, ge=1, le=64)
    wait: float = Field(default=5.0, ge=0, le=300)
    force: bool = False
    dry_run: bool = False


class DrainLine(Message):
    """One instance of a drained host: planned, moved, or why it stayed."""

    event: Literal["instance"] = "instance"
    instance: str
    to: str | None
    outcome: Literal["planned", "moved", "failed"]
    done: int
    total: int
    code: str | None = None
    text: str = ""


class DrainDone(Message):
    """The last line. left: instances that are still on the host."""

    event: Literal["drained"] = "drained"
    name: str
    moved: int
    left: list[str]
    dry_run: bool = False
