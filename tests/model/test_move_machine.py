"""The state machine of `machine.py` holds on the product, and finds every bug that is planted in it.

`RETINUE_MACHINE=500` (`make machine`) runs so many examples of it instead, with other dice each time.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import update

import ca.backup
import mesh.acceptance
from ca.highwater import Mark
from mesh.state import StateDir
from mesh.sync import SyncMachine
from tests.model.machine import Moves, compiled_once, forget_template
from tests.sim.ledger import Violation
from tests.sim.mutations import planted

MORE = int(os.environ.get("RETINUE_MACHINE", "0"))
EXAMPLES = 24
BUDGET = 96  # within which a planted bug has to be found
STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def _files() -> Iterator[None]:
    gc.collect()  # Hypothesis parses this source; CPython 3.11's parser fails when a finaliser runs in it
    with compiled_once():
        yield
    forget_template()


def run(machine: type[Moves], examples: int = EXAMPLES, *, phases: tuple[Phase, ...] = (Phase.generate,)) -> None:
    machine.seen = Counter()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]  # of hypothesis
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=STEPS, deadline=None, derandomize=not MORE, database=None, phases=phases,
            report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.timeout(0 if MORE else 120)
def test_the_product_keeps_its_promises() -> None:
    run(Moves, MORE or EXAMPLES, phases=(Phase.generate, Phase.shrink))
    seen = Moves.seen
    happened = {"commit", "revoke", "restore", "agent crash", "write crash", "ca crash", "replay", "splice", "settled"}
    refused = {"kept", "move.lost", "move.running", "move.same"}  # old records, and movers who were not the first
    assert not [what for what in happened | refused if seen[what] < 2], f"positive control: too little happened: {seen}"


# ---- bugs that it must find


def _no_epoch_check() -> Any:
    """Any signed record is taken, whatever its epoch."""
    return patch.object(mesh.acceptance, "_not_behind", lambda *_: None)


def _counters_of_the_backup() -> Any:
    """A restore goes on with the epochs that the backup has."""

    class Unchanged:
        def __init__(self, table: Any) -> None:
            self.table = table

        def values(self, **changed: Any) -> Any:
            return update(self.table).values(**{name: self.table.c[name] for name in changed})

    return patch.object(ca.backup, "update", Unchanged)


def _no_mark() -> Any:
    """A restore that does not know what was given out after the backup."""
    real = ca.backup._begin

    def begin(plane: Any, mark: Any, lost: Any, now: int) -> None:
        real(plane, Mark(mark.timeline, mark.revision, -mark.revision), 0, now)

    return patch.object(ca.backup, "_begin", begin)


def _marks_forgotten() -> Any:
    """An agent that starts without the epochs it has seen, and without its snapshot."""
    return patch.object(StateDir, "load_marks", lambda self: ({}, None)), patch.object(StateDir, "restore", lambda *_, **__: False)


def _marks_before_the_snapshot() -> Any:
    """The marks are written first: a crash in between leaves a snapshot that is behind them."""
    first, second = StateDir.save_snapshot, StateDir.save_marks

    def marks(self: StateDir, machine: SyncMachine, boot: str) -> None:
        second(self, machine)

    def snapshot(self: StateDir, machine: SyncMachine) -> None:
        if machine.position is None:
            second(self, machine)
        else:
            first(self, machine, "boot")

    return patch.object(StateDir, "save_snapshot", marks), patch.object(StateDir, "save_marks", snapshot)


PLANTED: dict[str, tuple[Any, set[str]]] = {
    "no epoch check": (_no_epoch_check, {"epoch"}),
    "counters of the backup": (_counters_of_the_backup, {"one owner", "converged"}),
    "no high-water mark": (_no_mark, {"one owner", "converged", "epoch"}),
    "marks forgotten": (_marks_forgotten, {"epoch", "revision"}),
    "marks before the snapshot": (_marks_before_the_snapshot, {"restart"}),
    "no compare-and-swap": (lambda: planted("no compare-and-swap"), {"one owner", "converged"}),
    "no position check": (lambda: planted("no position check"), {"revision"}),
    "no tombstones": (lambda: planted("no tombstones"), {"converged"}),
}


@contextmanager
def bug(name: str) -> Iterator[None]:
    made = PLANTED[name][0]()
    with ExitStack() as stack:
        for one in made if isinstance(made, tuple) else (made,):
            stack.enter_context(one)
        yield


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_bug_is_found(name: str) -> None:
    with bug(name), pytest.raises(Violation) as found:
        run(Moves, BUDGET)
    assert found.value.promise in PLANTED[name][1], f"found, and as something else: {found.value}"
