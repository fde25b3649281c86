from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from identity.labels import KEY, MAX_LABELS, VALUE, check_labels, parse_labels

labels = st.dictionaries(st.from_regex(KEY, fullmatch=True), st.from_regex(VALUE, fullmatch=True), max_size=MAX_LABELS)


@given(labels)
def test_good_labels_come_back_sorted(given_):
    assert list(check_labels(given_).items()) == sorted(given_.items())
    assert parse_labels(f"{k}={v}" for k, v in given_.items()) == given_


@given(st.dictionaries(st.text(max_size=70), st.text(max_size=70), max_size=3))
def test_nothing_else_passes(given_):
    good = all(KEY.fullmatch(k) and VALUE.fullmatch(v) for k, v in given_.items())
    if good:
        assert check_labels(given_) == given_
    else:
        with pytest.raises(BadInput):
            check_labels(given_)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ({"": "a"}, "label.key"), ({"Role": "a"}, "label.key"), ({"a b": "c"}, "label.key"), ({"a" * 64: "b"}, "label.key"),
        ({7: "a"}, "label.key"), ({"a": ""}, "label.value"), ({"a": "x" * 64}, "label.value"), ({"a": "-x"}, "label.value"),
        ({"a": "x\n"}, "label.value"), ({"a": 7}, "label.value"), ({f"k{i}": "v" for i in range(33)}, "label.many"),
    ],
)  # fmt: skip
def test_bad_labels_are_refused(bad, code):
    with pytest.raises(BadInput) as e:
        check_labels(bad)
    assert e.value.code == code


@pytest.mark.parametrize(
    ("words", "code"), [(["role"], "label.form"), (["a=1", "a=1"], "label.twice"), (["=x"], "label.key"), (["a="], "label.value")]
)
def test_bad_words_are_refused(words, code):
    with pytest.raises(BadInput) as e:
        parse_labels(words)
    assert e.value.code == code


def test_a_value_may_hold_an_equals_sign_nowhere():
    with pytest.raises(BadInput):
        parse_labels(["a=b=c"])
