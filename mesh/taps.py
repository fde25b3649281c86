"""Links that belong to somebody else and lead to a guest: the host's side of a VM's tap.

The agent makes no such link and removes none. It takes one in use when it is attached (settings, gateway addresses, answers
to ARP for the gateway) and gives it back as it was. A link that vanishes takes its attachment along, so that the next one
of that name does not inherit the identity.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final

from identity.errors import BadInput, Conflict, NotFound
from mesh import nft
from mesh.firewall_names import accepted_mark, table_name
from mesh.inside import GATEWAY4

ALIAS: Final = "retinue "  # of links that are ours
_ETHERNET: Final = 1  # ARPHRD_ETHER; a tun device without link addresses is 65534
_KINDS: Final = frozenset({"tun", "veth"})  # a tap is of kind tun
_DELLINK: Final = 17  # RTM_DELLINK, linux/rtnetlink.h
_GROUP: Final = 1  # RTMGRP_LINK
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_INFO: Final = struct.Struct("=BxHiII")  # struct ifinfomsg


def inspect(device: str) -> int:
    """Index of a link that may be given to a guest. Raises BadInput, NotFound, Conflict, and what netlink raises."""
    from mesh.rtnl import Netlink

    if not device or len(device) > 15 or "/" in device or not device.isprintable() or " " in device:
        raise BadInput("attach.device", f"not the name of a link: {ascii(device)[:40]}")
    nl = Netlink()
    try:
        index = nl.index(device)
        if index is None:
            raise NotFound("attach.device", f"there is no link {device} in the agent's network namespace", hint="see: ip link")
        link = nl.do("read a link", nl.ip.get_links, index)[0]
        info = link.get_attr("IFLA_LINKINFO")
        kind = None if info is None else info.get_attr("IFLA_INFO_KIND")
        if str(link.get_attr("IFLA_IFALIAS") or "").startswith(ALIAS):
            raise Conflict("attach.device", f"{device} is a link of the agent's own")
        if kind not in _KINDS or link["ifi_type"] != _ETHERNET:
            raise BadInput("attach.device", f"{device} is no tap", hint="give the host's side of a VM: a tap, or a veth")
        if link.get_attr("IFLA_MASTER"):
            raise Conflict("attach.device", f"{device} is a port of a bridge", hint="take it out: ip link set DEVICE nomaster")
        held = [a for a in nl.read_addresses(index) if not a.startswith("fe80:") and a != GATEWAY4]
        if held:
            raise Conflict("attach.device", f"{device} holds the address {held[0]} of this host", hint="a guest's link carries none")
        return index
    finally:
        nl.close()


def index_of(device: str) -> int | None:
    """Its index now; None when there is none of that name."""
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return None


class LinkWatch:
    """Calls `gone` with the index of every link that is removed from this namespace. Needs a running loop."""

    def __init__(self, gone: Callable[[int], None], overrun: Callable[[], None]) -> None:
        self._gone, self._overrun = gone, overrun
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, _GROUP))
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)

    def close(self) -> None:
        """Stop watching."""
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: messages were lost
                self._overrun()
                return
            for index in removed(data):
                self._gone(index)


def removed(data: bytes) -> list[int]:
    """Indexes of the links that a netlink datagram says are gone. Leaving a bridge is not going."""
    out = []
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        if length < _HEADER.size or length > len(data):
            break
        if kind == _DELLINK and length >= _HEADER.size + _INFO.size:
            family, _, index, _, _ = _INFO.unpack_from(data, _HEADER.size)
            if family == socket.AF_UNSPEC:
                out.append(index)
        data = data[(length + 3) & ~3 :]
    return out


# ---- ARP for the gateway: our routing rules keep unmarked packets of a guest out, and the kernel asks them for ARP too


def arp_table(interface: str) -> str:
    """The table that lets guests find their gateway; in place of one that is there."""
    name, mark = table_name(interface), f"0x{accepted_mark(interface):08x}"
    return (
        f"add table arp {name}\ndelete table arp {name}\ntable arp {name} {{\nchain input {{\n"
        f"type filter hook input priority 0; policy accept;\narp daddr ip {GATEWAY4} meta mark set meta mark | {mark}\n}}\n}}\n"
    )


async def answer_arp(interface: str, *, wanted: bool) -> None:
    """Put that table there, or take it away. Raises what mesh.nft raises."""
    name = table_name(interface)
    await nft.run(arp_table(interface) if wanted else f"add table arp {name}\ndelete table arp {name}\n")
