from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadPolicy, Bug
from policy import format as formatter
from policy.document import parse
from policy.format import fmt, same

UNTIDY = """\
meshpolicy:   1   # the version



# groups follow
groups:
    web:    { app: shop , role:  [ a ,b ] }   # comment # two
    api :  {app: api,   # kept
            role:   x }
segments:
  -   name: s
      why: >
        folded text

        with  spaces
      allow: [ ]
      note: "a,  b:  {c }"


"""
TIDY = """\
meshpolicy:   1   # the version

# groups follow
groups:
    web:    {app: shop, role: [a, b]}   # comment # two
    api :  {app: api,   # kept
            role: x}
segments:
  -   name: s
      why: >
        folded text

        with  spaces
      allow: []
      note: "a,  b:  {c }"
"""


def test_spacing_is_evened_and_comments_stay():
    assert fmt("p", UNTIDY) == TIDY
    assert fmt("p", TIDY) == TIDY


def test_columns_outside_brackets_are_left_alone():
    text = "a:\n  -   b: 1\n      c: 2\n"
    assert fmt("p", text) == text


def test_line_ends_and_empty_lines():
    assert fmt("p", "a: 1  \r\n\r\n\r\n\r\nb: 2\r\n\r\n") == "a: 1\n\nb: 2\n"
    assert fmt("p", "a: |\n  x  \n\n\n\n  y\nb: 1") == "a: |\n  x  \n\n\n\n  y\nb: 1\n"
    with pytest.raises(BadPolicy):
        fmt("p", "a: [")


def test_a_result_that_would_mean_something_else_is_not_returned(monkeypatch):
    monkeypatch.setattr(formatter, "_tidy_lines", lambda text: text.replace("1", "2"))
    with pytest.raises(Bug):
        fmt("p", "a: 1\n")
    monkeypatch.setattr(formatter, "_tidy_lines", lambda text: text.replace("# c", "# d"))
    with pytest.raises(Bug):
        fmt("p", "a: 1 # c\n")


@pytest.mark.parametrize("text", [">\n 1", "a: |+\n  x\n\n\n", "a: |\n  x", "a: |-\n  x\n\n", "a: >\n  x\n\n\nb: 1\n"])
def test_block_texts_at_the_end_keep_their_line_ends(text):
    assert same(parse("p", fmt("p", text)), parse("p", text))
    assert fmt("p", fmt("p", text)) == fmt("p", text)


@given(st.text(alphabet="ab:-[]{},# \n'\"|>1", max_size=60))
@settings(max_examples=1000, deadline=None)
def test_any_document_keeps_its_meaning_and_stays_tidy(text):
    try:
        before = parse("p", text)
        once = fmt("p", text)
    except BadPolicy:
        return
    assert same(parse("p", once), before)
    assert fmt("p", once) == once


@given(st.lists(st.sampled_from(["a", ": ", " ", "  ", "\n", "\n- ", "\n  m: ", "{", "}", "[", "]", ", ", " # c\n", "#", '"x"', "'", "|\n  t\n",
                                 ">-\n  u\n\n", ">", "? ", "?", "%", "\t", "\r\n", "é", "&", "!", "{b: c}", "[x, y]"]), max_size=12).map("".join))
@settings(max_examples=1500, deadline=None)
def test_both_scanners_give_the_same(text):
    def result():
        formatter._tokens.cache_clear()
        try:
            return fmt("p", text)
        except BadPolicy as error:
            return error.as_dict()

    fast = result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formatter, "_ALIKE", re.compile("never"))
        assert result() == fast
