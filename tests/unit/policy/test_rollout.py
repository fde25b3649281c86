"""A canary decided by one revision, everybody else by another: composed into one program, judged by the one evaluator."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadInput
from policy.classes import Classes
from policy.compile import compile_policy
from policy.evaluate import evaluate, matches, permitted
from policy.language import load
from policy.ports import TCP
from policy.program import Everything, Subject
from policy.rollout import Canary, Staged, compose, sample

NOW = 1_900_000_000
HEAD = "meshpolicy: 1\nlabels: {keys: [role, env]}\n"
ROLES = ("web", "api", "db")
ENVS = ("prod", "test")
EVERYBODY = [Subject(f"{env}/{role}{n}", {"role": role, "env": env}) for env in ENVS for role in ROLES for n in (1, 2)]


def policy(*rules: str, guardrails: str = "", members: str = "", mode: str = "enforce"):
    text = HEAD
    if guardrails:
        text += f"guardrails:\n  - {guardrails}\n"
    text += f"segments:\n  - name: s\n    mode: {mode}\n" + (f"    members: {members}\n" if members else "") + "    allow:\n"
    text += "".join(f"      - {{id: r{n}, {rule}}}\n" for n, rule in enumerate(rules)) or "      []\n"
    return load([("p.yaml", text)])


RULES = st.builds(
    lambda s, d, p: f"from: {{role: {s}}}, to: {{role: {d}}}, on: tcp/{p}", st.sampled_from(ROLES), st.sampled_from(ROLES), st.integers(1, 3)
)
GUARDS = st.sampled_from(["", "deny: {id: G1, from: {env: test}, to: {env: prod}}", "deny: {id: G2, from: {role: web}, to: {role: db}}"])
MEMBERS = st.sampled_from(["", "{role: api}", "{env: prod}", "{role: [web, api]}"])


@st.composite
def policies(draw):
    members = draw(MEMBERS)
    audit = members and draw(st.booleans())
    return policy(*draw(st.lists(RULES, max_size=4)), guardrails=draw(GUARDS), members=members,
                  mode="{audit_until: 2031-03-01}" if audit else "enforce")  # fmt: skip


CANARIES = st.sampled_from([
    Canary.of(labels={"env": "test"}), Canary.of(["prod/api1"]), Canary.of(["prod/web1", "test/db2"]), Canary.of(everybody=True),
    Canary.of(labels={"env": "prod", "role": "api"}),
])  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(policies(), policies(), CANARIES)
def test_each_pair_is_decided_by_exactly_one_revision(old, new, canary) -> None:
    """Whichever host asks, a flow with an end in the canary is the new revision's, any other the old one's."""
    base, trial = compile_policy(old, NOW), compile_policy(new, NOW)
    both = compose(base, trial, canary.selector)
    classes = Classes(both, EVERYBODY)
    for src in EVERYBODY:
        for dst in EVERYBODY:
            if src is dst:
                continue
            mine = trial if matches(canary.selector, src) or matches(canary.selector, dst) else base
            wanted = permitted(mine, src, dst)
            assert permitted(both, src, dst) == wanted, (src.name, dst.name)
            assert classes.permitted(src.name, dst.name) == wanted
            for port in (1, 3, 9):
                one, other = evaluate(both, src, dst, TCP, port), evaluate(mine, src, dst, TCP, port)
                assert (one.verdict, one.audited) == (other.verdict, other.audited)


def test_a_rule_of_the_trial_says_that_it_is_one() -> None:
    old, new = policy("from: {role: web}, to: {role: api}, on: tcp/1"), policy("from: {role: web}, to: {role: api}, on: tcp/2")
    program = Staged(old, new, Canary.of(["prod/api1"])).program(NOW)
    web, api, other = (next(s for s in EVERYBODY if s.name == n) for n in ("prod/web1", "prod/api1", "prod/api2"))
    assert "p.yaml@trial:" in evaluate(program, web, api, TCP, 2).reason
    assert "p.yaml:" in evaluate(program, web, other, TCP, 1).reason
    assert not evaluate(program, web, api, TCP, 1).allowed


def test_everybody_is_the_trial_alone() -> None:
    old, new = policy("from: {role: web}, to: {role: api}, on: tcp/1"), policy()
    assert Staged(old, new, Canary.of(everybody=True)).program(NOW) == compile_policy(new, NOW)
    assert Staged(old).program(NOW) == compile_policy(old, NOW)


def test_the_earlier_end_counts() -> None:
    old = policy("from: {role: web}, to: {role: api}, on: tcp/1", members="{role: api}", mode="{audit_until: 2031-03-01}")
    new = policy("from: {role: web}, to: {role: api}, on: tcp/1", members="{role: api}", mode="{audit_until: 2031-02-01}")
    both = Staged(old, new, Canary.of(["prod/api1"]))
    assert both.next_change(NOW) == Staged(new).next_change(NOW)
    assert Staged(old).next_change(NOW) > both.next_change(NOW)


def test_a_sample_grows_and_never_swaps() -> None:
    names = [f"w{n}" for n in range(200)]
    small, large = sample(names, 10, "r1"), sample(names, 50, "r1")
    assert len(small) == 20
    assert len(large) == 100
    assert small < large
    assert sample(names, 10, "r2") != small
    assert len(sample(names[:3], 1, "r")) == 1
    with pytest.raises(BadInput, match="1 to 100"):
        sample(names, 0, "r")


@pytest.mark.parametrize("given", [{}, {"names": ["a"], "everybody": True}, {"names": ["a"], "labels": {"a": "b"}}])
def test_a_canary_is_chosen_one_way(given) -> None:
    with pytest.raises(BadInput) as e:
        Canary.of(**given)
    assert e.value.code == "rollout.canary"


def test_a_canary_is_bounded_and_its_labels_are_labels() -> None:
    with pytest.raises(BadInput, match="at most"):
        Canary.of(f"w{n}" for n in range(20_001))
    with pytest.raises(BadInput) as e:
        Canary.of(labels={"A B": "x"})
    assert e.value.code == "label.key"
    assert str(Canary.of(labels={"env": "test"})) == "env=test"
    assert str(Canary.of(["a", "b"])) == "2 identities"
    assert str(Canary.of(everybody=True)) == "everybody"
    assert Canary.of(everybody=True).selector == Everything()
