from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.importers.model import Source, SourceRefused
from policy.importers.tailscale.hujson import parse_hujson

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values, st.sampled_from([None, 1, "\t"]))
def test_reads_every_json_text_as_json_does(value: object, indent: int | str | None) -> None:
    assert parse_hujson("f", json.dumps(value, indent=indent), Source()) == value


@given(st.text(alphabet='{}[]",:/*\\ \n0aeu-.tfn', max_size=40))
def test_any_text_is_read_or_refused_with_a_position(text: str) -> None:
    refusal: SourceRefused | None = None
    try:
        parse_hujson("p.hujson", text, Source())
    except SourceRefused as error:
        refusal = error
    if refusal is not None:
        assert refusal.message.startswith("p.hujson:")
        assert refusal.code == "import.syntax"


def test_comments_and_trailing_commas() -> None:
    text = '// top\n{ /* a\n b */ "a": [1, 2, /* end */ ], // "x": 1\n  "b": {"c": null,},\n}\n// end'
    source = Source()
    value = parse_hujson("f", text, source)
    assert value == {"a": [1, 2], "b": {"c": None}}
    assert str(source.where(value)) == "f:2"
    where = source.where(value["b"])
    assert where is not None
    assert (where.line, where.column) == (4, 8)
    assert source.where([]) is None


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("", 1, 1, "ends too early"),
        ('{"a": 1', 1, 8, "ends too early"),
        ('{"a": 1,\n "a": 2}', 2, 2, "'a' is given twice"),
        ("{a: 1}", 1, 2, "key must be a string"),
        ('{"a" 1}', 1, 6, "colon is missing"),
        ("[1 2]", 1, 4, "comma or closing bracket"),
        ("[1,,]", 1, 4, "unexpected ','"),
        ("[,]", 1, 2, "unexpected ','"),
        ('["a\nb"]', 1, 2, "not closed"),
        ('["\\x"]', 1, 2, "bad escape"),
        ("[1] 2", 1, 5, "follows the end"),
        ("/* open", 1, 1, "comment is not closed"),
        ("[01]", 1, 3, "comma or closing bracket"),
        (f"[{'1' * 65}]", 1, 2, "unexpected '1'"),
        ("[" * 70, 1, 66, "nested deeper"),
    ],
)
def test_refusals_name_the_position(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        parse_hujson("p", text, Source())
    assert caught.value.message.startswith(f"p:{line}:{column}: ")
    assert words in caught.value.message
    assert caught.value.exit == 1
