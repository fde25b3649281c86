"""`retinue doctor`: what keeps the mesh from working on this machine, each finding with what to do about it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from identity.errors import RetinueError
from identity.wire.local import Status

Result = Literal["ok", "warn", "fail"]
PACKAGES: Final = ("identity", "policy", "mesh")
CAP_NET_ADMIN: Final = 12

SVID_LOW: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    result: Result
    text: str
    hint: str = ""


async def examine(state_dir: Path, agent_socket: Path) -> list[Check]:
    """All checks, in the order in which things are needed."""
    checks = [*_machine(), *_enrolled(state_dir)]
    status = await _agent(agent_socket)
    if isinstance(status, RetinueError):
        checks.append(Check("agent", "fail", status.message, status.hint))
        return checks
    return [*checks, *_running(status), await _marks(status.interface), *await _ca_address(state_dir)]


def _machine() -> Iterator[Check]:
    yield own_packages()
    yield _privilege()
    yield _tun()
    yield _nftables()
    yield _engine()
    yield _sysctl("forwarding IPv4", "/proc/sys/net/ipv4/ip_forward")
    yield _sysctl("forwarding IPv6", "/proc/sys/net/ipv6/conf/all/forwarding")
    if not Path("/proc/sys/net/ipv6").exists():
        yield Check("IPv6", "fail", "this kernel has no IPv6", "boot without ipv6.disable=1")
    else:
        yield Check("IPv6", "ok", "available")


def own_packages() -> Check:
    """Other distributions have top-level packages of the same names; are the imported ones ours?"""
    import importlib

    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = Path(importlib.import_module(name).__file__ or "/").resolve().parent.parent
        if found != home:
            return Check("packages", "fail", f"the package {name} comes from {found}, not from {home}",
                         "uninstall the other distribution, or use a virtual environment")  # fmt: skip
    return Check("packages", "ok", f"identity, policy and mesh are ours ({home})")


def _privilege() -> Check:
    capabilities = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capabilities = int(line.split()[1], 16)
    if capabilities >> CAP_NET_ADMIN & 1:
        return Check("privilege", "ok", "CAP_NET_ADMIN is there")
    return Check(
        "privilege", "fail", "no CAP_NET_ADMIN: links and rules cannot be changed", "run as root (sudo)"
    )


def _tun() -> Check:
    """Open the device and ask for its features: a node without a driver can exist."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        hint = (
            "modprobe tun"
            if e.errno in {errno.ENODEV, errno.ENOENT, errno.ENXIO}
            else "run as root, with the device allowed"
        )
        return Check("/dev/net/tun", "fail", f"cannot be opened: {e.strerror}", hint)
    try:
        fcntl.ioctl(fd, 0x800454CF, struct.pack("I", 0))  # TUNGETFEATURES
    except OSError as e:
        return Check("/dev/net/tun", "fail", f"is not the TUN driver: {e.strerror}", "modprobe tun")
    finally:
        os.close(fd)
    return Check("/dev/net/tun", "ok", "usable")


def _nftables() -> Check:
    path = shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        return Check("nft", "fail", "not installed: no rules can be set", "apt install nftables")
    return Check("nft", "ok", path)


def _engine() -> Check:
    try:
        from mesh import _native  # noqa: F401 -- does it load?
    except ImportError as e:
        return Check("engine", "fail", f"the native module does not load: {e}", "build it: make setup")
    return Check("engine", "ok", f"built for {sys.platform}")


def _sysctl(name: str, path: str) -> Check:
    try:
        value = Path(path).read_text().strip()
    except OSError:
        return Check(name, "warn", f"{path} cannot be read")
    if value == "1":
        return Check(name, "ok", "on")
    return Check(name, "warn", "off: the agent switches it on for its own links when it needs it")


def _enrolled(state_dir: Path) -> Iterator[Check]:
    from mesh.enroll import load_enrollment

    try:
        enrollment = load_enrollment(state_dir)
    except RetinueError as e:
        yield Check("enrolment", "fail", e.message, e.hint)
        return
    yield Check("enrolment", "ok", str(enrollment.spiffe_id))
    left = enrollment.svid.not_after - time.time()
    if left <= 0:
        yield Check("certificate", "fail", "expired", "enrol again with a new token and --replace")
    elif left < SVID_LOW:
        yield Check("certificate", "warn", f"ends in {left:.0f} s", "is the CA reachable?")
    else:
        yield Check("certificate", "ok", f"valid for {left / 3600:.1f} h")


async def _agent(path: Path) -> Status | RetinueError:
    from mesh.local_client import LocalClient

    try:
        async with LocalClient(path) as agent:
            return await agent.status()
    except RetinueError as e:
        return e


async def _marks(interface: str) -> Check:
    """Does a rule of somebody else touch our bit of the packet mark?"""
    from mesh import nft
    from mesh.firewall_names import accepted_mark
    from mesh.marks import foreign_marks

    try:
        found = foreign_marks(await nft.list_objects("ruleset"), "retinue", accepted_mark(interface))
    except RetinueError as e:
        return Check("marks", "warn", f"the rules of others cannot be read: {e.message}", e.hint)
    if found:
        return Check("marks", "fail", "; ".join(found[:3]), "write such rules as: meta mark set meta mark & MASK | VALUE, without our bit")
    return Check("marks", "ok", "no rule of others touches our bit of the packet mark")


def _running(s: Status) -> Iterator[Check]:
    yield Check("agent", "ok", f"version {s.version}, {s.device}")
    if s.control == "connected":
        yield Check("control", "ok", f"connected, newest heartbeat {s.staleness_s or 0:.0f} s old")
    else:
        yield Check(
            "control",
            "warn",
            "no feed from the CA; what is in force stays",
            "is the CA running and reachable?",
        )
    if s.staleness_s is not None and all(c.code != "clock.skew" for c in s.conditions):
        yield Check("clock", "ok", "agrees with the CA's")
    if not s.ready:
        yield Check("policy", "fail", "no state of the CA's was applied yet", "see the agent's log")
    elif s.policy_digest is None:
        yield Check(
            "policy", "warn", "no policy was published: nothing is permitted", "retinue-ca policy apply FILE"
        )
    else:
        yield Check("policy", "ok", f"revision {s.policy_revision} is applied")
    for condition in s.conditions:
        if condition.severity != "info":
            yield Check(condition.code, "fail" if condition.severity == "error" else "warn", condition.text)
    silent = [p.endpoint for p in s.peers if p.allowed_ips and p.latest_handshake is None]
    if silent:
        yield Check(
            "tunnels", "warn", f"no handshake yet with {', '.join(silent[:5])}",
            "without traffic that is normal; else check that UDP reaches both hosts",
        )  # fmt: skip


async def _ca_address(state_dir: Path) -> list[Check]:
    """Does anything listen where the enrolment says the CA is?"""
    from mesh.enroll import load_enrollment

    try:
        enrollment = load_enrollment(state_dir)
        host, _, port = enrollment.ca_url.split(",")[0].removeprefix("https://").rpartition(":")
        async with asyncio.timeout(3.0):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.close()
    except (RetinueError, OSError, TimeoutError, ValueError, socket.gaierror):
        return [Check("CA address", "warn", "no TCP connection to the CA", "check the network and --ca")]
    return [Check("CA address", "ok", f"{enrollment.ca_url} answers")]
