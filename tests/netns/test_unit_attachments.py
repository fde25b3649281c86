"""Identities held by control groups in the host's own network namespace: theirs alone, among all that share its stack."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from identity.errors import BadInput, Conflict, NotFound, Refused
from identity.wire.local import Attach, InstanceRef
from mesh import netns, units
from mesh.inside import INSIDE
from mesh.lab_process import Process, command, run
from mesh.local_client import LocalClient
from mesh.probe_pairs import Receiver, Sender
from tests.netns.test_workload_api import CLIENT

NEWS, CALLS, FREE = 7000, 9000, 9001
USER = 64777
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: [tcp/8080, tcp/8082, tcp/8083, udp/9000-9001, icmp]}
      - {id: news, from: {role: api}, to: {role: web}, on: [udp/7000, tcp/7000]}
      - {id: job-to-api, from: {role: job}, to: {role: api}, on: tcp/8080}
"""


class Group:
    """A control group such as a service manager makes for one unit."""

    def __init__(self, path: str) -> None:
        self.path, self.place = path, units.root() / path.strip("/")
        self.make()

    def make(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets made in here are the group's."""
        before = units.join(self.path)
        try:
            yield
        finally:
            units.join(before)

    def remove(self) -> None:
        for place in (self.place, self.place.parent):
            with contextlib.suppress(OSError):
                place.rmdir()


def words(group: Group, argv: list[str]) -> list[str]:
    """A program started as the process of a unit."""
    tool = f"import os,sys; open({str(group.place / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", tool, *argv]


class World:
    def __init__(self, mesh: Any) -> None:
        self.mesh, self.lab = mesh, mesh.lab
        self.api = {host: Group(f"/test-{self.lab.id}-{host}.slice/api.service") for host in ("host-b", "host-c")}
        self.job = Group(f"/test-{self.lab.id}-job.slice/job.service")
        self.services: dict[str, Process] = {}

    def serve(self, host: str, name: str | None = None, port: int = 8080) -> Process:
        argv = [sys.executable, "-m", "mesh.demo_service", "--name", name or f"api@{host}", "--port", str(port)]
        started = self.lab.spawn(words(self.api[host], argv), name=f"unit-{host}-{port}", netns=self.node(host))
        started.wait_ready()
        self.services[host] = started
        return started  # type: ignore[no-any-return]

    def agent(self, host: str) -> LocalClient:
        return LocalClient(self.lab.nodes[host].run_dir / "agent.sock")

    async def attach(self, host: str, request: Attach) -> None:
        async with self.agent(host) as agent:
            await agent.attach(request)

    def node(self, host: str) -> str:
        return str(self.lab.nodes[host].netns)

    def address(self, name: str, family: int) -> str:
        return str(self.mesh.addresses[name][family])

    def sender(self, host: str, family: int, tag: str, *, bind: bool = True) -> Sender:
        own = self.address("api", family) if bind else None
        return Sender("udp", self.address("web", family), NEWS, tag=tag, rate=200, netns=self.node(host), bind=own)

    async def speaking(self, stack: AsyncExitStack, host: str, family: int, tag: str, *, bind: bool = True) -> Sender:
        """A sender whose socket is made in the unit."""
        with self.api[host].inside():
            one = await stack.enter_async_context(self.sender(host, family, tag, bind=bind))
            await one.attempted(1)
        return one

    def news(self, family: int) -> Receiver:
        return Receiver("udp", NEWS, netns=self.lab.netns("web-host-a"), address=self.address("web", family))

    async def neighbours(self, host: str) -> int:
        shown = await run_in(self.node(host), "nft", "list", "counter", "inet", "retinue", "neighbours")
        return int(shown.split("packets ")[1].split()[0])


