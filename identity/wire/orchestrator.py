"""What a scheduler tells the CA: where instances of workloads are.

    POST /v1/orchestrator/events  Event -> EventAnswer

An event is told again with the same `id` until it is answered; the answer is then the same, and nothing happens twice.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from identity.wire import Message

Kind = Literal["scheduled", "running", "stopped"]


class Event(Message):
    """One event about one instance.

    id: idempotency key. instance: the scheduler's own name of it, such as a pod or allocation; the CA gives it a number.
    seq: grows with every event about this instance; what is not newer than the last one changes nothing.
    scheduled: it will run on `host`; a new one is registered and placed there. running: it runs there: whoever held it
    does not any more. stopped: it has ended there; with `final` it never comes back.
    """

    id: str = Field(min_length=1, max_length=255)
    kind: Kind
    workload: str = Field(max_length=255)
    instance: str = Field(default="0", min_length=1, max_length=255)
    host: str = Field(max_length=63)
    seq: int = Field(ge=0, le=1 << 62)
    labels: dict[str, str] = {}
    ends: int | None = Field(default=None, ge=0, le=1 << 40)  # seconds since the epoch
    final: bool = False
    wait: float = Field(default=5.0, ge=0, le=60)  # seconds for a move to be ready


Outcome = Literal["registered", "placed", "moved", "retired", "unchanged", "noted", "stale"]


class EventAnswer(Message):
    """What came of it. number: of the instance at the CA, for `retinue attach --instance`; None when there is none."""

    id: str
    outcome: Outcome
    workload: str
    instance: str
    number: int | None
    host: str | None
    epoch: int
    addresses: list[str] = []
