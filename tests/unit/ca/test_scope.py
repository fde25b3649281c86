from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca.scope import EndpointFact, InstanceFact, Near, Touched, World
from identity.records import state_hash
from policy.evaluate import permitted
from policy.ports import parse_ports
from policy.program import Action, AllOf, Everything, In, Named, Not, Program, Rule, Subject, Tier

ENDPOINTS = ["a", "b", "c", "d"]
KEYS = [f"{name}/{n}" for name in ("web", "api", "db") for n in (0, 1)]
ROLES = ["x", "y", "z"]


def role(*values: str) -> In:
    return In("role", frozenset(values))


SELECTORS = st.one_of(
    st.sets(st.sampled_from(ROLES), min_size=1).map(lambda v: role(*sorted(v))),
    st.sampled_from(["web", "api", "db"]).map(lambda n: Named(frozenset({n}))),
    st.just(Everything()),
    st.sampled_from(ROLES).map(lambda r: Not(role(r))),
    st.sampled_from(ROLES).map(lambda r: AllOf((Not(Named(frozenset({"web"}))), role(r)))),
)
RULES = st.tuples(
    st.sampled_from([Action.ALLOW, Action.ALLOW, Action.DENY]),
    SELECTORS,
    SELECTORS,
    st.sampled_from(["tcp/80", "udp", "any"]),
)


@st.composite
def programs(draw) -> Program:
    rules = tuple(
        Rule(f"r{n}", a, s, d, parse_ports(p))
        for n, (a, s, d, p) in enumerate(draw(st.lists(RULES, max_size=4)))
    )
    return Program((Tier("t", rules),), digest=str(draw(st.integers(0, 9))))


def subject(name: str, labels: dict[str, str]) -> Subject:
    return Subject(name, labels, f"spiffe://reg.test/wl/{name}")


@st.composite
def facts(draw) -> InstanceFact:
    key = draw(st.sampled_from(KEYS))
    holder = draw(st.none() | st.sampled_from(ENDPOINTS))
    target = draw(st.none() | st.sampled_from(ENDPOINTS).filter(lambda e: e != holder))
    former = draw(st.frozensets(st.sampled_from(ENDPOINTS))) - {holder, target}
    revoked = draw(st.booleans()) and holder is None and target is None
    version = draw(st.integers(0, 99))
    name = key.rpartition("/")[0]
    labels = {"role": draw(st.sampled_from(ROLES))} if draw(st.booleans()) else {}
    placed = holder is not None or bool(former)
    return InstanceFact(key, subject(name, labels), revoked, holder, target, former,
                        f"placement {key} {version}" if placed else None, f"prepare {key} {version}" if target else None)  # fmt: skip


EVENTS = st.lists(
    st.one_of(
        facts().map(lambda f: ("instance", f)),
        st.tuples(
            st.just("endpoint"),
            st.builds(EndpointFact, st.sampled_from(ENDPOINTS), st.none() | st.integers(0, 9).map(str)),
        ),
        programs().map(lambda p: ("policy", p)),
        st.integers(0, 9).map(lambda n: ("bundle", str(n))),
    ),
    max_size=25,
)


def settle(events):
    """Labels belong to a name, not to an instance: give every instance of a name the labels of its newest fact."""
    labels: dict[str, dict[str, str]] = {}
    for kind, fact in events:
        if kind == "instance":
            name = fact.subject.name
            labels.setdefault(name, dict(fact.subject.labels))
            yield kind, replace(fact, subject=subject(name, labels[name]))
        else:
            yield kind, fact


def apply(world: World, event) -> Touched:
    kind, fact = event
    match kind:
        case "instance":
            return world.set_instance(fact)
        case "endpoint":
            return world.set_endpoint(fact)
        case "policy":
            return world.set_policy(f"policy {fact.digest}", fact)
        case _:
            return world.set_bundle(f"bundle {fact}")