async def run_in(space: str, *argv: str) -> str:
    done = await asyncio.create_subprocess_exec(
        "nsenter", f"--net=/run/netns/{space}", *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out = (await done.communicate())[0].decode()
    assert done.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def world(make_mesh: Any) -> Iterator[World]:
    """web on host-a; api a unit on host-b and ready on host-c; job a unit of USER on host-b; batch beside them."""
    made = make_mesh("host-a", "host-b", "host-c")
    here = World(made)
    try:
        for name, host in (("web", "host-a"), ("api", "host-b"), ("job", "host-b"), ("batch", "host-b")):
            made.add(name, host)
        made.place("web", "host-a")
        made.place("batch", "host-b")
        said = made.lab.retinue("host-b", "attach", "api", "--cgroup", here.api["host-b"].path, "--wait", "15")
        assert (said["kind"], said["state"]) == ("unit", "active")
        asyncio.run(here.attach("host-b", Attach(name="job", kind="unit", cgroup=here.job.path, uid=USER)))
        asyncio.run(here.attach("host-c", Attach(name="api", kind="unit", cgroup=here.api["host-c"].path)))
        made.apply(POLICY)
        for host in ("host-b", "host-c"):
            here.serve(host)
        yield here
    finally:
        for process in made.lab.processes.values():
            if process.name.startswith("unit-"):
                process.kill()
        for group in (*here.api.values(), here.job):
            group.remove()


@pytest.fixture(params=[0, 1], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def sock_in(space: str, family: int, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
    made = netns.inside(space, lambda: socket.socket(socket.AF_INET6 if family else socket.AF_INET, kind, proto))
    made.settimeout(2)
    return made


def connect(space: str, family: int, to: tuple[str, int], bind: str | None = None, wait: float = 2.0) -> str:
    """Empty when it was answered, else the error."""
    with sock_in(space, family) as sock:
        sock.settimeout(wait)
        try:
            if bind is not None:
                sock.bind((bind, 0))
            sock.connect(to)
        except OSError as e:
            return type(e).__name__
    return ""


async def test_the_unit_serves_whom_policy_permits(world: World, family: int) -> None:
    mesh, web = world.mesh, world.lab.netns("web-host-a")
    assert (await mesh.answered(web, mesh.url("api", family))).served_by == "api@host-b"
    assert connect(web, family, (world.address("api", family), 8081)) == "ConnectionRefusedError", "denied"
    assert connect(web, family, (world.address("api", family), 8083)) == "ConnectionRefusedError", "permitted, nobody there"
    assert connect(world.lab.netns("batch-host-b"), family, (world.address("api", family), 8080)) == "ConnectionRefusedError"
    await run_in(web, "ping", "-c", "1", "-W", "2", world.address("api", family))


async def test_the_unit_alone_speaks_as_it(world: World, family: int) -> None:
    """Neighbours are as strong as can be without leaving sockets: root on the host, in another group."""
    own, web = world.address("api", family), world.address("web", family)
    node = world.node("host-b")
    before = await world.neighbours("host-b")
    async with AsyncExitStack() as stack:
        news = await stack.enter_async_context(world.news(family))
        await world.speaking(stack, "host-b", family, "bound")
        await world.speaking(stack, "host-b", family, "unbound", bind=False)
        thief = await stack.enter_async_context(world.sender("host-b", family, "thief"))
        plain = await stack.enter_async_context(world.sender("host-b", family, "plain", bind=False))
        for tag in ("bound", "unbound"):
            await news.wait(tag, 50)
            assert {src for src, t in news.arrived if t == tag} == {own}
        for one in (thief, plain):
            await one.attempted(100)
        with sock_in(node, family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw, contextlib.suppress(OSError):
            for _ in range(10):
                raw.sendto(datagram(own, web, NEWS, b"raw 1"), (web, 0))
        assert connect(node, family, (web, NEWS), bind=own) == "ConnectionRefusedError"
        await news.wait_more("bound", 50)
        assert not [t for t in ("thief", "plain", "raw") if news.of(t).seqs]
    assert await world.neighbours("host-b") > before


def datagram(src: str, dst: str, port: int, data: bytes) -> bytes:
    """A UDP packet with its IP header and no checksum of UDP over IPv4; over IPv6 the real one."""
    body = struct.pack("!HHHH", 5000, port, 8 + len(data), 0) + data
    if ":" not in src:
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0, socket.inet_aton(src), socket.inet_aton(dst))
        return head + body
    ends = socket.inet_pton(socket.AF_INET6, src) + socket.inet_pton(socket.AF_INET6, dst)
    padded = ends + struct.pack("!II", len(body), 17) + body + b"\0" * (len(body) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:6] + struct.pack("!H", (~total & 0xFFFF) or 0xFFFF) + body[8:]
    return struct.pack("!IHBB", 6 << 28, len(body), 17, 64) + ends + body


async def test_the_unit_alone_hears_what_is_sent_to_it(world: World, family: int) -> None:
    own, web, node = world.address("api", family), world.lab.netns("web-host-a"), world.node("host-b")
    async with AsyncExitStack() as stack:
        with world.api["host-b"].inside():
            unit = await stack.enter_async_context(Receiver("udp", CALLS, netns=node, address=own))
        exact = await stack.enter_async_context(Receiver("udp", FREE, netns=node, address=own))
        listeners = [sock_in(node, family) for _ in range(2)]
        for listener, address, port in zip(listeners, (own, "::" if family else "0.0.0.0"), (8082, 8083), strict=True):
            stack.enter_context(listener)
            if family:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, port))
            listener.listen()
            listener.setblocking(False)
        one = await stack.enter_async_context(Sender("udp", own, CALLS, tag="call", netns=web))
        two = await stack.enter_async_context(Sender("udp", own, FREE, tag="call", netns=web))
        await unit.wait("call", 50)
        await two.attempted(100)
        assert not exact.arrived, "a socket of a neighbour, bound to the unit's address"
        assert one.errors.total() == 0
        for port, listener in zip((8082, 8083), listeners, strict=True):
            assert await asyncio.to_thread(connect, web, family, (own, port)) == "ConnectionRefusedError"
            with pytest.raises(BlockingIOError):
                listener.accept()


async def test_two_units_of_one_host_obey_policy_too(world: World, family: int) -> None:
    """job's connections have its own address without binding it, because of its user."""
    own, node = world.address("api", family), world.node("host-b")
    code = """\
import encodings.idna, os, socket, sys
open(sys.argv[1], 'w').write(str(os.getpid()))
os.setuid(int(sys.argv[2]))
print(socket.create_connection((sys.argv[3], int(sys.argv[4])), 2).getsockname()[0])
"""

    async def job(port: int, uid: int = USER, group: Group = world.job) -> str:
        argv = [sys.executable, "-c", code, str(group.place / "cgroup.procs"), str(uid), own, str(port)]
        done = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/run/netns/{node}", *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await done.communicate()
        return out.decode().strip() or err.decode().strip().splitlines()[-1].partition(":")[0]

    assert await job(8080) == world.address("job", family)
    assert await job(8082) == "ConnectionRefusedError", "policy does not permit it"
    assert await job(8080, group=world.api["host-c"]) == "ConnectionRefusedError", "its user alone is not the unit"
    # a neighbour would have the unit's own address as its source
    assert connect(node, family, (own, 8080)) == "ConnectionRefusedError"
    # the unit reaches itself
    with world.api["host-b"].inside():
        assert connect(node, family, (own, 8080)) == ""


async def test_root_in_a_workload_beside_it_gains_nothing(world: World, family: int) -> None:
    space, own = world.lab.netns("batch-host-b"), world.address("api", family)
    device = INSIDE
    await run_in(space, "ip", "addr", "add", f"{own}/{128 if family else 32}", "dev", device, *(["nodad"] if family else []))
    try:
        async with AsyncExitStack() as stack:
            news = await stack.enter_async_context(world.news(family))
            await world.speaking(stack, "host-b", family, "unit")
            web = world.address("web", family)
            thief = await stack.enter_async_context(Sender("udp", web, NEWS, tag="thief", netns=space, bind=own))
            await news.wait("unit", 50)
            await thief.attempted(100)
            assert not news.of("thief").seqs
    finally:
        await run_in(space, "ip", "addr", "del", f"{own}/{128 if family else 32}", "dev", device)


async def test_a_socket_stays_with_the_group_that_made_it(world: World) -> None:
    """Who leaves keeps what it has open, as any process may hand its sockets on, and gets nothing new."""
    async with AsyncExitStack() as stack:
        news = await stack.enter_async_context(world.news(0))
        await world.speaking(stack, "host-b", 0, "left")  # made inside; the process is outside by now
        await news.wait("left", 50)
        after = await stack.enter_async_context(world.sender("host-b", 0, "after"))
        await after.attempted(100)
        assert not news.of("after").seqs


async def test_a_unit_that_starts_again(world: World) -> None:
    """Its group is another one under the same path: nobody's while it is away, the unit's again without a word."""
    mesh, group, web = world.mesh, world.api["host-b"], world.lab.netns("web-host-a")
    world.services["host-b"].kill()
    before = units.ident_of(group.path)
    group.place.rmdir()
    gone = await world.lab.until("host-b", lambda s: any(c.code == "plan.unit" for c in s.conditions))
    assert {a.name: (a.state, a.running) for a in gone.attachments}["api"] == ("active", False)
    for family in (0, 1):
        own = world.address("api", family)
        with sock_in(world.node("host-b"), family) as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.bind((own, 8080))
            squatter.listen()
            assert await asyncio.to_thread(connect, web, family, (own, 8080)) == "ConnectionRefusedError"
    group.make()
    assert units.ident_of(group.path) != before
    world.serve("host-b", "api@again")
    for family in (0, 1):
        assert (await mesh.answered(web, mesh.url("api", family))).served_by == "api@again"
    await world.lab.until("host-b", lambda s: all(c.code != "plan.unit" for c in s.conditions))
    world.services["host-b"].kill()
    world.serve("host-b")


class Talk:
    """The unit and a neighbour that has taken its address speak to web, over both families."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.news: list[Receiver] = []
        self.unit: list[Sender] = []
        self.thief: list[Sender] = []

    async def begin(self, stack: AsyncExitStack) -> Talk:
        for family in (0, 1):
            self.news.append(await stack.enter_async_context(self.world.news(family)))
            self.unit.append(await self.world.speaking(stack, "host-b", family, "unit"))
        for family in (0, 1):  # not before: what this process opens while it is in the group is the unit's
            self.thief.append(await stack.enter_async_context(self.world.sender("host-b", family, "thief")))
        await self.heard(20)
        return self

    async def heard(self, more: int, timeout: float = 10.0) -> None:
        """Wait until so many more of the unit's arrived in both families. Raises TimeoutError."""
        await asyncio.gather(*(news.wait_more("unit", more, timeout) for news in self.news))

    async def tried(self, more: int) -> None:
        await asyncio.gather(*(one.attempted(more) for one in (*self.unit, *self.thief)))

    def count(self, tag: str) -> list[int]:
        return [len(news.of(tag).seqs) for news in self.news]


async def test_a_killed_agent_leaves_the_rules(world: World) -> None:
    agent = world.lab.processes["agent-host-b"]
    async with AsyncExitStack() as stack:
        talk = await Talk(world).begin(stack)
        agent.kill()
        await talk.heard(50)
        await talk.tried(50)
        await asyncio.to_thread(world.lab.start_agent, "host-b")
        await world.lab.until("host-b", lambda s: s.ready)
        await talk.heard(50)
        await talk.tried(50)
        assert talk.count("thief") == [0, 0]
        for one in talk.unit:
            await one.stop()
        await asyncio.gather(*(news.wait("unit", one.sent) for news, one in zip(talk.news, talk.unit, strict=True)))


async def test_flushed_rules_are_closed_and_come_back(world: World) -> None:
    """With the agent stopped nobody puts them back: then neither the unit nor a neighbour gets anything out or in."""
    agent, node, web = world.lab.processes["agent-host-b"], world.node("host-b"), world.lab.netns("web-host-a")
    async with AsyncExitStack() as stack:
        talk = await Talk(world).begin(stack)
        agent.send(signal.SIGSTOP)
        try:
            await run_in(node, "nft", "flush", "ruleset")
            await talk.tried(20)
            heard = talk.count("unit")
            await talk.tried(100)
            assert talk.count("unit") == heard
            for family in (0, 1):
                with sock_in(node, family) as listener:
                    listener.bind((world.address("api", family), 8082))
                    listener.listen()
                    assert await asyncio.to_thread(connect, web, family, (world.address("api", family), 8082), wait=0.5) == "TimeoutError"
        finally:
            agent.send(signal.SIGCONT)
        await talk.heard(50, timeout=5)
        assert talk.count("thief") == [0, 0]


async def test_it_moves_like_any_workload(world: World) -> None:
    """There and back; nothing is accepted from the old holder after its fence, whose unit goes on speaking."""
    mesh, lab = world.mesh, world.lab
    async with AsyncExitStack() as stack:
        news = [await stack.enter_async_context(world.news(family)) for family in (0, 1)]
        senders = {"host-b": [await world.speaking(stack, "host-b", family, "host-b") for family in (0, 1)]}
        await asyncio.gather(*(one.wait("host-b", 50) for one in news))
        for to, old in (("host-c", "host-b"), ("host-b", "host-c")):
            moved = await lab.aca("workload", "move", "api", "--to", to, "--wait", "10")
            assert moved["waiting_for"] == []
            assert moved["workload"]["addresses"] == mesh.addresses["api"]
            fenced = [len(one.of(old).seqs) for one in news]
            if to not in senders:
                senders[to] = [await world.speaking(stack, to, family, to) for family in (0, 1)]
            await asyncio.gather(*(one.wait_more(to, 50) for one in news))
            await asyncio.gather(*(one.attempted(50) for one in senders[old]))
            assert [len(one.of(old).seqs) for one in news] == fenced
            for family in (0, 1):
                assert (await mesh.answered(lab.netns("web-host-a"), mesh.url("api", family))).served_by == f"api@{to}"
            shown = await lab.until(old, lambda s: any(a.name == "api" and a.state == "fenced" for a in s.attachments))
            assert [a.cgroup for a in shown.attachments if a.name == "api"] == [world.api[old].path]
            held = await run_in(world.node(old), "ip", "addr", "show", "dev", "rtn0")
            assert not [a for a in mesh.addresses["api"] if a in held]


async def test_attach_and_detach_may_be_repeated(world: World) -> None:
    """As a hook of the unit does, whatever happened before."""
    path = world.api["host-c"].path
    ref, request = InstanceRef(name="api"), Attach(name="api", kind="unit", cgroup=path)
    other = Group(f"/test-{world.lab.id}-host-c.slice/other.service")
    async with world.agent("host-c") as agent:
        assert await agent.attach(request) == await agent.attach(request)
        try:
            with pytest.raises(Conflict) as taken:
                await agent.attach(Attach(name="api", kind="unit", cgroup=other.path))
            assert taken.value.code == "attach.taken"
        finally:
            other.place.rmdir()
        await agent.detach(ref)
        with pytest.raises(NotFound):
            await agent.detach(ref)
    # and with the words of a hook
    assert (await world.lab.aretinue("host-c", "detach", "api", "--if-attached"))["changed"] is False
    assert (await world.lab.aretinue("host-c", "attach", "api", "--cgroup", path))["kind"] == "unit"


async def test_only_a_group_that_root_makes(world: World) -> None:
    group = Group(f"/test-{world.lab.id}-user.slice/own.service")
    wrong: list[dict[str, Any]] = [{"cgroup": p} for p in (group.path, "/", f"{group.path}/../x", "/none", "/a/\"", None)]
    wrong += [{"cgroup": world.job.path, "device": "eth0"}, {"kind": "host", "uid": USER}, {"kind": "netns", "cgroup": world.job.path}]
    try:
        os.chown(group.place.parent, USER, USER)
        async with world.agent("host-c") as agent:
            for fields in wrong:
                with pytest.raises((BadInput, NotFound, Refused)) as refused:
                    await agent.attach(Attach.model_validate({"name": "job", "kind": "unit"} | fields))
                assert refused.value.code in {"attach.cgroup", "attach.kind"}, fields
    finally:
        group.remove()


async def test_the_workload_api_tells_the_units_processes(world: World) -> None:
    """By its control group, and its user where one was named; root beside it is nobody."""
    asked = {"api": words(world.api["host-b"], []), "nobody": [], "job": words(world.job, [])}
    env = {**os.environ, "SPIFFE_ENDPOINT_SOCKET": f"unix://{world.lab.nodes['host-b'].run_dir / 'workload.sock'}", "GRPC_VERBOSITY": "NONE"}

    async def ask(before: list[str], user: int) -> str:
        argv = [*before, sys.executable, "-c", CLIENT, "list", str(user)]
        done = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/run/netns/{world.node('host-b')}", *argv, env=env, stdout=asyncio.subprocess.PIPE
        )
        return (await done.communicate())[0].decode()

    api, nobody, root, user = await asyncio.gather(ask(asked["api"], 0), ask([], 0), ask(asked["job"], 0), ask(asked["job"], USER))
    assert f"spiffe://{world.lab.trust_domain}/wl/api" in api
    assert "/wl/job" in user
    assert "PERMISSION_DENIED" in nobody
    assert "PERMISSION_DENIED" in root, "it is in the group of job, and not its user"


async def test_ping_goes_out_from_the_unit(world: World) -> None:
    argv = [*command("retinue"), "ping", "api", "8080", "--as", "job", "--count", "1", "-o", "json"]
    done = await asyncio.to_thread(run, argv, netns=world.node("host-b"), env=world.lab.nodes["host-b"].env, codes=range(256))
    assert '"answered": 1' in done.stdout, done.stdout + done.stderr


async def test_detached_everything_is_as_it_was(world: World) -> None:
    """The last unit takes the chains and the link to nowhere along."""
    node = world.node("host-b")
    for name in ("api", "job"):
        await world.lab.aretinue("host-b", "detach", name)
    await world.lab.until("host-b", lambda s: [a.name for a in s.attachments] == ["batch"])
    links = await run_in(node, "ip", "-o", "link")
    assert "rtv" not in links
    rules = await run_in(node, "nft", "list", "table", "inet", "retinue")
    assert "cgroupv2" not in rules
    assert world.address("api", 0) not in await run_in(node, "ip", "addr")
    assert "uidrange" not in await run_in(node, "ip", "rule")
    assert Path(f"/sys/fs/cgroup/{world.job.place.relative_to(units.TREE)}").exists(), "the group itself is not ours"
