"""Netfilter over raw netlink: connection tracking (events, listing, deletion) and packets logged by rules.

Layouts: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nfnetlink_log.h. What does not parse is passed over.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from identity.errors import NoPrivilege, Unreachable
from policy.ports import PORTED

_NETLINK_NETFILTER: Final = 12
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_CTNETLINK: Final = 1
_ULOG: Final = 4
_CT_NEW, _CT_GET, _CT_DELETE = 0, 1, 2
_GROUP_NEW, _GROUP_DESTROY = 1, 3
_REQUEST, _ACK, _DUMP, _CREATE = 0x1, 0x4, 0x300, 0x400
_ERROR, _DONE = 2, 3
_CTA_TUPLE_ORIG, _CTA_COUNTERS_ORIG, _CTA_COUNTERS_REPLY, _CTA_ID = 1, 9, 10, 12
_ENOENT: Final = 2
Handler = Callable[[int, int, bytes], None]  # type, flags, body of one message
RECEIVE: Final = 4 << 20  # bytes of kernel buffer
DISCARD: Final = 2048  # datagrams thrown away in one go


@dataclass(frozen=True, slots=True)
class Conversation:
    """A flow under the tuple of its first packet; ports are 0 for protocols without ports."""

    src: str
    dst: str
    proto: int
    sport: int
    dport: int

    @property
    def family(self) -> int:
        return 6 if ":" in self.src else 4


@dataclass(frozen=True, slots=True)
class Tracked:
    """A connection that began, ended or is listed. packets and size (bytes) of both directions; `id` is the kernel's."""

    what: Literal["new", "end", "listed"]
    flow: Conversation
    packets: int = 0
    size: int = 0
    id: bytes = b""


@dataclass(frozen=True, slots=True)
class Logged:
    """A packet that a rule logged. `flow` goes the way of the flow's first packet; uid of the local sender, if known."""

    prefix: str
    flow: Conversation
    length: int
    uid: int | None = None


def attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of netlink attributes."""
    while start + 4 <= end:
        size, kind = struct.unpack_from("=HH", data, start)
        if size < 4 or start + size > end:
            return
        yield kind & 0x3FFF, data[start + 4 : start + size]
        start += (size + 3) & ~3


def _nested(data: bytes) -> dict[int, bytes]:
    return dict(attributes(data, 0, len(data)))


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, flags, body) of the messages of one datagram."""
    at = 0
    while at + 16 <= len(data):
        size, kind, flags = struct.unpack_from("=IHH", data, at)
        if size < 16 or at + size > len(data):
            return
        yield kind, flags, data[at + 16 : at + size]
        at += (size + 3) & ~3


