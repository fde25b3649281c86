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
250 ms counts as lost. Handshakes are those of a responder with 1,500 peers, answering the same recorded initiations. Nothing in the
tests asserts a timing.

Three ways of ours are measured:

- **retinue enforced**: the whole product with workloads in network namespaces of their own. Agents, signed policy, the nftables verdict
  for every packet in both directions; and a packet crosses the workload's veth and is forwarded, on both hosts. The peers have no such
  hop: their application runs beside the tunnel, in the host's namespace.
- **retinue enforced host**: the whole product as well, with the same agents, policy and verdicts, but the hosts themselves hold the
  identities (`retinue attach NAME --host`), so that the application is where the peers' applications are. This is the like-for-like
  comparison.
- **retinue bare**: our engine alone, without agents and firewall.

That policy is enforced is shown in the same run, for every product subject at the start and after every round: a port that the policy does not
name is called while somebody listens there; the call must be refused, the listener must be found by a call around the mesh, and the
`accepted` counters of the firewall's chains must have grown on both hosts. If not, the run ends without figures.

    make bench                              # all of it, about a quarter of an hour; writes out/bench.json and out/bench.svg
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

`retinue-engine --low-power` never looks by the clock (as `--poll-us 0`); `--poll-us N` sets for how long it does after bulk traffic; `--no-tun-offload`, `--no-udp-gso` and
`--no-udp-gro` turn one kernel offload off each (the engine tests them when it starts and falls back by itself); `--no-avx512` leaves
the ciphers to AWS-LC alone. `retinue-agent --engine-option low-power` (a switch's name without dashes; it may be given again, and the
sidecar has it too) passes one on to the engine that the agent starts; so does RETINUE_ENGINE_OPTIONS in its environment. AES-256-GCM is used
between two endpoints whose signed records both offer it, which `retinue enroll` does where our engine will be used and the CPU has vector AES;
anybody else gets ChaCha20-Poly1305.
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
    out.append(
        "\nWhat it has to be, and what it was (quotients of medians): workload namespaces are *retinue enforced*, host identity is *retinue enforced\n"
        "host*, bare tunnel is the same without agents and firewall.\n\n"
    )
    out.append(_line(COLUMNS) + "|---" * len(COLUMNS) + "|\n")
    out += [_line([c.replace("missed", "**missed**") for c in cells(r)]) for r in bench["ratios"]]
    out.append("\n")
    proofs = bench["enforcement"]
    if proofs:
        calls, packets = (sum(p[k] for p in proofs.values()) for k in ("denied calls", "packets passed"))
        out.append(f"{calls} calls of denied ports over {len(proofs)} product subjects, all refused; {packets:,} packets passed by the firewall's chains.\n\n")
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