def oracle(world: World, endpoint: str) -> dict[str, str]:
    """The definition, pair by pair, with the evaluator itself."""
    out = {}
    if world.bundle:
        out["bundle"] = world.bundle
    if world.policy:
        out["policy"] = world.policy
    mine = [f for f in world.instances.values() if endpoint in f.here and not f.revoked]

    def talk(one: Subject, other: Subject) -> bool:
        return world.program is not None and bool(
            permitted(world.program, one, other) or permitted(world.program, other, one)
        )

    names = {endpoint}
    for fact in world.instances.values():
        near = any(talk(m.subject, fact.subject) for m in mine)
        if near or endpoint in fact.here:
            names |= fact.here
            if fact.prepare:
                out[f"prepare/{fact.key}"] = fact.prepare
        if (near or endpoint in fact.here | fact.former) and fact.placement:
            out[f"placement/{fact.key}"] = fact.placement
    for name in names:
        known = world.endpoints.get(name)
        if known and known.record is not None:
            out[f"endpoint/{name}"] = known.record
    return out


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_step_by_step_equals_the_definition(events) -> None:
    world = World()
    views = {e: world.view(e) for e in ENDPOINTS}
    for event in settle(events):
        before = {e: view.objects for e, view in views.items()}
        outcome = world.update(apply(world, event))
        assert outcome.failed == {}
        for endpoint, view in views.items():
            now = view.objects
            assert now == oracle(world, endpoint)
            assert outcome.changed.get(view, frozenset()) == {
                k for k in before[endpoint].keys() | now.keys() if before[endpoint].get(k) != now.get(k)
            }
            assert view.hash() == state_hash(now)
            assert len(view) == len(now)
            assert {key: view.get(key) for key in now} == now
            assert view.shared.objects | view.extra() == now
            assert json.loads(b"{" + view.shared.json() + b"}") == view.shared.objects
            assert world.view(endpoint).objects == now


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(1, 5))
def test_batches_equal_single_steps(events, size: int) -> None:
    world = World()
    views = {e: world.view(e) for e in ENDPOINTS}
    pending = Touched()

    def settle_batch() -> None:
        before = {e: view.objects for e, view in views.items()}
        outcome = world.update(pending)
        for endpoint, view in views.items():
            now = view.objects
            assert now == oracle(world, endpoint)
            assert outcome.changed.get(view, frozenset()) == {
                k for k in before[endpoint].keys() | now.keys() if before[endpoint].get(k) != now.get(k)
            }

    for n, event in enumerate(settle(events)):
        pending.merge(apply(world, event))
        if n % size == 0:
            settle_batch()
            pending = Touched()
    settle_batch()


def test_what_policy_shows_alike_is_kept_once() -> None:
    world = World()
    world.set_policy("p", Program((Tier("t", (Rule("r", Action.ALLOW, Everything(), Everything()),)),)))
    for n in range(50):
        world.set_endpoint(EndpointFact(f"h{n}", f"record {n}"))
        world.set_instance(InstanceFact(f"w{n}/0", subject(f"w{n}", {}), False, f"h{n}", None, frozenset(), f"p{n}", None))
    views = [world.view(f"h{n}") for n in range(50)]
    assert len({id(view.shared) for view in views}) == 1
    touched = world.set_instance(
        InstanceFact("w0/0", subject("w0", {}), False, "h7", None, frozenset({"h0"}), "new", None)
    )
    changed = world.update(touched).changed
    # h0 holds nothing any more: it is left with its own, and what it held
    assert {view.endpoint for view, keys in changed.items() if keys != {"placement/w0/0", "endpoint/h0"}} == {"h0"}
    assert len(changed) == 50
    assert len({id(keys) for view, keys in changed.items() if view.endpoint not in {"h0", "h7"}}) == 1
    for view in views:
        assert view.objects == oracle(world, view.endpoint)


def test_changed_labels_sort_everything_anew() -> None:
    world = World()
    world.set_policy("p", Program((Tier("t", (Rule("r", Action.ALLOW, role("x"), role("y")),)),)))
    for name, label, holder in (("web", "x", "a"), ("api", "z", "b")):
        world.set_instance(
            InstanceFact(
                f"{name}/0", subject(name, {"role": label}), False, holder, None, frozenset(), name, None
            )
        )
    view = world.view("a")
    assert view.get("placement/api/0") is None
    touched = world.set_instance(
        InstanceFact("api/0", subject("api", {"role": "y"}), False, "b", None, frozenset(), "api", None)
    )
    assert touched.all
    world.update(touched)
    assert view.objects == oracle(world, "a")
    assert "placement/api/0" in view.objects


