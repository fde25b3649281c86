"""The keys change in the first process: the second signs nothing that is out, its endpoints go over, a new copy brings it back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ca.replica import copy
from identity.errors import BadState, RetinueError
from identity.wire.admin import Workload, WorkloadAdd
from identity.wire.authority import AuthorityInfo, KindRef, MemberRef
from tests.ha.processes import Process, wait_for
from tests.ha.test_two_processes import act, joined

pytestmark = pytest.mark.timeout(240)


async def able(process: Process, name: str) -> bool:
    """Can it register a workload now?"""
    try:
        await act(process, "/v1/workloads", WorkloadAdd(name=name, host="a"), Workload)
    except BadState as e:
        if e.code != "replica.keys":
            raise
        return False
    return True


async def test_a_rotation_is_noticed_by_the_other_process(two: list[Process], tmp_path: Path) -> None:
    first, second = two
    async with joined([second, first], tmp_path, "a", "b", "c", "d") as machines:  # they spread over both
        await wait_for(lambda: all(m.at for m in machines))
        assert await able(second, "before")
        await wait_for(lambda: machines[0].epochs.get("before/0") == 1)
        for step in ("prepare", "activate"):
            await act(first, f"/v1/authority/{step}", KindRef(kind="records"), AuthorityInfo)
        # The very next act, whether the other process was told already or not.
        assert not await able(second, "lost")
        await act(first, "/v1/authority/revoke", MemberRef(name="records"), AuthorityInfo)
        await wait_for(lambda: all(m.at == first.url for m in machines))
        assert await able(first, "between")
        await wait_for(lambda: machines[0].epochs.get("between/0") == 1)
        with pytest.raises(RetinueError):
            await act(second, "/v1/authority/prepare", KindRef(kind="records"), AuthorityInfo)
        await asyncio.to_thread(copy, first.directory, second.directory)
        async with asyncio.timeout(30):
            while not await able(second, "after"):  # noqa: ASYNC110 -- state of another process
                await asyncio.sleep(0.1)
        await wait_for(lambda: machines[0].epochs.get("after/0") == 1)
        first.kill()
        await wait_for(lambda: all(m.at == second.url for m in machines))
        assert await able(second, "alone")
        await wait_for(lambda: machines[0].epochs.get("alone/0") == 1)
        assert machines[0].epochs.keys() == {"before/0", "between/0", "after/0", "alone/0"}
        assert [p for m in machines for p in m.problems if "RecordRefused" in p] == []
