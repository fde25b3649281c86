from __future__ import annotations

import pytest

from identity.errors import BadInput, BadPolicy, BadState, NotVerified
from identity.records import state_hash
from mesh.sync import (
    Accepted,
    FrameRefused,
    Mark,
    NeedSnapshot,
    Position,
    RecordRefused,
    Refreshed,
    SyncMachine,
)

NOW = 2_000_000_000.0


def feed(machine: SyncMachine, line: bytes, mono: float = 0.0, wall: float = NOW):
    return machine.receive(line, wall=wall, mono=mono)


def codes(events) -> list[str]:
    return [e.error.code for e in events if isinstance(e, RecordRefused | FrameRefused)]


def accepted(events) -> Accepted:
    (one,) = [e for e in events if isinstance(e, Accepted)]
    return one


def in_force(machine: SyncMachine, mono: float = 0.0):
    snapshot = machine.view(mono).snapshot
    return {k: (p.endpoint, p.epoch) for k, p in snapshot.placements.items()}


@pytest.fixture
def machine(ca) -> SyncMachine:
    made = ca.machine()
    events = feed(made, ca.snapshot())
    assert codes(events) == []
    assert accepted(events).position == Position("t1", 1)
    return made


BOTH = {"web/0": ("host-a", 1), "shop/api/0": ("host-b", 1)}


def test_a_snapshot_becomes_the_state_in_force(ca, machine):
    snapshot = machine.view(0.0).snapshot
    assert in_force(machine) == BOTH
    assert set(snapshot.endpoints) == {"host-a", "host-b"}
    assert snapshot.policy is not None
    assert snapshot.policy.revision == 1
    assert snapshot.trust_domain == "test.example"
    assert (snapshot.timeline, snapshot.revision) == ("t1", 1)
    assert snapshot.state_hash == state_hash(ca.objects) == machine.received_hash
    assert machine.resume == Position("t1", 1)


def test_before_anything_arrived_nothing_is_in_force(ca):
    machine = ca.machine()
    view = machine.view(5.0)
    assert (view.snapshot.placements, view.snapshot.policy, view.age, view.deadline) == ({}, None, None, None)
    assert machine.resume is None


def test_a_delta_moves_a_placement_and_only_a_tombstone_removes(ca, machine):
    events = feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}))
    assert accepted(events) == Accepted(Position("t1", 2), frozenset({"placement/web/0"}))
    assert in_force(machine) == BOTH | {"web/0": ("host-b", 2)}
    feed(machine, ca.delta(removes=["placement/shop/api/0", "placement/never/0"]))
    assert in_force(machine) == {"web/0": ("host-b", 2)}


def test_a_delta_without_changes_moves_the_position(ca, machine):
    assert accepted(feed(machine, ca.delta())).changed == frozenset()
    assert machine.resume == Position("t1", 2)


def test_a_lower_epoch_is_refused_for_ever(ca, machine):
    first = ca.objects["placement/web/0"]
    feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 3)}))
    assert codes(feed(machine, ca.delta({"placement/web/0": first}))) == ["placement.epoch"]
    assert in_force(machine)["web/0"] == ("host-b", 3)
    feed(machine, ca.delta(removes=["placement/web/0"]))
    assert "web/0" not in in_force(machine)
    assert codes(feed(machine, ca.delta({"placement/web/0": first}))) == ["placement.epoch"]
    assert "web/0" not in in_force(machine)
    assert machine.marks["web/0"].number == 3


def test_the_same_epoch_for_another_holder_is_equivocation(ca, machine):
    events = feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 1)}))
    assert codes(events) == ["placement.equivocation"]
    assert in_force(machine) == BOTH


def test_a_mere_resigning_is_no_equivocation(ca, machine):
    events = feed(
        machine, ca.delta({"placement/web/0": ca.placement("web", "host-a", 1, issued=int(NOW) + 9)})
    )
    assert codes(events) == []
    assert accepted(events).changed == {"placement/web/0"}


