"""What links, addresses, routes and rules a plan asks for, as a value (pure).

The ladder of rules, the same for both families (s = slot of the interface, M = our mark bit):
    6+s    M set -> table of places             the same as 110+s, found first; only when the host itself holds no identity
    10+s   iif LINK, M not set -> blackhole     for the tunnel and each pair: without the firewall nothing enters
    90+s   M not set, of USER, to the overlay -> table of a unit    its own source address, also to instances of this host
    100    local table                          moved here from 0
    101    outer packets of the tunnel -> main
    110+s  M set -> table of places             local instances at their links, everybody else at the tunnel
    114+s  M set -> blackhole                   an accepted packet never leaves through a foreign route
    120+s  to the overlay -> exact addresses    unmarked packets to known instances go to the tunnel, where they end
    124+s  to the overlay, from here -> main without its default     (only when the host itself holds an identity)
    128+s  to the overlay, from here -> tunnel                       (only when the host itself holds an identity)

With a unit (a control group that holds an identity) every process of the host shares its routes. Then 90, 120 and 128 lead
to the void, a link whose other end is down: only what the firewall marked is routed anew, by 110. Without the firewall
nothing leaves under a unit's address.
"""


from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from mesh.devices import TUNNEL
from mesh.firewall_names import accepted_mark, slot
from mesh.plan import AttachmentPlan, Plan
from mesh.snapshot import InstanceKey

FAST_RULE: Final = 6
GATE_RULE: Final = 10
UNIT_RULE: Final = 90
LOCAL_RULE: Final = 100
TUNNEL_RULE: Final = 101
TABLE_MAIN: Final = 254  # linux/rtnetlink.h
TABLE_LOCAL: Final = 255
_TABLES: Final = 21000  # +4*slot: places, +1 exact, +2 wide
_UNIT_TABLES: Final = 0x5200_0000  # +slot<<22, + the last 22 bits of the IPv4 address: all that the overlay leaves free


@dataclass(frozen=True, slots=True)
class Rule:
    """A routing rule; `table` 0 is a blackhole."""

    family: int  # 4 or 6
    priority: int
    table: int
    iif: str | None = None
    mark: tuple[int, int] | None = None  # value, mask
    dst: str | None = None
    no_default: bool = False
    uid: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """local: to an address of this host itself, reached without leaving it."""

    family: int
    table: int
    dst: str
    dev: str
    src: str | None = None
    local: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """One veth pair: `addresses` are inside, in order; `reachable` those of them that the host routes to."""

    name: str
    netns: str
    addresses: tuple[str, ...]
    reachable: tuple[str, ...]
    instances: tuple[InstanceKey, ...]
    tap: bool = False  # somebody else's link to a guest: `netns` is empty, and the other end not ours to set

    @property
    def host_mac(self) -> str:
        return _mac(self.name, "host")

    @property
    def inside_mac(self) -> str:
        return _mac(self.name, "inside")


