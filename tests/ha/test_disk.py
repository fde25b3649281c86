"""The CA's disk fails or fills up: nothing is acknowledged that is not there, and nobody has to guess why."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ca.plane import Plane
from ca.store import Store
from identity.errors import RetinueError
from identity.wire.admin import Token, TokenCreate, Workload, WorkloadAdd
from mesh.enroll import enroll
from tests.ha.kill_points import points, run
from tests.ha.processes import TD, Process, wait_for

pytestmark = pytest.mark.timeout(300)


def make(directory: Path, **options: object) -> Process:
    Plane.create(directory, TD, time.time())
    return Process(directory, **options)  # type: ignore[arg-type]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    if os.geteuid() != 0:
        pytest.fail("this test mounts a file system: run it as root")
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "retinue-test", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_killed_in_the_middle_of_issuing(tmp_path: Path) -> None:
    """The short form of `make kill-points`: early calls, before anything is acknowledged, and late ones."""
    found = run(tmp_path, points(160)[3::13])
    assert (found.unrecorded, found.twice, found.failed_starts) == ([], [], [])
    assert sum(found.killed.values()) >= 8
    assert found.acknowledged


async def test_nothing_is_acknowledged_after_a_sync_that_failed(tmp_path: Path) -> None:
    """EIO once: a later sync that succeeds proves nothing, so the process takes no more writes at all."""
    inject = ("strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=7")
    process = make(tmp_path / "ca", wrap=inject, heartbeat=10.0)
    process.start()
    try:
        acknowledged, refused = [], []
        for n in range(12):
            try:
                await asyncio.to_thread(process.admin.post, "/v1/workloads", WorkloadAdd(name=f"w{n}"), Workload)
                acknowledged.append(f"w{n}")
            except RetinueError as e:
                refused.append((n, e.code))
        codes = {code for _, code in refused}
        assert codes == {"store.failed"}
        assert [n for n, _ in refused] == list(range(len(acknowledged), 12))  # none after the first
    finally:
        process.kill()
    again = Process(tmp_path / "ca")
    again.start()
    again.end()
    store = Store.open(tmp_path / "ca" / "ca.db")
    with store.read() as tx:
        kept = set(tx.exec_driver_sql("select name from instances").scalars())
    store.close()
    assert set(acknowledged) <= kept


async def test_a_full_disk_is_told_and_served_again_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    process = make(small_disk / "ca")
    process.start()
    try:
        token = await asyncio.to_thread(process.admin.post, "/v1/tokens", TokenCreate(host="a"), Token)
        machine = await enroll(process.url, token.token, tmp_path / "a", ["127.0.0.1:1"], ["chacha20poly1305"])
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        refusal: RetinueError | None = None
        for n in range(200):  # what the write-ahead log still has room for, is taken
            try:
                await asyncio.to_thread(process.admin.post, "/v1/workloads", WorkloadAdd(name=f"w{n}"), Workload)
            except RetinueError as e:
                refusal = e
                break
        assert refusal is not None
        assert (refusal.code, refusal.http) == ("store.full", 503)
        async with machine.client() as client, client.stream("/v1/feed") as lines:  # what it has, it serves
            assert (await anext(lines)).startswith(b'{"kind":"snapshot"')
        filler.unlink()

        def works() -> bool:
            try:
                process.admin.post("/v1/workloads", WorkloadAdd(name="after"), Workload)
            except RetinueError:
                return False
            return True

        await wait_for(works, 5.0)
    finally:
        process.end()
