"""Run the whole test suite with branch coverage and hold the pure parts to their floor.

Usage: python tools/run_tests.py [pytest arguments]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = 95  # percent of branches and lines
# Pure: what they do follows from their arguments. The shells around them are held by tests/netns and tests/cli.
PURE = [
    "identity/*",
    "policy/*",
    "ca/authority.py", "ca/enroll.py", "ca/signer.py", "ca/registry*.py", "ca/scope.py", "ca/feed.py",
    "mesh/compile.py", "mesh/plan.py", "mesh/sync.py", "mesh/snapshot.py", "mesh/state.py", "mesh/devices/uapi.py",
    "mesh/attestation.py", "mesh/workload_proto.py",
]  # fmt: skip


def main() -> int:
    env = {**os.environ, "COVERAGE_FILE": str(ROOT / ".coverage")}
    python = [sys.executable, "-m"]
    tests = subprocess.run([*python, "pytest", "--cov", "--cov-report=", *sys.argv[1:]], cwd=ROOT, env=env, check=False).returncode
    if tests or len(sys.argv) > 1:
        return tests
    report = [*python, "coverage", "report", f"--include={','.join(PURE)}", f"--fail-under={FLOOR}"]
    return subprocess.run(report, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
