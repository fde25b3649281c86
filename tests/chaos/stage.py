"""The stage every row plays on: hosts with workloads, and probe streams on permitted and denied pairs, both families.

    web, batch on host-a        api on host-b, a place for it on host-c        lone (fence: strict) on host-c
    permitted: web -> api udp 9000, tcp 9001; api -> web udp 9002; web -> lone udp 9003, lone -> web udp 9004
    denied:    batch -> api udp 9000 (permitted once, at the start: the positive control of every silence after it)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mesh.lab import Lab
from mesh.lab_process import Process, in_netns, ip_batch
from tests.chaos.impair import Profile, plain
from tests.chaos.traffic import BROKEN, CONNECTS, DUPLICATES, Log, Spec
from tests.netns.conftest import Mesh

RATE: Final = 200.0
GRACE: Final = 0.5  # seconds a message may still be under way
POLICY: Final = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {{id: web-to-api, from: {{role: web}}, to: {{role: api}}, on: [udp/9000, tcp/9001, tcp/8080]}}
      - {{id: api-to-web, from: {{role: api}}, to: {{role: web}}, on: udp/9002}}
      - {{id: web-to-lone, from: {{role: web}}, to: {{role: lone}}, on: udp/9003}}
      - {{id: lone-to-web, from: {{role: lone}}, to: {{role: web}}, on: udp/9004}}
{more}"""
CONTROL: Final = "      - {id: control, from: {role: batch}, to: {role: api}, on: udp/9000}\n"


@dataclass(slots=True)
class Tally:
    """What became of the messages of one flow in a stretch of time. Milliseconds are spans without any delivery."""

    flow: str
    sent: int
    delivered: int
    lost: int
    gap_ms: float  # longest span between two arrivals with losses in between (or to the end)
    delay_ms: float  # longest time one message took


class Flow:
    """One probe stream and its log."""

    def __init__(self, spec: Spec, *, denied: bool = False) -> None:
        self.spec, self.denied, self.log = spec, denied, Log(spec.log)

    @property
    def next(self) -> int:
        return self.log.upcoming

    def delivered(self, first: int = 0, last: int | None = None) -> int:
        end = self.next if last is None else last
        return sum(1 for n in range(first, end) if self.log.arrived(n))

    def since(self, when: float) -> int:
        """Number of the first message sent at or after a time."""
        n = self.next
        while n > 0 and self.log.sent(n - 1) >= when:
            n -= 1
        return n

    def arrivals_after(self, when: float, first: int = 0) -> int:
        """Messages that arrived later than a time, whenever they were sent."""
        return sum(1 for n in range(first, self.next) if self.log.arrived(n) > when)

    def tally(self, begin: float, end: float) -> Tally:
        """Messages sent in [begin, end]."""
        first, last = self.since(begin), self.since(end)
        sent = last - first
        lost, gap, delay, before = 0, 0.0, 0.0, begin
        missing = False
        for n in range(first, last):
            arrived = self.log.arrived(n)
            if not arrived:
                lost, missing = lost + 1, True
                continue
            delay = max(delay, arrived - self.log.sent(n))
            if missing:
                gap, missing = max(gap, arrived - before), False
            before = max(before, arrived)
        if missing:
            gap = max(gap, end - before)
        return Tally(self.spec.tag, sent, sent - lost, lost, round(gap * 1000, 1), round(delay * 1000, 1))

    def gap_from(self, when: float) -> float:
        """Seconds from a time to the first arrival of a message sent after it; infinity while there is none."""
        for n in range(self.since(when), self.next):
            if self.log.arrived(n):
                return self.log.arrived(n) - when
        return float("inf")


@dataclass(slots=True)
class Bypass:
    """Deliveries on denied pairs: 0, or the run has failed."""

    attempted: int = 0
    delivered: int = 0


