"""What the figures have to be against each other, and what they are: computed from the rows, never asserted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TCP, UDP, CPU, RTT = "TCP 1 stream", "UDP 1300 B delivered", "CPU per GB", "RTT p50"


@dataclass(frozen=True)
class Aim:
    """`ours` and `against` are roles of subjects; without `against` the limit is of the value itself. `bare`: our bare tunnel."""

    measure: str
    what: str
    ours: str
    against: str
    least: bool  # at least the limit, else at most
    limit: float
    bare: str = ""


AIMS = (
    Aim(TCP, "ChaCha", "enforced chacha", "wireguard-go", True, 1.7, "bare chacha"),
    Aim(TCP, "ChaCha", "enforced chacha", "nebula chacha", True, 1.3, "bare chacha"),
    Aim(TCP, "AES", "enforced aes", "wireguard-go", True, 2.5, "bare aes"),
    Aim(TCP, "AES", "enforced aes", "nebula", True, 1.5, "bare aes"),
    Aim(TCP, "AES", "enforced aes", "nebula tuned", True, 1.15, "bare aes"),
    Aim(UDP, "ChaCha", "enforced chacha", "wireguard-go", True, 2.5, "bare chacha"),
    Aim(UDP, "AES", "enforced aes", "nebula", True, 1.2, "bare aes"),
    Aim(RTT, "low-power", "enforced low-power", "wireguard-go", False, 0.6, "bare low-power"),
    Aim(RTT, "low-power", "enforced low-power", "nebula", False, 0.75, "bare low-power"),
    Aim(CPU, "ChaCha", "enforced chacha", "wireguard-go", False, 0.6, "bare chacha"),
    Aim(CPU, "AES", "enforced aes", "nebula", False, 0.85, "bare aes"),
    Aim("RSS idle peer", "KiB", "bare chacha", "", False, 4),
    Aim("RSS loaded", "MiB", "enforced chacha", "", False, 32, "bare chacha"),
)
FLOOR = (
    Aim(TCP, "ChaCha", "enforced chacha", "wireguard-go floor", True, 5, "bare chacha"),
    Aim(TCP, "AES", "enforced aes", "nebula floor", True, 7, "bare aes"),
)


def ratios(rows: Sequence[Mapping[str, Any]], roles: Mapping[str, str], aims: Sequence[Aim] = AIMS + FLOOR) -> list[dict[str, object]]:
    """One row an aim, `roles` names the subjects by role: measure, against, target, got, bare (the tunnel without agents and firewall), verdict.

    got is the quotient of the medians, or the median itself; without figures of both sides the verdict says so.
    """
    medians = {(r["measure"], r["subject"]): float(r["value"]) for r in rows}

    def quotient(aim: Aim, ours: str) -> float | None:
        mine = medians.get((aim.measure, roles.get(ours, "")))
        if mine is None or not aim.against:
            return mine
        theirs = medians.get((aim.measure, roles.get(aim.against, "")))
        return None if not theirs else mine / theirs

    out: list[dict[str, object]] = []
    for aim in aims:
        got = quotient(aim, aim.ours)
        met = got is not None and (got >= aim.limit if aim.least else got <= aim.limit)
        out.append({
            "measure": f"{aim.measure}, {aim.what}", "ours": roles.get(aim.ours, aim.ours),
            "against": roles.get(aim.against, aim.against) or "–",
            "target": f"{'≥' if aim.least else '≤'} {aim.limit:g}{'x' if aim.against else ''}",
            "got": got, "bare": quotient(aim, aim.bare) if aim.bare else None,
            "verdict": "not measured" if got is None else "met" if met else "missed",
        })  # fmt: skip
    return out


COLUMNS = ("measure", "ours", "against", "target", "got", "bare", "verdict")


def cells(row: Mapping[str, object]) -> list[str]:
    """A row as texts, in the order of COLUMNS."""
    return ["–" if row[c] is None else f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]


def table(found: Sequence[Mapping[str, object]]) -> str:
    """For a terminal."""
    lines = [list(COLUMNS), *(cells(r) for r in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
