"""Coded health conditions of an endpoint: raised and cleared by code, shown by `retinue status` and readiness."""

from __future__ import annotations

from typing import Literal

import structlog

from identity.wire.local import Condition

Severity = Literal["info", "warning", "error"]
_ORDER = {"error": 0, "warning": 1, "info": 2}

log = structlog.get_logger("retinue.health")


class Health:
    """The conditions in force. A change is logged once; repeating it says nothing."""

    def __init__(self) -> None:
        self._conditions: dict[str, Condition] = {}

    def put(self, code: str, severity: Severity, text: str) -> None:
        """Raise a condition, or change its text."""
        condition = Condition(code=code, severity=severity, text=text)
        before = self._conditions.get(code)
        self._conditions[code] = condition
        if before is None or before.severity != severity:
            level = {"info": log.info, "warning": log.warning, "error": log.error}[severity]
            level("condition", code=code, text=text)

    def clear(self, code: str) -> None:
        """End a condition; nothing happens when there is none."""
        if self._conditions.pop(code, None) is not None:
            log.info("condition ended", code=code)

    def clear_prefix(self, prefix: str, *, keep: set[str] | frozenset[str] = frozenset()) -> None:
        """End all conditions of one kind but those in `keep`."""
        for code in [c for c in self._conditions if c.startswith(prefix) and c not in keep]:
            self.clear(code)

    def __contains__(self, code: str) -> bool:
        return code in self._conditions

    def conditions(self) -> list[Condition]:
        """Worst first, then by code."""
        return sorted(self._conditions.values(), key=lambda c: (_ORDER[c.severity], c.code))
