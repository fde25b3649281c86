"""The part of the firewall that ends flows which have fallen silent (texts, pure).

A TCP or UDP flow of a pair with an idle timeout passes while its tuple stands in a set whose elements the kernel drops
after so much silence; every packet of either direction renews its element. So the kernel keeps the time, with or without
an agent, and exactly. It does not depend on connection tracking, which forgets a flow and takes it up again in the middle:

    begins      by a SYN, or by any UDP packet of the side that the rule lets begin
    goes on     while its tuple is in `live`; after a FIN or RST in `closing`, for at most CLOSING seconds
    taken over  in the middle, while its pair is in `grace`: when the pair, its place here or the whole table is new, as after
                a move or a restart of the agent. A flow is then ended after at most twice its time, and none too early.
    is over     otherwise: TCP is reset, the rest dropped; both are counted and noted (set `idled`), and a new flow may begin at once

An element that finds its set full is refused (counter `crowded`): nothing passes that is not watched.

Sets:  idle4, idle6      flow (ports of the destination as an interval) : the chain of its seconds
       live, closing     source . destination . protocol . source port . destination port of the original direction
       grace             source . destination
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from mesh.plan import PairPlan, Plan

MAP: Final = "idle"
NOTED: Final = "idled"  # the kind of note; also its counter and set
CROWDED: Final = "crowded"
SIZE: Final = 1 << 20  # flows at once, of each family
CLOSING: Final = 120  # seconds, as connection tracking keeps a flow that is being closed
VOLATILE: Final = ("live", "closing", "grace")  # what the kernel changes by itself


def seconds(plan: Plan) -> tuple[int, ...]:
    """The idle timeouts in use; each has chains of its own."""
    return tuple(sorted({b.idle_timeout for pair in plan.pairs.values() for b in pair.bounds if b.idle_timeout is not None}))


def element(flow: str, family: int, timeout: int) -> str:
    """An element of the map of a family, from ``source . destination . protocol . port-port``."""
    return f"{flow} : jump idle{timeout}_{family}"


def _longest(pair: PairPlan) -> int:
    return max((b.idle_timeout for b in pair.bounds if b.idle_timeout is not None), default=0)


def grace(pairs: Iterable[PairPlan]) -> dict[str, set[str]]:
    """Elements that let flows of these pairs be taken over in the middle for as long as they may be silent."""
    out: dict[str, set[str]] = {}
    for pair in pairs:
        if longest := _longest(pair):
            for family, src, dst in zip((4, 6), pair.src_addresses, pair.dst_addresses, strict=True):
                out.setdefault(f"grace{family}", set()).add(f"{src} . {dst} timeout {longest}s")
    return out


def renewed(old: Plan, new: Plan) -> list[PairPlan]:
    """Pairs of `new` whose flows may be in the middle without having been seen here: by another bound than before, or
    with an end whose place here was not active.
    """
    before = {at.key for at in old.active}
    fresh = {at.key for at in new.active} - before
    return [
        pair for key, pair in new.pairs.items()
        if _longest(pair) and (fresh.intersection(key) or key not in old.pairs or _idle(old.pairs[key]) != _idle(pair))
    ]  # fmt: skip


def _idle(pair: PairPlan) -> tuple[object, ...]:
    return tuple((b.ports, b.idle_timeout) for b in pair.bounds if b.idle_timeout is not None)


def renewal(table: str, elements: Mapping[str, set[str]]) -> str:
    """Statements that begin the time of elements of `grace` anew, whether they are there or not."""
    lines = []
    for name, timed in sorted(elements.items()):
        for text in sorted(timed):
            plain = text.partition(" timeout ")[0]
            lines += [
                f"add element inet {table} {name} {{ {text} }}",
                f"delete element inet {table} {name} {{ {plain} }}",
                f"add element inet {table} {name} {{ {text} }}",
            ]
    return "".join(line + "\n" for line in lines)


def sets() -> list[str]:
    """Their declarations."""
    out = []
    for family in (4, 6):
        ends = f"ipv{family}_addr . ipv{family}_addr"
        tracked = f"type {ends} . inet_proto . inet_service . inet_service; size {SIZE}; flags dynamic,timeout;"
        out += [
            f"map {MAP}{family} {{ type {ends} . inet_proto . inet_service : verdict; flags interval; }}",
            f"set live{family} {{ {tracked} }}",
            f"set closing{family} {{ {tracked} }}",
            f"set grace{family} {{ type {ends}; flags timeout; }}",
        ]
    return out


def lookups(family: int) -> str:
    """Rules that send the packets of watched flows to their chain; it returns for those that may go on."""
    ip = "ip" if family == 4 else "ip6"
    return f"""
    ct direction original {ip} saddr . {ip} daddr . meta l4proto . th dport vmap @{MAP}{family}
    ct direction reply {ip} daddr . {ip} saddr . meta l4proto . th sport vmap @{MAP}{family}"""


def chains(timeouts: Iterable[int]) -> str:
    """The chains of each timeout in both families, and the end of a flow."""
    out = f"""
chain idle_over {{
    counter name {NOTED}
    jump lapse
    meta l4proto 6 reject with tcp reset
    drop
}}
chain idle_crowd {{
    counter name {CROWDED} drop
}}"""
    for timeout in timeouts:
        for family in (4, 6):
            out += _chains(timeout, family)
    return out


def _chains(timeout: int, family: int) -> str:
    ip, name = ("ip" if family == 4 else "ip6"), f"idle{timeout}"
    out = ""
    for way, src, dst, ports in (("", "saddr", "daddr", "th sport . th dport"), ("b", "daddr", "saddr", "th dport . th sport")):
        ends = f"{ip} {src} . {ip} {dst}"
        key = f"{ends} . meta l4proto . {ports}"
        go = f"{name}{way}"
        begins = "" if way else f"""
    tcp flags & (fin|syn|rst|ack) == syn goto {go}_go_{family}
    meta l4proto 17 goto {go}_go_{family}"""
        first = "" if way else f"""
    ct direction reply goto {name}b_{family}"""
        out += f"""
chain {go}_go_{family} {{
    update @live{family} {{ {key} timeout {timeout}s }} return
    goto idle_crowd
}}
chain {go}_end_{family} {{
    delete @live{family} {{ {key} }}
    update @closing{family} {{ {key} timeout {min(timeout, CLOSING)}s }} return
    goto idle_crowd
}}
chain {go}_known_{family} {{
    tcp flags & (fin|rst) != 0 goto {go}_end_{family}
    goto {go}_go_{family}
}}
chain {go}_{family} {{{first}{begins}
    {key} @live{family} goto {go}_known_{family}
    {key} @closing{family} goto {go}_end_{family}
    {ends} @grace{family} goto {go}_known_{family}
    goto idle_over
}}"""
    return out
