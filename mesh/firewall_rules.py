"""The chains of the firewall's table, as one text (pure).

The verdict is taken for every packet on the conntrack *original* tuple, in both directions; nothing is accepted for
being established. A packet that passes gets our bit in its mark, which the routing rules of mesh/host.py demand, so a
flushed table lets nothing through. Foreign tables are never touched and foreign bits of the mark are kept.

A refused packet of a local sender is answered at once: TCP by a reset, everything else by ICMP "administratively
prohibited". Not TCP too by ICMP: Linux drops an ICMP error for a socket that is locked, and on a link without delay
the error comes while connect() still holds the lock, so the caller would wait for its first retransmission.
A member elsewhere is normally refused by its own host; when that one knows less, TCP is answered by a reset through
the tunnel. An ICMP error could not go there: its source would be the host, for which no tunnel speaks.

What the sets hold is said in mesh/firewall_sets.py. What only an audit lets through is counted, noted like a refusal (set
`audited`) and passed. The chains of units are in mesh/unit_rules.py, and those that end silent flows, asked before the sets,
in mesh/idle_rules.py. Ceilings are asked where a packet leaves its sender. Which of these chains there are is decided by the
plan's `Shape`. The first packet of each noted flow is also
logged to LOG_GROUP, at most LOG_RATE a second; what is not is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from mesh import idle_rules, process_rules, unit_rules
from mesh.firewall_names import accepted_mark, log_group, table_name
from mesh.firewall_sets import statements
from mesh.plan import Overlay, Plan

PORTED_PROTOCOLS: Final = "meta l4proto { 6, 17, 132 }"
DENIED_SIZE: Final = 8192
SOURCE_RATE: Final = 4  # new flows a second that one sender may have noted, so that it leaves room for the others
SOURCE_BURST: Final = 1200  # and so many at once
DENIED_TIMEOUT: Final = 300  # seconds
COUNTERS: Final = ("accepted", "denied", "strangers", "spoofed", "outside", "invalid", "audited", "limited", "unlogged", "neighbours")
LOG_RATE: Final = 1000  # a second, of each kind
LOG_BYTES: Final = 128  # of a packet: both headers
NOTED: Final = ("denied", "audited")
# By which a member elsewhere hears that it was refused.
_RESETS: Final = """tcp flags & (syn|rst) == rst ip saddr @local4 ip daddr @member4 goto pass
    tcp flags & (syn|rst) == rst ip6 saddr @local6 ip6 daddr @member6 goto pass"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a plan decides on the chains; all else is elements of sets.

    levels:   of the control groups that hold an identity; without them the kernel is not asked for what it may not have
    idle:     the idle timeouts in use, in seconds
    named:    levels of the control groups that rules name
    ceilings: has any rule one? Else no packet is asked about them
    overlay:  where all addresses in the sets lie, so that a packet between two others is known at a glance. None: not known
    """

    levels: tuple[int, ...] = ()
    idle: tuple[int, ...] = ()
    named: tuple[int, ...] = ()
    ceilings: bool = False
    overlay: Overlay | None = None

    @classmethod
    def of(cls, plan: Plan) -> Shape:
        """The shape that a plan asks for."""
        return cls(
            unit_rules.levels(plan.units), idle_rules.seconds(plan), process_rules.levels(plan),
            any(b.max_rate is not None for pair in plan.pairs.values() for b in pair.bounds), plan.overlay,
        )  # fmt: skip

    def serves(self, wanted: Shape) -> bool:
        """Do chains of this shape do for a plan of that one? Those that ask about ceilings find none, and stay."""
        return self in (wanted, replace(wanted, ceilings=True))


NO_PLAN: Final = Shape()


def replacement(interface: str, sets: Mapping[str, set[str]], *, close_v6: bool = False, shape: Shape = NO_PLAN) -> str:
    """A transaction that puts the whole table in place of whatever stands under its name."""
    name = table_name(interface)
    return (
        f"add table inet {name}\ndelete table inet {name}\n"
        + skeleton(interface, close_v6=close_v6, shape=shape)
        + statements(name, "add", {key: lines for key, lines in sets.items() if lines})
    )


def skeleton(interface: str, *, close_v6: bool = False, shape: Shape = NO_PLAN) -> str:
    """The table without elements: sets, counters, chains. Everything that is not in a set is denied.

    close_v6: IPv6 forwarding of the whole host was switched on for our links' sake, so it is closed for all others.
    """
    levels, idle, named = shape.levels, shape.idle, shape.named
    closed = "meta nfproto ipv6 drop" if close_v6 else ""
    mark = f"0x{accepted_mark(interface):08x}"
    clear = f"0x{0xFFFF_FFFF ^ accepted_mark(interface):08x}"
    group = log_group(interface)
    parts = [f"table inet {table_name(interface)} {{"]
    parts += [f"counter {name} {{ }}" for name in (*COUNTERS, *((idle_rules.NOTED, idle_rules.CROWDED) if idle else ()))]
    # The tunnel too: a packet of either kind has to be asked about in the same places.
    parts.append(f'set links {{ type ifname; elements = {{ "{interface}" }}; }}')
    parts.append("set taps { type ifname; }")
    for family in (4, 6):
        parts += _sets(family, f"ipv{family}_addr", (*NOTED, *((idle_rules.NOTED,) if idle else ())))
    parts += process_rules.sets(named)
    parts += unit_rules.sets(levels) if levels else []
    parts += idle_rules.sets() if idle else []
    unit_in, unit_out = (unit_rules.INPUT, unit_rules.OUTPUT) if levels else ("", "")
    parts.append(f"""
