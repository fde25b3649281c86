"""``python -m tests.ha.crowd [--simulated 5000] [--agents 50] [--rounds 2]``: how soon the last of many peers refuses. `make crowd`.

One CA; `--agents` real agents in namespaces of their own with traffic over their tunnels, and `--simulated` endpoints that follow
their feeds over mutual TLS and verify every frame (tests/ha/simulated.py). The identities api-0, api-1 ... may talk with all of
them. Each is revoked in its turn, while the agent of its own host is stopped, so that nobody but the peers can refuse it:

    real        the last packet of an open flow (UDP from it, TCP to it) that any peer still let through
    simulated   when the revoked placement was verified

Both are counted from the moment the administrator's request is sent. Then: a policy change to every stream, the CA killed and
started again, and the CA told to stop. Writes out/crowd.json (`measure, subject, value, unit, n, min, max`). Nothing but
lost connections of others and missing peers makes the exit status 1: times are figures, not conditions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ca.plane import Plane
from identity.names import TrustDomain
from identity.wire.admin import PolicyApply, PolicyFileIn, WorkloadAdd, WorkloadRef
from mesh.lab_process import inside, ip_batch
from tests.bench.__main__ import machine
from tests.bench.ca_rows import Rows
from tests.chaos.stage import Stage, rss
from tests.ha.simulated import Remote, enrol

OUT: Final = Path(__file__).resolve().parents[2] / "out" / "crowd.json"
FIRST: Final = "198.18.0.1"  # of the simulated endpoints' own addresses (RFC 2544)
PACE: Final = 10.0  # messages a second on each flow
QUIET_S: Final = 1.5  # so long after the last packet a flow counts as cut
POLICY: Final = """\
meshpolicy: 1
segments:
  - name: crowd
    allow:
      - {{id: news, from: {{role: api}}, to: {{role: web}}, on: udp/9002}}
      - {{id: asks, from: {{role: web}}, to: {{role: api}}, on: [tcp/9001, tcp/{port}]}}
"""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of enrolments wait for thousands of fsyncs elsewhere."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="retinue-crowd-", dir=memory if memory.is_dir() else None) as root:
        yield Path(root)


def favour(stage: Stage) -> None:
    """Let every process in the lab's namespaces run before what else this machine does (SCHED_RR)."""
    spaces = {os.stat(f"/run/netns/{path.name}").st_ino for path in Path("/run/netns").glob(f"{stage.lab.netns('')}*")}
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with contextlib.suppress(OSError):
            if os.stat(task / "ns" / "net").st_ino in spaces:
                os.sched_setscheduler(int(task.name), os.SCHED_RR, os.sched_param(1))


