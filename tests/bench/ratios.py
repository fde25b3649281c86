"""What the figures have to be against each other, and what they are: computed from the rows, never asserted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TCP, UDP, CPU, RTT = "TCP 1 stream", "UDP 1300 B delivered", "CPU per GB", "RTT p50"

PLACES = ("enforced", "host", "bare")


@dataclass(frozen=True)
class Aim:
    """What one of our modes has to reach. It is looked at in three places: the product with its workloads in namespaces
    (role ``enforced MODE``), the product with identities that the hosts hold (``host MODE``), and our bare tunnel.

    `against` is a role of a peer; without it the limit is of the value itself.
    """

    measure: str
    what: str
    mode: str
    against: str
    least: bool  # at least the limit, else at most
    limit: float
    places: tuple[str, ...] = PLACES


AIMS = (
    Aim(TCP, "ChaCha", "chacha", "wireguard-go", True, 1.7),
    Aim(TCP, "ChaCha", "chacha", "nebula chacha", True, 1.3),
    Aim(TCP, "AES", "aes", "wireguard-go", True, 2.5),
    Aim(TCP, "AES", "aes", "nebula", True, 1.5),
    Aim(TCP, "AES", "aes", "nebula tuned", True, 1.15),
    Aim(UDP, "ChaCha", "chacha", "wireguard-go", True, 2.5),
    Aim(UDP, "AES", "aes", "nebula", True, 1.2),
    Aim(RTT, "low-power", "low-power", "wireguard-go", False, 0.6),
    Aim(RTT, "low-power", "low-power", "nebula", False, 0.75),
    Aim(CPU, "ChaCha", "chacha", "wireguard-go", False, 0.6),
    Aim(CPU, "AES", "aes", "nebula", False, 0.85),
    Aim("RSS idle peer", "KiB", "chacha", "", False, 4, ("bare",)),
    Aim("RSS loaded", "MiB", "chacha", "", False, 32),
)
FLOOR = (
    Aim(TCP, "ChaCha", "chacha", "wireguard-go floor", True, 5),
    Aim(TCP, "AES", "aes", "nebula floor", True, 7),
)


def ratios(rows: Sequence[Mapping[str, Any]], roles: Mapping[str, str], aims: Sequence[Aim] = AIMS + FLOOR) -> list[dict[str, object]]:
    """One row an aim, `roles` names the subjects by role: measure, against, target, and for each place the value and its verdict.

    The value is the quotient of the medians, or the median itself; without figures of both sides the verdict says so.
    """
    medians = {(r["measure"], r["subject"]): float(r["value"]) for r in rows}

    def quotient(aim: Aim, place: str) -> float | None:
        mine = medians.get((aim.measure, roles.get(f"{place} {aim.mode}", "")))
        if mine is None or not aim.against:
            return mine
        theirs = medians.get((aim.measure, roles.get(aim.against, "")))
        return None if not theirs else mine / theirs

    out: list[dict[str, object]] = []
    for aim in aims:
        row: dict[str, object] = {
            "measure": f"{aim.measure}, {aim.what}", "against": roles.get(aim.against, aim.against) or "–",
            "target": f"{'≥' if aim.least else '≤'} {aim.limit:g}{'x' if aim.against else ''}",
        }  # fmt: skip
        for place in PLACES:
            got = quotient(aim, place)
            met = got is not None and (got >= aim.limit if aim.least else got <= aim.limit)
            verdict = "met" if met else "not measured" if got is None else "missed"
            row[place], row[f"{place} verdict"] = got, verdict if place in aim.places else "–"
        out.append(row)
    return out


COLUMNS = ("measure", "against", "target", "workload namespaces", "host identity", "bare tunnel")


def cells(row: Mapping[str, object]) -> list[str]:
    """A row as texts, in the order of COLUMNS."""
    return [str(row["measure"]), str(row["against"]), str(row["target"]), *(_cell(row[p], str(row[f"{p} verdict"])) for p in PLACES)]


def _cell(value: object, verdict: str) -> str:
    return f"{value:.2f} {verdict}" if isinstance(value, float) else verdict


def met(row: Mapping[str, object]) -> bool:
    """Does the product reach it wherever it was measured, and somewhere?"""
    verdicts = [row[f"{place} verdict"] for place in ("enforced", "host")]
    return "met" in verdicts and "missed" not in verdicts


def table(found: Sequence[Mapping[str, object]]) -> str:
    """For a terminal."""
    lines = [list(COLUMNS), *(cells(r) for r in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