def message(kind: int, flags: int, body: bytes, sequence: int = 1) -> bytes:
    """One netlink message with its header."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def _conversation(raw: bytes) -> Conversation | None:
    outer = _nested(raw)
    addresses, proto = _nested(outer.get(1, b"")), _nested(outer.get(2, b""))
    pair = (addresses.get(1), addresses.get(2)) if 1 in addresses else (addresses.get(3), addresses.get(4))
    if pair[0] is None or pair[1] is None or len(pair[0]) not in {4, 16} or len(pair[1]) != len(pair[0]) or not proto.get(1):
        return None
    number = proto[1][0]
    ports = (proto.get(2, b""), proto.get(3, b"")) if number in PORTED else (b"", b"")
    sport, dport = (int.from_bytes(p[:2], "big") for p in ports)
    return Conversation(str(ipaddress.ip_address(pair[0])), str(ipaddress.ip_address(pair[1])), number, sport, dport)


def tracked(kind: int, flags: int, body: bytes) -> Tracked | None:
    """A conntrack message as an event, or as listed; None for what is neither."""
    if kind >> 8 != _CTNETLINK or len(body) < 4:
        return None
    message = kind & 0xFF
    if message not in {_CT_NEW, _CT_DELETE}:
        return None
    found = dict(attributes(body, 4, len(body)))
    flow = _conversation(found.get(_CTA_TUPLE_ORIG, b""))
    if flow is None:
        return None
    what: Literal["new", "end", "listed"] = "end" if message == _CT_DELETE else "new" if flags & _CREATE else "listed"
    packets = size = 0
    for side in (_CTA_COUNTERS_ORIG, _CTA_COUNTERS_REPLY):
        counters = _nested(found.get(side, b""))
        packets += int.from_bytes(counters.get(1, b""), "big")
        size += int.from_bytes(counters.get(2, b""), "big")
    return Tracked(what, flow, packets, size, found.get(_CTA_ID, b""))


def logged(kind: int, body: bytes) -> Logged | None:
    """A packet of a log group; None for what is none."""
    if kind != _ULOG << 8 or len(body) < 4:
        return None
    found = dict(attributes(body, 4, len(body)))
    prefix = found.get(10, b"").rstrip(b"\0").decode("ascii", "replace")
    parsed = _packet(found.get(9, b""))
    if parsed is None:
        return None
    flow, length = parsed
    if prefix.endswith("-reply"):
        flow, prefix = Conversation(flow.dst, flow.src, flow.proto, flow.dport, flow.sport), prefix.removesuffix("-reply")
    uid = int.from_bytes(found[11], "big") if len(found.get(11, b"")) == 4 else None
    return Logged(prefix, flow, length, uid)


def _packet(raw: bytes) -> tuple[Conversation, int] | None:
    if len(raw) >= 20 and raw[0] >> 4 == 4:
        start, proto, length = (raw[0] & 15) * 4, raw[9], int.from_bytes(raw[2:4], "big")
        one, other = raw[12:16], raw[16:20]
    elif len(raw) >= 40 and raw[0] >> 4 == 6:
        start, proto, length = 40, raw[6], 40 + int.from_bytes(raw[4:6], "big")
        one, other = raw[8:24], raw[24:40]
        while proto in {0, 43, 60} and len(raw) >= start + 8:  # extension headers (RFC 8200)
            proto, start = raw[start], start + 8 + 8 * raw[start + 1]
    else:
        return None
    sport = dport = 0
    if proto in PORTED and len(raw) >= start + 4:
        sport, dport = struct.unpack_from(">HH", raw, start)
    return Conversation(str(ipaddress.ip_address(one)), str(ipaddress.ip_address(other)), proto, sport, dport), length


class Listener:
    """A netlink socket whose messages are handed to `handle`; what is not is counted (`skipped`).

    A kernel that had no room (ENOBUFS) has lost an unknown number: `overruns` counts how often.
    """

    def __init__(self, handle: Handler) -> None:
        self.overruns = self.skipped = 0
        self._handle = handle
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, 33, RECEIVE)  # SO_RCVBUFFORCE
        except PermissionError:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE)
        self.sock.bind((0, 0))

    def watch_connections(self) -> None:
        """Begin and end of every connection of this namespace. Raises NoPrivilege."""
        try:
            for group in (_GROUP_NEW, _GROUP_DESTROY):
                self.sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except PermissionError:
            raise NoPrivilege("flows.privilege", "may not watch connection tracking", hint="CAP_NET_ADMIN is needed") from None

    def bind_log(self, group: int) -> None:
        """Packets of a log group. Raises NoPrivilege, Unreachable when another program has the group."""
        config = (
            attribute(1, b"\x01")  # bind
            + attribute(2, struct.pack(">IBB", 0xFFFF, 2, 0))  # copy packets
            + attribute(4, struct.pack(">I", 5))  # tell within 50 ms
            + attribute(5, struct.pack(">I", 32))
        )
        head = struct.pack(">BBH", socket.AF_UNSPEC, 0, group)
        self.sock.send(message(_ULOG << 8 | 1, _REQUEST | _ACK, head + config))
        self.sock.setblocking(True)
        self.sock.settimeout(5)
        try:
            reply = self.sock.recv(4096)
        finally:
            self.sock.setblocking(False)
        for kind, _, body in messages(reply):
            error = -struct.unpack_from("=i", body)[0] if kind == _ERROR else 0
            if error == 1:
                raise NoPrivilege("flows.privilege", "may not read logged packets", hint="CAP_NET_ADMIN is needed")
            if error:
                raise Unreachable("flows.log_group", f"netlink log group {group}: {os.strerror(error)}",
                                  hint="does another program read this group?")  # fmt: skip

    def read(self, budget: int) -> int:
        """Hand on at most `budget` datagrams; with none to spend, throw away what waits. Returns how many were handed on."""
        done = 0
        while done < (budget or DISCARD):
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                self.overruns += 1
                break
            done += 1
            if not budget:
                self.skipped += 1
                continue
            for kind, flags, body in messages(data):
                self._handle(kind, flags, body)
        return min(done, budget)

    def close(self) -> None:
        self.sock.close()


# ---- connections that must end


def forget(keep: Mapping[tuple[str, str], Callable[[int, int | None], bool]]) -> int:
    """Delete tracked connections of the pairs of addresses whose protocol and port are not kept; returns how many.

    keep: (source, destination) -> may a flow that began so stay? Pairs that are not named are left alone. Blocking.
    Raises NoPrivilege.
    """
    gone = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.settimeout(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE)
        doomed = []
        packed = {ipaddress.ip_address(a).packed + ipaddress.ip_address(b).packed for a, b in keep}
        families = {socket.AF_INET6 if ":" in src else socket.AF_INET for src, _ in keep}
        # One walk over everything, for it costs by what the kernel tracks and not by what it finds.
        for body in _listing(sock, socket.AF_UNSPEC if len(families) > 1 else families.pop()) if keep else ():
            family = body[0]
            if _ends(body, 6 if family == socket.AF_INET6 else 4) not in packed:
                continue
            one = tracked(_CTNETLINK << 8, 0, body)
            if one is None or (check := keep.get((one.flow.src, one.flow.dst))) is None:
                continue
            if not check(one.flow.proto, one.flow.dport if one.flow.proto in PORTED else None):
                doomed.append((family, body, one))
        for family, body, one in doomed:
            raw = next((a for k, a in attributes(body, 4, len(body)) if k == _CTA_TUPLE_ORIG), b"")
            request = struct.pack(">BBH", family, 0, 0) + attribute(_CTA_TUPLE_ORIG | 0x8000, raw)
            request += attribute(_CTA_ID, one.id) if one.id else b""  # so that a newer one of the same tuple stays
            sock.send(message(_CTNETLINK << 8 | _CT_DELETE, _REQUEST | _ACK, request))
            for kind, _, answer in messages(sock.recv(65536)):
                error = -struct.unpack_from("=i", answer)[0] if kind == _ERROR else 0
                gone += error == 0
                if error not in {0, _ENOENT}:
                    raise NoPrivilege("conntrack.delete", f"cannot delete a tracked connection: {os.strerror(error)}")
    return gone


def _ends(body: bytes, family: int) -> bytes:
    """The two addresses of the first tuple, where the kernel always puts them; anything else matches nothing."""
    size = 4 if family == 4 else 16
    first = 4 + 4 + 4 + 4
    return body[first : first + size] + body[first + size + 4 : first + 2 * size + 4]


def _listing(sock: socket.socket, family: int) -> Iterator[bytes]:
    sock.send(message(_CTNETLINK << 8 | _CT_GET, _REQUEST | _DUMP, struct.pack(">BBH", family, 0, 0)))
    while True:
        for kind, _, body in messages(sock.recv(1 << 18)):
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise NoPrivilege("conntrack.list", "may not list tracked connections", hint="CAP_NET_ADMIN is needed")
            yield body


def listing() -> list[Tracked]:
    """All tracked connections of this namespace. Blocking. Raises NoPrivilege."""
    out = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.settimeout(10)
        out += [t for body in _listing(sock, socket.AF_UNSPEC) if (t := tracked(_CTNETLINK << 8, 0, body)) is not None]
    return out
