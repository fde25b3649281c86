"""docs/PERFORMANCE.md from out/bench.json: the last run with its machine, and how the figures came about.

The profile is text of its own (profile.md beside this): it is made by hand, with perf, not by every run.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.bench.ratios import COLUMNS, cells

ROOT = Path(__file__).resolve().parent.parent.parent
WHAT = """\
Everything runs interleaved in one go on one machine: two network namespaces a subject on a veth pair (MTU 1500, tunnel MTU 1420), both
ends on the same cores, iperf3 for TCP and UDP, one 64-byte datagram at a time for round trips. Values are medians, the range of the
rounds in brackets. "Delivered" is what the receiver counted while the sender offered as much as it could. CPU is the busy time of the
whole machine, iperf3 included. "Under load" is beside one TCP stream at full speed through the same tunnel; a datagram unanswered for
250 ms counts as lost. The *enforced* rows are the whole product: agents, signed policy, workload namespaces, and the nftables verdict
for every packet in both directions; the *bare* rows are our engine alone, as the others are. Handshakes are those of a responder with
1,500 peers, answering the same recorded initiations. Nothing in the tests asserts a timing.

    make bench                              # all of it, under twelve minutes; writes out/bench.json and out/bench.svg
    make bench ARGS="--quick --only retinue"
    make bench ARGS=--publish               # and this page
    make bench-floor                        # under a minute: against the distribution's packages; status 1 below the floor

The peers are taken from the PATH (Debian: `wireguard-go`, `nebula`) and, beside those, from WIREGUARD_GO, NEBULA and NEBULA_CERT. Newest ones
come as Go modules, with Go 1.26 or later:

    go install golang.zx2c4.com/wireguard@latest                          # the program is called wireguard
    go install github.com/slackhq/nebula/cmd/...@latest                   # its last release; @master is the development head
    cd "$(go env GOPATH)/bin" && WIREGUARD_GO=$PWD/wireguard NEBULA=$PWD/nebula NEBULA_CERT=$PWD/nebula-cert make -C ~/retinue bench

Where the module gvisor.dev/gvisor cannot be had, nebula builds from a clone with a `replace` to a module of one package, `pkg/tcpip/checksum`, with
one function, `Checksum(buf []byte, initial uint16) uint16` (RFC 1071 sum, not inverted): nothing else of it is in the program, and CPUs with AVX2
do not call it. The last run used such a build of commit 9c5d701 (2026-08-21).
"""
READING = """\
## Switches

`retinue-engine --low-power` never spins; `--spin-us N` sets how long it polls after traffic; `--no-tun-offload`, `--no-udp-gso` and
`--no-udp-gro` turn one kernel offload off each (the engine tests them when it starts and falls back by itself). The agent hands RETINUE_ENGINE_OPTIONS
of its environment to the engine it starts. AES-256-GCM is used between two endpoints whose signed records both offer it, which `retinue enroll` does
where our engine will be used and the CPU has vector AES; anybody else gets ChaCha20-Poly1305.
"""
MANY = ("handshakes", "set 10000 peers", "change 1 of 10000 peers", "RSS idle peer")


def page(bench: dict[str, Any], profile: str) -> str:
    """Markdown of one run."""
    machine, rows, settings = bench["machine"], bench["rows"], bench["settings"]
    out = ["# Performance\n\n", WHAT, "\n## The last run\n\n"]
    out.append(
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine['iperf3']}, Python {machine['python']}, "
        f"commit {machine['commit']}; {settings['rounds']} rounds of {settings['seconds']} s (TCP with one stream: twice that); "
        f"load before the start {machine['load']}.\n\n"
    )
    out += [f"- {s}: {v}{', ' * bool(bench['subject settings'][s])}{bench['subject settings'][s]}\n" for s, v in bench["versions"].items()]
    out.append("\nWhat it has to be, and what it was (quotients of medians; *bare* is the same without agents and firewall):\n\n")
    out.append(_line(COLUMNS) + "|---" * len(COLUMNS) + "|\n")
    out += [_line([*cells(r)[:-1], f"**{r['verdict']}**" if r["verdict"] == "missed" else str(r["verdict"])]) for r in bench["ratios"]]
    out.append("\n")
    out.append(_table([r for r in rows if r["measure"] not in MANY]))
    out.append("\n")
    out.append(_table([r for r in rows if r["measure"] in MANY]))
    out += ["\n![the same as bars](bench.svg)\n\n", profile, "\n", READING]
    return "".join(out)


def _line(texts: Any) -> str:
    return "| " + " | ".join(texts) + " |\n"


def _table(rows: list[dict[str, Any]]) -> str:
    """Subjects down, measures across."""
    measures = list(dict.fromkeys((r["measure"], r["unit"]) for r in rows))
    by_cell = {(r["measure"], r["subject"]): r for r in rows}
    out = [_line(["subject", *(f"{m} ({u})" for m, u in measures)]), "|---" * (len(measures) + 1) + "|\n"]
    for subject in dict.fromkeys(r["subject"] for r in rows):
        out.append(_line([subject, *(_value(by_cell.get((m, subject))) for m, _ in measures)]))
    return "".join(out)


def _value(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    value, low, high = (f"{row[k]:,.0f}" if row[k] >= 100 else f"{row[k]:.3g}" for k in ("value", "min", "max"))
    return f"**{value}** ({low}–{high})" if row["n"] > 1 else value


def publish() -> None:
    """Write the page and its plot from the last run."""
    bench = json.loads((ROOT / "out" / "bench.json").read_text())
    profile = Path(__file__).with_name("profile.md").read_text()
    (ROOT / "docs" / "PERFORMANCE.md").write_text(page(bench, profile))
    shutil.copy(ROOT / "out" / "bench.svg", ROOT / "docs" / "bench.svg")
    print("wrote docs/PERFORMANCE.md and docs/bench.svg", file=sys.stderr)
