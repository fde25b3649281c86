"""A plot of the benchmark rows as one SVG: a small panel a measure, a bar a subject, whiskers from min to max."""

from __future__ import annotations

from html import escape

WIDTH, ROW, LEFT, TOP = 460, 22, 190, 34
COLOURS = {"no tunnel": "#9aa0a6"}
OURS, OTHERS = "#1a73e8", "#e8a33d"


def plot(rows: list[dict[str, object]], machine: dict[str, object]) -> str:
    """SVG text; panels in two columns."""
    measures = list(dict.fromkeys((str(r["measure"]), str(r["unit"])) for r in rows))
    panels, column_height = [], [56, 56]
    for name, unit in measures:
        chosen = [r for r in rows if r["measure"] == name]
        height = TOP + ROW * len(chosen) + 14
        column = column_height.index(min(column_height))
        panels.append(_panel(name, unit, chosen, column * (WIDTH + 30) + 20, column_height[column]))
        column_height[column] += height
    title = escape(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; median, whiskers min-max")
    total = 2 * WIDTH + 70
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{max(column_height) + 20}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="20" y="26" font-size="16" font-weight="bold">Retinue data plane</text>'
        f'<text x="20" y="44" fill="#555">{title}</text>{"".join(panels)}</svg>\n'
    )


def _panel(name: str, unit: str, rows: list[dict[str, object]], x: int, y: int) -> str:
    top = max(float(str(r["max"])) for r in rows) or 1.0
    room = WIDTH - LEFT - 70
    out = [f'<text x="{x}" y="{y + 18}" font-weight="bold">{escape(name)} <tspan fill="#777" font-weight="normal">{escape(unit)}</tspan></text>']
    for i, row in enumerate(rows):
        subject = str(row["subject"])
        value, low, high = (float(str(row[k])) for k in ("value", "min", "max"))
        colour = COLOURS.get(subject, OURS if subject.startswith("retinue") else OTHERS)
        line, length = y + TOP + i * ROW, room * value / top
        middle = line + 6
        out.append(
            f'<text x="{x + LEFT - 8}" y="{line + 10}" text-anchor="end">{escape(subject)}</text>'
            f'<rect x="{x + LEFT}" y="{line}" width="{length:.1f}" height="12" rx="2" fill="{colour}"/>'
            f'<line x1="{x + LEFT + room * low / top:.1f}" x2="{x + LEFT + room * high / top:.1f}" y1="{middle}" y2="{middle}" stroke="#333"/>'
            f'<text x="{x + LEFT + room * high / top + 6:.1f}" y="{line + 10}">{value:.3g}</text>'
        )
    return "".join(out)