def _mac(name: str, side: str) -> str:
    digest = hashlib.sha256(f"{name} {side}".encode()).digest()
    return ":".join(f"{b:02x}" for b in (0x02, *digest[:5]))  # locally administered, unicast


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that has to be there."""

    interface: str
    mtu: int
    overlay: Mapping[int, str]
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    host_addresses: tuple[str, ...] = ()
    void: str | None = None
    rules: frozenset[Rule] = frozenset()
    routes: frozenset[Route] = frozenset()


def layout(plan: Plan) -> Layout:
    """The layout of a plan."""
    overlay = {4: str(plan.overlay.v4), 6: str(plan.overlay.v6)}
    pairs: dict[str, Pair] = {}
    for key in sorted(plan.attachments):
        at = plan.attachments[key]
        if at.veth is None or (at.netns is None and at.kind != "tap"):
            continue
        before = pairs.get(at.veth)
        pairs[at.veth] = Pair(
            name=at.veth,
            netns=before.netns if before else at.netns or "",
            addresses=(before.addresses if before else ()) + at.addresses,
            reachable=(before.reachable if before else ()) + (at.addresses if at.active else ()),
            instances=(*(before.instances if before else ()), key),
            tap=at.kind == "tap",
        )
    held = plan.host_addresses
    void = void_name(plan.interface) if plan.units else None
    return Layout(
        interface=plan.interface,
        mtu=plan.mtu,
        overlay=overlay,
        pairs=pairs,
        host_addresses=held,
        void=void,
        rules=frozenset((*rules(plan.interface, pairs, overlay, holds=bool(held)), *_unit_rules(plan, overlay))),
        routes=frozenset((*_routes(plan, pairs, overlay, held, void or plan.interface), *_unit_routes(plan, overlay, held, void or ""))),
    )


def tables(interface: str) -> tuple[int, int, int]:
    """Numbers of our three routing tables: places, exact, wide."""
    first = _TABLES + 4 * slot(interface)
    return first, first + 1, first + 2


def void_name(interface: str) -> str:
    """Our end of the link that leads nowhere; the other end has an ``x`` behind."""
    return "rtv" + hashlib.sha256(f"void {interface}".encode()).hexdigest()[:10]


def unit_table(interface: str, at: AttachmentPlan) -> int:
    """The routing table of one unit."""
    return _UNIT_TABLES + (slot(interface) << 22) + (int(IPv4Address(at.addresses[0])) & 0x3F_FFFF)


def _unit_rules(plan: Plan, overlay: Mapping[int, str]) -> list[Rule]:
    s, mark = slot(plan.interface), accepted_mark(plan.interface)
    return [
        Rule(family, UNIT_RULE + s, unit_table(plan.interface, at), iif="lo", mark=(0, mark), dst=overlay[family], uid=at.unit.uid)
        for at in plan.units
        if at.unit is not None and at.unit.uid is not None
        for family in (4, 6)
    ]


def _unit_routes(plan: Plan, overlay: Mapping[int, str], held: tuple[str, ...], void: str) -> list[Route]:
    out: list[Route] = []
    for at in plan.units:
        if at.unit is None or at.unit.uid is None:
            continue
        table = unit_table(plan.interface, at)
        own = {family_of(a): a for a in at.addresses}
        out += [Route(family, table, overlay[family], void, own[family]) for family in (4, 6)]
        out += [Route(family_of(a), table, _exact(a), "lo", own[family_of(a)], local=True) for a in held]
    return out


def rules(interface: str, links: Iterable[str], overlay: Mapping[int, str], *, holds: bool) -> list[Rule]:
    """The ladder. holds: does the host itself hold an identity?"""
    s, mark = slot(interface), accepted_mark(interface)
    places, exact, wide = tables(interface)
    out: list[Rule] = []
    for family in (4, 6):
        if not holds:
            # A marked packet is never for the host itself: it need not pass the gates, one a link, and the local table.
            out.append(Rule(family, FAST_RULE + s, places, mark=(mark, mark)))
        out += [Rule(family, GATE_RULE + s, 0, iif=link, mark=(0, mark)) for link in (interface, *links)]
        out += [
            Rule(family, LOCAL_RULE, TABLE_LOCAL),
            Rule(family, 110 + s, places, mark=(mark, mark)),
            Rule(family, 114 + s, 0, mark=(mark, mark)),
            Rule(family, 120 + s, exact, dst=overlay[family]),
        ]
        if holds:
            out += [
                Rule(family, TUNNEL_RULE, TABLE_MAIN, mark=(TUNNEL, TUNNEL)),
                Rule(family, 124 + s, TABLE_MAIN, iif="lo", dst=overlay[family], no_default=True),
                Rule(family, 128 + s, wide, iif="lo", dst=overlay[family]),
            ]
    return out


def _routes(
    plan: Plan, pairs: Mapping[str, Pair], overlay: Mapping[int, str], held: tuple[str, ...], first: str
) -> list[Route]:
    """first: the link of what has no mark yet."""
    places, exact, wide = tables(plan.interface)
    source = {family: next((a for a in held if family_of(a) == family), None) for family in (4, 6)}
    out: list[Route] = []
    for family in (4, 6):
        out.append(Route(family, places, overlay[family], plan.interface, source[family]))
        if held:
            out.append(Route(family, wide, overlay[family], first, source[family]))
    for pair in pairs.values():
        for address in pair.reachable:
            family = family_of(address)
            out.append(Route(family, places, _exact(address), pair.name, source[family]))
            out.append(Route(family, exact, _exact(address), first, source[family]))
    for address in plan.remotes:
        out.append(Route(family_of(address), exact, _exact(address), first, source[family_of(address)]))
    return out


def family_of(address: str) -> int:
    return 6 if ":" in address else 4


def _exact(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"
