"""F6: the database fails to be read, again and again, while changes are pushed: nothing is removed that is there."""

from __future__ import annotations

from tests.sim.many import quiet
from tests.sim.world import Simulation


def test_reads_that_fail_remove_nothing() -> None:
    """Every delta and snapshot is compared with the rows themselves (tests.sim.control), on top of all other promises."""
    quiet()
    failed = 0
    for seed in range(5):
        simulation = Simulation(seed, actions=20, faults="read")
        simulation.run()
        failed += simulation.failed_reads
    assert failed > 10, "positive control: reads did fail"
