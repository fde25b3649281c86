from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadPolicy
from policy.imported import ImportedPolicy, dump_imported, load_imported
from policy.ports import ANYTHING, PortMap, mask
from policy.program import (
    Action,
    AllOf,
    AnyOf,
    Everything,
    Exists,
    In,
    Named,
    Nets,
    Not,
    Nothing,
    Program,
    Rule,
    Selector,
    Tier,
    Under,
    Where,
)  # fmt: skip

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
words = (
    st.sampled_from(
        ["web", "no", "null", "a: b", "tag:x", "1", "[x]", "", " pad ", "é", "*", "#c", "a (2)", "x[Pod]"]
    )
    | texts
)
nets = st.sampled_from(["10.0.0.0/8", "10.0.0.1-10.0.0.9", "fd00::/8", "0.0.0.0/0", "1.1.1.1"])
names = st.frozensets(words, min_size=1, max_size=40)
selectors: st.SearchStrategy[Selector] = st.recursive(
    st.sampled_from([Everything(), Nothing()])
    | names.map(Named)
    | words.filter(bool).map(Under)
    | words.filter(bool).map(Exists)
    | st.builds(In, words.filter(bool), st.frozensets(words, max_size=3))
    | st.builds(
        Nets, st.lists(nets, min_size=1, max_size=3).map(tuple), st.lists(nets, max_size=2).map(tuple)
    ),
    lambda inner: (
        inner.map(Not)
        | st.lists(inner, max_size=3).map(lambda t: AllOf(tuple(t)))
        | st.lists(inner, max_size=3).map(lambda t: AnyOf(tuple(t)))
    ),
    max_leaves=6,
)
ports = st.sampled_from([
    ANYTHING, PortMap({6: mask(80, 443)}), PortMap({1: 1, 17: mask(53, 53) | mask(1, 2), 47: 1}), ANYTHING - PortMap({6: mask(22, 22), 1: 1}),
])  # fmt: skip
rules = st.builds(
    Rule, id=words.filter(bool), action=st.sampled_from(Action), src=selectors, dst=selectors, ports=ports,
    where=st.none() | st.builds(Where, words.filter(bool), st.integers(1, 99), st.integers(0, 99)), why=words,
    directions=st.sampled_from([("egress",), ("ingress",), ("egress", "ingress")]), concerns=st.none() | selectors,
)  # fmt: skip
tiers = st.builds(
    Tier, name=words.filter(bool), rules=st.lists(rules, max_size=4, unique_by=lambda r: r.id).map(tuple),
    order=st.sampled_from(["first-match", "deny-wins"]), otherwise=st.sampled_from(Action),
    isolates=st.dictionaries(st.sampled_from(["egress", "ingress"]), selectors),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(tiers, max_size=1).map(tuple),
    st.sampled_from([Action.ALLOW, Action.DENY]),
    st.dictionaries(words.filter(bool), selectors, max_size=3),
)
def test_what_is_written_is_read_back(
    program: tuple[Tier, ...], default: Action, groups: dict[str, Selector]
) -> None:
    text = dump_imported(ImportedPolicy(Program(program, default), "any source", groups))
    back = load_imported("p.yaml", text)
    assert back.program.tiers == program
    assert back.program.default is default
    assert dict(back.groups) == groups
    assert back.source == "any source"
    assert len(back.program.digest) == 64
    assert dump_imported(back) == text


def test_groups_are_written_by_name_where_they_are_used() -> None:
    ops = In("user", frozenset({"ann"}))
    same = In("user", frozenset({"ann"}))
    rule = Rule("r", Action.ALLOW, ops, AnyOf((same, Exists("x"))))
    text = dump_imported(ImportedPolicy(Program((Tier("t", (rule,)),)), "s", {"group:ops": ops}))
    assert 'src: {group: "group:ops"}' in text
    assert (
        "dst: {any: [{label: user, in: [ann]}, {has: x}]}" in text
    )  # equal, but written otherwise by its author


def test_long_selectors_are_broken_into_lines() -> None:
    many = Named(frozenset(f"namespace-{i}/workload-{i}" for i in range(30)))
    rule = Rule("r", Action.ALLOW, AllOf((many, Not(AnyOf((many, Exists("x")))))), many)
    text = dump_imported(ImportedPolicy(Program((Tier("t", (rule,), isolates={"ingress": many}),)), "s"))
    assert max(map(len, text.splitlines())) <= 120
    assert load_imported("p", text).program.tiers[0].rules[0] == rule


HEAD = "importedpolicy: 1\nsource: x\ndefault: deny\n"
RULE = (
    HEAD
    + "tiers:\n  - name: t\n    order: deny-wins\n    rules:\n      - {id: a, action: allow, src: everybody, dst: nobody%s}\n"
)


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        ("importedpolicy: 2\nsource: x\ndefault: deny\ntiers: []", 1, "policy.version"),
        (HEAD, 1, "policy.missing_key"),
        (HEAD.replace("deny", "pass") + "tiers: []", 3, "policy.value"),
        (HEAD + "tiers: [{name: t, order: random, rules: []}]", 4, "policy.value"),
        (HEAD + "tiers: [{name: t, order: deny-wins, otherwise: maybe, rules: []}]", 4, "policy.value"),
        (
            HEAD + "tiers: [{name: t, order: deny-wins, isolates: {sideways: everybody}, rules: []}]",
            4,
            "policy.unknown_key",
        ),
        (RULE % ", ports: [tcp/0]", 8, "port.range"),
        (RULE % ", ports: {any: []}", 8, "policy.unknown_key"),
        (RULE % ", directions: [up]", 8, "policy.value"),
        (RULE % ", where: here", 8, "policy.where"),
        (RULE % ", concerns: everyone", 8, "policy.selector"),
        (RULE % ", concerns: {group: no}", 8, "policy.unknown_group"),
        (RULE % ", concerns: {has: a, not: everybody}", 8, "policy.selector"),
        (RULE % ", concerns: {}", 8, "policy.selector"),
        (RULE % ", concerns: {nets: [x]}", 8, "net.form"),
        (RULE % ", concerns: {nets: []}", 8, "policy.empty"),
        (RULE % ", concerns: {name: []}", 8, "policy.empty"),
        (RULE % ", concerns: {name: [[x]]}", 8, "policy.type"),
        (
            RULE % "" + "      - {id: a, action: deny, src: everybody, dst: nobody}\n",
            9,
            "policy.duplicate_id",
        ),
        (RULE % ", action: explode".replace("action", "colour"), 8, "policy.unknown_key"),
    ],
)
def test_refusals_have_a_position(text: str, line: int, code: str) -> None:
    with pytest.raises(BadPolicy) as caught:
        load_imported("p.yaml", text)
    assert (caught.value.code, caught.value.line) == (code, line)
