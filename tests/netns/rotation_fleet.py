"""Many endpoints in one process, each with the agent's own link to the CA and one workload's certificate; no data plane.

    python rotation_fleet.py CA_URL CA_DIR WORK_DIR COUNT

Enrols COUNT hosts (fleet-N) with a workload each (fleet/w-N) and keeps their certificates fresh until SIGTERM. Says
READY=1 to the service manager when all are connected; then one JSON line a second: how many are connected, and how many
certificates of how many were not believed under the newest bundle of their own endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ca.client import AdminClient
from identity import certs
from identity.bundle import TrustBundle
from identity.errors import NotVerified, RetinueError
from identity.wire.admin import Token, TokenCreate, Workload, WorkloadAdd
from identity.wire.local import SvidFiles
from mesh.enroll import enroll
from mesh.health import Health
from mesh.sd_notify import notify
from mesh.svid import WorkloadSvids
from mesh.sync import SyncMachine
from mesh.uplink import Uplink


class Member:
    """One endpoint."""

    def __init__(self, number: int, uplink: Uplink) -> None:
        self.number, self.uplink = number, uplink
        self.svids = WorkloadSvids(uplink.svid, lambda: uplink.trust, time.time)
        self.files: SvidFiles | None = None
        self.failures = 0
        self.seen: tuple[str, tuple[Any, ...]] = ("", ())  # the workload's certificate as text, and parsed
        self.judged: tuple[int, list[Any], list[str]] = (-1, [], [])

    async def hold(self) -> None:
        """Look after the workload's certificate, as a Workload API stream does."""
        while True:
            try:
                self.files = await self.svids.get(f"fleet/w-{self.number}", 0)
                due = self.svids.due() or 0.0
                await asyncio.sleep(min(0.25, max(0.01, due - time.time())))
            except RetinueError:
                self.failures += 1
                await asyncio.sleep(0.25)

    def bad(self) -> list[str]:
        """Certificates that it holds and its own newest trust refuses; looked at when one of the two is another."""
        trust, chains = self.uplink.trust, [self.uplink.enrollment.svid.chain[:-1]]
        if self.files is not None:
            chains.append(tuple(certs.parse_chain(self.files.certificate)) if self.seen[0] != self.files.certificate else self.seen[1])
            self.seen = self.files.certificate, chains[-1]
        if self.judged[:2] != (trust.sequence, chains):
            found = []
            for chain in chains:
                try:
                    trust.verify_svid(chain, time.time())
                except NotVerified as e:
                    found.append(e.code)
            self.judged = trust.sequence, chains, found
        return self.judged[2]


def one_opens_for_all() -> None:
    """A bundle that one of them has accepted after another one, all have: on machines of their own they would not wait for
    one another for the seconds that a hundred times its signatures take.
    """
    known: dict[tuple[str, str], TrustBundle] = {}
    accept = TrustBundle.accept_next

    def accept_once(self: TrustBundle, envelope: str, now: float) -> TrustBundle:
        at = self.envelope, envelope
        if at not in known:
            known[at] = accept(self, envelope, now)
        return known[at]

    TrustBundle.accept_next = accept_once  # type: ignore[method-assign]  # for this process only


async def main(url: str, ca_dir: Path, work: Path, count: int) -> None:
    admin = AdminClient(ca_dir)
    limit = asyncio.Semaphore(8)

    async def join(number: int) -> Member:
        async with limit:
            token = await asyncio.to_thread(admin.post, "/v1/tokens", TokenCreate(host=f"fleet-{number}"), Token)
            done = await enroll(url, token.token, work / f"fleet-{number}", [f"192.0.2.{number % 250 + 1}:51820"], ["chacha20poly1305"])
            added = WorkloadAdd(name=f"fleet/w-{number}", host=f"fleet-{number}", labels={"role": "fleet"})
            await asyncio.to_thread(admin.post, "/v1/workloads", added, Workload)
        machine = SyncMachine(done.bundle, done.endpoint)

        async def nothing(_: object) -> None:
            return

        return Member(number, Uplink(done, machine, Health(), on_events=nothing, report=lambda: None))

    members = await asyncio.gather(*map(join, range(count)))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    tasks = [asyncio.create_task(work) for m in members for work in (m.uplink.run(), m.hold())]
    ready = False
    for line in said(members):
        print(json.dumps(line), flush=True)
        if not ready and line["connected"] == count and line["held"] == count:
            ready = True
            notify("READY=1")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await stop.wait()
        if stop.is_set() or any(t.done() for t in tasks):
            break
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception():
            raise task.exception() or RuntimeError
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def said(members: list[Member]) -> Iterator[dict[str, Any]]:
    while True:
        bad = [code for m in members for code in m.bad()]
        yield {
            "at": time.time(), "connected": sum(m.uplink.control == "connected" for m in members),
            "held": sum(m.files is not None for m in members), "bad": len(bad), "codes": sorted(set(bad)),
            "failures": sum(m.failures for m in members), "sequence": min(m.uplink.trust.sequence for m in members),
        }  # fmt: skip


if __name__ == "__main__":
    os.umask(0o077)
    one_opens_for_all()
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
