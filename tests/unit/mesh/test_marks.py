"""Foreign rules over our bit of the mark, as nft lists them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.marks import effect, foreign_marks

BIT = 0x0200_0000
MARK = {"meta": {"key": "mark"}}


def rule(value: Any, table: str = "other") -> dict[str, Any]:
    return {"rule": {"family": "inet", "table": table, "chain": "c", "handle": 4, "expr": [{"mangle": {"key": MARK, "value": value}}]}}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0x10, "overwrites"),
        (0, "overwrites"),
        (BIT, "may set"),
        ({"&": [MARK, 0xFF]}, "overwrites"),
        ({"|": [MARK, BIT]}, "may set"),
        ({"|": [{"&": [MARK, 0xFF]}, 0x10]}, "overwrites"),
        ({"^": [MARK, BIT]}, "may set"),
        ({"ct": {"key": "mark"}}, "may set"),
        ({"map": {"key": 1, "data": "@m"}}, "may set"),
        ("odd", "may set"),
        (True, "may set"),
        (None, "may set"),
    ],
)
def test_what_touches_our_bit_is_told(value: Any, word: str) -> None:
    (text,) = foreign_marks([rule(value)], "retinue", BIT)
    assert word in text
    assert "inet other c (handle 4)" in text
    assert foreign_marks([rule(value, "retinue"), rule(value, "retinue_rtn1")], "retinue", BIT) == []
    assert foreign_marks([rule(value, "retinuex")], "retinue", BIT) != []


@pytest.mark.parametrize("value", [MARK, {"|": [MARK, 0x10]}, {"&": [MARK, 0xFFFF_FF00]}, {"|": [{"&": [MARK, 0xFFFF_0000]}, 5]}, {"^": [MARK, 1]}])
def test_what_leaves_it_alone_is_not(value: Any) -> None:
    assert foreign_marks([rule(value)], "retinue", BIT) == []


def test_iptables_targets_are_told() -> None:
    listed = {"rule": {"family": "ip", "table": "mangle", "chain": "PREROUTING", "handle": 1, "expr": ["x", {"xt": {"type": "target", "name": "MARK"}}]}}
    assert "iptables" in foreign_marks([listed, {"metainfo": {}}, {"rule": None}], "retinue", BIT)[0]


@given(st.recursive(st.just(MARK) | st.integers(0, 0xFFFF_FFFF), lambda e: st.builds(lambda op, a, n: {op: [a, n]}, st.sampled_from("|&^"), e, st.integers(0, 0xFFFF_FFFF))), st.integers(0, 0xFFFF_FFFF))
def test_the_effect_covers_what_happens(expression: Any, mark: int) -> None:
    def run(e: Any) -> int:
        if e == MARK:
            return mark
        if isinstance(e, int):
            return e
        ((op, (one, n)),) = e.items()
        return {"|": lambda a: a | n, "&": lambda a: a & n, "^": lambda a: a ^ n}[op](run(one))

    sets, clears = effect(expression)
    after = run(expression)
    assert after & ~mark & ~sets == 0
    assert mark & ~after & ~clears == 0
