"""Messages of the kernel, well-formed and not."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from mesh.netfilter import Conversation, Logged, Tracked, attributes, logged, messages, tracked

CT, LOG = 1 << 8, 4 << 8


def attribute(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack("=HH", 4 + len(body), kind) + body + b"\0" * (-len(body) % 4)


def tuple_of(family: int, src: str, dst: str, proto: int, sport: int, dport: int) -> bytes:
    one, other = (socket.inet_pton(family, a) for a in (src, dst))
    first = 1 if family == socket.AF_INET else 3
    ports = attribute(2, struct.pack(">H", sport)) + attribute(3, struct.pack(">H", dport))
    return attribute(1, attribute(0x8001, attribute(first, one), attribute(first + 1, other)),
                     attribute(0x8002, attribute(1, bytes([proto])), ports))  # fmt: skip


HEAD = b"\x02\0\0\0"
FLOW = tuple_of(socket.AF_INET, "100.64.0.1", "100.64.0.2", 6, 1000, 80)
COUNTS = b"".join(attribute(kind, attribute(1, struct.pack(">Q", p)), attribute(2, struct.pack(">Q", b))) for kind, p, b in ((9, 2, 300), (10, 1, 40)))


def test_connections() -> None:
    flow = Conversation("100.64.0.1", "100.64.0.2", 6, 1000, 80)
    assert tracked(CT, 0x400, HEAD + FLOW) == Tracked("new", flow)
    assert tracked(CT | 2, 0, HEAD + FLOW + COUNTS + attribute(12, b"abcd")) == Tracked("end", flow, 3, 340, b"abcd")
    assert tracked(CT, 0, HEAD + FLOW).what == "listed"
    six = tuple_of(socket.AF_INET6, "fd00::1", "fd00::2", 58, 1, 2)
    found = tracked(CT, 0x400, b"\x0a\0\0\0" + six)
    assert found is not None
    assert (found.flow, found.flow.family) == (Conversation("fd00::1", "fd00::2", 58, 0, 0), 6)


def packet(src: str = "100.64.0.1", proto: int = 6, more: bytes = b"") -> bytes:
    return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 60, 0, 0, 64, proto, 0, socket.inet_aton(src), socket.inet_aton("100.64.0.2")) + (
        more or struct.pack(">HH", 1000, 80)
    )


def test_logged_packets() -> None:
    flow = Conversation("100.64.0.1", "100.64.0.2", 6, 1000, 80)
    body = HEAD + attribute(10, b"denied\0") + attribute(9, packet())
    assert logged(LOG, body) == Logged("denied", flow, 60)
    assert logged(LOG, body + attribute(11, struct.pack(">I", 7))).uid == 7
    back = logged(LOG, HEAD + attribute(10, b"denied-reply\0") + attribute(9, packet()))
    assert (back.prefix, back.flow) == ("denied", Conversation("100.64.0.2", "100.64.0.1", 6, 80, 1000))
    six = struct.pack(">IHBB16s16s", 6 << 28, 20, 0, 64, socket.inet_pton(socket.AF_INET6, "fd00::1"), socket.inet_pton(socket.AF_INET6, "fd00::2"))
    six += bytes([17, 0]) + b"\0" * 6 + struct.pack(">HH", 5, 6)  # behind a hop-by-hop header
    assert logged(LOG, HEAD + attribute(9, six)).flow == Conversation("fd00::1", "fd00::2", 17, 5, 6)
    assert logged(LOG, HEAD + attribute(9, packet(proto=47))).flow.dport == 0
    assert logged(LOG, HEAD + attribute(9, packet()[:22])).flow.dport == 0  # cut short
    assert logged(LOG | 1, body) is None


@given(st.binary(max_size=200), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_nothing_the_kernel_says_can_raise(data: bytes, kind: int, flags: int) -> None:
    list(messages(data))
    list(attributes(data, 0, len(data)))
    for one in (kind, CT, CT | 2, LOG):
        tracked(one, flags, data)
        logged(one, data)
        tracked(one, flags, HEAD + attribute(1, attribute(1, data)))
        logged(one, HEAD + attribute(9, data))
        logged(one, HEAD + attribute(10, data) + attribute(9, packet(more=data)))


@given(st.data())
def test_damage_to_a_good_message_cannot_raise(data: st.DataObject) -> None:
    raw = bytearray(HEAD + FLOW + COUNTS)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    tracked(CT, 0, bytes(raw))
