"""What the plane gives for an identity: certificates that never outlive it, tokens, and entries to the hosts they are for."""

from __future__ import annotations

import json

import pytest

from ca import audit, transparency
from ca.plane import Plane
from ca.watch import Monitor, about, concerns, told
from identity import certs, jwt
from identity.entries import EntriesRecord
from identity.errors import BadInput, NotVerified, Refused, Unreachable
from identity.merkle import verify_inclusion
from identity.transparency import jwt_leaf
from identity.wire.admin import WorkloadAdd, WorkloadLife
from identity.wire.enroll import SvidRequest
from identity.wire.entries import EntryCreate
from identity.wire.jwt import JwtRequest

API = ["uid:33", "unit:api.service"]


@pytest.fixture
def web(plane, enrol):
    """`web`, placed on a; (the endpoint a, the endpoint b)."""
    a, b = enrol(plane, "a"), enrol(plane, "b")
    plane.placements.add(WorkloadAdd(name="web", host="a"), plane.now, "t")
    return plane.caller(a.der)[0], plane.caller(b.der)[0]


def life(plane, caller, csr) -> int:
    chain = plane.svid(caller, SvidRequest(workload="web", instance=0, csr=csr())).chain
    leaf = certs.parse_chain(chain)[0]
    return certs.not_after(leaf) - plane.now


def test_a_certificate_never_outlives_its_identity_or_its_entry(plane, web, csr):
    a, _ = web
    assert life(plane, a, csr) == certs.WORKLOAD_LIFETIME
    plane.create_entry(EntryCreate(name="web", parent="a", selectors=API, ttl=600), "t")
    plane.create_entry(EntryCreate(name="web", parent="b", selectors=API, ttl=60), "t")
    assert life(plane, a, csr) == 600
    plane.placements.set_life(WorkloadLife(name="web", ends_in=90), plane.now, "t")
    assert life(plane, a, csr) == 90
    with plane.store.read() as tx:
        assert plane.entries.ttl(tx, "web", "b") == 60


def test_a_token_is_for_the_holder_and_within_its_end(plane, web):
    a, b = web
    request = JwtRequest(workload="web", instance=0, audience=["db"])
    reply = plane.jwt_svid(a, request)
    keys = {"reg.test": plane.trust.jwt_authorities}
    assert jwt.verify(reply.token, "db", keys, plane.now, own="reg.test").spiffe_id.name == "web"
    assert reply.expires == plane.now + 300
    with pytest.raises(Refused) as caught:
        plane.jwt_svid(b, request)
    assert caught.value.code == "svid.not_here"
    with pytest.raises(BadInput):
        plane.jwt_svid(a, JwtRequest(workload="web", instance=0, audience=[""]))
    move = plane.placements.prepare("web", 0, "b", plane.now, "t")
    with pytest.raises(Refused):
        plane.jwt_svid(b, request)  # it is not there yet
    plane.placements.abort(move, plane.now, "t", "test")
    plane.placements.set_life(WorkloadLife(name="web", ends_in=20), plane.now, "t")
    assert plane.jwt_svid(a, request).expires == plane.now + 20


def tokens(plane) -> list[transparency.Entry]:
    with plane.store.read() as tx:
        return transparency.entries(tx, kinds=[transparency.JWT])


