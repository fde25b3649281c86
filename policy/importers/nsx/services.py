"""NSX services as port maps, exact or not: what a port map cannot say is reported and never widens access."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from policy.importers.model import SourceRefused
from policy.importers.nsx.machines import rows, words
from policy.ports import (
    ALL_PORTS,
    ANYTHING,
    ICMP,
    MAX_PORT,
    NOTHING,
    TCP,
    UDP,
    PortMap,
    mask,
    proto_number,
    union,
    whole,
)

_PORTS: Final = re.compile(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?")
# Application-level gateways by the transport they begin on.
_ALG_UDP: Final = frozenset({"SUN_RPC_UDP", "MS_RPC_UDP", "NBNS_BROADCAST", "NBDG_BROADCAST", "TFTP"})
IGMP: Final = 2
MAX_NESTING: Final = 16


@dataclass(frozen=True, slots=True)
class Traffic:
    """`exact` is what is surely meant; `around` what may be meant; `why` says what is missing where they differ."""

    exact: PortMap
    around: PortMap
    why: tuple[str, ...] = ()


def just(ports: PortMap) -> Traffic:
    return Traffic(ports, ports)


def together(parts: list[Traffic]) -> Traffic:
    return Traffic(
        union(p.exact for p in parts), union(p.around for p in parts), tuple(w for p in parts for w in p.why)
    )


class Services:
    """The export's services by path."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.raw = {str(s.get("path") or s.get("display_name")): s for s in rows(config, "services")}

    def of_rule(self, rule: Mapping[str, Any], where: str) -> Traffic:
        """`services` and `service_entries` of a rule together; neither, or ANY, is everything. Raises SourceRefused."""
        names, entries = words(rule, "services"), rows(rule, "service_entries")
        if "ANY" in names or (not names and not entries):
            return just(ANYTHING)
        return together([*(self.service(n, where) for n in names), *(self.entry(e, where) for e in entries)])

    def service(self, path: str, where: str, depth: int = 0) -> Traffic:
        if path not in self.raw or depth > MAX_NESTING:
            raise SourceRefused(
                "service",
                f'no service "{path}"' if path not in self.raw else f'the service "{path}" contains itself',
                where=where,
            )
        return together(
            [self.entry(e, f'service "{path}"', depth) for e in rows(self.raw[path], "service_entries")]
        )

    def entry(self, entry: Mapping[str, Any], where: str, depth: int = 0) -> Traffic:
        match entry.get("resource_type"):
            case "L4PortSetServiceEntry":
                proto = proto_number(_protocol(entry, "l4_protocol", where))
                return self.ports(entry, proto, where)
            case "ICMPTypeServiceEntry":
                if entry.get("protocol") == "ICMPv6":
                    return Traffic(NOTHING, whole(ICMP), (f"{where}: ICMPv6 without ICMP",))
                if entry.get("icmp_type") is not None or entry.get("icmp_code") is not None:
                    return Traffic(NOTHING, whole(ICMP), (f"{where}: single ICMP types or codes",))
                return just(whole(ICMP))
            case "IGMPTypeServiceEntry":
                return just(whole(IGMP))
            case "IPProtocolServiceEntry":
                return just(whole(proto_number(str(entry.get("protocol_number")))))
            case "ALGTypeServiceEntry":
                traffic = self.ports(entry, UDP if entry.get("alg") in _ALG_UDP else TCP, where)
                return Traffic(
                    traffic.exact,
                    traffic.around,
                    (*traffic.why, f"{where}: data connections of {entry.get('alg')} are not followed"),
                )
            case "NestedServiceServiceEntry":
                return self.service(str(entry.get("nested_service_path")), where, depth + 1)
        return Traffic(NOTHING, NOTHING, (f"{where}: {entry.get('resource_type')} is not about IP traffic",))

    def ports(self, entry: Mapping[str, Any], proto: int, where: str) -> Traffic:
        ports = PortMap({proto: _bits(entry, "destination_ports", where)})
        if entry.get("source_ports"):
            return Traffic(NOTHING, ports, (f"{where}: source ports",))
        return just(ports)


def _protocol(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = str(entry.get(key) or "").lower()
    if value not in {"tcp", "udp", "sctp"}:
        raise SourceRefused("protocol", f'"{entry.get(key)}" is no protocol with ports', where=where)
    return value


def _bits(entry: Mapping[str, Any], key: str, where: str) -> int:
    ranges = entry.get(key) or []
    if not isinstance(ranges, list):
        raise SourceRefused("port", f"{key} must be a list", where=where)
    bits = 0
    for one in ranges:
        match = _PORTS.fullmatch(str(one).strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if match is None or first > last or last > MAX_PORT:
            raise SourceRefused("port", f'"{one}" is no port or range', where=where)
        if last:  # port 0 is nobody's
            bits |= mask(max(first, 1), last)
    return bits if ranges else ALL_PORTS
