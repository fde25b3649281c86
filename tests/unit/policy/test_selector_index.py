"""policy.selector_index: nothing that counts is left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policy.algebra import implies
from policy.evaluate import matches
from policy.program import AllOf, AnyOf, Everything, Exists, In, Named, Not, Nothing, Selector, Subject, Under
from policy.selector_index import SelectorIndex, SubjectIndex

KEYS, VALUES = ("a", "b"), ("x", "y", "z")
labels = st.builds(In, st.sampled_from(KEYS), st.frozensets(st.sampled_from(VALUES), min_size=1))
plain: st.SearchStrategy[Selector] = st.one_of(
    labels, labels, st.just(Everything()), st.just(Nothing()), st.builds(Exists, st.sampled_from(KEYS)),
    st.builds(Named, st.frozensets(st.sampled_from(["t/1", "t/2"]), min_size=1)), st.just(Under("t")),
)  # fmt: skip
selectors = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds(Not, inner), st.builds(AllOf, st.lists(inner, max_size=3).map(tuple)), st.builds(AnyOf, st.lists(inner, max_size=3).map(tuple))
    ),
    max_leaves=6,
)
subjects = st.lists(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=6).map(
    lambda found: [Subject(f"t/{number}", one) for number, one in enumerate(found)]
)


@given(st.lists(selectors, max_size=8), selectors)
def test_all_that_a_selector_implies_is_found(known: list[Selector], one: Selector) -> None:
    found = list(SelectorIndex(known).implied_by(one))
    assert found == sorted(set(found))
    assert {n for n, other in enumerate(known) if implies(one, other)} <= set(found)


@given(subjects, st.lists(selectors, max_size=4))
def test_somebody_is_found_where_there_is_one(known: list[Subject], asked: list[Selector]) -> None:
    index = SubjectIndex(known)
    for one in (*asked, *asked):
        assert index.any(one) is any(matches(one, subject) for subject in known)


def test_what_asks_for_another_label_is_left_out() -> None:
    known = [In("a", frozenset({f"v{n}"})) for n in range(100)]
    assert list(SelectorIndex(known).implied_by(AllOf((known[7], In("b", frozenset({"x"})))))) == [7]
