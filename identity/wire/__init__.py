"""Every schema that crosses a process boundary, one module a conversation. Strict: unknown fields are refused.

WIRE_VERSION history:
    1  enrolment, feed, workload SVIDs, admin and local APIs
"""

from __future__ import annotations

from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from identity.errors import BadInput

WIRE_VERSION: Final = 1
# What an endpoint can read, said in a header with every request to the CA; without it: 1.
#     2  fields of records and messages that came after the first release (identity.grown)
WIRE_LEVEL: Final = 2
LEVEL_HEADER: Final = "Retinue-Wire"


class Message(BaseModel):
    """Base of all wire schemas."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


def parse(kind: type[M], data: bytes | str) -> M:
    """Parse JSON from outside. Raises BadInput ``wire.schema`` naming the field, never its value."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise BadInput("wire.schema", f"{kind.__name__}: {where}: {first['msg']}") from None
