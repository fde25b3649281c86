"""Somebody can write to the database and cannot sign: whatever he changes, the CA signs nothing from it."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from ca import audit, resign
from identity import records
from identity.errors import BadState, NotVerified, RetinueError
from identity.names import TrustDomain
from identity.records import EndpointRecord, PlacementRecord, unverified

# What is asked here does not depend on the engine.
pytestmark = pytest.mark.parametrize("bench", ["sqlite"], indirect=True)

STRANGER = "c3RyYW5nZXJzLXR1bm5lbC1rZXktMDAwMDAwMDAwMDA"
TD = TrustDomain("reg.test")


@pytest.fixture
def shop(bench):
    for host in ("a", "b"):
        bench.enrol(host)
    bench.add("shop/api", "a", labels={"role": "api"})
    bench.add("shop/db", "b", labels={"role": "db"})
    return bench


def published(shop) -> list[str]:
    """Every envelope that was ever published."""
    with shop.store.read() as tx:
        return list(
            tx.execute(text("select detail from ledger where kind in ('placement', 'endpoint')")).scalars()
        )


def write(shop, statement: str) -> None:
    with shop.store.write() as tx:
        tx.execute(text(statement))


ACTS = {
    "move": lambda s: s.placements.prepare("shop/api", 0, "b", s.now, "test"),
    "enrol anew": lambda s: s.enrol("a", replace=True),
    "renew": lambda s: s.registry.renew("a", s.now + 9, ["192.0.2.9:1"], ["chacha20poly1305"], s.now),
    "underlay": lambda s: s.registry.set_underlay("a", ["192.0.2.7:1"], s.now),
    "place there": lambda s: s.placements.prepare("shop/db", 0, "a", s.now, "test"),
}
INSTANCE = "update instances set {} where name = 'shop/api'"
ENDPOINT = "update endpoints set {} where name = 'a'"


@pytest.mark.parametrize("act", ["move", "enrol anew"])
@pytest.mark.parametrize("change", [
    "labels = '{\"role\": \"db\"}'", "fence = 'strict'", "spiffe_id = 'spiffe://reg.test/wl/shop/db'", "overlay = 77",
    "epoch = 0", "endpoint = 'b'", "state = 'unplaced', endpoint = null", "ends_at = 99", "epoch_top = 0",
    "placement = (select p.placement from instances p where p.name = 'shop/db')",
    "placement = replace(placement, '.', '.A')", "placement = null",
])  # fmt: skip
def test_a_changed_instance_is_not_signed(shop, act: str, change: str) -> None:
    before = published(shop)
    write(shop, INSTANCE.format(change))
    outcome = ""
    try:
        ACTS[act](shop)
    except RetinueError as e:
        outcome = e.code
    for envelope in published(shop)[len(before) :]:
        try:
            said = unverified(PlacementRecord, envelope, trust_domain=str(TD))
        except RetinueError:
            continue
        if said.name == "shop/api":
            pytest.fail(f"signed from a changed row: {said}")
    # Enrolling anew signs nothing for an instance that is not there any more.
    assert outcome in ({"store.contradiction", "move.same"} if act == "move" else {"store.contradiction", ""})


@pytest.mark.parametrize("act", ["move", "renew", "underlay", "place there"])
@pytest.mark.parametrize(
    "change", [f"tunnel_key = '{STRANGER}'", "kind = 'sidecar', workload = 'shop/db'", "generation = 0"]
)
def test_a_changed_endpoint_is_not_signed(shop, act: str, change: str) -> None:
    before = published(shop)
    write(shop, ENDPOINT.format(change))
    if act == "move":  # away from there: the new placement is of the other host
        shop.placements.prepare("shop/api", 0, "b", shop.now, "test")
    else:
        with pytest.raises(BadState) as e:
            ACTS[act](shop)
        assert e.value.code == "store.contradiction"
        assert e.value.hint
    assert not any(STRANGER in _text(envelope) for envelope in published(shop)[len(before) :])


def test_revoking_works_whatever_became_of_the_row_and_says_what_was_signed(shop) -> None:
    write(shop, INSTANCE.format("labels = '{\"role\": \"db\"}', fence = 'strict'"))
    row = shop.placements.revoke("shop/api", 0, shop.now, "test")
    said = shop.placement(row.placement)
    assert (said.state, said.labels, said.fence) == ("revoked", {"role": "api"}, "available")
    write(shop, f"update endpoints set tunnel_key = '{STRANGER}' where name = 'b'")
    shop.registry.revoke("b", shop.now, "test")
    gone = shop.placement(shop.placements.get("shop/db", 0).placement)
    assert (gone.state, gone.tunnel_key) != ("revoked", STRANGER)
    assert gone.state == "revoked"


def test_an_honest_row_is_signed_again(shop) -> None:
    shop.enrol("a", replace=True)
    shop.registry.renew("a", shop.now + 9, ["192.0.2.9:1"], ["chacha20poly1305"], shop.now)
    prepared = shop.placements.prepare("shop/api", 0, "b", shop.now, "test")
    shop.placements.commit(prepared, shop.now, "test")
    assert shop.placement(shop.placements.get("shop/api", 0).placement).endpoint == "b"
    assert unverified(EndpointRecord, shop.registry.get("a").record, trust_domain=str(TD)).endpoint == "a"


def test_a_spoilt_row_keeps_no_key_in_use(shop) -> None:
    """Records are signed anew when their key changes: all that hold, and the rest is told."""
    write(shop, "update instances set placement = replace(placement, '.', '.A') where name = 'shop/db'")
    kept = shop.placements.get("shop/db", 0).placement

    def sign(payload) -> str:
        return records.sign(payload, again)

    again = Ed25519PrivateKey.generate()
    with shop.store.write() as tx:
        done = resign.all_records(tx, shop.open, sign, shop.now, "test")
    assert done == 3
    assert shop.placements.get("shop/db", 0).placement == kept
    fresh = shop.placements.get("shop/api", 0).placement
    assert records.verify(PlacementRecord, fresh, [again.public_key()], trust_domain=str(TD)).endpoint == "a"
    with shop.store.read() as tx:
        told = [e.outcome for e in audit.entries(tx) if e.action == "authority.resign"]
    assert told == ["store.contradiction", "ok"]
    write(shop, "update endpoints set record = 'x'")
    write(shop, "update instances set placement = 'x'")
    with pytest.raises(NotVerified) as e, shop.store.write() as tx:
        resign.all_records(tx, shop.open, sign, shop.now, "test")
    assert e.value.code == "authority.resign"


def _text(envelope: str) -> str:
    from identity.keys import unb64

    return unb64(envelope.split(".")[1]).decode()
