"""Machines that were away come back by themselves: past a taint, and past two days, a new root and three policies."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ca.client import AdminClient
from identity.wire.admin import Host, HostList, PolicyApply, PolicyFileIn, PolicyReply, Workload, WorkloadAdd
from identity.wire.authority import AuthorityInfo, KindRef, MemberRef
from identity.wire.recovery import HostStanding
from mesh.lab import CA_PORT, Lab
from mesh.lab_process import command
from tests.netns.conftest import Mesh

pytestmark = pytest.mark.timeout(150)
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
HOSTS = ("host-a", "host-b")
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {{id: rule-{number}, from: {{role: web}}, to: {{role: api}}, on: tcp/{port}}}
"""


class Away:
    """Two hosts with a service between them, and commands that cost no process."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.mesh = lab, Mesh(lab)

    def build(self) -> None:
        self.lab.bring_up(HOSTS)
        places = (("web", "host-a"), ("api", "host-b"))
        for name, host in places:
            made = self.admin.post("/v1/workloads", WorkloadAdd(name=name, host=host, labels={"role": name}), Workload)
            self.mesh.addresses[name] = list(made.addresses)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda place: self.mesh.place(*place), places))
        self.mesh.serve(self.lab.netns("api-host-b"), "api")

    @property
    def admin(self) -> AdminClient:
        return AdminClient(self.lab.ca_dir)

    def authority(self, step: str, kind: Any) -> None:
        self.admin.post(f"/v1/authority/{step}", KindRef(kind=kind), AuthorityInfo)

    def policy(self, number: int, port: int) -> str:
        files = [PolicyFileIn(name="p.yaml", text=POLICY.format(number=number, port=port))]
        return self.admin.post("/v1/policy", PolicyApply(files=files), PolicyReply).digest

    def hanging(self, name: str) -> int:
        """Certificates in force below a member of the authority."""
        members = self.admin.get("/v1/authority", AuthorityInfo).members
        return next(m.certificates for m in members if m.name == name)

    def standing(self, host: str) -> HostStanding:
        return self.admin.get("/v1/hosts/standing", HostStanding, {"name": host})

    def off(self, *names: str) -> None:
        for name in names:
            self.lab.processes.pop(name).stop()

    def on(self, what: str, days: float) -> None:
        """The CA or a host's agent, by a clock that is `days` ahead."""
        env = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"+{days}d", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
        if what == "ca":
            argv = [*command("retinue-ca"), "serve", "--dir", str(self.lab.ca_dir), "--listen", f"0.0.0.0:{CA_PORT}"]
            self.lab.spawn(argv, name="retinue-ca", netns=self.lab.nodes["ca"].netns, env={"RETINUE_CA_DIR": str(self.lab.ca_dir), **env})
            self.lab.processes["retinue-ca"].wait_ready(30)
            return
        here = self.lab.nodes[what]
        argv = [*command("retinue-agent"), "--state-dir", str(here.state_dir), "--run-dir", str(here.run_dir)]
        self.lab.spawn(argv, name=f"agent-{what}", netns=here.netns, env=here.env | env)

    async def talks(self) -> None:
        """Both families, with the policy's newest port."""
        for family in (0, 1):
            answer = await self.mesh.answered(self.lab.netns("web-host-a"), self.mesh.url("api", family), patience=30)
            assert answer.served_by == "api"

    async def until(self, holds: Any, seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not await asyncio.to_thread(holds):  # noqa: ASYNC110 -- another process's state: there is no event
                await asyncio.sleep(0.1)


@pytest.fixture
def away() -> Iterator[Away]:
    if FAKETIME is None:
        pytest.fail("libfaketime is not installed")
    lab = Lab(HOSTS, trust_domain="netns.example")
    lab.start()
    try:
        made = Away(lab)
        made.build()
        yield made
    finally:
        assert lab.stop() == []


async def test_who_was_away_comes_back_by_itself(away: Away) -> None:
    lab = away.lab
    away.policy(0, 8080)
    await away.talks()
    # host-b sleeps through a taint: the others have renewed, the authority is still believed, and nothing waits for host-b.
    away.off("agent-host-b")
    for step in ("prepare", "activate"):
        away.authority(step, "intermediate")
    away.admin.post("/v1/authority/taint", MemberRef(name="intermediate", spread=1), AuthorityInfo)
    await away.until(lambda: away.hanging("intermediate") <= 1)
    assert away.hanging("intermediate") == 1
    await asyncio.to_thread(lab.start_agent, "host-b")
    await away.until(lambda: away.hanging("intermediate") == 0)
    away.admin.post("/v1/authority/revoke", MemberRef(name="intermediate"), AuthorityInfo)
    for host in HOSTS:
        await lab.until(host, lambda s: s.control == "connected")
        assert away.standing(host).recoveries == [], "it renewed; it did not have to recover"
    await away.talks()

    # Both are off for two days: their certificates have ended, another root is in force, and three policies came.
    copy = lab.dir / "copy"
    away.off("agent-host-a", "agent-host-b", "retinue-ca")
    shutil.copytree(lab.nodes["host-a"].state_dir, copy, ignore=shutil.ignore_patterns("*.sock"))
    away.on("ca", 2)
    for step in ("prepare", "activate"):
        away.authority(step, "root")
    away.admin.post("/v1/authority/revoke", MemberRef(name="root", force=True), AuthorityInfo)
    digest = [away.policy(number, port) for number, port in ((1, 9998), (2, 9997), (3, 8080))][-1]
    for host in HOSTS:
        away.on(host, 2)
    for host in HOSTS:
        status = await lab.until(host, lambda s: s.policy_digest == digest and s.control == "connected", timeout=60)
        assert status.ready
        assert len(away.standing(host).recoveries) == 1
    await away.talks()

    # A copy of host-a's state from before wakes up as well: it is found, and host-a is out until somebody has looked.
    away.off("agent-host-a")
    shutil.rmtree(lab.nodes["host-a"].state_dir)
    shutil.copytree(copy, lab.nodes["host-a"].state_dir)
    away.on("host-a", 2)
    await away.until(lambda: away.standing("host-a").quarantined_at is not None)
    listed: list[Host] = away.admin.get("/v1/hosts", HostList).hosts
    assert {h.name: h.state for h in listed} == {"host-a": "quarantined", "host-b": "enrolled"}
