from __future__ import annotations

from ipaddress import ip_address

import pytest

from identity.errors import BadInput, Conflict, NotFound, Refused


@pytest.fixture
def hosts(bench):
    for name in ("a", "b", "c"):
        bench.enrol(name)
    return bench


def test_an_added_workload_is_placed_and_signed(hosts) -> None:
    row = hosts.add("shop/api", "a", labels={"role": "api", "env": "prod"}, fence="strict")
    record = hosts.placement(row.placement)
    assert (row.state, row.epoch, row.endpoint) == ("active", 1, "a")
    assert (record.spiffe_id, record.name, record.instance) == (
        "spiffe://reg.test/wl/shop/api",
        "shop/api",
        0,
    )
    assert (record.labels, record.fence, record.state) == ({"env": "prod", "role": "api"}, "strict", "active")
    assert record.tunnel_key == hosts.registry.get("a").tunnel_key
    v4, v6 = map(ip_address, record.addresses)
    assert (v4.version, v6.version) == (4, 6)


def test_without_a_host_nothing_is_signed(hosts) -> None:
    row = hosts.add("web")
    assert (row.state, row.epoch, row.placement) == ("unplaced", 0, None)


def test_a_duplicate_name_needs_replica(hosts) -> None:
    hosts.add("web", "a", labels={"role": "web"}, fence="strict")
    with pytest.raises(Conflict) as e:
        hosts.add("web", "b")
    assert e.value.code == "workload.exists"
    with pytest.raises(Conflict) as e:
        hosts.add("web", "b", replica=True, labels={"role": "db"})
    assert e.value.code == "workload.labels"
    row = hosts.add("web", "b", replica=True)
    assert (row.instance, row.labels, row.fence) == (1, {"role": "web"}, "strict")


@pytest.mark.parametrize(("request_", "kind", "code"), [
    ({"name": "../x"}, BadInput, "name.workload"),
    ({"name": "web", "labels": {"Role": "x"}}, BadInput, "label.key"),
    ({"name": "web", "host": "aa"}, NotFound, "host.unknown"),
])  # fmt: skip
def test_bad_requests_leave_nothing(hosts, request_, kind, code) -> None:
    request_ = dict(request_)
    with pytest.raises(kind) as e:
        hosts.add(request_.pop("name"), request_.pop("host", None), **request_)
    assert e.value.code == code
    assert hosts.placements.all() == []
    assert hosts.add("web", "a").overlay == 1


def test_addresses_are_for_life_and_never_given_again(hosts) -> None:
    first = hosts.add("one", "a")
    hosts.placements.revoke("one", 0, hosts.now, "test")
    second = hosts.add("two", "a")
    assert second.overlay > first.overlay
    prepared = hosts.placements.prepare("two", 0, "b", hosts.now, "test")
    moved, _ = hosts.placements.commit(prepared, hosts.now, "test")
    assert hosts.placement(moved.placement).addresses == hosts.placement(second.placement).addresses


def test_a_revoked_host_takes_no_workload(hosts) -> None:
    hosts.registry.revoke("a", hosts.now, "test")
    with pytest.raises(Refused) as e:
        hosts.add("web", "a")
    assert e.value.code == "host.revoked"


# ---- moves


def test_a_move_in_full(hosts) -> None:
    before = hosts.add("web", "a")
    prepared = hosts.placements.prepare("web", 0, "b", hosts.now, "test")
    during = prepared.instance
    assert (during.state, during.endpoint, during.epoch, during.placement) == (
        "moving",
        "a",
        1,
        before.placement,
    )
    record = hosts.placement(during.prepare)
    assert (record.state, record.endpoint, record.epoch) == ("prepare", "b", 2)
    row, revision = hosts.placements.commit(prepared, hosts.now, "test")
    assert (row.state, row.endpoint, row.epoch, row.prepare, row.target) == ("active", "b", 2, None, None)
    assert hosts.placement(row.placement).tunnel_key == hosts.registry.get("b").tunnel_key
    assert revision > prepared.revision
    with pytest.raises(Conflict) as e:
        hosts.placements.commit(prepared, hosts.now, "test")
    assert e.value.code == "move.lost"


def test_an_aborted_move_changes_nothing_but_burns_its_epoch(hosts) -> None:
    before = hosts.add("web", "a")
    prepared = hosts.placements.prepare("web", 0, "b", hosts.now, "test")
    after = hosts.placements.abort(prepared, hosts.now, "test", "why")
    assert (after.state, after.endpoint, after.epoch, after.placement) == ("active", "a", 1, before.placement)
    again = hosts.placements.prepare("web", 0, "c", hosts.now, "test")
    assert hosts.placement(again.instance.prepare).epoch == 3
    with pytest.raises(Conflict):
        hosts.placements.commit(prepared, hosts.now, "test")
    with pytest.raises(Conflict):
        hosts.placements.abort(prepared, hosts.now, "test", "late")
    row, _ = hosts.placements.commit(again, hosts.now, "test")
    assert row.epoch == 3


def test_there_and_back(hosts) -> None:
    hosts.add("web", "a")
    for target, epoch in (("b", 2), ("a", 3)):
        row, _ = hosts.placements.commit(
            hosts.placements.prepare("web", 0, target, hosts.now, "test"), hosts.now, "test"
        )
        assert (row.endpoint, row.epoch) == (target, epoch)


