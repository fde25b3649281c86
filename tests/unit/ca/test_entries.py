"""Registration entries in the store: the signed set of each endpoint follows them, at generations that only grow."""

from __future__ import annotations

import pytest
from sqlalchemy import delete, insert, select, update

from ca import schema, transparency
from ca.entries import Entries, sign_for
from identity import records
from identity.entries import EntriesRecord
from identity.errors import BadInput, BadState, Conflict, NotFound
from identity.wire.entries import EntryCreate
from tests.unit.ca.conftest import TD

API = ["uid:33", "unit:api.service"]


@pytest.fixture
def desk(bench):
    bench.entries = Entries(bench.desk)
    return bench


def create(bench, name="api", parent="web-*", selectors=API, ends_at=None, ends_with=None, **more):
    request = EntryCreate(name=name, parent=parent, selectors=selectors, **more)
    with bench.store.write() as tx:
        return bench.entries.create(tx, request, ends_at, ends_with, bench.now, "test")


def signed(bench, endpoint) -> EntriesRecord | None:
    envelope = bench.registry.get(endpoint).entries
    if envelope is None:
        return None
    return records.verify(EntriesRecord, envelope, [bench.key.public_key()], trust_domain=str(TD))


def test_a_set_is_signed_for_the_hosts_it_is_for(desk):
    for host in ("web-1", "web-2", "db-1"):
        desk.enrol(host)
    desk.add("api")
    row = create(desk, hint="main", labels={"role": "api"}, ends_at=desk.now + 60)
    for host in ("web-1", "web-2"):
        found = signed(desk, host)
        assert (found.endpoint, found.generation, [e.id for e in found.entries]) == (host, 1, [row.id])
        assert (found.entries[0].ends, found.entries[0].labels, found.entries[0].hint) == (desk.now + 60, {"role": "api"}, "main")
    assert signed(desk, "db-1") is None
    with desk.store.read() as tx:
        assert desk.entries.hosts(tx, row) == ["web-1", "web-2"]


def test_a_set_follows_every_change_and_never_goes(desk):
    desk.enrol("web-1")
    desk.add("api")
    one, two = create(desk), create(desk, parent="web-1")
    assert [signed(desk, "web-1").generation, len(signed(desk, "web-1").entries)] == [2, 2]
    with desk.store.write() as tx:
        desk.entries.delete(tx, one.id, desk.now, "test")
        desk.entries.delete(tx, two.id, desk.now, "test")
        with pytest.raises(NotFound):
            desk.entries.delete(tx, two.id, desk.now, "test")
    found = signed(desk, "web-1")
    assert (found.generation, found.entries) == (4, [])


def test_a_host_that_comes_later_gets_its_set(desk):
    desk.add("api")
    create(desk)
    desk.enrol("web-7")
    assert len(signed(desk, "web-7").entries) == 1
    desk.enrol("db-7")
    assert signed(desk, "db-7") is None
    with desk.store.write() as tx:
        assert not sign_for(desk.desk, tx, "db-7", desk.now)


def test_a_host_that_enrols_anew_keeps_the_order(desk):
    desk.enrol("web-1")
    desk.add("api")
    create(desk)
    before = signed(desk, "web-1").generation
    desk.registry.revoke("web-1", desk.now, "test")
    desk.enrol("web-1")
    assert signed(desk, "web-1").generation > before


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ({"selectors": ["uid:33"]}, BadInput, "entry.selectors"), ({"selectors": ["path:/bin/x"]}, BadInput, "entry.selectors"),
        ({"selectors": ["uid:65534", "unit:a.service"]}, BadInput, "entry.nobody"), ({"parent": "web/1"}, BadInput, "entry.parent"),
        ({"parent": "web\x1b[2J"}, BadInput, "entry.parent"), ({"name": "ghost"}, NotFound, "workload.unknown"), ({"name": "a\nb"}, BadInput, "name.workload"),
        ({"hint": "\x1b[31m"}, BadInput, "entry.hint"), ({"labels": {"A": "b"}}, BadInput, "label.key"), ({}, Conflict, "entry.exists"),
        ({"name": "other", "hint": "main"}, Conflict, "entry.hint"),
    ],
)  # fmt: skip
def test_entries_that_are_refused_change_nothing(desk, change, kind, code):
    desk.enrol("web-1")
    desk.add("api")
    desk.add("other")
    create(desk, hint="main")
    with pytest.raises(kind) as caught:
        create(desk, **change)
    assert caught.value.code == code
    assert "\x1b" not in caught.value.message
    assert signed(desk, "web-1").generation == 1


