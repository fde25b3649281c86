"""What a row of the failure table is: what is done, what passes, and what came of it."""

from __future__ import annotations

import asyncio
import os
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

Verdict = Literal["pass", "partial", "fail", "not built", "error"]


@dataclass(slots=True)
class Run:
    """One run of one row: its seed and length, and the figures and checks it leaves.

    seconds: how long a row that lasts may last; None for its own short form.
    """

    seed: int
    seconds: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[tuple[str, bool]] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    absent: str = ""

    def note(self, **figures: Any) -> None:
        self.figures.update({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()})

    def check(self, text: str, ok: object) -> None:
        """One condition of passing."""
        self.checks.append((text, bool(ok)))

    def caveat(self, text: str) -> None:
        """What the row does less of than the table asks: it can be `partial` at best."""
        self.caveats.append(text)

    def lasts(self, short: float) -> float:
        return self.seconds if self.seconds is not None else short

    @property
    def verdict(self) -> Verdict:
        if self.absent:
            return "not built"
        if not self.checks:
            return "error"
        if not all(ok for _, ok in self.checks):
            return "fail"
        return "partial" if self.caveats else "pass"

    @property
    def reason(self) -> str:
        failed = [text for text, ok in self.checks if not ok]
        return "; ".join([self.absent] * bool(self.absent) + [f"failed: {t}" for t in failed] + self.caveats)


Body = Callable[[Any, Run], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Row:
    """stage: which rig it plays on: ``small`` (tests.chaos.stage), ``crowd`` (50 hosts), ``none``."""

    name: str
    title: str
    passes: str
    stage: Literal["small", "crowd", "none"]
    fast: bool
    body: Body
    final: bool = False  # it cannot be undone: played last on its stage


@dataclass(frozen=True, slots=True)
class Result:
    row: str
    title: str
    passes: str
    verdict: Verdict
    reason: str
    figures: dict[str, Any]
    seconds: float
    load: float = 0.0  # of the machine, over the last minute: what else ran beside it
    pressure: int = 0  # percent of the row's time in which something that could run had no processor

    def json(self) -> dict[str, Any]:
        return {
            "row": self.row, "title": self.title, "pass": self.passes, "verdict": self.verdict, "reason": self.reason,
            "figures": self.figures, "seconds": round(self.seconds, 1), "load": self.load, "pressure": self.pressure,
        }  # fmt: skip


ROWS: Final[dict[str, Row]] = {}


def row(name: str, title: str, passes: str, *, stage: Literal["small", "crowd", "none"] = "small", fast: bool = False, final: bool = False) -> Callable[[Body], Body]:
    """Register a row."""

    def register(body: Body) -> Body:
        if name in ROWS:
            raise ValueError(f"two rows are called {name}")
        ROWS[name] = Row(name, title, passes, stage, fast, body, final)
        return body

    return register


async def play(one: Row, stage: Any, run: Run) -> Result:
    """Run a row; what it raises is its verdict, not ours. On the small stage the denied pairs are watched throughout."""
    began, waited = time.monotonic(), _waited()
    try:
        if one.stage == "small":
            await stage.settle()
        async with asyncio.timeout(max(600.0, 4 * run.lasts(0))):
            await one.body(stage, run)
        if one.stage == "small":
            await stage.settle()
            bypass = stage.bypass()
            run.note(denied_attempted=bypass.attempted, denied_delivered=bypass.delivered)
            run.check("0 deliveries on denied pairs, which were tried", bypass.delivered == 0 and bypass.attempted > 0)
    except Exception as e:
        run.check(f"{type(e).__name__}: {str(e)[:300]}", ok=False)
        run.figures["trace"] = "".join(traceback.format_exception(e)[-4:])[-900:]
    seconds = time.monotonic() - began
    pressure = round(100 * (_waited() - waited) / max(seconds, 0.001))
    return Result(one.name, one.title, one.passes, run.verdict, run.reason, run.figures, seconds, round(os.getloadavg()[0], 1), pressure)


def _waited() -> float:
    """Seconds since boot in which at least one task waited for a processor (pressure stall information); 0 where it is not told."""
    try:
        text = Path("/proc/pressure/cpu").read_text()
    except OSError:
        return 0.0
    return int(text.split("total=")[1].split()[0]) / 1e6


def table(results: Sequence[Result]) -> str:
    """The F-table for a terminal."""
    lines = []
    for r in results:
        shown = ", ".join(f"{k} {v}" for k, v in r.figures.items() if k != "trace" and not k.startswith("denied_"))
        lines.append(f"{r.row:<5} {r.verdict:<9} {r.title}: {shown}" + (f"  [{r.reason}]" if r.reason else ""))
    counts = {v: sum(r.verdict == v for r in results) for v in ("pass", "partial", "fail", "not built", "error")}
    lines.append("      " + ", ".join(f"{n} {v}" for v, n in counts.items() if n))
    return "\n".join(lines)


def order(name: str) -> tuple[str, int, str]:
    """F2 before F19, F19 before F19a."""
    letters, digits, rest = re.fullmatch(r"([A-Z]+)(\d+)(\w*)", name).groups()  # type: ignore[union-attr]  # rows are named so
    return letters, int(digits), rest
