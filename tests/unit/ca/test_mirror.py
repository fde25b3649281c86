from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import text

from ca.mirror import Mirror
from ca.policies import Policies
from ca.scope import Touched, World
from identity.errors import BadState, Unreachable
from policy import language

HEAD = "meshpolicy: 1\nlabels: {keys: [role]}\n"
GRANT = (
    HEAD
    + """grants:
  - {id: job, from: {role: web}, to: {role: api}, on: tcp/22, not_after: 2031-02-11T18:00Z}
"""
)


RULE = HEAD + "segments:\n  - {name: s, allow: [{id: r, from: {role: web}, to: {role: api}, on: tcp/80}]}\n"


@pytest.fixture
def shop(bench):
    bench.enrol("a")
    bench.enrol("b")
    bench.add("web", "a", labels={"role": "web"})
    bench.add("api", "b", labels={"role": "api"})
    with bench.store.write() as tx:
        bench.store.put(tx, "bundle", "the bundle")
        bench.store.log(tx, bench.now, "bundle", "bundle")
    bench.policies = Policies(bench.desk)
    bench.mirror = Mirror(bench.store)
    bench.mirror.load(bench.now)
    return bench


def same_as_fresh(bench) -> None:
    """What came by changes equals what a new process reads."""
    fresh = Mirror(bench.store)
    fresh.load(bench.now)
    one, other = bench.mirror.world, fresh.world
    assert (one.endpoints, one.instances, one.policy, one.program, one.bundle) == (
        other.endpoints, other.instances, other.policy, other.program, other.bundle,
    )  # fmt: skip
    for name in one.endpoints:
        assert one.view(name).objects == other.view(name).objects
    assert bench.mirror.revision == fresh.revision


def policy(bench, body: str) -> None:
    bench.policies.apply([("p.yaml", body)], "", bench.now, "test")


def test_it_follows_every_kind_of_change(shop) -> None:
    policy(
        shop,
        HEAD + "segments:\n  - {name: s, allow: [{id: r, from: {role: web}, to: {role: api}, on: tcp/1}]}\n",
    )
    prepared = shop.placements.prepare("web", 0, "b", shop.now, "t")
    for step in (
        lambda: shop.add("db", "a"),
        lambda: shop.placements.commit(prepared, shop.now, "t"),
        lambda: shop.registry.set_underlay("a", ["192.0.2.77:1"], shop.now),
        lambda: shop.placements.revoke("api", 0, shop.now, "t"),
        lambda: shop.registry.revoke("b", shop.now, "t"),
        lambda: shop.enrol("c"),
    ):
        step()
        shop.mirror.catch_up(shop.now)
        same_as_fresh(shop)
    assert shop.mirror.world.endpoints["b"].record is None
    assert shop.mirror.world.instances["web/0"].former == {"a", "b"}


def test_nothing_new_touches_nothing(shop) -> None:
    touched = shop.mirror.catch_up(shop.now)
    assert touched == Touched()


def test_a_bad_row_is_reported_and_stops_nobody(shop) -> None:
    with shop.store.write() as tx:
        tx.execute(text("update instances set labels = '{' where name = 'web'"))
        shop.store.log(tx, shop.now, "instance", "web/0")
    shop.add("db", "b")
    before = shop.mirror.world.instances["web/0"]
    shop.mirror.catch_up(shop.now)
    assert set(shop.mirror.broken) == {("instance", "web/0")}
    assert shop.mirror.world.instances["web/0"] == before
    assert "db/0" in shop.mirror.world.instances
    shop.mirror.catch_up(shop.now)
    with shop.store.write() as tx:
        tx.execute(text("""update instances set labels = '{"role": "web"}' where name = 'web'"""))
    shop.mirror.catch_up(shop.now)
    assert shop.mirror.broken == {}
    same_as_fresh(shop)


def test_a_policy_that_cannot_be_compiled_leaves_the_one_before(shop) -> None:
    policy(shop, HEAD)
    shop.mirror.catch_up(shop.now)
    good = shop.mirror.world.policy
    with shop.store.write() as tx:
        tx.execute(
            text(
                """insert into policies (revision, digest, files, author, issued, record) select revision + 1, 'x', '[{"name": "p", "text": "{"}]', author, issued, 'bad' from policies"""
            )
        )
        shop.store.log(tx, shop.now, "policy", "policy")
    shop.mirror.catch_up(shop.now)
    assert shop.mirror.world.policy == good
    assert set(shop.mirror.broken) == {("policy", "policy")}


