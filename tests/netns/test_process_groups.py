"""Rules that name a control group at their source, on real packets: its members get through, and nobody else does, however
he comes by a socket.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mesh import units
from mesh.compile import LocalAttachment
from mesh.snapshot import InstanceKey
from tests.netns.plane_rig import Server, echo, inside, until
from tests.netns.test_dataplane_bounds import PolicyRig

OPEN, OWN, USERS, NESTED = 6999, 7000, 7001, 7002
MPTCP = 262  # IPPROTO_MPTCP
STRANGER = 64778  # a user without privileges


class Group:
    """A control group such as a service manager makes for one unit."""

    def __init__(self, path: str) -> None:
        self.path, self.place = path, units.root() / path
        self.make()

    def make(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)

    def take(self) -> None:
        """Make this process a member."""
        (self.place / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        for place in (self.place, self.place.parent):
            with contextlib.suppress(OSError):
                place.rmdir()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyRig]:
    """web is host a itself."""
    with PolicyRig(tmp_path_factory.mktemp("groups")) as one:
        one.attach("web", "a", "")
        yield one


@pytest.fixture
def job(rig: PolicyRig) -> Iterator[Group]:
    made = Group(f"test-{rig.tag}.slice/job.service")
    yield made
    for nested in made.place.glob("*/"):
        nested.rmdir()
    made.remove()


def put(rig: PolicyRig, job: Group, *more: str) -> list[str]:
    """The policy in force, with groups as they are now. Texts of the notes on host a."""
    rig.hosts["a"].attachments[InstanceKey("web/0")] = LocalAttachment("host", groups=units.NamedGroups())
    name = job.path
    plans = rig.put(
        f"id: own, from: {{workload: web, process: 'cgroup:/{name}'}}, to: {{workload: api}}, on: [tcp/{OWN}, udp/{OWN}, icmp]",
        f"id: users, from: {{workload: web, process: ['uid:7001', 'cgroup:{name}']}}, to: {{workload: api}}, on: tcp/{USERS}",
        f"id: nested, from: {{workload: web, process: 'cgroup:/{name}/deep'}}, to: {{workload: api}}, on: tcp/{NESTED}",
        f"id: open, from: {{workload: web}}, to: {{workload: api}}, on: tcp/{OPEN}", *more,
    )  # fmt: skip
    return [note.text for note in plans["a"].notes if note.code == "plan.process"]


class Client:
    """Connections from host a, with the address of web."""

    def __init__(self, netns: str, own: str, to: str) -> None:
        self.netns, self.own, self.to = netns, own, to
        self.family = 6 if ":" in own else 4
        self.servers: dict[int, Server] = {}

    def child(self, work: Callable[[], bool], group: Group | None = None, uid: int = 0) -> bool:
        """Done on host a by a process of its own, of that group and user."""

        def fork() -> int:
            pid = os.fork()
            if pid == 0:
                try:
                    if group is not None:
                        group.take()
                    if uid:
                        os.setgroups([])
                        os.setuid(uid)
                    os._exit(0 if work() else 1)
                except BaseException:
                    traceback.print_exc()
                    os._exit(2)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        status = inside(self.netns, fork)
        assert status in {0, 1}, "the child failed"
        return status == 0

    def sock(self, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
        """A socket of whoever calls this."""
        made = socket.socket(socket.AF_INET if self.family == 4 else socket.AF_INET6, kind, proto)
        made.settimeout(1.5)
        return made

    def through(self, port: int, sock: socket.socket | None = None, source: int = 0) -> bool:
        """Does a connection to the service get an answer?"""
        with sock or self.sock() as one:
            try:
                if source:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((self.own, source))
                one.connect((self.to, port))
                return echo(one) == b"ping"
            except OSError:
                return False

    def answered(self, port: int) -> bool:
        """Does an HTTP service answer?"""
        with self.sock() as one:
            try:
                one.bind((self.own, 0))
                one.connect((self.to, port))
                return echo(one, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/")
            except OSError:
                return False


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def client(rig: PolicyRig, job: Group, request: pytest.FixtureRequest) -> Iterator[Client]:
    family = int(request.param)
    made = Client(rig.hosts["a"].ns, rig.address("web", family), rig.address("api", family))
    put(rig, job)
    with contextlib.ExitStack() as stack:
        for port in (OPEN, OWN, USERS, NESTED):
            made.servers[port] = stack.enter_context(rig.server("api", port, made.family))
        yield made


def ready(client: Client) -> None:
    assert until(lambda: client.child(lambda: client.through(OPEN)), 15)


def test_members_alone_get_through(rig: PolicyRig, client: Client, job: Group) -> None:
    """Also root beside the group, and a group of the same name in another place, are not it; groups below it are."""
    assert put(rig, job) == [f"nobody in /{job.path}/deep uses tcp/{NESTED} of rule nested as web/0: it is not there; is its unit running?"]
    ready(client)
    deep, twin = Group(f"{job.path}/deep"), Group(f"test-{rig.tag}.slice/other.slice/job.service")
    try:
        who = {"root": (None, 0), "job": (job, 0), "job's user": (job, STRANGER), "twin": (twin, 0), "deep": (deep, 0), "user": (None, 7001)}
        got = {
            (name, port)
            for name, (group, uid) in who.items()
            for port in (OPEN, OWN, USERS, NESTED)
            if client.child(lambda port=port: client.through(port), group, uid)  # type: ignore[misc]  # a default binds the loop's value
        }
        assert got == {
            *((name, OPEN) for name in who), *((name, OWN) for name in ("job", "job's user", "deep")),
            *((name, USERS) for name in ("job", "job's user", "deep", "user")),
        }  # fmt: skip
        assert put(rig, job) == []
        assert client.child(lambda: client.through(NESTED), deep), "it was made after the policy, and is told by now"
        assert not client.child(lambda: client.through(NESTED), job), "the group above it is not it"
    finally:
        twin.remove()
        deep.place.rmdir()


def test_names_as_systemd_escapes_them(rig: PolicyRig, client: Client) -> None:
    odd = Group(f"test-{rig.tag}.slice/job-a\\x2db@1:2.service")
    try:
        assert len(put(rig, odd)) == 1
        ready(client)
        assert child_of(client, odd)
        assert not child_of(client, None)
        assert rig.hosts["a"].ask("verify") == []
    finally:
        odd.remove()


def child_of(client: Client, group: Group | None) -> bool:
    return client.child(lambda: client.through(OWN), group)


def test_datagrams_and_pings(rig: PolicyRig, client: Client, job: Group) -> None:
    put(rig, job)
    ready(client)
    hears = rig.udp("api", OWN, client.family)

    def send(words: bytes) -> bool:
        with client.sock(socket.SOCK_DGRAM) as one, contextlib.suppress(OSError):
            one.bind((client.own, 0))
            for _ in range(3):
                one.sendto(words, (client.to, OWN))
        return True

    assert client.child(lambda: send(b"stranger"))
    assert client.child(lambda: send(b"member"), job)
    assert {hears.recv(100) for _ in range(3)} == {b"member"}

    def ping() -> bool:
        v4 = client.family == 4
        with client.sock(socket.SOCK_RAW, socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6) as one:
            one.bind((client.own, 0))
            body = b"\x12\x34\0\1" + b"x" * 8
            head = bytes((8 if v4 else 128, 0))
            total = sum(int.from_bytes((head + b"\0\0" + body)[n : n + 2], "big") for n in range(0, 16, 2))
            total = (total & 0xFFFF) + (total >> 16)
            try:
                one.sendto(head + (~total & 0xFFFF).to_bytes(2, "big") + body, (client.to, 0))
                while True:
                    data = one.recv(200)[20 if v4 else 0 :]
                    if data[0] in {0, 129}:
                        return True
            except OSError:
                return False

    assert client.child(ping, job)
    assert not client.child(ping)


# ---- attacks


def test_a_socket_stays_where_it_was_made(rig: PolicyRig, client: Client, job: Group) -> None:
    """Entering the group later makes no member of a socket; leaving it takes an open one along, and opens no new one."""
    put(rig, job)
    ready(client)

    def enters_with() -> bool:
        one = client.sock()
        job.take()
        return client.through(OWN, one) or not client.through(OWN)

    def leaves_with() -> bool:
        with client.sock() as one:
            one.bind((client.own, 0))
            one.connect((client.to, OWN))
            units.join("/")
            return echo(one) == b"ping" and not client.through(OWN)

    assert not client.child(enters_with)
    assert client.child(leaves_with, job)


def test_sockets_that_are_handed_on(rig: PolicyRig, client: Client, job: Group) -> None:
    """Whose they are is who made them: a member cannot use a stranger's; what a member gives away he could as well relay."""
    put(rig, job)
    ready(client)

    def hand(maker: Group | None, user: Group | None) -> bool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

        def make() -> bool:
            with client.sock() as one:
                ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [one.fileno()]))])
            return True

        assert client.child(make, maker)
        _, passed, _, _ = socket.recv_fds(theirs, 1, 1)
        one = socket.socket(fileno=passed[0])
        one.settimeout(1.5)
        got = client.child(lambda: client.through(OWN, one), user)
        one.close()
        ours.close()
        theirs.close()
        return got

    assert not hand(None, job)
    assert hand(job, None)


