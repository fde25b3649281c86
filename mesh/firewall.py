"""The port firewall: one nftables table of our own, changed by atomic transactions.

The verdict is taken for every packet on the conntrack *original* tuple, in both directions; nothing is accepted for
being established. A packet that passes gets our bit in its mark, which the routing rules of mesh/host.py demand, so a
flushed table lets nothing through. Foreign tables are never touched and foreign bits of the mark are kept.

A refused packet of a local sender is answered at once: TCP by a reset, everything else by ICMP "administratively
prohibited". Not TCP too by ICMP: Linux drops an ICMP error for a socket that is locked, and on a link without delay
the error comes while connect() still holds the lock, so the caller would wait for its first retransmission.
A member elsewhere is normally refused by its own host; when that one knows less, TCP is answered by a reset through
the tunnel. An ICMP error could not go there: its source would be the host, for which no tunnel speaks.

Sets, one of each per family (suffix 4 or 6):
    pair    src . dst . protocol . port    exact ports (hash; the large one)
    range   the same with port intervals   wide ranges only
    proto   src . dst . protocol           a protocol allowed whole
    rest    src . dst                      everything but what `except` names for the pair
    error   outer src . flow src . flow dst    who may send ICMP errors about which flow
    local   addresses of active local instances; held: those of them on the host itself; member: permitted ones elsewhere
    place   link . address                 which source address may come from which link
    self    address . address              a host-held instance talking to itself
    denied  src . dst . protocol . port    flows refused in the last minutes, with counters; bounded

What only an audit lets through stands in sets of its own (apair, arange, aproto, arest, aexcept), looked up last: it is
counted, noted like a refusal (set `audited`) and passed. Ports that only some users may reach from an instance on the
host itself stand in `uid` (user . src . dst . protocol . port) instead of the others, and in `bound` for the answers.
With units (mesh/unit_rules.py) there are sets of their addresses and control groups and chains that ask for both.
Flows that have fallen silent end in chains of mesh/idle_rules.py, asked before the sets above, when a plan has an idle timeout.
Ceilings are limit objects named by rate (packets of the first direction) and back (answers), asked where a packet
leaves its sender.

The first packet of each noted flow is also logged to LOG_GROUP, at most LOG_RATE a second; what is not is counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from identity.errors import BadInput
from mesh import idle_rules, nft, unit_rules, units
from mesh.plan import AttachmentPlan, Elements, PairPlan, Plan, diff, elements_of
from policy.evaluate import Bound
from policy.ports import ICMP, ICMPV6, NOTHING, PortMap, proto_name, proto_number, union

Sets = dict[str, set[str]]

PORTED_PROTOCOLS: Final = "meta l4proto { 6, 17, 132 }"
DENIED_SIZE: Final = 8192
SOURCE_RATE: Final = 4  # new flows a second that one sender may have noted, so that it leaves room for the others
SOURCE_BURST: Final = 1200  # and so many at once
DENIED_TIMEOUT: Final = 300  # seconds
COUNTERS: Final = ("accepted", "denied", "strangers", "spoofed", "outside", "invalid", "audited", "limited", "unlogged", "neighbours")
LOG_GROUP: Final = 0x5254  # plus the slot of the interface; a group belongs to one namespace
LOG_RATE: Final = 1000  # a second, of each kind
LOG_BYTES: Final = 128  # of a packet: both headers
LIMITS: Final = "limits"  # in Sets: the limit objects, as "name rate"
_BURST: Final = 131_072  # bytes; a superpacket has to fit
NOTED: Final = ("denied", "audited")
_CHANGING: Final = (*NOTED, idle_rules.NOTED, *idle_rules.VOLATILE)  # what packets and time write
_COMPARE_LIMIT: Final = 20_000  # elements; larger tables are put back, not compared, when others commit
_CHUNK: Final = 4000  # elements in one statement
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")


def slot(interface: str) -> int:
    """0-3 from the trailing digits of an interface name: agents that share a namespace use different marks."""
    digits = re.search(r"\d+$", interface)
    return int(digits[0]) % 4 if digits else 0


def log_group(interface: str) -> int:
    """The netlink log group of the table of an interface."""
    return LOG_GROUP + slot(interface)


def accepted_mark(interface: str) -> int:
    """The one bit of the packet mark that says "our firewall let it pass"."""
    return 0x0200_0000 << (2 * slot(interface))


def table_name(interface: str) -> str:
    """``retinue`` for rtn0, else ``retinue_IFNAME``. Raises BadInput for what is no interface name."""
    if not _INTERFACE.fullmatch(interface):
        raise BadInput("interface.name", f"not an interface name: {ascii(interface)[:40]}",
                       hint="up to 15 letters, digits, '.', '_' and '-'")  # fmt: skip
    return "retinue" if interface == "rtn0" else "retinue_" + re.sub(r"[^A-Za-z0-9]", "_", interface)


# ---- sets (pure)


def pair_sets(pair: PairPlan) -> Sets:
    """The elements of one pair, by set."""
    out: Sets = {}
    bound = union(b.ports for b in pair.bounds if b.processes)
    elements = elements_of((pair.ports if pair.enforced is None else pair.enforced) - bound)
    # The sets of audits are asked after the others, so they may hold what stands there too and stay small.
    audited = elements_of(NOTHING if pair.enforced is None else pair.ports - bound)
    for family, src, dst in zip((4, 6), pair.src_addresses, pair.dst_addresses, strict=True):
        ends = f"{src} . {dst}"
        _add_pair(out, family, ends, elements)
        _add_pair(out, family, ends, audited, "a")
        for one in pair.bounds:
            _add_bound(out, family, ends, one, pair)
        out.setdefault(f"error{family}", set()).update((f"{src} . {src} . {dst}", f"{dst} . {src} . {dst}"))
    return out


def _add_bound(out: Sets, family: int, ends: str, bound: Bound, pair: PairPlan) -> None:
    flows = [f"{ends} . {flow}" for flow in intervals(bound.ports, family)]
    if bound.processes:
        out.setdefault(f"bound{family}", set()).update(flows)
        users = [p.value for p in bound.processes if p.kind == "uid"]
        out.setdefault(f"uid{family}", set()).update(f"{user} . {flow}" for user in users for flow in flows)
    if bound.idle_timeout is not None:
        out.setdefault(f"{idle_rules.MAP}{family}", set()).update(
            idle_rules.element(flow, family, bound.idle_timeout) for flow in flows
        )
    if bound.max_rate is not None:
        for name in ("rate", "back"):
            limit = limit_name(name, bound, pair)
            out.setdefault(LIMITS, set()).add(f"{limit} {bound.max_rate}")
            out.setdefault(f"{name}{family}", set()).update(f'{flow} : "{limit}"' for flow in flows)


def limit_name(kind: str, bound: Bound, pair: PairPlan) -> str:
    """Name of the limit object of one pair, rule, rate and direction."""
    text = f"{pair.src}\0{pair.dst}\0{bound.rule}\0{bound.max_rate}"
    return f"{kind}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def intervals(ports: PortMap, family: int) -> list[str]:
    """A port map as ``protocol . port`` intervals of one family that do not overlap.

    Single ports too: nft 1.0.6 cannot delete from an interval set what was added as a plain value.
    """
    elements = elements_of(ports)
    out = [f"{proto} . {port}-{port}" for proto, port in elements.exact]
    out += [f"{proto} . {first}-{last}" for proto, first, last in elements.ranges]
    out += [f"{_number(proto, family)} . 0-65535" for proto in elements.protocols]
    if elements.rest:
        named = sorted({_number(p, family) for p in elements.except_} | ({ICMP, ICMPV6} if ICMP in elements.except_ else set()))
        start = 0
        for number in (*named, 256):
            if number > start:
                out.append(f"{start}-{number - 1} . 0-65535" if number - 1 > start else f"{start} . 0-65535")
            start = number + 1
    return out


def _add_pair(out: Sets, family: int, ends: str, elements: Elements, prefix: str = "") -> None:
    def add(name: str, lines: Iterable[str]) -> None:
        lines = set(lines)
        if lines:
            out.setdefault(f"{prefix}{name}{family}", set()).update(lines)

    add("pair", (f"{ends} . {proto} . {port}" for proto, port in elements.exact))
    add("range", (f"{ends} . {proto} . {first}-{last}" for proto, first, last in elements.ranges))
    add("proto", (f"{ends} . {_number(proto, family)}" for proto in elements.protocols))
    if elements.rest:
        add("rest", (ends,))
        excluded = set(elements.except_)
        # Our number 1 stands for both ICMPs; neither may slip through `rest` when ICMP has entries of its own.
        excluded |= {ICMP, ICMPV6} if ICMP in excluded else set()
        add("except", (f"{ends} . {proto}" for proto in excluded))


def _number(proto: int, family: int) -> int:
    return ICMPV6 if proto == ICMP and family == 6 else proto


def topology_sets(plan: Plan) -> Sets:
    """The elements that say who is where."""
    out: Sets = {}

    def add(name: str, address: str, text: str) -> None:
        out.setdefault(f"{name}{6 if ':' in address else 4}", set()).add(text)

    for attachment in plan.attachments.values():
        if attachment.veth is not None:
            out.setdefault("links", set()).add(f'"{attachment.veth}"')
            if attachment.kind == "tap":
                out.setdefault("taps", set()).add(f'"{attachment.veth}"')
        if not attachment.active:
            continue
        for address in attachment.addresses:
            _add_local(add, attachment, address)
    for address in plan.remotes:
        add("member", address, address)
    return out | unit_rules.elements(plan.units)


def _add_local(add: Callable[[str, str, str], None], attachment: AttachmentPlan, address: str) -> None:
    add("local", address, address)
    if attachment.veth is None:
        add("held", address, address)
        add("self", address, f"{address} . {address}")
    else:
        add("place", address, f'"{attachment.veth}" . {address}')


def all_sets(plan: Plan) -> Sets:
    """Everything the plan puts into the table."""
    out = topology_sets(plan)
    for pair in plan.pairs.values():
        for name, lines in pair_sets(pair).items():
            out.setdefault(name, set()).update(lines)
    return out | idle_rules.grace(plan.pairs.values())


@dataclass(frozen=True, slots=True)
class Delta:
    """Elements to delete and to add, by set. keep: what stays in a set of groups that loses something; a group that is
    gone has no name any more by which to delete it, so such a set is emptied and filled in one transaction.
    grace: elements whose time begins anew (mesh/idle_rules.py).
    """

    delete: Mapping[str, set[str]]
    add: Mapping[str, set[str]]
    keep: Mapping[str, set[str]] = field(default_factory=dict)
    grace: Mapping[str, set[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.delete or self.add)


def sets_delta(old: Plan, new: Plan) -> Delta:
    """The elements that differ. Instances keep their addresses for life, so pairs never share an element."""
    gone, come = topology_sets(old), topology_sets(new)
    changes = diff(old, new)
    for pairs, into in (
        ([*changes.pairs_gone, *(a for a, _ in changes.pairs_changed)], gone),
        ([*changes.pairs_new, *(b for _, b in changes.pairs_changed)], come),
    ):
        for pair in pairs:
            for name, lines in pair_sets(pair).items():
                into.setdefault(name, set()).update(lines)
    delete = _minus(gone, come)
    keep = {name: gone[name] & come.get(name, set()) for name in delete if name.startswith(unit_rules.GROUP)}
    return Delta(delete, _minus(come, gone), keep, idle_rules.grace(idle_rules.renewed(old, new)))


def _minus(a: Sets, b: Sets) -> Sets:
    return {name: rest for name, lines in a.items() if (rest := lines - b.get(name, set()))}


# ---- text (pure)


def statements(table: str, verb: str, sets: Mapping[str, set[str]]) -> str:
    """``add|delete element`` statements; limit objects before the elements that name them, and gone after them."""
    lines = []
    emptied = [name for name in sorted(sets) if verb == "delete" and name.startswith(unit_rules.GROUP)]
    lines += [f"flush set inet {table} {name}" for name in emptied]
    limits = [line.partition(" ") for line in sorted(sets.get(LIMITS, ()))]
    if verb == "add":
        lines += [f"add limit inet {table} {n} {{ rate over {r} bytes/second burst {_BURST} bytes ; }}" for n, _, r in limits]
    for name in sorted(sets.keys() - {LIMITS, *emptied}):
        elements = sorted(sets[name])
        for start in range(0, len(elements), _CHUNK):
            chunk = ", ".join(elements[start : start + _CHUNK])
            lines.append(f"{verb} element inet {table} {name} {{ {chunk} }}")
    if verb == "delete":
        lines += [f"delete limit inet {table} {n}" for n, _, _ in limits]
    return "\n".join(lines) + "\n" if lines else ""


def narrowing(table: str, delta: Delta) -> str:
    """What is deleted, and what stays in the sets that have to be filled again."""
    return statements(table, "delete", delta.delete) + statements(table, "add", {n: kept for n, kept in delta.keep.items() if kept})


def replacement(
    interface: str, sets: Mapping[str, set[str]], *, close_v6: bool = False, levels: tuple[int, ...] = (),
    idle: tuple[int, ...] = (),
) -> str:  # fmt: skip
    """A transaction that puts the whole table in place of whatever stands under its name."""
    name = table_name(interface)
    return (
        f"add table inet {name}\ndelete table inet {name}\n"
        + skeleton(interface, close_v6=close_v6, levels=levels, idle=idle)
        + statements(name, "add", {key: lines for key, lines in sets.items() if lines})
    )


def skeleton(interface: str, *, close_v6: bool = False, levels: tuple[int, ...] = (), idle: tuple[int, ...] = ()) -> str:
    """The table without elements: sets, counters, chains. Everything that is not in a set is denied.

    close_v6: IPv6 forwarding of the whole host was switched on for our links' sake, so it is closed for all others.
    levels: of the control groups that hold an identity; without them the kernel is not asked for what it may not have.
    idle: the idle timeouts in use, in seconds.
    """
    closed = "meta nfproto ipv6 drop" if close_v6 else ""
    mark = f"0x{accepted_mark(interface):08x}"
    clear = f"0x{0xFFFF_FFFF ^ accepted_mark(interface):08x}"
    group = log_group(interface)
    parts = [f"table inet {table_name(interface)} {{"]
    parts += [f"counter {name} {{ }}" for name in (*COUNTERS, *((idle_rules.NOTED, idle_rules.CROWDED) if idle else ()))]
    parts.append("set links { type ifname; }")
    parts.append("set taps { type ifname; }")
    for family in (4, 6):
        parts += _sets(family, f"ipv{family}_addr", (*NOTED, *((idle_rules.NOTED,) if idle else ())))
    parts += unit_rules.sets(levels) if levels else []
    parts += idle_rules.sets() if idle else []
    unit_in, unit_out = (unit_rules.INPUT, unit_rules.OUTPUT) if levels else ("", "")
    parts.append(f"""