def test_a_store_that_cannot_be_read_changes_nothing(shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.add("db", "b")
    revision, instances = shop.mirror.revision, dict(shop.mirror.world.instances)

    def fail(*_: object) -> None:
        raise Unreachable("store.busy", "busy")

    for broken in ("changes_after", "revision"):
        with monkeypatch.context() as patch:
            patch.setattr(shop.store, broken, fail)
            with pytest.raises(Unreachable):
                shop.mirror.catch_up(shop.now)
    assert (shop.mirror.revision, shop.mirror.world.instances) == (revision, instances)
    shop.mirror.catch_up(shop.now)
    same_as_fresh(shop)


def test_a_read_that_fails_in_the_middle_is_made_up_for(shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every single read of a batch fails once; afterwards nothing is missing."""
    for n in range(3):
        shop.add(f"w{n}", "a")
    real, calls = Mirror._read, [0]

    def sometimes(self, tx, thing, now):
        calls[0] += 1
        if calls[0] % 2:
            raise BadState("store.damaged", "injected")
        return real(self, tx, thing, now)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_read", sometimes)
        for _ in range(3):
            with pytest.raises(BadState):
                shop.mirror.catch_up(shop.now)
    shop.mirror.catch_up(shop.now)
    same_as_fresh(shop)


def test_a_grant_ends_in_time(shop) -> None:
    policy(shop, GRANT)
    shop.mirror.catch_up(shop.now)
    assert "placement/api/0" in shop.mirror.world.view("a").objects
    shop.now = shop.mirror.in_force.until
    shop.policies.time_passed(shop.now)
    shop.mirror.catch_up(shop.now)
    assert "placement/api/0" not in shop.mirror.world.view("a").objects
    assert shop.mirror.in_force.until is None
    same_as_fresh(shop)


def test_a_grant_ends_with_its_workload(shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The language does not take this end condition yet; the program form has it."""
    real = language.load

    def load(files):
        found = real(files)
        return replace(found, grants=tuple(replace(g, ends_with="migrate") for g in found.grants))

    monkeypatch.setattr(language, "load", load)
    shop.add("migrate", "a")
    policy(shop, GRANT)
    shop.mirror.catch_up(shop.now)
    assert "placement/api/0" in shop.mirror.world.view("a").objects
    assert shop.mirror.in_force.until is not None
    shop.placements.revoke("migrate", 0, shop.now, "t")
    shop.mirror.catch_up(shop.now)
    assert "placement/api/0" not in shop.mirror.world.view("a").objects
    same_as_fresh(shop)


def test_a_view_is_not_made_anew_for_the_same_program(shop, monkeypatch: pytest.MonkeyPatch) -> None:
    policy(shop, HEAD)
    shop.mirror.catch_up(shop.now)
    calls: list[str] = []
    monkeypatch.setattr(World, "set_policy", lambda self, *a: calls.append("set"))
    shop.policies.time_passed(shop.now)
    shop.mirror.catch_up(shop.now)
    assert calls == []


@pytest.mark.parametrize("garbage", ["{", "[]", "7", ""])
def test_labels_that_cannot_be_read_are_those_of_the_record(shop, garbage: str) -> None:
    """A control plane that starts on a damaged row leaves nobody out of anybody's map."""
    policy(shop, RULE)
    believing = Mirror(shop.store, shop.open)
    believing.load(shop.now)
    before = dict(believing.world.instances)
    with shop.store.write() as tx:
        tx.execute(text("update instances set labels = :garbage where name = 'web'"), {"garbage": garbage})
    fresh = Mirror(shop.store, shop.open)
    fresh.load(shop.now)
    assert (fresh.world.instances, fresh.broken) == (before, {})
    assert ("instance", "web/0") in fresh.contradicted
    with shop.store.write() as tx:  # and where the record is damaged, too, the row is
        tx.execute(text("update instances set placement = 'x' where name = 'web'"))
    lost = Mirror(shop.store, shop.open)
    lost.load(shop.now)
    assert set(lost.broken) == {("instance", "web/0")}


@pytest.mark.parametrize("when", ["at a change", "at a start"])
def test_where_a_row_differs_from_its_record_the_record_counts(shop, when: str) -> None:
    """Labels, holder and policy decide who is told of whom: a writer in the database does not."""
    shop.add("db", "b", labels={"role": "db"})
    policy(shop, RULE)
    believing = Mirror(shop.store, shop.open)
    believing.load(shop.now)
    before, objects = dict(believing.world.instances), believing.world.view("a").objects
    assert ("placement/api/0" in objects, "placement/db/0" in objects) == (True, False)
    with shop.store.write() as tx:
        for statement in (
            """update instances set labels = '{"role": "api"}', spiffe_id = 'spiffe://reg.test/wl/api' where name = 'db'""",
            "update instances set state = 'revoked', endpoint = null where name = 'web'",
            "update instances set endpoint = 'a' where name = 'api'",
            "update policies set files = replace(files, 'role: api', 'role: db')",
        ):
            assert tx.execute(text(statement)).rowcount == 1
        for name in ("db", "web", "api"):
            shop.store.log(tx, shop.now, "instance", f"{name}/0")
        shop.store.log(tx, shop.now, "policy", "policy")
    if when == "at a start":
        believing = Mirror(shop.store, shop.open)
        believing.load(shop.now)
    else:
        believing.catch_up(shop.now)
    assert believing.world.instances == before
    assert believing.world.view("a").objects == objects
    assert believing.broken == {}
    assert {key for _, key in believing.contradicted} == {"db/0", "web/0", "api/0", "policy"}
    with shop.store.write() as tx:
        tx.execute(text("""update instances set labels = '{"role": "db"}', spiffe_id = 'spiffe://reg.test/wl/db' where name = 'db'"""))
        shop.store.log(tx, shop.now, "instance", "db/0")
    believing.catch_up(shop.now)
    assert ("instance", "db/0") not in believing.contradicted


def test_a_record_that_does_not_hold_is_told_and_takes_nothing_away(shop) -> None:
    """Endpoints refuse it and keep what they have, as long as nothing tells them to remove it."""
    policy(shop, RULE)
    believing = Mirror(shop.store, shop.open)
    believing.load(shop.now)
    before = set(believing.world.view("a").objects)
    with shop.store.write() as tx:
        tx.execute(text("update instances set placement = (select p.placement from instances p where p.name = 'web') where name = 'api'"))
        tx.execute(text("update policies set record = 'x'"))
        shop.store.log(tx, shop.now, "instance", "api/0")
        shop.store.log(tx, shop.now, "policy", "policy")
    believing.catch_up(shop.now)
    assert set(believing.world.view("a").objects) == before
    assert ("policy", "policy") in believing.contradicted
