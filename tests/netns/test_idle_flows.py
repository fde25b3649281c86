"""Flows that fall silent are ended, on real packets: those that talk are not, and a new one may begin at once.

Nothing waits for a time: the kernel's own set tells when a flow's time is over, and a flow that should have been kept
alive is only asserted on when it really spoke in time (a machine that stood still makes the test begin again).
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mesh.netfilter import forget
from mesh.snapshot import InstanceKey
from tests.netns.plane_rig import echo, inside, until
from tests.netns.test_dataplane_bounds import WEB_API, PolicyRig

pytestmark = pytest.mark.netns

FAMILIES = (4, 6)
IDLE = 2  # seconds
LONG = 60
TRIES = 4


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyRig]:
    with PolicyRig(tmp_path_factory.mktemp("idle"), "abc") as one:
        yield one


def elements(rig: PolicyRig, host: str, name: str) -> str:
    """A set of the table of a host, as text."""
    one = rig.hosts[host]
    table = "retinue_" + one.interface
    found = subprocess.run(["ip", "netns", "exec", one.ns, "nft", "-n", "list", "set", "inet", table, name],
                           capture_output=True, text=True, check=True)  # fmt: skip
    return found.stdout.partition("elements")[2]


def alive(rig: PolicyRig, host: str, sock: socket.socket, family: int) -> bool:
    """Does the host still hold the flow of this socket of web's?"""
    return f". {sock.getsockname()[1]} . " in elements(rig, host, f"live{family}")


@dataclass
class Talker:
    """Says something on a connection again and again; `gap` is the longest silence it left, `broken` how it was cut off."""

    sock: socket.socket
    gap: float = 0.0
    said: int = 0
    broken: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Talker:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(IDLE / 20):
            try:
                assert echo(self.sock) == b"ping"
            except OSError as e:
                self.broken = f"{type(e).__name__} after {time.monotonic() - last:.1f} s"
                return
            now = time.monotonic()
            self.gap, self.said, last = max(self.gap, now - last), self.said + 1, now

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def refused(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"too late")
        return sock.recv(100) == b""
    except (ConnectionResetError, BrokenPipeError):
        return True


def counter(rig: PolicyRig, host: str, name: str = "idled") -> int:
    return int(rig.hosts[host].ask("counters")["verdicts"].get(name, 0))


def test_a_silent_flow_is_ended_a_talking_one_goes_on_and_a_new_one_begins(rig: PolicyRig) -> None:
    rig.put(f"id: r, {WEB_API}, on: [tcp/7000, udp/7000], idle_timeout: {IDLE}s", f"id: free, {WEB_API}, on: tcp/7001")
    with contextlib.ExitStack() as stack:
        servers = {family: stack.enter_context(rig.server("api", 7000, family)) for family in FAMILIES}
        free, web, api, back = {}, {}, {}, {}
        for family in FAMILIES:
            stack.enter_context(rig.server("api", 7001, family))
            free[family] = rig.connect("web", "api", 7001, family)
            assert echo(free[family]) == b"ping"
            web[family], api[family] = rig.udp("web", 0, family), rig.udp("api", 7000, family)
            web[family].sendto(b"question", (rig.address("api", family), 7000))
            data, back[family] = api[family].recvfrom(100)
            api[family].sendto(b"answer", back[family])
            assert (data, web[family].recv(100)) == (b"question", b"answer")
        for _ in range(TRIES):
            silent = {family: rig.connect("web", "api", 7000, family) for family in FAMILIES}
            busy = {family: rig.connect("web", "api", 7000, family) for family in FAMILIES}
            assert [echo(sock) for sock in silent.values()] == [b"ping", b"ping"]
            with Talker(busy[4]) as four, Talker(busy[6]) as six:
                assert until(lambda all_of=silent: not any(alive(rig, h, s, f) for f, s in all_of.items() for h in "ab"), IDLE + 30)
            talkers = (four, six)
            assert all(not one.broken or one.gap >= IDLE for one in talkers), talkers
            if not any(one.broken or one.gap >= IDLE for one in talkers):
                break
        assert not any(one.broken for one in talkers), talkers
        assert all(one.said > 3 for one in talkers)
        assert until(lambda: not any(alive(rig, host, web[f], f) for f in FAMILIES for host in "ab"), IDLE + 30)
        for family in FAMILIES:
            before, received = counter(rig, "a"), servers[family].received
            assert refused(silent[family])
            assert counter(rig, "a") > before
            again = rig.connect("web", "api", 7000, family)
            assert echo(again) == b"ping"
            assert servers[family].received == received + len(b"ping")
            assert echo(free[family]) == b"ping"  # silent all the time, and of a rule without a limit
            with same_ports(rig, silent[family], family) as same:
                assert echo(same) == b"ping"
            # An answer to a datagram comes in time or not at all; the next datagram begins a flow.
            before = counter(rig, "b")
            api[family].sendto(b"too late", back[family])
            assert until(lambda b=before: counter(rig, "b") > b)
            web[family].sendto(b"again", (rig.address("api", family), 7000))
            assert api[family].recv(100) == b"again"
            api[family].sendto(b"answer again", back[family])
            assert web[family].recv(100) == b"answer again"


