"""The kernel device: WireGuard of the Linux kernel over netlink. No packet passes through a process of ours."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address, ip_interface
from typing import Any, Final, Literal, TypeVar

from identity.errors import Bug, Conflict, NoPrivilege, NotFound, RetinueError
from identity.keys import b64, unb64
from mesh.devices import DeviceConfig, DeviceState, PeerChange, PeerState
from mesh.plan import CHACHA

T = TypeVar("T")

_PROBE: Final = "rtnprobe"
_KIND: Final = "wireguard"
# Allowed IPs in one request. A list is one netlink attribute, whose length has 16 bits; an IPv6 entry takes 40 bytes.
_AT_ONCE: Final = 1000


def _std64(raw: bytes) -> str:
    import base64

    return base64.b64encode(raw).decode()


def _failed(what: str, e: Exception) -> RetinueError:
    code = getattr(e, "code", None) or getattr(e, "errno", None)
    if code in {errno.EPERM, errno.EACCES}:
        return NoPrivilege("device.privilege", f"may not {what}", hint="run as root (CAP_NET_ADMIN)")
    if code in {errno.ENODEV, errno.ENOENT}:
        return NotFound("device.gone", f"cannot {what}: the device is gone")
    if code == errno.EADDRINUSE:
        return Conflict("device.port_taken", f"cannot {what}: the UDP port is in use", hint="choose another with --listen-port")
    return Bug("device.refused", f"cannot {what}: {e}")


async def _blocking(what: str, work: Callable[[], T]) -> T:
    """Run a netlink exchange off the loop, with its errors as ours."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        return await asyncio.to_thread(work)
    except (NetlinkError, OSError) as e:
        raise _failed(what, e) from None


async def probe() -> str:
    """Why the kernel's WireGuard cannot be used here, empty when it can: makes a device and removes it again."""

    def work() -> str:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        with IPRoute() as ip:
            try:
                ip.link("add", ifname=_PROBE, kind=_KIND)
            except NetlinkError as e:
                if e.code == errno.EEXIST:
                    return ""
                return "the kernel has no WireGuard" if e.code == errno.EOPNOTSUPP else f"the kernel refuses WireGuard: {e}"
            ip.link("del", index=ip.link_lookup(ifname=_PROBE)[0])
        return ""

    return await _blocking("look for WireGuard in the kernel", work)


def peer_request(change: PeerChange) -> dict[str, Any]:
    """One peer change in pyroute2's form. `cipher` has no meaning here: the kernel speaks ChaCha20-Poly1305 only.

    Raises Bug for an address that is none: a change is understood as a whole before any of it is carried out.
    """
    peer: dict[str, Any] = {"public_key": _std64(unb64(change.tunnel_key, length=32))}
    if change.remove:
        return {**peer, "remove": True}
    if not change.create:
        peer["update_only"] = True
    try:
        if change.underlay is not None:
            host, _, port = change.underlay.rpartition(":")
            peer["endpoint_addr"] = str(ip_address(host.removeprefix("[").removesuffix("]")))
            peer["endpoint_port"] = int(port)
        if change.keepalive is not None:
            peer["persistent_keepalive"] = change.keepalive
        if change.replace:
            peer["replace_allowed_ips"] = True
        if change.allowed_ips:
            peer["allowed_ips"] = [str(ip_interface(address)) for address in change.allowed_ips]
    except ValueError as e:
        raise Bug("device.refused", f"cannot change a peer: {e}") from None
    return peer


def peer_requests(change: PeerChange) -> list[dict[str, Any]]:
    """One peer change as requests the kernel can take: a long list of addresses in several, the first with the rest."""
    first = peer_request(change)
    addresses = first.get("allowed_ips", [])
    if len(addresses) <= _AT_ONCE:
        return [first]
    more = [
        {"public_key": first["public_key"], "update_only": True, "allowed_ips": addresses[n : n + _AT_ONCE]}
        for n in range(_AT_ONCE, len(addresses), _AT_ONCE)
    ]
    return [{**first, "allowed_ips": addresses[:_AT_ONCE]}, *more]