def test_one_bad_record_does_not_block_the_others(ca, machine):
    good = ca.placement("shop/api", "host-a", 2, index=2)
    events = feed(
        machine, ca.delta({"placement/web/0": good, "placement/shop/api/0": good, "nonsense": good})
    )
    assert codes(events) == ["record.key", "record.key"]
    assert in_force(machine) == {"web/0": ("host-a", 1), "shop/api/0": ("host-a", 2)}
    assert machine.resume == Position("t1", 2)
    assert set(machine.refused) == {"placement/web/0", "nonsense"}
    # It is reported once, and the stream goes on over the set as received.
    assert codes(feed(machine, ca.delta())) == []
    assert set(machine.refused) == {"placement/web/0", "nonsense"}
    feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-a", 4)}, ["nonsense"]))
    assert machine.refused == {}
    assert in_force(machine)["web/0"] == ("host-a", 4)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"spiffe_id": "spiffe://test.example/wl/other"}, "placement.name"),
        ({"addresses": ["10.0.0.1", "fd00::1"]}, "placement.address"),
        ({"addresses": ["100.64.0.9", "fd00::1"]}, "placement.address"),
        ({"addresses": ["fd00::1", "100.64.0.9"]}, "placement.address"),
        ({"addresses": ["100.64.0.9", "nothing"]}, "placement.address"),
        ({"state": "prepare"}, "placement.state"),
        ({"instance": 1}, "record.key"),
    ],
)
def test_a_signed_placement_that_makes_no_sense_is_refused(ca, machine, changes, code):
    events = feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-a", 2, **changes)}))
    assert codes(events) == [code]
    assert in_force(machine) == BOTH


def test_an_address_belongs_to_who_had_it_first(ca, machine):
    events = feed(machine, ca.delta({"placement/abc/0": ca.placement("abc", "host-b", 9, index=1)}))
    assert codes(events) == ["placement.address_taken"]
    assert in_force(machine) == BOTH
    # Once the other is gone, the refusal is looked at again.
    feed(machine, ca.delta(removes=["placement/web/0"]))
    assert in_force(machine) == {"abc/0": ("host-b", 9), "shop/api/0": ("host-b", 1)}


def test_a_revoked_placement_holds_no_address(ca, machine):
    feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-a", 2, state="revoked")}))
    assert machine.view(0.0).snapshot.placements["web/0"].state == "revoked"
    assert (
        codes(feed(machine, ca.delta({"placement/abc/0": ca.placement("abc", "host-b", 1, index=1)}))) == []
    )


def test_an_endpoint_record_under_another_name_is_refused(ca, machine):
    assert codes(feed(machine, ca.delta({"endpoint/host-b": ca.endpoint("host-c")}))) == ["record.key"]


def test_a_record_of_another_kind_is_refused(ca, machine):
    assert codes(feed(machine, ca.delta({"policy": ca.endpoint("host-c")}))) == ["record.type"]
    assert codes(feed(machine, ca.delta({"policy/x": ca.policy(2)}))) == ["record.key"]


# ---- moves


def prepare(ca, epoch: int, endpoint: str = "host-b") -> dict[str, str]:
    return {"prepare/web/0": ca.placement("web", endpoint, epoch, state="prepare")}


def test_a_prepare_is_seen_beside_the_placement_and_goes_with_the_commit(ca, machine):
    feed(machine, ca.delta(prepare(ca, 2)))
    assert machine.view(0.0).snapshot.prepares["web/0"].endpoint == "host-b"
    assert in_force(machine) == BOTH
    feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}, ["prepare/web/0"]))
    assert machine.view(0.0).snapshot.prepares == {}


def test_a_forgotten_prepare_ends_with_its_epoch(ca, machine):
    feed(machine, ca.delta(prepare(ca, 2)))
    assert codes(feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}))) == []
    assert machine.view(0.0).snapshot.prepares == {}


def test_an_aborted_prepare_may_be_followed_by_another_with_its_epoch(ca, machine):
    feed(machine, ca.delta(prepare(ca, 2)))
    feed(machine, ca.delta(removes=["prepare/web/0"]))
    assert codes(feed(machine, ca.delta(prepare(ca, 2, "host-c")))) == []


def test_an_old_prepare_is_refused(ca, machine):
    assert codes(feed(machine, ca.delta(prepare(ca, 1)))) == ["placement.epoch"]
    active = {"prepare/web/0": ca.placement("web", "host-b", 5)}
    assert codes(feed(machine, ca.delta(active))) == ["placement.state"]


# ---- policy


def test_an_older_policy_is_refused_and_the_same_revision_must_be_the_same(ca, machine):
    feed(machine, ca.delta({"policy": ca.policy(5, "a")}))
    assert codes(feed(machine, ca.delta({"policy": ca.policy(4, "a")}))) == ["policy.revision"]
    assert codes(feed(machine, ca.delta({"policy": ca.policy(5, "b")}))) == ["policy.equivocation"]
    assert machine.view(0.0).snapshot.policy.revision == 5


