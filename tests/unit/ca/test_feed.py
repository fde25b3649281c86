from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca.feed import JOURNAL, LINGER_S, Feed
from ca.scope import EndpointFact, InstanceFact, Shared, Touched, World
from identity.errors import Unreachable
from identity.records import state_hash
from identity.wire.feed import Beat, Delta, Snapshot, parse_frame
from policy.program import Action, Everything, Program, Rule, Subject, Tier

ALL = Program((Tier("t", (Rule("r", Action.ALLOW, Everything(), Everything()),)),))
NAMES = ["a", "b", "c"]


def instance(name: str, holder: str | None, version: int, *former: str) -> InstanceFact:
    return InstanceFact(
        f"{name}/0", Subject(name), False, holder, None, frozenset(former), f"{name} v{version}", None
    )


class Rig:
    """A world, a feed, and what each endpoint holds by following the frames alone."""

    def __init__(self) -> None:
        self.world = World()
        self.world.set_bundle("bundle")
        for name in NAMES:
            self.world.set_endpoint(EndpointFact(name, f"record {name}"))
        self.world.set_policy("policy", ALL)
        self.signed: list[tuple[int, int]] = []
        self.feed = Feed(self.world, "T", 1, self.sign)
        self.held: dict[str, dict[str, str]] = {}
        self.at: dict[str, int] = {}
        self.turn: dict[str, int] = {}
        self.now = 100

    def sign(self, revision: int, now: int) -> str:
        self.signed.append((revision, now))
        return json.dumps([revision, now])

    def connect(self, name: str, timeline: str | None = None, revision: int | None = None):
        line, self.turn[name] = self.feed.connect(name, timeline, revision, self.now)
        return self.follow(name, line)

    def resume(self, name: str):
        return self.connect(name, "T", self.at.get(name))

    def change(self, *facts) -> dict:
        touched = Touched()
        for fact in facts:
            touched.merge(
                self.world.set_instance(fact)
                if isinstance(fact, InstanceFact)
                else self.world.set_endpoint(fact)
            )
        frames = self.feed.advance(self.feed.revision + 1, touched, self.now)
        return {name: self.follow(name, line) for name, line in frames.items()}

    def follow(self, name: str, parts: tuple[bytes, ...]):
        line = b"".join(parts)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        frame = parse_frame(line)
        assert json.loads(frame.heartbeat)[0] == self.feed.revision
        if isinstance(frame, Snapshot):
            self.held[name] = dict(frame.objects)
        else:
            assert isinstance(frame, Delta)
            assert frame.from_revision == self.at[name]
            held = {k: v for k, v in self.held[name].items() if k not in frame.removes}
            assert set(frame.removes) <= self.held[name].keys() | set(frame.removes)
            self.held[name] = held | frame.upserts
        assert state_hash(self.held[name]) == frame.hash
        assert self.held[name] == self.world.view(name).objects
        self.at[name] = frame.revision
        return frame


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_first_contact_is_a_snapshot(rig: Rig) -> None:
    frame = rig.connect("a")
    assert isinstance(frame, Snapshot)
    assert frame.objects == {"bundle": "bundle", "policy": "policy", "endpoint/a": "record a"}


def test_changes_are_deltas_to_those_who_see_them(rig: Rig) -> None:
    rig.change(instance("web", "a", 1))
    rig.connect("a")
    rig.connect("b")
    frames = rig.change(instance("web", "a", 2))
    assert set(frames) == {"a"}
    assert frames["a"].upserts == {"placement/web/0": "web v2"}
    frames = rig.change(instance("api", "b", 1))
    assert set(frames) == {"a", "b"}
    assert set(frames["a"].upserts) == {"placement/api/0", "endpoint/b"}


def test_a_removal_is_a_tombstone(rig: Rig) -> None:
    rig.change(instance("web", "a", 1), instance("api", "b", 1))
    rig.connect("a")
    frame = rig.change(instance("web", "c", 2, "a"))["a"]
    assert set(frame.removes) == {"placement/api/0", "endpoint/b"}
    assert frame.upserts == {"placement/web/0": "web v2"}


