"""Protocols and ports as Tailscale policies write them."""

from __future__ import annotations

import re
from typing import Final

from policy.importers.model import SourceRefused
from policy.ports import ALL_PORTS, ICMP, ICMPV6, MAX_PORT, PORTED, TCP, UDP, PortMap, mask

# Without a protocol a rule means these (SCTP must be asked for).
USUAL: Final = (TCP, UDP, ICMP)
PROTOCOLS: Final = {
    "icmp": ICMP, "igmp": 2, "ipv4": 4, "ip-in-ip": 4, "tcp": TCP, "egp": 8, "igp": 9, "udp": UDP, "gre": 47,
    "esp": 50, "ah": 51, "ipv6-icmp": ICMP, "sctp": 132,
}  # fmt: skip
_INTEGER: Final = re.compile(r"[0-9]{1,10}")


def protocol(text: str, where: str) -> int:
    """Number of a protocol name or number. Raises SourceRefused."""
    name = text.lower()
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if _INTEGER.fullmatch(name) and int(name) <= 255:
        return ICMP if int(name) == ICMPV6 else int(name)
    raise SourceRefused(
        "protocol", f'unknown protocol "{text}"', where=where, hint="a name such as tcp, or 0 to 255"
    )


def port_bits(text: str, where: str) -> int:
    """Bits of ``*``, ``22``, ``80-443`` or a list of them with commas. Raises SourceRefused."""
    bits = 0
    for part in text.split(","):
        word = part.strip()
        if word == "*":
            bits |= ALL_PORTS
            continue
        first, dash, last = word.partition("-")
        numbers = []
        for name, digits in (("first", first.strip()), ("last", last.strip() if dash else first.strip())):
            if not _INTEGER.fullmatch(digits):
                raise SourceRefused("port", f'port range "{text}": invalid {name} integer', where=where)
            numbers.append(int(digits))
        if numbers[0] == 0:
            raise SourceRefused(
                "port", f"port range \"{text}\": first port must be >0, or use '*' for wildcard", where=where
            )
        if max(numbers) > MAX_PORT or numbers[0] > numbers[1]:
            what = (
                f"ports end at {MAX_PORT}" if max(numbers) > MAX_PORT else "the last port is below the first"
            )
            raise SourceRefused("port", f'port range "{text}": {what}', where=where)
        bits |= mask(numbers[0], numbers[1])
    return bits


def port_map(protocols: tuple[int, ...], bits: int, text: str, where: str) -> PortMap:
    """The ports for the protocols that have some, the others whole. Raises SourceRefused where ports make no sense."""
    if bits != ALL_PORTS and not any(p in PORTED for p in protocols):
        raise SourceRefused("port", f'"{text}": only tcp, udp and sctp have ports; use *', where=where)
    return PortMap({p: bits if p in PORTED else 1 for p in protocols})


def capability(text: str, where: str) -> PortMap:
    """An entry of a grant's `ip`: ``*``, ``443``, ``80-90``, ``tcp:443``, ``icmp:*``, ``6:22``. Raises SourceRefused."""
    head, colon, tail = text.rpartition(":")
    protocols = (protocol(head, where),) if colon else USUAL
    return port_map(protocols, port_bits(tail, where), text, where)


def split_destination(text: str, where: str) -> tuple[str, str]:
    """``host:ports`` of an access rule or test; IPv6 may stand in brackets. Raises SourceRefused."""
    host, colon, ports = text.rpartition(":")
    if not colon or not host:
        raise SourceRefused(
            "port",
            f'dst="{text}": missing ports',
            where=where,
            hint="write it as host:ports, for example tag:web:443",
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return host, ports
