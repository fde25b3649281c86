from __future__ import annotations

import inspect
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from identity.errors import BadInput
from identity.wire import WIRE_VERSION, Message, admin, enroll, feed, local, parse
from identity.wire.feed import Beat, Delta, Snapshot, parse_frame

SCHEMAS = sorted(
    {
        kind
        for module in (admin, enroll, feed, local)
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Message) and kind is not Message
    },
    key=lambda k: k.__name__,
)


@pytest.mark.parametrize("kind", SCHEMAS, ids=lambda k: k.__name__)
def test_every_schema_is_strict_and_closed(kind):
    assert kind.model_config["strict"]
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"
    with pytest.raises(BadInput) as e:
        parse(kind, '{"no such field of any message":"5ecret"}')
    assert e.value.code == "wire.schema"
    assert "5ecret" not in e.value.message


@pytest.mark.parametrize("kind", SCHEMAS, ids=lambda k: k.__name__)
@given(data=st.binary(max_size=60) | st.text(max_size=60))
def test_junk_is_refused(kind, data):
    with suppress(BadInput):
        assert isinstance(parse(kind, data), BaseModel)


def test_an_error_names_the_field_never_the_value():
    with pytest.raises(BadInput) as e:
        parse(enroll.ChallengeRequest, '{"token_id": 12345678}')
    assert "token_id" in e.value.message
    assert "12345678" not in e.value.message
    with pytest.raises(BadInput, match="body"):
        parse(enroll.ChallengeRequest, "[]")
    with pytest.raises(BadInput):
        parse(enroll.ChallengeRequest, '{"token_id": "' + "x" * 65 + '"}')


def test_the_version_is_in_the_first_messages():
    assert enroll.ChallengeRequest(token_id="a").version == WIRE_VERSION == 1


FRAMES = [
    Snapshot(timeline="t", revision=1, objects={"a": "b"}, hash="h", heartbeat="x"),
    Delta(timeline="t", from_revision=1, revision=2, upserts={}, removes=["a"], hash="h", heartbeat="x"),
    Beat(heartbeat="x"),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f.kind)
def test_frames_round_trip_on_one_line(frame):
    line = frame.model_dump_json().encode()
    assert b"\n" not in line
    assert parse_frame(line) == frame


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b'{"kind":"beat"}', b'{"kind":"other"}', b'{"kind":"beat","heartbeat":"x","more":1}', b'{"kind":"snapshot"}',
     b'{"kind":"delta","timeline":"t","from_revision":1,"revision":2,"upserts":{},"hash":"h","heartbeat":"x"}', b"\xff"],
)  # fmt: skip
def test_other_lines_are_refused(line):
    """Among them a delta without `removes`: a missing field is never an empty one."""
    with pytest.raises(BadInput) as e:
        parse_frame(line)
    assert e.value.code == "feed.frame"


def test_a_frame_has_a_limit(monkeypatch):
    monkeypatch.setattr(feed, "MAX_FRAME", 10)
    with pytest.raises(BadInput) as e:
        parse_frame(b"x" * 11)
    assert e.value.code == "feed.large"