def test_without_privileges_nobody_becomes_a_member(rig: PolicyRig, client: Client, job: Group) -> None:
    put(rig, job)
    ready(client)

    def tries() -> bool:
        ways: tuple[Callable[[], object], ...] = (
            job.take, Group(f"{job.path}").place.joinpath("mine").mkdir, lambda: job.place.rename(job.place.with_name("away")),
            job.place.rmdir, (job.place.parent / "job2.service").mkdir, lambda: os.chown(job.place, STRANGER, STRANGER),
        )  # fmt: skip
        for way in ways:
            with contextlib.suppress(OSError):
                way()
                return True
        return client.through(OWN)

    assert not client.child(tries, uid=STRANGER)


def test_a_delegated_group_is_left_by_its_user_and_entered_by_nobody(rig: PolicyRig, client: Client, job: Group) -> None:
    """The user of a unit may own its group (Delegate=yes) without getting another process of his in."""
    for name in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
        os.chown(job.place / name, STRANGER, STRANGER)
    assert len(put(rig, job)) == 1
    ready(client)

    def enters() -> bool:
        with contextlib.suppress(OSError):
            job.take()
            return True
        return client.through(OWN)

    assert not client.child(enters, uid=STRANGER)
    assert client.child(lambda: client.through(OWN), job, STRANGER)
    deep = Group(f"{job.path}/deep")  # which he could have made: it proves nothing
    notes = put(rig, job)
    assert notes == [f"nobody in /{deep.path} uses tcp/{NESTED} of rule nested as web/0: /{job.path} does not belong to root alone: its owner could make /{deep.path} anew"]
    assert not client.child(lambda: client.through(NESTED), deep)
    assert client.child(lambda: client.through(OWN), deep)


