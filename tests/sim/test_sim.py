"""Simulated meshes: hundreds of seeds keep every promise, and planted bugs are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.many import command, many, one, quiet
from tests.sim.mutations import MUTATIONS, planted

SEEDS = int(os.environ.get("RETINUE_SIM_SEEDS", "500"))
# Seeds that failed once stay here with what they found: (seed, actions, faults).
FOUND = [
    (1, 14, "all"),  # an agent whose clock is behind could not restore its own state
    (5, 30, "all"),  # a crash between the two first files of an agent's life
    (1014, 40, "all"),  # a bundle refused by a wrong clock was never looked at again
    (1022, 40, "all"),  # the simulator's own: a restored database at the revision of the one before
    (40, 14, "all"), (58, 14, "all"),  # a frame lost on a connection that stays is not noticed: losses end connections
]  # fmt: skip
# Where each planted bug showed first; others follow, since any change of the product moves the dice.
SHOWS = {
    "no position check": [3, *range(20)], "act before persist": [20, 44, 46, *range(20)], "no tombstones": range(10), "empty on error": range(10),
    "no compare-and-swap": [641, 657, 761, *range(60)],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_noise() -> None:
    quiet()


@pytest.mark.timeout(600)
def test_seeds() -> None:
    failed = [o.failed for o in many(range(SEEDS)) if o.failed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(("seed", "actions", "faults"), FOUND)
def test_seeds_that_failed_once(seed: int, actions: int, faults: str) -> None:
    outcome = one(seed, actions, faults)
    assert not outcome.failed
    assert outcome.checks > 50, "positive control: there was something to check"


@pytest.mark.parametrize("bug", MUTATIONS)
def test_a_planted_bug_is_found(bug: str) -> None:
    with planted(bug):
        outcomes = (one(seed, 14, "all") for seed in SHOWS[bug])
        assert any(o.failed for o in outcomes)


def test_the_same_seed_is_the_same_run_and_the_command_repeats_it() -> None:
    root = Path(__file__).resolve().parents[2]
    told = []
    for hashing in ("1", "2"):
        argv = [sys.executable, *command(7, 14, "all").split()[1:]]
        done = subprocess.run(argv, cwd=root, env={**os.environ, "PYTHONHASHSEED": hashing}, capture_output=True, text=True, check=True)
        told.append([line for line in done.stdout.splitlines() if line[:7].strip().replace(".", "").isdigit()])
    assert told[0] == told[1] != []
