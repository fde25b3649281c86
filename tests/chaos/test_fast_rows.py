"""The fast rows of the failure table in continuous integration: none may fail. `make chaos` has the long forms."""

from __future__ import annotations

import pytest

from tests.chaos.registry import Run, order, play
from tests.chaos.rows import MODULES, ROWS
from tests.chaos.stage import Stage

# Together about a minute on an idle machine; the other fast rows come with `make chaos ARGS=--fast`.
CHOSEN = ("F2", "F11", "F12", "F14", "F19", "F24", "M1", "M2", "N1")


def test_every_row_of_the_table_is_there() -> None:
    assert len(MODULES) == 10
    assert {f"F{n}" for n in range(1, 43)} <= ROWS.keys()
    assert all(r.passes for r in ROWS.values())


@pytest.mark.netns
@pytest.mark.timeout(600)
async def test_fast_rows() -> None:
    failed = []
    async with Stage() as stage:
        await stage.begin()
        for name in sorted(CHOSEN, key=order):
            result = await play(ROWS[name], stage, Run(seed=1))
            print(f"{name} {result.verdict} {result.figures} {result.reason}")
            if result.verdict in {"fail", "error"}:
                failed.append(f"{name}: {result.reason} {result.figures}")
    assert not failed, "\n".join(failed)
