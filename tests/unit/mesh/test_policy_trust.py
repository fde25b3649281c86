"""A hostile CA, which holds every key of the CA, against hosts that know the policy authority."""

from __future__ import annotations

import os

import pytest

from identity.errors import BadState, NotVerified
from identity.records import PolicyFile, PolicyRecord, PolicyTrial
from identity.records_policy import ScopeSigners
from mesh import policy_trust
from mesh.state import StateDir
from mesh.sync import FrameRefused, RecordRefused
from policy.bundle import sign_bundle
from policy.language import digest
from policy.trust import PolicyTrust, describe
from tests.unit.policy.operators import MAIL, MESH, PAY, Operators, forge

TD = "test.example"
ops = Operators(TD)
AUTHORITY = ops.authority()
FILES = {"mesh.yaml": MESH, "pay.yaml": PAY % 80, "mail.yaml": MAIL}
FIRST = ops.bundle(AUTHORITY, FILES, "alice", "carol", "erin")
SECOND = ops.bundle(AUTHORITY, {"pay.yaml": PAY % 81}, "carol", base=FIRST)
NOW = 2_000_000_000.0
OTHER = ops.authority(scopes=[ScopeSigners(scope="", signers=["erin"], threshold=1)])


def record(bundle, revision: int, *, authority=AUTHORITY, trial=None, parts=None) -> PolicyRecord:
    return PolicyRecord(
        trust_domain=TD, revision=revision, digest=digest(bundle.files), author="x", issued=int(NOW),
        files=[PolicyFile(name=n, text=t) for n, t in bundle.files], authority=authority.texts() if authority else [],
        parts=bundle.texts() if parts is None else parts, trial=trial,
    )  # fmt: skip


def on_trial(bundle) -> PolicyTrial:
    files = [PolicyFile(name=n, text=t) for n, t in bundle.files]
    return PolicyTrial(id="r1", digest=digest(bundle.files), files=files, parts=bundle.texts(), names=["acme/payments/web"])


@pytest.fixture
def host(ca):
    """A machine that knows the authority and the first bundle."""
    made = ca.machine()
    assert not refused(made.receive(ca.snapshot(), wall=NOW, mono=0.0))
    assert publish(ca, made, record(FIRST, 2)) == []
    return made


def refused(events) -> list[str]:
    return [e.error.code for e in events if isinstance(e, RecordRefused | FrameRefused)]


def publish(ca, machine, payload: PolicyRecord) -> list[str]:
    return refused(machine.receive(ca.delta({"policy": ca.sign(payload)}), wall=NOW, mono=0.0))


def in_force(machine) -> PolicyRecord:
    policy = machine.view(0.0).snapshot.policy
    assert policy is not None
    return policy


def test_signed_policies_pass_and_a_host_remembers(ca, host) -> None:
    assert host.policy_trust.authority.fingerprint == AUTHORITY.fingerprint
    assert publish(ca, host, record(SECOND, 3)) == []
    assert host.policy_trust.marks["acme/payments"].serial == 2
    assert "acme/payments#2" in describe(host.policy_trust)


def test_before_an_authority_is_known_the_ca_alone_decides(ca) -> None:
    made = ca.machine()
    made.receive(ca.snapshot(), wall=NOW, mono=0.0)
    assert "alone" in describe(made.policy_trust)
    assert publish(ca, made, record(FIRST, 2, authority=None)) == ["authority.missing"]
    assert publish(ca, made, record(FIRST, 2, authority=None, parts=[])) == []