def test_a_group_that_somebody_else_could_make_lets_nothing_through(rig: PolicyRig, client: Client, job: Group) -> None:
    put(rig, job)
    ready(client)
    assert client.child(lambda: client.through(OWN), job)
    os.chown(job.place.parent, STRANGER, STRANGER)
    try:
        assert len(put(rig, job)) == 3
        assert not any(client.child(lambda port=port: client.through(port), job) for port in (OWN, USERS, NESTED))  # type: ignore[misc]  # a default binds the loop's value
        assert client.child(lambda: client.through(USERS), uid=7001), "the other process of the same rule is not concerned"
    finally:
        os.chown(job.place.parent, 0, 0)


def test_a_group_that_is_made_anew(rig: PolicyRig, client: Client, job: Group) -> None:
    """Between its end and the next plan the path means nobody; then its sockets of before are nobody's."""
    put(rig, job)
    ready(client)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def make() -> bool:
        with client.sock() as one:
            ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [one.fileno()]))])
        return True

    assert client.child(make, job)
    _, passed, _, _ = socket.recv_fds(theirs, 1, 1)
    before = units.ident_of(job.path)
    job.place.rmdir()
    job.make()
    assert units.ident_of(job.path) not in {before, None}
    assert not client.child(lambda: client.through(OWN), job), "another group under the same path"
    job.place.rmdir()
    assert len(put(rig, job)) == 3
    for group in (None, job):
        job.make()
        assert not client.child(lambda: client.through(OWN), group)
    assert len(put(rig, job)) == 1
    assert client.child(lambda: client.through(OWN), job)
    with socket.socket(fileno=passed[0]) as old:
        old.settimeout(1.5)
        assert not client.through(OWN, old), "a socket of the group that has ended"
    ours.close()
    theirs.close()


