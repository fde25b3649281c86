"""The whole authority is replaced under traffic: intermediate, record keys, root. Nothing is lost, nothing old is left.

Short in CI; `make rotation` runs it with 200 identities (RETINUE_ROTATION_IDENTITIES, RETINUE_ROTATION_SPREAD).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from identity import certs
from identity.errors import RetinueError
from identity.wire.enroll import UnderlayUpdate
from mesh.control import ControlClient
from mesh.enroll import load_enrollment
from mesh.lab import Lab
from mesh.lab_process import in_netns
from mesh.probe import HttpProber

IDENTITIES = int(os.environ.get("RETINUE_ROTATION_IDENTITIES", "24"))
SPREAD = int(os.environ.get("RETINUE_ROTATION_SPREAD", "6"))
LIFE = int(os.environ.get("RETINUE_ROTATION_LIFE", "600"))  # ordinary renewals do not fall into the measured time
pytestmark = pytest.mark.timeout(120 if IDENTITIES < 100 else 900)
FLEET = Path(__file__).parent / "rotation_fleet.py"
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
"""


class World:
    """Two real hosts with traffic between them, and a fleet beside them."""

    def __init__(self, mesh: Any) -> None:
        self.mesh, self.lab = mesh, mesh.lab
        self.fleet = max(1, IDENTITIES // 2)
        self.peaks: list[dict[str, Any]] = []

    async def authority(self, *args: str) -> dict[str, Any]:
        done: dict[str, Any] = await self.lab.aca("authority", *args)
        return done

    async def members(self) -> dict[str, dict[str, Any]]:
        return {m["name"]: m for m in (await self.authority("show"))["members"]}

    async def emptied(self, name: str, seconds: float) -> None:
        """Wait until nothing in force hangs from a member. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while (await self.members())[name]["certificates"]:  # noqa: ASYNC110 -- another process's state: there is no event
                await asyncio.sleep(0.2)

    def issued(self, since: float, until: float) -> list[int]:
        with closing(sqlite3.connect(f"file:{self.lab.ca_dir}/ca.db?mode=ro", uri=True)) as db:
            query = "select issued from serials where issued >= ? and issued < ? and profile in ('endpoint', 'workload')"
            return [row[0] for row in db.execute(query, (int(since), int(until)))]

    def said(self) -> list[dict[str, Any]]:
        lines = self.lab.processes["fleet"].output().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def taint_and_empty(self, name: str) -> None:
        """Taint, wait until nothing hangs from it, and note how even the work was.

        A window is a tenth of the spread, and every one that begins with a whole second counts. The mean is everything
        that was issued over the ten tenths: what comes late is in it and in its window, nothing falls between.
        """
        asked = time.time()
        await self.authority("taint", name, "--spread", str(SPREAD))
        told = time.time()
        await self.emptied(name, SPREAD + 120)
        since = (await self.members())[name]["since"]
        width = max(1, SPREAD // 10)
        counts = Counter(at - since for at in self.issued(since, time.time() + 1))
        last = max(counts, default=0)
        windows = [sum(counts[n] for n in range(first, first + width)) for first in range(last + 1)]
        total = sum(counts.values())
        mean = total * width / SPREAD
        self.peaks.append({"of": name, "issued": total, "mean": round(mean, 1), "peak": max(windows), "ratio": round(max(windows) / mean, 2),
                           "last_s": last, "asked_s": round(since - asked, 1), "told_s": round(told - since, 1), "tenths": windows[::width]})  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Any:
    from tests.netns.conftest import Mesh

    lab = Lab(["host-a", "host-b"], trust_domain="netns.example")
    lab.start()
    try:
        args = ["--host-life", str(LIFE), "--workload-life", str(LIFE), "--issuer-life", str(LIFE * 12)]
        lab.start_ca(args=args)
        for node in ("host-a", "host-b"):
            lab.enroll(node)
            lab.start_agent(node)
        mesh = Mesh(lab)
        for name, host in (("web", "host-a"), ("api", "host-b")):
            mesh.add(name, host)
            mesh.place(name, host)
        mesh.apply(POLICY)
        mesh.serve(lab.netns("api-host-b"), "api")
        made = World(mesh)
        fleet = lab.spawn(
            [sys.executable, str(FLEET), lab.ca_url, str(lab.ca_dir), str(lab.dir / "fleet"), str(made.fleet)],
            name="fleet", netns=lab.nodes["host-a"].netns, env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        fleet.wait_ready(60 + made.fleet)
        yield made
    finally:
        assert lab.stop() == []


@asynccontextmanager
async def traffic(world: World) -> AsyncIterator[list[HttpProber]]:
    """200 requests a second over each family, permitted; both must lose none."""
    space = world.lab.netns("web-host-a")
    for family in (0, 1):
        await world.mesh.answered(space, world.mesh.url("api", family))
    probers = [
        HttpProber([world.mesh.url("api", family)], rate=100, timeout=1.0, window=3.0, netns=space).start() for family in (0, 1)
    ]
    yield probers
    results = [await p.stop() for p in probers]
    assert [r.lost for r in results] == [0, 0], results
    assert all(r.sent > 100 for r in results)


def call_with(state: Path, url: str, netns: str) -> str:
    """Present the certificate of a state directory to the CA over TLS; "ok" or the code of the refusal."""
    enrollment = load_enrollment(state)

    async def ask(trust: Any) -> str:
        async with ControlClient(url, trust, enrollment.files) as client:
            await client.send("/v1/underlay", UnderlayUpdate(underlay=enrollment.record.underlay))
        return "ok"

    async def run() -> str:
        from mesh.recovery import newer_trust

        try:
            return await ask(await newer_trust(url, enrollment.bundle))
        except RetinueError as e:
            return e.code

    return in_netns(netns, lambda: asyncio.run(run()))


async def test_the_whole_authority_is_replaced_under_traffic(world: World, tmp_path: Path) -> None:
    lab = world.lab
    netns, url = lab.nodes["host-a"].netns, lab.ca_url
    old = tmp_path / "old"
    shutil.copytree(lab.nodes["host-a"].state_dir, old, ignore=shutil.ignore_patterns("*.sock", ".lock"))
    assert await asyncio.to_thread(call_with, old, url, netns) == "ok", "positive control"
    before = await world.members()
    began = time.time()
    async with traffic(world) as probers:
        # The intermediate.
        await world.authority("prepare", "intermediate")
        await world.authority("activate", "intermediate")
        await world.taint_and_empty("intermediate")
        await world.authority("revoke", "intermediate")
        assert await asyncio.to_thread(call_with, old, url, netns) in {"cert.revoked", "caller.revoked", "caller.certificate"}
        # The record keys; every record is signed anew.
        for kind in ("records", "policy"):
            await world.authority("prepare", kind)
            await world.authority("activate", kind)
            await world.authority("revoke", kind)
        # The root, with an overlap.
        await world.authority("prepare", "root")
        await world.authority("activate", "root")
        await world.taint_and_empty("root")
        done = await world.authority("revoke", "root")
        sequence = done["sequence"]
        # Everybody has followed, and still talks.
        async with asyncio.timeout(20):
            while (line := world.said()[-1])["connected"] != world.fleet or line["sequence"] < sequence:  # noqa: ASYNC110 -- another process's state: there is no event
                await asyncio.sleep(0.2)
        for prober in probers:
            await prober.answered(50)
    took = time.time() - began
    for host in ("host-a", "host-b"):
        status = await lab.until(host, lambda s: s.control == "connected")
        assert status.ready
        fresh = load_enrollment(lab.nodes[host].state_dir)
        assert fresh.svid.not_before > certs.not_before(load_enrollment(old).svid.leaf)
    states = {name: m["state"] for name, m in (await world.members()).items()}
    assert {n for n, s in states.items() if s == "revoked"} >= before.keys()
    assert {s for n, s in states.items() if n not in before} <= {"active", "revoked"}
    lines = [line for line in world.said() if line["at"] > began]
    assert max(line["bad"] for line in lines) <= max(2, world.fleet // 10), "certificates are renewed before they are refused"
    assert lines[-1]["bad"] == 0
    print(json.dumps({"identities": 2 * world.fleet, "seconds": round(took, 1), "peaks": world.peaks,
                      "failures": lines[-1]["failures"]}))  # fmt: skip
    # Over a few identities chance rules; over many the work is even.
    if IDENTITIES >= 100:
        assert all(p["ratio"] <= 2.0 for p in world.peaks), world.peaks


async def test_no_tls_session_outlives_its_certificate(world: World) -> None:
    """The CA gives no tickets: a second connection shows its certificate again."""
    enrollment = load_enrollment(world.lab.nodes["host-a"].state_dir)

    def twice() -> list[bool]:
        import socket

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(enrollment.files.chain, enrollment.files.key)
        host, _, port = world.lab.ca_url.removeprefix("https://").rpartition(":")
        reused, session = [], None
        for _ in range(2):
            address = (host.strip("[]"), int(port))
            with socket.create_connection(address, 5) as raw, context.wrap_socket(raw, session=session) as tls:
                tls.sendall(b"GET /v1/bundle HTTP/1.1\r\nHost: ca\r\n\r\n")
                assert tls.recv(4096).startswith(b"HTTP/1.1 200")
                reused.append(bool(tls.session_reused))
                session = tls.session
        return reused

    assert await asyncio.to_thread(in_netns, world.lab.nodes["host-a"].netns, twice) == [False, False]
