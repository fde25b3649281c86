"""Running nft: what becomes of it when the caller is cancelled or it takes too long (with a program in its place)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from identity.errors import TimedOut
from mesh import nft

# Writes far more than a pipe and a stream reader hold, then says that it came to its end.
_SCRIPT = """#!/bin/sh
cat > /dev/null
: > "$0.started"
while [ ! -e "$0.go" ]; do sleep 0.01; done
head -c 2000000 /dev/zero | tr '\\0' ' ' >&%s
%s
: > "$0.ended"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(stream: int, then: str = "") -> Path:
        path = tmp_path / "nft"
        path.write_text(_SCRIPT % (stream, then))
        path.chmod(0o755)
        monkeypatch.setattr(nft, "program", lambda: str(path))
        return path

    return make


async def _cancelled(work, started: Path) -> None:
    task = asyncio.ensure_future(work)
    while not started.exists():  # noqa: ASYNC110 -- another process makes it
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0)  # it has been told before the program goes on
    started.with_suffix(".go").touch()
    done, _ = await asyncio.wait((task,), timeout=20)
    assert done, "it hangs"
    assert task.cancelled()


async def test_a_cancelled_listing_ends_at_once(install) -> None:
    path = install(1, "exec sleep 1000")
    await _cancelled(nft.list_table("t"), Path(f"{path}.started"))
    assert not Path(f"{path}.ended").exists()


async def test_a_cancelled_transaction_is_waited_for_however_much_it_says(install) -> None:
    path = install(2)
    await _cancelled(nft.run("add table inet t"), Path(f"{path}.started"))
    assert Path(f"{path}.ended").exists()


async def test_one_that_does_not_finish_is_ended(install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "TIMEOUT", 0.2)
    Path(f"{install(1, 'exec sleep 1000')}.go").touch()
    with pytest.raises(TimedOut):
        await nft.list_table("t")
