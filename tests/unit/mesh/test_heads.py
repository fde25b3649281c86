"""The endpoint's side of the transparency log, against the CA's own log."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ca import transparency
from ca.log_api import prove
from ca.plane import Plane
from identity import certs, records
from identity.entries import EntriesRecord
from identity.errors import BadInput, BadState, NotVerified
from identity.names import SpiffeId, TrustDomain
from identity.records import ForeignBundle
from identity.transparency import TreeHead
from identity.wire import parse
from identity.wire.admin import WorkloadAdd
from identity.wire.log import LogReply
from mesh.heads import FILE, LAG, Heads

TD = TrustDomain("reg.test")
T0 = 1_800_000_000


@pytest.fixture
def plane(tmp_path):
    directory = tmp_path / "ca"
    Plane.create(directory, TD, T0)
    opened = Plane.open(directory, lambda: float(T0))
    opened.seal()
    yield opened
    opened.store.close()


@pytest.fixture
def trust(plane):
    return plane.authority.trust_bundle(1, T0)


def objects(plane) -> dict[str, str]:
    found = {"bundle": plane.bundle}
    found |= {f"placement/{r.key}": r.placement for r in plane.placements.all() if r.placement}
    return found


def grow(plane, count: int = 1) -> None:
    for _ in range(count):
        plane.policies.apply([("a.yaml", f"meshpolicy: 1\n# {plane.policies.history()}\n")], "me", T0, "test")
    plane.seal()


def texts(findings) -> dict[str, str | None]:
    return {f.code: f.text for f in findings}


def test_what_is_in_force_is_proved_and_heads_are_kept(plane, trust, tmp_path) -> None:
    heads = Heads(tmp_path)
    asked = heads.ask(objects(plane), 0.0)
    assert (asked.timeline, asked.size, len(asked.leaves)) == (None, 0, 1)
    assert texts(heads.take(asked, prove(plane, asked), trust, 0.0)) == {
        "log.fork": None,
        "log.missing": None,
    }
    assert heads.pending == 0
    first = heads.seen
    grow(plane, 3)
    again = Heads(tmp_path)
    assert again.seen == first
    asked = again.ask(objects(plane), 1.0)
    again.take(asked, prove(plane, asked), trust, 1.0)
    assert again.seen.size > first.size
    assert again.ask(objects(plane), 2.0).leaves == []


def test_entries_foreign_bundles_and_our_own_certificates_are_asked_for(plane, trust, tmp_path, monkeypatch) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), SpiffeId(TD, ("host", "web-1"))
    own = certs.parse_chain(plane.authority.issue_endpoint(certs.make_csr(key), name, T0))[0]
    wl = certs.parse_chain(plane.authority.issue_workload(certs.make_csr(key), SpiffeId.workload(TD, "api"), [], T0))[0]
    entries = plane.sign(EntriesRecord(trust_domain=str(TD), endpoint="web-1", generation=1, entries=[], issued=T0))
    foreign = plane.sign(ForeignBundle(trust_domain=str(TD), foreign="other.test", sequence=1, issued=T0, roots=[]))
    with plane.store.write() as tx:
        transparency.record(tx, T0, "entries", "web-1", entries)
        transparency.record(tx, T0, "federation", "other.test", foreign)
    plane.seal()
    stranger = plane.sign(EntriesRecord(trust_domain=str(TD), endpoint="web-1", generation=2, entries=[], issued=T0))
    monkeypatch.setattr(plane.authority, "record_serial", lambda _: None)
    beside = certs.parse_chain(plane.authority.issue_endpoint(certs.make_csr(key), name, T0))[0]

    held = {"entries": entries, "federation/other.test": foreign}
    heads = Heads(tmp_path)
    for at in (0.0, LAG):
        asked = heads.ask(held, at, {"own": own, "api": wl})
        assert len(asked.leaves) == (4 if at == 0.0 else 0)
        assert texts(heads.take(asked, prove(plane, asked), trust, at))["log.missing"] is None
    for at in (LAG, 2 * LAG):
        asked = heads.ask({**held, "entries": stranger}, at, {"own": beside})
        found = texts(heads.take(asked, prove(plane, asked), trust, at))["log.missing"]
    assert found == "not in the transparency log: certificate own, entries"


def test_an_object_that_never_comes_into_the_log_is_told(plane, trust, tmp_path) -> None:
    """A CA that signs a record beside its log: valid for every signature check."""
    heads = Heads(tmp_path)
    secret = plane.authority.sign_record(
        TreeHead(trust_domain=str(TD), timeline="x", size=0, root="", time=T0)
    )
    shown = {**objects(plane), "placement/shop/api/0": secret, "other/x": "not logged by kind"}
    for at, told in ((0.0, None), (LAG - 1, None), (LAG, "placement/shop/api/0")):
        asked = heads.ask(shown, at)
        found = texts(heads.take(asked, prove(plane, asked), trust, at))["log.missing"]
        assert (found is None) if told is None else (told in found)
    del shown["placement/shop/api/0"]
    asked = heads.ask(shown, LAG + 1)
    assert texts(heads.take(asked, prove(plane, asked), trust, LAG + 1))["log.missing"] is None


def test_another_history_is_a_fork_and_the_head_stays(plane, trust, tmp_path) -> None:
    heads = Heads(tmp_path)
    grow(plane, 2)
    asked = heads.ask(objects(plane), 0.0)
    heads.take(asked, prove(plane, asked), trust, 0.0)
    kept = heads.seen
    lie = plane.authority.sign_record(TreeHead(
        trust_domain=str(TD), timeline=plane.store.timeline, size=kept.size, root="ab" * 32, time=T0,
    ))  # fmt: skip
    longer = plane.authority.sign_record(TreeHead(
        trust_domain=str(TD), timeline=plane.store.timeline, size=kept.size + 1, root="ab" * 32, time=T0,
    ))  # fmt: skip
    for head in (lie, longer):
        asked = heads.ask(objects(plane), 1.0)
        found = texts(heads.take(asked, LogReply(head=head, consistency=[], proofs={}), trust, 1.0))
        assert found["log.fork"]
        assert heads.seen == Heads(tmp_path).seen == kept
    # The alarm stands, also when the true log is shown again.
    asked = heads.ask(objects(plane), 2.0)
    assert "log.fork" not in texts(heads.take(asked, prove(plane, asked), trust, 2.0))


def test_a_shorter_log_is_refused_by_the_honest_ca(plane, trust, tmp_path) -> None:
    heads = Heads(tmp_path)
    asked = heads.ask(objects(plane), 0.0)
    heads.take(asked, prove(plane, asked), trust, 0.0)
    with pytest.raises(BadInput) as e:
        prove(plane, asked.model_copy(update={"timeline": plane.store.timeline, "size": 10_000}))
    assert e.value.code == "log.size"


def test_a_new_timeline_begins_anew_and_is_told(plane, trust, tmp_path) -> None:
    heads = Heads(tmp_path)
    asked = heads.ask(objects(plane), 0.0)
    heads.take(asked, prove(plane, asked), trust, 0.0)
    head = plane.authority.sign_record(
        TreeHead(trust_domain=str(TD), timeline="another", size=1, root="ab" * 32, time=T0)
    )
    asked = heads.ask(objects(plane), 1.0)
    assert texts(heads.take(asked, LogReply(head=head, consistency=[], proofs={}), trust, 1.0))[
        "log.restarted"
    ]
    assert heads.seen.timeline == "another"


def test_proofs_and_heads_of_others_are_refused(plane, trust, tmp_path) -> None:
    heads = Heads(tmp_path)
    grow(plane, 2)
    asked = heads.ask(objects(plane), 0.0)
    good = prove(plane, asked)
    leaf, proof = next(iter(good.proofs.items()))
    for bad in (
        good.model_copy(update={"proofs": {leaf: proof.model_copy(update={"index": proof.index + 1})}}),
        good.model_copy(update={"proofs": {leaf: proof.model_copy(update={"path": proof.path[:-1]})}}),
        good.model_copy(update={"head": good.head[:-4] + "AAAA"}),
        good.model_copy(update={"head": plane.bundle}),
        good.model_copy(update={"head": records.sign(
            TreeHead(trust_domain=str(TD), timeline="x", size=1, root="ab" * 32, time=T0), _stranger()
        )}),
    ):  # fmt: skip
        with pytest.raises(NotVerified):
            heads.take(asked, bad, trust, 0.0)
    assert heads.pending == 1


def _stranger():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def test_a_placement_is_proved_after_the_next_head(plane, trust, tmp_path, monkeypatch) -> None:
    plane.placements.add(WorkloadAdd(name="shop/api"), T0, "test")
    heads = Heads(tmp_path)
    grow(plane)
    shown = {**objects(plane), "policy": plane.policies.show().digest}
    asked = heads.ask(shown, 0.0)
    heads.take(asked, prove(plane, asked), trust, 0.0)
    assert heads.pending == 1  # the digest is no record: it never is in the log


def test_a_damaged_file_is_told(tmp_path) -> None:
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(BadState):
        Heads(tmp_path)


# ---- an answer of a log that is not ours to trust


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_answer_proves_nothing_more(plane, trust, tmp_path_factory, data) -> None:
    """Any step, index, leaf or head exchanged: refused or a finding, never another error, and never a leaf that is not in the tree."""
    heads = Heads(tmp_path_factory.mktemp("heads"))
    asked = heads.ask(objects(plane) | {"placement/none/0": "not.in.thelog"}, 0.0)
    assert len(asked.leaves) == 2
    reply = prove(plane, asked).model_dump()
    hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["head", "consistency", "leaf", "index", "path"])):
            case "head":
                at = data.draw(st.integers(0, len(reply["head"]) - 1))
                reply["head"] = reply["head"][:at] + data.draw(st.sampled_from("Aa0-_.=")) + reply["head"][at + 1 :]
            case "consistency":
                reply["consistency"] = data.draw(st.lists(hashes, max_size=4))
            case "leaf":
                reply["proofs"] |= {leaf: {"index": data.draw(st.integers(-3, 3)), "path": data.draw(st.lists(hashes, max_size=4))} for leaf in asked.leaves}
            case "index":
                for proof in reply["proofs"].values():
                    proof["index"] = data.draw(st.integers(-(2**70), 2**70))
            case "path":
                for proof in reply["proofs"].values():
                    proof["path"] = data.draw(st.lists(hashes, max_size=130))
    try:
        heads.take(asked, parse(LogReply, json.dumps(reply)), trust, 0.0)
    except (BadInput, NotVerified):
        pass
    assert heads.pending >= 1, "what is not in the tree is not proved"