def test_a_policy_that_does_not_compile_leaves_the_one_before(ca):
    def check(policy):
        if policy.files[0].text == "bad":
            raise BadPolicy("policy.bad", "no", file="p.yaml", line=1)

    machine = ca.machine(check_policy=check)
    feed(machine, ca.snapshot())
    assert codes(feed(machine, ca.delta({"policy": ca.policy(2, "bad")}))) == ["policy.bad"]
    assert machine.view(0.0).snapshot.policy.revision == 1
    assert codes(feed(machine, ca.delta({"policy": ca.policy(3, "good")}))) == []


# ---- frames


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"null", b'{"kind":"beat"}', b"\xff", b'{"kind":"delta"}', b"[" * 3000]
)
def test_a_broken_frame_changes_nothing_and_asks_anew(ca, machine, line):
    before = machine.objects
    (refused, need) = feed(machine, line)
    assert isinstance(refused, FrameRefused)
    assert isinstance(refused.error, BadInput)
    assert isinstance(need, NeedSnapshot)
    assert (machine.objects, machine.resume) == (before, None)
    assert in_force(machine) == BOTH


def test_a_gap_asks_for_a_snapshot_and_keeps_what_is_in_force(ca, machine):
    ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)})  # lost
    events = feed(machine, ca.delta({"endpoint/host-b": ca.endpoint("host-b", generation=2)}))
    assert [type(e) for e in events] == [NeedSnapshot]
    assert in_force(machine) == BOTH
    # Nothing but a snapshot continues now, not even a delta that would fit.
    assert isinstance(feed(machine, ca.delta())[0], NeedSnapshot)
    assert codes(feed(machine, ca.snapshot())) == []
    assert in_force(machine)["web/0"] == ("host-b", 2)


def test_a_hash_mismatch_asks_for_a_snapshot(ca, machine):
    line = ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}, hash="0" * 64)
    assert [type(e) for e in feed(machine, line)] == [NeedSnapshot]
    assert in_force(machine) == BOTH
    assert codes(feed(machine, ca.snapshot(hash="0" * 64))) == ["feed.hash"]
    assert in_force(machine) == BOTH


def test_a_revision_never_goes_back(ca, machine):
    feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}))
    assert codes(feed(machine, ca.snapshot(revision=1))) == ["feed.rollback"]
    assert in_force(machine)["web/0"] == ("host-b", 2)


def test_a_position_must_be_covered_by_its_heartbeat(ca, machine):
    assert codes(feed(machine, ca.delta(heartbeat=ca.heartbeat(revision=1)))) == ["feed.position"]
    ca.revision -= 1
    assert codes(feed(machine, ca.snapshot(heartbeat=ca.heartbeat(timeline="t2")))) == ["feed.position"]
    assert codes(feed(machine, ca.snapshot(heartbeat=ca.policy()))) == ["record.type"]


def test_another_timeline_needs_a_newer_heartbeat(ca, machine):
    ca.timeline, ca.revision = "t2", 0
    assert codes(feed(machine, ca.snapshot())) == ["feed.timeline"]
    ca.time += 1
    assert codes(feed(machine, ca.snapshot())) == []
    assert machine.resume == Position("t2", 0)
    ca.timeline, ca.revision, ca.time = "t1", 99, ca.time - 1
    assert codes(feed(machine, ca.snapshot())) == ["feed.timeline"]


@pytest.mark.parametrize("key", ["bundle", "policy", "endpoint/host-a"])
def test_the_indispensable_is_never_removed(ca, machine, key):
    kept = dict(ca.objects)
    assert codes(feed(machine, ca.delta(removes=[key]))) == ["feed.tombstone"]
    assert codes(feed(machine, ca.snapshot())) == ["feed.incomplete"]
    assert machine.objects == kept


def test_an_empty_snapshot_removes_nothing(ca, machine):
    ca.objects = {}
    assert codes(feed(machine, ca.snapshot())) == ["feed.incomplete"]
    assert in_force(machine) == BOTH


def test_a_complete_snapshot_replaces_the_set(ca, machine):
    del ca.objects["placement/shop/api/0"]
    ca.revision += 1
    assert accepted(feed(machine, ca.snapshot())).changed == {"placement/shop/api/0"}
    assert in_force(machine) == {"web/0": ("host-a", 1)}


