"""Schemas that got fields after their first release: what stands at its default is not written.

Readers refuse unknown fields, also readers of the release before. So a field that came later is written only when it
says something; a reader that does not know it then refuses the one message that it could not have obeyed, and no other.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer


class Grown(BaseModel):
    """Mix-in. `later`: names of the fields, all with defaults, that the first release did not have."""

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        for name in self.later:
            if name in written and getattr(self, name) == fields[name].get_default(call_default_factory=True):
                del written[name]
        return written
