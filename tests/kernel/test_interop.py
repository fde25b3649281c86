"""The kernel's WireGuard in the guest against our engine on this side, both directions; `wg` configures and judges."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel.machine import Machine

pytestmark = [pytest.mark.netns, pytest.mark.timeout(200)]

ENGINE = Path(sys.executable).with_name("retinue-engine")
UAPI = Path("/var/run/wireguard")
GUEST_DEVICE = "wg0"
SIZE = 1 << 20
BARE = (sys.executable, "-I", "-S", "-c")  # no site packages: start-up in the guest is slow
RECEIVE = """
import hashlib, socket, sys
s = socket.create_server((sys.argv[1], 9000), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
s.settimeout(60)
print("ready", flush=True)
c, _ = s.accept(); h = hashlib.sha256()
while data := c.recv(65536): h.update(data)
print(h.hexdigest(), flush=True)
"""
# Other bytes for each direction and family; the receiver's digest is compared with what they must be.
SEND = f"""
import hashlib, socket, sys
socket.create_connection((sys.argv[1], 9000), 30).sendall(hashlib.shake_128(sys.argv[2].encode()).digest({SIZE}))
"""


def digest(seed: str) -> str:
    return hashlib.sha256(hashlib.shake_128(seed.encode()).digest(SIZE)).hexdigest()


def keypair() -> tuple[str, str]:
    private = subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout.strip()
    return private, subprocess.run(["wg", "pubkey"], check=True, capture_output=True, text=True, input=private).stdout.strip()


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@dataclass
class Tunnel:
    """Our end is 10.96.0.1/fd96::1 in the namespace, the kernel's 10.96.0.2/fd96::2 in the guest."""

    machine: Machine
    device: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    outer: int = 4

    here = ("10.96.0.1", "fd96::1")
    there = ("10.96.0.2", "fd96::2")

    def endpoint(self, addresses: tuple[str, str], port: int = 51820) -> str:
        return f"{addresses[0]}:{port}" if self.outer == 4 else f"[{addresses[1]}]:{port}"

    def engine_peer(self, *extra: str, psk: str | None = None) -> None:
        """The kernel as our peer; keys of a secret nature go over stdin."""
        self.machine.sh("wg", "set", self.device, "peer", self.theirs[1], "endpoint", self.endpoint(self.machine.there),
                        "allowed-ips", ",".join(self.there), *extra,
                        *(("preshared-key", "/dev/stdin") if psk else ()), stdin=psk)  # fmt: skip

    def kernel_peer(self, *extra: str, psk: str | None = None) -> None:
        """Our engine as the kernel's peer."""
        self.machine.run("wg", "set", GUEST_DEVICE, "peer", self.ours[1], "endpoint", self.endpoint(self.machine.here),
                         "allowed-ips", ",".join(self.here), *extra,
                         *(("preshared-key", "/dev/stdin") if psk else ()), stdin=psk)  # fmt: skip

    def forget(self) -> None:
        """Both ends lose the other, with all sessions."""
        self.machine.sh("wg", "set", self.device, "peer", self.theirs[1], "remove")
        self.machine.run("wg", "set", GUEST_DEVICE, "peer", self.ours[1], "remove")

    def meet(self, outer: int = 4, psk: str | None = None) -> None:
        """Both ends anew, without sessions, over the outer family."""
        self.forget()
        self.outer = outer
        self.engine_peer(psk=psk)
        self.kernel_peer(psk=psk)

    def kernel_shows(self, what: str) -> str:
        return self.machine.run("wg", "show", GUEST_DEVICE, what).split("\t")[-1].strip()

    def engine_shows(self, what: str) -> str:
        return self.machine.sh("wg", "show", self.device, what).split("\t")[-1].strip()

    def kernel_counts(self) -> tuple[int, int]:
        """(received, sent) bytes at the guest's end."""
        received, sent = self.machine.run("wg", "show", GUEST_DEVICE, "transfer").split()[-2:]
        return int(received), int(sent)

    def engine_counts(self) -> tuple[int, int]:
        """(received, sent) bytes at our end."""
        received, sent = self.machine.sh("wg", "show", self.device, "transfer").split()[-2:]
        return int(received), int(sent)

    def ping_there(self, count: int = 1, wait: int = 15) -> bool:
        argv = ["ip", "netns", "exec", self.machine.ns, "ping", "-c", str(count), "-W", str(wait), self.there[0]]
        return subprocess.run(argv, check=False, capture_output=True).returncode == 0

    def ping_here(self, count: int = 1, wait: int = 15) -> bool:
        return self.machine.try_("ping", "-c", str(count), "-W", str(wait), self.here[0]) == 0

    def to_guest(self, family: int) -> None:
        """SIZE bytes over TCP into the guest, compared by digest."""
        address, seed = self.there[family], f"in {self.outer} {family}"
        with self.machine.start(*BARE, RECEIVE, address) as receiver:
            assert receiver.readline() == "ready", receiver.err
            self.machine.sh(*BARE, SEND, address, seed)
            assert receiver.readline() == digest(seed)

    def from_guest(self, family: int) -> None:
        address, seed = self.here[family], f"out {self.outer} {family}"
        argv = ["ip", "netns", "exec", self.machine.ns, *BARE, RECEIVE, address]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as receiver:
            try:
                assert receiver.stdout
                assert receiver.stdout.readline().strip() == "ready"
                self.machine.run(*BARE, SEND, address, seed)
                assert receiver.stdout.readline().strip() == digest(seed)
            finally:
                receiver.kill()


@pytest.fixture(scope="module")
def tunnel(machine: Machine) -> Iterator[Tunnel]:
    device = f"rtk{os.getpid() % 100000}"
    made = Tunnel(machine, device, keypair(), keypair())
    engine = subprocess.Popen(
        ["ip", "netns", "exec", machine.ns, str(ENGINE), "--foreground", device],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until((UAPI / f"{device}.sock").exists, "our engine did not come up")
        machine.sh("wg", "set", device, "private-key", "/dev/stdin", "listen-port", "51820", stdin=made.ours[0])
        machine.run("ip", "link", "add", GUEST_DEVICE, "type", "wireguard")
        machine.run("wg", "set", GUEST_DEVICE, "private-key", "/dev/stdin", "listen-port", "51820", stdin=made.theirs[0])
        for sh, name, addresses in ((machine.sh, device, made.here), (machine.run, GUEST_DEVICE, made.there)):
            sh("ip", "address", "add", f"{addresses[0]}/24", "dev", name)
            sh("ip", "address", "add", f"{addresses[1]}/64", "dev", name, "nodad")
            sh("ip", "link", "set", name, "mtu", "1420", "up")
        assert machine.run("ip", "-d", "link", "show", GUEST_DEVICE).count("wireguard") == 1
        yield made
    finally:
        engine.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            engine.wait(5)
        engine.kill()
        engine.wait()
        machine.try_("ip", "link", "del", GUEST_DEVICE)


@pytest.mark.parametrize(("initiator", "outer"), [("engine", 4), ("kernel", 6)])
def test_both_directions(tunnel: Tunnel, initiator: str, outer: int) -> None:
    """Either end initiates; then data flows both ways over IPv4 and IPv6 inside, IPv4 or IPv6 outside."""
    tunnel.meet(outer)
    assert tunnel.ping_there() if initiator == "engine" else tunnel.ping_here()
    for family in (0, 1):
        tunnel.to_guest(family)
        tunnel.from_guest(family)
    assert int(tunnel.kernel_shows("latest-handshakes")) > 0
    assert int(tunnel.engine_shows("latest-handshakes")) > 0
    assert tunnel.kernel_shows("endpoints") == tunnel.endpoint(tunnel.machine.here)
    assert min(*tunnel.kernel_counts(), *tunnel.engine_counts()) > 2 * SIZE


@pytest.mark.parametrize("forgetful", ["engine", "kernel"])
def test_a_peer_removed_and_added_again_makes_new_keys(tunnel: Tunnel, forgetful: str) -> None:
    """One end loses its session and initiates; the other goes over to the new keys while it holds old ones."""
    tunnel.meet()
    assert tunnel.ping_there()
    if forgetful == "engine":
        tunnel.machine.sh("wg", "set", tunnel.device, "peer", tunnel.theirs[1], "remove")
        assert not tunnel.ping_there(wait=1)  # nothing to send it to
        tunnel.engine_peer()
        assert tunnel.engine_shows("latest-handshakes") == "0"
        assert tunnel.ping_there(3)
    else:
        tunnel.machine.run("wg", "set", GUEST_DEVICE, "peer", tunnel.ours[1], "remove")
        assert not tunnel.ping_here(wait=1)
        tunnel.kernel_peer()
        assert tunnel.kernel_shows("latest-handshakes") == "0"
        assert tunnel.ping_here(3)
    assert int(tunnel.engine_shows("latest-handshakes")) > 0
    assert int(tunnel.kernel_shows("latest-handshakes")) > 0
    tunnel.to_guest(0)
    tunnel.from_guest(1)


def test_a_preshared_key_must_agree(tunnel: Tunnel) -> None:
    psk, other = (subprocess.run(["wg", "genpsk"], check=True, capture_output=True, text=True).stdout for _ in range(2))
    tunnel.meet(psk=psk)
    assert tunnel.ping_there()
    assert tunnel.ping_here()
    tunnel.to_guest(0)
    for initiates in (tunnel.ping_there, tunnel.ping_here):
        tunnel.forget()
        tunnel.engine_peer(psk=psk)
        tunnel.kernel_peer(psk=other)
        assert not initiates(2, wait=1)
        assert tunnel.engine_shows("latest-handshakes") == "0"
        assert tunnel.kernel_shows("latest-handshakes") == "0"
    tunnel.meet(psk=other)  # positive control
    assert tunnel.ping_here()


def test_either_end_roams_and_is_followed(tunnel: Tunnel) -> None:
    tunnel.meet()
    assert tunnel.ping_there()
    tunnel.machine.run("wg", "set", GUEST_DEVICE, "listen-port", "51999")
    assert tunnel.ping_here(2)
    assert tunnel.engine_shows("endpoints") == tunnel.endpoint(tunnel.machine.there, 51999)
    assert tunnel.ping_there()
    tunnel.machine.sh("wg", "set", tunnel.device, "listen-port", "51998")
    assert tunnel.ping_there(2)
    assert tunnel.kernel_shows("endpoints") == tunnel.endpoint(tunnel.machine.here, 51998)
    assert tunnel.ping_here()
    tunnel.machine.run("wg", "set", GUEST_DEVICE, "listen-port", "51820")
    tunnel.machine.sh("wg", "set", tunnel.device, "listen-port", "51820")


@pytest.mark.parametrize("keeper", ["engine", "kernel"])
def test_persistent_keepalives_are_understood(tunnel: Tunnel, keeper: str) -> None:
    """Without a packet from above, an end asked to keep the path alive does, and the other counts it."""
    tunnel.forget()
    if keeper == "engine":
        tunnel.kernel_peer()
        tunnel.engine_peer("persistent-keepalive", "1")
    else:
        tunnel.engine_peer()
        tunnel.kernel_peer("persistent-keepalive", "1")
    counts = tunnel.kernel_counts if keeper == "engine" else tunnel.engine_counts
    until(lambda: tunnel.engine_shows("latest-handshakes") != "0", "no handshake by itself")
    before = counts()[0]
    until(lambda: counts()[0] >= before + 64, "no keepalives")  # two of 32 bytes


def test_a_stranger_gets_no_answer_from_the_kernel_nor_from_us(tunnel: Tunnel) -> None:
    tunnel.meet()
    assert tunnel.ping_there()  # positive control
    tunnel.forget()
    tunnel.engine_peer()  # the kernel does not know us
    assert not tunnel.ping_there(2, wait=1)
    received, sent = tunnel.engine_counts()
    assert received == 0 < sent
    tunnel.forget()
    tunnel.kernel_peer()  # we do not know the kernel
    assert not tunnel.ping_here(2, wait=1)
    received, sent = tunnel.kernel_counts()
    assert received == 0 < sent


def test_the_two_minute_rekey_loses_nothing(tunnel: Tunnel) -> None:
    """Our engine initiated and sends on: after REKEY_AFTER_TIME it makes new keys, which the kernel takes up. Last, for it waits longest."""
    tunnel.meet()
    assert tunnel.ping_there()
    first = int(tunnel.engine_shows("latest-handshakes"))
    argv = ["ip", "netns", "exec", tunnel.machine.ns, "ping", "-q", "-i", "1", "-W", "5", "-w", "140", tunnel.there[0]]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as pings:
        try:
            until(lambda: int(tunnel.engine_shows("latest-handshakes")) > first, "no new handshake", 135)
            until(lambda: int(tunnel.kernel_shows("latest-handshakes")) >= first + 100, "the kernel knows of none")
            assert tunnel.ping_here()
        finally:
            pings.send_signal(signal.SIGINT)  # it tells its result then
            said = pings.communicate()[0]
    assert int(tunnel.engine_shows("latest-handshakes")) - first >= 100
    sent, received = re.findall(r"(\d+) packets transmitted, (\d+) received", said)[0]
    assert int(received) >= int(sent) - 1 > 100  # the last one may be on its way
