from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from policy.nets import V6, address, cells, covers, cut_points, merge, parse_range, ranges_of, show, subtract
from policy.program import Action, AllOf, Everything, Nets, Not, Program, Rule, Tier

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda p: (min(p), max(p))), max_size=5)


def _set(parts):
    return {n for low, high in parts for n in range(low, high + 1)}


@given(spans, spans)
def test_ranges_are_sets(one, other):
    assert _set(merge(one)) == _set(one)
    assert _set(subtract(one, other)) == _set(one) - _set(other)
    assert covers(merge(one), merge(other)) == (_set(other) <= _set(one))
    pieces = cells(one, {high + 1 for _, high in other} | {low for low, _ in other})
    assert _set(pieces) == _set(one)
    for low, high in pieces:
        for a, b in merge(other):
            inside = set(range(low, high + 1)) & set(range(a, b + 1))
            assert not inside or len(inside) == high - low + 1


@pytest.mark.parametrize("text", ["10.0.0.0/8", "10.0.0.1", "10.0.0.1-10.0.0.9", "2001:db8::/32", "::1", "0.0.0.0/0", "::/0"])
def test_round_trip(text):
    (span,) = parse_range(text)
    assert show(span) == text


def test_forms():
    assert parse_range("10.1.2.3/8") == parse_range("10.0.0.0/8")
    assert len(parse_range("*")) == 2
    assert address("::") == V6
    assert merge([(0, (1 << 32) - 1), (V6, V6 + 1)]) == ((0, (1 << 32) - 1), (V6, V6 + 1))
    assert ranges_of(("10.0.0.0/8",), ("10.0.0.0/9",)) == parse_range("10.128.0.0/9")


@pytest.mark.parametrize("text", ["", "10.0.0.256", "10.0.0.0/33", "b-a", "10.0.0.9-10.0.0.1", "10.0.0.1-::1", "example.org"])
def test_bad_ranges_are_refused(text):
    with pytest.raises(BadInput) as caught:
        parse_range(text)
    assert caught.value.code == "net.form"


def test_cut_points_come_from_every_selector_of_a_program():
    rule = Rule("r", Action.ALLOW, Nets(("0.0.0.2",)), Not(Nets(("0.0.0.4",))), concerns=AllOf((Nets(("0.0.0.6",)),)))
    tier = Tier("t", (rule, Rule("e", Action.ALLOW, Everything(), Everything())), isolates={"egress": Nets(("0.0.0.8",))})
    assert cut_points(Program((tier,))) == (2, 3, 4, 5, 6, 7, 8, 9)