def test_before_the_first_policy_a_snapshot_may_lack_one(ca):
    del ca.objects["policy"]
    machine = ca.machine()
    assert codes(feed(machine, ca.snapshot())) == []
    assert machine.view(0.0).snapshot.policy is None


# ---- trust


def test_a_newer_bundle_is_taken_and_an_older_one_is_not(ca, machine, authority):
    events = feed(machine, ca.delta({"bundle": authority.bundle(4, NOW)}))
    assert codes(events) == []
    assert machine.trust.sequence == 4
    assert in_force(machine) == BOTH
    assert codes(feed(machine, ca.delta({"bundle": authority.bundle(3, NOW)}))) == ["bundle.rollback"]
    assert machine.trust.sequence == 4


def test_records_of_a_foreign_authority_are_refused(ca, machine, tmp_path):
    from ca.authority import Authority
    from identity.names import TrustDomain

    foreign = Authority.create(tmp_path / "foreign", TrustDomain("test.example"), NOW)
    ours, ca.authority = ca.authority, foreign
    stolen = ca.placement("web", "host-b", 9)
    assert codes(feed(machine, ca.beat(time=int(NOW) + 5))) == ["record.signature"]
    ca.authority = ours
    events = feed(machine, ca.delta({"placement/web/0": stolen, "bundle": foreign.bundle(9, NOW)}))
    assert sorted(codes(events)) == ["chain.untrusted", "record.signature"] or "record.signature" in codes(
        events
    )
    assert len(codes(events)) == 2
    assert in_force(machine) == BOTH
    assert machine.trust.sequence == 0


# ---- freshness


def test_a_heartbeat_refreshes_and_a_replayed_one_does_not(ca, machine):
    assert feed(machine, ca.beat(time=int(NOW) + 2), mono=2.0) == [Refreshed(int(NOW) + 2)]
    assert machine.age(3.0) == 1.0
    assert feed(machine, ca.beat(time=int(NOW) + 2), mono=9.0) == []
    assert feed(machine, ca.beat(time=int(NOW) + 1), mono=9.0) == []
    assert machine.age(9.0) == 7.0


def test_a_heartbeat_behind_the_newest_revision_is_a_rollback(ca, machine):
    feed(machine, ca.delta(), mono=1.0)
    assert codes(feed(machine, ca.beat(revision=1, time=int(NOW) + 9), mono=9.0)) == ["heartbeat.rollback"]
    assert machine.age(9.0) == 8.0


def test_a_frame_with_an_old_heartbeat_is_no_news_but_no_error(ca, machine):
    feed(machine, ca.beat(revision=5, time=int(NOW) + 9), mono=3.0)
    events = feed(machine, ca.delta(), mono=4.0)
    assert [type(e) for e in events] == [Accepted]
    assert machine.age(4.0) == 1.0


def test_a_heartbeat_of_another_timeline_asks_for_a_snapshot(ca, machine):
    events = feed(machine, ca.beat(timeline="t2", time=int(NOW) + 9), mono=9.0)
    assert codes(events) == ["feed.timeline"]
    assert machine.resume is None
    assert machine.age(9.0) == 9.0


def test_while_changes_are_missing_heartbeats_prove_nothing(ca, machine):
    ca.delta()
    feed(machine, ca.delta())
    assert feed(machine, ca.beat(time=int(NOW) + 99), mono=20.0) == []
    assert machine.age(20.0) == 20.0


def test_a_heartbeat_from_the_future_is_refused(ca, machine):
    assert codes(feed(machine, ca.beat(time=int(NOW) + 601))) == ["heartbeat.future"]
    assert codes(feed(machine, ca.beat(time=int(NOW) + 600))) == []


def test_strict_instances_end_with_the_lease_and_come_back(ca):
    ca.objects["placement/db/0"] = ca.placement("db", "host-b", index=3, fence="strict")
    ca.objects["prepare/db/0"] = ca.placement("db", "host-c", 2, index=3, state="prepare")
    machine = ca.machine(lease=30.0, stale_max=100.0)
    feed(machine, ca.snapshot(), mono=10.0)
    view = machine.view(10.0)
    assert "db/0" in view.snapshot.placements
    assert view.deadline == 40.0
    assert "db/0" in machine.view(39.9).snapshot.placements
    gone = machine.view(40.0)
    assert gone.fenced == {"db/0"}
    assert gone.snapshot.prepares == {}
    assert in_force(machine, 40.0) == BOTH
    assert gone.deadline == 110.0
    dark = machine.view(110.0)
    assert dark.snapshot.placements == {}
    assert dark.fenced == {"db/0", "web/0", "shop/api/0"}
    feed(machine, ca.beat(time=int(NOW) + 200), mono=210.0)
    assert machine.view(210.0).fenced == frozenset()


