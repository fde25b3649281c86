"""The workload's end of a veth pair: its link, addresses and routes, set from a thread inside its network namespace.

`Places` is who may do that: the agent itself (`Direct`), or the broker process on its behalf (mesh/broker.py).
"""

from __future__ import annotations

from typing import Final, Protocol

from identity.errors import NotFound
from identity.wire.broker import Side
from mesh import netns
from mesh.layout import family_of
from mesh.rtnl import Netlink

INSIDE: Final = "rtn0"  # the device of a workload in its namespace
GATEWAY4: Final = "169.254.82.1"
GATEWAY6: Final = "fe80::1"
GSO_MAX: Final = 60_000  # bytes, as on the tunnel device: a larger superpacket would be cut up in software on its way there

class Places(Protocol):
    """Works inside the network namespaces of workloads. Both raise what mesh.netns.inside raises."""

    def mac(self, place: str) -> str | None:
        """Link address of the device of ours in there; None when it is not there."""

    def configure(self, side: Side, *, add: bool) -> None:
        """Bring it about; addresses and routes come with `add` only, others than its own go in any case."""


class Direct:
    """With privileges of our own."""

    def mac(self, place: str) -> str | None:
        return netns.inside(place, _mac)

    def configure(self, side: Side, *, add: bool) -> None:
        netns.inside(side.netns, lambda: _configure(side, add=add))


def quiet_link(name: str) -> None:
    """Settings of a link of ours: no autoconfiguration, no redirects, routing through it in both families."""
    for setting, value in (
        ("disable_ipv6", "0"), ("accept_ra", "0"), ("autoconf", "0"), ("accept_redirects", "0"),
        ("addr_gen_mode", "1"), ("dad_transmits", "0"),
    ):  # fmt: skip
        netns.sysctl(f"ipv6/conf/{name}/{setting}", value)
    for setting, value in (("accept_redirects", "0"), ("send_redirects", "0"), ("arp_ignore", "8")):
        netns.sysctl(f"ipv4/conf/{name}/{setting}", value)


# ---- on a thread that is inside


def _mac() -> str | None:
    nl = Netlink()
    try:
        index = nl.index(INSIDE)
        return None if index is None else nl.mac(index)
    finally:
        nl.close()


def _configure(side: Side, *, add: bool) -> None:
    nl = Netlink()
    try:
        link = nl.index(INSIDE)
        if link is None:
            raise NotFound("host.no_link", f"{side.netns} has no {INSIDE}")
        have = [a for a in nl.read_addresses(link) if not a.startswith("fe80:")]
        for address in have:
            if address not in side.addresses:
                nl.address("del", link, address)
        loopback = nl.index("lo")
        if loopback is not None:
            nl.link("set up the loopback", loopback, state="up")
        quiet_link(INSIDE)
        nl.link("set up a link", link, mtu=side.mtu, gso_max_size=GSO_MAX, state="up")
        if not add:
            return
        # Where a link on the way is narrower than ours and its ICMP never arrives, TCP finds that out by itself (RFC 4821).
        if netns.sysctl("ipv4/tcp_mtu_probing") == "0":  # for both families; it acts only on a path that loses what is long
            netns.sysctl("ipv4/tcp_mtu_probing", "1")
        for address in side.addresses:
            if address not in have:
                nl.address("add", link, address)
        for family, gateway, overlay in ((4, GATEWAY4, side.overlay4), (6, GATEWAY6, side.overlay6)):
            source = next((a for a in side.addresses if family_of(a) == family), None)
            if source is not None:
                nl.neighbour(link, gateway, side.gateway_mac)
                nl.gateway(family, overlay, gateway, link, source)
    finally:
        nl.close()
