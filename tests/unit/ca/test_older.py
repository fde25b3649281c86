"""What an endpoint of the first release is given."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from ca.older import Plain, is_older
from ca.plane import Plane
from ca.scope import World
from identity.errors import Conflict
from identity.records import BundleRecord
from identity.wire import LEVEL_HEADER, WIRE_LEVEL
from identity.wire.enroll import SvidReply


def asking(level: str | None) -> Any:
    return SimpleNamespace(headers={} if level is None else {LEVEL_HEADER: level})


def test_who_is_older() -> None:
    assert [is_older(asking(said)) for said in (None, "", "x", "1", "-2", "9" * 9)] == [True] * 6
    assert [is_older(asking(said)) for said in (str(WIRE_LEVEL), "3", "99999")] == [False] * 3


def test_the_twin_leaves_out_the_keys_of_tokens_and_nothing_else(plane: Plane) -> None:
    full = plane.trust.verify(BundleRecord, plane.bundle)
    assert full.jwt_authorities
    twin = plane.plain(plane.bundle)
    assert plane.trust.verify(BundleRecord, twin) == full.model_copy(update={"jwt_authorities": []})
    assert plane.plain(plane.bundle) == twin, "signed once"
    given = SvidReply(spiffe_id="spiffe://a.example/x", chain=[], bundle=plane.bundle)
    assert plane.plain.fitting(asking(None), given, "h").bundle == twin
    assert plane.plain.fitting(asking("2"), given, "h") == given


def test_what_takes_away_is_never_left_out(plane: Plane) -> None:
    full = plane.trust.verify(BundleRecord, plane.bundle)
    envelope = plane.sign(full.model_copy(update={"revoked": ["key:" + "0" * 64]}))
    assert plane.plain(envelope) == envelope
    given = SvidReply(spiffe_id="spiffe://a.example/x", chain=[], bundle=envelope)
    with pytest.raises(Conflict, match="host-7 runs a release") as raised:
        plane.plain.fitting(asking(None), given, "host-7")
    assert raised.value.code == "endpoint.older"
    assert plane.plain.fitting(asking("2"), given, "host-7") == given


def test_nothing_is_signed_that_does_not_verify(plane: Plane) -> None:
    signed: list[object] = []
    plain = Plain(lambda payload: signed.append(payload) or "", lambda: plane.trust)
    head, _, _ = plane.bundle.rpartition(".")
    forged = head + "." + "A" * 86
    assert plain(forged) == forged
    assert not signed


def test_scope_shows_them_the_twin_also_in_a_snapshot_and_after_a_change() -> None:
    world = World()
    world.plain = lambda envelope: f"plain {envelope}"
    world.set_bundle("one")
    world.older.add("old")
    old, new = world.view("old"), world.view("new")
    for view, says in ((old, "plain one"), (new, "one")):
        assert view.objects["bundle"] == says
        assert json.loads(b"{" + view.shared.json() + b"}")["bundle"] == says
    changed = world.update(world.set_bundle("two")).changed
    assert set(changed) == {old, new}
    assert (old.get("bundle"), new.get("bundle")) == ("plain two", "two")
    assert old.hash() != new.hash()
