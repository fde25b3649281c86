"""A CA with a policy authority: it signs what the operators signed, keeps every signature, and its history proves the past."""

from __future__ import annotations

import json

import pytest

from ca import history
from ca.policies import newest
from ca.policy_plan import make_plan
from ca.rollouts import Who
from identity.errors import BadInput, BadPolicy, NotFound, NotVerified, Refused
from identity.records_policy import PolicySigner, ScopeSigners
from identity.wire.admin import WorkloadAdd
from policy.bundle import sign_bundle
from policy.history import read_history
from policy.questions import who_can_reach
from tests.unit.policy.operators import Operators

TD = "reg.test"
HEAD = "meshpolicy: 1\nlabels: {keys: [role]}\n"
OPEN = HEAD + "segments:\n  - name: s\n    allow:\n      - {id: a, from: {role: web}, to: {role: db}, on: tcp/5432}\n"
SHUT = HEAD


@pytest.fixture(scope="module")
def ops() -> Operators:
    return Operators(TD)


@pytest.fixture
def shop(plane, enrol):
    for host in ("a", "b"):
        enrol(plane, host)
    for name, role, host in (("shop/web", "web", "a"), ("shop/db", "db", "b")):
        plane.placements.add(WorkloadAdd(name=name, host=host, labels={"role": role}), plane.now, "test")
    return plane


def files(text: str) -> dict[str, str]:
    return {"p.yaml": text}


def found(plane) -> list[str]:
    head = history.head(plane)
    out, done = [head.first], 0
    while done < head.size:
        page = history.lines(plane, done, 3, head.size)
        out += page
        done += len(page)
    return out


def past(plane, lines=None, noted=None):
    return read_history("h", iter(lines or found(plane)), plane.authority.root_fingerprint, noted)


def test_the_road_with_signatures(shop, ops, clock) -> None:
    alone = shop.policies.apply([("p.yaml", SHUT)], "me", shop.now, "test")
    authority = ops.authority(scopes=[ScopeSigners(scope="", signers=["alice", "bob"], threshold=1)])
    # the policy in force is not signed: the document comes with a bundle, or not at all
    with pytest.raises(NotVerified) as e:
        shop.policies.set_authority(authority.texts(), shop.now, "test")
    assert e.value.code == "authority.orphans"
    assert shop.policies.authority_chain() == []
    first = ops.bundle(authority, files(SHUT), "alice")
    shop.policies.set_authority(authority.texts(), shop.now, "test", (first.files, first.texts()))
    with shop.store.read() as tx:
        row = newest(tx)
    assert (row.revision, row.digest, row.kind) == (2, alone.digest, "authority")
    assert row.said(TD).authority == authority.texts()

    for call, code in (
        (lambda: shop.policies.apply([("p.yaml", OPEN)], "me", shop.now, "t"), "policy.unsigned"),
        (lambda: shop.policies.rollback(1, "me", shop.now, "t"), "policy.rollback_unsigned"),
        (lambda: shop.policies.apply(first.files, "me", shop.now, "t", parts=ops.bundle(authority, files(OPEN), "alice").texts()), "policy.content"),
        (lambda: shop.rollouts.start([("p.yaml", OPEN)], Who({"role": "web"}), "me", shop.now, "t"), "policy.unsigned"),
        (lambda: shop.policies.set_authority(ops.authority(threshold=1).texts(), shop.now, "t"), "authority.fork"),
    ):
        with pytest.raises((NotVerified, Refused, BadPolicy)) as e:
            call()
        assert e.value.code == code

    plan = make_plan(shop, [("p.yaml", OPEN)], [], 0, shop.now)
    assert (plan.good, "not signed" in plan.signed, len(plan.gained)) == (True, True, 1)
    second = ops.bundle(authority, files(OPEN), "bob", base=first)
    clock.now += 10
    done = shop.policies.apply(second.files, "me", shop.now, "t", parts=second.texts())
    assert done.revision == 3
    # the same bundle again is nothing new; with one signature more it is
    assert shop.policies.apply(second.files, "me", shop.now, "t", parts=second.texts()).revision == 3
    more, _ = sign_bundle(second, authority, ops.keys["alice"])
    assert shop.policies.apply(more.files, "me", shop.now, "t", parts=more.texts()).revision == 4
    with pytest.raises(NotVerified) as e:
        shop.policies.apply(first.files, "me", shop.now, "t", parts=first.texts())
    assert e.value.code == "policy.replay"
    # back, signed anew
    third = ops.bundle(authority, files(SHUT), "alice", base=more)
    clock.now += 10
    back = shop.policies.rollback(1, "me", shop.now, "t", third.texts())
    assert (back.digest, back.kind) == (alone.digest, "rollback 1")
    with pytest.raises(NotVerified):
        shop.policies.rollback(3, "me", shop.now, "t", third.texts())
    assert [h.kind for h in shop.policies.history()] == ["rollback 1", "apply", "apply", "authority", "apply"]
    compared = shop.policies.compare(2, 3, shop.now)
    assert (len(compared.gained), compared.lost) == (1, [])
    with pytest.raises(NotFound):
        shop.policies.compare(2, 99, shop.now)


