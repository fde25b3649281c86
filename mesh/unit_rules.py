"""The part of the firewall for control groups that hold an identity on the host itself (texts, pure).

In a namespace of its own an identity is kept apart by its link. Here all processes share one stack, so:

    output   a packet with a unit's address has to come from a socket of its group; others are refused at once
    input    a packet for a unit's address is given to a socket of its group only, and only with our mark

Sockets belong to the group in which they were made, also after their process has ended (orphans that still flush).
What has no such socket, because the kernel sent it: answers to a SYN carry the listener, which was compared when the
SYN came in; acknowledgements of a connection in TIME_WAIT and ICMP belong to a flow that the group began or took. In
the other direction the packets of a handshake and of TIME_WAIT find no whole socket to compare; the rules for output
hold whoever that turns out to be. A reset that we sent ourselves reaches whom it is for. Who is refused on input looks
like nobody there. Anything but TCP, UDP and ICMP is not given to units: the kernel finds no socket for it here.

Sets:  unit4, unit6      the addresses of units
       group<L>_4, _6    group at level L below the root . address; the comment names the id of the group that is meant
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mesh.plan import AttachmentPlan

GROUP: Final = "group"  # how the names of the sets of groups begin


def elements(units: Iterable[AttachmentPlan]) -> dict[str, set[str]]:
    """The elements by set. A group that is not there has its addresses kept for nobody."""
    out: dict[str, set[str]] = {}
    for at in units:
        if at.unit is None:
            continue
        for family, address in zip((4, 6), at.addresses, strict=True):
            out.setdefault(f"unit{family}", set()).add(address)
            if at.unit.ident is not None:
                text = f'"{at.unit.place}" . {address} comment "group {at.unit.ident}"'
                out.setdefault(f"{GROUP}{at.unit.level}_{family}", set()).add(text)
    return out


def levels(units: Iterable[AttachmentPlan]) -> tuple[int, ...]:
    """The levels that need a set; empty when there are no units."""
    return tuple(sorted({at.unit.level for at in units if at.unit is not None}))


def place_of(element: str) -> str:
    """The place in an element of a set of groups."""
    return element.split('"', 2)[1]


def sets(wanted: Iterable[int]) -> list[str]:
    """Their declarations."""
    out = []
    for family in (4, 6):
        out.append(f"set unit{family} {{ type ipv{family}_addr; }}")
        out += [f"set {GROUP}{level}_{family} {{ type cgroupsv2 . ipv{family}_addr; }}" for level in wanted]
    return out


def _own(wanted: Iterable[int], side: str, verdict: str) -> str:
    return "\n".join(
        f"    socket cgroupv2 level {level} . {ip} {side} @{GROUP}{level}_{family} {verdict}"
        for level in wanted
        for family, ip in ((4, "ip"), (6, "ip6"))
    )


INPUT: Final = "ip daddr @unit4 goto enter\n    ip6 daddr @unit6 goto enter"
OUTPUT: Final = "ip saddr @unit4 jump leave\n    ip6 saddr @unit6 jump leave"


def chains(wanted: Iterable[int], mark: str) -> str:
    """The chains that `INPUT` and `OUTPUT` lead to."""
    wanted = tuple(wanted)
    return f"""
chain nobody {{
    meta l4proto 6 reject with tcp reset
    reject with icmpx port-unreachable
}}
chain usurper {{
    counter name neighbours
    tcp flags & (syn|ack|rst) == syn reject with tcp reset
    meta l4proto 6 ct state established reject with tcp reset
    meta l4proto 6 drop
    reject with icmpx admin-prohibited
}}
chain enter {{
    meta mark & {mark} != {mark} drop
    meta l4proto {{ 1, 58 }} accept
    iifname "lo" tcp flags & (syn|rst) == rst accept
    meta l4proto != {{ 6, 17 }} drop
{_own(wanted, "daddr", "accept")}
    socket mark & 0x0 == 0x0 counter name neighbours goto nobody
    socket transparent 0 accept
    socket transparent 1 accept
    goto nobody
}}
chain leave {{
{_own(wanted, "saddr", "return")}
    tcp flags & (syn|ack|rst) == syn|ack ct direction reply return
    meta skuid >= 0 goto usurper
    ct state established,related return
    tcp flags & (syn|rst) == rst return
    goto usurper
}}
"""
