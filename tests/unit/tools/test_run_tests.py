"""The second look at tests that a busy machine may have failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import run_tests

UNSTEADY = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("n", range({count}))
def test_waits_for_a_process(n):
    seen = Path(__file__).with_name(f"seen{{n}}")
    known, _ = seen.exists(), seen.touch()
    assert known

def test_steady():
    pass
"""


@pytest.fixture
def lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the tests of a text as the first lane does, then looks again; returns both statuses."""
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(run_tests, "pytest", lambda *words: [sys.executable, "-m", "pytest", "-q", *(w for w in words if "cov" not in w)])
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(text: str, name: str = "test_x.py") -> tuple[int, int]:
        (tmp_path / name).write_text(text)
        return run_tests.first_look(["-p", "no:randomly"]), run_tests.second_look()

    return run


def test_what_passes_alone_is_named_and_passes(lane, capfd: pytest.CaptureFixture[str]) -> None:
    assert lane(UNSTEADY.format(count=2)) == (1, 0)
    printed = capfd.readouterr().out
    assert "UNSTEADY (passed alone" in printed
    assert printed.count("test_x.py::test_waits_for_a_process[1]") >= 2


def test_what_fails_again_fails(lane, capfd: pytest.CaptureFixture[str]) -> None:
    assert lane("def test_no(): assert False\n") == (1, 1)
    assert "failed again" in capfd.readouterr().out


def test_many_failures_are_no_matter_of_a_busy_machine(lane) -> None:
    assert lane(UNSTEADY.format(count=4)) == (1, 1)


@pytest.mark.parametrize(("name", "test"), [("test_attacks_host.py", "waits_for_a_process"), ("test_y.py", "nothing_is_lost")])
def test_what_must_never_happen_once_gets_no_second_look(lane, name: str, test: str) -> None:
    assert lane(UNSTEADY.format(count=1).replace("waits_for_a_process", test), name) == (1, 1)


def test_only_this_run_counts(lane, tmp_path: Path) -> None:
    assert lane("def test_no(): assert False\n", "test_attack.py") == (1, 1)
    (tmp_path / "test_attack.py").unlink()
    assert lane(UNSTEADY.format(count=1)) == (1, 0)
