"""Values of single keys of a policy file: instants, durations, windows, modes, rates. Each is read or refused with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Final

from identity.errors import BadInput, BadPolicy
from policy.document import Node
from policy.model import AlertOn, Budget, Mode
from policy.ports import FLOWING, PortMap
from policy.program import Action
from policy.windows import Window, parse_duration, parse_instant

SINKS: Final = frozenset({"page", "log", "webhook"})
COLLAPSE: Final = 60  # seconds, without `collapse`
_RATE: Final = re.compile(r"([0-9]{1,9})([kMG]?)bit(?:/s)?")
_RATE_UNITS: Final = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
MIN_RATE: Final = 8_000  # bits a second
MAX_RATE: Final = 1_000_000_000_000
MAX_IDLE: Final = 30 * 86400  # seconds


def one_of(node: Node, what: str, known: Collection[str]) -> str:
    """A word of the known ones. Raises BadPolicy."""
    word = node.scalar(what)
    if word not in known:
        raise node.bad(
            "policy.value", f"{what} cannot be {ascii(word)[:40]}", hint=f"one of: {', '.join(sorted(known))}"
        )
    return word


def read_boolean(node: Node) -> bool:
    """Raises BadPolicy."""
    return one_of(node, "this", {"true", "false"}) == "true"


def is_id(node: Node) -> bool:
    """Is it a name for a rule, a grant or a guardrail?"""
    text = node.text
    return node.kind == "scalar" and len(text) <= 100 and bool(text) and text.isascii() and (
        text.replace("-", "").replace("_", "").replace(".", "").isalnum()
    )  # fmt: skip


def read_instant(node: Node) -> int:
    """Seconds since the epoch. Raises BadPolicy."""
    return _read(node, "an instant", parse_instant)


def read_duration(node: Node) -> int:
    """Seconds. Raises BadPolicy."""
    return _read(node, "a duration", parse_duration)


def _read(node: Node, what: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(node.scalar(what))
    except BadPolicy:
        raise
    except BadInput as error:
        raise node.bad(error.code, error.message, hint=error.hint) from None


def read_window(node: Node) -> Window:
    """Raises BadPolicy."""
    fields = node.mapping("when", {"cron", "for", "tz"}, {"cron", "for"})
    zone = fields["tz"].scalar("tz") if "tz" in fields else "UTC"
    try:
        return Window.parse(fields["cron"].scalar("cron"), fields["for"].scalar("for"), zone)
    except BadInput as error:
        raise fields[{"time.cron": "cron", "time.zone": "tz"}.get(error.code, "for")].bad(
            error.code, error.message, hint=error.hint
        ) from None


def read_mode(node: Node) -> tuple[Mode, int | None]:
    """The mode of a rule or segment, and when its audit ends. Raises BadPolicy."""
    if node.kind == "scalar":
        word = one_of(node, "mode", {"draft", "audit", "enforce"})
        if word == "audit":
            raise node.bad(
                "policy.audit_end",
                "audit needs an end date",
                hint="write mode: {audit_until: 2031-03-01}",
            )
        return ("draft", None) if word == "draft" else ("enforce", None)
    value = node.mapping("mode", {"audit_until"}, {"audit_until"})["audit_until"]
    return "audit", read_instant(value)


def read_alert(node: Node) -> AlertOn:
    """Raises BadPolicy."""
    fields = node.mapping("alert", {"on_deny", "collapse"}, {"on_deny"})
    # A name, never an address: where it leads is said on each host alone.
    sink = one_of(fields["on_deny"], "on_deny", SINKS)
    return AlertOn(sink, read_duration(fields["collapse"]) if "collapse" in fields else COLLAPSE)


def read_budget(node: Node | None) -> Budget:
    """Without a node, no budget. Raises BadPolicy."""
    if node is None:
        return Budget()
    fields = node.mapping("budget", {"rules", "unused_ratio"})
    ratio = None
    if "unused_ratio" in fields:
        try:
            ratio = float(fields["unused_ratio"].scalar("unused_ratio"))
        except ValueError:
            ratio = -1.0
        if not 0 <= ratio <= 1:
            raise fields["unused_ratio"].bad("policy.number", "unused_ratio must be from 0 to 1")
    return Budget(fields["rules"].integer("rules", 1, 1_000_000) if "rules" in fields else None, ratio)


def read_rate(node: Node) -> int:
    """Bytes a second of ``50Mbit``. Raises BadPolicy."""
    text = node.scalar("max_rate")
    match = _RATE.fullmatch(text)
    bits = int(match[1]) * _RATE_UNITS[match[2]] if match else 0
    if not MIN_RATE <= bits <= MAX_RATE:
        raise node.bad("policy.rate", f"not a rate: {ascii(text)[:40]}", hint="write 512kbit, 50Mbit or 10Gbit; from 8kbit to 1000Gbit")
    return bits // 8


def read_idle_timeout(node: Node, action: Action, ports: PortMap) -> int:
    """Seconds of ``10m``. Raises BadPolicy."""
    seconds = read_duration(node)
    if action is not Action.ALLOW:
        raise node.bad("policy.idle_timeout", f"a {action} has no idle timeout", hint="an idle timeout belongs to an allow")
    if seconds > MAX_IDLE:
        raise node.bad("policy.idle_timeout", f"an idle timeout of {node.text} is too long", hint="at most 30d")
    if not ports & FLOWING:
        raise node.bad("policy.idle_timeout", f"only TCP and UDP have flows that can be idle, and the rule allows {ports}",
                       hint="leave idle_timeout out, or allow TCP or UDP ports")  # fmt: skip
    return seconds
