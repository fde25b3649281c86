"""Over- and under-segmentation as numbers, with budgets that fail the lint."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from policy.compile import compile_policy
from policy.evaluate import permitted
from policy.language import load
from policy.lint import Flow, lint
from policy.program import Subject
from policy.segmentation import numbers

NOW = 1_900_000_000
HEAD = "meshpolicy: 1\nlabels: {keys: [role, app]}\n"
ROLES = ("web", "api", "db", "job")
ALL = [Subject(f"shop/{role}{n}", {"role": role, "app": "shop"}) for role in ROLES for n in range(3)]


def measure(text: str, flows=None, subjects=ALL):
    policy = load([("p.yaml", HEAD + text)])
    return numbers(policy, compile_policy(policy, NOW), subjects, flows)


def codes(text: str, flows=None):
    policy = load([("p.yaml", HEAD + text)])
    used = None if flows is None else [Flow(*f, NOW) for f in flows]
    return [(f.code, f.severity) for f in lint(policy, ALL, NOW, used)]


WEB_API = "segments:\n  - name: s\n    members: {role: api}\n%s    allow:\n      - {id: a, from: {role: web}, to: {role: api}, on: tcp/80}\n"
SEEN = [("shop/web0", "shop/api0", 6, 80)]


def test_under_segmentation_is_a_ratio_with_a_budget() -> None:
    found = measure(WEB_API % "", SEEN)
    (one,) = found.segments
    assert (one.members, one.pairs, one.used, one.rules) == (3, 9, 1, 1)
    assert one.unused is not None
    assert abs(one.unused - 8 / 9) < 1e-9
    assert one.under
    assert not found.good
    assert measure(WEB_API % "").segments[0].unused is None
    assert measure(WEB_API % "").good
    assert ("L05", "info") in codes(WEB_API % "", SEEN)
    assert ("L05", "error") in codes(WEB_API % "    budget: {unused_ratio: 0.5}\n", SEEN)
    assert ("L05", "error") not in codes(WEB_API % "    budget: {unused_ratio: 0.9}\n", SEEN)


def test_over_segmentation_is_a_share_of_groups() -> None:
    groups = "groups:\n" + "".join(f"  g{n}: {{workload: shop/web{n}}}\n" for n in range(3)) + "  web: {role: web}\n  db: {role: db}\n"
    found = measure(groups)
    assert set(found.alone) == {"g0", "g1", "g2"}
    assert found.over >= 0.6
    assert not found.good
    assert ("L07", "warning") in codes(groups)


def test_groups_that_the_policy_does_not_tell_apart() -> None:
    text = "groups:\n  db: {role: db}\n  job: {role: job}\n  web: {role: web}\n" + WEB_API % ""
    found = measure(text)
    assert found.same == (("db", "job"),)
    assert found.rights == 3
    assert ("L07", "info") in codes(text)
    apart = text + "      - {id: b, from: {role: job}, to: {role: api}, on: tcp/81}\n"
    assert measure(apart).same == ()


def test_the_complexity_budget_fails_the_check() -> None:
    rules = "".join(f"      - {{id: r{n}, from: {{role: web}}, to: {{role: api}}, on: tcp/{n + 100}}}\n" for n in range(3))
    text = WEB_API % "    budget: {rules: 3}\n" + rules
    assert ("L14", "error") in codes(text)
    assert measure(text).segments[0].over
    assert ("L14", "error") not in codes(WEB_API % "    budget: {rules: 3}\n")


def test_nothing_is_within_every_budget() -> None:
    found = measure("")
    assert (found.groups, found.over, found.reach, found.good) == (0, 0.0, 0.0, True)
    assert measure("", subjects=[]).reach == 0.0


RULE = st.tuples(st.sampled_from(ROLES), st.sampled_from(ROLES))


@settings(max_examples=40, deadline=None)
@given(st.lists(RULE, max_size=4), st.sampled_from(ROLES), st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_the_counts_are_those_of_a_plain_count(rules, members, seen) -> None:
    text = f"segments:\n  - name: s\n    members: {{role: {members}}}\n    allow:\n"
    text += "".join(f"      - {{id: r{n}, from: {{role: {a}}}, to: {{role: {b}}}, on: tcp/80}}\n" for n, (a, b) in enumerate(rules)) or "      []\n"
    flows = [(ALL[a].name, ALL[b].name, 6, 80) for a, b in seen]
    policy = load([("p.yaml", HEAD + text)])
    program = compile_policy(policy, NOW)
    mine = {s.name for s in ALL if s.labels["role"] == members}
    pairs = {(a.name, b.name) for a, b in itertools.permutations(ALL, 2) if permitted(program, a, b) and mine & {a.name, b.name}}
    (one,) = numbers(policy, program, ALL, flows).segments
    assert one.pairs == len(pairs)
    assert one.used == len(pairs & {f[:2] for f in flows})
    everything = sum(bool(permitted(program, a, b)) for a in ALL for b in ALL)
    assert abs(numbers(policy, program, ALL).reach - everything / len(ALL) ** 2) < 1e-9
