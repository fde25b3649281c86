"""Foreign nftables rules that touch our bit of the packet mark: they take away what we accepted, or accept in our name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_ALL = 0xFFFF_FFFF


def foreign_marks(objects: Iterable[Mapping[str, Any]], ours: str, bit: int) -> list[str]:
    """What is wrong, a sentence a rule: `objects` as nft lists a ruleset in JSON, `ours` the prefix of our tables' names.

    A rule is harmless when it can neither clear nor set `bit` for any mark: ``meta mark set meta mark | 0x10`` is.
    """
    out = []
    for entry in objects:
        rule = entry.get("rule")
        if not isinstance(rule, dict) or _is_ours(str(rule.get("table", "")), ours):
            continue
        place = f"{rule.get('family')} {rule.get('table')} {rule.get('chain')} (handle {rule.get('handle')})"
        for statement in rule.get("expr", ()):
            if not isinstance(statement, dict):
                continue
            if "xt" in statement and "MARK" in str(statement["xt"]):
                out.append(f"{place}: an iptables MARK or CONNMARK rule; give it a mask without 0x{bit:08x}")
            change = statement.get("mangle")
            if isinstance(change, dict) and change.get("key") == {"meta": {"key": "mark"}}:
                sets, clears = effect(change.get("value"))
                if sets & bit:
                    out.append(f"{place}: may set the mark 0x{bit:08x}, and so accept packets in our name")
                elif clears & bit:
                    out.append(f"{place}: overwrites the mark 0x{bit:08x}, so packets we accepted are dropped")
    return out


def _is_ours(table: str, prefix: str) -> bool:
    return table == prefix or table.startswith(prefix + "_")


def effect(value: Any) -> tuple[int, int]:
    """(bits that may come to be set, bits that may come to be cleared) of an expression over the old mark."""
    if value == {"meta": {"key": "mark"}}:
        return 0, 0
    if isinstance(value, bool):
        return _ALL, _ALL
    if isinstance(value, int):
        return value & _ALL, ~value & _ALL
    if isinstance(value, dict) and len(value) == 1:
        name, parts = next(iter(value.items()))
        if name in {"|", "&", "^"} and isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], int):
            sets, clears = effect(parts[0])
            mask = parts[1]
            if name == "|":
                return sets | mask, clears & ~mask
            if name == "&":
                return sets & mask, clears | (~mask & _ALL)
            return sets | mask, clears | mask
    return _ALL, _ALL  # taken from elsewhere: a map, the connection's mark, a socket
