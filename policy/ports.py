"""Port maps: which protocols and ports a pair may use, as an immutable value with set algebra.

TCP, UDP and SCTP have one bit per port (bit n = port n, 1..65535); any other protocol has the single bit 1.
ICMP and ICMPv6 are one protocol here (number 1): people mean both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from identity.errors import BadInput

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
SCTP: Final = 132
PORTED: Final = frozenset({TCP, UDP, SCTP})
NAMES: Final[Mapping[str, int]] = {
    "icmp": ICMP, "icmpv6": ICMP, "icmp6": ICMP, "tcp": TCP, "udp": UDP, "sctp": SCTP
}  # fmt: skip
ALL_PORTS: Final = (1 << 65536) - 2
MAX_PORT: Final = 65535


def proto_number(text: str | int) -> int:
    """Protocol number of a name or number; 58 becomes 1. Raises BadInput."""
    name = str(text).lower()
    if name in NAMES:
        return NAMES[name]
    if name.isascii() and name.isdigit() and int(name) <= 255:
        return ICMP if int(name) == ICMPV6 else int(name)
    raise BadInput("port.protocol", f"not a protocol: {ascii(text)[:40]}", hint="use tcp, udp, sctp, icmp or a number 0-255")


def proto_name(number: int) -> str:
    """``tcp``, ``udp``, ``sctp``, ``icmp`` or the number in decimal."""
    return next((n for n, p in NAMES.items() if p == number), str(number))


def mask(first: int, last: int) -> int:
    """Bits of the ports first..last. Raises BadInput for 0, above 65535 or reversed."""
    if not 1 <= first <= MAX_PORT or not 1 <= last <= MAX_PORT:
        raise BadInput("port.range", f"port out of range: {first if not 1 <= first <= MAX_PORT else last}",
                       hint="ports are 1 to 65535")  # fmt: skip
    if first > last:
        raise BadInput("port.reversed", f"the range {first}-{last} is reversed", hint=f"write {last}-{first}")
    return (1 << (last + 1)) - (1 << first)


def ranges(bits: int) -> Iterator[tuple[int, int]]:
    """The maximal runs (first, last) of set bits, ascending."""
    low = 0
    while bits >> low:
        rest = bits >> low
        low += (rest & -rest).bit_length() - 1
        run = ~(bits >> low)
        length = (run & -run).bit_length() - 1
        yield low, low + length - 1
        low += length


@dataclass(frozen=True, slots=True)
class PortMap:
    """`ports` maps a protocol number to its bits; a protocol that is not there is allowed whole iff `rest`."""

    ports: Mapping[int, int] = field(default_factory=dict)
    rest: bool = False

    def __post_init__(self) -> None:
        kept = {p: b for p, b in self.ports.items() if b != (_whole(p) if self.rest else 0)}
        object.__setattr__(self, "ports", dict(sorted(kept.items())))

    def __bool__(self) -> bool:
        return self.rest or any(self.ports.values())

    def __hash__(self) -> int:
        return hash((tuple(self.ports.items()), self.rest))

    def bits(self, proto: int) -> int:
        """Bits of one protocol."""
        return self.ports.get(proto, _whole(proto) if self.rest else 0)

    def allows(self, proto: int, port: int | None) -> bool:
        """Is this one protocol and port in the map? A ported protocol without a port asks for any of its ports."""
        bits = self.bits(proto)
        if proto not in PORTED or port is None:
            return bool(bits)
        return bool(bits >> port & 1)

    def _combine(self, other: PortMap, op: str) -> PortMap:
        def one(a: int, b: int) -> int:
            return a | b if op == "or" else a & b if op == "and" else a & ~b

        protos = set(self.ports) | set(other.ports)
        return PortMap({p: one(self.bits(p), other.bits(p)) for p in protos}, bool(one(self.rest, other.rest)))

    def __or__(self, other: PortMap) -> PortMap:
        return self._combine(other, "or")

    def __and__(self, other: PortMap) -> PortMap:
        return self._combine(other, "and")

    def __sub__(self, other: PortMap) -> PortMap:
        return self._combine(other, "sub")

    def __str__(self) -> str:
        """``tcp/80,443 udp/53 icmp``; ``any``; ``any but tcp/22``; ``nothing``."""
        if self.rest:
            missing = PortMap({p: _whole(p) & ~b for p, b in self.ports.items()})
            return "any" if not missing else f"any but {missing}"
        return " ".join(self.words()) or "nothing"

    def __repr__(self) -> str:
        return f"PortMap({str(self)!r})"  # the bits in decimal would be longer than Python prints

    def words(self) -> list[str]:
        """One word a protocol: ``tcp/80,8000-8100``."""
        out = []
        for proto, bits in self.ports.items():
            if not bits:
                continue
            whole = proto not in PORTED or bits == ALL_PORTS
            out.append(proto_name(proto) if whole else f"{proto_name(proto)}/{show_ports(bits)}")
        return out


NOTHING: Final = PortMap()
ANYTHING: Final = PortMap({}, rest=True)
FLOWING: Final = PortMap({TCP: ALL_PORTS, UDP: ALL_PORTS})  # what has flows that can fall silent


def _whole(proto: int) -> int:
    return ALL_PORTS if proto in PORTED else 1


def whole(proto: int) -> PortMap:
    """All of one protocol."""
    return PortMap({proto: _whole(proto)})


def single(proto: int, port: int | None) -> PortMap:
    """One port (None: the whole protocol)."""
    return whole(proto) if port is None or proto not in PORTED else PortMap({proto: mask(port, port)})


@lru_cache(maxsize=4096)
def show_ports(bits: int) -> str:
    """``*`` or ``80,443,8000-8100``."""
    if bits == ALL_PORTS:
        return "*"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges(bits))


def union(maps: Iterable[PortMap]) -> PortMap:
    """Union of any number of maps."""
    out = NOTHING
    for one in maps:
        out = out | one
    return out


_WORD = re.compile(r"([A-Za-z0-9]+)(?:/([0-9,\s*-]+))?")


def parse_ports(text: str) -> PortMap:
    """``tcp/5432``, ``tcp/80,443``, ``tcp/9000-9010``, ``udp``, ``icmp``, ``any``. Raises BadInput."""
    word = text.strip() if isinstance(text, str) else ""
    if word.lower() in {"any", "*"}:
        return ANYTHING
    match = _WORD.fullmatch(word)
    if match is None:
        raise BadInput("port.form", f"not a protocol and ports: {ascii(text)[:60]}", hint="write tcp/443, tcp/80,443, udp/5000-5010, icmp or any")
    proto = proto_number(match[1])
    if match[2] is None or match[2].strip() == "*":
        return whole(proto)
    if proto not in PORTED:
        raise BadInput("port.form", f"{match[1]} has no ports")
    bits = 0
    for part in match[2].split(","):
        first, dash, last = part.strip().partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise BadInput("port.form", f"not a port or range: {ascii(part)[:40]}", hint="write 80 or 8000-8100")
        bits |= mask(int(first), int(last) if dash else int(first))
    return PortMap({proto: bits})


def parse_flow(text: str) -> tuple[int, int | None]:
    """``tcp/443``, ``443`` (tcp), ``udp``, ``icmp`` -> (protocol, port). Raises BadInput."""
    proto, slash, port = text.partition("/") if not text.isdigit() else ("tcp", "/", text)
    number = proto_number(proto)
    if slash and not (port.isascii() and port.isdigit()):
        raise BadInput("port.form", f"not a port: {ascii(port)[:40]}", hint="write tcp/443, 443 or icmp")
    if slash:
        mask(int(port), int(port))
    return number, int(port) if slash else None