def test_every_token_is_in_the_log_without_what_makes_it_a_secret(plane, web):
    a, b = web
    given = [plane.jwt_svid(a, JwtRequest(workload="web", instance=0, audience=aud)).token for aud in (["db"], ["db"], ["q", "db"])]
    for refused in (b, a):
        with pytest.raises((Refused, BadInput)):
            plane.jwt_svid(refused, JwtRequest(workload="web", instance=0, audience=[""]))
    found = tokens(plane)
    assert [e.detail for e in found] == [jwt.about(token) for token in given]
    assert [(e.actor, e.action, e.outcome, e.at) for e in found] == [("a", "issue", "ok", plane.now)] * 3
    assert found[2].detail["audience"] == ["q", "db"]
    assert found[0].detail["kid"] == plane.trust.jwt_authorities[0].kid
    with plane.store.read() as tx:
        rows = str(tx.exec_driver_sql("select * from ledger").all())
        listed = [e.seq for e in audit.entries(tx, subject="spiffe://reg.test/wl/web")]
    assert not any(token in rows or token.split(".")[2] in rows for token in given)
    assert [e.seq for e in found] == listed

    plane.seal()
    again = Plane.open(plane.directory, plane.clock)  # as after a restart
    try:
        with again.store.read() as tx:
            head = again.log.verify(tx)
            for token in given:  # whoever has one can ask for its proof
                leaf = jwt_leaf(jwt.about(token))
                index, path = again.log.inclusion(tx, leaf.hex(), head.size)
                verify_inclusion(leaf, index, head.size, path, bytes.fromhex(head.root))
            monitor = Monitor()
            taken = monitor.take(transparency.placed(tx, 0, 1000))
        monitor.check(head.size, head.root)
    finally:
        again.close()
    seen = [told(e) for e in taken if e.kind == "jwt"]
    assert [one["detail"]["audience"] for one in seen] == [["db"], ["db"], ["q", "db"]]
    assert all(concerns(e, name) for e in taken if e.kind == "jwt" for name in ("web", "wl/web", "spiffe://reg.test/wl/web"))
    assert "db" not in about(next(e for e in taken if e.kind == "jwt"))


def test_what_cannot_be_logged_is_not_issued(plane, web, monkeypatch):
    a, _ = web

    def full(*_):
        raise Unreachable("store.full", "the disk of the database is full: nothing was changed")

    monkeypatch.setattr(plane.store, "record", full)
    with pytest.raises(Unreachable):
        plane.jwt_svid(a, JwtRequest(workload="web", instance=0, audience=["db"]))
    monkeypatch.undo()
    assert tokens(plane) == []


def test_what_is_over_gets_nothing_even_before_it_was_noticed(plane, web, clock, csr):
    a, _ = web
    plane.placements.set_life(WorkloadLife(name="web", ends_in=20), plane.now, "t")
    clock.now += 20
    for ask in (lambda: life(plane, a, csr), lambda: plane.jwt_svid(a, JwtRequest(workload="web", instance=0, audience=["db"]))):
        with pytest.raises(Refused) as caught:
            ask()
        assert caught.value.code == "svid.ended"
    assert plane.expire() == ["web/0"]
    assert plane.expire() == []


def test_entries_go_to_the_hosts_they_are_for(plane, web):
    plane.publish()
    made = plane.create_entry(EntryCreate(name="web", parent="a", selectors=API), "t")
    assert made.hosts == ["a"]
    published = plane.publish()
    views = {name: plane.mirror.world.view(name).objects for name in ("a", "b")}
    record = plane.trust.verify(EntriesRecord, views["a"]["entries"])
    assert [e.id for e in record.entries] == [made.id]
    assert "entries" not in views["b"]
    assert published.failed is None
    plane.delete_entry(made.id, "t")
    plane.publish()
    record = plane.trust.verify(EntriesRecord, plane.mirror.world.view("a").objects["entries"])
    assert (record.generation, record.entries) == (2, [])


def test_keys_of_tokens_are_in_the_bundle_and_follow(plane, clock):
    first = plane.trust.jwt_authorities
    assert len(first) == 1
    clock.now += 25 * 86400
    plane.maintain()
    assert plane.trust.jwt_authorities[:1] == first
    assert len(plane.trust.jwt_authorities) == 2
    said = json.loads(jwt.jwks(plane.trust.jwt_authorities))
    assert {k["use"] for k in said["keys"]} == {"jwt-svid"}


def test_an_end_is_not_in_a_certificate_of_another(plane, web, csr):
    """The plane refuses a name that is not placed on the caller, whatever its entries say."""
    _, b = web
    plane.create_entry(EntryCreate(name="web", parent="*", selectors=API), "t")
    with pytest.raises(Refused) as caught:
        life(plane, b, csr)
    assert caught.value.code == "svid.not_here"
    assert not isinstance(caught.value, NotVerified)