def test_a_signer_leaves_while_a_policy_is_on_trial(shop, ops) -> None:
    authority = ops.authority(scopes=[ScopeSigners(scope="", signers=["alice", "bob"], threshold=1)])
    shop.policies.set_authority(authority.texts(), shop.now, "test")
    first = ops.bundle(authority, files(SHUT), "alice")
    shop.policies.apply(first.files, "me", shop.now, "t", parts=first.texts())
    second = ops.bundle(authority, files(OPEN), "bob", base=first)
    one = shop.rollouts.start(second.files, Who({"role": "web"}), "me", shop.now, "t", parts=second.texts())
    gone: dict[str, PolicySigner] = {n: s for n, s in ops.document().signers.items() if n != "bob"}
    scopes = [ScopeSigners(scope="", signers=["alice"], threshold=1)]
    root = {"root": ["alice"], "threshold": 1}
    nxt = ops.next(authority, "alice", "bob", signers=gone, scopes=scopes, **root)
    shop.policies.set_authority(nxt.texts(), shop.now, "test")
    rollout, _ = shop.rollouts.status(shop.now)
    assert (rollout.id, rollout.running) == (one.id, False)
    with shop.store.read() as tx:
        row = newest(tx)
    assert (row.trial, row.said(TD).authority) == (None, nxt.texts())
    with pytest.raises(NotVerified) as e:
        shop.policies.apply(second.files, "me", shop.now, "t", parts=second.texts())
    assert e.value.code == "policy.signer_revoked"


def test_approvals_need_an_authority(shop) -> None:
    with pytest.raises(BadPolicy) as e:
        shop.policies.apply([("p.yaml", HEAD + "review: {approvals: 2}\n")], "me", shop.now, "t")
    assert (e.value.code, e.value.line) == ("policy.review", 3)
    with pytest.raises(NotVerified) as other:
        shop.policies.apply([("p.yaml", HEAD)], "me", shop.now, "t", parts=["{}"])
    assert other.value.code == "authority.missing"


# ---- the past


def test_who_could_talk_on_a_date(shop, ops, clock) -> None:
    clock.now += 100
    authority = ops.authority(scopes=[ScopeSigners(scope="", signers=["alice", "bob"], threshold=2)])
    shop.policies.set_authority(authority.texts(), shop.now, "test")
    first = ops.bundle(authority, files(OPEN), "alice", "bob")
    shop.policies.apply(first.files, "me", shop.now, "t", parts=first.texts())
    opened = shop.now
    clock.now += 100
    second = ops.bundle(authority, files(SHUT), "alice", "bob", base=first)
    shop.policies.apply(second.files, "me", shop.now, "t", parts=second.texts())
    shop.placements.revoke("shop/db", 0, shop.now, "t")
    clock.now += 100
    lines = found(shop)
    one = past(shop, lines)
    then = one.at(opened + 50)
    db = next(s for s in then.subjects if s.name == "shop/db")
    assert [(r.src, str(r.ports)) for r in who_can_reach(then.program, then.subjects, db)] == [("shop/web", "tcp/5432")]
    assert then.signed
    assert then.places == {"shop/db": ["b"], "shop/web": ["a"]}
    later = one.at(opened + 150)
    assert [s.name for s in later.subjects] == ["shop/web"]
    with pytest.raises(NotFound):
        one.at(opened - 50)
    with pytest.raises(BadInput):
        one.at(opened + 10_000)


HURT = {
    "a line is left out": (lambda rows: rows[:3] + rows[4:], "history.gap"),
    "the end is cut off": (lambda rows: rows[:-1], "history.head"),
    "two lines are swapped": (lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]], "history.gap"),
    "a hash is another": (lambda rows: [*rows[:-1], json.dumps({"leaf": json.loads(rows[-1])["leaf"], "hash": "0" * 64})], "history.head"),
    "a record is another": (lambda rows: [_worse(r) for r in rows], "history.leaf"),
    "a record of no kind": (lambda rows: [r.replace('"kind": "placement"', '"kind": "certificate"') for r in rows], "history.kind"),
    "no bundle": (lambda rows: [json.dumps({k: v for k, v in json.loads(r).items() if k in ("leaf", "hash")}) if '"kind": "bundle"' in r else r for r in rows], "history.bundle"),
    "not a history": (lambda rows: rows[1:], "history.form"),
    "not JSON": (lambda rows: [rows[0], "{"], "history.form"),
    "not a line": (lambda rows: [rows[0], "[]"], "history.form"),
    "not a leaf": (lambda rows: [rows[0], '{"leaf": "x", "hash": 1}'], "history.form"),
}  # fmt: skip


def _worse(row: str) -> str:
    top = json.loads(row)
    if top.get("kind") == "policy":
        top["record"] = top["record"][:-4] + "AAAA"
    return json.dumps(top)


@pytest.mark.parametrize("name", HURT)
def test_a_history_that_was_touched_does_not_verify(shop, name) -> None:
    shop.policies.apply([("p.yaml", OPEN)], "me", shop.now, "t")
    rows = found(shop)
    past(shop, rows)
    change, code = HURT[name]
    with pytest.raises((NotVerified, BadInput)) as e:
        past(shop, change(rows))
    assert e.value.code == code, e.value


def test_a_history_is_held_to_a_root_and_to_a_noted_head(shop) -> None:
    shop.policies.apply([("p.yaml", OPEN)], "me", shop.now, "t")
    rows = found(shop)
    whole = past(shop, rows)
    assert past(shop, rows, (whole.size, whole.root)).root == whole.root
    shop.policies.apply([("p.yaml", SHUT)], "me", shop.now, "t")
    assert past(shop, None, (whole.size, whole.root)).size > whole.size
    for noted, code in (((whole.size, "0" * 64), "history.head"), ((whole.size + 50, whole.root), "history.cut")):
        with pytest.raises(NotVerified) as e:
            past(shop, None, noted)
        assert e.value.code == code
    with pytest.raises(NotVerified) as e:
        read_history("h", iter(rows), "0" * 64)
    assert e.value.code == "bundle.root"
