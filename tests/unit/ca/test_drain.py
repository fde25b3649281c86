"""Which instance of a drained host goes where."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ca.drain import assign
from ca.moves import MARGIN_S, Contacts, Leases, Progress
from ca.rows import InstanceRow
from identity.wire.moves import MoveStep

ROW = InstanceRow(
    name="api", instance=0, spiffe_id="spiffe://x/api", labels={}, fence="available", overlay=1, state="active", endpoint="a",
    epoch=1, epoch_top=1, target=None, target_epoch=None, placement=None, prepare=None, created=0,
)  # fmt: skip


def rows(count: int) -> list[InstanceRow]:
    return [replace(ROW, instance=n) for n in range(count)]


def test_only_to_a_host_with_a_place() -> None:
    found, missing = assign(rows(3), ["b", "c"], {"b": ["api/0"], "c": ["api/2"]}, ())
    assert found == {"api/0": "b", "api/2": "c"}
    assert missing == ["api/1"]


def test_told_apart_by_entries_it_needs_no_place() -> None:
    assert assign(rows(2), ["b", "c"], {}, {"api"}) == ({"api/0": "b", "api/1": "c"}, [])


def test_without_a_host_everything_is_missing() -> None:
    assert assign(rows(1), [], {"b": ["api/0"]}, {"api"}) == ({}, ["api/0"])


@given(st.integers(0, 40), st.integers(1, 5))
def test_they_are_spread_evenly(count: int, hosts: int) -> None:
    names = [f"h{n}" for n in range(hosts)]
    found, missing = assign(rows(count), names, {}, {"api"})
    loads = [list(found.values()).count(h) for h in names]
    assert not missing
    assert max(loads) - min(loads) <= 1


def test_leases() -> None:
    leases = Leases(30.0, 600.0)
    assert leases.of(ROW) == 600.0 + MARGIN_S
    assert leases.of(replace(ROW, fence="strict")) == 30.0 + MARGIN_S
    assert Leases(30.0, 5.0).of(replace(ROW, fence="strict")) == 5.0 + MARGIN_S, "whichever comes first"


def test_contacts_count_from_the_last_stream() -> None:
    contacts = Contacts()
    unknown = contacts.silence("a")
    contacts.lost("b")
    assert contacts.silence("b") <= contacts.silence("a")
    assert unknown >= 0, "who was never connected could have been told by the process before: from the start of this one"


def test_progress_says_steps_with_their_time() -> None:
    said: list[MoveStep] = []
    progress = Progress("api/0", said.append)
    progress.say("prepare", "x", epoch=4)
    Progress("api/0").say("prepare", "nobody listens")
    assert [(s.instance, s.step, s.epoch, s.ms >= 0) for s in said] == [("api/0", "prepare", 4, True)]
