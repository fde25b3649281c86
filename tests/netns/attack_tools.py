"""What attackers bring along: packets written by hand, ways to emit them past every filter, and taps that count arrivals."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Any, TypeVar

from mesh.lab_process import in_netns, run

T = TypeVar("T")

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
SYN, ACK, RST = 0x02, 0x10, 0x04
MARKER = b"ATTACK-MARKER"
NOBODY = 65534


# ---- packets


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _pseudo(src: str, dst: str, proto: int, length: int) -> bytes:
    a, b = ip_address(src), ip_address(dst)
    return a.packed + b.packed + (struct.pack("!II", length, proto) if a.version == 6 else struct.pack("!HH", proto, length))


def ip(src: str, dst: str, proto: int, payload: bytes, *, ident: int = 1, fragment: int = 0, options: bytes = b"") -> bytes:
    """An IP packet of the family of `src`. `fragment`: flags and offset of IPv4, `options` padded to four bytes."""
    a, b = ip_address(src), ip_address(dst)
    if a.version == 6:
        return struct.pack("!IHBB", 0x6000_0000, len(payload), proto, 64) + a.packed + b.packed + payload
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, 4 * words + len(payload), ident, fragment, 64, proto, 0)
    head += a.packed + b.packed + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp_body(src: str, dst: str, sport: int, dport: int, data: bytes = MARKER) -> bytes:
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    total = checksum(_pseudo(src, dst, UDP, 8 + len(data)) + head + data) or 0xFFFF
    return head[:6] + struct.pack("!H", total) + data


def tcp_body(src: str, dst: str, sport: int, dport: int, flags: int, data: bytes = MARKER) -> bytes:
    head = struct.pack("!HHIIBBHHH", sport, dport, 1000, 2000 if flags & ACK else 0, 0x50, flags, 8192, 0, 0)
    total = checksum(_pseudo(src, dst, TCP, 20 + len(data)) + head + data)
    return head[:16] + struct.pack("!H", total) + head[18:] + data


def udp(src: str, dst: str, sport: int, dport: int, data: bytes = MARKER) -> bytes:
    return ip(src, dst, UDP, udp_body(src, dst, sport, dport, data))


def tcp(src: str, dst: str, sport: int, dport: int, flags: int = SYN, data: bytes = MARKER) -> bytes:
    return ip(src, dst, TCP, tcp_body(src, dst, sport, dport, flags, data))


def icmp(src: str, dst: str, kind: tuple[int, int], code: int, rest: bytes, data: bytes = MARKER) -> bytes:
    """`kind` is the type in (ICMP, ICMPv6); `rest` the four bytes after the checksum."""
    v6 = ip_address(src).version == 6
    body = struct.pack("!BBH", kind[v6], code, 0) + rest + data
    pseudo = _pseudo(src, dst, ICMPV6, len(body)) if v6 else b""
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    return ip(src, dst, ICMPV6 if v6 else ICMP, body)


def echo(src: str, dst: str, ident: int, *, reply: bool = False) -> bytes:
    return icmp(src, dst, (0, 129) if reply else (8, 128), 0, struct.pack("!HH", ident, 1))


def fragments(src: str, dst: str, proto: int, pieces: Iterable[tuple[int, bool, bytes]], ident: int) -> list[bytes]:
    """One packet for each (offset in bytes, more to come, data)."""
    out = []
    for offset, more, data in pieces:
        if ip_address(src).version == 4:
            out.append(ip(src, dst, proto, data, ident=ident, fragment=(0x2000 if more else 0) | offset // 8))
        else:
            out.append(ip(src, dst, 44, struct.pack("!BBHI", proto, 0, offset | more, ident) + data))
    return out


# ---- inside namespaces


def sock_in(netns: str, family: int, kind: int, proto: int = 0) -> socket.socket:
    return in_netns(netns, lambda: socket.socket(family, kind, proto))


def emit(netns: str, device: str, packets: Iterable[bytes], *, mac: bytes | None = None, count: int = 1) -> int:
    """Put IP packets on a device, past all routing and filtering of that namespace; how many were taken."""
    sent = 0
    with contextlib.closing(sock_in(netns, socket.AF_PACKET, socket.SOCK_DGRAM if mac else socket.SOCK_RAW)) as sock:
        for packet in packets:
            protocol = 0x86DD if packet[0] >> 4 == 6 else 0x0800
            where: tuple[Any, ...] = (device, protocol, 0, 0, mac) if mac else (device, protocol)
            for _ in range(count):
                sent += sock.sendto(packet, where) > 0
    return sent


def gateway_mac(netns: str) -> bytes:
    """Link address of the host side, as a workload's namespace knows it."""
    shown = run(["ip", "neigh"], netns=netns).stdout
    return bytes.fromhex(shown.split("lladdr ")[1].split()[0].replace(":", ""))


class Tap:
    """Everything on a device of a namespace, below any socket. `outgoing`: what leaves by it counts as well."""

    def __init__(self, netns: str, device: str, *, outgoing: bool = False) -> None:
        self._outgoing = outgoing
        self._sock = sock_in(netns, socket.AF_PACKET, socket.SOCK_RAW)
        self._sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        self._sock.bind((device, 0x0003))
        self._sock.setblocking(False)

    def frames(self) -> Iterator[bytes]:
        """What came since the last call."""
        while True:
            try:
                data, source = self._sock.recvfrom(1 << 17)
            except BlockingIOError:
                return
            if self._outgoing or source[2] != socket.PACKET_OUTGOING:
                yield data

    def count(self, needle: bytes = MARKER) -> int:
        return sum(needle in frame for frame in self.frames())

    def close(self) -> None:
        self._sock.close()


class Box:
    """A UDP socket that keeps what it got."""

    def __init__(self, netns: str, port: int, *, v6: bool) -> None:
        self._sock = sock_in(netns, socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
        if v6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self._sock.bind(("::" if v6 else "0.0.0.0", port))
        self._sock.setblocking(False)

    def got(self) -> list[bytes]:
        out = []
        with contextlib.suppress(BlockingIOError):
            while True:
                out.append(self._sock.recv(65536))
        return out

    def close(self) -> None:
        self._sock.close()


def until(check: Callable[[], Any], timeout: float = 10.0) -> bool:
    """Bounded wait for a condition."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.02)
    return bool(check())


def as_nobody(work: Callable[[], None]) -> str:
    """Run `work` as user nobody in a process of its own: the name of the error it met, or an empty string."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "lost"
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            said = ""
        except BaseException as e:
            said = type(e).__name__
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        answer = f.read().decode()
    os.waitpid(child, 0)
    return answer