HOSTILE = {
    "unsigned": (lambda: record(FIRST, 9, authority=None, parts=[]), "policy.unsigned"),
    "no parts": (lambda: record(FIRST, 9, parts=[]), "policy.unsigned"),
    "an older bundle at a newer revision": (lambda: record(FIRST, 9), "policy.replay"),
    "signed by the CA's friend": (lambda: record(forge(SECOND, ops, "mallory"), 9), "policy.signature"),
    "another authority": (lambda: record(ops.bundle(OTHER, {"a.yaml": MESH}, "erin"), 9, authority=OTHER), "authority.fork"),
    "a text changed on the way": (
        lambda: record(SECOND, 9).model_copy(update={"files": [PolicyFile(name=f.name, text=f.text + "#") for f in record(SECOND, 9).files]}),
        "policy.content",
    ),
    "a part left out": (
        lambda: record(type(SECOND)(TD, tuple(f for f in SECOND.files if f[0] != "mesh.yaml"), SECOND.parts[1:]), 9), "policy.parts",
    ),
    "a trial that nobody signed": (lambda: record(SECOND, 9, trial=on_trial(forge(SECOND, ops, "mallory"))), "policy.signature"),
    "a trial behind what is in force": (lambda: record(SECOND, 9, trial=on_trial(FIRST)), "policy.replay"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_ca_changes_nothing(ca, host, name) -> None:
    assert publish(ca, host, record(SECOND, 3)) == []
    make, code = HOSTILE[name]
    assert publish(ca, host, make()) == [code]
    assert in_force(host).revision == 3
    assert host.policy_trust.marks["acme/payments"].serial == 2
    # and it does not spoil what its operators sign next
    assert publish(ca, host, record(SECOND, 10)) == []


def test_a_trial_is_no_mark_so_it_can_be_given_up(ca, host) -> None:
    assert publish(ca, host, record(FIRST, 3, trial=on_trial(SECOND))) == []
    assert host.policy_trust.marks["acme/payments"].serial == 1
    assert publish(ca, host, record(FIRST, 4)) == []
    assert publish(ca, host, record(SECOND, 5)) == []
    assert publish(ca, host, record(FIRST, 6)) == ["policy.replay"]


def test_a_signer_is_revoked_while_its_policy_is_on_trial(ca, host) -> None:
    gone = {n: s for n, s in ops.document().signers.items() if n != "carol"}
    scopes = [s.model_copy(update={"signers": ["dave"]}) if s.scope == "acme/payments" else s for s in ops.document().scopes]
    revoked = ops.next(AUTHORITY, "alice", "bob", signers=gone, scopes=scopes)
    again, _ = sign_bundle(FIRST, revoked, ops.keys["dave"])
    assert publish(ca, host, record(FIRST, 3, trial=on_trial(SECOND))) == []
    # the new authority with the trial that only carol signed: refused, what is in force stays
    assert publish(ca, host, record(again, 4, authority=revoked, trial=on_trial(SECOND))) == ["policy.signer_revoked"]
    assert in_force(host).trial is not None
    # without it, what the others signed goes on, and carol is out for good
    assert publish(ca, host, record(again, 5, authority=revoked)) == []
    assert publish(ca, host, record(SECOND, 6, authority=revoked)) == ["policy.signer_revoked"]
    assert publish(ca, host, record(SECOND, 7)) == ["authority.rollback"]
    assert in_force(host).revision == 5


# ---- on disk


def test_what_is_known_outlives_a_restart(ca, host, tmp_path) -> None:
    os.chmod(tmp_path, 0o700)
    state = StateDir(tmp_path)
    state.save_marks(host)
    again = ca.machine()
    again.policy_trust.authority, again.policy_trust.marks = None, {}
    found = policy_trust.load(tmp_path, TD)
    assert found.authority.fingerprint == AUTHORITY.fingerprint
    assert found.marks == host.policy_trust.marks
    assert (tmp_path / policy_trust.FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["{", '{"version": 1, "chain": []}', "edited", "other"])
def test_a_damaged_file_is_never_taken_for_none(host, tmp_path, damage) -> None:
    os.chmod(tmp_path, 0o700)
    path = tmp_path / policy_trust.FILE
    policy_trust.save(tmp_path, host.policy_trust)
    text = path.read_text()
    if damage == "edited":
        text = text.replace('"serial":1', '"serial":0')
    elif damage != "other":
        text = damage
    path.write_text(text)
    with pytest.raises(BadState) as e:
        policy_trust.load(tmp_path, TD if damage != "other" else "other.example")
    assert e.value.code == "state.authority"


def test_nothing_known_is_nothing_kept(tmp_path) -> None:
    os.chmod(tmp_path, 0o700)
    policy_trust.save(tmp_path, PolicyTrust(TD))
    assert not (tmp_path / policy_trust.FILE).exists()
    assert policy_trust.load(tmp_path, TD).authority is None


# ---- at enrolment


def test_what_enrolment_pins() -> None:
    second = ops.authority(threshold=1)
    pinned = policy_trust.pin(TD, AUTHORITY.texts(), AUTHORITY.fingerprint)
    assert pinned.authority.fingerprint == AUTHORITY.fingerprint
    assert policy_trust.pin(TD, []).authority is None
    for chain, fingerprint, known, code in (
        ([], AUTHORITY.fingerprint, None, "authority.missing"),
        (second.texts(), AUTHORITY.fingerprint, None, "authority.fingerprint"),
        (second.texts(), None, pinned, "authority.fork"),
        ([], None, pinned, "policy.unsigned"),
    ):
        with pytest.raises(NotVerified) as e:
            policy_trust.pin(TD, chain, fingerprint, known)
        assert e.value.code == code
