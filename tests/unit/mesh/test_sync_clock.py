"""A machine whose clock is behind restores what it had; one whose clock is ahead of every certificate does not."""

from __future__ import annotations

import pytest

from identity.errors import BadState
from mesh.sync import NeedSnapshot, Position

NOW = 2_000_000_000.0  # of the authority in conftest.py
YEAR = 365 * 86400


def restore(ca, wall: float, heartbeat: str | None = None):
    beat = ca.heartbeat()
    machine = ca.machine()
    machine.restore(
        ca.objects, Position("t1", 1), beat, heartbeat or beat, heard=None, wall=wall, mono=100.0, stored_hash="",
    )  # fmt: skip
    return machine


@pytest.mark.parametrize("wall", [0.0, NOW - YEAR, NOW - 3600, NOW])
def test_a_clock_that_is_behind(ca, wall):
    machine = restore(ca, wall)
    assert set(machine.objects) == set(ca.objects)
    assert machine.view(100.0).snapshot.placements


def test_a_clock_beyond_every_certificate(ca):
    # accept_next looks at a bundle only when it is another one than at enrolment
    ca.objects["bundle"] = ca.authority.bundle(5, NOW)
    with pytest.raises(BadState):
        restore(ca, NOW + 30 * YEAR)


def test_a_time_that_nobody_signed_helps_nobody(ca):
    head, _, signature = ca.heartbeat().rpartition(".")
    with pytest.raises(BadState):
        restore(ca, NOW - YEAR, f"{head}.{signature[::-1]}")
    with pytest.raises(BadState):
        restore(ca, NOW - YEAR, "no heartbeat at all")


def test_a_bundle_refused_by_a_wrong_clock_is_asked_for_again(ca):
    machine = ca.machine()
    machine.receive(ca.snapshot(), wall=NOW, mono=0.0)
    behind = NOW - 500  # still near enough for heartbeats
    fresh = ca.authority.bundle(7, NOW)
    machine.receive(ca.delta({"bundle": fresh}), wall=NOW - YEAR, mono=1.0)
    machine.receive(ca.snapshot(), wall=behind, mono=1.0)
    if "bundle" not in machine.refused:
        pytest.skip("the certificates begin earlier than the clock is behind")
    ca.time += 1
    assert not any(isinstance(e, NeedSnapshot) for e in machine.receive(ca.beat(), wall=behind, mono=2.0))
    ca.time += 1
    assert any(isinstance(e, NeedSnapshot) for e in machine.receive(ca.beat(), wall=NOW, mono=3.0))
    machine.receive(ca.snapshot(), wall=NOW, mono=4.0)
    assert machine.refused == {}
    assert machine.trust.sequence == 7