def parse_peer(attributes: Any) -> tuple[str, PeerState]:
    """A WGPEER message of pyroute2 as (tunnel key, state)."""
    import base64

    raw = attributes.get_attr("WGPEER_A_PUBLIC_KEY")
    key = b64(base64.b64decode(raw))
    endpoint = attributes.get_attr("WGPEER_A_ENDPOINT")
    underlay = None
    if endpoint and endpoint.get("addr"):
        parsed = ip_address(endpoint["addr"])
        underlay = f"[{parsed}]:{endpoint['port']}" if parsed.version == 6 else f"{parsed}:{endpoint['port']}"
    handshake = attributes.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME") or {}
    allowed = attributes.get_attr("WGPEER_A_ALLOWEDIPS") or []
    return key, PeerState(
        underlay=underlay,
        allowed_ips=frozenset(str(a["addr"]) for a in allowed),
        keepalive=int(attributes.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") or 0),
        latest_handshake=int(handshake.get("tv_sec") or 0) or None,
        rx_bytes=int(attributes.get_attr("WGPEER_A_RX_BYTES") or 0),
        tx_bytes=int(attributes.get_attr("WGPEER_A_TX_BYTES") or 0),
    )


class KernelDevice:
    """See mesh.devices.Device."""

    kind: Literal["userspace", "kernel"] = "kernel"
    ciphers = (CHACHA,)

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config

    async def start(self) -> bool:
        name = self.config.interface
        raw = self.config.private_key()

        def work() -> bool:
            from pyroute2 import IPRoute, WireGuard

            with IPRoute() as ip:
                kind = _kind_of(ip, name)
                there = kind is not None
                if kind not in {None, _KIND}:
                    raise Conflict(
                        "device.taken", f"{name} exists and is no WireGuard device of the kernel ({kind})",
                        hint="retinue down takes away what an engine left; or choose another name with --interface",
                    )  # fmt: skip
                if not there:
                    ip.link("add", ifname=name, kind=_KIND)
            with WireGuard() as wg:
                wg.set(name, private_key=_std64(raw), listen_port=self.config.listen_port, fwmark=self.config.fwmark)
            return there

        return await _blocking(f"set up {name}", work)

    async def read(self) -> DeviceState:
        name = self.config.interface

        def work() -> DeviceState:
            import base64

            from pyroute2 import WireGuard

            public, port, mark = None, 0, 0
            peers: dict[str, PeerState] = {}
            with WireGuard() as wg:
                # A large device comes in several messages; a peer whose list is cut is continued in the next one.
                for message in wg.info(name):
                    key = message.get_attr("WGDEVICE_A_PUBLIC_KEY")
                    public = b64(base64.b64decode(key)) if key else public
                    port = int(message.get_attr("WGDEVICE_A_LISTEN_PORT") or port)
                    mark = int(message.get_attr("WGDEVICE_A_FWMARK") or mark)
                    for entry in message.get_attr("WGDEVICE_A_PEERS") or ():
                        peer_key, state = parse_peer(entry)
                        before = peers.get(peer_key)
                        peers[peer_key] = state if before is None else _joined(before, state)
            return DeviceState(public, port, mark, peers)

        return await _blocking(f"read {name}", work)

    async def counters(self) -> Mapping[str, PeerState]:
        return (await self.read()).peers

    async def apply(self, changes: Iterable[PeerChange]) -> None:
        requests = [request for change in changes for request in peer_requests(change)]

        def work() -> None:
            from pyroute2 import WireGuard

            with WireGuard() as wg:
                for request in requests:
                    wg.set(self.config.interface, peer=request)

        await _blocking(f"change the peers of {self.config.interface}", work)

    async def stop(self, *, clean: bool) -> None:
        def work() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as ip:
                # Somebody else's link of that name is not ours to remove.
                if _kind_of(ip, self.config.interface) == _KIND:
                    ip.link("del", ifname=self.config.interface)

        if clean:
            await _blocking(f"remove {self.config.interface}", work)

    def describe(self) -> str:
        return "kernel"


def _kind_of(ip: Any, name: str) -> str | None:
    """The kind of a link ("wireguard", "tun", "" for a physical one), None when there is none of that name."""
    found = list(ip.link_lookup(ifname=name))
    if not found:
        return None
    links = list(ip.get_links(found[0]))
    info = links[0].get_attr("IFLA_LINKINFO") if links else None
    return str(info.get_attr("IFLA_INFO_KIND") or "") if info else ""


def _joined(a: PeerState, b: PeerState) -> PeerState:
    return PeerState(a.underlay, a.allowed_ips | b.allowed_ips, a.keepalive, a.cipher, a.latest_handshake, a.rx_bytes,
                     a.tx_bytes)  # fmt: skip