def test_the_shortest_life_counts(desk):
    desk.add("api")
    create(desk, ttl=600)
    create(desk, parent="web-1", ttl=300)
    create(desk, parent="web-1", selectors=[*API, "gid:33"])
    with desk.store.read() as tx:
        assert desk.entries.ttl(tx, "api", "web-1") == 300
        assert desk.entries.ttl(tx, "api", "web-2") == 600
        assert desk.entries.ttl(tx, "api", "db-1") is None


def test_too_many_for_one_host(desk, monkeypatch):
    monkeypatch.setattr("ca.entries.MAX_ENTRIES", 1)
    desk.enrol("web-1")
    desk.add("api")
    create(desk)
    with pytest.raises(Conflict) as caught:
        create(desk, parent="web-1")
    assert caught.value.code == "entry.many"
    with desk.store.read() as tx:
        assert len(desk.entries.all(tx)) == 1


@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"parent": "*"}, {"selectors": '{"uid":0,"netns":"api"}'}, {"labels": '{"role":"db"}'}, {"ends_at": 1 << 40}, {"ttl": 9}, {"record": "x"}]
)  # fmt: skip
def test_a_row_that_a_database_writer_changed_is_not_given_out(desk, change):
    desk.enrol("web-1")
    desk.add("api")
    desk.add("other")
    row = create(desk)
    before = signed(desk, "web-1")
    with desk.store.write() as tx:
        tx.execute(update(schema.entries).where(schema.entries.c.id == row.id).values(**change))
    with pytest.raises(BadState) as caught:
        create(desk, name="other", parent="web-1")
    assert caught.value.code == "store.contradiction"
    assert signed(desk, "web-1") == before


@pytest.mark.parametrize("blow", ["taken away", "brought back"])
def test_an_entry_that_came_or_went_without_us_is_noticed(desk, blow):
    """Both have records that hold: one was deleted by an administrator, one was not."""
    desk.enrol("web-1")
    desk.add("api")
    desk.add("other")
    row = create(desk)
    with desk.store.write() as tx:
        kept = dict(tx.execute(select(schema.entries)).mappings().one())
        if blow == "brought back":
            desk.entries.delete(tx, row.id, desk.now, "test")
            tx.execute(insert(schema.entries).values(**kept))
        else:
            tx.execute(delete(schema.entries))
    before = signed(desk, "web-1")
    with pytest.raises(BadState, match=row.id) as caught:
        create(desk, name="other")
    assert caught.value.code == "store.contradiction"
    assert signed(desk, "web-1") == before
    desk.add("more", "web-1")  # everything else goes on


def test_an_entry_that_a_database_writer_made_is_not_given_out(desk):
    desk.enrol("web-1")
    desk.add("api")
    row = create(desk)
    with desk.store.write() as tx:
        kept = dict(tx.execute(select(schema.entries)).mappings().one())
        tx.execute(insert(schema.entries).values(**{**kept, "id": "e-forged", "selectors": '{"uid":0,"netns":"api"}'}))
    with pytest.raises(BadState), desk.store.write() as tx:
        desk.entries.delete(tx, row.id, desk.now, "test")
    assert [e.id for e in signed(desk, "web-1").entries] == [row.id]


def test_every_set_is_in_the_log_also_those_of_before_sets_were_logged(desk):
    desk.enrol("web-1")
    desk.add("api")
    create(desk)
    with desk.store.read() as tx:
        assert transparency.is_logged(tx, "entries", "web-1", desk.registry.get("web-1").entries)
    beside = desk.desk.sign(signed(desk, "web-1").model_copy(update={"generation": 9}))
    with desk.store.write() as tx:
        tx.execute(update(schema.endpoints).values(entries=beside))
    assert (desk.entries.log_sets(desk.now), desk.entries.log_sets(desk.now)) == (1, 0)
    with desk.store.read() as tx:
        assert transparency.is_logged(tx, "entries", "web-1", beside)