chain pass {{
    counter name accepted meta mark set meta mark | {mark} accept
}}
chain refuse {{
    counter name denied
    jump note
    tcp flags & (syn|ack|rst) == syn reject with tcp reset
    meta l4proto 6 ct state established reject with tcp reset
    meta l4proto 6 drop
    reject with icmpx admin-prohibited
}}
chain stranger {{
    counter name strangers
    drop
}}
chain far {{
    counter name denied
    jump note
    ip saddr @member4 meta l4proto 6 reject with tcp reset
    ip6 saddr @member6 meta l4proto 6 reject with tcp reset
    drop
}}
chain watch {{
    counter name audited
    jump seen
    goto pass
}}
{_note("note", "denied", group)}{_note("seen", "audited", group)}
chain unlogged {{
    counter name unlogged
}}
{process_rules.CHAIN}{_verdict(4, shape)}{_verdict(6, shape)}{_idle_chains(idle, group)}{unit_rules.chains(levels, mark) if levels else ""}
chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iif "lo" accept
    meta mark & {mark} == {mark} meta mark set meta mark & {clear}
    iifname "{interface}" goto from_mesh
    iifname @links goto from_link
    {_strange(shape.overlay, "accept")}
    ip daddr @local4 counter name outside drop
    ip saddr @local4 counter name outside drop
    ip saddr @member4 counter name outside drop
    ip6 daddr @local6 counter name outside drop
    ip6 saddr @local6 counter name outside drop
    ip6 saddr @member6 counter name outside drop
}}
chain from_mesh {{
    ip daddr @local4 ip saddr != @local4 goto mesh4
    ip6 daddr @local6 ip6 saddr != @local6 goto mesh6
    goto stranger
}}
chain from_link {{
    icmpv6 type nd-neighbor-solicit iifname @taps ip6 hoplimit 255 ip6 daddr {{ fe80::1, ff02::1:ff00:1 }} goto pass
    icmpv6 type nd-neighbor-advert iifname @taps ip6 hoplimit 255 ip6 daddr fe80::1 goto pass
    ip daddr 224.0.0.0/3 drop
    ip6 daddr ff00::/8 drop
    iifname . ip saddr @place4 goto here4
    iifname . ip6 saddr @place6 goto here6
    counter name spoofed drop
}}
chain input {{
    type filter hook input priority mangle; policy accept;
    {unit_in}
    meta mark & {mark} == {mark} accept
    iifname @links drop
}}
chain forward {{
    type filter hook forward priority mangle; policy accept;
    iifname "{interface}" oifname "{interface}" drop
    meta mark & {mark} == {mark} accept
    iifname @links drop
    oifname @links drop
    {closed}
}}
{_leaving(interface, mark, clear) if not levels else ""}
chain output {{
    type route hook output priority mangle; policy accept;
    meta mark & {mark} == {mark} {f"meta mark set meta mark & {clear}" if levels else "accept"}
    {unit_out}
    {_strange(shape.overlay, "goto elsewhere")}
    ip daddr @local4 goto to_local
    ip6 daddr @local6 goto to_local
    {_RESETS}
    ip saddr @held4 goto here4
    ip6 saddr @held6 goto here6
    ip daddr @member4 goto here4
    ip6 daddr @member6 goto here6
    goto elsewhere
}}
chain elsewhere {{
    oifname @links goto quiet
}}
chain to_local {{
    ip saddr . ip daddr @self4 {"goto pass" if levels else "accept"}
    ip6 saddr . ip6 daddr @self6 {"goto pass" if levels else "accept"}
    icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} goto pass
    icmpv6 type {{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem }} goto pass
    tcp flags & (syn|rst) == rst goto pass
    meta nfproto ipv4 goto here4
    goto here6
}}
chain quiet {{
    oifname @taps icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    ip daddr 224.0.0.0/3 drop
    ip6 daddr ff00::/8 drop
    ct state untracked drop
    meta nfproto ipv4 goto here4
    goto here6
}}
}}
""")
    return "\n".join(parts)


def _strange(overlay: Overlay | None, verdict: str) -> str:
    """Rules for packets that neither come from nor go to the overlay."""
    if overlay is None:
        return ""
    return f"""ip saddr != {overlay.v4} ip daddr != {overlay.v4} {verdict}
    ip6 saddr != {overlay.v6} ip6 daddr != {overlay.v6} {verdict}"""


def _leaving(interface: str, mark: str, clear: str) -> str:
    """Before `output`: what an identity of the host itself sends to one elsewhere. Its first route leads to the tunnel already, so it
    gets its verdict and mark in a chain after which the kernel does not route anew; that costs more than the verdict. Not
    with units, whose first route leads nowhere. What is refused here is not seen by `output`.
    """
    return f"""chain leaving {{
    type filter hook output priority mangle - 1; policy accept;
    meta mark & {mark} == {mark} meta mark set meta mark & {clear}
    oifname "{interface}" goto into_tunnel
}}
chain into_tunnel {{
    {_RESETS}
    ip daddr @member4 ip saddr @held4 goto here4
    ip6 daddr @member6 ip6 saddr @held6 goto here6
}}"""


def _idle_chains(timeouts: tuple[int, ...], group: int) -> str:
    return _note("lapse", idle_rules.NOTED, group) + idle_rules.chains(timeouts) if timeouts else ""


def _sets(family: int, address: str, kinds: tuple[str, ...]) -> list[str]:
    ends = f"{address} . {address}"
    flow = f"{ends} . inet_proto . inet_service"
    noted = f"size {DENIED_SIZE}; flags dynamic,timeout; timeout {DENIED_TIMEOUT}s; counter;"
    return [
        *(line for prefix in ("", "a") for line in (
            f"set {prefix}pair{family} {{ type {flow}; }}",
            f"set {prefix}range{family} {{ type {flow}; flags interval; }}",
            f"set {prefix}proto{family} {{ type {ends} . inet_proto; }}",
            f"set {prefix}rest{family} {{ type {ends}; }}",
            f"set {prefix}except{family} {{ type {ends} . inet_proto; }}",
        )),
        f"map rate{family} {{ type {flow} : limit; flags interval; }}",
        f"map back{family} {{ type {flow} : limit; flags interval; }}",
        f"set error{family} {{ type {ends} . {address}; }}",
        f"set local{family} {{ type {address}; }}",
        f"set held{family} {{ type {address}; }}",
        f"set member{family} {{ type {address}; }}",
        f"set place{family} {{ type ifname . {address}; }}",
        f"set self{family} {{ type {ends}; }}",
        *(f"set {kind}{family} {{ type {flow}; {noted} }}" for kind in kinds),
        *(f"set {kind}_by{family} {{ type {address}; size {DENIED_SIZE}; flags dynamic,timeout; timeout {DENIED_TIMEOUT}s; }}"
          for kind in kinds),
    ]  # fmt: skip


def _note(chain: str, kind: str, group: int) -> str:
    """Remember a flow under the tuple of its first packet, and log that packet.

    A flow that is known is only counted; one that finds the set full, or whose sender has begun too many, is neither
    remembered nor logged, but counted.
    Protocols are numbers throughout: names need /etc/protocols, which a minimal system does not have.
    """
    out = ""
    for suffix, prefix in (("", kind), ("_back", f"{kind}-reply")):
        out += f"""
