"""Carries out a layout (mesh/layout.py): links, addresses, routes and rules of the host and of attached namespaces.

What has to be there is compared with what is there, and the difference carried out. So every operation can be repeated,
and leftovers of a killed agent are simply part of the difference. Ours is what carries our rule and route protocol
number or our link alias; nothing else is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from identity.errors import Bug, NotFound, RetinueError
from identity.keys import write_secret
from identity.wire.broker import Side
from mesh import netns
from mesh.inside import GATEWAY4, GATEWAY6, GSO_MAX, INSIDE, Direct, Places, quiet_link
from mesh.layout import GATE_RULE, LOCAL_RULE, TUNNEL_RULE, Layout, Pair, Rule, layout, rules, void_name
from mesh.plan import Plan
from mesh.rtnl import SCOPE_LINK, Netlink
from mesh.snapshot import InstanceKey

T = TypeVar("T")

_ALIAS: Final = "retinue "
_TAP_SETTINGS: Final = {  # what we change on a link that is not ours
    "ipv6/conf": ("disable_ipv6", "accept_ra", "autoconf", "accept_redirects", "addr_gen_mode", "dad_transmits", "forwarding", "force_forwarding"),
    "ipv4/conf": ("accept_redirects", "send_redirects", "arp_ignore", "forwarding", "src_valid_mark"),
}


def _forwards(name: str) -> bool:
    """Is routing through a link switched on in both families? A link that is not there is none of this."""
    v6 = netns.sysctl(f"ipv6/conf/{name}/force_forwarding") or netns.sysctl(f"ipv6/conf/{name}/forwarding")
    return netns.sysctl(f"ipv4/conf/{name}/forwarding") != "0" and v6 != "0"


class HostNet:
    """Makes the host look like the layout of the plan last applied. Work runs on a thread of its own."""

    def __init__(self, interface: str, run_dir: Path, places: Places | None = None) -> None:
        self.interface = interface
        self._places = Direct() if places is None else places
        self.layout: Layout | None = None  # as far as it is carried out; None when that is not known
        self._before: Layout | None = None
        self._failed: set[str] = set()  # pairs that could not be made; the next plan tries them again
        self._undo_file = run_dir / f"undo-{interface}.json"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retinue-host")
        self._netlink: Netlink | None = None

    async def _run(self, work: Callable[[Netlink], T]) -> T:
        def body() -> T:
            if self._netlink is None:
                self._netlink = Netlink()
            return work(self._netlink)

        return await asyncio.get_running_loop().run_in_executor(self._thread, body)

    async def start(self) -> None:
        """The rules that keep everything out, before there is a device. Raises NoPrivilege."""

        def work(nl: Netlink) -> None:
            base = [r for r in rules(self.interface, (), {4: "", 6: ""}, holds=False) if GATE_RULE <= r.priority <= LOCAL_RULE]
            have = nl.read_rules(self.interface)
            for rule in sorted(set(base) - have, key=lambda r: -r.priority):
                nl.rule("add", rule)
            nl.move_local(behind=True)

        await self._run(work)

    def count_connections(self) -> None:
        """Let connection tracking count bytes, for the flow records; undone by `clean`."""
        name = "netfilter/nf_conntrack_acct"
        if netns.sysctl(name) == "0":
            self._remember(name)
            netns.sysctl(name, "1")

    async def device_up(self, mtu: int) -> None:
        """Settings of the tunnel device once it exists. Raises NotFound."""

        def work(nl: Netlink) -> None:
            index = nl.index(self.interface)
            if index is None:
                raise NotFound("host.no_link", f"the tunnel device {self.interface} is gone")
            quiet_link(self.interface)
            self._forwarding(self.interface)
            nl.link("set up the tunnel device", index, mtu=mtu, state="up")

        await self._run(work)

    # ---- prepare: links that have to be there before anything is allowed; nothing gets an address here

    async def narrow(self, plan: Plan) -> dict[str, str]:
        """Take away what the plan does not have, and make the links it has, without addresses or routes to them.

        Returns pair name -> reason for the namespaces that could not be set up.
        """
        want = layout(plan)
        if self._stands(want):
            return {}
        return await self._run(lambda nl: self._narrow(nl, want))

    def _stands(self, want: Layout) -> bool:
        """Is it carried out whole already, with every link in its place? Most changes are to peers alone."""
        if self.layout != want or self._failed:
            return False
        try:
            return all(socket.if_nametoindex(name) for name in (want.interface, *want.pairs))
        except OSError:
            return False

    def _narrow(self, nl: Netlink, want: Layout) -> dict[str, str]:
        known, self.layout = self.layout, None
        have_rules = nl.read_rules(self.interface) if known is None else known.rules
        for rule in sorted(want.rules - have_rules, key=lambda r: (r.priority != LOCAL_RULE, r.priority)):
            nl.rule("add", rule)
        if known is None:
            nl.move_local(behind=True)
        kept = {(r.family, r.table, r.dst) for r in want.routes}
        have_routes = nl.read_routes(self.interface) if known is None else known.routes
        for route in have_routes - want.routes:
            if (route.family, route.table, route.dst) not in kept:  # a changed one is replaced in one step later
                nl.route("del", route)
        if known is None or known.host_addresses != want.host_addresses:
            self._host_addresses(nl, want, remove=True)
        there = nl.links(self._alias)
        for name in there.keys() - want.pairs.keys() - {void_name(self.interface)}:
            nl.remove_link(there[name])
        if want.void is not None:
            self._make_void(nl, want, want.void)
        self._give_back(nl, {name for name, pair in want.pairs.items() if pair.tap})
        for rule in have_rules - want.rules:
            nl.rule("del", rule)
        failed: dict[str, str] = {}
        for name, pair in want.pairs.items():
            before = None if known is None else known.pairs.get(name)
            if pair.tap:
                if before is None or not before.tap:
                    self._attempt(failed, name, lambda name=name: self._adopt(nl, name))  # type: ignore[misc]  # a default binds the loop's value
                continue
            if before is not None and name in there and set(before.addresses) <= set(pair.addresses):
                continue  # it stands, and nothing has to go
            try:
                self._make_pair(nl, want, pair, there.get(name))
            except RetinueError as e:
                failed[name] = e.message
        self._before = known
        return failed

    @property
    def _alias(self) -> str:
        return f"{_ALIAS}{self.interface} "

    def _make_void(self, nl: Netlink, want: Layout, name: str) -> None:
        """The link for what the firewall has not seen: the other end is down, and nobody is asked for a neighbour."""
        index = nl.index(name)
        if index is None:
            nl.do("make the void", nl.ip.link, "add", ifname=name, kind="veth", mtu=want.mtu, peer={"ifname": f"{name}x"})
            index = nl.index(name)
        if index is None:
            raise Bug("host.no_link", f"the link {name} vanished")
        nl.link("name a link", index, ifalias=f"{self._alias}void")
        quiet_link(name)
        nl.link("set up a link", index, mtu=want.mtu, gso_max_size=GSO_MAX, arp=False, state="up")

    def _make_pair(self, nl: Netlink, want: Layout, pair: Pair, index: int | None) -> None:
        if index is not None and not self._inside_there(pair):
            nl.remove_link(index)
            index = None
        if index is None:
            with netns.opened(pair.netns) as fd:
                peer = {"ifname": INSIDE, "net_ns_fd": fd, "address": pair.inside_mac}
                nl.do(f"make a link into {pair.netns}", nl.ip.link, "add", ifname=pair.name, kind="veth",
                      address=pair.host_mac, mtu=want.mtu, peer=peer)  # fmt: skip
            index = nl.index(pair.name)
        if index is None:
            raise Bug("host.no_link", f"the link {pair.name} vanished")
        nl.link("name a link", index, ifalias=f"{self._alias}{pair.netns}"[:255])
        quiet_link(pair.name)
        self._forwarding(pair.name)
        nl.link("set up a link", index, mtu=want.mtu, gso_max_size=GSO_MAX, state="up")
        nl.address("add", index, GATEWAY4, scope=SCOPE_LINK)
        nl.address("add", index, GATEWAY6, length=64, scope=SCOPE_LINK)
        self._places.configure(_side(want, pair), add=False)

    @staticmethod
    def _attempt(failed: dict[str, str], name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except RetinueError as e:
            failed[name] = e.message

    def _adopt(self, nl: Netlink, name: str) -> None:
        """Take somebody else's link into use: what it was is remembered, what leads to it is ours."""
        index = nl.index(name)
        if index is None:
            raise NotFound("host.no_link", f"the link {name} is gone")
        self._remember_all([f"{place}/{name}/{setting}" for place, settings in _TAP_SETTINGS.items() for setting in settings])
        quiet_link(name)
        netns.sysctl(f"ipv4/conf/{name}/arp_ignore", "1")  # for the gateway alone
        self._forwarding(name)
        nl.link("set up a link", index, state="up")
        nl.address("add", index, GATEWAY4, scope=SCOPE_LINK)
        nl.address("add", index, GATEWAY6, length=64, scope=SCOPE_LINK)

    def _give_back(self, nl: Netlink, keep: set[str]) -> None:
        """Links of others that are not used any more become what they were."""
        undo = self._undo()
        names = {key.split("/")[2] for key in undo if key.count("/") == 3} - keep - {"all"}
        if not names:
            return
        for key in [key for key in undo if key.count("/") == 3 and key.split("/")[2] in names]:
            with contextlib.suppress(RetinueError):
                netns.sysctl(key, undo[key])
            del undo[key]
        for name in names:
            index = nl.index(name)
            if index is not None:
                nl.address("del", index, GATEWAY4)
                nl.address("del", index, GATEWAY6, length=64)
        write_secret(self._undo_file, json.dumps(undo).encode())

    def _inside_there(self, pair: Pair) -> bool:
        """Is the other end of the pair still where it belongs?"""
        try:
            return self._places.mac(pair.netns) == pair.inside_mac
        except RetinueError:
            return False

    def _host_addresses(self, nl: Netlink, want: Layout, *, remove: bool) -> None:
        index = nl.index(self.interface)
        if index is None:
            return
        have = set(nl.read_addresses(index))
        if remove:
            for address in have - set(want.host_addresses):
                if not address.startswith("fe80:"):
                    nl.address("del", index, address)
        else:
            for address in want.host_addresses:
                if address not in have:
                    nl.address("add", index, address)

    # ---- widen: addresses and the routes to them, once the firewall holds

    async def widen(self, plan: Plan, skip: Iterable[str] = ()) -> dict[str, str]:
        """Addresses and routes of the plan; `skip` names pairs that could not be made."""
        want = layout(plan)
        if self.layout == want and not skip:
            self._early_demux(off=bool(want.host_addresses))
            return {}
        leave = set(skip)
        return await self._run(lambda nl: self._widen(nl, want, leave))

    def _widen(self, nl: Netlink, want: Layout, skip: set[str]) -> dict[str, str]:
        known, self._before = self._before, None
        failed: dict[str, str] = {}
        self._early_demux(off=bool(want.host_addresses))
        self._host_addresses(nl, want, remove=False)
        for name, pair in want.pairs.items():
            before = None if known is None else known.pairs.get(name)
            if name in skip or before == pair:
                continue
            try:
                index = nl.index(name)
                if index is None:
                    raise NotFound("host.no_link", f"the link {name} is gone")
                if pair.tap:
                    continue  # the guest says its link address itself
                for address in pair.reachable:
                    nl.neighbour(index, address, pair.inside_mac)
                if before is None or before.addresses != pair.addresses:
                    self._give_addresses(want, pair)
            except RetinueError as e:
                failed[name] = e.message
        have = nl.read_routes(self.interface) if known is None else known.routes
        for route in want.routes - have:
            if route.dev in skip or route.dev in failed:
                continue
            try:
                nl.route("replace", route)
            except RetinueError as e:
                if route.dev not in want.pairs:
                    raise
                # Root in that namespace may take its link away at any moment: only that place goes without.
                failed[route.dev] = e.message
        if want.void is None and (left := nl.index(void_name(self.interface))) is not None:
            nl.remove_link(left)  # its routes lead to the tunnel again
        bad = skip | failed.keys()
        routes = frozenset(r for r in want.routes if r.dev not in bad)
        # What failed is not counted as there, so the next plan tries it again.
        pairs = {name: pair for name, pair in want.pairs.items() if name not in bad}
        self.layout = replace(want, pairs=pairs, routes=routes)
        self._failed = bad
        return failed

    def _give_addresses(self, want: Layout, pair: Pair) -> None:
        self._places.configure(_side(want, pair), add=True)

    # ---- settings of the whole namespace, with their undo

    def _forwarding(self, name: str) -> None:
        netns.sysctl(f"ipv4/conf/{name}/forwarding", "1")
        netns.sysctl(f"ipv4/conf/{name}/src_valid_mark", "1")
        # Sources are the firewall's business, link by link: without this every packet's source is looked up once more.
        netns.sysctl(f"ipv4/conf/{name}/accept_local", "1")
        netns.sysctl(f"ipv6/conf/{name}/forwarding", "1")
        if netns.sysctl(f"ipv6/conf/{name}/force_forwarding", "1") is None:
            self._forward_all_v6()

    def closes_v6(self) -> bool:
        """Is (or will be) IPv6 forwarding switched on for the whole host only for us? Then the firewall has to keep
        the other links as closed as they were.
        """
        name = "ipv6/conf/all/forwarding"
        return netns.sysctl("ipv6/conf/all/force_forwarding") is None and (name in self._undo() or netns.sysctl(name) == "0")

    def _forward_all_v6(self) -> None:
        """Kernels before 6.17 forward IPv6 everywhere or nowhere. Other links keep their own settings (a link that
        forwards ignores router advertisements).
        """
        if netns.sysctl("ipv6/conf/all/forwarding") != "0":
            return
        self._remember("ipv6/conf/all/forwarding")
        before = {p.name: netns.sysctl(f"ipv6/conf/{p.name}/forwarding") for p in Path("/proc/sys/net/ipv6/conf").iterdir()}
        netns.sysctl("ipv6/conf/all/forwarding", "1")
        for name, value in before.items():
            if name != "all" and value == "0":
                netns.sysctl(f"ipv6/conf/{name}/forwarding", "0")

    def _early_demux(self, *, off: bool) -> None:
        """A packet for an established socket skips the routing rules by early demultiplexing; with an identity on the
        host itself it must not, or a flushed firewall would leave such flows open.
        """
        if off and netns.sysctl("ipv4/ip_early_demux") == "1":
            self._remember("ipv4/ip_early_demux")
            netns.sysctl("ipv4/ip_early_demux", "0")
        elif not off and "ipv4/ip_early_demux" in (undo := self._undo()):
            netns.sysctl("ipv4/ip_early_demux", undo.pop("ipv4/ip_early_demux"))
            write_secret(self._undo_file, json.dumps(undo).encode())

    def _undo(self) -> dict[str, str]:
        try:
            saved = json.loads(self._undo_file.read_text())
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in saved.items()} if isinstance(saved, dict) else {}

    def _remember(self, name: str) -> None:
        self._remember_all([name])

    def _remember_all(self, names: Iterable[str]) -> None:
        undo = self._undo()
        found = {name: value for name in names if name not in undo and (value := netns.sysctl(name)) is not None}
        if found:
            undo |= found
            write_secret(self._undo_file, json.dumps(undo).encode())

    # ---- verify, clean

    async def verify(self) -> tuple[list[str], list[InstanceKey]]:
        """What differs from the layout (texts), and instances whose namespace is gone."""
        want = self.layout
        if want is None:
            return [], []
        return await self._run(lambda nl: self._verify(nl, want))

    def _verify(self, nl: Netlink, want: Layout) -> tuple[list[str], list[InstanceKey]]:
        wrong: list[str] = []
        gone: list[InstanceKey] = []
        there = nl.links(self._alias)
        lost: set[str] = set()
        for name, pair in want.pairs.items():
            if name in there or (pair.tap and nl.index(name) is not None):
                continue
            lost.add(name)
            if pair.tap:
                gone += pair.instances
                continue
            try:
                netns.identify(pair.netns)
            except RetinueError:
                gone += pair.instances
            else:
                wrong.append(f"the link {name} into {pair.netns} is missing")
        wrong += [f"the leftover link {name}" for name in there.keys() - want.pairs.keys() - self._failed - {want.void}]
        if want.void is not None and want.void not in there:
            wrong.append("the link to nowhere is missing")
        adopted = [name for name, pair in want.pairs.items() if pair.tap and name not in lost]
        # net.ipv4.ip_forward=0 by anybody switches it off for every link.
        wrong += [f"{name} does not forward any more" for name in (self.interface, *(want.pairs.keys() & there), *adopted) if not _forwards(name)]
        if nl.local_first():
            wrong.append("the local table stands before our rules")
        have_rules = nl.read_rules(self.interface)
        if have_rules != want.rules:
            wrong.append(f"{len(want.rules ^ have_rules)} routing rules differ")
        routes = nl.read_routes(self.interface)
        differ = {r for r in want.routes ^ routes if r.dev not in lost}
        if differ:
            wrong.append(f"{len(differ)} routes differ")
        index = nl.index(self.interface)
        held = set() if index is None else set(nl.read_addresses(index))
        if not set(want.host_addresses) <= held:
            wrong.append("an address of the host's identity is missing")
        return wrong, gone

    async def clean(self) -> None:
        """Remove all of it and restore what was changed."""

        def work(nl: Netlink) -> None:
            for index in nl.links(self._alias).values():
                nl.remove_link(index)
            for route in nl.read_routes(self.interface):
                nl.route("del", route)
            shared = {LOCAL_RULE, TUNNEL_RULE}
            for rule in sorted(nl.read_rules(self.interface), key=lambda r: -r.priority):
                if rule.priority not in shared:
                    nl.rule("del", rule)
            if not any(nl.read_rules(f"x{n}") - _shared(nl, n) for n in range(4)):
                nl.move_local(behind=False)
                for rule in nl.read_rules(self.interface):
                    nl.rule("del", rule)
            self._give_back(nl, set())
            undo = self._undo()
            for name, value in undo.items():
                netns.sysctl(name, value)
            self._undo_file.unlink(missing_ok=True)

        await self._run(work)
        self.layout = None

    async def stop(self) -> None:
        """End the thread; everything stays as it is."""
        if self._netlink is not None:
            netlink, self._netlink = self._netlink, None
            await asyncio.get_running_loop().run_in_executor(self._thread, netlink.close)
        self._thread.shutdown(wait=True)


def _shared(nl: Netlink, number: int) -> set[Rule]:
    return {r for r in nl.read_rules(f"x{number}") if r.priority in {LOCAL_RULE, TUNNEL_RULE}}


def _side(want: Layout, pair: Pair) -> Side:
    """The workload's end of a pair, as the one who configures it is told."""
    return Side(
        netns=pair.netns, addresses=list(pair.addresses), gateway_mac=pair.host_mac, mtu=want.mtu,
        overlay4=want.overlay[4], overlay6=want.overlay[6],
    )  # fmt: skip