chain pass {{
    counter name accepted
    meta mark set meta mark | {mark}
    accept
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
{_verdict(4, watched=bool(idle))}{_verdict(6, watched=bool(idle))}{_idle_chains(idle, group)}{unit_rules.chains(levels, mark) if levels else ""}
chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "lo" accept
    meta mark & {mark} == {mark} meta mark set meta mark & {clear}
    iifname "{interface}" goto from_mesh
    iifname @links goto from_link
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
    iifname @taps icmpv6 type nd-neighbor-solicit ip6 hoplimit 255 ip6 daddr {{ fe80::1, ff02::1:ff00:1 }} goto pass
    iifname @taps icmpv6 type nd-neighbor-advert ip6 hoplimit 255 ip6 daddr fe80::1 goto pass
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
    iifname "{interface}" drop
    iifname @links drop
}}
chain forward {{
    type filter hook forward priority mangle; policy accept;
    iifname "{interface}" oifname "{interface}" drop
    meta mark & {mark} == {mark} accept
    iifname "{interface}" drop
    iifname @links drop
    oifname "{interface}" drop
    oifname @links drop
    {closed}
}}
chain output {{
    type route hook output priority mangle; policy accept;
    meta mark & {mark} == {mark} meta mark set meta mark & {clear}
    {unit_out}
    ip daddr @local4 goto to_local
    ip6 daddr @local6 goto to_local
    ip saddr @local4 ip daddr @member4 tcp flags & (syn|rst) == rst goto pass
    ip6 saddr @local6 ip6 daddr @member6 tcp flags & (syn|rst) == rst goto pass
    ip saddr @held4 goto here4
    ip6 saddr @held6 goto here6
    ip daddr @member4 goto here4
    ip6 daddr @member6 goto here6
    oifname "{interface}" goto quiet
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
        f"set uid{family} {{ type uid . {flow}; flags interval; }}",
        f"set bound{family} {{ type {flow}; flags interval; }}",
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


def _verdict(family: int, *, watched: bool) -> str:
    """The chains of one family; `watched`: some flows end when they fall silent. Port 0 is never permitted, also not by a protocol that is allowed whole."""
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
        own = f"meta skuid . {ends} . meta l4proto . {port} @uid{family}" if direction == "original" else (
            f"{ends} . meta l4proto . {port} @bound{family}"
        )  # fmt: skip
        end = "watch" if direction == "original" else "pass"
        lookups += f"""
chain {direction}{family} {{
    {ends} . meta l4proto . {port} @pair{family} goto pass
    {PORTED_PROTOCOLS} {port} 0 return
    {ends} . meta l4proto @proto{family} goto pass
    {ends} . meta l4proto . {port} @range{family} goto pass
    {ends} @rest{family} {ends} . meta l4proto != @except{family} goto pass
    {own} goto pass
    {ends} . meta l4proto . {port} @apair{family} goto {end}
    {ends} . meta l4proto @aproto{family} goto {end}
    {ends} . meta l4proto . {port} @arange{family} goto {end}
    {ends} @arest{family} {ends} . meta l4proto != @aexcept{family} goto {end}
}}"""
    return f"""{lookups}
chain verdict{family} {{
    ct state invalid,untracked counter name invalid drop
    {error} ct state related goto error{family}{idle_rules.lookups(family) if watched else ""}
    ct direction original goto original{family}
    goto reply{family}
}}
chain error{family} {{
    {kinds}
    {floor}
    {ip} saddr . ct original {ip} saddr . ct original {ip} daddr @error{family} goto pass
    drop
}}
chain here{family} {{
    ct direction original limit name {there} . meta l4proto . th dport map @rate{family} counter name limited drop
    ct direction reply limit name {back} . meta l4proto . th sport map @back{family} counter name limited drop
    jump verdict{family}
    goto refuse
}}
chain mesh{family} {{
    jump verdict{family}
    goto far
}}
"""


# ---- the kernel's view, in a comparable form (pure)


def fingerprint(objects: Iterable[Mapping[str, Any]]) -> tuple[frozenset[str], Sets]:
    """What a listed table holds: its rules and chains as texts, and the elements of the sets we fill."""
    rules: list[str] = []
    sets: Sets = {}
    position: dict[str, int] = {}
    for entry in objects:
        if "rule" in entry:
            rule = entry["rule"]
            position[rule["chain"]] = number = position.get(rule["chain"], 0) + 1
            rules.append(f"{rule['chain']}#{number} {_plain(rule['expr'])}")
        elif "chain" in entry:
            chain = {k: v for k, v in entry["chain"].items() if k != "handle"}
            rules.append(f"chain {_plain(chain)}")
        elif "limit" in entry:
            limit = {k: v for k, v in entry["limit"].items() if k != "handle"}
            sets.setdefault(LIMITS, set()).add(_plain(limit))
        elif "set" in entry or "map" in entry:
            one = entry.get("set") or entry["map"]
            if not one["name"].startswith(_CHANGING):
                sets[one["name"]] = {_plain(e) for e in one.get("elem", ())}
    return frozenset(rules), sets


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_plain(v)}" for k, v in sorted(value.items()) if k != "counter") + "}"
    if isinstance(value, list):
        return "[" + ",".join(_plain(v) for v in value) + "]"
    return str(value)


