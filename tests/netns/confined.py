"""Run a program under the restrictions of one of our systemd units, where there is no systemd to do it.

    confined.py UNIT USER WRITABLE[:WRITABLE...] -- PROGRAM ARGUMENT...

Reads the unit itself. Carried out: the user, capabilities, ProtectSystem=strict with the state and runtime directories
writable, PrivateDevices with BindPaths, NoNewPrivileges, MemoryDenyWriteExecute, SystemCallFilter, RestrictNamespaces,
RestrictAddressFamilies, UMask, LimitCORE. The syscall groups are systemd's own (`systemd-analyze syscall-filter`).
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import socket
import stat
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

UNITS = Path(__file__).resolve().parents[2] / "packaging" / "systemd"
LIBC = ctypes.CDLL(None, use_errno=True)
# linux/mount.h, linux/prctl.h, linux/seccomp.h, linux/audit.h, linux/filter.h
MS_BIND, MS_REC, MS_SLAVE, CLONE_NEWNS = 4096, 16384, 1 << 19, 0x20000
MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY, AT_FDCWD = 442, 0x8000, 1, -100
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_MDWE = 38, 22, 65
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, JEQ, JSET, RET = 0x20, 0x15, 0x45, 0x06
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
NAMESPACES = {"net": 0x40000000, "mnt": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "cgroup": 0x2000000}


def unit(name: str) -> dict[str, list[str]]:
    """Directives of the unit's [Service], every value in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in (UNITS / f"{name}.service").read_text().partition("[Service]")[2].splitlines():
        if line.startswith("["):
            break
        key, eq, value = line.partition("=")
        if eq and not line.startswith("#"):
            found[key].append(value)
    return found


def numbers() -> dict[str, int]:
    """Syscall numbers of this machine, from its kernel headers."""
    out = subprocess.run(["cc", "-E", "-dM", "-include", "asm/unistd.h", "-x", "c", "/dev/null"], capture_output=True, text=True, check=True)
    return {m[1]: int(m[2]) for m in re.finditer(r"#define __NR_(\w+) (\d+)", out.stdout)}


def expand(words: list[str]) -> set[str]:
    """Names of the syscalls in groups like @system-service."""
    names: set[str] = set()
    for word in words:
        if word.startswith("@"):
            text = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True).stdout
            names |= expand([line.strip() for line in text.splitlines()[1:] if line.strip() and not line.strip().startswith("#")])
        else:
            names.add(word)
    return names


def allowed(directives: dict[str, list[str]]) -> set[int]:
    names: set[str] = set()
    for value in directives["SystemCallFilter"]:
        if value.startswith("~"):
            names -= expand(value[1:].split())
        else:
            names |= expand(value.split())
    table = numbers()
    return {table[n] for n in names if n in table}


def program(directives: dict[str, list[str]]) -> bytes:
    """The classic BPF program of the unit's filters (seccomp(2))."""
    table = numbers()
    families = {getattr(socket, f) for f in directives["RestrictAddressFamilies"][0].split()}
    spaces = directives["RestrictNamespaces"][0]
    kept = 0 if spaces == "yes" else sum(NAMESPACES[s] for s in spaces.split())
    barred = sum(NAMESPACES.values()) & ~kept
    code: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, 4), (JEQ, 1, 0, ARCHES[os.uname().machine]), (RET, 0, 0, KILL), (LOAD, 0, 0, 0),
        (JEQ, 0, 1, table["clone3"]), (RET, 0, 0, ERRNO | ENOSYS),
    ]  # fmt: skip
    for name in ("unshare", "clone", "setns"):
        argument = 16 + 8 * (1 if name == "setns" else 0)
        # setns(fd, 0) could be any kind, so it needs a named one
        code += [(JEQ, 0, 4, table[name]), (LOAD, 0, 0, argument), (JSET, 0, 1, barred), (RET, 0, 0, ERRNO | EPERM), (LOAD, 0, 0, 0)]
    matches = [(JEQ, 0, 1, family) for family in sorted(families)]
    body = [step for match in matches for step in (match, (RET, 0, 0, ALLOW))]
    code += [(JEQ, 0, len(body) + 2, table["socket"]), (LOAD, 0, 0, 16), *body, (RET, 0, 0, ERRNO | EAFNOSUPPORT)]
    for number in sorted(allowed(directives)):
        code += [(JEQ, 0, 1, number), (RET, 0, 0, ALLOW)]
    code.append((RET, 0, 0, ERRNO | EPERM))
    return b"".join(struct.pack("HBBI", *step) for step in code)


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, flags: int) -> None:
    check(LIBC.mount(source.encode(), target.encode(), None, flags, None), f"mount {target}")


def read_only(path: str, on: bool) -> None:
    attr = struct.pack("QQQQ", MOUNT_ATTR_RDONLY if on else 0, 0 if on else MOUNT_ATTR_RDONLY, 0, 0)
    check(LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attr, len(attr)), f"mount_setattr {path}")


def file_system(directives: dict[str, list[str]], writable: list[str]) -> None:
    """A mount namespace that still follows the machine's (so that new `ip netns` names appear), read-only."""
    check(LIBC.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", MS_REC | MS_SLAVE)
    for path in writable:
        mount(path, path, MS_BIND | MS_REC)
    for path in directives.get("BindPaths", []):
        device = Path(writable[0]).parent / f"bound-{Path(path).name}"
        device.unlink(missing_ok=True)
        number = os.stat(path).st_rdev
        os.mknod(device, stat.S_IFCHR | 0o666, number)
        device.chmod(0o666)  # as udev makes it
        mount(str(device), path, MS_BIND)
    read_only("/", True)
    for path in [*writable, "/proc", "/sys", "/dev"]:
        read_only(path, False)


def main() -> None:
    name, user, places, dashes, *argv = sys.argv[1:]
    assert dashes == "--", "usage"
    directives = unit(name)
    filters = Path(places.split(":")[0]).parent / f"filter-{name}"
    filters.write_bytes(program(directives))
    filters.chmod(0o644)
    file_system(directives, [p for p in places.split(":") if p])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(int(directives["UMask"][0], 8))
    caps = "".join(f",+{c.removeprefix('CAP_').lower()}" for c in directives["CapabilityBoundingSet"][0].split())
    extra = os.environ.pop("CONFINED_EXTRA", "")
    caps = f"-all{caps}{extra}"
    ambient = caps if user != "0" else "-all"
    os.execvp("setpriv", [
        "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", f"--bounding-set={caps}",
        f"--inh-caps={ambient if user != '0' else caps}", f"--ambient-caps={ambient}", "--",
        sys.executable, "-S", str(Path(__file__).with_name("confined_exec.py")), str(filters), *argv,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
