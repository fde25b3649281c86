"""Members of the authority come and go; what is in force holds at every step, also after a crash at any point of one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ca import rotation, succession
from ca.authority import Authority, Lifetimes
from ca.keyring import FileKeys, Ring
from identity import certs
from identity.bundle import open_bundle
from identity.errors import BadInput, BadState, Conflict, NotVerified
from identity.names import SpiffeId, TrustDomain
from identity.records import Heartbeat
from identity.revocation import id_entry, spki_hash

NOW = 1_800_000_000
DAY = 86400
TD = TrustDomain("prod.example")
HOST = SpiffeId.endpoint(TD, "web-1")
KINDS = ("intermediate", "records", "policy", "root")


def csr() -> str:
    return certs.make_csr(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return Authority.create(tmp_path_factory.mktemp("ca"), TD, NOW).directory


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "ca")
    return tmp_path / "ca"


def states(authority: Authority) -> dict[str, str]:
    return {m.name: m.state for m in authority.ring.members}


def beat(authority: Authority) -> str:
    return authority.sign_record(Heartbeat(trust_domain=TD.name, timeline="t", revision=1, time=NOW))


def turn(authority: Authority, kind: str, now: float = NOW) -> None:
    rotation.prepare(authority, kind, now)
    rotation.activate(authority, kind, now)


def test_an_intermediate_comes_and_the_old_one_goes(copy):
    authority = Authority.load(copy, NOW)
    start = authority.trust_bundle(1, NOW)
    first, old = authority.intermediate, authority.issue_endpoint(csr(), HOST, NOW)
    rotation.prepare(authority, "intermediate", NOW)
    assert states(authority)["intermediate-2"] == "prepared"
    assert certs.parse_chain(authority.issue_endpoint(csr(), HOST, NOW))[1] == first
    rotation.activate(authority, "intermediate", NOW)
    new = authority.issue_endpoint(csr(), HOST, NOW)
    assert certs.parse_chain(new)[1] == authority.intermediate != first
    second = start.accept_next(authority.bundle(2, NOW), NOW)
    for chain in (old, new):
        start.verify_svid(chain, NOW)
        second.verify_svid(chain, NOW)
    rotation.taint(authority, "intermediate", NOW, 60)
    third = second.accept_next(authority.bundle(3, NOW), NOW)
    assert third.taint_of(third.verify_svid(old, NOW).chain).until == NOW + 60
    assert third.taint_of(third.verify_svid(new, NOW).chain) is None
    rotation.revoke(authority, "intermediate", NOW)
    fourth = third.accept_next(authority.bundle(4, NOW), NOW)
    fourth.verify_svid(new, NOW)
    with pytest.raises(NotVerified) as e:
        fourth.verify_svid(old, NOW)
    assert e.value.code == "cert.revoked"
    assert not (copy / "intermediate.key").exists()
    again = Authority.load(copy, NOW)
    assert states(again) == states(authority)
    assert again.trust_bundle(5, NOW).blocked.keys == {spki_hash(first)}


def test_what_a_leaked_intermediate_signs_is_refused_after_its_revocation(copy):
    """The thief has the key and makes leaves, record signers and bundles with it; also a newer bundle of its own."""
    authority = Authority.load(copy, NOW)
    shutil.copytree(copy, copy.parent / "stolen")
    thief = Authority.load(copy.parent / "stolen", NOW)
    bundle = authority.trust_bundle(1, NOW)
    turn(authority, "intermediate")
    rotation.revoke(authority, "intermediate", NOW)
    bundle = bundle.accept_next(authority.bundle(2, NOW), NOW)
    with pytest.raises(NotVerified):
        bundle.verify_svid(thief.issue_endpoint(csr(), HOST, NOW), NOW)
    with pytest.raises(NotVerified) as e:
        bundle.accept_next(thief.bundle(99, NOW), NOW)
    assert e.value.code == "cert.revoked"
    # The record key itself was stolen too: it goes the same way.
    bundle.verify(Heartbeat, beat(thief))
    turn(authority, "records")
    rotation.revoke(authority, "records", NOW)
    bundle = bundle.accept_next(authority.bundle(3, NOW), NOW)
    bundle.verify(Heartbeat, beat(authority))
    with pytest.raises(NotVerified):
        bundle.verify(Heartbeat, beat(thief))


def test_what_a_name_was_given_before_is_blocked_and_what_it_is_given_now_is_not(plane, clock):
    """Certificates begin minutes before they are made, for receivers whose clock is behind: not past a revocation."""
    host, stranger = (SpiffeId.endpoint(plane.trust_domain, name) for name in ("web-1", "other"))

    def given(name: SpiffeId) -> list[x509.Certificate]:
        return certs.parse_chain("".join(plane.authority.issue_endpoint(csr(), name, plane.clock())))

    old, other = given(host), given(stranger)
    clock.now += 2
    succession.block(plane, id_entry(host, plane.now), 0, "root")
    new = given(host)
    for chain in (new, other):
        plane.trust.verify_svid(chain, plane.now)
    with pytest.raises(NotVerified) as e:
        plane.trust.verify_svid(old, plane.now)
    assert e.value.code == "cert.revoked"


@pytest.mark.parametrize("kind", ["records", "policy"])
def test_a_record_key_is_known_before_it_signs(copy, kind):
    authority = Authority.load(copy, NOW)
    bundle = authority.trust_bundle(1, NOW)
    assert len(bundle.keys[kind]) == 1
    rotation.prepare(authority, kind, NOW)
    bundle = bundle.accept_next(authority.bundle(2, NOW), NOW)
    assert len(bundle.keys[kind]) == 2
    old = beat(authority)
    rotation.activate(authority, kind, NOW)
    assert (beat(authority) != old) == (kind == "records")
    for one in (old, beat(authority)):
        bundle.verify(Heartbeat, one)
    with pytest.raises(BadInput) as e:
        rotation.taint(authority, kind, NOW)
    assert e.value.code == "authority.kind"
    rotation.revoke(authority, kind, NOW)
    assert len(bundle.accept_next(authority.bundle(3, NOW), NOW).keys[kind]) == 1


def test_roots_overlap_and_the_old_one_shows_the_way(copy):
    authority = Authority.load(copy, NOW)
    start, old = authority.trust_bundle(1, NOW), authority.issue_endpoint(csr(), HOST, NOW)
    pin = authority.root_fingerprint
    rotation.prepare(authority, "root", NOW)
    both = start.accept_next(authority.bundle(2, NOW), NOW)
    assert len(both.roots) == 2
    rotation.activate(authority, "root", NOW)
    new = authority.issue_endpoint(csr(), HOST, NOW)
    both.verify_svid(new, NOW)
    with pytest.raises(NotVerified):
        start.verify_svid(new, NOW)  # it has not heard of the new root yet
    for known in (start, both):  # one that was away, and one that was not
        latest = known.accept_next(authority.bundle(3, NOW), NOW)
        latest.verify_svid(new, NOW)
        latest.verify_svid(old, NOW)
    assert open_bundle(authority.bundle(3, NOW), pin, TD, NOW).roots  # an old pin still opens it
    rotation.taint(authority, "root", NOW)
    assert start.accept_next(authority.bundle(4, NOW), NOW).taint_of(latest.verify_svid(old, NOW).chain)
    rotation.revoke(authority, "root", NOW)
    assert states(authority) == {
        "root": "revoked", "intermediate": "revoked", "records": "active", "policy": "active", "root-2": "active",
        "intermediate-2": "active",
    }  # fmt: skip
    for known in (start, latest):
        gone = known.accept_next(authority.bundle(5, NOW), NOW)
        assert gone.fingerprints() == {authority.root_fingerprint}
        gone.verify_svid(new, NOW)
        with pytest.raises(NotVerified):
            gone.verify_svid(old, NOW)
    Authority.load(copy, NOW).trust_bundle(6, NOW)


def test_the_word_of_a_compromised_root_counts_for_nothing(copy):
    authority = Authority.load(copy, NOW)
    start = authority.trust_bundle(1, NOW)
    turn(authority, "root")
    rotation.revoke(authority, "root", NOW, compromised=True)
    assert authority.links(NOW) == []
    with pytest.raises(NotVerified):
        start.accept_next(authority.bundle(2, NOW), NOW)  # only a new pin helps it now
    assert open_bundle(authority.bundle(2, NOW), authority.root_fingerprint, TD, NOW)


def test_two_changes_of_the_root_are_found_by_who_missed_both(copy):
    authority = Authority.load(copy, NOW)
    start = authority.trust_bundle(1, NOW)
    turn(authority, "root")
    rotation.revoke(authority, "root", NOW)
    turn(authority, "root", NOW)
    rotation.revoke(authority, "root-2", NOW)
    assert start.accept_next(authority.bundle(9, NOW), NOW).fingerprints() == {authority.root_fingerprint}
    assert len(authority.links(NOW)) == 4


def test_a_rogue_authority_of_the_same_name_is_nobody(copy, tmp_path):
    rogue = Authority.create(tmp_path / "rogue", TD, NOW)
    bundle = Authority.load(copy, NOW).trust_bundle(1, NOW)
    turn(rogue, "root")
    for envelope in (rogue.bundle(2, NOW), rogue.bundle(1 << 40, NOW)):
        with pytest.raises(NotVerified):
            bundle.accept_next(envelope, NOW)
    with pytest.raises(NotVerified):
        bundle.verify_svid(rogue.issue_endpoint(csr(), HOST, NOW), NOW)


def test_steps_out_of_turn_are_refused(copy):
    authority = Authority.load(copy, NOW)
    for kind in KINDS:
        with pytest.raises(Conflict) as e:
            rotation.activate(authority, kind, NOW)
        assert e.value.code == "authority.not_prepared"
        with pytest.raises(Conflict) as e:
            rotation.revoke(authority, kind, NOW)
        assert e.value.code == "authority.state"
    with pytest.raises(Conflict):
        rotation.taint(authority, "intermediate", NOW)
    rotation.prepare(authority, "intermediate", NOW)
    with pytest.raises(Conflict) as e:
        rotation.prepare(authority, "intermediate", NOW)
    assert e.value.code == "authority.prepared"
    with pytest.raises(BadInput) as e:
        rotation.revoke(authority, "intermediate-9", NOW)
    assert e.value.code == "authority.unknown"
    with pytest.raises(Conflict):
        rotation.taint(authority, "intermediate-2", NOW)
    assert rotation.revoke(authority, "intermediate-2", NOW).state == "revoked"  # never used, given up
    assert rotation.revoke(authority, "intermediate-2", NOW).state == "revoked"
    assert rotation.prepare(authority, "intermediate", NOW).name == "intermediate-3"


def test_without_the_root_key_nothing_is_begun(copy):
    (copy / "root.key").rename(copy.parent / "root.key")
    authority = Authority.load(copy, NOW)
    before = states(authority)
    for kind in ("root", "intermediate"):
        with pytest.raises(BadState) as e:
            rotation.prepare(authority, kind, NOW)
        assert e.value.code == "ca.root_offline"
    assert authority.maintain(NOW + 84 * DAY) is True  # the record keys' certificates only
    assert states(authority) == before


def test_the_half_life_rules(copy):
    authority = Authority.load(copy, NOW)
    end = certs.not_after(authority.intermediate)

    def at(days_left: float) -> dict[str, str]:
        authority.maintain(end - days_left * DAY)
        return {k: v for k, v in states(authority).items() if k.startswith("intermediate")}

    assert at(31) == {"intermediate": "active"}
    assert at(29.9) == {"intermediate": "active", "intermediate-2": "prepared"}
    old = authority.issue_endpoint(csr(), HOST, int(end - 7.2 * DAY))
    assert at(7.1)["intermediate"] == "active"
    assert at(6.9) == {"intermediate": "old", "intermediate-2": "active"}
    assert authority.trust_bundle(9, end - 6.9 * DAY).verify_svid(old, end - 6.9 * DAY)
    assert at(-0.1) == {"intermediate-2": "active"}
    assert not (copy / "intermediate.key").exists()
    assert not (copy / "intermediate.pem").exists()


def test_short_lives_follow_the_same_rules(tmp_path):
    lives = Lifetimes(intermediate=600, endpoint=60, workload=30, signer=300, server=60, record_key=1200)
    authority = Authority.create(tmp_path / "ca", TD, NOW, lifetimes=lives)
    bundle, now, serial = authority.trust_bundle(1, NOW), NOW, 1
    for now in range(NOW, NOW + 4000, 20):
        if authority.maintain(now):
            serial += 1
            bundle = bundle.accept_next(authority.bundle(serial, now), now)
        svid = bundle.verify_svid(authority.issue_endpoint(csr(), HOST, now), now)
        assert svid.not_after == now + 60  # never cut by its issuer
        bundle.verify(Heartbeat, beat(authority))
    assert int(authority.ring.active("intermediate").name.partition("-")[2]) > 5
    assert int(authority.ring.active("records").name.partition("-")[2]) > 2
    assert len(authority.ring.members) < 12  # what is over is forgotten
    assert len(list((tmp_path / "ca").glob("*.key"))) < 14


def test_a_profile_is_never_outlived_by_a_knob():
    assert Lifetimes(endpoint=10 * DAY).of(certs.ENDPOINT).lifetime == DAY
    assert Lifetimes(endpoint=60).of(certs.ENDPOINT).lifetime == 60


def test_another_process_sees_the_change(copy):
    one, other = Authority.load(copy, NOW), Authority.load(copy, NOW)
    assert other.refresh(NOW) is False
    turn(one, "intermediate")
    assert other.refresh(NOW) is True
    assert other.intermediate == one.intermediate
    with rotation.changing(other, NOW):
        turn(other, "intermediate")
    one.refresh(NOW)
    assert one.intermediate == other.intermediate


class Crash(BaseException):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", range(12))
def test_a_crash_at_any_point_of_a_rotation_leaves_a_whole_authority(copy, monkeypatch, kind, step):
    start = Authority.load(copy, NOW).trust_bundle(1, NOW)
    real, calls = os.rename, 0

    def rename(*args: object) -> None:
        nonlocal calls
        if calls == step:
            raise Crash
        calls += 1
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    try:
        authority = Authority.load(copy, NOW)
        turn(authority, kind)
        if kind in {"root", "intermediate"}:
            rotation.taint(authority, kind, NOW)
        rotation.revoke(authority, kind, NOW)
    except Crash:
        pass
    monkeypatch.undo()
    again = Authority.load(copy, NOW)
    bundle = start.accept_next(again.bundle(2, NOW), NOW)
    bundle.verify_svid(again.issue_endpoint(csr(), HOST, NOW), NOW)
    bundle.verify(Heartbeat, beat(again))
    if again.ring.prepared(kind) is None:
        rotation.prepare(again, kind, NOW)
    rotation.activate(again, kind, NOW)
    bundle.accept_next(again.bundle(3, NOW), NOW).verify(Heartbeat, beat(again))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(state="good"), lambda m: m.update(kind="tls"), lambda m: m.update(name="../root"),
        lambda m: m.update(name="records-2"), lambda m: m.update(made="1"), lambda m: m.update(more=1), lambda m: m.pop("name"),
        lambda m: m.update(state="old"), lambda m: m.update(name="root-0"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(copy, change):
    state = json.loads((copy / "authority.json").read_bytes())
    change(state["members"][0])
    (copy / "authority.json").write_text(json.dumps(state))
    with pytest.raises(BadState) as e:
        Ring.load(copy)
    assert e.value.code == "ca.state"


def test_an_authority_of_version_1_is_taken_over(copy):
    state = json.loads((copy / "authority.json").read_bytes())
    (copy / "authority.json").write_text(json.dumps({"version": 1, "trust_domain": TD.name, "created": state["created"]}))
    authority = Authority.load(copy, NOW)
    turn(authority, "intermediate")
    assert json.loads((copy / "authority.json").read_bytes())["version"] == 2


@pytest.mark.parametrize("match", [True, False])
def test_a_renewal_that_version_1_did_not_finish_is_finished(copy, match):
    old = (copy / "intermediate.pem").read_bytes()
    other = Authority.load(copy, NOW)
    turn(other, "intermediate")
    shutil.copy(copy / "intermediate-2.pem", copy / "intermediate.next.pem")
    if match:
        shutil.copy(copy / "intermediate-2.key", copy / "intermediate.key")
    (copy / "authority.json").write_text(json.dumps({"version": 1, "trust_domain": TD.name, "created": NOW}))
    Authority.load(copy, NOW)
    assert ((copy / "intermediate.pem").read_bytes() == old) != match
    assert not (copy / "intermediate.next.pem").exists()


def test_file_keys_keep_to_their_directory(tmp_path):
    keys = FileKeys(tmp_path)
    for name in ("../x", "server", "root-", "root-0", "", "records/2"):
        for call in (keys.open, keys.has, keys.destroy, lambda n: keys.make(n, "p256")):
            with pytest.raises(BadInput):
                call(name)
    keys.make("records-2", "ed25519")
    with pytest.raises(Conflict):
        keys.make("records-2", "ed25519")
    keys.destroy("records-2")
    keys.destroy("records-2")
