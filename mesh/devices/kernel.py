"""The kernel device: WireGuard of the Linux kernel over netlink. No packet passes through a process of ours."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address
from typing import Any, Final, Literal, TypeVar

from identity.errors import Bug, NoPrivilege, NotFound, RetinueError
from identity.keys import b64, unb64
from mesh.devices import DeviceConfig, DeviceState, PeerChange, PeerState
from mesh.plan import CHACHA

T = TypeVar("T")

_PROBE: Final = "rtnprobe"


def _std64(raw: bytes) -> str:
    import base64

    return base64.b64encode(raw).decode()


def _failed(what: str, e: Exception) -> RetinueError:
    code = getattr(e, "code", None) or getattr(e, "errno", None)
    if code in {errno.EPERM, errno.EACCES}:
        return NoPrivilege("device.privilege", f"may not {what}", hint="run as root (CAP_NET_ADMIN)")
    if code in {errno.ENODEV, errno.ENOENT}:
        return NotFound("device.gone", f"cannot {what}: the device is gone")
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
                ip.link("add", ifname=_PROBE, kind="wireguard")
            except NetlinkError as e:
                if e.code == errno.EEXIST:
                    return ""
                return "the kernel has no WireGuard" if e.code == errno.EOPNOTSUPP else f"the kernel refuses WireGuard: {e}"
            ip.link("del", index=ip.link_lookup(ifname=_PROBE)[0])
        return ""

    return await _blocking("look for WireGuard in the kernel", work)


def peer_request(change: PeerChange) -> dict[str, Any]:
    """One peer change in pyroute2's form. `cipher` has no meaning here: the kernel speaks ChaCha20-Poly1305 only."""
    peer: dict[str, Any] = {"public_key": _std64(unb64(change.tunnel_key, length=32))}
    if change.remove:
        return {**peer, "remove": True}
    if not change.create:
        peer["update_only"] = True
    if change.underlay is not None:
        host, _, port = change.underlay.rpartition(":")
        peer["endpoint_addr"] = str(ip_address(host.removeprefix("[").removesuffix("]")))
        peer["endpoint_port"] = int(port)
    if change.keepalive is not None:
        peer["persistent_keepalive"] = change.keepalive
    if change.replace:
        peer["replace_allowed_ips"] = True
    if change.allowed_ips:
        peer["allowed_ips"] = list(change.allowed_ips)
    return peer


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
                there = bool(ip.link_lookup(ifname=name))
                if not there:
                    ip.link("add", ifname=name, kind="wireguard")
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
        requests = [peer_request(change) for change in changes]

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
                for index in ip.link_lookup(ifname=self.config.interface):
                    ip.link("del", index=index)

        if clean:
            await _blocking(f"remove {self.config.interface}", work)

    def describe(self) -> str:
        return "kernel"


def _joined(a: PeerState, b: PeerState) -> PeerState:
    return PeerState(a.underlay, a.allowed_ips | b.allowed_ips, a.keepalive, a.cipher, a.latest_handshake, a.rx_bytes,
                     a.tx_bytes)  # fmt: skip
