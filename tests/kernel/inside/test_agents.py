"""The whole product in the guest: a CA and three enrolled hosts, two on the kernel's WireGuard and one on our engine.

    host-a (kernel): web, batch        host-b (kernel): api        host-c (engine): db, and the place api moves to

web may talk to api and db, and they to web; batch may talk to nobody until the policy says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import pytest

from identity.wire.admin import PolicyApply, PolicyFileIn, TokenCreate, WorkloadAdd, WorkloadMove
from identity.wire.local import Attach, Status
from mesh import netns
from mesh.capture import Capture
from mesh.lab import Lab
from mesh.local_client import LocalClient
from mesh.probe_pairs import Receiver, Sender

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

DEVICES = {"host-a": "kernel", "host-b": "kernel", "host-c": "userspace"}
HOMES = {"web": "host-a", "batch": "host-a", "api": "host-b", "db": "host-c"}
TCP, UDP = 8080, 9000
WAIT = 120.0  # seconds for what has to come; emulated machines are slow
RATE = 20.0  # probes a second and pair
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-out, from: {role: web}, to: {role: [api, db]}, on: [tcp/8080, udp/9000]}
      - {id: web-in, from: {role: [api, db]}, to: {role: web}, on: [tcp/8080, udp/9000]}
"""
BATCH_TOO = POLICY + "      - {id: batch-out, from: {role: batch}, to: {role: [api, db]}, on: [tcp/8080, udp/9000]}\n"


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


