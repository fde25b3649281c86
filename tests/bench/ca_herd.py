"""``python -m tests.bench.ca_herd [--agents 2000] [--streams N] [--changes 20] [--postgres]``: many TLS endpoints on one CA.

A real ``retinue-ca serve`` of its own, and in another process of this machine the endpoints (tests/ha/simulated.py): a certificate,
a TLS 1.3 connection and a source address each, every frame verified. Measured:

    memory a stream   growth of the server's resident memory over its open feeds, of `streams` endpoints (as many as agents)
    fan-out           a policy change until an endpoint has verified its frame, over all of `streams` and all changes
    revocation        the request to revoke a placed workload until the frame that says so, over the endpoints that see it
    back              the server is killed and started again: until each of `agents` has its feed; admin requests meanwhile

Prints one row a measure. Nothing here asserts a timing.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ca.client import AdminClient
from ca.plane import Plane
from identity.errors import RetinueError
from identity.wire.admin import (
    Info,
    PolicyApply,
    PolicyFileIn,
    PolicyReply,
    Workload,
    WorkloadRef,
)
from tests.bench.ca_issuing import rate
from tests.bench.ca_rows import Rows
from tests.chaos.stage import rss
from tests.ha.crowd import scratch
from tests.ha.processes import TD, Process
from tests.ha.simulated import Remote, enrol
from tests.postgres_server import server

APP = 10  # hosts whose workloads may talk with one another


def policy(count: int, port: int) -> str:
    """Many small applications: what an endpoint sees does not grow with the number of endpoints."""
    apps = (f"{{app: a{n}}}" for n in range(max(1, count // APP)))
    rules = "".join(f"      - {{id: r{n}, from: {a}, to: {a}, on: tcp/{port}}}\n" for n, a in enumerate(apps))
    return f"meshpolicy: 1\nlabels: {{keys: [app]}}\nsegments:\n  - name: s\n    allow:\n{rules}"


def show(what: str, values: list[float], unit: str = "ms") -> None:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.99)]
    print(f"{what:<34} p50 {at[0]:9.1f}   p99 {at[1]:9.1f}   max {ordered[-1]:9.1f} {unit}   ({len(ordered)} samples)", flush=True)


def fan_out(process: Process, remote: Remote, changes: int, rows: Rows) -> None:
    """Policy changes to all, revocations to few."""
    subject = f"{remote.count} streams"
    spread: list[float] = []
    for n in range(changes):
        request = PolicyApply(files=[PolicyFileIn(name="p.yaml", text=policy(remote.count, n + 1))])
        change: Callable[[], object] = lambda request=request: process.admin.post("/v1/policy", request, PolicyReply)  # type: ignore[misc]  # a default binds the loop's value
        spread += remote.during("policy", change, 120)
    show("policy change to every stream", spread)
    rows.add("feed: one change to every stream", subject, spread, "ms")
    spread = []
    for n in range(0, min(changes * APP, remote.count - APP + 1), APP):
        request_ = WorkloadRef(name=f"crowd/sim-{n}", instance=0)
        revoke: Callable[[], object] = lambda request=request_: process.admin.post("/v1/workloads/revoke", request, Workload)  # type: ignore[misc]  # as above
        spread += remote.during(f"placement/crowd/sim-{n}/0", revoke, 60, count=APP)
    show("revocation to all who see it", spread)
    rows.add("feed: revocation to the 10 who see it", subject, spread, "ms")


def come_back(process: Process, remote: Remote, rows: Rows) -> None:
    """The server is killed under them; an administrator in a process of its own asks meanwhile."""
    asking = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.ca_herd", "--ask", str(process.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert asking.stdin is not None
    assert asking.stdout is not None
    asking.stdout.readline()
    remote.ask("lose")
    process.kill()
    time.sleep(1.0)
    process.start()
    asking.stdin.write("go\n")
    asking.stdin.flush()
    back = remote.ask("back", seconds=300)
    print(f"{back['open']} agents back {back['seconds']:.1f} s after the server was ready again", flush=True)
    said, _ = asking.communicate("")
    waits = [float(line) for line in said.split()] or [0.0]
    show("admin requests meanwhile", waits)
    rows.add("all back after a killed CA is ready again", f"{remote.count} agents", [back["seconds"]], "s")
    rows.add("administrator's request meanwhile", f"{remote.count} agents", waits, "ms")


def herd(agents: int, streams: int, changes: int, rows: Rows, *, postgres: bool = False) -> None:
    """All of it."""
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(scratch())
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retinue-herd-")))
        address = stack.enter_context(server()).database() if postgres else None
        Plane.create(memory / "ca", TD, time.time(), address=address)
        plane = Plane.open(memory / "ca", time.time)
        began = time.perf_counter()
        enrol(plane, max(agents, streams), memory / "simulated", lambda n: {"app": f"a{n // APP}"})
        print(f"{max(agents, streams)} hosts with a workload each made in {time.perf_counter() - began:.0f} s")
        with plane.store.read() as tx:
            head = plane.log.head(tx)
            proofs = rate(1.0, lambda: plane.log.consistency(tx, head.size // 3, head.size))
        print(f"log of {head.size} entries: {proofs:.0f} consistency proofs /s")
        plane.close()
        shutil.copytree(memory / "ca", disk / "ca")
        process = Process(disk / "ca", heartbeat=2.0)
        process.start()
        # A first policy brings everybody its peers: a snapshot. What is measured are the changes after it.
        first = PolicyApply(files=[PolicyFileIn(name="p.yaml", text=policy(max(agents, streams), 100))])
        process.admin.post("/v1/policy", first, PolicyReply)
        try:
            joined(process, memory, streams, rows, lambda remote: fan_out(process, remote, changes, rows))
            joined(process, memory, agents, None, lambda remote: come_back(process, remote, rows))
        finally:
            process.end()


def joined(process: Process, memory: Path, count: int, rows: Rows | None, then: Callable[[Remote], None]) -> None:
    """With `count` endpoints connected. Raises RuntimeError when some are not."""
    assert process.running is not None
    before = rss(process.running.pid)
    remote = Remote(memory / "simulated", "127.0.0.1", process.port, "--count", str(count))
    try:
        found = remote.ask("connect")
        if found["open"] != count:
            raise RuntimeError(f"{found['open']} of {count} endpoints connected")
        each = (rss(process.running.pid) - before) / 1024 / count
        print(f"{count} agents connected in {found['seconds']:.1f} s; {each:.0f} KiB a stream, views included", flush=True)
        if rows is not None:
            rows.add("memory a stream, its view included", f"{count} streams", [each], "KiB")
        then(remote)
    finally:
        remote.close()


def ask(directory: Path) -> None:
    """After a first line of input: milliseconds of one administrator's request after the other, until the input ends."""
    client = AdminClient(directory, timeout=120.0)
    print(flush=True)
    sys.stdin.readline()
    while not select.select([0], [], [], 0.1)[0]:
        at = time.perf_counter()
        with contextlib.suppress(RetinueError):
            client.get("/v1/info", Info)
            print((time.perf_counter() - at) * 1000, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--agents", type=int, default=2000)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ask is not None:
        ask(asked.ask)
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    herd(asked.agents, asked.streams or asked.agents, asked.changes, Rows(quiet=True), postgres=asked.postgres)


if __name__ == "__main__":
    main()
