from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity import errors
from identity.errors import BadInput, BadPolicy, RetinueError, Unreachable, from_wire

DOCUMENTED = {
    "BadInput": (400, 2), "BadPolicy": (400, 2), "Refused": (403, 1), "NotVerified": (403, 1), "NotFound": (404, 1),
    "Conflict": (409, 1), "Unreachable": (503, 3), "NoPrivilege": (403, 4), "TimedOut": (504, 5), "BadState": (500, 78),
    "Bug": (500, 70),
}  # fmt: skip


def test_every_kind_has_the_documented_status_and_exit():
    kinds = {
        name: (kind.http, kind.exit)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, RetinueError) and kind is not RetinueError
    }
    assert kinds == DOCUMENTED


def test_an_error_says_code_message_and_hint():
    e = BadInput("a.b", "no", hint="do this")
    assert str(e) == "no"
    assert e.as_dict() == {"code": "a.b", "message": "no", "hint": "do this"}
    assert BadInput("a.b", "no").as_dict() == {"code": "a.b", "message": "no"}


def test_a_policy_error_shows_its_position():
    e = BadPolicy("p", "bad", file="x.yaml", line=3, column=9)
    assert str(e) == "x.yaml:3:9: bad"
    assert e.as_dict() == {"code": "p", "message": "bad", "file": "x.yaml", "line": 3, "column": 9}
    assert str(BadPolicy("p", "bad")) == "<policy>: bad"


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in DOCUMENTED])
def test_errors_survive_the_wire(kind):
    sent = kind("a.b", "why", hint="h")
    got = from_wire(kind.http, sent.as_dict())
    assert (got.code, got.message, got.hint, got.http, got.exit) == ("a.b", "why", "h", kind.http, kind.exit)
    if kind is not errors.NotVerified:  # to a client, a refusal like any other
        assert type(got) is kind


def test_the_exit_is_sent_only_where_the_status_leaves_it_open():
    sent = {name for name in DOCUMENTED if "exit" in getattr(errors, name)("a.b", "why").as_dict()}
    assert sent == {"NoPrivilege", "BadState"}


@pytest.mark.parametrize("given", [None, "78", 78.0, True, [], 4, -1, 1 << 80])
def test_an_odd_exit_changes_nothing(given):
    assert type(from_wire(500, {"code": "c", "message": "m", "exit": given})) is errors.Bug
    assert type(from_wire(403, {"code": "c", "message": "m", "exit": 78})) is errors.Refused


@pytest.mark.parametrize("body", [None, [], "x", {}, {"code": 1, "message": "m"}, {"code": "c"}])
def test_unreadable_answers_are_still_errors(body):
    for status in (400, 403, 404, 409, 418, 429, 500, 503, 504):
        assert from_wire(status, body).code == "api.unexpected"
    assert isinstance(from_wire(429, body), Unreachable)


@given(
    st.integers(100, 599),
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["code", "message", "hint", "line", "column", "file", "exit"]), inner),
    ),
)  # fmt: skip
def test_any_answer_becomes_an_error(status, body):
    assert isinstance(from_wire(status, body), RetinueError)


def test_an_odd_column_is_survived():
    e = from_wire(400, {"code": "c", "message": "m", "line": 1, "column": "x", "hint": 7})
    assert isinstance(e, BadPolicy)
    assert (e.column, e.hint) == (0, "")
    assert from_wire(404, {"code": "c", "message": "m", "hint": 7}).hint == ""