def test_an_endpoint_record_ends_on_the_clock_of_the_ca(ca):
    ca.objects["endpoint/host-b"] = ca.endpoint("host-b", expires=int(NOW) + 50)
    ca.objects["endpoint/host-a"] = ca.endpoint("host-a", expires=int(NOW) + 50)
    machine = ca.machine()
    feed(machine, ca.snapshot(), mono=1000.0, wall=NOW + 10**9)
    assert machine.view(1000.0).deadline == 1050.0
    assert set(machine.view(1049.0).snapshot.endpoints) == {"host-a", "host-b"}
    assert set(machine.view(1050.0).snapshot.endpoints) == {"host-a"}


# ---- restore


def restored(ca, machine: SyncMachine, **changes):
    fresh = ca.machine(
        marks=changes.pop("marks", machine.marks), policy_mark=changes.pop("policy_mark", machine.policy_mark)
    )
    values = {
        "objects": machine.objects, "position": machine.position, "proof": machine.proof.envelope,
        "heartbeat": machine.heartbeat.envelope,
        "heard": machine.heard, "wall": NOW + 5, "mono": 7.0, "stored_hash": machine.received_hash,
    } | changes  # fmt: skip
    fresh.restore(
        values.pop("objects"), values.pop("position"), values.pop("proof"), values.pop("heartbeat"), **values
    )
    return fresh


def test_a_restored_machine_goes_on_where_it_was(ca, machine):
    feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}), mono=3.0)
    fresh = restored(ca, machine)
    assert in_force(fresh, 7.0) == in_force(machine)
    assert fresh.resume == Position("t1", 2)
    assert fresh.age(7.0) == 4.0
    assert codes(feed(fresh, ca.delta(), mono=8.0)) == []


def test_after_a_reboot_strict_waits_for_a_heartbeat(ca):
    ca.objects["placement/db/0"] = ca.placement("db", "host-b", index=3, fence="strict")
    machine = ca.machine()
    feed(machine, ca.snapshot())
    fresh = restored(ca, machine, heard=None)
    assert machine.view(7.0).fenced == frozenset()
    assert fresh.view(7.0).fenced == {"db/0"}
    assert fresh.age(7.0) == 30.0
    assert restored(ca, machine, heard=None, wall=NOW + 400).age(7.0) == 400.0
    assert restored(ca, machine, heard=None, wall=NOW - 30).age(7.0) == 30.0


def test_a_restored_set_with_refused_records_asks_for_a_snapshot(ca, machine):
    feed(machine, ca.delta({"nonsense": ca.policy()}))
    fresh = restored(ca, machine)
    assert in_force(fresh) == BOTH
    assert fresh.resume is None


@pytest.mark.parametrize(
    "change",
    [
        lambda ca, m: {"heartbeat": m.heartbeat.envelope[:-6] + "AAAAAA"},
        lambda ca, m: {"proof": m.heartbeat.envelope[:-6] + "AAAAAA"},
        lambda ca, m: {"position": Position("t1", 99)},
        lambda ca, m: {"position": Position("t2", 1)},
        lambda ca, m: {"objects": {}},
        lambda ca, m: {"objects": m.objects | {"placement/web/0": m.objects["placement/shop/api/0"]}},
        lambda ca, m: {"objects": m.objects | {"policy": m.objects["policy"][:-6] + "AAAAAA"}},
        lambda ca, m: {"marks": {"web/0": Mark(2, "x")}},
        lambda ca, m: {"policy_mark": Mark(2, "x")},
        lambda ca, m: {"objects": {k: v for k, v in m.objects.items() if k != "policy"}},
    ],
)
def test_a_tampered_saved_state_is_refused_whole(ca, machine, change):
    with pytest.raises(BadState) as caught:
        restored(ca, machine, **change(ca, machine))
    assert caught.value.code == "state.snapshot"
    assert caught.value.hint


