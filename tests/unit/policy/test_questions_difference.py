"""What changes, found by groups and by the rules that are other ones, against every pair of the two matrices."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from policy import questions
from policy.ports import NOTHING, PortMap, parse_ports
from policy.program import Action, Audit, In, Program, Rule, Subject, Tier
from policy.questions import Difference, difference, matrix, what_if
from tests.unit.policy.test_random_programs import (
    KEYS,
    VALUES,
    inside,
    outside,
    port_maps,
    programs,
    rules,
    selectors,
)

audits = st.builds(Audit, st.just("s"), selectors, st.just(5), st.none() | selectors, concerns=st.none() | selectors)
everybody = st.lists(st.one_of(inside, inside, inside, outside), max_size=7, unique_by=lambda s: s.name)
labels = st.dictionaries(st.sampled_from(KEYS), st.none() | st.sampled_from(VALUES), max_size=2)


def by_pairs(before: Program, after: Program, subjects: Sequence[Subject], later: Sequence[Subject]) -> list[Difference]:
    """Everything that is allowed before and after, compared."""

    def pairs(program: Program, known: Sequence[Subject]) -> dict[tuple[str, str], PortMap]:
        out: dict[tuple[str, str], PortMap] = {}
        for row in matrix(program, known):
            ends = (row.src + (f"[{row.src_net}]" if row.src_net else ""), row.dst + (f"[{row.dst_net}]" if row.dst_net else ""))
            out[ends] = out.get(ends, NOTHING) | row.ports
        return out

    old, new = pairs(before, subjects), pairs(after, later)
    found = []
    for pair in sorted(old.keys() | new.keys()):
        had, has = old.get(pair, NOTHING), new.get(pair, NOTHING)
        found += [Difference("gains", *pair, has - had)] if has - had else []
        found += [Difference("loses", *pair, had - has)] if had - has else []
    return found


@st.composite
def changed(draw: st.DrawFn) -> tuple[Program, Program]:
    """A program and one with some rules more, fewer, other or elsewhere; both with the same audits, or not."""
    before: Program = draw(programs)
    before = replace(before, audits=tuple(draw(st.lists(audits, max_size=2))), held=draw(selectors))
    dice = random.Random(draw(st.integers(0, 1 << 32)))
    tiers = []
    for tier in before.tiers:
        kept = [rule for rule in tier.rules if dice.random() < 0.8]
        kept = [replace(rule, ports=draw(port_maps)) if dice.random() < 0.3 else rule for rule in kept]
        if dice.random() < 0.3:
            kept.insert(dice.randrange(len(kept) + 1), draw(rules))
        if dice.random() < 0.3:
            dice.shuffle(kept)
        tiers.append(replace(tier, rules=tuple(kept)))
    after = replace(before, tiers=tuple(tiers), digest="after")
    return before, after if dice.random() < 0.8 else replace(after, audits=())


@given(changed(), everybody)
@settings(max_examples=400, deadline=None)
def test_the_difference_is_that_of_all_pairs(both: tuple[Program, Program], subjects: list[Subject]) -> None:
    assert difference(*both, subjects) == by_pairs(*both, subjects, subjects)


@given(changed(), everybody, everybody)
@settings(max_examples=300, deadline=None)
def test_with_another_inventory_too(both: tuple[Program, Program], subjects: list[Subject], new: list[Subject]) -> None:
    later = [*subjects[: len(subjects) // 2], *(s for s in new if s.name not in {o.name for o in subjects[: len(subjects) // 2]})]
    wanted = by_pairs(*both, subjects, later)
    assert difference(*both, subjects, later) == wanted
    kept = questions.MAX_MOVED
    questions.MAX_MOVED = 0  # type: ignore[misc]  # every group is looked at then
    try:
        assert difference(*both, subjects, later) == wanted
    finally:
        questions.MAX_MOVED = kept  # type: ignore[misc]  # as it was


@given(changed(), everybody, st.sampled_from(("shop/web", "pay/db", "new", "office")), labels)
@settings(max_examples=300, deadline=None)
def test_what_if_is_the_difference_of_two_inventories(
    both: tuple[Program, Program], subjects: list[Subject], name: str, wanted: dict[str, str | None]
) -> None:
    program = both[0]
    found = next((s for s in subjects if s.name == name), Subject(name))
    merged = {k: v for k, v in {**found.labels, **wanted}.items() if v is not None}
    later = [*(s for s in subjects if s.name != name), replace(found, labels=merged)]
    assert what_if(program, subjects, name, wanted) == by_pairs(program, program, subjects, later)


A, B = Subject("a", {"app": "a"}), Subject("b", {"app": "b"})
TO_B, TO_A = (Rule("r", Action.ALLOW, In("app", frozenset({s})), In("app", frozenset({d})), parse_ports("tcp/1")) for s, d in ("ab", "ba"))


def test_rules_in_another_order_are_other_rules_where_the_order_counts() -> None:
    deny = replace(TO_B, id="d", action=Action.DENY)
    first, then = (Program((Tier("t", order, "first-match"),)) for order in ((TO_B, deny), (deny, TO_B)))
    assert difference(first, then, (A, B)) == [Difference("loses", "a", "b", TO_B.ports)]
    first, then = (Program((Tier("t", order),)) for order in ((TO_B, deny), (deny, TO_B)))
    assert difference(first, then, (A, B)) == []


def test_a_rule_of_one_direction_may_let_an_audit_open_the_other() -> None:
    before = Program((Tier("t", ()),), audits=(Audit("s", TO_B.src, 5),))
    after = replace(before, tiers=(Tier("t", (TO_A,)),))
    found = difference(before, after, (A, B))
    assert [(d.kind, d.src, d.dst) for d in found] == [("gains", "a", "b"), ("gains", "b", "a")]
    assert found == by_pairs(before, after, (A, B), (A, B))