def test_a_return_costs_a_delta(rig: Rig) -> None:
    rig.change(instance("web", "a", 1))
    rig.connect("a")
    rig.feed.leave("a", rig.turn["a"], rig.now)
    assert rig.change(instance("api", "a", 1)) == {}
    frame = rig.resume("a")
    assert isinstance(frame, Delta)
    assert frame.upserts == {"placement/api/0": "api v1"}
    assert isinstance(rig.resume("a"), Delta)


def test_a_return_after_long_or_from_elsewhere_is_a_snapshot(rig: Rig) -> None:
    rig.change(instance("web", "a", 1))
    rig.connect("a")
    assert isinstance(rig.connect("a", "other", rig.at["a"]), Snapshot)
    assert isinstance(rig.connect("a", "T", rig.feed.revision + 5), Snapshot)
    assert isinstance(rig.connect("a", "T", 0), Snapshot)
    rig.feed.leave("a", rig.turn["a"], rig.now)
    rig.now += LINGER_S + 1
    rig.change(instance("api", "b", 1))
    assert isinstance(rig.resume("a"), Snapshot)


def test_a_restarted_server_confirms_an_unchanged_position(rig: Rig) -> None:
    rig.connect("a")
    rig.feed = Feed(rig.world, "T", rig.feed.revision, rig.sign)
    frame = rig.resume("a")
    assert isinstance(frame, Delta)
    assert (frame.upserts, frame.removes) == ({}, [])


def test_the_journal_is_bounded(rig: Rig) -> None:
    rig.change(instance("web", "a", 0))
    rig.connect("a")
    start = rig.at["a"]
    rig.feed.leave("a", rig.turn["a"], rig.now)
    for n in range(JOURNAL + 2):
        rig.change(instance("web", "a", n + 1))
    assert isinstance(rig.connect("a", "T", start), Snapshot)


def test_a_newer_connection_keeps_its_seat(rig: Rig) -> None:
    rig.change(instance("web", "a", 1))
    rig.connect("a")
    old = rig.turn["a"]
    rig.connect("a")
    rig.feed.leave("a", old, rig.now)
    assert rig.feed.connected == {"a"}
    assert set(rig.change(instance("web", "a", 2))) == {"a"}


def test_beats_go_to_the_connected(rig: Rig) -> None:
    rig.connect("a")
    rig.connect("b")
    rig.feed.leave("b", rig.turn["b"], rig.now)
    rig.feed.drop("c")
    parts, names = rig.feed.beat(rig.now)
    assert names == {"a"}
    assert isinstance(parse_frame(b"".join(parts)), Beat)


def test_one_signature_serves_all(rig: Rig) -> None:
    for name in NAMES:
        rig.connect(name)
    rig.signed.clear()
    rig.change(*(instance(f"w{n}", n, 1) for n in NAMES))
    assert len(rig.signed) == 1


def test_a_dropped_endpoint_gets_nothing(rig: Rig) -> None:
    rig.change(instance("web", "a", 1))
    rig.connect("a")
    rig.feed.drop("a")
    assert rig.change(instance("web", "a", 2)) == {}
    assert rig.feed.audience("web/0") == set()


@pytest.mark.parametrize("half_way", [False, True])
def test_one_scope_that_fails_stops_nobody_and_empties_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, half_way: bool
) -> None:
    rig.change(instance("web", "a", 1), instance("api", "b", 1))
    for name in NAMES:
        rig.connect(name)
    before = dict(rig.held["a"])
    real = World._follow

    def failing(self: World, view, step, *, renew: bool):
        if view.endpoint == "a":
            if half_way:
                real(self, view, step, renew=renew)
            raise RuntimeError("a bad row")
        return real(self, view, step, renew=renew)

    with monkeypatch.context() as patch:
        patch.setattr(World, "_follow", failing)
        frames = rig.change(instance("api", "b", 2), instance("db", "c", 1))
        assert set(frames) == {"b", "c"}
        assert rig.feed.beat(rig.now)[1] == {"b", "c"}
    assert rig.held["a"] == before
    frames = rig.change()  # nothing new: the one who missed it gets everything
    assert set(frames) == {"a"}
    assert isinstance(frames["a"], Snapshot)
    assert rig.feed.beat(rig.now)[1] == {"a", "b", "c"}


