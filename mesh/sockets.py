"""Which process uses a socket: the kernel's socket listing of a namespace, then the open files of its processes.

A short-lived client is often gone before anybody can look; then what is not known is said to be unknown.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import Final

from mesh.netfilter import Conversation, messages
from policy.flows import UNKNOWN, ProcessInfo
from policy.ports import TCP, UDP

_SOCK_DIAG: Final = 4  # netlink family; linux/sock_diag.h, linux/inet_diag.h
_BY_FAMILY: Final = 20
_REQUEST, _DUMP = 0x1, 0x300
_DONE, _ERROR = 3, 2
MAX_PROCESSES: Final = 4096
MAX_SOCKETS: Final = 64  # of one port


def owner(flow: Conversation, *, source: bool) -> ProcessInfo:
    """Who uses the socket at one end of a flow, in the network namespace of the calling thread. Blocking."""
    if flow.proto not in {TCP, UDP}:
        return ProcessInfo()
    port, address = (flow.sport, flow.src) if source else (flow.dport, flow.dst)
    found = _sockets(flow, address, port)
    if not found:
        return ProcessInfo()
    inode, executable, unit = _process(list(found))
    return ProcessInfo(executable, unit, found[inode])


def _sockets(flow: Conversation, address: str, port: int) -> dict[int, int]:
    """The sockets bound to that port, {inode: uid}; those bound to the address before those bound to any.

    More than one: a connection may be over before anybody looks for its process, while the listening socket stays.
    """
    families = [socket.AF_INET6] if ":" in address else [socket.AF_INET, socket.AF_INET6]
    found: list[tuple[int, int, int]] = []
    packed = ip_address(address).packed
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as sock:
        sock.settimeout(2)
        for family in families:
            body = struct.pack("=BBBBI", family, flow.proto, 0, 0, 0xFFFFFFFF) + b"\0" * 48
            sock.send(struct.pack("=IHHII", 16 + len(body), _BY_FAMILY, _REQUEST | _DUMP, 1, 0) + body)
            done = False
            while not done:
                for kind, _, data in messages(sock.recv(1 << 18)):
                    if kind in {_DONE, _ERROR} or len(data) < 72:
                        done = True
                        break
                    if struct.unpack_from(">H", data, 4)[0] != port:
                        continue
                    local = data[8:24] if data[0] == socket.AF_INET6 else data[8:12]
                    mapped = b"\0" * 10 + b"\xff\xff" + packed if len(packed) == 4 else packed
                    weight = 2 if local in {packed, mapped} else 1 if not any(local) else 0
                    uid, inode = struct.unpack_from("=II", data, 64)
                    if weight and inode:
                        found.append((weight, inode, uid))
    return {inode: uid for _, inode, uid in sorted(found, key=lambda one: -one[0])[:MAX_SOCKETS]}


def _process(inodes: Sequence[int]) -> tuple[int, str, str]:
    """(inode, executable, unit) of a process that holds one of the sockets open, the first ones preferred."""
    ranks = {f"socket:[{inode}]": rank for rank, inode in enumerate(inodes)}
    best, executable, unit = len(inodes), UNKNOWN, UNKNOWN
    ours = _namespace("self")
    with os.scandir("/proc") as entries:
        pids = [entry.name for entry in islice(entries, MAX_PROCESSES) if entry.name.isdigit()]
    for pid in pids:
        if _namespace(pid) != ours:
            continue
        try:
            with os.scandir(f"/proc/{pid}/fd") as files:
                rank = min((ranks.get(_link(file.path), best) for file in files), default=best)
        except OSError:
            continue
        if rank < best:
            best, executable, unit = rank, _link(f"/proc/{pid}/exe") or UNKNOWN, _unit(pid)
            if not best:
                break
    return inodes[best if best < len(inodes) else 0], executable, unit


def _namespace(pid: str) -> str:
    return _link("/proc/thread-self/ns/net" if pid == "self" else f"/proc/{pid}/ns/net")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _unit(pid: str) -> str:
    """The last part of the control group: a unit's name under systemd (cgroups(7))."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return UNKNOWN
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    path = paths.get("", "/")
    path = path if path != "/" else paths.get("name=systemd", "/")
    return path.rstrip("/").rpartition("/")[2][:200] or UNKNOWN
