"""Address ranges on one line: IPv4 first, IPv6 above it. What `Nets` selectors and outside subjects are made of."""

from __future__ import annotations

import bisect
import functools
import ipaddress
from collections.abc import Iterable
from typing import Final

from identity.errors import BadInput
from policy.program import AllOf, AnyOf, Nets, Not, Program, Selector

V6: Final = 1 << 40  # offset of IPv6, above every IPv4 address
V4_ALL: Final = (0, (1 << 32) - 1)
V6_ALL: Final = (V6, V6 + (1 << 128) - 1)

Range = tuple[int, int]  # first, last, both inclusive, of one family


def address(text: str) -> int:
    """Position of one address. Raises BadInput."""
    try:
        one = ipaddress.ip_address(text.strip())
    except ValueError:
        raise _bad(text) from None
    return int(one) if one.version == 4 else V6 + int(one)


def parse_range(text: str) -> tuple[Range, ...]:
    """``*``, an address, a CIDR (host bits ignored) or ``a-b``. Raises BadInput."""
    word = text.strip()
    if word == "*":
        return (V4_ALL, V6_ALL)
    if "-" in word:
        first, _, last = word.partition("-")
        low, high = address(first), address(last)
        if low > high or (low < V6) != (high < V6):
            raise _bad(text)
        return ((low, high),)
    try:
        net = ipaddress.ip_network(word, strict=False)
    except ValueError:
        raise _bad(text) from None
    base = 0 if net.version == 4 else V6
    return ((base + int(net.network_address), base + int(net.broadcast_address)),)


def _bad(text: str) -> BadInput:
    return BadInput("net.form", f"not a network or address range: {ascii(text)[:60]}",
                    hint="write 10.0.0.0/8, 10.0.0.7, 10.0.0.1-10.0.0.9 or an IPv6 equivalent")  # fmt: skip


def merge(spans: Iterable[Range]) -> tuple[Range, ...]:
    """Sorted, disjoint, neighbours joined (never across the two families)."""
    out: list[Range] = []
    for low, high in sorted(spans):
        if out and low <= out[-1][1] + 1 and (low < V6) == (out[-1][0] < V6):
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return tuple(out)


def subtract(spans: Iterable[Range], minus: Iterable[Range]) -> tuple[Range, ...]:
    """`spans` without `minus`."""
    left = list(merge(spans))
    for low, high in minus:
        left = [
            part
            for a, b in left
            for part in ((a, min(b, low - 1)), (max(a, high + 1), b))
            if part[0] <= part[1]
        ]
    return merge(left)


@functools.lru_cache(maxsize=4096)
def ranges_of(cidrs: tuple[str, ...], excluding: tuple[str, ...] = ()) -> tuple[Range, ...]:
    """The ranges that a selector or a subject names. Raises BadInput."""
    return subtract(
        (r for c in cidrs for r in parse_range(c)), (r for c in excluding for r in parse_range(c))
    )


def covers(outer: tuple[Range, ...], inner: tuple[Range, ...]) -> bool:
    """Is every address of `inner` in `outer`? Both merged."""
    for low, high in inner:
        at = bisect.bisect_right(outer, (low, V6_ALL[1])) - 1
        if at < 0 or high > outer[at][1]:
            return False
    return True


def show(span: Range) -> str:
    """A range as text that `parse_range` reads: a CIDR where it is one, else ``a-b``."""
    low, high = span
    family, base = (ipaddress.IPv4Address, 0) if low < V6 else (ipaddress.IPv6Address, V6)
    first, last = family(low - base), family(high - base)
    if first == last:
        return str(first)
    nets = list(ipaddress.summarize_address_range(first, last))
    return str(nets[0]) if len(nets) == 1 else f"{first}-{last}"


def nets_in(selector: Selector) -> Iterable[Nets]:
    """Every `Nets` term of a selector."""
    if isinstance(selector, Nets):
        yield selector
    elif isinstance(selector, Not):
        yield from nets_in(selector.term)
    elif isinstance(selector, AllOf | AnyOf):
        for term in selector.terms:
            yield from nets_in(term)


def cut_points(program: Program) -> tuple[int, ...]:
    """Where a program's verdict may change along the address line: the first address of each cell, ascending."""
    cuts: set[int] = set()
    for tier in program.tiers:
        selectors = list(tier.isolates.values())
        for rule in tier.rules:
            selectors += (
                (rule.src, rule.dst) if rule.concerns is None else (rule.src, rule.dst, rule.concerns)
            )
        for selector in selectors:
            for nets in nets_in(selector):
                for low, high in ranges_of(nets.cidrs, nets.excluding):
                    cuts.update((low, high + 1))
    return tuple(sorted(cuts))


def cells(spans: Iterable[Range], cuts: Iterable[int]) -> tuple[Range, ...]:
    """`spans` split at `cuts`, so that every part lies in one cell of the program."""
    left = list(merge(spans))
    out: list[Range] = []
    points = sorted(cuts)
    for low, high in left:
        start = low
        for cut in points:
            if start < cut <= high:
                out.append((start, cut - 1))
                start = cut
        out.append((start, high))
    return tuple(out)