class Stage:
    """`async with Stage() as stage`. Rows share it; every row leaves it whole (`settle`)."""

    def __init__(self, hosts: Sequence[str] = ("host-a", "host-b", "host-c"), *, lease: float = 5.0, ca_args: Sequence[str] = ()) -> None:
        self.lab = Lab(hosts, trust_domain="chaos.example")
        self.hosts, self.lease, self.ca_args = list(hosts), lease, list(ca_args)
        self.mesh = Mesh(self.lab)
        self.flows: dict[str, Flow] = {}
        self.controls: dict[str, str] = {}
        self.spaces: dict[tuple[str, str], str] = {}
        self.watched_from: float = 0.0

    # ---- life

    async def __aenter__(self) -> Stage:
        await asyncio.to_thread(self.lab.start)
        try:
            await asyncio.to_thread(self._build)
        except BaseException:
            await asyncio.to_thread(self.lab.stop, force=True)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        left = await asyncio.to_thread(self.lab.stop)
        for flow in self.flows.values():
            flow.log.close()
        if exc[0] is None and left:
            raise AssertionError(f"left behind: {left}")

    @property
    def agent_args(self) -> list[str]:
        return ["--lease", str(self.lease)]

    def _build(self) -> None:
        lab, mesh = self.lab, self.mesh
        lab.start_ca(args=self.ca_args)
        for host in self.hosts:
            lab.enroll(host)
            lab.start_agent(host, args=self.agent_args)
        for name, host, more in (("web", "host-a", ()), ("batch", "host-a", ()), ("api", "host-b", ()), ("lone", "host-c", ("--fence", "strict"))):
            made = lab.ca("workload", "add", name, "--host", host, "--label", f"role={name}", *more)
            mesh.addresses[name] = made["addresses"]
            self.spaces[name, host] = mesh.place(name, host)
        self.spaces["api", "host-c"] = mesh.place("api", "host-c", wait=0)
        self._start_probes()
        mesh.apply(POLICY.format(more=CONTROL))

    def flow(self, tag: str, transport: str, to: str, port: int, *, bind: str | None = None, denied: bool = False, rate: float = RATE) -> Flow:
        """Register a flow; its log exists afterwards."""
        path = self.lab.dir / f"flow-{tag}"
        Log(path, create=True).close()
        self.flows[tag] = Flow(Spec(tag, transport, to, port, str(path), rate, bind), denied=denied)
        return self.flows[tag]

    def receive(self, name: str, netns: str, specs: Sequence[Spec]) -> Process:
        control = self.controls[name] = str(self.lab.dir / f"ctl-{name}")
        Path(control).unlink(missing_ok=True)
        process = self.lab.spawn(
            [sys.executable, "-m", "tests.chaos.traffic", "receive", control, *(s.dump() for s in specs)], name=f"recv-{name}", netns=netns
        )
        process.wait_ready()
        return process

    def send(self, name: str, netns: str, specs: Sequence[Spec]) -> Process:
        return self.lab.spawn([sys.executable, "-m", "tests.chaos.traffic", "send", *(s.dump() for s in specs)], name=f"send-{name}", netns=netns)

    def command(self, receiver: str, text: str, timeout: float = 5.0) -> str:
        """One command of a receiver, and its answer."""
        mine = self.lab.dir / f"ask-{os.urandom(4).hex()}"
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
            sock.bind(str(mine))
            sock.settimeout(timeout)
            try:
                sock.sendto(text.encode(), self.controls[receiver])
                return sock.recv(4096).decode()
            finally:
                mine.unlink()

    def _start_probes(self) -> None:
        a, space = self.mesh.addresses, self.spaces
        for f, v in ((0, "4"), (1, "6")):
            self.flow(f"web-api{v}", "udp", a["api"][f], 9000, bind=a["web"][f])
            self.flow(f"web-tcp{v}", "tcp", a["api"][f], 9001, bind=a["web"][f])
            self.flow(f"batch-api{v}", "udp", a["api"][f], 9000, bind=a["batch"][f], denied=True)
            self.flow(f"api-b{v}", "udp", a["web"][f], 9002, bind=a["api"][f])
            self.flow(f"api-c{v}", "udp", a["web"][f], 9002, bind=a["api"][f])
            self.flow(f"web-lone{v}", "udp", a["lone"][f], 9003, bind=a["web"][f])
            self.flow(f"lone-web{v}", "udp", a["web"][f], 9004, bind=a["lone"][f])
        spec = {tag: f.spec for tag, f in self.flows.items()}
        into_api = [s for tag, s in spec.items() if tag.startswith(("web-api", "web-tcp", "batch-api"))]
        self.receive("api-b", space["api", "host-b"], into_api)
        self.receive("api-c", space["api", "host-c"], into_api)
        self.receive("web", space["web", "host-a"], [s for tag, s in spec.items() if tag.startswith(("api-", "lone-"))])
        self.receive("lone", space["lone", "host-c"], [s for tag, s in spec.items() if tag.startswith("web-lone")])
        self.send("web", space["web", "host-a"], [s for tag, s in spec.items() if tag.startswith("web-")])
        self.send("batch", space["batch", "host-a"], [s for tag, s in spec.items() if tag.startswith("batch-")])
        self.send("api-b", space["api", "host-b"], [spec["api-b4"], spec["api-b6"]])
        self.send("api-c", space["api", "host-c"], [spec["api-c4"], spec["api-c6"]])
        self.send("lone", space["lone", "host-c"], [spec["lone-web4"], spec["lone-web6"]])

    # ---- what rows ask

    async def begin(self) -> None:
        """The denied pair delivers while it is permitted (positive control); from its closing on, nothing may come."""
        denied = [f for f in self.flows.values() if f.denied]
        await self.until(lambda: all(f.delivered() > 20 for f in denied), "the denied pair while it is permitted")
        await self.mesh.aapply(POLICY.format(more=""))
        await asyncio.sleep(0.3)
        self.watched_from = time.time()
        await self.flowing()

    def permitted(self, *prefixes: str) -> list[Flow]:
        """Flows that are to deliver now, by tag prefix; without: all that end or begin at web."""
        wanted = prefixes or ("web-api", "web-tcp", "web-lone", "lone-web", f"api-{self.home[-1]}")
        return [f for tag, f in self.flows.items() if tag.startswith(wanted)]

    @property
    def home(self) -> str:
        """Where api is, by the CA's own list."""
        row = next(w for w in self.lab.ca("workload", "list") if w["name"] == "api")
        return str(row["host"])

    async def until(self, holds: Any, what: str, timeout: float = 20.0) -> float:
        """Seconds until a condition held. Raises TimeoutError that says which."""
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > timeout:
                raise TimeoutError(f"{what} did not come within {timeout:g} s")
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def flowing(self, *prefixes: str, timeout: float = 30.0, count: int = 40) -> float:
        """Wait until every permitted flow delivers `count` further messages; the seconds it took."""
        flows = self.permitted(*prefixes)
        start = time.time()

        def all_flow() -> bool:
            return all(f.delivered(f.since(start)) >= count for f in flows)

        try:
            return await self.until(all_flow, "all permitted flows", timeout)
        except TimeoutError as e:
            silent = [f.spec.tag for f in flows if f.delivered(f.since(start)) < count]
            raise TimeoutError(f"{e}; silent: {', '.join(silent)}") from None

    async def run_for(self, seconds: float) -> tuple[float, float]:
        """Let traffic run; the stretch of time, over when messages under way have had their grace."""
        begin = time.time()
        await asyncio.sleep(seconds)
        end = time.time()
        await asyncio.sleep(GRACE)
        return begin, end

    def tallies(self, begin: float, end: float, *prefixes: str) -> list[Tally]:
        return [f.tally(begin, end) for f in self.permitted(*prefixes)]

    def bypass(self) -> Bypass:
        """Denied messages sent since `begin`, and how many of them were delivered."""
        out = Bypass()
        for f in self.flows.values():
            if f.denied:
                first = f.since(self.watched_from)
                out.attempted += f.next - first
                out.delivered += f.delivered(first)
        return out

    def connections(self) -> tuple[int, int]:
        """(made, broken) connections of the TCP streams."""
        tcp = [f.log for f in self.flows.values() if f.spec.stream]
        return sum(x.count(CONNECTS) for x in tcp), sum(x.count(BROKEN) for x in tcp)

    def duplicates(self) -> int:
        return sum(f.log.count(DUPLICATES) for f in self.flows.values())

    # ---- what rows do

    def agent(self, host: str) -> Process:
        return self.lab.processes[f"agent-{host}"]

    async def restart_agent(self, host: str, *, wait: bool = True) -> None:
        await asyncio.to_thread(self.lab.start_agent, host, args=self.agent_args, wait=wait)

    async def kill_ca(self) -> None:
        await asyncio.to_thread(self.lab.processes["retinue-ca"].kill)

    async def start_ca(self) -> None:
        await asyncio.to_thread(lambda: self.lab.start_ca(init=False, args=self.ca_args))

    def engine_pid(self, host: str) -> int:
        return int(json.loads(next(self.lab.nodes[host].run_dir.glob("engine-*.json")).read_text())["pid"])

    def sh(self, netns: str, script: str) -> str:
        from mesh.lab_process import run

        return run(["sh", "-c", script], netns=netns).stdout

    def cut(self, host: str, direction: str = "both", *, only: str = "ip") -> None:
        """Drop at the host's own underlay link; `only` narrows it (an nft match). `heal` takes it away."""
        rules = ""
        if direction in {"both", "in"}:
            rules += f"chain in {{ type filter hook ingress device eth0 priority 0; {only} drop; }}\n"
        if direction in {"both", "out"}:
            rules += f"chain out {{ type filter hook egress device eth0 priority 0; {only} drop; }}\n"
        self._nft(host, f"table netdev chaos {{\n{rules}}}\n")

    def cut_ca(self, host: str) -> None:
        """Only the way between a host and the CA is cut."""
        ca = self.lab.nodes["ca"].v4
        self._nft(host, "table netdev chaos {\n"
                  f"chain in {{ type filter hook ingress device eth0 priority 0; ip saddr {ca} drop; }}\n"
                  f"chain out {{ type filter hook egress device eth0 priority 0; ip daddr {ca} drop; }}\n}}\n")  # fmt: skip

    def heal(self, host: str) -> None:
        self._nft(host, "")

    def _nft(self, host: str, text: str) -> None:
        from mesh.lab_process import run

        run(["nft", "-f", "-"], netns=self.lab.nodes[host].netns, stdin="table netdev chaos\ndelete table netdev chaos\n" + text)

    def impair(self, host: str, profile: Profile, seed: int) -> Process:
        """A bad network in front of one host, in place of its switch port; `whole` makes it good again."""
        port = f"p{list(self.lab.nodes).index(host)}"
        for node in self.lab.nodes.values():
            in_netns(node.netns, lambda: plain("eth0"))
        ip_batch([f"link set {port} nomaster", f"link add w{port} type veth peer name v{port}",
                  f"link set v{port} addrgenmode none master br0 up", f"link set w{port} addrgenmode none up"], netns=self.lab.switch)  # fmt: skip
        argv = [sys.executable, "-m", "tests.chaos.impair", port, f"w{port}", str(seed), profile.dump()]
        process = self.lab.spawn(argv, name=f"impair-{host}", netns=self.lab.switch)
        process.wait_ready()
        return process

    async def whole(self, host: str) -> dict[str, int]:
        """Take the bad network away again; what it did."""
        port = f"p{list(self.lab.nodes).index(host)}"
        process = self.lab.processes[f"impair-{host}"]
        before = len(process.output())
        process.send(signal.SIGUSR1)
        await self.until(lambda: len(process.output()) > before, "the bridge's figures")
        figures: dict[str, int] = json.loads(process.output().splitlines()[-1])
        process.kill()
        ip_batch([f"link del w{port}", f"link set {port} master br0"], netns=self.lab.switch)
        return figures

    async def move(self, to: str, *args: str) -> dict[str, Any]:
        done: dict[str, Any] = await self.lab.aca("workload", "move", "api", "--to", to, *args)
        return done

    async def settle(self) -> None:
        """Everything runs, nothing is cut, api is at home on host-b, all permitted flows deliver."""
        for host in self.hosts:
            with contextlib.suppress(Exception):
                await asyncio.to_thread(self.heal, host)
            process = self.agent(host)
            process.send(signal.SIGCONT)
            if not process.running:
                await self.restart_agent(host)
        if not self.lab.processes["retinue-ca"].running:
            await self.start_ca()
        for host in self.hosts:
            await self.lab.until(host, lambda s: s.control == "connected", timeout=30)
        if await asyncio.to_thread(lambda: self.home) != "host-b":
            await self.move("host-b")
        await self.flowing()


def worst(tallies: Sequence[Tally]) -> dict[str, float]:
    """Figures of several flows in one line."""
    return {
        "sent": sum(t.sent for t in tallies), "lost": sum(t.lost for t in tallies),
        "gap_ms": max((t.gap_ms for t in tallies), default=0.0), "delay_ms": max((t.delay_ms for t in tallies), default=0.0),
    }  # fmt: skip


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def stopwatch(into: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds of a block, rounded to milliseconds."""
    began = time.monotonic()
    yield
    into[name] = round(time.monotonic() - began, 3)


@dataclass(slots=True)
class Samples:
    """Milliseconds measured many times."""

    values: list[float] = field(default_factory=list)

    def p(self, percent: float) -> float:
        ordered = sorted(self.values)
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 1) if ordered else float("nan")