def test_a_shared_set_that_fails_is_used_no_more(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.change(instance("web", "a", 1), instance("api", "b", 1), instance("db", "c", 1))
    for name in NAMES:
        rig.connect(name)
    before = {name: dict(held) for name, held in rig.held.items()}
    real = Shared.put

    def failing(self: Shared, key: str, envelope: str | None, old) -> None:
        real(self, key, envelope, old)
        if key == "placement/api/0":
            raise RuntimeError("a bad row")

    with monkeypatch.context() as patch:
        patch.setattr(Shared, "put", failing)
        assert rig.change(instance("api", "b", 2), instance("web", "a", 2)) == {}
        assert rig.feed.beat(rig.now)[1] == set()
        assert rig.change() == {}
    assert rig.held == before
    frames = rig.change()
    assert set(frames) == set(NAMES)
    assert all(frame.objects["placement/api/0"] == "api v2" for frame in frames.values())
    frames = rig.change(instance("api", "b", 3))
    assert {type(frame) for frame in frames.values()} == {Delta}


def test_equal_endpoints_share_their_bytes(rig: Rig) -> None:
    rig.change(*(instance(f"w{n}", n, 1) for n in NAMES))
    first = {name: rig.feed.connect(name, None, None, rig.now)[0] for name in NAMES}
    assert all(part is other for part, other in zip(first["a"][1:], first["b"][1:], strict=True) if len(part) > 99)
    assert first["a"][1] is first["c"][1]
    touched = rig.world.set_instance(instance("wa", "b", 2, "a"))
    frames = rig.feed.advance(rig.feed.revision + 1, touched, rig.now)
    assert frames["b"][1] is frames["c"][1]
    assert frames["b"][0] is frames["c"][0]
    assert frames["b"][2] is frames["c"][2]


def test_text_is_escaped(rig: Rig) -> None:
    odd = 'a "quoted" \\ \n \u2028 name'
    rig.change(InstanceFact("web/0", Subject("web"), False, "a", None, frozenset(), odd, None))
    rig.connect("a")
    assert rig.held["a"]["placement/web/0"] == odd
    rig.change(InstanceFact("web/0", Subject("web"), False, "a", None, frozenset(), odd * 2, None))
    assert rig.held["a"]["placement/web/0"] == odd * 2


def test_a_scope_that_fails_at_connect_is_unavailable_not_empty(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: World, endpoint: str):
        raise RuntimeError("a bad row")

    with monkeypatch.context() as patch:
        patch.setattr(World, "view", failing)
        with pytest.raises(Unreachable) as e:
            rig.feed.connect("a", None, None, rig.now)
        assert e.value.code == "feed.scope"
    assert isinstance(rig.connect("a"), Snapshot)


def test_a_return_to_a_failed_scope_makes_it_anew(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.change(instance("web", "a", 1))
    rig.connect("a")

    def failing(self: World, view, step, *, renew: bool):
        raise RuntimeError("a bad row")

    with monkeypatch.context() as patch:
        patch.setattr(World, "_follow", failing)
        assert rig.change(instance("web", "a", 2)) == {}
    assert isinstance(rig.resume("a"), Snapshot)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("change"),
            st.lists(
                st.builds(
                    instance,
                    st.sampled_from(["w", "x", "y"]),
                    st.none() | st.sampled_from(NAMES),
                    st.integers(0, 9),
                ),
                max_size=3,
            ),
        ),
        st.tuples(
            st.just("endpoint"), st.builds(EndpointFact, st.sampled_from(NAMES), st.integers(0, 9).map(str))
        ),
        st.tuples(st.just("connect"), st.sampled_from(NAMES)),
        st.tuples(st.just("resume"), st.sampled_from(NAMES)),
        st.tuples(st.just("leave"), st.sampled_from(NAMES)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_following_frames_always_gives_the_scope(steps) -> None:
    """`Rig.follow` compares after every frame; at the end a delta and a snapshot must agree for everyone."""
    rig = Rig()
    for step, value in steps:
        match step:
            case "change":
                rig.change(*value)
            case "endpoint":
                rig.change(value)
            case "connect":
                rig.connect(value)
            case "resume":
                rig.resume(value)
            case "leave" if value in rig.turn:
                rig.feed.leave(value, rig.turn[value], rig.now)
            case "restart":
                rig.feed = Feed(rig.world, "T", rig.feed.revision, rig.sign)
                rig.turn.clear()
    for name in NAMES:
        rig.resume(name)
        by_delta = dict(rig.held[name])
        rig.connect(name)
        assert rig.held[name] == by_delta
