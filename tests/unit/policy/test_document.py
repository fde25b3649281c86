from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadPolicy
from policy import document
from policy.document import MAX_CHARS, nearest, parse


def _error(text):
    with pytest.raises(BadPolicy) as caught:
        parse("f.yaml", text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("", "policy.empty", 1, 1),
        ("# only a comment\n", "policy.empty", 1, 1),
        ("a: &x 1", "policy.alias", 1, 4),
        ("a: [1]\nb: *x", "policy.alias", 2, 4),
        ("a: !!python/object:os.system {}", "policy.tag", 1, 4),
        ("a: !x y", "policy.tag", 1, 4),
        ("a: 1\nb: 2\na: 3", "policy.duplicate_key", 3, 1),
        ("? [a]\n: b", "policy.type", 1, 3),
        ("a: 1\n---\nb: 1", "policy.documents", 2, 1),
        ("[" * 30, "policy.too_deep", 1, 25),
        ("a: ]", "policy.syntax", 1, 4),
        ("a:\n\t- b", "policy.syntax", 2, 1),
    ],
)
def test_refusals_have_their_position(text, code, line, column):
    error = _error(text)
    assert (error.code, error.line, error.column) == (code, line, column)
    assert error.file == "f.yaml"


def test_bombs_and_broken_text_are_refused():
    assert _error("x" * (MAX_CHARS + 1)).code == "policy.too_large"
    assert _error("[" * 200_000).code == "policy.too_deep"
    assert _error("- " * 200_000).code == "policy.too_deep"
    assert _error("a: \x00").code == "policy.syntax"
    assert _error("\ud800").code == "policy.encoding"


def test_the_pure_reader_says_the_same(monkeypatch):
    monkeypatch.setattr(document, "_LOADER", yaml.SafeLoader)
    assert parse("f", "a: [1, {b: 'c'}]").entries["a"][1].items[1].entries["b"][1].text == "c"
    assert _error("a: 1\nb: \x07").code == "policy.syntax"
    assert _error("a: 1\nb: \x07").line == 2
    assert _error("\ud800").code in {"policy.encoding", "policy.syntax"}


def test_scalars_stay_text():
    top = parse("f", "a: no\nb: 1_000\nc: 2031-02-11\nd: ~\ne:\nf: ''\n").mapping("top")
    assert [top[k].text for k in "abc"] == ["no", "1_000", "2031-02-11"]
    assert [top[k].null for k in "adef"] == [False, True, True, False]


def test_readers_refuse_the_wrong_shape():
    top = parse("f", "s: x\nl: [a]\nm: {a: b}\nn:\ni: 70\nt: abc\nz: []\n").mapping("top")
    cases = [
        (lambda: top["l"].scalar("it"), "policy.type"),
        (lambda: top["n"].scalar("it"), "policy.empty"),
        (lambda: top["s"].sequence("it"), "policy.type"),
        (lambda: top["n"].one_or_more("it"), "policy.empty"),
        (lambda: top["z"].one_or_more("it"), "policy.empty"),
        (lambda: top["s"].mapping("it"), "policy.type"),
        (lambda: top["m"].mapping("it", {"b"}), "policy.unknown_key"),
        (lambda: top["m"].mapping("it", {"a"}, {"c"}), "policy.missing_key"),
        (lambda: top["i"].integer("it", 1, 60), "policy.number"),
        (lambda: top["t"].integer("it", 1, 60), "policy.number"),
    ]
    for call, code in cases:
        with pytest.raises(BadPolicy) as caught:
            call()
        assert caught.value.code == code
    assert top["i"].integer("it", 1, 70) == 70
    assert [n.text for n in top["s"].one_or_more("it")] == ["x"]


def test_hints_name_the_nearest_word():
    assert nearest("alow", {"allow", "deny"}) == "did you mean allow?"
    assert nearest("zzz", {"allow", "deny"}) == "known: allow, deny"
    assert nearest("zzz", ()) == ""


@given(st.text(max_size=80) | st.text(alphabet=":-[]{}#&*!|>'\"%@`,?\n ab01", max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_is_refused(text):
    code = "policy."
    try:
        parse("f", text)
    except BadPolicy as error:
        code = error.code
    assert code.startswith("policy.")
