"""Packets that are told apart on the wire: each ends with a mark and its own number, and each is one that conntrack
finds well-formed (lengths, checksums, chunk types), so that only the verdict decides whether it arrives.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Final, Literal

from policy.ports import ICMP, ICMPV6, PORTED, SCTP, TCP, UDP

# Also the header of an SCTP parameter of eight bytes, so it may end an INIT chunk.
MARK: Final = b"\xc0\xde\x00\x08"

Kind = Literal["start", "middle", "reply", "stray"]
# (request, reply) of the ICMP types that may begin a flow in conntrack
ECHO: Final = {4: (8, 0), 6: (128, 129)}
TIMESTAMP: Final = (13, 14)
_SYN, _RST, _ACK = 0x02, 0x04, 0x10


@dataclass(frozen=True, slots=True)
class Probe:
    """One packet.

    kind:    start: the first packet of a flow as programs send it; middle: a TCP segment of a connection that nobody
             saw begin; reply: what answers a start or middle; stray: a reply by its form, whose original never passed
    sport:   for ICMP the identifier of the query, 0 for protocols without ports
    dport:   for ICMP 1 for a timestamp query, else 0
    dressed: with IPv4 options, or an IPv6 destination options header
    answers: number of the packet this is a reply to
    """

    number: int
    src: str
    dst: str
    family: int
    proto: int
    sport: int
    dport: int
    kind: Kind = "start"
    dressed: bool = False
    answers: int = 0
    answers_middle: bool = False

    @property
    def port(self) -> int | None:
        """The destination port as policy asks for it."""
        return self.dport if self.proto in PORTED else None

    @property
    def conversation(self) -> tuple[object, ...]:
        """What conntrack takes for one flow, the same in both directions."""
        if self.proto == ICMP:
            ends = tuple(sorted((self.src, self.dst)))
            return (self.family, self.proto, ends, self.sport, self.dport)
        return (self.family, self.proto, *sorted(((self.src, self.sport), (self.dst, self.dport))))

    @property
    def may_begin(self) -> bool:
        """May conntrack take it for the first of a flow? Answers of handshakes and queries may not."""
        if self.kind in {"start", "middle"} or self.proto not in {TCP, ICMP, SCTP}:
            return True
        return self.proto == TCP and self.answers_middle

    def __str__(self) -> str:
        ports = f" {self.sport}->{self.dport}" if self.proto in PORTED or self.proto == ICMP else ""
        return f"#{self.number} v{self.family} {self.src} -> {self.dst} proto {self.proto}{ports} {self.kind}"


@lru_cache(maxsize=256)
def packed(address: str) -> bytes:
    return ip_address(address).packed


def craft(probe: Probe, src: str, dst: str) -> bytes:
    """The IP packet from one overlay address to the other."""
    source, target = packed(src), packed(dst)
    proto = ICMPV6 if probe.proto == ICMP and probe.family == 6 else probe.proto
    tail = MARK + struct.pack("!I", probe.number)
    body = _body(probe, tail, lambda size: source + target + struct.pack("!II", size, proto))
    if probe.family == 4:
        options = b"\x01\x01\x01\x00" if probe.dressed else b""
        words = 5 + len(options) // 4
        size = 4 * words + len(body)
        head = struct.pack("!BBHHHBBH", 0x40 | words, 0, size, probe.number & 0xFFFF, 0x4000, 64, proto, 0)
        check = struct.pack("!H", _checksum(head + source + target + options))
        return head[:10] + check + source + target + options + body
    if probe.dressed:
        body = struct.pack("!BB6s", proto, 0, b"\x01\x04\x00\x00\x00\x00") + body
        proto = 60
    return struct.pack("!IHBB", 6 << 28, len(body), proto, 64) + source + target + body


def _body(probe: Probe, tail: bytes, pseudo: Callable[[int], bytes]) -> bytes:
    answer = probe.kind in {"reply", "stray"}
    if probe.proto == TCP:
        if answer:
            flags, seq, ack = (_ACK if probe.answers_middle else _SYN | _ACK), 7, probe.answers + 1
        else:
            flags, seq, ack = (_SYN, probe.number, 0) if probe.kind == "start" else (_ACK, probe.number, 7)
        head = struct.pack("!HHIIBBHHH", probe.sport, probe.dport, seq, ack, 5 << 4, flags, 65000, 0, 0)
        check = _checksum(pseudo(len(head) + len(tail)) + head + tail)
        return head[:16] + struct.pack("!H", check) + head[18:] + tail
    if probe.proto == UDP:
        head = struct.pack("!HHHH", probe.sport, probe.dport, 8 + len(tail), 0)
        check = _checksum(pseudo(8 + len(tail)) + head + tail) or 0xFFFF
        return head[:6] + struct.pack("!H", check) + tail
    if probe.proto == SCTP:
        # INIT carries no verification tag; its answer carries the tag that the INIT asked for.
        tag, kind = (probe.answers, 2) if answer else (0, 1)
        chunk = struct.pack("!BBHIIHHI", kind, 0, 28, probe.number, 65536, 1, 1, 1) + tail
        head = struct.pack("!HHII", probe.sport, probe.dport, tag, 0)
        return head[:8] + struct.pack("<I", _crc32c(head + chunk)) + chunk
    if probe.proto == ICMP:
        query = TIMESTAMP if probe.dport else ECHO[probe.family]
        data = (bytes(12) if probe.dport else b"") + tail
        head = struct.pack("!BBHHH", query[answer], 0, 0, probe.sport, 1)
        check = _checksum((pseudo(8 + len(data)) if probe.family == 6 else b"") + head + data)
        return head[:2] + struct.pack("!H", check) + head[4:] + data
    return bytes(8) + tail


def number_of(frame: bytes) -> int | None:
    """The number of the probe in an Ethernet frame, None for anything else: also for an ICMP error that quotes one."""
    if frame[-8:-4] != MARK:
        return None
    if frame[14] >> 4 == 4:
        if frame[23] == ICMP and frame[14 + 4 * (frame[14] & 15)] in {3, 11, 12}:
            return None
    elif frame[20] == ICMPV6 and frame[54] < 128:
        return None
    return int.from_bytes(frame[-4:], "big")


def same(sent: bytes, got: bytes) -> bool:
    """Is it the packet that was sent, but for hop count and header checksum?"""
    if sent[0] >> 4 == 4:
        return sent[:8] == got[:8] and sent[9] == got[9] and sent[12:] == got[12:]
    return sent[:7] == got[:7] and sent[8:] == got[8:]


def _checksum(data: bytes) -> int:
    """RFC 1071. A sum of 16-bit words with end-around carry is the number modulo 2^16 - 1."""
    if len(data) % 2:
        data += b"\0"
    total = int.from_bytes(data, "big")
    rest = total % 0xFFFF
    return 0xFFFF - (rest or (0xFFFF if total else 0))


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC = _crc_table()


def _crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
