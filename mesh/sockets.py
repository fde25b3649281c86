"""Which process uses a socket: the kernel's socket listing of a namespace, then the open files of its processes.

A short-lived client is often gone before anybody can look; then what is not known is said to be unknown.
"""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import ip_address
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


def owner(flow: Conversation, *, source: bool) -> ProcessInfo:
    """Who uses the socket at one end of a flow, in the network namespace of the calling thread. Blocking."""
    if flow.proto not in {TCP, UDP}:
        return ProcessInfo()
    port, address = (flow.sport, flow.src) if source else (flow.dport, flow.dst)
    found = _socket(flow, address, port)
    if found is None:
        return ProcessInfo()
    inode, uid = found
    return ProcessInfo(*_process(inode), uid)


def _socket(flow: Conversation, address: str, port: int) -> tuple[int, int] | None:
    """(inode, uid) of the socket bound to that port; one bound to the address before one bound to any."""
    families = [socket.AF_INET6] if ":" in address else [socket.AF_INET, socket.AF_INET6]
    best: tuple[int, int, int] | None = None
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
                    if weight and inode and (best is None or weight > best[0]):
                        best = (weight, inode, uid)
    return None if best is None else (best[1], best[2])


def _process(inode: int) -> tuple[str, str]:
    """(executable, unit) of a process that holds the socket open."""
    wanted = f"socket:[{inode}]"
    ours = _namespace("self")
    for number, entry in enumerate(os.scandir("/proc")):
        if number > MAX_PROCESSES:
            break
        if not entry.name.isdigit() or _namespace(entry.name) != ours:
            continue
        try:
            if any(_link(f.path) == wanted for f in os.scandir(f"/proc/{entry.name}/fd")):
                return _link(f"/proc/{entry.name}/exe") or UNKNOWN, _unit(entry.name)
        except OSError:
            continue
    return UNKNOWN, UNKNOWN


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
