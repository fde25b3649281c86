"""spin looks at every state of the model, and refutes every bug variant of it (README.md)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("move.pml")
BUGS = sorted(set(re.findall(r"BUG_[A-Z_]+", MODEL.read_text())))


def verify(directory: Path, *defines: str) -> tuple[int, int, str]:
    """(errors, states, everything spin said) of the model with these definitions."""
    assert shutil.which("spin"), "spin is missing: make setup installs it"
    model = shutil.copy(MODEL, directory / "move.pml")
    subprocess.run(["spin", *(f"-D{d}" for d in defines), "-a", model], cwd=directory, check=True, capture_output=True, timeout=60)
    subprocess.run(["cc", "-O1", "-w", "-DSAFETY", "-DMEMLIM=3000", "-o", "pan", "pan.c"], cwd=directory, check=True, capture_output=True, timeout=60)
    said = subprocess.run([directory / "pan", "-m100000"], cwd=directory, check=False, capture_output=True, text=True, timeout=110).stdout
    errors, states = re.search(r"errors: (\d+)", said), re.search(r"(\d+(?:\.\d+e\+\d+)?) states, stored", said)
    assert errors, said
    assert states, said
    assert "max search depth too small" not in said
    return int(errors[1]), int(float(states[1])), said


def test_the_model_holds(tmp_path: Path) -> None:
    errors, states, said = verify(tmp_path, "CORRECT")
    assert errors == 0, said
    assert "out of memory" not in said
    assert "Search not completed" not in said
    assert states > 100_000, "positive control: there was something to look at"


def test_all_bug_variants_are_known() -> None:
    assert len(BUGS) == 6


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(tmp_path: Path, bug: str) -> None:
    errors, _, said = verify(tmp_path, bug)
    assert errors == 1, said
    assert "assertion violated" in said
