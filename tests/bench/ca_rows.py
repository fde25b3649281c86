"""Rows of a run, as out/*.json and the pages have them: `measure, subject, value, unit, n, min, max`."""

from __future__ import annotations

from collections.abc import Sequence


class Rows:
    """What was measured; each row is printed as it comes unless `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.rows: list[dict[str, object]] = []
        self._quiet = quiet

    def add(self, measure: str, subject: str, values: Sequence[float], unit: str) -> None:
        """p50 and p99 of many values, or the one value."""
        ordered = sorted(values)
        for name, q in (("p50", 0.5), ("p99", 0.99)) if len(ordered) > 1 else (("", 0.0),):
            self._put(f"{measure} {name}".strip(), subject, ordered[min(len(ordered) - 1, int(len(ordered) * q))], unit, ordered)

    def median(self, measure: str, subject: str, values: Sequence[float], unit: str) -> None:
        """The median of some rounds."""
        ordered = sorted(values)
        self._put(measure, subject, ordered[len(ordered) // 2], unit, ordered)

    def _put(self, measure: str, subject: str, value: float, unit: str, of: list[float]) -> None:
        row: dict[str, object] = {
            "measure": measure, "subject": subject, "value": round(value, 1), "unit": unit, "n": len(of), "min": round(of[0], 1), "max": round(of[-1], 1),
        }  # fmt: skip
        self.rows.append(row)
        if not self._quiet:
            print(f"  {measure:46} {subject:34} {row['value']:>10} {unit:6} ({row['min']} - {row['max']}), n={row['n']}", flush=True)
