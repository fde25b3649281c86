"""What an endpoint tells the CA of the flows it carried and refused: sums, never packets. Part of a Report, bounded.

Both ends name workloads, as the endpoint resolved them from signed placements. Counts are since the last report that was
answered; an endpoint that is asked for more than MAX sends the rest with its next report.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from identity.wire import Message

MAX: Final = 400  # summaries in one report; with names of full length still below what the CA reads


class FlowSummary(Message):
    """One flow without its source port, over a while.

    port:    the destination's, 0 for protocols without ports
    verdict: allow (forwarded), audit (forwarded, and enforcement would deny it) or deny
    first, last: seconds since the epoch; rule: what decided (policy.evaluate.Decision.by)
    """

    src: str = Field(max_length=255)
    dst: str = Field(max_length=255)
    proto: int = Field(ge=0, le=255)
    port: int = Field(default=0, ge=0, le=65535)
    verdict: Literal["allow", "audit", "deny"]
    count: int = Field(ge=1, le=1 << 53)
    first: int = Field(ge=0, le=1 << 40)
    last: int = Field(ge=0, le=1 << 40)
    rule: str = Field(default="", max_length=300)
