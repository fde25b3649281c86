"""What the kernel counted in a table: named counters, and the elements of sets that packets write. One netlink dump each,
a process less than listing them with nft; these are read all the time.

Layouts: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from identity.errors import NoPrivilege
from mesh.netfilter import attribute, attributes, message, messages

_NETLINK_NETFILTER: Final = 12
_SUBSYSTEM: Final = 10 << 8  # NFNL_SUBSYS_NFTABLES
_GET_ELEMENTS, _GET_OBJECTS = 13, 19  # NFT_MSG_GETSETELEM, NFT_MSG_GETOBJ
_INET: Final = 1  # NFPROTO_INET
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_ENOENT: Final = 2
_COUNTER: Final = 1  # NFT_OBJECT_COUNTER
_TIMEOUT: Final = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Element:
    """source . destination . protocol . port, with the packets of its counter."""

    src: str
    dst: str
    proto: int
    port: int
    packets: int


def counters(table: str) -> dict[str, int]:
    """Packets of the named counters of the table `inet table`; empty when it is not there. Raises NoPrivilege."""
    found: dict[str, int] = {}
    for body in _dump(_GET_OBJECTS, _text(1, table) + attribute(3, struct.pack(">I", _COUNTER))):
        parts = _parts(body, 4)
        if 2 in parts and 4 in parts:
            found[parts[2].rstrip(b"\0").decode()] = _packets(parts[4])
    return found


def elements(table: str, name: str) -> list[Element]:
    """Elements of a set of source . destination . protocol . port; empty when it is not there. Raises NoPrivilege."""
    found: list[Element] = []
    for body in _dump(_GET_ELEMENTS, _text(1, table) + _text(2, name)):
        found += [one for raw in _list(_parts(body, 4).get(3, b"")) if (one := _element(raw)) is not None]
    return found


def _element(raw: bytes) -> Element | None:
    parts = _parts(raw)
    key = _parts(parts.get(1, b"")).get(1, b"")
    size = {16: 4, 40: 16}.get(len(key))
    if size is None:
        return None
    src, dst = (str(ipaddress.ip_address(key[n : n + size])) for n in (0, size))
    packets = 0
    # NFTA_SET_ELEM_EXPR, or NFTA_SET_ELEM_EXPRESSIONS where there are several
    for expression in (parts.get(7, b""), *_list(parts.get(11, b""))):
        named = _parts(expression)
        if named.get(1) == b"counter\0":
            packets = _packets(named.get(2, b""))
    return Element(src, dst, key[2 * size], int.from_bytes(key[2 * size + 4 : 2 * size + 6], "big"), packets)


def _packets(raw: bytes) -> int:
    return int.from_bytes(_parts(raw).get(2, b""), "big")


def _parts(raw: bytes, start: int = 0) -> dict[int, bytes]:
    return dict(attributes(raw, start, len(raw)))


def _list(raw: bytes) -> list[bytes]:
    return [one for kind, one in attributes(raw, 0, len(raw)) if kind == 1]  # NFTA_LIST_ELEM


def _dump(what: int, asked: bytes) -> Iterator[bytes]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.settimeout(_TIMEOUT)
        body = struct.pack(">BBH", _INET, 0, 0) + asked
        sock.sendto(message(_SUBSYSTEM | what, _REQUEST | _DUMP, body), (0, 0))
        while True:
            for kind, _, answer in messages(sock.recv(1 << 18)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    if struct.unpack_from("=i", answer)[0] == -_ENOENT:
                        return
                    raise NoPrivilege("firewall.privilege", "may not read nftables", hint="run as root (CAP_NET_ADMIN)")
                yield answer


def _text(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")