def test_what_a_member_wrote_arrives_though_it_has_ended(rig: PolicyRig, client: Client, job: Group) -> None:
    """The kernel sends the rest for a socket that is nobody's any more, and closes properly: nothing of it is refused."""
    put(rig, job, *(f"id: r{n}, from: {{workload: web, process: '{who}'}}, to: {{workload: api}}, on: tcp/{port}"
                    for n, (port, who) in enumerate(((OWN + 40, f"cgroup:{job.path}"), (OWN + 50, "uid:7001")))))  # fmt: skip
    ready(client)
    size = 3_000_000
    for port, group, uid in ((OWN + 40, job, 0), (OWN + 50, None, 7001)):
        with Silent(rig, port, client.family) as server:
            denied = rig.hosts["a"].ask("counters")["verdicts"]["denied"]

            def write(port: int = port) -> bool:
                with client.sock() as one:
                    one.bind((client.own, 0))
                    one.connect((client.to, port))
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * size)
                    one.setblocking(False)
                    return one.send(b"x" * size) > 500_000

            assert client.child(write, group, uid)
            assert server.rest() > 500_000
            assert rig.hosts["a"].ask("counters")["verdicts"]["denied"] == denied


class Silent:
    """A listener that reads only when asked."""

    def __init__(self, rig: PolicyRig, port: int, family: int) -> None:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((rig.address("api", family), port))
            sock.listen()
            sock.settimeout(5)
            return sock

        self.sock = inside(rig.workloads["api"], make)

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def rest(self) -> int:
        """Bytes until the connection ends."""
        one, _ = self.sock.accept()
        got = 0
        with one:
            one.settimeout(5)
            while data := one.recv(1 << 16):
                got += len(data)
        return got


def test_a_flow_of_a_member_is_not_taken_over(rig: PolicyRig, client: Client, job: Group) -> None:
    """On the same two ports, while the kernel still knows the flow; also by a socket that has no owner of its own."""
    put(rig, job)
    ready(client)
    for number, proto in enumerate((0, MPTCP)):
        source = 40_000 + number
        assert client.child(lambda proto=proto, source=source: client.through(OWN, client.sock(proto=proto), source), job)  # type: ignore[misc]  # a default binds the loop's value
        for kind in (0, MPTCP):
            took = client.child(lambda kind=kind, source=source: client.through(OWN, client.sock(proto=kind), source))  # type: ignore[misc]  # a default binds the loop's value
            assert not took, (proto, kind)
    assert client.child(lambda: client.through(OWN, client.sock(proto=MPTCP)), job)


REPAIR, QUEUE, SEQUENCE = 19, 20, 21  # of linux/tcp.h
RECEIVE, SEND = 1, 2