chain {chain}_log{suffix} {{
    limit rate {LOG_RATE}/second burst {2 * LOG_RATE} packets log prefix "{prefix}" group {group} snaplen {LOG_BYTES} return
    goto unlogged
}}"""
    for family in (4, 6):
        ip, held = "ip" if family == 4 else "ip6", f"@{kind}{family}"
        there, back = f"{ip} saddr . {ip} daddr . meta l4proto", f"{ip} daddr . {ip} saddr . meta l4proto"
        for suffix, flow in (("", f"{there} . th dport"), ("_back", f"{back} . th sport")):
            out += f"""
chain {chain}{suffix}{family} {{
    {flow} {held} update {held} {{ {flow} }} return
    update @{kind}_by{family} {{ {ip} saddr limit rate over {SOURCE_RATE}/second burst {SOURCE_BURST} packets }} goto unlogged
    update {held} {{ {flow} }} goto {chain}_log{suffix}
    goto unlogged
}}"""
        # Without ports nothing can be looked up that ends in a constant: these are counted, and read from the set.
        out += f"""
chain {chain}_plain{family} {{
    update {held} {{ {there} . 0 }} return
    goto unlogged
}}"""
    return out + f"""
chain {chain} {{
    {PORTED_PROTOCOLS} ct direction reply meta nfproto ipv4 goto {chain}_back4
    {PORTED_PROTOCOLS} ct direction reply goto {chain}_back6
    {PORTED_PROTOCOLS} meta nfproto ipv4 goto {chain}4
    {PORTED_PROTOCOLS} goto {chain}6
    meta nfproto ipv4 goto {chain}_plain4
    goto {chain}_plain6
}}
"""


def _verdict(family: int, shape: Shape) -> str:
    """The chains of one family. Port 0 is never permitted, also not by a protocol that is allowed whole."""
    named = shape.named
    ip = "ip" if family == 4 else "ip6"
    there, back = f"{ip} saddr . {ip} daddr", f"{ip} daddr . {ip} saddr"
    if family == 4:
        error = "meta l4proto 1"
        kinds = "icmp type != { destination-unreachable, time-exceeded, parameter-problem } drop"
        floor = "icmp type destination-unreachable icmp code frag-needed icmp mtu < 576 drop"
    else:
        error = "meta l4proto 58"
        kinds = "icmpv6 type != { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } drop"
        floor = "icmpv6 type packet-too-big icmpv6 mtu < 1280 drop"
    lookups = ""
    for direction, ends, port in (("original", there, "th dport"), ("reply", back, "th sport")):
        own = process_rules.lookups(family, named) if direction == "original" else process_rules.answers(family)
        end = "watch" if direction == "original" else "pass"
        lookups += f"""
