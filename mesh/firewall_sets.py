"""The elements of the firewall's sets: those of a plan, and the difference of two plans (pure).

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

What only an audit lets through stands in sets of its own (apair, arange, aproto, arest, aexcept), looked up last. Ports
that only some processes may use stand in those of mesh/process_rules.py instead of the others. Ceilings are limit objects
named by rate (packets of the first direction) and back (answers). With units there are sets of their addresses and
control groups (mesh/unit_rules.py), with idle timeouts those of mesh/idle_rules.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh import idle_rules, process_rules, unit_rules
from mesh.plan import AttachmentPlan, Elements, PairPlan, Plan, diff, elements_of
from policy.evaluate import Bound
from policy.ports import ICMP, ICMPV6, NOTHING, PortMap, union

Sets = dict[str, set[str]]

LIMITS: Final = "limits"  # in Sets: the limit objects, as "name rate"
_BURST: Final = 131_072  # bytes; a superpacket has to fit
_CHUNK: Final = 4000  # elements in one statement


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
        groups = {group.path: group for group in pair.groups}
        for name, lines in process_rules.elements(bound.processes, groups, flows, family).items():
            out.setdefault(name, set()).update(lines)
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


# ---- statements


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
