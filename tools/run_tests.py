"""Run the whole test suite with branch coverage and hold the pure parts to their floor.

Usage: python tools/run_tests.py [pytest arguments]

Without arguments it runs in two lanes at once, because real packets mostly wait and pure tests mostly compute: what needs the
machine's attention (processes, namespaces) in one, shown as it goes; the rest with lower priority in the other, shown when the
first has ended. With CI set the second lane ends with the kernel's WireGuard in qemu (`make test-kernel`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
FLOOR = 95  # percent of branches and lines
PATIENT = ["tests/unit", "tests/judges", "tests/model", "tests/sim"]  # no result of theirs depends on who else is computing
NICE = 10  # of the patient lane: a tenth of the weight of the other
# Pure: what they do follows from their arguments. The shells around them are held by tests/netns and tests/cli.
PURE = [
    "identity/*",
    "policy/*",
    "ca/authority.py", "ca/enroll.py", "ca/signer.py", "ca/registry*.py", "ca/scope.py", "ca/feed.py",
    "mesh/compile.py", "mesh/plan.py", "mesh/sync.py", "mesh/snapshot.py", "mesh/state.py", "mesh/devices/uapi.py",
    "mesh/attestation.py", "mesh/workload_proto.py",
]  # fmt: skip
PYTHON = [sys.executable, "-u", "-m"]


def pytest(*arguments: str) -> list[str]:
    """The command that measures coverage of these tests."""
    return [*PYTHON, "pytest", "--cov", "--cov-report=", *arguments]


def environment(lane: str) -> dict[str, str]:
    return {**os.environ, "COVERAGE_FILE": str(ROOT / f".coverage{lane}")}


def report() -> int:
    """The floor, over what every lane has measured."""
    files = [str(p) for p in (ROOT / ".coverage.packets", ROOT / ".coverage.patient") if p.is_file()]
    env = environment("")
    subprocess.run([*PYTHON, "coverage", "combine", "-q", *files], cwd=ROOT, env=env, check=True)
    command = [*PYTHON, "coverage", "report", f"--include={','.join(PURE)}", f"--fail-under={FLOOR}"]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def patient_lane(out: IO[bytes]) -> int:
    """Every command of the lane, whatever came of the one before; the first status that is not 0."""
    commands = [pytest(*PATIENT)]
    if os.environ.get("CI"):
        commands.append([sys.executable, "-u", "tools/kernel_lane.py"])
    env = environment(".patient")
    done = [
        subprocess.run(["nice", "-n", str(NICE), *c], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        for c in commands
    ]  # fmt: skip
    return next((status for status in done if status), 0)


def in_two_lanes() -> int:
    """Both lanes; the first status that is not 0."""
    OUT.mkdir(exist_ok=True)
    began = time.monotonic()
    log = OUT / "tests-patient.log"
    with log.open("wb") as out, ThreadPoolExecutor(1) as pool:
        patient = pool.submit(patient_lane, out)
        away = [f"--ignore={part}" for part in PATIENT]
        packets = subprocess.run(pytest(*away), cwd=ROOT, env=environment(".packets"), check=False).returncode
        print(f"\n==== packets and processes: status {packets} after {time.monotonic() - began:.0f} s; beside them ran:", flush=True)
        computed = patient.result()
    print(log.read_text(errors="replace"), flush=True)
    print(f"==== pure parts, model, judges: status {computed}; all after {time.monotonic() - began:.0f} s", flush=True)
    return packets or computed


def main() -> int:
    if len(sys.argv) > 1:
        return subprocess.run(pytest(*sys.argv[1:]), cwd=ROOT, env=environment(""), check=False).returncode
    return in_two_lanes() or report()


if __name__ == "__main__":
    sys.exit(main())
