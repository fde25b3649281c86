from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ca.highwater import SLOT, HighWater, Mark
from identity.errors import BadState


def marks(path: Path, count: int) -> list[Mark]:
    water = HighWater(path)
    made = [Mark("T", n, 7) for n in range(count)]
    for mark in made:
        water.raise_to(mark)
    water.close()
    return made


def test_the_newest_mark_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "highwater"
    assert HighWater(path).mark is None
    for count in (1, 2, 3, 6):
        path.unlink(missing_ok=True)
        newest = marks(path, count)[-1]
        assert HighWater(path).mark == newest
        assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, 2 * SLOT)
    assert newest.top == 12


def test_a_new_timeline_with_a_lower_revision_is_newer(tmp_path: Path) -> None:
    path = tmp_path / "highwater"
    marks(path, 5)
    water = HighWater(path)
    water.raise_to(Mark("U", 1, 0))
    water.close()
    assert HighWater(path).mark == Mark("U", 1, 0)


def test_an_equal_mark_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "highwater"
    water = HighWater(path)
    water.raise_to(Mark("T", 1, 0))
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written"))
    water.raise_to(Mark("T", 1, 0))
    water.close()


@pytest.mark.parametrize("torn", range(0, SLOT, 37))
def test_a_torn_write_leaves_the_mark_before(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "highwater"
    made = marks(path, 4)
    before = path.read_bytes()
    water = HighWater(path)
    water.raise_to(Mark("T", 99, 7))
    water.close()
    after = path.read_bytes()
    slot = 0 if before[:SLOT] != after[:SLOT] else 1
    assert before[(1 - slot) * SLOT : (2 - slot) * SLOT] == after[(1 - slot) * SLOT : (2 - slot) * SLOT]
    mixed = bytearray(before)
    mixed[slot * SLOT : slot * SLOT + torn] = after[slot * SLOT : slot * SLOT + torn]
    path.write_bytes(mixed)
    assert HighWater(path).mark in {made[-1], Mark("T", 99, 7)}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=3 * SLOT))
def test_anything_else_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes(data)
    with pytest.raises(BadState) as e:
        HighWater(path)
    assert (e.value.code, bool(e.value.hint)) == ("state.highwater", True)


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(BadState):
        HighWater(tmp_path)
