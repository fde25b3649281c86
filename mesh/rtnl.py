"""Routing netlink, a thin typed layer over pyroute2: rules, routes, addresses, neighbours and links of one namespace.

Everything here blocks, and works on the network namespace of the thread that made the socket.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

from identity.errors import Bug, Conflict, NoPrivilege, NotFound, RetinueError
from mesh.firewall_names import slot
from mesh.layout import (
    FAST_RULE,
    GATE_RULE,
    LOCAL_RULE,
    TABLE_LOCAL,
    TUNNEL_RULE,
    UNIT_RULE,
    Route,
    Rule,
    family_of,
    tables,
)

PROTOCOL: Final = 82  # our number in the protocol field of routes and rules (rtnetlink(7): above 4 is free)
_PERMANENT: Final = 0x80  # NUD_PERMANENT
_NODAD: Final = 0x02  # IFA_F_NODAD: the placement, not a probe, says whose an address is
SCOPE_LINK: Final = 253
SCOPE_HOST: Final = 254
_LOCAL: Final = 2  # RTN_LOCAL
_BLACKHOLE: Final = 6  # FR_ACT_BLACKHOLE


def _bytes_family(family: int) -> int:
    return socket.AF_INET6 if family == 6 else socket.AF_INET


def _refused(what: str, e: Exception) -> RetinueError:
    number = getattr(e, "code", None) or getattr(e, "errno", None) or 0
    if number in {errno.EPERM, errno.EACCES}:
        return NoPrivilege("host.privilege", f"may not {what}", hint="run as root (CAP_NET_ADMIN)")
    if number == errno.EADDRINUSE:  # a WireGuard device of the kernel binds its port when it is set up
        return Conflict("device.port_taken", f"cannot {what}: the UDP port is in use", hint="choose another with --port")
    return Bug("host.netlink", f"cannot {what}: {os.strerror(number) if number else e}")


class Netlink:
    """A netlink socket of the calling thread's namespace and the few operations needed on it."""

    def __init__(self) -> None:
        from pyroute2 import IPRoute

        self.ip = IPRoute()

    def close(self) -> None:
        self.ip.close()

    def do(self, what: str, call: Callable[..., Any], *args: Any, ok: Iterable[int] = (), **request: Any) -> Any:
        """One request; the error numbers in `ok` mean that it is already so. Raises NoPrivilege, Bug."""
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            return call(*args, **request)
        except NetlinkError as e:
            if e.code in set(ok):
                return None
            raise _refused(what, e) from None
        except OSError as e:
            raise _refused(what, e) from None

    def index(self, name: str) -> int | None:
        """Of a link in the calling thread's namespace; None when there is no such link."""
        try:
            return socket.if_nametoindex(name)
        except OSError:
            return None

    # rules

    def read_rules(self, interface: str) -> set[Rule]:
        """Rules of ours for this interface (its slot), and the shared ones."""
        s = slot(interface)
        ours = {FAST_RULE + s, GATE_RULE + s, UNIT_RULE + s, LOCAL_RULE, TUNNEL_RULE, 110 + s, 114 + s, 120 + s, 124 + s, 128 + s}
        out: set[Rule] = set()
        for family in (4, 6):
            for message in self.ip.get_rules(family=_bytes_family(family)):
                priority = message.get_attr("FRA_PRIORITY") or 0
                if priority not in ours or message.get_attr("FRA_PROTOCOL") != PROTOCOL:
                    continue
                mask = message.get_attr("FRA_FWMASK")
                dst = message.get_attr("FRA_DST")
                users = message.get_attr("FRA_UID_RANGE")
                out.add(Rule(
                    family, priority,
                    0 if message["action"] == _BLACKHOLE else message.get_attr("FRA_TABLE") or message["table"],
                    message.get_attr("FRA_IIFNAME"),
                    (message.get_attr("FRA_FWMARK") or 0, mask) if mask else None,
                    f"{dst}/{message['dst_len']}" if dst else None,
                    no_default=message.get_attr("FRA_SUPPRESS_PREFIXLEN") == 0,
                    uid=int(users.partition(":")[0]) if users else None,
                ))  # fmt: skip
        return out

    def rule(self, verb: str, rule: Rule) -> None:
        request: dict[str, Any] = {
            "family": _bytes_family(rule.family), "priority": rule.priority, "FRA_PROTOCOL": PROTOCOL
        }  # fmt: skip
        if rule.table:
            request["table"] = rule.table
        else:
            request["action"] = "blackhole"
        if rule.iif is not None:
            request["iifname"] = rule.iif
        if rule.mark is not None:
            request["fwmark"], request["fwmask"] = rule.mark
        if rule.dst is not None:
            address, _, length = rule.dst.partition("/")
            request["dst"], request["dst_len"] = address, int(length)
        if rule.uid is not None:
            request["uid_range"] = f"{rule.uid}:{rule.uid}"
        if rule.no_default:
            request["FRA_SUPPRESS_PREFIXLEN"] = 0
        ok = (errno.EEXIST,) if verb == "add" else (errno.ENOENT,)
        self.do(f"{verb} a routing rule", self.ip.rule, verb, ok=ok, **request)

    def move_local(self, *, behind: bool) -> None:
        """Take the kernel's rule for the local table from priority 0 (ours at 100 stands already), or put it back."""
        verb, ok = ("del", errno.ENOENT) if behind else ("add", errno.EEXIST)
        for family in (socket.AF_INET, socket.AF_INET6):
            self.do("move the local table", self.ip.rule, verb, ok=(ok,), family=family, priority=0, table=TABLE_LOCAL)

    def local_first(self) -> bool:
        """Does the kernel's rule for the local table stand at priority 0, before ours?"""
        return any(
            not message.get_attr("FRA_PRIORITY") and message["table"] == TABLE_LOCAL
            for family in (socket.AF_INET, socket.AF_INET6)
            for message in self.ip.get_rules(family=family)
        )

    # routes

    def read_routes(self, interface: str) -> set[Route]:
        names = {int(m["index"]): str(m.get_attr("IFLA_IFNAME")) for m in self.ip.get_links()}
        out: set[Route] = set()
        units = {r.table for r in self.read_rules(interface) if r.uid is not None}
        for table in (*tables(interface), *sorted(units)):
            for family in (4, 6):
                for message in self.ip.route("dump", family=_bytes_family(family), table=table):
                    if (message.get_attr("RTA_TABLE") or message["table"]) != table:
                        continue
                    dst = message.get_attr("RTA_DST")
                    out.add(Route(
                        family, table, f"{dst}/{message['dst_len']}", names.get(message.get_attr("RTA_OIF") or 0, "?"),
                        message.get_attr("RTA_PREFSRC"), message["type"] == _LOCAL,
                    ))  # fmt: skip
        return out

    def route(self, verb: str, route: Route) -> None:
        index = self.index(route.dev)
        if index is None:
            if verb == "del":
                return  # it went with its link
            raise NotFound("host.no_link", f"the link {route.dev} is gone")
        request: dict[str, Any] = {
            "family": _bytes_family(route.family), "table": route.table, "dst": route.dst, "oif": index,
            "proto": PROTOCOL, "scope": SCOPE_LINK if route.family == 4 else 0,
        }  # fmt: skip
        if route.local:
            request |= {"type": "local", "scope": SCOPE_HOST if route.family == 4 else 0}
        if route.src is not None:
            request["prefsrc"] = route.src
        ok = (errno.ESRCH, errno.ENOENT, errno.ENODEV) if verb == "del" else ()
        self.do(f"{verb} a route to {route.dst}", self.ip.route, verb, ok=ok, **request)

    def gateway(self, family: int, dst: str, gateway: str, index: int, source: str) -> None:
        """A route through a gateway that is taken to be on the link."""
        self.do(f"set the route to {dst}", self.ip.route, "replace", family=_bytes_family(family), dst=dst, gateway=gateway,
                oif=index, prefsrc=source, flags=["onlink"], proto=PROTOCOL)  # fmt: skip

    # addresses and neighbours

    def read_addresses(self, index: int) -> list[str]:
        return [str(m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS")) for m in self.ip.get_addr(index=index)]

    def address(self, verb: str, index: int, address: str, *, length: int | None = None, scope: int = 0) -> None:
        v6 = ":" in address
        request: dict[str, Any] = {
            "index": index, "address": address, "prefixlen": length or (128 if v6 else 32), "scope": scope,
            "family": _bytes_family(6 if v6 else 4),
        }  # fmt: skip
        if v6 and verb == "add":
            request["flags"] = _NODAD
        ok = (errno.EEXIST,) if verb == "add" else (errno.EADDRNOTAVAIL,)
        self.do(f"{verb} the address {address}", self.ip.addr, verb, ok=ok, **request)

    def neighbour(self, index: int, address: str, mac: str | None) -> None:
        """A permanent neighbour: no ARP or ND on our links. None removes it."""
        target: dict[str, Any] = {"dst": address, "ifindex": index, "family": _bytes_family(family_of(address))}
        if mac is None:
            self.do("remove a neighbour", self.ip.neigh, "del", ok=(errno.ENOENT, errno.EINVAL), **target)
        else:
            self.do("set a neighbour", self.ip.neigh, "replace", lladdr=mac, state=_PERMANENT, **target)

    # links

    def links(self, alias: str) -> dict[str, int]:
        """Name -> index of the links whose alias starts with `alias`."""
        return {
            str(m.get_attr("IFLA_IFNAME")): int(m["index"])
            for m in self.ip.get_links()
            if str(m.get_attr("IFLA_IFALIAS") or "").startswith(alias)
        }

    def link(self, what: str, index: int, **request: Any) -> None:
        self.do(what, self.ip.link, "set", index=index, **request)

    def remove_link(self, index: int) -> None:
        self.do("remove a link", self.ip.link, "del", ok=(errno.ENODEV,), index=index)

    def mac(self, index: int) -> str | None:
        found = self.do("read a link", self.ip.get_links, index, ok=(errno.ENODEV,))
        return str(found[0].get_attr("IFLA_ADDRESS")) if found else None
