"""Every message of every wire module against what a hostile peer could send: a message or BadInput, and never anything else."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pkgutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import identity.wire
from identity.errors import BadInput
from identity.wire import Message, parse
from identity.wire.feed import parse_frame

MODULES = [importlib.import_module(f"identity.wire.{m.name}") for m in pkgutil.iter_modules(identity.wire.__path__)]
KINDS = sorted(
    {kind for module in MODULES for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, Message) and kind is not Message},
    key=lambda kind: f"{kind.__module__}.{kind.__name__}",
)
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # on any machine
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=-(2**80), max_value=2**80), st.floats(), st.text(max_size=20),
    st.sampled_from(["a" * 64, "AA==", "../x", "100.64.0.1", "spiffe://td/wl/a", "\x00", "\ud800", "1e999"]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=6)


def test_all_modules_are_looked_at() -> None:
    assert {m.__name__.rpartition(".")[2] for m in MODULES} >= {"feed", "enroll", "log", "jwt", "flows", "orchestrator", "people", "recovery", "broker"}
    assert len(KINDS) > 100


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.__module__.rpartition('.')[2]}.{k.__name__}")
def test_every_schema_is_strict_and_closed(kind: type[Message]) -> None:
    assert (kind.model_config["strict"], kind.model_config["frozen"], kind.model_config["extra"]) == (True, True, "forbid")
    with pytest.raises(BadInput) as refused:
        parse(kind, '{"no such field of any message":"5ecret"}')
    assert (refused.value.code, "5ecret" in refused.value.message) == ("wire.schema", False)


@settings(RELAXED, max_examples=100)
@given(st.data())
def test_the_right_fields_with_any_values(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    fields: dict[str, Any] = {name: data.draw(VALUES) for name in kind.model_fields if data.draw(st.booleans())}
    with contextlib.suppress(BadInput):
        read = parse(kind, json.dumps(fields))
        assert isinstance(read, kind)
        assert parse(kind, read.model_dump_json()) == read


@settings(RELAXED, max_examples=100)
@given(st.sampled_from(KINDS), st.binary(max_size=80) | st.text(max_size=80) | st.integers(1, 3000).map(lambda n: "[" * n))
def test_anything_at_all(kind: type[Message], data: bytes | str) -> None:
    with contextlib.suppress(BadInput):
        assert isinstance(parse(kind, data), BaseModel)


@settings(RELAXED, max_examples=100)
@given(st.dictionaries(st.sampled_from(["type", "kind", "timeline", "revision", "objects", "upserts", "removed", "hash", "heartbeat"]), VALUES))
def test_frames_of_the_feed(fields: dict[str, Any]) -> None:
    with contextlib.suppress(BadInput):
        assert isinstance(parse_frame(json.dumps(fields).encode()), BaseModel)