chain {direction}{family} {{
    {ends} . meta l4proto . {port} @pair{family} goto pass
    {PORTED_PROTOCOLS} {port} 0 return
    {ends} . meta l4proto @proto{family} goto pass
    {ends} . meta l4proto . {port} @range{family} goto pass
    {ends} @rest{family} {ends} . meta l4proto != @except{family} goto pass
    {own}
    {ends} . meta l4proto . {port} @apair{family} goto {end}
    {ends} . meta l4proto @aproto{family} goto {end}
    {ends} . meta l4proto . {port} @arange{family} goto {end}
    {ends} @arest{family} {ends} . meta l4proto != @aexcept{family} goto {end}
}}"""
    ceilings = f"""
    ct direction original limit name {there} . meta l4proto . th dport map @rate{family} counter name limited drop
    ct direction reply limit name {back} . meta l4proto . th sport map @back{family} counter name limited drop""" if shape.ceilings else ""
    return f"""{lookups}
chain verdict{family} {{
    ct state invalid,untracked counter name invalid drop
    {error} ct state related goto error{family}{idle_rules.lookups(family) if shape.idle else ""}
    ct direction original goto original{family}
    goto reply{family}
}}
chain error{family} {{
    {kinds}
    {floor}
    {ip} saddr . ct original {ip} saddr . ct original {ip} daddr @error{family} goto pass
    drop
}}
chain here{family} {{{ceilings}
    jump verdict{family}
    goto refuse
}}
chain mesh{family} {{
    jump verdict{family}
    goto far
}}
"""
