"""Rolling a policy out: canary, everybody, watch, keep or back; and what lying hosts can and cannot do to it."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from ca import flow_store, policies, schema
from ca.policies import Policies
from ca.rollouts import Rollouts, Who
from identity.errors import BadInput, Conflict, NotFound, Refused
from identity.wire.flows import FlowSummary

HEAD = "meshpolicy: 1\nlabels: {keys: [role, env]}\nsegments:\n  - name: shop\n    allow:\n"
WIDE = HEAD + "      - {id: web-api, from: {role: web}, to: {role: api}, on: tcp/1-100}\n"
NARROW = HEAD + "      - {id: web-api, from: {role: web}, to: {role: api}, on: tcp/80}\n"


@pytest.fixture
def shop(bench):
    for host in ("a", "b", "c"):
        bench.enrol(host)
    bench.add("shop/web", "a", labels={"role": "web", "env": "test"})
    bench.add("shop/api", "b", labels={"role": "api", "env": "test"})
    bench.add("shop/web2", "c", labels={"role": "web", "env": "prod"})
    bench.policies = Policies(bench.desk)
    bench.rollouts = Rollouts(bench.desk, bench.policies)
    bench.policies.apply([("p.yaml", WIDE)], "me", bench.now, "test")
    return bench


def start(shop, text: str = NARROW, **more):
    who = more.pop("who", Who({"env": "test"}))
    return shop.rollouts.start([("p.yaml", text)], who, "me", shop.now, "test", **more)


def flow(src: str, dst: str, port: int, verdict: str, at: int, count: int = 1) -> FlowSummary:
    return FlowSummary(src=f"shop/{src}", dst=f"shop/{dst}", proto=6, port=port, verdict=verdict, count=count, first=at, last=at)


def seen(shop, port: int = 81, src: str = "web", holders: str = "ab") -> None:
    for host in holders:
        shop.rollouts.observe(host, [flow(src, "api", port, "allow", shop.now)], shop.now)


def in_force(shop):
    with shop.store.read() as tx:
        row = policies.newest(tx)
    return row, row.staged()


def test_the_whole_road(shop) -> None:
    one = start(shop, watch=100)
    row, staged = in_force(shop)
    assert (one.state, row.revision, row.kind) == ("canary", 2, f"rollout {one.id} canary")
    assert (row.digest, staged.trial.digest) == (one.before, one.digest)
    assert str(staged.canary) == "env=test"
    with pytest.raises(Conflict) as e:
        shop.policies.apply([("p.yaml", WIDE + " ")], "me", shop.now, "test")
    assert e.value.code == "rollout.running"
    shop.now += 10
    assert shop.rollouts.promote(shop.now, "test").state == "watch"
    assert in_force(shop)[1].canary.everybody
    assert shop.rollouts.tick(shop.now + 99) is None
    shop.now += 100
    kept = shop.rollouts.tick(shop.now)
    row, staged = in_force(shop)
    assert kept is not None
    assert (kept.state, kept.ended, row.digest, staged.trial) == ("kept", shop.now, one.digest, None)
    assert [h.kind for h in shop.policies.history()] == [
        f"rollout {one.id} kept", f"rollout {one.id} watch", f"rollout {one.id} canary", "apply",
    ]  # fmt: skip
    assert shop.rollouts.tick(shop.now + 1000) is None


def test_back_by_itself_when_something_seen_is_refused(shop) -> None:
    seen(shop)
    shop.now += 5
    one = start(shop, force=True)
    shop.now += 5
    assert shop.rollouts.tick(shop.now) is None
    shop.rollouts.observe("a", [flow("web", "api", 81, "deny", shop.now, 7)], shop.now)
    found, watched = shop.rollouts.status(shop.now)
    assert (found.state, len(watched.counted)) == ("canary", 1)
    back = shop.rollouts.tick(shop.now)
    assert back is not None
    assert (back.id, back.state) == (one.id, "rolled_back")
    assert "shop/web -> shop/api tcp/81" in back.why
    row, staged = in_force(shop)
    assert (row.digest, staged.trial, row.kind) == (one.before, None, f"rollout {one.id} rolled_back")
    # one lie or truth ends one rollout; the next begins by an operator's hand only
    assert shop.rollouts.tick(shop.now + 10_000) is None


def test_the_budget_is_counted_in_distinct_flows(shop) -> None:
    for port in (81, 82, 83):
        seen(shop, port)
    shop.now += 5
    start(shop, force=True, budget=2)
    for port in (81, 82):
        for _ in range(5):
            shop.rollouts.observe("a", [flow("web", "api", port, "deny", shop.now)], shop.now)
    assert shop.rollouts.tick(shop.now) is None
    shop.rollouts.observe("a", [flow("web", "api", 83, "deny", shop.now)], shop.now)
    assert shop.rollouts.tick(shop.now).state == "rolled_back"


@pytest.mark.parametrize(
    ("reporter", "what", "why"),
    [
        ("c", flow("web", "api", 81, "deny", 0), None),  # about others' ends: not even kept
        ("a", flow("web", "api", 99, "deny", 0), "not seen before"),
        ("a", flow("web", "api", 80, "deny", 0), "allowed now"),
        ("c", flow("web2", "api", 81, "deny", 0), "allowed now"),  # outside the canary
        ("a", flow("api", "web", 81, "deny", 0), "not seen before"),
        ("a", flow("web", "api", 82, "deny", 0), "by the reporting end only"),
    ],
)
def test_a_lying_host_spends_no_budget(shop, reporter, what, why) -> None:
    seen(shop, 81)
    seen(shop, 80)
    seen(shop, 82, holders="a")  # the liar prepared it: nobody else saw it
    shop.rollouts.observe("b", [flow("web2", "api", 81, "allow", shop.now)], shop.now)
    shop.now += 5
    start(shop, force=True, who=Who({}, hosts=["a"]))
    lie = what.model_copy(update={"first": shop.now, "last": shop.now})
    noted = shop.rollouts.observe(reporter, [lie], shop.now)
    _, watched = shop.rollouts.status(shop.now)
    assert watched.counted == ()
    assert shop.rollouts.tick(shop.now) is None
    if why is None:
        assert (noted.foreign, watched.denials) == (1, ())
    else:
        assert why in watched.denials[0][1]


def test_a_silent_host_hides_only_what_it_alone_sees(shop) -> None:
    """The source's holder says nothing; the destination's holder saw the packets refused and says so."""
    seen(shop)
    shop.now += 5
    start(shop, force=True)
    shop.rollouts.observe("b", [flow("web", "api", 81, "deny", shop.now)], shop.now)
    assert shop.rollouts.tick(shop.now).state == "rolled_back"


def test_what_was_refused_before_the_rollout_does_not_count(shop) -> None:
    seen(shop)
    start(shop, force=True)
    shop.rollouts.observe("a", [flow("web", "api", 81, "deny", shop.now - 50)], shop.now)
    assert shop.rollouts.tick(shop.now) is None


def test_reports_are_bounded_and_must_make_sense(shop) -> None:
    start(shop, force=True)
    many = [flow("web", "api", port, "deny", shop.now) for port in range(1, flow_store.MAX_DENIALS + 100)]
    shop.rollouts.observe("a", many, shop.now)
    with shop.store.read() as tx:
        assert len(tx.execute(select(schema.flow_denials)).all()) == flow_store.MAX_DENIALS
    odd = [
        flow("web", "api", 81, "allow", shop.now + 10_000),
        flow("web", "api", 0, "allow", shop.now),
        FlowSummary(src="shop/web", dst="shop/api", proto=1, port=9, verdict="allow", count=1, first=1, last=1),
        FlowSummary(src="shop/web", dst="shop/api", proto=6, port=9, verdict="allow", count=1, first=9, last=1),
    ]
    assert shop.rollouts.observe("a", odd, shop.now) == flow_store.Noted(0, 4)
    assert shop.rollouts.observe("a", [], shop.now) == flow_store.Noted(0, 0)


def test_the_oldest_flows_make_room(shop, monkeypatch) -> None:
    monkeypatch.setattr(flow_store, "MAX_EDGES", 3)
    for port in (1, 2, 3, 4):
        shop.now += 1
        seen(shop, port)
    with shop.store.read() as tx:
        assert sorted(e[3] for e in flow_store.recording(tx, shop.now).edges) == [2, 3, 4]


def test_a_replay_that_breaks_something_is_refused(shop) -> None:
    seen(shop)
    with pytest.raises(Refused) as e:
        start(shop)
    assert e.value.code == "rollout.replay"
    assert "tcp/81" in e.value.message
    assert in_force(shop)[1].trial is None
    assert start(shop, budget=1).state == "canary"
    assert len(shop.rollouts.plan([("p.yaml", NARROW)], shop.now).replayed.broken) == 1


def test_abort_and_what_is_wrong(shop) -> None:
    assert shop.rollouts.status(shop.now) is None
    for call in (lambda: shop.rollouts.abort(shop.now, "t"), lambda: shop.rollouts.promote(shop.now, "t")):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(Conflict) as e:
        start(shop, WIDE)
    assert e.value.code == "rollout.same"
    for more in ({"watch": 0}, {"budget": -1}, {"who": Who({}, percent=0)}, {"who": Who({})}):
        with pytest.raises(BadInput):
            start(shop, **more)
    one = start(shop)
    with pytest.raises(Conflict):
        start(shop)
    done = shop.rollouts.abort(shop.now, "t", "changed our minds")
    assert (done.state, done.why, in_force(shop)[1].trial) == ("aborted", "changed our minds", None)
    assert shop.rollouts.status(shop.now)[0].id == one.id


def test_nothing_in_force_is_nothing_to_go_back_to(bench) -> None:
    rollouts = Rollouts(bench.desk, Policies(bench.desk))
    with pytest.raises(Conflict) as e:
        rollouts.start([("p.yaml", WIDE)], Who({"env": "x"}), "me", bench.now, "test")
    assert e.value.code == "rollout.first"


def test_a_canary_by_percentage_by_host_and_larger(shop) -> None:
    start(shop, who=Who({}, percent=34))
    small = in_force(shop)[1].canary.names
    assert len(small) == 1
    one = shop.rollouts.promote(shop.now, "t", Who({}, percent=67))
    assert one.state == "canary"
    assert small < in_force(shop)[1].canary.names
    assert shop.rollouts.promote(shop.now, "t").state == "watch"
    with pytest.raises(BadInput):
        shop.rollouts.promote(shop.now, "t", Who({}, percent=50))
    assert shop.rollouts.promote(shop.now, "t").state == "kept"
    start(shop, WIDE, who=Who({}, hosts=["b"]))
    assert in_force(shop)[1].canary.names == {"shop/api"}
    shop.rollouts.abort(shop.now, "t")
    shop.enrol("empty")
    with pytest.raises(BadInput):
        start(shop, WIDE, who=Who({}, hosts=["empty"]))
    assert start(shop, WIDE, who=Who({}, percent=100)).state == "watch"


def test_by_itself_from_canary_to_kept(shop) -> None:
    start(shop, watch=10, auto=True)
    assert shop.rollouts.tick(shop.now + 10).state == "watch"
    assert shop.rollouts.tick(shop.now + 20).state == "kept"


def test_a_restart_goes_on_where_it_was(shop) -> None:
    seen(shop)
    shop.now += 5
    start(shop, force=True)
    shop.rollouts.observe("a", [flow("web", "api", 81, "deny", shop.now)], shop.now)
    again = Rollouts(shop.desk, Policies(shop.desk))
    assert again.tick(shop.now).state == "rolled_back"
    with shop.store.read() as tx:
        assert json.loads(tx.execute(select(schema.rollouts.c.data)).scalar_one())["state"] == "rolled_back"


def test_the_tests_of_the_file_replay_what_was_recorded(shop) -> None:
    seen(shop)
    text = NARROW + "tests: [{replay: last-30d}]\n"
    from identity.errors import BadPolicy

    with pytest.raises(BadPolicy) as e:
        shop.policies.apply([("p.yaml", text)], "me", shop.now, "test")
    assert e.value.code == "policy.tests"
    assert "tcp/81" in e.value.message