class World:
    """The lab, where its workloads are, and what tests do there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.addresses: dict[str, list[str]] = {}

    async def build(self) -> None:
        self.lab.start_ca()
        with ThreadPoolExecutor(len(DEVICES)) as pool:
            tokens = [await self.admin("tokens", TokenCreate(host=host)) for host in DEVICES]
            list(pool.map(self._join, DEVICES, [made["token"] for made in tokens]))
        for name, host in HOMES.items():
            made = await self.admin("workloads", WorkloadAdd(name=name, host=host, labels={"role": name}))
            self.addresses[name] = made["addresses"]
        await self.apply(POLICY)
        for name, host in HOMES.items():
            await self.place(name, host)
        await self.place("api", "host-c")
        for host in DEVICES:
            here = [name for name, home in HOMES.items() if home == host]
            await self.until(host, lambda s, here=here: {a.name for a in s.attachments if a.state == "active"} >= set(here))

    def _join(self, host: str, token: str) -> None:
        self.lab.use_token(host, token)
        self.lab.start_agent(host, args=("--device", DEVICES[host]))

    async def admin(self, path: str, request: Any) -> Any:
        return await self.lab.admin("POST", f"/v1/{path}", request, timeout=4 * WAIT)

    async def apply(self, text: str) -> None:
        """A policy, in force on every host when it returns."""
        made = await self.admin("policy", PolicyApply(files=[PolicyFileIn(name="shop.yaml", text=text)]))
        for host in DEVICES:
            await self.until(host, lambda s: (s.policy_revision or 0) >= made["revision"])

    async def place(self, name: str, host: str) -> None:
        space = self.lab.add_workload(f"{name}-{host}")
        async with LocalClient(self.lab.nodes[host].run_dir / "agent.sock") as agent:
            await agent.attach(Attach(name=name, netns=space))

    async def until(self, host: str, holds: Any) -> Status:
        return await self.lab.until(host, holds)

    def space(self, name: str, host: str | None = None) -> str:
        return self.lab.netns(f"{name}-{host or HOMES[name]}")

    def inside(self, host: str, *argv: str) -> str:
        return run("ip", "netns", "exec", self.lab.netns(host), *argv)

    def index(self, host: str) -> str:
        """What tells a tunnel device from another one of that name."""
        return run("ip", "-n", self.lab.netns(host), "-o", "link", "show", "rtn0").partition(":")[0]

    def connect(self, src: str, dst: str, family: int, port: int = TCP) -> socket.socket:
        """A TCP connection. Raises OSError; ConnectionRefusedError where the policy denies it."""
        kind = (socket.AF_INET, socket.AF_INET6)[family]
        made = netns.inside(self.space(src), lambda: socket.socket(kind, socket.SOCK_STREAM))
        made.settimeout(WAIT)
        try:
            made.connect((self.addresses[dst][family], port))
        except OSError:
            made.close()
            raise
        return made

    @contextlib.contextmanager
    def listening(self, name: str, host: str | None = None) -> Iterator[list[socket.socket]]:
        """Listeners of both families at a place of a workload."""
        with contextlib.ExitStack() as stack:
            made = []
            for family, kind in enumerate((socket.AF_INET, socket.AF_INET6)):
                bind = functools.partial(socket.create_server, (self.addresses[name][family], TCP), family=kind)
                server = netns.inside(self.space(name, host), bind)
                server.settimeout(WAIT)
                made.append(stack.enter_context(server))
            yield made


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab(tuple(DEVICES), trust_domain="kernel.example") as lab:
        made = World(lab)
        asyncio.run(made.build())
        yield made


class Probes:
    """UDP probes from workloads to one place of a workload, over both families; tags are ``source4`` and ``source6``."""

    def __init__(self, world: World, to: str, host: str | None = None) -> None:
        self.world, self.to = world, to
        self.senders: dict[str, Sender] = {}
        self.receivers = [Receiver("udp", UDP, netns=world.space(to, host), address=a) for a in world.addresses[to]]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Probes:
        for receiver in self.receivers:
            await self._stack.enter_async_context(receiver)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def start(self, source: str, host: str | None = None) -> None:
        for family, address in enumerate(self.world.addresses[self.to]):
            sender = Sender("udp", address, UDP, tag=self.tags(source, host)[family], rate=RATE, netns=self.world.space(source, host),
                            bind=self.world.addresses[source][family])  # fmt: skip
            self.senders[self.tags(source, host)[family]] = await self._stack.enter_async_context(sender)

    @staticmethod
    def tags(source: str, host: str | None = None) -> tuple[str, str]:
        name = f"{source}@{host}" if host else source
        return f"{name}-v4", f"{name}-v6"

    def heard(self, source: str, host: str | None = None) -> list[int]:
        return [len(self.receivers[f].of(tag).seqs) for f, tag in enumerate(self.tags(source, host))]

    async def more(self, source: str, host: str | None = None, count: int = 10) -> None:
        """Until so many further probes have come, of each family."""
        for family, tag in enumerate(self.tags(source, host)):
            await self.receivers[family].wait_more(tag, count, WAIT)

    async def tried(self, source: str, host: str | None = None, count: int = 20) -> None:
        for tag in self.tags(source, host):
            await self.senders[tag].attempted(count, WAIT)

    async def lost(self, source: str) -> list[int]:
        """Stop sending; the numbers that did not arrive."""
        missing: list[int] = []
        for family, tag in enumerate(self.tags(source)):
            sender, receiver = self.senders[tag], self.receivers[family]
            await sender.stop()
            assert not sender.errors, sender.errors
            with contextlib.suppress(TimeoutError):
                await receiver.wait(tag, sender.sent, 10)
            missing += sender.lost(receiver.of(tag))
        return missing


@pytest.fixture
async def to_api(world: World) -> AsyncIterator[Probes]:
    async with Probes(world, "api") as probes:
        yield probes


def talk(near: socket.socket, far: socket.socket) -> None:
    far.settimeout(WAIT)
    for one, other in ((near, far), (far, near)):
        one.sendall(b"marker")
        assert other.recv(100) == b"marker"


async def permitted_and_denied(world: World, dst: str) -> None:
    """web reaches dst and dst web, over TCP and both families; batch is refused, and dst's listener hears nothing."""
    with world.listening(dst) as servers, world.listening("web") as back:
        for family in (0, 1):
            with world.connect("web", dst, family) as near, servers[family].accept()[0] as far:
                talk(near, far)
            with world.connect(dst, "web", family) as near, back[family].accept()[0] as far:
                talk(near, far)
            with pytest.raises(ConnectionRefusedError):
                world.connect("batch", dst, family)
            servers[family].settimeout(0)
            with pytest.raises(BlockingIOError):
                servers[family].accept()


async def test_agents_drive_the_device_they_were_given(world: World) -> None:
    for host, device in DEVICES.items():
        status = await world.until(host, lambda s: s.control == "connected")
        assert status.device.startswith(f"{device}"), status.device
        link = f" {run('ip', '-n', world.lab.netns(host), '-d', 'link', 'show', 'rtn0')} ".replace("\n", " ")
        assert (" wireguard " in link, " tun " in link) == (device == "kernel", device == "userspace")