@pytest.mark.parametrize("how", ["tcp", "mptcp", "raw"])
def test_a_flow_that_its_member_left_open_is_not_taken_over(rig: PolicyRig, client: Client, job: Group, how: str) -> None:
    """For the kernel's own packets an established flow goes on: a socket that vanished without a word leaves one."""
    put(rig, job)
    ready(client)
    source = 41_000 + ["tcp", "mptcp", "raw"].index(how)
    ours, theirs = os.pipe()

    def vanish() -> bool:
        with client.sock() as one:
            one.bind((client.own, source))
            one.connect((client.to, OWN))
            if echo(one) != b"ping":
                return False
            one.setsockopt(socket.IPPROTO_TCP, REPAIR, 1)
            for queue in (SEND, RECEIVE):
                one.setsockopt(socket.IPPROTO_TCP, QUEUE, queue)
                os.write(theirs, struct.pack("=I", one.getsockopt(socket.IPPROTO_TCP, SEQUENCE) & 0xFFFF_FFFF))
        return True

    assert client.child(vanish, job)
    sequence, acknowledged = struct.unpack("=II", os.read(ours, 8))
    os.close(ours)
    os.close(theirs)
    packet = segment(client.own, client.to, source, OWN, sequence, acknowledged, b"stolen")

    def take() -> bool:
        if how == "raw":
            with client.sock(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw, contextlib.suppress(OSError):
                raw.sendto(packet, (client.to, 0))
            return True
        return client.through(OWN, client.sock(proto=MPTCP if how == "mptcp" else 0), source)

    server = client.servers[OWN]
    before = server.received
    assert client.child(take) is (how == "raw")
    assert not until(lambda: server.received > before, 0.5)
    if how == "raw":  # and it would have arrived
        assert client.child(take, job)
        assert until(lambda: server.received > before, 2)


def segment(src: str, dst: str, sport: int, dport: int, sequence: int, acknowledged: int, data: bytes) -> bytes:
    """A TCP segment (PSH, ACK) with its IP header."""
    family = socket.AF_INET6 if ":" in src else socket.AF_INET
    ends = socket.inet_pton(family, src) + socket.inet_pton(family, dst)
    body = struct.pack("!HHIIBBHHH", sport, dport, sequence, acknowledged, 5 << 4, 0x18, 500, 0, 0) + data
    padded = ends + struct.pack("!II", len(body), 6) + body + b"\0" * (len(body) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:16] + struct.pack("!H", ~total & 0xFFFF) + body[18:]
    if family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, len(body), 6, 64) + ends + body
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 6, 0) + ends + body


def test_flushed_and_put_back(rig: PolicyRig, client: Client, job: Group) -> None:
    """Without the table nothing passes; with it back, the same does as before."""
    put(rig, job)
    ready(client)
    inside(rig.hosts["a"].ns, lambda: os.system("nft flush ruleset"))
    rig.hosts["a"].ask("verify")
    assert until(lambda: client.child(lambda: client.through(OWN), job), 10)
    assert not client.child(lambda: client.through(OWN))


def test_answers_are_delivered_and_the_other_way_is_not_opened(rig: PolicyRig, client: Client, job: Group) -> None:
    put(rig, job)
    ready(client)

    def make() -> socket.socket:
        return socket.socket(socket.AF_INET if client.family == 4 else socket.AF_INET6)

    with Server(rig.hosts["a"].ns, client.own, OWN), inside(rig.workloads["api"], make) as back:
        back.settimeout(1.5)
        with pytest.raises(OSError, match=r"."):
            back.connect((client.own, OWN))


# ---- the agent follows groups by itself


POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: job, from: {role: web, process: "cgroup:%s"}, to: {role: api}, on: tcp/8080}
"""


async def test_an_agent_follows_a_group_that_comes_and_goes(make_mesh: Any) -> None:
    """A rule that names the group of a service which is not running yet; nobody tells the agent when it starts."""
    mesh = make_mesh("host-a", "host-b")
    lab = mesh.lab
    job = Group(f"test-{lab.id}.slice/job.service")
    job.place.rmdir()
    for name, host in (("web", "host-a"), ("api", "host-b")):
        mesh.add(name, host)
    space = mesh.place("api", "host-b")
    mesh.serve(space, "api")
    said = lab.retinue("host-a", "attach", "web", "--host", "--wait", "15")
    assert said["state"] == "active"
    await mesh.aapply(POLICY % job.path)
    node = lab.nodes["host-a"].netns
    try:
        for running in (False, True, False, True):
            if running:
                job.make()
            elif job.place.exists():
                job.place.rmdir()
            await lab.until("host-a", lambda s, r=running: r is not any(c.code == "plan.process" for c in s.conditions))
            for family in (4, 6):
                client = Client(node, mesh.addresses["web"][family == 6], mesh.addresses["api"][family == 6])
                assert not await asyncio.to_thread(client.child, lambda c=client: c.answered(8080))
                if running:
                    assert await asyncio.to_thread(client.child, lambda c=client: c.answered(8080), job)
    finally:
        job.remove()
