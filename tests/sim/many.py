"""Many seeds over the machine's cores."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import structlog

from tests.sim.world import Simulation, forget_template


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one seed. `failed` is the reason and the command that repeats it, or empty."""

    seed: int
    failed: str
    virtual_s: float
    checks: int


def command(seed: int, actions: int, faults: str) -> str:
    """What to type to see it again."""
    return f"python -m tests.sim --seed {seed} --actions {actions} --faults {faults}"


def quiet() -> None:
    """Simulated disasters are not to be read in the log."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), logger_factory=structlog.ReturnLoggerFactory())
    atexit.register(forget_template)


def one(seed: int, actions: int, faults: str) -> Outcome:
    simulation = Simulation(seed, actions=actions, faults=faults)
    failed = ""
    try:
        simulation.run()
    except Exception as e:
        failed = f"seed {seed}: {type(e).__name__}: {e}\n  {command(seed, actions, faults)}"
    return Outcome(seed, failed, simulation.clock.now, simulation.ledger.checks)


def _task(task: tuple[int, int, str]) -> Outcome:
    return one(*task)


def many(seeds: Iterable[int], *, actions: int = 14, faults: str = "all", say: bool = False) -> list[Outcome]:
    """All outcomes, in the order of the seeds."""
    out = []
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=get_context("spawn"), initializer=quiet) as pool:
        for outcome in pool.map(_task, [(seed, actions, faults) for seed in seeds], chunksize=10):
            if say and outcome.failed:
                print(outcome.failed, flush=True)
            out.append(outcome)
    return out
