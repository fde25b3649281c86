"""Drafts: what was seen is permitted, nothing else at the granularity of labels, and decisions hold over reruns."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadInput, NotFound
from policy.compile import compile_policy
from policy.draft import Draft, count_ports, draft, jaccard
from policy.draft_text import draft_text
from policy.evaluate import permitted
from policy.flows import FlowRecord
from policy.language import load
from policy.ports import NOTHING, PortMap, single
from policy.program import Program, Subject

DAY = 86_400


def flow(src: str, dst: str, port: int | None = 80, *, proto: int = 6, time: int = DAY, verdict: Any = "allow") -> FlowRecord:
    return FlowRecord(time, src, dst, proto, port, 2, 100, verdict)


def read(found: Draft) -> Program:
    return compile_policy(load([("draft.yaml", draft_text(found))]))


SHOP = [
    Subject("shop/web-1", {"app": "shop", "role": "web"}),
    Subject("shop/web-2", {"app": "shop", "role": "web"}),
    Subject("shop/api", {"app": "shop", "role": "api"}),
    Subject("shop/db", {"app": "shop", "role": "db"}),
    Subject("tools/one"),
    Subject("tools/any", {"app": "shop"}),
]
SEEN = [
    flow("shop/web-1", "shop/api"),
    flow("shop/web-1", "shop/api", time=3 * DAY),
    flow("shop/web-2", "shop/api", 443),
    flow("shop/api", "shop/db", 5432),
    flow("tools/one", "shop/db", None, proto=1),
    flow("tools/any", "shop/api", 22),
]


def test_the_least_policy_with_its_evidence() -> None:
    found = draft(SEEN, SHOP)
    program = read(found)
    by = {s.name: s for s in SHOP}
    web = single(6, 80) | single(6, 443)
    expected = {
        ("shop/web-1", "shop/api"): web, ("shop/web-2", "shop/api"): web, ("shop/api", "shop/db"): single(6, 5432),
        ("tools/one", "shop/db"): single(1, None), ("tools/any", "shop/api"): single(6, 22),
    }  # fmt: skip
    for src, dst in itertools.permutations(SHOP, 2):
        assert permitted(program, src, dst) == expected.get((src.name, dst.name), NOTHING), (src.name, dst.name)
    assert (found.observed, found.permitted) == (5, 7)
    assert found.over_permission == pytest.approx(2 / 7)
    text = draft_text(found)
    assert "# Drafted from 6 records, 1970-01-02T00:00:00Z to 1970-01-04T00:00:00Z." in text
    assert "# Seen: 5 different flows. Permitted: 7 (28.6% of that was never seen)." in text
    assert "# 3 records, 6 packets, 300 bytes, 1970-01-02T00:00:00Z to 1970-01-04T00:00:00Z; 2 of 2 pairs, 2 of 4 flows seen" in text
    assert 'from: {app: shop, not: [{role: "*"}]}' in text  # tools/any, and not all of the shop
    assert "from: {workload: tools/one}" in text
    assert by["shop/web-1"].name in {n for r in found.rules for n in r.src.members}


def test_what_is_left_out_is_counted() -> None:
    rows = [*SEEN, flow("gone", "shop/api"), flow("shop/api", "shop/api"), flow("shop/db", "shop/api", verdict="deny"),
            flow("shop/web-2", "shop/api", 80, verdict="deny"), flow("shop/web-1", "shop/api", verdict="deny")]  # fmt: skip
    found = draft(rows, [*SHOP, Subject("Not A Name")])
    assert found.left_out == {"an end is not in the inventory": 1, "to itself": 1, "denied": 3}
    assert found.strangers == ("gone",)
    assert found.widened == 1  # web-2 on port 80, which web-1 was allowed
    text = draft_text(found)
    assert "# 1 different flows that were denied in the recording are permitted here." in text
    assert "# Left out: 3 records (denied)." in text


def test_an_empty_recording_permits_nothing() -> None:
    found = draft([], SHOP)
    assert (found.rules, found.permitted, found.over_permission) == ((), 0, 0.0)
    assert "it permits nothing" in draft_text(found)
    program = read(found)
    assert not any(permitted(program, a, b) for a, b in itertools.permutations(SHOP, 2))


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        (Subject("office", {"app": "shop", "role": "web"}, nets=("10.0.0.0/8",)), "not: {workload: [office]}"),
        (Subject("No Name", {"app": "shop", "role": "web"}, nets=("10.0.0.0/8",)), "not: {workload: [nobody]}"),
        (Subject("x", {"app": "shop", "role": "web", "env": "a b"}), 'not: [{env: "*"}]'),
        (Subject("y", {"app": "shop", "role": "web", "under": "z"}), None),  # a word of the language is no label key
    ],
)
def test_subjects_with_more_than_the_labels_of_an_end_stay_out(subject: Subject, words: str | None) -> None:
    found = draft(SEEN, [*SHOP, subject])
    if words is None:
        assert found.keys == ("app", "role")
        assert permitted(read(found), subject, SHOP[2])
        return
    assert words in draft_text(found)
    assert not permitted(read(found), subject, SHOP[2])


def test_label_values_that_yaml_would_misread() -> None:
    odd = [Subject(f"s{n}", {"app": value}) for n, value in enumerate(("null", "1", "a:b", "true", "spiffe://x/y", "2031-01-01"))]
    rows = [flow(a.name, b.name) for a, b in itertools.permutations(odd, 2)]
    program = read(draft(rows, odd))
    assert all(permitted(program, a, b) == single(6, 80) for a, b in itertools.permutations(odd, 2))


def test_labels_may_be_chosen() -> None:
    found = draft(SEEN, SHOP, by=["app"])
    assert found.keys == ("app",)
    assert len(found.rules) == 2
    assert permitted(read(found), SHOP[0], SHOP[3]) == single(6, 80) | single(6, 443) | single(6, 5432) | single(6, 22)
    with pytest.raises(BadInput, match="no workload carries the label 'rol'") as error:
        draft(SEEN, SHOP, by=["rol"])
    assert error.value.hint == "did you mean role?"
    with pytest.raises(BadInput, match="cannot name the label 'group'"):
        draft([], [Subject("a", {"group": "b"})], by=["group"])


# ---- groups

FLEET = [
    *(Subject(f"w{n}", {"app": "shop", "cell": str(n)}) for n in (1, 2, 3)),
    Subject("api", {"app": "api"}),
    Subject("log", {"app": "log"}),
    Subject("db", {"app": "db"}),
]
TRAFFIC = [
    *(flow(f"w{n}", other) for n in (1, 2, 3) for other in ("api", "log")),
    flow("w3", "db"),
]


def groups(found: Draft) -> list[Any]:
    return [p for p in found.proposals if p.kind == "group"]


def test_ends_with_similar_connections_are_proposed_with_evidence() -> None:
    found = draft(TRAFFIC, FLEET)
    (shop, sinks) = sorted(groups(found), key=lambda g: -len(g.ends))
    assert shop.ends == ("app=shop,cell=1", "app=shop,cell=2", "app=shop,cell=3")
    assert shop.evidence == {
        "similarity": 0.667, "shared": ["to app=api on tcp/80", "to app=log on tcp/80"], "not_shared": ["to app=db on tcp/80"],
        "workloads": 3, "more_permitted": 2,
    }  # fmt: skip
    assert sinks.ends == ("app=api", "app=log")
    text = draft_text(found)
    assert f"# Proposed: {shop.id}, of 3 kinds of workloads:" in text
    assert "#   not all: to app=db on tcp/80" in text
    assert "groups:" not in text
    assert len(groups(draft(TRAFFIC, FLEET, similarity=0.7))[0].ends) == 2
    assert jaccard([], []) == 0.0


def test_an_accepted_group_takes_the_place_of_its_members() -> None:
    before = draft(TRAFFIC, FLEET)
    shop = max(groups(before), key=lambda g: len(g.ends))
    found = draft(TRAFFIC, FLEET, accept=[shop.id])
    assert found.permitted == before.permitted + shop.evidence["more_permitted"] == 9
    assert {p.id: p.state for p in groups(found)}[shop.id] == "accepted"
    text = draft_text(found)
    assert f"  {shop.id}: {{app: shop, cell: [1, 2, 3]}}" in text
    assert f"from: {shop.id}, to: {{app: db}}" in text
    program = read(found)
    assert permitted(program, FLEET[0], FLEET[5]) == single(6, 80)
    sinks = min(groups(before), key=lambda g: len(g.ends))
    both = draft(TRAFFIC, FLEET, accept=[sinks.id, shop.id])
    assert f"from: {shop.id}, to: {sinks.id}" in draft_text(both)
    assert len(both.rules) == 2


def test_groups_whose_labels_differ_in_more_than_one_value() -> None:
    fleet = [Subject("a", {"app": "a", "role": "x"}), Subject("b", {"app": "b", "role": "y"}), Subject("c", {"app": "c"})]
    rows = [flow("a", "c"), flow("b", "c")]
    (one,) = groups(draft(rows, fleet))
    assert f"{one.id}: {{any: [{{app: a, role: x}}, {{app: b, role: y}}]}}" in draft_text(draft(rows, fleet, accept=[one.id]))
    mixed = [fleet[0], Subject("b", {"app": "b"}), fleet[2]]
    (two,) = groups(draft(rows, mixed))
    assert f"{two.id}: {{any: [{{app: a, role: x}}, {{app: b}}]}}" in draft_text(draft(rows, mixed, accept=[two.id]))


def test_many_shared_connections_are_cut_short_in_the_text() -> None:
    rows = [flow(name, "api", port) for name in ("w1", "w2") for port in range(1, 14)]
    text = draft_text(draft(rows, FLEET))
    assert "#   all: and 3 more" in text


def test_rules_are_accepted_and_rejected_one_by_one() -> None:
    before = draft(TRAFFIC, FLEET)
    rule = next(r for r in before.rules if r.dst.members == {"db"})
    without = draft(TRAFFIC, FLEET, reject=[rule.id])
    assert rule.id not in {r.id for r in without.rules}
    assert {p.id: p.state for p in without.proposals}[rule.id] == "rejected"
    assert f"# Rejected: {rule.id}" in draft_text(without)
    assert permitted(read(without), FLEET[2], FLEET[5]) == NOTHING
    assert without.observed == before.observed - 1
    kept = draft(TRAFFIC, FLEET, accept=[rule.id])
    assert "# accepted; 1 record," in draft_text(kept)


def test_a_group_does_not_bring_back_what_was_rejected() -> None:
    before = draft(TRAFFIC, FLEET)
    rule = next(r for r in before.rules if r.src.members == {"w1"} and r.dst.members == {"api"})
    shop = max(groups(before), key=lambda g: len(g.ends))
    found = draft(TRAFFIC, FLEET, accept=[shop.id], reject=[rule.id])
    program = read(found)
    assert permitted(program, FLEET[0], FLEET[3]) == NOTHING
    assert permitted(program, FLEET[1], FLEET[3]) == single(6, 80)
    assert permitted(program, FLEET[0], FLEET[4]) == single(6, 80)
    assert f"from: {shop.id}, to: {{app: log}}" in draft_text(found)


def test_decisions_hold_over_reruns_and_fit_only_what_there_is() -> None:
    before = draft(TRAFFIC, FLEET)
    rule, shop = before.rules[0], max(groups(before), key=lambda g: len(g.ends))
    first = draft(TRAFFIC, FLEET, accept=[shop.id], reject=[rule.id])
    again = draft(TRAFFIC, FLEET, decided={shop.id: "accepted", rule.id: "rejected"})
    assert again == first
    assert draft_text(again) == draft_text(first)
    reversed_ = draft(reversed(TRAFFIC), reversed([*FLEET]) and FLEET[::-1], accept=[shop.id], reject=[rule.id])
    assert draft_text(reversed_) == draft_text(first)
    assert draft(TRAFFIC, FLEET, decided={shop.id: "rejected"}, accept=[shop.id]).rules == draft(TRAFFIC, FLEET, accept=[shop.id]).rules
    assert draft(TRAFFIC, FLEET, decided={"group-000000": "accepted"}).stale == ("group-000000",)
    with pytest.raises(NotFound) as unknown:
        draft(TRAFFIC, FLEET, accept=[shop.id[:-1]])
    assert (unknown.value.code, unknown.value.hint) == ("draft.unknown", f"did you mean {shop.id}?")
    with pytest.raises(BadInput, match="accepted and rejected at once"):
        draft(TRAFFIC, FLEET, accept=[shop.id], reject=[shop.id])
    for wrong in (0, 1.1, float("nan")):
        with pytest.raises(BadInput, match="a similarity is above 0"):
            draft(TRAFFIC, FLEET, similarity=wrong)


# ---- properties

VALUES = st.sampled_from(("a", "b", "x y"))
PEOPLE = st.lists(
    st.builds(
        Subject, st.sampled_from([f"s{n}" for n in range(8)]), st.dictionaries(st.sampled_from(("app", "role", "env")), VALUES, max_size=3),
        nets=st.sampled_from(((), (), (), ("10.0.0.0/8",))),
    ),
    min_size=2, max_size=6, unique_by=lambda s: s.name,
)  # fmt: skip
FLOWS = st.lists(
    st.builds(
        flow, st.sampled_from([f"s{n}" for n in range(9)]), st.sampled_from([f"s{n}" for n in range(9)]), st.sampled_from((22, 80)),
        proto=st.sampled_from((6, 17)), time=st.integers(0, 9), verdict=st.sampled_from(("allow", "allow", "deny")),
    ) | st.builds(flow, st.sampled_from(("s0", "s1")), st.sampled_from(("s2", "s3")), st.none(), proto=st.sampled_from((1, 47))),
    max_size=25,
)  # fmt: skip


@given(PEOPLE, FLOWS, st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_drafted_is_what_was_seen(people: list[Subject], rows: list[FlowRecord], data: st.DataObject) -> None:
    before = draft(rows, people)
    ids = [p.id for p in groups(before)]
    accepted = data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []
    found = draft(rows, people, accept=accepted)
    program = read(found)
    by = {s.name: s for s in people}
    seen = {(r.src, r.dst, r.proto, r.port) for r in rows if r.verdict == "allow" and r.src != r.dst and r.src in by and r.dst in by}
    home = {name: side for rule in found.rules for side in (rule.src, rule.dst) for name in side.members}
    alike: dict[Any, PortMap] = {}
    for src, dst, proto, port in seen:
        key = (home[src].key, home[dst].key)
        alike[key] = alike.get(key, NOTHING) | single(proto, port)
    total = denied = 0
    for src, dst in itertools.permutations(people, 2):
        held = permitted(program, src, dst)
        ends = [home.get(s.name) for s in (src, dst)]
        wanted = alike.get(tuple(e.key for e in ends if e is not None), NOTHING) if all(ends) else NOTHING
        assert held == wanted, (src, dst)
        total += count_ports(held)
        denied += sum(
            held.allows(*key)
            for key in {(r.proto, r.port) for r in rows if (r.src, r.dst, r.verdict) == (src.name, dst.name, "deny")}
            if (src.name, dst.name, *key) not in seen
        )
    assert (found.observed, found.permitted, found.widened) == (len(seen), total, denied)
    assert {s.name for s in people} >= set(home)


@given(PEOPLE, FLOWS)
@settings(max_examples=60, deadline=None)
def test_ids_do_not_depend_on_how_often_or_when_something_was_seen(people: list[Subject], rows: list[FlowRecord]) -> None:
    later = [replace(r, time=r.time + DAY) for r in rows]
    assert {p.id for p in draft([*rows, *later], people).proposals} == {p.id for p in draft(rows, people).proposals}
