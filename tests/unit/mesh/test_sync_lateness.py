"""Heartbeats that arrive, one newer than the other, and late: from a network that holds them back, or to a machine that slept."""

from __future__ import annotations

import pytest

from mesh.sync import JITTER, Refreshed

NOW = 2_000_000_000


@pytest.fixture
def machine(ca):
    made = ca.machine()
    made.connected()
    made.receive(ca.snapshot(), wall=NOW, mono=0.0)
    return made


def hear(ca, machine, signed: float, mono: float):
    (event,) = machine.receive(ca.beat(time=NOW + int(signed)), wall=NOW + mono, mono=mono)
    assert isinstance(event, Refreshed)


def test_prompt_heartbeats_are_fresh(ca, machine):
    for second in range(2, 60, 2):
        hear(ca, machine, second, second + 0.4)
        assert machine.age(second + 0.4) == pytest.approx(0.0)
    assert machine.lag == 0.0


def test_a_little_late_is_not_late(ca, machine):
    hear(ca, machine, 10, 10 + JITTER - 0.1)
    assert (machine.lag, machine.age(13.0)) == (0.0, pytest.approx(13.0 - (10 + JITTER - 0.1)))


def test_a_stream_that_is_held_back_grows_old(ca, machine):
    """One heartbeat in ten seconds, though the CA signs one a second: each is newer, none is fresh."""
    for number in range(1, 8):
        hear(ca, machine, number, 10.0 * number)
    assert machine.age(70.0) == pytest.approx(63, abs=0.2)
    assert machine.view(70.0).age == machine.age(70.0)


def test_what_waited_while_the_machine_slept_is_old(ca, machine):
    hear(ca, machine, 2, 2.0)
    for signed in (4, 6, 8):  # in the socket's buffer; the machine wakes at 62
        hear(ca, machine, signed, 62.0)
    assert machine.age(62.0) == pytest.approx(54, abs=0.2)
    assert machine.lag > machine.lease
    hear(ca, machine, 62, 62.5)
    assert machine.age(62.5) == pytest.approx(0.0, abs=0.7)


def test_age_never_grows_by_a_newer_heartbeat(ca, machine):
    hear(ca, machine, 20, 20.0)
    before = machine.heard
    hear(ca, machine, 21, 60.0)
    assert machine.heard >= before


def test_a_new_connection_begins_anew(ca, machine):
    hear(ca, machine, 5, 50.0)
    assert machine.lag > 40
    machine.connected()
    hear(ca, machine, 6, 51.0)
    assert machine.age(51.0) == 0.0


def test_a_clock_that_runs_a_little_faster_than_the_cas_is_no_lateness(ca, machine):
    """300 ppm for ten days."""
    for hour in range(1, 241):
        hear(ca, machine, hour * 3600, hour * 3600 * 1.0003)
    assert machine.lag == 0.0
