"""``python -m tests.bench [--rounds 5] [--seconds 1] [--only WORD ...] [--quick] [--floor] [--publish]``: out/bench.json and a plot.

``--floor`` is the short comparison with the distribution's packages: it prints the verdict and ends with status 1 below the floor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.bench import ratios
from tests.bench.enforced import NotEnforced, Product, enforced
from tests.bench.handshakes import handshakes
from tests.bench.measures import Row, Target, idle, measure
from tests.bench.peers import many_peers
from tests.bench.plot import plot
from tests.bench.publish import publish
from tests.bench.rig import Pair, run, sweep
from tests.bench.subjects import TCP1, Subject, subjects

ROOT = Path(__file__).resolve().parent.parent.parent
Values = dict[tuple[str, str, str], list[float]]
FLOOR_SUBJECTS = {role for aim in ratios.FLOOR for role in (f"enforced {aim.mode}", aim.against)}


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    commit = run("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD", check=False).strip() or "?"
    return {
        "kernel": platform.release(), "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "commit": commit,
        "date": time.strftime("%Y-%m-%d"), "iperf3": " ".join(run("iperf3", "--version").split()[:2]), "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


class Bench:
    """The subjects that are up, and what was measured of them."""

    def __init__(self, labs: contextlib.ExitStack) -> None:
        self.labs = labs
        self.running: list[tuple[Subject, Target]] = []
        self.values: Values = defaultdict(list)
        self.products: dict[str, Product] = {}

    def up(self, number: int, subject: Subject, seconds: int) -> None:
        """Start one; what does not start is said and left out."""
        try:
            if subject.product is not None:
                product = self.labs.enter_context(enforced(number, **dict(subject.product)))  # type: ignore[arg-type]  # see subjects
                pair, far, pids = product.pair, product.far, product.pids
                self.products[subject.name] = product
            else:
                assert subject.start is not None
                pair = Pair(number)
                self.labs.callback(pair.down)
                pair.up()
                (_, far), pids = subject.start(pair)
        except NotEnforced:
            raise
        except Exception as e:  # one subject must not end the run
            print(f"left out {subject.name}: {e}", file=sys.stderr)
            return
        self.take(subject.name, idle(pids))
        self.running.append((subject, Target(pair, far, pids, seconds)))
        print(f"  {subject.name:32} {subject.version} {subject.settings}", flush=True)

    def take(self, subject: str, rows: Sequence[Row]) -> None:
        for name, value, unit in rows:
            self.values[name, subject, unit].append(value)

    def round(self, subject: Subject, target: Target, measures: tuple[str, ...]) -> None:
        """Measure one subject; a product has to show afterwards that it was enforcing. Raises NotEnforced."""
        self.take(subject.name, measure(target, measures))
        if subject.name in self.products:
            self.products[subject.name].prove()

    def rows(self) -> list[dict[str, object]]:
        """Medians."""
        order = {s.name: i for i, (s, _) in enumerate(self.running)}
        return [
            {"measure": m, "subject": s, "value": statistics.median(v), "unit": u, "n": len(v), "min": min(v), "max": max(v)}
            for (m, s, u), v in sorted(self.values.items(), key=lambda item: order.get(item[0][1], 99))
        ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=1, help="of one measurement; TCP with one stream takes two of it")
    parser.add_argument("--only", nargs="*", default=[], help="subjects whose name has one of the words")
    parser.add_argument("--publish", action="store_true", help="write docs/PERFORMANCE.md and docs/bench.svg from this run")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--floor", action="store_true", help="only the distribution's packages, three rounds of TCP; status 1 below the floor")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if os.geteuid() != 0:
        print("error[privilege.root]: the benchmarks make network namespaces\nhint: run as root", file=sys.stderr)
        return 4
    rounds = 1 if options.quick else min(options.rounds, 3) if options.floor else options.rounds
    facts = machine()
    print(f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, {facts['iperf3']}, load {facts['load']}")
    print(f"{rounds} interleaved rounds of {options.seconds} s; both ends on this machine, veth MTU 1500, tunnel MTU 1420")
    sweep()
    chosen = [s for s in subjects(options.only) if not options.floor or s.role in FLOOR_SUBJECTS]
    with contextlib.ExitStack() as labs:
        bench = Bench(labs)
        for number, subject in enumerate(chosen, 1):
            bench.up(number, subject, options.seconds)
        for index in range(rounds):
            for subject, target in bench.running:
                started = time.monotonic()
                bench.round(subject, target, (TCP1,) if options.floor else subject.measures)
                print(f"  round {index + 1}/{rounds} {subject.name:32} {time.monotonic() - started:5.1f} s", file=sys.stderr)
        if not options.floor and any(s.role == "bare chacha" for s, _ in bench.running):
            pair = next(t.pair for s, t in bench.running if s.role == "bare chacha")
            for extra in (handshakes, many_peers):
                for name, row in extra(pair, rounds):
                    bench.take(name, [row])
    for name, product in bench.products.items():
        print(f"  {name}: {product.refused} denied calls refused, {sum(product.passed.values())} packets passed by the firewall's chains")
    rows, up = bench.rows(), [s for s, _ in bench.running]
    aims = ratios.FLOOR if options.floor else ratios.AIMS + ratios.FLOOR
    found = ratios.ratios(rows, {s.role: s.name for s in up}, aims)
    show(rows, [s.name for s in up])
    print(ratios.table(found))
    if options.floor:
        return 0 if all(ratios.met(r) for r in found) else 1
    report = {
        "machine": facts, "versions": {s.name: s.version for s in up}, "subject settings": {s.name: s.settings for s in up},
        "settings": {"rounds": rounds, "seconds": options.seconds}, "ratios": found, "rows": rows,
        "enforcement": {name: product.evidence() for name, product in bench.products.items()},
    }  # fmt: skip
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    (out / "bench.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (out / "bench.svg").write_text(plot(rows, facts))
    print("wrote out/bench.json and out/bench.svg")
    if options.publish:
        publish()
    return 0


def show(rows: list[dict[str, object]], order: list[str]) -> None:
    """A line a subject under every measure: median (min-max), n."""
    for name, unit in dict.fromkeys((str(r["measure"]), str(r["unit"])) for r in rows):
        print(f"\n{name}, {unit}")
        for r in sorted((r for r in rows if r["measure"] == name), key=lambda r: order.index(str(r["subject"])) if r["subject"] in order else 99):
            print(f"  {r['subject']:34} {r['value']:10.2f}  ({r['min']:.2f} - {r['max']:.2f}), n={r['n']}")
    print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotEnforced as e:
        print(f"error[bench.enforcement]: {e}\nhint: no figure of this run counts", file=sys.stderr)
        sys.exit(1)
    except subprocess.TimeoutExpired as e:
        print(f"error[bench.timeout]: {e}\nhint: is the machine busy?", file=sys.stderr)
        sys.exit(1)
