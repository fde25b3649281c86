"""Bytes of a policy file as text: marks and line ends go, what is no text is refused with its place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from policy.texts import decode


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\ufeff")))
def test_text_stays_whatever_wrote_its_lines(text: str) -> None:
    assert decode(text.encode(), "p") == text
    assert decode(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), "p") == text


@pytest.mark.parametrize(("data", "place"), [(b"\xff", "p:1:1"), (b"ab\nc\xc3", "p:2:2"), (b"\n\n\xed\xa0\x80", "p:3:1")])
def test_what_is_no_text_has_a_place(data: bytes, place: str) -> None:
    with pytest.raises(BadInput) as e:
        decode(data, "p")
    assert (e.value.code, e.value.message) == ("file.encoding", f"{place}: not UTF-8 text")
    assert e.value.hint