def test_a_record_signed_by_a_removed_key_ends_with_its_bundle(ca, machine, authority, tmp_path):
    """The records key is replaced: what the old one signed holds no more under the bundle without it."""
    import shutil

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from ca.authority import Authority
    from ca.signer import FileSigner
    from identity import certs
    from identity.keys import write_file
    from identity.names import SpiffeId, TrustDomain

    rolled_dir = tmp_path / "rolled"
    shutil.copytree(authority.directory, rolled_dir)
    rolled = Authority.load(rolled_dir, NOW)
    (rolled_dir / "records.key").unlink()
    key = FileSigner.create(rolled_dir / "records.key", Ed25519PrivateKey.generate())
    name = SpiffeId(TrustDomain("test.example"), ("cp", "records"))
    write_file(
        rolled_dir / "records.pem", "".join(rolled._issue(certs.SIGNER, key.public_key, name, NOW)).encode()
    )
    ca.authority = Authority.load(rolled_dir, NOW)
    renewed = {
        "bundle": ca.authority.bundle(1, NOW),
        "endpoint/host-a": ca.endpoint("host-a"),
        "placement/web/0": ca.placement("web", "host-a", 1),
    }
    events = feed(machine, ca.delta(renewed))
    assert set(codes(events)) == {"record.signature"}
    assert in_force(machine) == {"web/0": ("host-a", 1)}
    assert machine.view(0.0).snapshot.policy is not None  # signed by the policy key, which stayed
    assert machine.marks["shop/api/0"].number == 1
    assert isinstance(machine.refused["placement/shop/api/0"], NotVerified)


def test_a_saved_set_older_than_the_bundle_begun_with_still_holds(ca, machine, authority):
    newer = authority.trust_bundle(7, NOW)
    fresh = SyncMachine(newer, "host-a")
    fresh.restore(
        machine.objects, machine.position, machine.proof.envelope, machine.heartbeat.envelope,
        heard=0.0, wall=NOW, mono=1.0, stored_hash=machine.received_hash,
    )  # fmt: skip
    assert in_force(fresh) == BOTH
    assert fresh.trust.sequence == 7
    assert codes(feed(fresh, ca.delta({"bundle": authority.bundle(6, NOW)}))) == ["bundle.rollback"]
    assert codes(feed(fresh, ca.delta({"bundle": authority.bundle(8, NOW)}))) == []


def test_several_changes_within_one_second_survive_a_restart(ca, machine):
    ca.time -= 1
    feed(machine, ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}))
    assert in_force(restored(ca, machine)) == in_force(machine)


def test_an_older_endpoint_record_is_refused(ca, machine):
    assert codes(feed(machine, ca.delta({"endpoint/host-b": ca.endpoint("host-b", generation=4)}))) == []
    assert codes(feed(machine, ca.delta({"endpoint/host-b": ca.endpoint("host-b", b"\x09" * 32, generation=3)}))) == [
        "endpoint.generation"
    ]
    assert machine.view(0.0).snapshot.endpoints["host-b"].generation == 4


def test_who_claims_a_taken_address_keeps_what_it_had(ca, machine):
    taken = ca.placement("shop/api", "host-b", 2, index=1)  # the address of web
    assert codes(feed(machine, ca.delta({"placement/shop/api/0": taken}))) == ["placement.address_taken"]
    assert in_force(machine) == BOTH
    # Both of a chain are new: web takes api's address and api takes one that web had.
    swapped = {
        "placement/web/0": ca.placement("web", "host-a", 2, index=2),
        "placement/shop/api/0": ca.placement("shop/api", "host-b", 3, index=3),
        "placement/other/0": ca.placement("other", "host-b", 1, index=1),
    }
    events = feed(machine, ca.delta(swapped))
    assert codes(events) == []
    assert in_force(machine) == {"web/0": ("host-a", 2), "shop/api/0": ("host-b", 3), "other/0": ("host-b", 1)}


def test_a_claim_that_cannot_even_keep_what_it_had_is_out(ca, machine):
    events = feed(
        machine,
        ca.delta(
            {
                "placement/web/0": ca.placement("web", "host-a", 2, index=2),  # wants api's, which api keeps
                "placement/other/0": ca.placement("other", "host-b", 1, index=1),  # wants what web has
            }
        ),
    )
    assert set(codes(events)) == {"placement.address_taken"}
    addresses = [a for p in machine.view(0.0).snapshot.placements.values() for a in p.addresses]
    assert len(addresses) == len(set(addresses))
    assert in_force(machine)["shop/api/0"] == ("host-b", 1)