def test_an_unplaced_instance_is_placed_by_a_move(hosts) -> None:
    hosts.add("web")
    prepared = hosts.placements.prepare("web", 0, "a", hosts.now, "test")
    assert prepared.holder is None
    hosts.placements.abort(prepared, hosts.now, "test", "why")
    assert hosts.placements.get("web", 0).state == "unplaced"
    row, _ = hosts.placements.commit(
        hosts.placements.prepare("web", 0, "a", hosts.now, "test"), hosts.now, "test"
    )
    assert (row.endpoint, row.epoch) == ("a", 2)


def test_impossible_moves(hosts) -> None:
    hosts.add("web", "a")
    for to, kind, code in (("a", Conflict, "move.same"), ("zz", NotFound, "host.unknown")):
        with pytest.raises(kind) as e:
            hosts.placements.prepare("web", 0, to, hosts.now, "test")
        assert e.value.code == code
        with pytest.raises(kind) as e:
            hosts.placements.plan("web", 0, to)
        assert e.value.code == code
    with pytest.raises(NotFound) as e:
        hosts.placements.plan("web", 3, "b")
    assert e.value.code == "workload.instance"
    assert "0" in e.value.hint
    with pytest.raises(NotFound) as e:
        hosts.placements.plan("wep", 0, "b")
    assert "web" in e.value.hint
    hosts.placements.prepare("web", 0, "b", hosts.now, "test")
    with pytest.raises(Conflict) as e:
        hosts.placements.prepare("web", 0, "c", hosts.now, "test")
    assert e.value.code == "move.running"
    hosts.placements.revoke("web", 0, hosts.now, "test")
    with pytest.raises(Refused) as e:
        hosts.placements.prepare("web", 0, "c", hosts.now, "test")
    assert e.value.code == "workload.revoked"


def test_a_restart_takes_moves_back(hosts) -> None:
    hosts.add("web", "a")
    hosts.add("free")
    for name in ("web", "free"):
        hosts.placements.prepare(name, 0, "b", hosts.now, "test")
    assert hosts.placements.abort_left(hosts.now) == 2
    assert [(r.name, r.state, r.endpoint) for r in hosts.placements.all()] == [
        ("free", "unplaced", None),
        ("web", "active", "a"),
    ]
    assert hosts.placements.abort_left(hosts.now) == 0


def test_a_move_that_the_store_failed_twice_is_taken_back_by_its_own_process(hosts) -> None:
    """Its commit failed and so did its abort: the process lives, and nobody works on the move any more."""
    mine = hosts.desk.process
    for name in ("web", "api"):
        hosts.add(name, "a")
        hosts.placements.prepare(name, 0, "b", hosts.now, "test")
    assert hosts.placements.abort_left(hosts.now, {mine}, {"web/0", "api/0"}) == 0
    assert hosts.placements.abort_left(hosts.now, {mine}, {"web/0"}) == 1
    assert {(r.name, r.state) for r in hosts.placements.all()} == {("web", "moving"), ("api", "active")}


def test_revoking_is_final_signed_and_idempotent(hosts) -> None:
    hosts.add("web", "a")
    row = hosts.placements.revoke("web", 0, hosts.now, "test")
    record = hosts.placement(row.placement)
    assert (row.state, row.endpoint, record.state, record.epoch) == ("revoked", None, "revoked", 2)
    assert hosts.placements.revoke("web", 0, hosts.now, "test") == row


def test_revoking_what_was_never_placed_signs_nothing(hosts) -> None:
    hosts.add("web")
    row = hosts.placements.revoke("web", 0, hosts.now, "test")
    assert (row.state, row.epoch, row.placement) == ("revoked", 0, None)


def test_revoking_in_the_middle_of_a_move_wins(hosts) -> None:
    hosts.add("web", "a")
    prepared = hosts.placements.prepare("web", 0, "b", hosts.now, "test")
    row = hosts.placements.revoke("web", 0, hosts.now, "test")
    assert (row.state, row.epoch, row.prepare) == ("revoked", 3, None)
    with pytest.raises(Conflict):
        hosts.placements.commit(prepared, hosts.now, "test")


def test_a_stale_row_cannot_be_written(hosts) -> None:
    row = hosts.add("web", "a")
    hosts.placements.commit(hosts.placements.prepare("web", 0, "b", hosts.now, "test"), hosts.now, "test")
    with pytest.raises(Conflict) as e, hosts.store.write() as tx:
        hosts.placements.place(tx, row, hosts.registry.get("c"), hosts.now)
    assert e.value.code == "placement.changed"
    assert hosts.placements.get("web", 0).endpoint == "b"


def test_every_signing_takes_an_epoch_above_all_before(hosts) -> None:
    """After an aborted prepare, the next record of any kind is above the epoch that was burnt."""

    def burn() -> int:
        prepared = hosts.placements.prepare("web", 0, "b", hosts.now, "test")
        return hosts.placements.abort(prepared, hosts.now, "test", "why").epoch_top

    hosts.add("web", "a")
    top = burn()
    hosts.enrol("a", replace=True)
    assert hosts.placements.get("web", 0).epoch == top + 1
    top = burn()
    hosts.registry.revoke("a", hosts.now, "test")
    row = hosts.placements.get("web", 0)
    assert (row.epoch, hosts.placement(row.placement).epoch) == (top + 1, top + 1)
