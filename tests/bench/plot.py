"""A plot of the benchmark rows as one SVG: a small panel a measure, a bar a subject, whiskers from min to max.

Every axis starts at zero and has its own scale. Who a bar belongs to is told by its label and its pattern, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, ROW, LEFT, TOP, GAP = 580, 22, 230, 50, 22
BAR = 14
# (what a subject's name starts with, fill, words of the legend); the first that fits.
KINDS = (
    ("no tunnel", "#9aa0a6", "no tunnel"),
    ("retinue enforced", "#1256b0", "Retinue: agents, policy, firewall"),
    ("retinue bare", "url(#bare)", "Retinue: bare tunnel"),
    ("wireguard-go", "#d98324", "wireguard-go"),
    ("nebula", "url(#nebula)", "nebula"),
)
PATTERNS = (
    '<defs><pattern id="bare" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#c3daf8"/><rect width="3" height="6" fill="#4a8be0"/></pattern>'
    '<pattern id="nebula" width="5" height="5" patternUnits="userSpaceOnUse"><rect width="5" height="5" fill="#7b5aa6"/>'
    '<circle cx="2.5" cy="2.5" r="1.2" fill="#fff"/></pattern></defs>'
)
# Which measures are plotted, in this order, and which way is good.
PANELS = (
    ("TCP 1 stream", True), ("TCP 4 streams", True), ("UDP 1300 B delivered", True), ("UDP 100 B delivered", True),
    ("RTT p50", False), ("RTT p99", False), ("RTT under load p50", False), ("RTT under load, lost", False),
    ("CPU per GB", False), ("RSS loaded", False), ("handshakes", True), ("RSS idle peer", False), ("set 10000 peers", False),
)  # fmt: skip


def plot(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, object]) -> str:
    """SVG text; panels in two columns."""
    panels, heights = [], [112, 112]
    for name, more in PANELS:
        chosen = [r for r in rows if r["measure"] == name]
        if chosen:
            column = heights.index(min(heights))
            panels.append(_panel(name, more, chosen, column * (WIDTH + 40) + 24, heights[column]))
            heights[column] += TOP + ROW * len(chosen) + GAP
    said = escape(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine.get('date', '')}")
    width, height = 2 * WIDTH + 88, max(heights) + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12.5" fill="#202124">{PATTERNS}'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="24" y="34" font-size="20" font-weight="bold">Retinue data plane</text><text x="24" y="56" fill="#50555b">{said}</text>'
        f'<text x="24" y="75" fill="#50555b">bar and number: median of the interleaved rounds; line: lowest to highest round</text>'
        f"{_legend(24, 86)}{''.join(panels)}</svg>\n"
    )


def _legend(x: int, y: int) -> str:
    out = []
    for _, fill, words in KINDS:
        out.append(f'<rect x="{x}" y="{y}" width="22" height="{BAR}" fill="{fill}"/><text x="{x + 29}" y="{y + 11.5}">{escape(words)}</text>')
        x += 52 + 7 * len(words)
    return "".join(out)


def ticks(top: float) -> list[float]:
    """Round numbers from zero, at least to `top`, in three to six steps."""
    step = 10.0 ** (len(str(int(top))) - 1) if top >= 1 else 0.1
    while top / step > 5:
        step *= 2
    while top / step < 2.5:
        step /= 2
    return [step * n for n in range(int(top / step) + (0 if (top / step).is_integer() else 1) + 1)]


def _panel(name: str, more: bool, rows: Sequence[Mapping[str, Any]], x: int, y: int) -> str:
    marks = ticks(max(float(r["max"]) for r in rows) or 1.0)
    room = (WIDTH - LEFT - 62) / marks[-1]
    good = "more is better" if more else "less is better"
    unit = f'<tspan font-size="12.5" font-weight="normal" fill="#50555b">  {escape(str(rows[0]["unit"]))}, {good}</tspan>'
    out = [f'<text x="{x}" y="{y + 20}" font-size="14.5" font-weight="bold">{escape(name)}{unit}</text>']
    bottom = y + TOP + ROW * len(rows) - 4
    for mark in marks:
        at = x + LEFT + room * mark
        out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y + TOP - 6}" y2="{bottom}" stroke="#dadce0"/>')
        out.append(f'<text x="{at:.1f}" y="{y + TOP - 10}" text-anchor="middle" font-size="11" fill="#50555b">{mark:g}</text>')
    for number, row in enumerate(rows):
        value, low, high = (room * float(row[k]) for k in ("value", "min", "max"))
        line = y + TOP + number * ROW
        middle, start = line + BAR / 2, x + LEFT
        fill = next((f for begin, f, _ in KINDS if str(row["subject"]).startswith(begin)), "#888")
        ends = "".join(
            f'<line x1="{start + e:.1f}" x2="{start + e:.1f}" y1="{middle - 4}" y2="{middle + 4}" stroke="#111" stroke-width="1.4"/>' for e in (low, high)
        )
        out.append(
            f'<text x="{start - 8}" y="{line + 11.5}" text-anchor="end">{escape(str(row["subject"]))}</text>'
            f'<rect x="{start}" y="{line}" width="{max(value, 1):.1f}" height="{BAR}" fill="{fill}"/>'
            f'<line x1="{start + low:.1f}" x2="{start + high:.1f}" y1="{middle}" y2="{middle}" stroke="#111" stroke-width="1.4"/>{ends}'
            f'<text x="{start + max(high, value) + 7:.1f}" y="{line + 11.5}">{_number(float(row["value"]))}</text>'
        )
    return "".join(out)


def _number(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
