from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from policy.algebra import implies, witness, witnesses
from policy.evaluate import matches
from policy.program import AllOf, AnyOf, Everything, Exists, In, Named, Nets, Not, Nothing, Subject, Under

KEYS, VALUES, NAMES = ("a", "b"), ("x", "y"), ("s/w", "s/a", "t")
leaves = st.one_of(
    st.builds(In, st.sampled_from(KEYS), st.frozensets(st.sampled_from(VALUES))),
    st.builds(Exists, st.sampled_from(KEYS)),
    st.builds(Named, st.frozensets(st.sampled_from(NAMES))),
    st.builds(Under, st.sampled_from(("s", "s/w", "t"))),
    st.sampled_from((Everything(), Nothing(), Nets(("10.0.0.0/8",)), Nets(("10.1.0.0/16",)))),
)
selectors = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(AllOf, st.lists(inner, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, max_size=3).map(tuple)),
    ),
    max_leaves=4,
)
SUBJECTS = [
    Subject(name, {k: v for k, v in (("a", a), ("b", b)) if v})
    for name in (*NAMES, "s", "u/v") for a in ("", "x", "y", "z") for b in ("", "x", "z")
]  # fmt: skip


@given(selectors, selectors)
@settings(max_examples=500, deadline=None)
def test_what_is_said_to_imply_does(one, other):
    if implies(one, other):
        assert all(matches(other, s) for s in SUBJECTS if matches(one, s))


@given(selectors)
@settings(max_examples=300, deadline=None)
def test_a_witness_is_selected(selector):
    for one in witnesses(selector, "free", {"t"}):
        assert matches(selector, one)
        assert one.name != "t"
        assert not one.nets


def _in(key, *values):
    return In(key, frozenset(values))


def test_plain_implications_are_seen():
    both = AllOf((_in("a", "x"), _in("b", "y")))
    yes = [
        (both, _in("a", "x", "y")),
        (both, Exists("b")),
        (both, both),
        (both, AnyOf((Nothing(), _in("b", "y")))),
        (_in("a", "x"), Not(_in("a", "y"))),
        (Named(frozenset({"s/w"})), Under("s")),
        (Under("s/w"), Under("s")),
        (Not(Exists("a")), Not(_in("a", "x"))),
        (AnyOf((_in("a", "x"), _in("a", "y"))), Exists("a")),
        (Nothing(), _in("a", "x")),
        (Nets(("10.1.0.0/16",)), Nets(("10.0.0.0/8",))),
        (both, AllOf((Exists("a"), Exists("b")))),
    ]
    no = [
        (Exists("a"), _in("a", "x")),
        (_in("a", "x"), _in("b", "x")),
        (Under("s"), Under("s/w")),
        (Under("s"), Named(frozenset({"s"}))),
        (Named(frozenset({"t", "s/w"})), Under("s")),
        (Everything(), Exists("a")),
        (_in("a", "x"), Not(_in("a", "x"))),
    ]
    assert all(implies(a, b) for a, b in yes)
    assert not any(implies(a, b) for a, b in no)


def test_witnesses_are_found_where_they_exist():
    assert witness(AllOf((_in("a", "x"), Under("s"), Not(Exists("b")))), "n") == Subject("s/any", {"a": "x"})
    assert witness(AllOf((_in("a", "x"), _in("a", "y"))), "n") is None
    assert witness(Named(frozenset({"t"})), "n", {"t"}) is None
    assert witness(Nothing(), "n") is None
    assert [s.labels["a"] for s in witnesses(_in("a", "x", "y"), "n")] == ["x", "y"]