def same_ports(rig: PolicyRig, old: socket.socket, family: int) -> socket.socket:
    """A SYN begins a flow, whatever was known of an ended one between the same two ports."""
    port = old.getsockname()[1]
    old.close()

    def connect() -> socket.socket:
        made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.settimeout(3)
        made.bind((rig.address("web", family), port))
        made.connect((rig.address("api", family), 7000))
        return made

    return inside(rig.workloads["web"], connect)


def test_the_receiving_host_alone_ends_it_also_when_tracking_has_forgotten_it(rig: PolicyRig) -> None:
    """The source's host is of another policy, without a limit: what it lets out is refused by the other end's host."""
    plans = rig.put(f"id: r, {WEB_API}, on: tcp/7000")
    rig.put(f"id: r, {WEB_API}, on: tcp/7000, idle_timeout: {IDLE}s")
    rig.hosts["a"].apply(plans["a"])
    everything = {
        (rig.address(one, family), rig.address(other, family)): lambda proto, port: False
        for family in FAMILIES for one, other in (("web", "api"), ("api", "web"))
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        servers = {family: stack.enter_context(rig.server("api", 7000, family)) for family in FAMILIES}
        socks = {family: rig.connect("web", "api", 7000, family) for family in FAMILIES}
        assert [echo(sock) for sock in socks.values()] == [b"ping", b"ping"]
        assert until(lambda: not any("timeout" in elements(rig, "b", f"grace{f}") or alive(rig, "b", s, f) for f, s in socks.items()), IDLE + 30)
        assert inside(rig.hosts["b"].ns, lambda: forget(everything)) >= 2
        for family, sock in socks.items():
            received, before = servers[family].received, counter(rig, "b")
            assert refused(sock)
            assert servers[family].received == received
            assert counter(rig, "b") > before
            # Forgotten by tracking, but not silent: it goes on in the middle.
            talks = rig.connect("web", "api", 7000, family)
            spoke = time.monotonic()
            assert echo(talks) == b"ping"
            assert inside(rig.hosts["b"].ns, lambda: forget(everything)) >= 1
            try:
                assert echo(talks) == b"ping"
            except OSError:
                assert time.monotonic() - spoke >= IDLE, "it was cut off though it spoke"


def test_a_closed_connection_leaves_room(rig: PolicyRig) -> None:
    """A FIN takes the flow out of the set in which it might stand for hours."""
    rig.put(f"id: r, {WEB_API}, on: tcp/7000, idle_timeout: 2h")
    with rig.server("api", 7000):
        sock = rig.connect("web", "api", 7000)
        assert echo(sock) == b"ping"
        assert alive(rig, "b", sock, 4)
        port = sock.getsockname()[1]
        sock.close()
        for host in "ab":
            assert until(lambda host=host: f". {port} . " not in elements(rig, host, "live4"))
            assert f". {port} . " in elements(rig, host, "closing4")


def test_an_open_connection_survives_a_new_limit_a_restart_and_a_move(rig: PolicyRig) -> None:
    rule = f"id: r, {WEB_API}, on: tcp/7000"
    limited = f"{rule}, idle_timeout: {LONG}s"
    rig.put(rule)
    with contextlib.ExitStack() as stack:
        servers = {family: stack.enter_context(rig.server("api", 7000, family)) for family in FAMILIES}
        socks = {family: rig.connect("web", "api", 7000, family, timeout=15) for family in FAMILIES}

        def all_talk() -> bool:
            return [echo(sock) for sock in socks.values()] == [b"ping", b"ping"]

        assert all_talk()
        rig.put(limited)  # they began without one
        assert all_talk()
        assert all(alive(rig, "b", sock, family) for family, sock in socks.items())
        before = {host: counter(rig, host) for host in "ac"}
        # The agent comes back and puts the table in place anew: what it knew of flows is gone.
        rig.hosts["b"].kill()
        rig.hosts["b"].launch()
        rig.hosts["b"].ask("start")
        rig.put(limited)
        assert all_talk()
        # Somebody empties the table.
        table = "retinue_" + rig.hosts["b"].interface
        subprocess.run(["ip", "netns", "exec", rig.hosts["b"].ns, "nft", "flush", "table", "inet", table], check=True)
        assert until(lambda: any("firewall.restored" in event for event in rig.hosts["b"].ask("events")), 15)
        assert all_talk()
        # api goes to host c, with its namespace and its open sockets.
        del rig.hosts["b"].attachments[InstanceKey("api/0")]
        rig.where["api"], rig.epochs["api"] = "c", 2
        rig.attach("api", "c")
        rig.put(limited)
        assert until(lambda: all(rig.address("api", family) in addresses(rig.workloads["api"]) for family in FAMILIES))
        received = {family: server.received for family, server in servers.items()}
        assert all_talk()
        assert all(server.received > received[family] for family, server in servers.items())
        assert all(alive(rig, "c", sock, family) for family, sock in socks.items())
        assert {host: counter(rig, host) for host in "ac"} == before


def addresses(ns: str) -> str:
    return subprocess.run(["ip", "-n", ns, "-brief", "address"], capture_output=True, text=True, check=True).stdout
