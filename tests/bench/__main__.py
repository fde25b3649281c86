"""``python -m tests.bench [--rounds 5] [--seconds 4] [--only WORD ...] [--quick] [--publish]``: writes out/bench.json and a plot."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from tests.bench.enforced import enforced
from tests.bench.measures import measure
from tests.bench.peers import many_peers
from tests.bench.plot import plot
from tests.bench.publish import publish
from tests.bench.rig import Pair, run
from tests.bench.subjects import Subject, subjects

PRODUCT: dict[str, dict[str, int]] = {
    "enforced": {"aes": False},
    "enforced AES": {"aes": True},
    "enforced, 10,000 elements": {"aes": False, "elements": 10_000},
}
ROOT = Path(__file__).resolve().parent.parent.parent


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    return {
        "kernel": platform.release(), "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(),
        "iperf3": run("iperf3", "--version").split("\n")[0], "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--publish", action="store_true", help="write docs/PERFORMANCE.md from this run")
    parser.add_argument("--quick", action="store_true", help="one round of one second")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("error[privilege.root]: the benchmarks make network namespaces\nhint: run as root", file=sys.stderr)
        return 4
    rounds, seconds = (1, 1.0) if options.quick else (options.rounds, options.seconds)
    facts = machine()
    print(f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, {facts['iperf3']}, load {facts['load']:.1f}")
    print(f"{rounds} interleaved rounds of {seconds:g} s; both ends on this machine, veth MTU 1500, tunnel MTU 1420")
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    running: list[tuple[Subject, Pair, str, list[int]]] = []
    pairs: list[Pair] = []
    labs = contextlib.ExitStack()
    try:
        for number, subject in enumerate(subjects(options.only), 1):
            pair = Pair(number)
            pairs.append(pair)
            pair.up()
            try:
                (_, far), pids = subject.start(pair)
            except (RuntimeError, OSError) as e:
                print(f"left out {subject.name}: {e}", file=sys.stderr)
                continue
            running.append((subject, pair, far, pids))
            print(f"  {subject.name:24} {subject.version}")
        for number, (name, settings) in enumerate(PRODUCT.items(), 201):
            if not options.only or any(word in name for word in options.only):
                pair, far, pids = labs.enter_context(enforced(number, **settings))
                running.append((Subject(name, "agents, signed policy, firewall"), pair, far, pids))
                print(f"  {name:24} agents, signed policy, firewall in the path")
        for index in range(rounds):
            for subject, pair, far, pids in running:
                started = time.monotonic()
                for name, value, unit in measure(pair, far, pids, seconds):
                    values[name, subject.name, unit].append(value)
                print(f"  round {index + 1}/{rounds} {subject.name:24} {time.monotonic() - started:5.1f} s", file=sys.stderr)
        if any(s.name == "retinue" for s, *_ in running):
            for name, value, unit in many_peers(pairs[0]):
                values[name, "retinue", unit].append(value)
    finally:
        labs.close()
        for pair in pairs:
            pair.down()
    rows = [
        {"measure": m, "subject": s, "value": statistics.median(v), "unit": u, "n": len(v), "min": min(v), "max": max(v)}
        for (m, s, u), v in values.items()
    ]
    show(rows, [s.name for s, *_ in running])
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    versions = {s.name: s.version for s, *_ in running}
    (out / "bench.json").write_text(json.dumps({"machine": facts, "versions": versions, "settings": {"rounds": rounds, "seconds": seconds}, "rows": rows}, indent=1))
    (out / "bench.svg").write_text(plot(rows, facts))
    print("wrote out/bench.json and out/bench.svg")
    if options.publish:
        publish()
    return 0


def show(rows: list[dict[str, object]], order: list[str]) -> None:
    """One table: measures down, subjects across, median (min-max)."""
    measures = list(dict.fromkeys((str(r["measure"]), str(r["unit"])) for r in rows))
    cells = {(r["measure"], r["subject"]): f"{r['value']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in rows}
    widths = [max([len(s), *(len(cells.get((m, s), "-")) for m, _ in measures)]) for s in order]
    print(f"\n{'':32}" + "  ".join(s.ljust(w) for s, w in zip(order, widths, strict=True)))
    for name, unit in measures:
        print(f"{name + ' ' + unit:32}" + "  ".join(cells.get((name, s), "-").ljust(w) for s, w in zip(order, widths, strict=True)).rstrip())
    print()


if __name__ == "__main__":
    sys.exit(main())