# ---- the thing itself


@dataclass(frozen=True, slots=True)
class DeniedFlow:
    """A noted flow (refused, or let through by an audit) under the tuple of its first packet; port 0 for protocols
    without ports.
    """

    src: str
    dst: str
    proto: str
    port: int
    packets: int


class Firewall:
    """Keeps the table equal to the plan last applied."""

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.table = table_name(interface)
        self.close_v6 = False  # see `skeleton`; takes effect with the next whole table
        self.plan: Plan | None = None
        self._half: tuple[Plan, Delta] | None = None  # narrowed towards this plan, not yet widened
        self._print: tuple[frozenset[str], Sets] | None = None  # the table as our last commit left it
        self._generation: int | None = None  # at our last commit; None when another's came between
        self._lock = asyncio.Lock()

    async def start(self) -> bool:
        """Make sure that a table stands: the one from before, or one that denies everything. True when it was there."""
        async with self._lock:
            if await nft.list_table(self.table) is not None:
                return True
            await self._commit(self._whole(None))
            return False

    async def narrow(self, plan: Plan) -> None:
        """Take away all that `plan` does not allow. Raises RetinueError; then the table is what it was.

        The first time in the life of this object the whole table is put in place of an earlier one, in one
        transaction: it cannot be known what that one allowed.
        """
        async with self._lock:
            if self.plan is None or self._half is not None or self._shape(self.plan) != self._shape(plan):
                await self._replace(plan)
                return
            delta = sets_delta(self.plan, plan)
            if delta.delete and not await self._try(narrowing(self.table, delta)):
                await self._replace(plan)
                return
            self._half = (plan, delta)

    async def widen(self, plan: Plan) -> None:
        """Allow all that `plan` allows. Raises RetinueError; then the table is not wider than it was."""
        async with self._lock:
            if self.plan is plan:
                return
            if self._half is None or self._half[0] is not plan:
                await self._replace(plan)
                return
            delta = self._half[1]
            text = statements(self.table, "add", delta.add) + idle_rules.renewal(self.table, delta.grace)
            if text and not await self._try(text):
                await self._replace(plan)
                return
            self.plan, self._half = plan, None

    async def apply(self, plan: Plan) -> None:
        """`narrow`, then `widen`."""
        await self.narrow(plan)
        await self.widen(plan)

    @staticmethod
    def _shape(plan: Plan | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What of the plan decides on the chains of the table: levels of control groups, idle timeouts."""
        return ((), ()) if plan is None else (unit_rules.levels(plan.units), idle_rules.seconds(plan))

    def _whole(self, plan: Plan | None) -> str:
        """A group that has gone since the plan was made may not keep the table from being put back."""
        sets = {} if plan is None else all_sets(plan)
        for name in [n for n in sets if n.startswith(unit_rules.GROUP)]:
            sets[name] = {e for e in sets[name] if units.exists(unit_rules.place_of(e))}
        levels, idle = self._shape(plan)
        return replacement(self.interface, sets, close_v6=self.close_v6, levels=levels, idle=idle)

    async def _replace(self, plan: Plan) -> None:
        await self._commit(self._whole(plan))
        self.plan, self._half = plan, None

    async def _try(self, text: str) -> bool:
        """Commit; False when the kernel refused because the table is not what we left there."""
        try:
            await self._commit(text)
        except nft.Rejected:
            return False
        return True

    async def _commit(self, text: str) -> None:
        before = nft.generation()
        self._print = None
        await nft.run(text)
        now = nft.generation()
        self._generation = now if now == before + 1 else None

    async def verify(self) -> bool:
        """Compare the table with the plan and put it back when it differs. True when it had to be."""
        async with self._lock:
            if self.plan is None or self._half is not None:
                return False
            now = nft.generation()
            undisturbed = now == self._generation
            if undisturbed and (self._print is not None or self.plan.element_count > _COMPARE_LIMIT):
                return False
            objects = await nft.list_table(self.table)
            found = None if objects is None else fingerprint(objects)
            if undisturbed and nft.generation() == now:
                self._print = found  # nobody but us has committed: this is how our own transaction looks
                return False
            if found is not None and found == self._print:
                self._generation = now
                return False
            await self._commit(self._whole(self.plan))
            return True

    async def remove(self) -> None:
        """Delete the table."""
        async with self._lock:
            await nft.run(f"add table inet {self.table}\ndelete table inet {self.table}\n")
            self.plan = self._half = self._print = self._generation = None

    async def counters(self) -> tuple[dict[str, int], list[DeniedFlow]]:
        """Packets by verdict, and the flows refused lately. Empty when the table is gone."""
        return await self.verdicts(), await self.noted("denied")

    async def holds(self, src: str, dst: str, proto: int, port: int | None) -> str | None:
        """The set in the kernel that lets a flow of this tuple begin, as the chains look them up; None when none does."""
        family, ends = (6 if ":" in src else 4), f"{src} . {dst}"
        for prefix in ("", "a"):
            wanted = [(f"{prefix}pair{family}", f"{ends} . {proto} . {port}")] if port is not None else []
            wanted.append((f"{prefix}proto{family}", f"{ends} . {proto}"))
            wanted += [(f"{prefix}range{family}", f"{ends} . {proto} . {port}")] if port is not None else []
            for name, element in wanted:
                if await nft.has(self.table, name, element):
                    return name
            rest = f"{prefix}rest{family}"
            if await nft.has(self.table, rest, ends) and not await nft.has(self.table, f"{prefix}except{family}", f"{ends} . {proto}"):
                return rest
            if not prefix and port is not None and await nft.has(self.table, f"bound{family}", f"{ends} . {proto} . {port}-{port}"):
                return f"uid{family}"
        return None

    async def verdicts(self) -> dict[str, int]:
        """Packets by verdict since the table was made."""
        listed = await nft.list_objects("counters", "table", "inet", self.table)
        return {e["counter"]["name"]: int(e["counter"]["packets"]) for e in listed if "counter" in e}

    async def noted(self, kind: str) -> list[DeniedFlow]:
        """Flows ``denied``, ``audited`` or ``idled`` (ended as idle) lately."""
        flows: list[DeniedFlow] = []
        for family in (4, 6):
            for entry in await nft.list_objects("set", "inet", self.table, f"{kind}{family}"):
                flows += [flow for e in entry.get("set", {}).get("elem", ()) if (flow := _flow(e)) is not None]
        return sorted(flows, key=lambda f: (f.src, f.dst, f.proto, f.port))


def _flow(element: Any) -> DeniedFlow | None:
    body = element.get("elem") if isinstance(element, dict) else None
    concat = body.get("val", {}).get("concat") if isinstance(body, dict) else None
    if not isinstance(concat, list) or len(concat) != 4:
        return None
    packets = body.get("counter", {}).get("packets", 0) if isinstance(body, dict) else 0
    return DeniedFlow(str(concat[0]), str(concat[1]), proto_name(proto_number(concat[2])), int(concat[3]), int(packets))