class CrowdStage(Stage):
    """h00 holds the identities that are revoked; every other host holds one of its own."""

    def __init__(self, agents: int, simulated: int, rounds: int, root: Path) -> None:
        super().__init__([f"h{n:02}" for n in range(agents)], lease=30.0)
        self.simulated, self.root = simulated, root
        self._mounted: Path | None = None
        self.apis = [f"api-{k}" for k in range(rounds)]

    @property
    def receivers(self) -> list[str]:
        return self.hosts[1:]

    def _build(self) -> None:
        self._disks()
        try:
            self._fill()
        except BaseException:
            self._release()
            raise

    def _fill(self) -> None:
        lab = self.lab
        self._authority()
        lab.start_ca(init=False)

        def up(host: str) -> None:
            lab.enroll(host)
            lab.start_agent(host)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(up, self.hosts))
        asyncio.run(self._populate())
        names = [(self.hosts[0], api) for api in self.apis] + [(host, f"web-{host}") for host in self.receivers]

        def place(one: tuple[str, str]) -> None:
            host, name = one
            space = self.spaces[name, host] = lab.add_workload(name)
            lab.retinue(host, "attach", name, "--netns", space)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(place, names))
        self._probes()
        lab.ca("policy", "apply", str(self._policy(9003)))

    def _disks(self) -> None:
        """The machines' files in memory: fifty real ones would not wait for one disk's fsyncs, each for all the others'."""
        nodes = self.lab.dir / "nodes"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "retinue-crowd", str(nodes)], check=True)
        self._mounted = nodes
        for node in self.lab.nodes.values():
            node.dir.mkdir(mode=0o700)
            node.run_dir.mkdir(mode=0o700)

    def _release(self) -> None:
        if self._mounted is not None:
            subprocess.run(["umount", "-l", str(self._mounted)], check=True)
            self._mounted = None

    async def __aexit__(self, *exc: object) -> None:
        self._release()
        await super().__aexit__(*exc)

    def _policy(self, port: int) -> Path:
        path = self.lab.dir / "crowd.yaml"
        path.write_text(POLICY.format(port=port))
        return path

    def _authority(self) -> None:
        began = time.monotonic()
        Plane.create(self.root / "ca", TrustDomain(self.lab.trust_domain), time.time())
        plane = Plane.open(self.root / "ca", time.time)
        enrol(plane, self.simulated, self.root / "simulated", lambda _: {"role": "web"})
        plane.close()
        shutil.copytree(self.root / "ca", self.lab.ca_dir)
        print(f"{self.simulated} simulated endpoints made in {time.monotonic() - began:.0f} s", flush=True)

    async def _populate(self) -> None:
        for name, host in [*((api, self.hosts[0]) for api in self.apis), *((f"web-{h}", h) for h in self.receivers)]:
            made = await self.lab.admin("POST", "/v1/workloads", WorkloadAdd(name=name, host=host, labels={"role": name.partition("-")[0]}))
            self.mesh.addresses[name] = made["addresses"]

    def _probes(self) -> None:
        """From and to each api: UDP to every second receiver, a TCP connection from every other one; both families."""
        addresses = self.mesh.addresses
        for api in self.apis:
            for n, host in enumerate(self.receivers):
                web, family = f"web-{host}", (n // 2) % 2
                if n % 2:
                    self.flow(f"{api}_{host}", "tcp", addresses[api][family], 9001, bind=addresses[web][family], rate=PACE)
                else:
                    self.flow(f"{api}_{host}", "udp", addresses[web][family], 9002, bind=addresses[api][family], rate=PACE)
        for api in self.apis:
            mine = [f.spec for tag, f in self.flows.items() if tag.startswith(f"{api}_")]
            self.receive(api, self.spaces[api, self.hosts[0]], [s for s in mine if s.stream])
        for host in self.receivers:
            mine = [f.spec for tag, f in self.flows.items() if tag.endswith(f"_{host}")]
            space = self.spaces[f"web-{host}", host]
            if heard := [s for s in mine if not s.stream]:
                self.receive(f"web-{host}", space, heard)
            for api in self.apis:  # one each: when an api is revoked, those that call it are stopped
                if asked := [s for s in mine if s.stream and s.tag.startswith(f"{api}_")]:
                    self.send(f"{api}_{host}", space, asked)
        for api in self.apis:
            mine = [f.spec for tag, f in self.flows.items() if tag.startswith(f"{api}_")]
            self.send(api, self.spaces[api, self.hosts[0]], [s for s in mine if not s.stream])

    def silence(self, api: str) -> None:
        """Stop what still sends from and to an api that was revoked: agents that note refused packets share this machine."""
        for name, process in self.lab.processes.items():
            if name == f"send-{api}" or name.startswith(f"send-{api}_"):
                process.send(signal.SIGKILL)

    def permitted(self, *prefixes: str) -> Any:
        return [f for t, f in self.flows.items() if t.startswith(prefixes or ("api-",))]

    def join(self, *args: str) -> Remote:
        """The simulated endpoints, on a machine of their own with an address for each."""
        node = self.lab.add_node("crowd")
        ip_batch(["route add local 198.18.0.0/15 dev lo"], netns=node.netns)
        ip_batch([f"route add 198.18.0.0/15 via {node.v4}"], netns=self.lab.nodes["ca"].netns)
        port = self.lab.ca_url.rpartition(":")[2]
        return Remote(self.root / "simulated", self.lab.nodes["ca"].v4, int(port), "--from", FIRST, *args, inside=inside(node.netns, []))


async def silent(stage: CrowdStage, api: str, since: float) -> dict[str, float]:
    """When the last packet of each open flow of an api arrived, once none has for QUIET_S; or after a while, anyhow."""
    while True:
        await asyncio.sleep(0.1)
        lasts: dict[str, float] = {}
        for host in stage.receivers:
            flow = stage.flows[f"{api}_{host}"]
            lasts[host] = max((flow.log.arrived(n) for n in range(flow.since(since - 2), flow.next)), default=0.0)
        now = time.time()
        if now - since > 15 or (now - max(lasts.values()) > QUIET_S and now - since > QUIET_S):
            return lasts


async def revocations(stage: CrowdStage, remote: Remote, rows: Rows) -> list[str]:
    """Every api in its turn; what went wrong."""
    wrong: list[str] = []
    everybody: list[float] = []
    simulated: list[float] = []
    real: dict[str, list[float]] = {"udp": [], "tcp": []}
    holder = stage.agent(stage.hosts[0])
    holder.send(signal.SIGSTOP)
    try:
        for k, api in enumerate(stage.apis):
            await stage.flowing(*(f"{a}_" for a in stage.apis[k:]), timeout=60, count=5)
            asked: list[float] = []

            def revoke(api: str = api, asked: list[float] = asked) -> None:
                asked.append(time.time())
                asyncio.run(stage.lab.admin("POST", "/v1/workloads/revoke", WorkloadRef(name=api), timeout=30))

            times = await asyncio.to_thread(remote.during, f"placement/{api}/0", revoke)
            lasts = await silent(stage, api, asked[0])
            wrong += [f"{api}: {host} goes on" for host, last in lasts.items() if time.time() - last < QUIET_S]
            cut = [max(0.0, last - asked[0]) * 1000 for last in lasts.values()]
            for host, spent in zip(lasts, cut, strict=True):
                real[stage.flows[f"{api}_{host}"].spec.transport].append(spent)
            if len(times) != remote.count:
                wrong.append(f"{api}: {remote.count - len(times)} simulated endpoints did not hear of it")
            others = stage.tallies(asked[0] - 1, time.time() - 0.7, *(f"{a}_" for a in stage.apis[k + 1 :])) if k + 1 < len(stage.apis) else []
            if lost := sum(t.lost for t in others):
                wrong.append(f"{api}: flows of others lost {lost} of {sum(t.sent for t in others)} messages")
            print(f"  {api}: last of {len(cut)} real peers {max(cut):.0f} ms, of {len(times)} simulated {max(times, default=0):.0f} ms; "
                  f"others lost {lost} of {sum(t.sent for t in others)}", flush=True)  # fmt: skip
            stage.silence(api)
            simulated += times
            everybody += [*times, *cut]
    finally:
        holder.send(signal.SIGCONT)
    agents = len(stage.hosts)
    rows.add("revocation: last packet of an open flow", f"{agents} agents, UDP", real["udp"], "ms")
    rows.add("revocation: last packet of an open flow", f"{agents} agents, TCP", real["tcp"], "ms")
    rows.add("revocation: verified", f"{remote.count} simulated", simulated, "ms")
    rows.add("revocation: refusing, all", f"{remote.count} + {agents}", everybody, "ms")
    return wrong


async def run(stage: CrowdStage, rows: Rows, changes: int, *, reports: bool, first: bool) -> list[str]:
    lab = stage.lab
    boost = (lambda: favour(stage)) if first else (lambda: None)
    ca = lab.processes["retinue-ca"]
    before = rss(ca.pid)
    remote = await asyncio.to_thread(stage.join, *(["--reports"] if reports else []))
    try:
        boost()
        joined = await asyncio.to_thread(remote.ask, "connect")
        subject = f"{remote.count} simulated"
        if joined["open"] != remote.count:
            return [f"{joined['open']} of {remote.count} simulated endpoints connected"]
        rows.add("connected, one after the other", subject, [joined["seconds"]], "s")
        rows.add("memory a stream, its view included", subject, [(rss(ca.pid) - before) / 1024 / remote.count], "KiB")
        wrong = await revocations(stage, remote, rows)
        told: list[float] = []
        for n in range(changes):
            text = POLICY.format(port=9100 + n)

            def publish(text: str = text) -> None:
                request = PolicyApply(files=[PolicyFileIn(name="crowd.yaml", text=text)])
                asyncio.run(lab.admin("POST", "/v1/policy", request, timeout=60))

            told += await asyncio.to_thread(remote.during, "policy", publish)
            await asyncio.sleep(4.0)  # the agents follow
        if told:
            rows.add("policy change to every stream", subject, told, "ms")
        if len(told) != changes * remote.count:
            wrong.append("a policy change did not reach every simulated endpoint")
        await asyncio.to_thread(remote.ask, "lose")
        await stage.kill_ca()
        await stage.start_ca()
        boost()
        back = await asyncio.to_thread(remote.ask, "back", seconds=300)
        rows.add("all back after a killed CA is ready again", subject, [back["seconds"]], "s")
        if back["open"] != remote.count:
            wrong.append(f"{back['open']} of {remote.count} came back")
        ca = lab.processes["retinue-ca"]
        began = time.monotonic()
        ca.send(signal.SIGTERM)
        status = await asyncio.to_thread(ca.wait, 120.0)
        rows.add("told to stop, until it has", subject, [time.monotonic() - began], "s")
        if status != 0:
            wrong.append(f"the CA ended with status {status}")
        return wrong
    finally:
        await asyncio.to_thread(remote.close)


def write(rows: Rows, wrong: list[str], settings: dict[str, object], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    report = {"machine": machine(), "settings": settings, "rows": rows.rows, "wrong": wrong}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


async def play(
    agents: int, simulated: int, rounds: int, changes: int, *, reports: bool, out: Path | None, first: bool = False
) -> list[str]:
    """Everything; what went wrong."""
    rows = Rows()
    with scratch() as root:
        async with CrowdStage(agents, simulated, rounds, root) as stage:
            wrong = await run(stage, rows, changes, reports=reports, first=first)
    if out is not None:
        settings: dict[str, object] = {
            "agents": agents, "simulated": simulated, "rounds": rounds, "changes": changes, "reports": reports, "real-time": first or os.sched_getscheduler(0) == os.SCHED_RR,
        }  # fmt: skip
        write(rows, wrong, settings, out)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--simulated", type=int, default=5000)
    parser.add_argument("--agents", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--changes", type=int, default=3)
    parser.add_argument("--reports", action="store_true", help="simulated endpoints also report over a second connection each")
    parser.add_argument("--real-time", action="store_true", help="on a shared machine: what is measured runs before other work, once it is set up")
    asked = parser.parse_args()
    if os.geteuid() != 0:
        print("error[privilege.root]: the crowd needs network namespaces\nhint: run as root", file=sys.stderr)
        return 4
    wrong = asyncio.run(play(asked.agents, asked.simulated, asked.rounds, asked.changes, reports=asked.reports, out=OUT, first=asked.real_time))
    for line in wrong:
        print(f"wrong: {line}")
    print(f"wrote {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
