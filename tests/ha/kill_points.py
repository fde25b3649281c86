"""``python -m tests.ha.kill_points [--points 240]``: the CA is killed in the middle of issuing, at one system call after another.

A real ``retinue-ca serve`` on SQLite is traced by strace, which kills it at the N-th pwrite64 or fdatasync of a
thread of it while hosts enrol, renew and fetch workload certificates over TLS. After every kill it is started again
on what is left (which is also the next point). Counted: acknowledged certificates without a record (in `serials` and in
the ledger), serials given twice, starts that failed. Exit status 1 unless all are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from ca.plane import Plane
from identity import certs
from identity.errors import RetinueError
from identity.wire.admin import Token, TokenCreate, Workload, WorkloadAdd
from identity.wire.enroll import SvidReply, SvidRequest
from mesh.enroll import enroll, renew
from tests.ha.processes import TD, Process

CALLS = ("pwrite64", "pwrite64", "fdatasync", "pwrite64", "fdatasync")
ROUNDS = 6  # of issuing, before a point counts as never reached


@dataclass
class Found:
    """What was seen. `acknowledged` are serials (hex) of certificates that a client received."""

    acknowledged: list[str] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    unrecorded: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    failed_starts: list[str] = field(default_factory=list)
    slowest_start: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.unrecorded or self.twice or self.failed_starts)


def points(count: int) -> list[tuple[str, int]]:
    """(system call, which one of its kind): early ones first, every kind in turn."""
    seen: Counter[str] = Counter()
    chosen: list[tuple[str, int]] = []
    while len(chosen) < count:
        for call in CALLS:
            seen[call] += 1
            chosen.append((call, seen[call]))
    return chosen[:count]


async def issue(process: Process, root: Path, found: Found, number: int) -> None:
    """Enrol, renew and fetch certificates until the server is gone."""
    for n in range(ROUNDS):
        name = f"k{number}-{n}"
        try:
            token = await asyncio.to_thread(process.admin.post, "/v1/tokens", TokenCreate(host=name), Token)
            machine = await enroll(process.url, token.token, root / name, ["127.0.0.1:51820"], ["chacha20poly1305"])
            found.acknowledged.append(f"{machine.svid.serial:x}")
            machine = await renew(machine, ["127.0.0.1:51821"], ["chacha20poly1305"])
            found.acknowledged.append(f"{machine.svid.serial:x}")
            await asyncio.to_thread(process.admin.post, "/v1/workloads", WorkloadAdd(name=f"w/{name}", host=name), Workload)
            async with machine.client() as client:
                csr = certs.make_csr(ec.generate_private_key(ec.SECP256R1()))
                reply = await client.post("/v1/svid", SvidRequest(workload=f"w/{name}", instance=0, csr=csr), SvidReply)
            found.acknowledged.append(f"{certs.parse_chain(reply.chain)[0].serial_number:x}")
        except (RetinueError, OSError):
            return
        finally:
            shutil.rmtree(root / name, ignore_errors=True)


def check(directory: Path, found: Found) -> None:
    """Is everything acknowledged so far in the database?"""
    with closing(sqlite3.connect(f"file:{directory / 'ca.db'}?mode=ro", uri=True)) as db:
        serials = [row[0] for row in db.execute("SELECT serial FROM serials")]
        logged = Counter(row[0] for row in db.execute("SELECT json_extract(detail, '$.serial') FROM ledger WHERE kind = 'certificate'"))
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    known = set(serials)
    found.unrecorded = [s for s in found.acknowledged if s not in known or logged[s] != 1]
    found.twice = [s for s, n in (Counter(found.acknowledged) + Counter()).items() if n > 1]
    found.twice += [s for s, n in logged.items() if n > 1]


@contextmanager
def tracing(pid: int, call: str, which: int) -> Iterator[None]:
    """strace on every thread of the process: it is killed when one of them makes the `which`-th call of that name."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", f"trace={call}",
         "-e", f"inject={call}:signal=KILL:when={which}"],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        for _ in range(500):
            threads = list(Path(f"/proc/{pid}/task").glob("*/status"))
            if all("TracerPid:\t0\n" not in t.read_text() for t in threads):
                break
            assert tracer.poll() is None, tracer.stderr.read() if tracer.stderr else ""
            time.sleep(0.02)
        yield
    finally:
        tracer.terminate()
        tracer.wait(20)
        assert tracer.stderr is not None
        tracer.stderr.close()


def run(root: Path, chosen: list[tuple[str, int]]) -> Found:
    """All points on one directory."""
    directory, found = root / "ca", Found()
    Plane.create(directory, TD, time.time())
    for number, (call, which) in enumerate(chosen):
        process = Process(directory, heartbeat=10.0)
        began = time.monotonic()
        try:
            process.start()
        except AssertionError as e:
            found.failed_starts.append(f"before {call} {which}: {e}")
            return found
        found.slowest_start = max(found.slowest_start, time.monotonic() - began)
        assert process.running is not None
        try:
            with tracing(process.running.pid, call, which):
                asyncio.run(issue(process, root, found, number))
                process.running.wait(2.0)
            found.killed[call] += 1
        except subprocess.TimeoutExpired:  # still running: this call was never made so often
            found.missed += 1
        process.kill()
        check(directory, found)
        if not found.good:
            return found
    process = Process(directory)
    process.start()
    process.end()
    check(directory, found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--points", type=int, default=240)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retinue-kill-") as root:
        began = time.monotonic()
        found = run(Path(root), points(asked.points))
    print(
        f"{sum(found.killed.values())} kills ({', '.join(f'{n} {c}' for c, n in found.killed.items())}), {found.missed} points never "
        f"reached, {len(found.acknowledged)} certificates acknowledged: {len(found.unrecorded)} without a record, "
        f"{len(found.twice)} serials twice, {len(found.failed_starts)} failed starts, slowest start {found.slowest_start:.1f} s; "
        f"{time.monotonic() - began:.0f} s"
    )
    for line in (*found.unrecorded, *found.twice, *found.failed_starts):
        print(line)
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
