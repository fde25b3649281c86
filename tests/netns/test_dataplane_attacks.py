"""What a hostile workload, a hostile member host or a neighbour on the underlay may try (A24, A28, A32-A34)."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from mesh.firewall_names import accepted_mark
from tests.netns.plane_rig import Host, Rig, echo, inside, ip, ports, until

pytestmark = pytest.mark.netns


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, "abc") as built:
        yield built


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(src: str, dst: str, proto: int, payload: bytes) -> bytes:
    """An IP packet of either family."""
    a, b = ip_address(src), ip_address(dst)
    if a.version == 6:
        return struct.pack("!IHBB", 0x6000_0000, len(payload), proto, 64) + a.packed + b.packed + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, proto, 0) + a.packed + b.packed
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(src: str, dst: str, sport: int, dport: int, data: bytes) -> bytes:
    a, b = ip_address(src).packed, ip_address(dst).packed
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    pseudo = a + b + struct.pack("!IHBB", 8 + len(data), 0, 0, 17) if len(a) == 16 else a + b + struct.pack("!BBH", 0, 17, 8 + len(data))
    return packet(src, dst, 17, head[:6] + struct.pack("!H", checksum(pseudo + head + data)) + data)


def emit(ns: str, device: str, payload: bytes, *, mac: bytes | None = None, count: int = 3) -> None:
    """Put raw IP packets on a device, past all routing and filtering of that namespace."""

    def send() -> None:
        protocol = 0x86DD if payload[0] >> 4 == 6 else 0x0800
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM if mac else socket.SOCK_RAW) as sock:
            for _ in range(count):
                if mac:
                    sock.sendto(payload, (device, protocol, 0, 0, mac))
                else:
                    sock.bind((device, protocol))
                    sock.send(payload)

    inside(ns, send)


def gateway_mac(ns: str) -> bytes:
    shown = subprocess.run(["ip", "-n", ns, "neigh"], check=True, capture_output=True, text=True).stdout
    return bytes.fromhex(shown.split("lladdr ")[1].split()[0].replace(":", ""))


def received(sock: socket.socket) -> list[bytes]:
    sock.settimeout(0.3)
    got = []
    with contextlib.suppress(TimeoutError):
        while True:
            got.append(sock.recv(2000))
    return got


@pytest.mark.parametrize("family", [4, 6])
def test_a_workload_cannot_speak_with_another_address(rig: Rig, family: int) -> None:
    rig.apply(("web", "api", ports("udp/9000")), ("web", "batch", ports("udp/9000")))
    web, batch, api = (rig.address(n, family) for n in ("web", "batch", "api"))
    listeners = [rig.udp("api", 9000, family), rig.udp("batch", 9000, family)]
    for name, dst in (("batch", api), ("batch", batch)):
        emit(rig.workloads[name], "rtn0", udp(web, dst, 1, 9000, b"spoof"), mac=gateway_mac(rig.workloads[name]))
    emit(rig.workloads["api"], "rtn0", udp(web, batch, 1, 9000, b"spoof"), mac=gateway_mac(rig.workloads["api"]))
    assert [received(s) for s in listeners] == [[], []]
    for dst in (api, batch):  # positive control: the same packets from where they belong
        emit(rig.workloads["web"], "rtn0", udp(web, dst, 1, 9000, b"own"), mac=gateway_mac(rig.workloads["web"]), count=1)
    assert [received(s) for s in listeners] == [[b"own"], [b"own"]]
    assert rig.hosts["a"].ask("counters")["verdicts"]["spoofed"] == 6
    assert rig.hosts["b"].ask("counters")["verdicts"]["spoofed"] == 3


@pytest.mark.parametrize("family", [4, 6])
def test_a_rooted_host_speaks_for_its_own_instances_and_for_no_others(rig: Rig, family: int) -> None:
    """The stated limit: a member host without any rules of its own, sending what it likes into its tunnel."""
    rig.where["far"], rig.epochs["far"] = "c", 1
    rig.workloads["far"] = rig.namespace("far")
    rig.attach("far", "c")
    rig.apply(("web", "api", ports("udp/9000")), ("far", "api", ports("udp/9000")))
    web, batch, far, api = (rig.address(n, family) for n in ("web", "batch", "far", "api"))
    listener = rig.udp("api", 9000, family)
    host: Host = rig.hosts["a"]
    host.kill()
    subprocess.run(["ip", "netns", "exec", host.ns, "nft", "flush", "ruleset"], check=True)
    for claimed, port in ((far, 9000), (batch, 9000), (api, 9000), (web, 9001)):
        emit(host.ns, host.interface, udp(claimed, api, 1, port, b"forged"))
    for target in ("224.0.0.1", "255.255.255.255") if family == 4 else ("ff02::1", "ff05::2"):
        emit(host.ns, host.interface, udp(web, target, 1, 9000, b"everybody"))
    tap = rig.tap("api")
    assert received(listener) == []
    emit(host.ns, host.interface, udp(web, api, 1, 9000, b"its own"), count=1)
    assert received(listener) == [b"its own"]
    assert len(list(tap.packets())) == 1


def test_a_denied_member_cannot_forge_icmp_errors_about_a_flow_of_others(rig: Rig) -> None:
    """A33: not even a member that may talk to one end."""
    rig.workloads["far"] = rig.namespace("far")
    rig.where["far"], rig.epochs["far"] = "c", 1
    rig.attach("far", "c")
    rig.apply(("web", "api", ports("tcp/8080", "udp/9000")), ("far", "web", ports("udp/1", "icmp")))
    web, far, api = (rig.address(n) for n in ("web", "far", "api"))
    tap = rig.tap("web")
    with rig.server("api", 8080), rig.connect("web", "api", 8080) as sock:
        assert echo(sock) == b"ping"
        port = sock.getsockname()[1]
        list(tap.packets())
        quoted = packet(web, api, 6, struct.pack("!HHII", port, 8080, 0, 0))
        for code, rest in ((4, 68), (13, 0), (3, 0)):
            body = struct.pack("!BBHHH", 3, code, 0, 0, rest) + quoted
            error = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
            emit(rig.workloads["far"], "rtn0", packet(far, web, 1, error), mac=gateway_mac(rig.workloads["far"]))
            emit(rig.hosts["c"].ns, rig.hosts["c"].interface, packet(far, web, 1, error))
        redirect = struct.pack("!BBH4s", 5, 1, 0, ip_address(far).packed) + quoted
        redirect = redirect[:2] + struct.pack("!H", checksum(redirect)) + redirect[4:]
        emit(rig.hosts["c"].ns, rig.hosts["c"].interface, packet(far, web, 1, redirect))
        assert echo(sock) == b"ping"
        assert [p for p in tap.packets() if p[23] == 1] == []
        # Positive control: the same error, word for word, out of the tunnel of the end it concerns.
        body = struct.pack("!BBHHH", 3, 13, 0, 0, 0) + quoted
        error = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        emit(rig.hosts["b"].ns, rig.hosts["b"].interface, packet(api, web, 1, error), count=1)
        assert until(lambda: any(p[23] == 1 for p in tap.packets()))
    # And the real end may say that a port is closed.
    sender = rig.udp("web")
    sender.connect((api, 9000))
    sender.send(b"x")
    with pytest.raises(ConnectionRefusedError):
        sender.recv(10)


@pytest.mark.parametrize("family", [4, 6])
def test_a_workload_cannot_reach_the_host_or_leave_through_it(rig: Rig, family: int) -> None:
    a = rig.hosts["a"]
    rig.apply(("web", "api", ports("any")), ("api", "web", ports("any")))
    ip("-6", "route", "add", "default", "via", "fe80::1", "dev", "rtn0", ns=rig.workloads["web"])
    ip("route", "add", "default", "via", "169.254.82.1", "dev", "rtn0", "onlink", ns=rig.workloads["web"])
    own, neighbour = a.underlay[family == 6], rig.hosts["b"].underlay[family == 6]

    def listen(address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
        sock.bind((address, 2222))
        sock.listen(1)
        return sock

    with inside(a.ns, lambda: listen(own)), inside(rig.hosts["b"].ns, lambda: listen(neighbour)):
        with inside(a.ns, lambda: socket.create_connection((own, 2222), timeout=1)):
            pass  # positive control: it listens
        for target in (own, neighbour, "169.254.82.1" if family == 4 else f"{own}"):
            sock = rig.closing.enter_context(
                inside(rig.workloads["web"], lambda: socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET))
            )
            sock.settimeout(0.5)
            with pytest.raises(OSError):
                sock.connect((target, 2222))
        # Nor does anybody on the host without an identity get in.
        sock = rig.closing.enter_context(
            inside(a.ns, lambda: socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET))
        )
        sock.settimeout(0.5)
        with rig.server("web", 8080, family) as web, pytest.raises(OSError):
            sock.connect((rig.address("web", family), 8080))
        assert web.accepted == 0


def test_a_stranger_on_the_underlay_gets_silence(rig: Rig) -> None:
    rig.apply(("web", "api", ports("udp/9000")))
    c = rig.hosts["c"]  # enrolled, but policy permits nothing between it and b: no peer, no answer
    sniffer = rig.closing.enter_context(inside(c.ns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    sniffer.settimeout(0.3)
    for size in (1, 32, 148, 92, 1400):
        sniffer.sendto(b"\x01\0\0\0" + b"\0" * size, (rig.hosts["b"].underlay[0], 51820))
    with pytest.raises(TimeoutError):
        sniffer.recv(2000)
    assert rig.hosts["b"].ask("counters")["handshakes"].keys() == {rig.hosts["a"].tunnel_key}


def test_only_the_marker_of_the_sender_and_never_its_text_is_on_the_underlay(rig: Rig) -> None:
    rig.apply(("web", "api", ports("udp/9000")))
    listener, sender = rig.udp("api", 9000), rig.udp("web")
    wire = rig.closing.enter_context(
        inside(rig.switch, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
    )
    wire.setblocking(False)
    clear = rig.closing.enter_context(inside(rig.hosts["a"].ns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    sender.sendto(b"plain secret marker", (rig.address("api"), 9000))
    assert listener.recv(100) == b"plain secret marker"
    clear.sendto(b"plain control marker", (rig.hosts["b"].underlay[0], 7))
    seen: list[bytes] = []

    def control_seen() -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                seen.append(wire.recv(4096))
        return any(b"plain control marker" in p for p in seen)

    assert until(control_seen)
    assert not any(b"plain secret marker" in p for p in seen)


@pytest.mark.parametrize("family", [4, 6])
def test_our_mark_on_a_socket_of_the_host_opens_nothing(rig: Rig, family: int) -> None:
    """Whoever may set marks on host a, where web's identity is held by the host itself: the bit that says "accepted" is no verdict."""
    rig.attach("web", "a", "")
    rig.apply(("web", "api", ports("udp/9000")))
    open_, denied, other = rig.udp("api", 9000, family), rig.udp("api", 9001, family), rig.udp("batch", 9000, family)
    web, api, batch = (rig.address(n, family) for n in ("web", "api", "batch"))
    kind = socket.AF_INET if family == 4 else socket.AF_INET6

    def send(source: str, dst: str, port: int, mark: int) -> None:
        def work() -> None:
            with socket.socket(kind, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("I", mark))
                if source:
                    sock.bind((source, 0))
                for _ in range(3):
                    with contextlib.suppress(OSError):  # refused, or no route
                        sock.sendto(b"marked", (dst, port))

        inside(rig.hosts["a"].ns, work)

    mark = accepted_mark(rig.hosts["a"].interface)
    for source in (web, "", rig.hosts["a"].underlay[family == 6]):
        for value in (mark, mark | 1, 0xFFFF_FFFF):
            send(source, api, 9001, value)
            send(source, batch, 9000, value)
    assert [received(s) for s in (denied, other)] == [[], []]
    for value in (0, mark):  # positive control: what is permitted passes, marked or not
        send(web, api, 9000, value)
        assert len(received(open_)) == 3, hex(value)
