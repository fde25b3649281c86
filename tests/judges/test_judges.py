"""The importers and the evaluator against outside judges: cases and a driver beside the checkout, when they are there.

Slow by nature (each case is two real command lines), with the mutation self-check on. Level `nets` judges the pairs too, so
it runs alone by default; RETINUE_JUDGE_LEVELS=pairs,nets runs both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

JUDGES = Path(__file__).resolve().parents[3] / "shared" / "judges"
DRIVER = JUDGES / "check.py"
RETINUE = Path(sys.executable).with_name("retinue")

pytestmark = [
    pytest.mark.judges,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not DRIVER.exists(), reason=f"the outside judge cases are absent: there is no {DRIVER}"
    ),
]


@pytest.mark.parametrize("level", os.environ.get("RETINUE_JUDGE_LEVELS", "nets").split(","))
@pytest.mark.parametrize("which", ["tailscale", "netpol", "nsx"])
def test_every_case_of_the_set_agrees(which: str, level: str) -> None:
    argv = [
        sys.executable, str(DRIVER), "run", "--set", which, "--level", level, "--mutate",
        "--product", str(RETINUE), "-j", str(min(4, os.cpu_count() or 1)),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    caught = re.search(r"mutants caught: (\d+) of (\d+)", done.stdout)
    assert caught is not None, done.stdout
    assert caught[1] == caught[2] != "0", done.stdout
    assert re.search(r"\b[1-9]\d* passed, 0 failed", done.stdout), done.stdout
