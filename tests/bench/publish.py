"""docs/PERFORMANCE.md from out/bench.json: the last run with its machine, and how the figures came about."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
WHAT = """\
Everything runs interleaved in one go on one machine: two network namespaces a subject on a veth pair (MTU 1500, tunnel MTU 1420), both
ends on the same cores, iperf3 for TCP and UDP, one 64-byte datagram at a time for round trips. Values are medians, the range of the
rounds in brackets. "Delivered" is what the receiver counted while the sender offered as much as it could. CPU is the busy time of the
whole machine, iperf3 included. The *enforced* rows are the whole product: agents, signed policy, workload namespaces, and the nftables
verdict for every packet in both directions; the other rows are bare tunnels. Nothing in the tests asserts a timing.

    make bench                              # all of it, about ten minutes; writes out/bench.json and out/bench.svg
    make bench ARGS="--quick --only retinue"
    make bench ARGS=--publish               # and this page

A newer wireguard-go is measured beside the distribution's when it can be found: `go install golang.zx2c4.com/wireguard@latest`, then
`WIREGUARD_GO=$(go env GOPATH)/bin/wireguard make bench`.
"""
READING = """\
## Switches

`retinue-engine --low-power` never spins; `--spin-us N` sets how long it polls after traffic; `--no-tun-offload`, `--no-udp-gso` and
`--no-udp-gro` turn one kernel offload off each (the engine tests them when it starts and falls back by itself). AES-256-GCM is used between two
endpoints whose signed records both offer it, which `retinue enroll` does where our engine will be used and the CPU has vector AES;
anybody else gets ChaCha20-Poly1305.
"""


def page(bench: dict[str, Any]) -> str:
    """Markdown of one run."""
    machine, rows = bench["machine"], bench["rows"]
    order = [s for s in bench["versions"] if any(r["subject"] == s for r in rows)]
    measures = list(dict.fromkeys((r["measure"], r["unit"]) for r in rows))
    cells = {(r["measure"], r["subject"]): r for r in rows}
    out = ["# Performance\n\n", WHAT, "\n## The last run\n\n"]
    settings = bench["settings"]
    out.append(
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine['iperf3']}, Python {machine['python']}; "
        f"{settings['rounds']} rounds of {settings['seconds']:g} s; load before the start {machine['load']:.1f}.\n\n"
    )
    out += [f"- {s}: {bench['versions'][s]}\n" for s in order]
    out.append("\n| measure | " + " | ".join(order) + " |\n|---" + "|---" * len(order) + "|\n")
    for name, unit in measures:
        row = [f"{name} ({unit})"]
        for subject in order:
            r = cells.get((name, subject))
            row.append("–" if r is None else _value(r))
        out.append("| " + " | ".join(row) + " |\n")
    out += ["\n![the same as bars](bench.svg)\n\n", READING]
    return "".join(out)


def _value(row: dict[str, Any]) -> str:
    if row["n"] == 1:
        return f"{row['value']:.3g}"
    return f"**{row['value']:.3g}** ({row['min']:.3g}–{row['max']:.3g})"


def publish() -> None:
    """Write the page and its plot from the last run."""
    bench = json.loads((ROOT / "out" / "bench.json").read_text())
    (ROOT / "docs" / "PERFORMANCE.md").write_text(page(bench))
    shutil.copy(ROOT / "out" / "bench.svg", ROOT / "docs" / "bench.svg")
    print("wrote docs/PERFORMANCE.md and docs/bench.svg", file=sys.stderr)