async def test_agents_hold_the_policy_between_kernels(world: World, to_api: Probes) -> None:
    await permitted_and_denied(world, "api")
    for source in ("web", "batch"):
        await to_api.start(source)
    await to_api.more("web")
    await to_api.tried("batch")
    assert to_api.heard("batch") == [0, 0]
    received, sent = (int(n) for n in world.inside("host-a", "wg", "show", "rtn0", "transfer").splitlines()[0].split()[-2:])
    assert min(received, sent) > 0, "through the kernel's device"
    await world.apply(BATCH_TOO)  # positive control: the very same probes
    await to_api.more("batch")
    with world.listening("api") as servers, world.connect("batch", "api", 0) as near, servers[0].accept()[0] as far:
        talk(near, far)
        await world.apply(POLICY)
        cut = to_api.heard("batch")
        near.sendall(b"late")  # on a connection that was open
        await to_api.tried("batch")
        await to_api.more("web")
        assert to_api.heard("batch") == cut
        far.settimeout(0)
        with pytest.raises((BlockingIOError, ConnectionResetError)):
            far.recv(100)


async def test_agents_keep_kernel_and_engine_together(world: World) -> None:
    """A mixed pair: web's host is on the kernel's device, db's on our engine. Both directions, and who is denied."""
    await permitted_and_denied(world, "db")
    async with Probes(world, "db") as there, Probes(world, "web") as back:
        for source in ("web", "batch"):
            await there.start(source)
        await back.start("db")
        await there.more("web")
        await back.more("db")
        await there.tried("batch")
        assert there.heard("batch") == [0, 0]
        assert await there.lost("web") == []
        assert await back.lost("db") == []


async def test_agents_killed_lose_no_tunnel(world: World, to_api: Probes) -> None:
    """Both are killed at once; what the kernels hold goes on by itself, and is taken over with its sessions."""
    hosts = ("host-a", "host-b")
    for source in ("web", "batch"):
        await to_api.start(source)
    await to_api.more("web")
    with world.listening("api") as servers, world.connect("web", "api", 1) as near, servers[1].accept()[0] as far:
        before = [world.index(host) for host in hosts]
        for host in hosts:
            world.lab.processes[f"agent-{host}"].kill()
        await to_api.more("web")
        talk(near, far)
        await asyncio.gather(*(asyncio.to_thread(world.lab.start_agent, host, args=("--device", DEVICES[host])) for host in hosts))
        for host in hosts:
            await world.until(host, lambda s: s.control == "connected")
        await to_api.more("web")
        assert [world.index(host) for host in hosts] == before, "the devices are those from before"
        talk(near, far)
    await to_api.tried("batch")
    assert to_api.heard("batch") == [0, 0]
    assert await to_api.lost("web") == []


async def test_agents_move_a_workload_and_fence_the_old_place(world: World) -> None:
    """The old holder's agent is stopped and never hears of it: web's host alone refuses what still comes from there."""
    nodes = world.lab.nodes
    agent = world.lab.processes["agent-host-b"]
    async with Probes(world, "web") as news:
        await news.start("api", "host-b")
        await news.more("api", "host-b")
        agent.send(signal.SIGSTOP)
        try:
            moved = await world.admin("workloads/move", WorkloadMove(name="api", to="host-c", wait=8, force=True))
            assert moved["workload"]["host"] == "host-c"
            assert moved["workload"]["addresses"] == world.addresses["api"]
            await world.until("host-a", lambda s: any(
                p.endpoint == "host-c" and any(world.addresses["api"][0] in a for a in p.allowed_ips) for p in s.peers))  # fmt: skip
            await news.start("api", "host-c")
            await news.more("api", "host-c")
            fenced = news.heard("api", "host-b")
            outer = b"".join(ipaddress.ip_address(nodes[n].v4).packed for n in ("host-b", "host-a"))
            with Capture(world.lab.switch, {"b to a": outer}) as capture:
                await news.tried("api", "host-b", 20)
                await news.more("api", "host-c")
                assert capture.take().hits["b to a"] >= 20, "positive control: its packets are on the wire"
            assert news.heard("api", "host-b") == fenced
        finally:
            agent.send(signal.SIGCONT)
        status = await world.until("host-b", lambda s: all(a.state != "active" for a in s.attachments if a.name == "api"))
        assert next(a.state for a in status.attachments if a.name == "api") in {"fenced", "waiting"}
        await news.more("api", "host-c")
        assert news.heard("api", "host-b") == fenced
    shown = dict(line.split("\t") for line in world.inside("host-a", "wg", "show", "rtn0", "allowed-ips").splitlines())
    for address, length in zip(world.addresses["api"], (32, 128), strict=True):
        assert sum(f"{address}/{length}" in allowed.split() for allowed in shown.values()) == 1, shown
    with world.listening("api", "host-c") as servers:  # and a new connection finds the new place
        for family in (0, 1):
            with world.connect("web", "api", family) as near, servers[family].accept()[0] as far:
                talk(near, far)
            with pytest.raises(ConnectionRefusedError):
                world.connect("batch", "api", family)
