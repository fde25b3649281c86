"""Identities and entries that end: by time, with another workload, in chains; and what may be asked for."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from ca import audit, leases, schema
from ca.entries import Entries
from identity.errors import BadInput, Conflict, NotFound, Refused
from identity.wire.admin import WorkloadLife
from tests.unit.ca.test_entries import create, signed


@pytest.fixture
def desk(bench):
    bench.entries = Entries(bench.desk)
    return bench


def expire(bench, after=0):
    with bench.store.read() as tx:
        due = leases.anything_due(tx, bench.now + after)
    with bench.store.write() as tx:
        done = leases.expire(tx, bench.placements, bench.entries, bench.now + after)
    assert due == bool(done)
    return done


def actions(bench, subject):
    with bench.store.read() as tx:
        return [e.action for e in audit.entries(tx, subject=subject)]


def test_an_end_is_in_the_signed_record_and_comes(desk):
    desk.enrol("a")
    row = desk.add("job", "a", ends_in=60)
    assert desk.placement(row.placement).ends == desk.now + 60
    assert expire(desk, 59) == []
    assert expire(desk, 60) == ["job/0"]
    over = desk.placements.get("job", 0)
    record = desk.placement(over.placement)
    assert (over.state, over.endpoint, record.state, record.epoch) == ("revoked", None, "revoked", row.epoch + 1)
    assert actions(desk, "job/0")[-1] == "workload.expire"
    assert "workload.revoke" not in actions(desk, "job/0")
    assert expire(desk, 61) == []


def test_an_end_with_another_comes_when_its_last_instance_goes(desk):
    desk.enrol("a")
    desk.add("job", "a")
    desk.add("job", "a", replica=True)
    desk.add("helper", "a", ends_with="job")
    desk.add("cache", "a", ends_with="helper")
    desk.placements.revoke("job", 0, desk.now, "test")
    assert expire(desk) == []
    desk.placements.revoke("job", 1, desk.now, "test")
    assert expire(desk) == ["helper/0", "cache/0"]


def test_an_entry_ends(desk):
    desk.enrol("web-1")
    desk.add("api")
    desk.add("job")
    timed, linked = create(desk, ends_at=desk.now + 5), create(desk, parent="web-1", ends_with="job")
    assert expire(desk, 5) == [timed.id]
    desk.placements.revoke("job", 0, desk.now, "test")
    assert expire(desk, 6) == [linked.id]
    assert actions(desk, linked.id) == ["entry.create", "entry.expire"]
    with desk.store.read() as tx:
        assert [r.ended for r in desk.entries.all(tx)] == [True, True]
    assert expire(desk, 7) == []  # told once


def test_an_ended_entry_stays_in_the_signed_set_until_it_is_deleted_or_made_anew(desk):
    """Without it the agent would give the workload to its whole namespace again: an end would let more in."""
    desk.enrol("web-1")
    desk.add("api")
    row = create(desk, ends_at=desk.now + 5, hint="main")
    assert expire(desk, 5) == [row.id]
    assert [(e.id, e.ends) for e in signed(desk, "web-1").entries] == [(row.id, 0)]
    with desk.store.read() as tx:
        assert (desk.entries.info(tx, desk.entries.get(tx, row.id)).ended, desk.entries.opens(tx, row)) == (True, ["web-1"])
    again = create(desk, hint="main")
    assert [(e.id, e.ends) for e in signed(desk, "web-1").entries] == [(again.id, None)]
    with desk.store.write() as tx:
        desk.entries.delete(tx, again.id, desk.now, "test")
    assert signed(desk, "web-1").entries == []


def test_a_tampered_row_holds_up_nobody_elses_end(desk):
    desk.enrol("web-1")
    for name in ("api", "job", "other"):
        desk.add(name, "web-1", ends_in=9)
    bad, good = create(desk, ends_at=desk.now + 5), create(desk, name="other", parent="db-1", ends_at=desk.now + 5)
    with desk.store.write() as tx:
        tx.execute(update(schema.entries).where(schema.entries.c.id == bad.id).values(labels='{"role":"db"}'))
        tx.execute(update(schema.instances).where(schema.instances.c.name == "job").values(placement="x"))
    with desk.store.write() as tx:
        done = leases.expire(tx, desk.placements, desk.entries, desk.now + 9)
    assert done == ["api/0", "other/0", good.id]
    desk.enrol("db-1")  # and the store goes on taking everybody else's changes


def test_what_is_being_moved_ends_too(desk):
    desk.enrol("a")
    desk.enrol("b")
    desk.add("job", "a", ends_in=5)
    desk.placements.prepare("job", 0, "b", desk.now, "test")
    assert expire(desk, 5) == ["job/0"]
    assert desk.placements.get("job", 0).prepare is None


@pytest.mark.parametrize(
    ("life", "kind", "code"),
    [
        ({"ends_at": 5}, BadInput, "lease.past"), ({"ends_at": 1 << 39, "ends_in": 5}, BadInput, "lease.twice"),
        ({"ends_with": "job"}, BadInput, "lease.itself"), ({"ends_with": "ghost"}, NotFound, "lease.with"),
        ({"ends_with": "../x"}, BadInput, "name.workload"), ({"ends_with": "c"}, BadInput, "lease.circle"),
    ],
)  # fmt: skip
def test_ends_that_are_refused(desk, life, kind, code):
    desk.add("job")
    desk.add("b", ends_with="job")
    desk.add("c", ends_with="b")
    with pytest.raises(kind) as caught:
        desk.placements.set_life(WorkloadLife(name="job", **life), desk.now, "test")
    assert caught.value.code == code
    assert desk.placements.get("job", 0).ends_at is None


def test_a_life_is_changed_at_a_new_epoch(desk):
    desk.enrol("a")
    row = desk.add("job", "a", ends_in=5)
    longer = desk.placements.set_life(WorkloadLife(name="job", ends_in=500), desk.now, "test")
    assert (longer.epoch, desk.placement(longer.placement).ends) == (row.epoch + 1, desk.now + 500)
    assert expire(desk, 5) == []
    free = desk.placements.set_life(WorkloadLife(name="job"), desk.now, "test")
    assert desk.placement(free.placement).ends is None
    assert expire(desk, 10**6) == []


def test_what_is_over_gets_no_new_life(desk):
    desk.enrol("a")
    desk.enrol("b")
    desk.add("job", "a")
    desk.placements.prepare("job", 0, "b", desk.now, "test")
    with pytest.raises(Conflict):
        desk.placements.set_life(WorkloadLife(name="job", ends_in=5), desk.now, "test")
    desk.placements.revoke("job", 0, desk.now, "test")
    with pytest.raises(Refused):
        desk.placements.set_life(WorkloadLife(name="job", ends_in=5), desk.now, "test")
    assert desk.add("later", ends_in=7).ends_at == desk.now + 7
    unplaced = desk.placements.set_life(WorkloadLife(name="later", ends_in=9), desk.now, "test")
    assert (unplaced.ends_at, unplaced.placement) == (desk.now + 9, None)
