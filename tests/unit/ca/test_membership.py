"""How long what is powered down stays a member."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from ca import audit, membership, rows, schema
from ca.plane import Plane
from identity.wire.admin import WorkloadAdd

DAY = 86_400
TEXT = "meshpolicy: 1\nlabels: {{keys: [role]}}\nidle: {{keep_membership: {keep}}}\n"
INNER = "meshpolicy: 1\nscope: shop\nidle: {{keep_membership: {keep}}}\n"


@pytest.fixture
def shop(plane: Plane, enrol: Any) -> Plane:
    for host in ("a", "b"):
        enrol(plane, host)
    for name, host in (("shop/web", "a"), ("mail/smtp", "a"), ("shop/api", "b")):
        plane.placements.add(WorkloadAdd(name=name, host=host), plane.now, "t")
    return plane


def apply(plane: Plane, *texts: str) -> None:
    plane.policies.apply([(f"{n}.yaml", text) for n, text in enumerate(texts)], "", plane.now, "t")
    plane.publish()


def held(plane: Plane) -> set[str]:
    with plane.store.read() as tx:
        return {row.name for row in tx.execute(select(schema.instances).where(schema.instances.c.state == "active"))}


def off_for(plane: Plane, clock: Any, host: str, seconds: int) -> None:
    """The host was last renewed so long before now that its certificate ended `seconds` ago; the others are alive."""
    clock.now += 2 * membership.GRACE
    with plane.store.write() as tx:
        tx.execute(schema.endpoints.update().values(svid_expires=plane.now + DAY))
        tx.execute(schema.endpoints.update().where(schema.endpoints.c.name == host).values(svid_expires=plane.now - seconds))


def test_a_host_that_is_off_for_longer_holds_nothing_any_more(shop: Plane, clock: Any) -> None:
    apply(shop, TEXT.format(keep="2d"))
    off_for(shop, clock, "a", 2 * DAY)
    shop.tick()
    assert held(shop) == {"shop/web", "mail/smtp", "shop/api"}  # not longer than that
    clock.now += 61
    shop.tick()
    assert held(shop) == {"shop/api"}
    shop.seal()
    with shop.store.read() as tx:
        told = [e for e in audit.entries(tx) if e.action == "workload.lapse"]
    assert {e.subject for e in told} == {"shop/web/0", "mail/smtp/0"}
    with shop.store.write() as tx:  # it is not revoked: it may be placed again
        shop.placements.place(tx, rows.instance(tx, "shop/web", 0), rows.endpoint(tx, "b"), shop.now)
    assert "shop/web" in held(shop)


def test_the_innermost_scope_holds_and_without_one_nothing_ends(shop: Plane, clock: Any) -> None:
    apply(shop, "meshpolicy: 1\n")
    off_for(shop, clock, "a", 400 * DAY)
    shop.tick()
    assert len(held(shop)) == 3
    apply(shop, TEXT.format(keep="2d"), INNER.format(keep="500d"))
    clock.now += 61
    shop.tick()
    assert held(shop) == {"shop/web", "shop/api"}


def test_a_ca_that_was_away_itself_gives_everybody_time_to_renew(shop: Plane, clock: Any) -> None:
    apply(shop, TEXT.format(keep="1d"))
    shop.close()
    clock.now += 30 * DAY
    again = Plane.open(shop.directory, clock)
    try:
        again.publish()
        again.tick()
        assert len(held(again)) == 3
        clock.now += membership.GRACE
        again.tick()
        assert held(again) == set()
    finally:
        again.store.close()
