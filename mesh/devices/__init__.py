"""Tunnel devices: one small interface, kernel WireGuard and the userspace engine behind it.

A device enforces keys and allowed IPs, nothing else; ports are the firewall's (mesh/firewall.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

from mesh.plan import CHACHA, Cipher, PeerPlan

Choice = Literal["auto", "userspace", "kernel"]

# Our bits of the packet mark. ACCEPTED: the firewall let it pass; TUNNEL: an outer packet of the device itself.
ACCEPTED: Final = 0x0200_0000
TUNNEL: Final = 0x0400_0000


@dataclass(frozen=True, slots=True)
class PeerState:
    """A peer as the device has it. `latest_handshake` is seconds since the epoch, None when there was none."""

    underlay: str | None = None
    allowed_ips: frozenset[str] = frozenset()
    keepalive: int = 0
    cipher: Cipher = CHACHA
    latest_handshake: int | None = None
    rx_bytes: int = 0
    tx_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device as it is; peers by tunnel key (b64 as in the records). The private key is never read back."""

    public_key: str | None = None
    listen_port: int = 0
    fwmark: int = 0
    peers: Mapping[str, PeerState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerChange:
    """One peer's part of a change. None leaves a property as it is.

    create: the peer may be new (else it is updated only when it is there). replace: `allowed_ips` is the whole list,
    else what is added to it; in both cases the device takes each of them from whoever had it.
    """

    tunnel_key: str
    remove: bool = False
    create: bool = False
    underlay: str | None = None
    allowed_ips: tuple[str, ...] | None = None
    replace: bool = False
    keepalive: int | None = None
    cipher: Cipher | None = None


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What a device is given once. `private_key` returns 32 raw bytes; it is called only to hand them over.
    engine_options: more words of the command line of an engine of ours, from its next start on.
    """

    interface: str
    mtu: int
    listen_port: int
    private_key: Callable[[], bytes]
    run_dir: Path
    engine: Path | None = None
    engine_options: tuple[str, ...] = ()
    fwmark: int = TUNNEL


class Device(Protocol):
    """A tunnel device. All methods raise RetinueError; `apply` is all or nothing as far as the device can."""

    kind: Literal["userspace", "kernel"]

    @property
    def ciphers(self) -> tuple[Cipher, ...]:
        """Transport ciphers it can do, known once it has started."""
        ...

    async def start(self) -> bool:
        """Make it exist and carry its key and port. True when it was there before with its peers (adopted)."""
        ...

    async def read(self) -> DeviceState: ...

    async def apply(self, changes: Iterable[PeerChange]) -> None: ...

    async def counters(self) -> Mapping[str, PeerState]: ...

    async def stop(self, *, clean: bool) -> None:
        """Let go of it; `clean` also removes it."""
        ...

    def describe(self) -> str:
        """``userspace (retinue-engine 0.1.0)`` or ``kernel``."""
        ...


def peer_changes(have: Mapping[str, PeerState], want: Mapping[str, PeerPlan]) -> tuple[PeerChange, ...]:
    """What turns the peers a device has into those of a plan.

    Gains come first: where an address changes hands the device moves it in one step, so there is no moment at which
    nobody or both have it, also on devices that carry out a request peer by peer. Then what is lost to nobody, then
    removals. The underlay of a peer that is there is left alone, for it may have roamed, unless the device knows none.
    """
    first: list[PeerChange] = []
    lost: list[PeerChange] = []
    moved = {a for key, plan in want.items() for a in plan.allowed_ips if a not in have.get(key, PeerState()).allowed_ips}
    for key, plan in want.items():
        old = have.get(key)
        if old is None:
            first.append(PeerChange(key, create=True, underlay=plan.underlay, allowed_ips=plan.allowed_ips,
                                    keepalive=plan.keepalive, cipher=plan.cipher))  # fmt: skip
            continue
        gained = tuple(a for a in plan.allowed_ips if a not in old.allowed_ips)
        change = PeerChange(
            key,
            underlay=plan.underlay if old.underlay is None else None,
            allowed_ips=gained or None,
            keepalive=plan.keepalive if plan.keepalive != old.keepalive else None,
            cipher=plan.cipher if plan.cipher != old.cipher else None,
        )
        if change != PeerChange(key):
            first.append(change)
        if old.allowed_ips - moved - set(plan.allowed_ips):
            lost.append(PeerChange(key, allowed_ips=plan.allowed_ips, replace=True))
    gone = [PeerChange(key, remove=True) for key in have if key not in want]
    return (*first, *lost, *gone)


def after(have: Mapping[str, PeerState], changes: Iterable[PeerChange]) -> dict[str, PeerState]:
    """The peers a device has once `changes` are applied: an address belongs to the peer it was given to last."""
    peers = dict(have)
    for change in changes:
        if change.remove:
            peers.pop(change.tunnel_key, None)
            continue
        old = peers.get(change.tunnel_key)
        if old is None and not change.create:
            continue
        old = old or PeerState()
        given = frozenset(change.allowed_ips or ())
        allowed = given if change.replace else old.allowed_ips | given
        for key, other in peers.items():
            if key != change.tunnel_key and other.allowed_ips & allowed:
                peers[key] = _with_allowed(other, other.allowed_ips - allowed)
        peers[change.tunnel_key] = PeerState(
            underlay=change.underlay or old.underlay,
            allowed_ips=allowed,
            keepalive=old.keepalive if change.keepalive is None else change.keepalive,
            cipher=change.cipher or old.cipher,
            latest_handshake=old.latest_handshake,
            rx_bytes=old.rx_bytes,
            tx_bytes=old.tx_bytes,
        )
    return peers


def _with_allowed(peer: PeerState, allowed: frozenset[str]) -> PeerState:
    return PeerState(peer.underlay, allowed, peer.keepalive, peer.cipher, peer.latest_handshake, peer.rx_bytes, peer.tx_bytes)


async def choose(
    choice: Choice, config: DeviceConfig, *, on_exit: Callable[[], None] | None = None
) -> tuple[Device, str]:
    """The device to use and why; `on_exit` is called on the loop when an engine ends by itself.

    An engine that is there is kept where the choice is ours: its tunnels are up, and `stop` has to find it.
    """
    from mesh.devices.kernel import KernelDevice, probe
    from mesh.devices.userspace import UserspaceDevice

    if choice == "kernel":
        return KernelDevice(config), "asked for"
    if choice == "userspace":
        return UserspaceDevice(config, on_exit=on_exit), "asked for"
    userspace = UserspaceDevice(config, on_exit=on_exit)
    if userspace.left_running():
        return userspace, "an engine is running already"
    why_not = await probe()
    if not why_not:
        return KernelDevice(config), "the kernel has WireGuard"
    return userspace, why_not