def test_subjects_the_program_cannot_tell_apart_are_one_class() -> None:
    near = Near(Program((Tier("t", (Rule("r", Action.ALLOW, role("x"), role("y")),)),)))
    numbers = [near.of(subject(f"w{n}", {"role": "xyz"[n % 3], "noise": str(n)})) for n in range(300)]
    assert len(near) == len(set(numbers)) == 3
    x, y, z = numbers[:3]
    assert near.near(x) == {y}
    assert near.near(y) == {x}
    assert near.near(z) == set()


def test_one_change_touches_only_who_can_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.set_policy("p", Program((Tier("t", (Rule("r", Action.ALLOW, role("x"), role("y")),)),)))
    for n in range(200):
        world.set_endpoint(EndpointFact(f"h{n}", f"record {n}"))
        world.set_instance(InstanceFact(f"w{n}/0", subject(f"w{n}", {"role": "x" if n < 3 else "y" if n < 5 else "z"}), False,
                                        f"h{n}", None, frozenset(), f"p{n}", None))  # fmt: skip
    touched = world.set_instance(
        InstanceFact("w0/0", subject("w0", {"role": "x"}), False, "h7", None, frozenset({"h0"}), "new", None)
    )
    assert touched == Touched(views={"h0", "h7"}, instances={"w0/0"})
    views = [world.view(f"h{n}") for n in range(200)]
    seen: list[str] = []
    real = World._follow

    def follow(self, view, step, *, renew):
        seen.append(view.endpoint)
        return real(self, view, step, renew=renew)

    monkeypatch.setattr(World, "_follow", follow)
    world.set_instance(InstanceFact("w0/0", subject("w0", {"role": "x"}), False, "h0", None, frozenset(), "p0", None))
    assert len(views) == 200
    world.update(touched)
    assert set(seen) == {"h0", "h7", "h3", "h4"}


def test_a_policy_that_cannot_be_classed_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    good = Program((Tier("t", (Rule("r", Action.ALLOW, role("x"), role("y")),)),))
    world.set_policy("good", good)
    world.set_instance(
        InstanceFact("web/0", subject("web", {"role": "x"}), False, "a", None, frozenset(), "w", None)
    )
    before = world.view("a").objects

    def broken(self, subject):
        raise RuntimeError("cannot")

    with monkeypatch.context() as patch:
        patch.setattr(Near, "of", broken)
        with pytest.raises(RuntimeError):
            world.set_policy("bad", Program(()))
        with pytest.raises(RuntimeError):
            world.set_instance(
                InstanceFact("api/0", subject("api", {}), False, "a", None, frozenset(), "x", None)
            )
    assert (world.policy, world.program) == ("good", good)
    assert world.view("a").objects == before


def test_everybody_sees_the_workload_with_which_a_grant_ends() -> None:
    world = World()
    for name in ("a", "b"):
        world.set_endpoint(EndpointFact(name, f"record {name}"))
    world.set_policy("policy", Program((), ends=frozenset({"job"})))
    view = world.view("a")
    assert "placement/job/0" not in view.objects
    job = InstanceFact("job/0", subject("job", {}), False, "b", None, frozenset(), "running", None)
    outcome = world.update(world.set_instance(job))
    assert outcome.changed[view] == {"placement/job/0"}
    assert view.objects["placement/job/0"] == "running"
    assert "endpoint/b" not in view.objects  # and no more than that
    ended = replace(job, revoked=True, holder=None, former=frozenset({"b"}), placement="revoked")
    assert world.update(world.set_instance(ended)).changed[view] == {"placement/job/0"}
    assert view.objects["placement/job/0"] == "revoked"
    assert world.update(world.set_policy("other", Program(()))).changed[view] >= {"placement/job/0"}
    assert "placement/job/0" not in view.objects
