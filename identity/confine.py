"""A process gives up what it will not need: files by Landlock, system calls by seccomp. It cannot take them back.

Here and not in a daemon's room, because the daemons of all rooms do it. What to keep is a value (`Bounds`); `enter` asks
the kernel, once, before the process has threads. Sources: landlock(7), seccomp(2), linux/landlock.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from identity.errors import BadState

# linux/landlock.h: rights on files, in the order of their bits; each version of the interface knew this many.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
FILE_RIGHTS: Final = (0, 13, 14, 15, 15, 16, 16, 16)  # index: version
SCOPES: Final = 0b11  # abstract unix sockets and signals stay inside; since version 6
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_WANT_VERSION, _PATH_BENEATH = 1, 1
_ON_FILES: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # the rest make sense on directories only

_NO_NEW_PRIVS, _SECCOMP, _FILTER = 38, 22, 2  # linux/prctl.h, linux/seccomp.h
_ALLOW, _ERRNO, _KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_LOAD, _JEQ, _JGE, _RET = 0x20, 0x15, 0x35, 0x06  # linux/filter.h
_X32: Final = 0x4000_0000
_EPERM: Final = 1

# What none of our processes does after its start: other processes' memory, the kernel itself, mounts, the clock, keyrings.
# asm/unistd.h of each architecture; linux/audit.h names it.
_ARCHITECTURES: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_DENIED: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438, "process_madvise": 440,
        "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320, "reboot": 169,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
        "io_uring_register": 427, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "move_mount": 429,
        "open_tree": 428, "fsopen": 430, "fsmount": 432, "mount_setattr": 442, "swapon": 167, "swapoff": 168, "acct": 163,
        "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305, "adjtimex": 159, "add_key": 248, "request_key": 249,
        "keyctl": 250, "open_by_handle_at": 304, "iopl": 172, "ioperm": 173, "quotactl": 179, "syslog": 103, "vhangup": 153,
        "personality": 135, "sethostname": 170, "setdomainname": 171,
    },
    "aarch64": {
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "pidfd_getfd": 438, "process_madvise": 440,
        "init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104, "kexec_file_load": 294, "reboot": 142,
        "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "io_uring_enter": 426,
        "io_uring_register": 427, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "move_mount": 429,
        "open_tree": 428, "fsopen": 430, "fsmount": 432, "mount_setattr": 442, "swapon": 224, "swapoff": 225, "acct": 89,
        "settimeofday": 170, "clock_settime": 112, "clock_adjtime": 266, "adjtimex": 171, "add_key": 217, "request_key": 218,
        "keyctl": 219, "open_by_handle_at": 265, "quotactl": 60, "syslog": 116, "vhangup": 58, "personality": 92,
        "sethostname": 161, "setdomainname": 162,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bounds:
    """Directories and files that stay usable; None: all files do. Reading includes execution."""

    read: tuple[Path, ...] | None
    write: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Entered:
    """What is in force: the version of Landlock (0: the kernel has none), and the system-call filter."""

    landlock: int
    seccomp: bool


def code_places() -> tuple[Path, ...]:
    """Where a Python process of this installation reads its code, its libraries and the system's settings."""
    here = Path(__file__).resolve().parent.parent
    found = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent, here]
    found += [Path(p) for p in sys.path if p and Path(p).is_dir()]
    found += [Path(p) for p in ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev", "/run/systemd")]
    return tuple(dict.fromkeys(p for p in found if p.exists()))


def enter(bounds: Bounds) -> Entered:
    """Give up everything outside the bounds, for this thread and all it makes. Raises BadState ``confine.failed``.

    A kernel without Landlock, or an architecture we have no table for, is no error: `Entered` says what holds.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise _failed("PR_SET_NO_NEW_PRIVS")
    version = 0 if bounds.read is None else _landlock(libc, bounds.read, bounds.write)
    return Entered(version, _seccomp(libc, os.uname().machine))


def _landlock(libc: ctypes.CDLL, read: Sequence[Path], write: Sequence[Path]) -> int:
    version = int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), _WANT_VERSION))
    if version < 1:
        return 0
    handled = (1 << FILE_RIGHTS[min(version, len(FILE_RIGHTS) - 1)]) - 1
    attributes = struct.pack("QQQ", handled, 0, SCOPES) if version >= 6 else struct.pack("Q", handled)
    rules = int(libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    if rules < 0:
        raise _failed("landlock_create_ruleset")
    try:
        reading = EXECUTE | READ_FILE | READ_DIR
        for path in read:
            _allow(libc, rules, path, reading & handled)
        for path in (*write, Path("/dev/null")):
            _allow(libc, rules, path, handled & ~EXECUTE)
        if libc.syscall(_RESTRICT, rules, 0) != 0:
            raise _failed("landlock_restrict_self")
    finally:
        os.close(rules)
    return version


def _allow(libc: ctypes.CDLL, rules: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not path.is_dir():
            rights &= _ON_FILES
        rule = struct.pack("=Qi", rights, fd)
        if libc.syscall(_ADD, rules, _PATH_BENEATH, rule, 0) != 0:
            raise _failed(f"landlock_add_rule {path}")
    finally:
        os.close(fd)


def filter_program(machine: str, denied: Iterable[int]) -> bytes:
    """The classic BPF program that refuses these system calls with EPERM; a foreign calling convention kills (pure)."""
    code = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, _ARCHITECTURES[machine]), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        code += [(_JGE, 0, 1, _X32), (_RET, 0, 0, _KILL)]
    for number in sorted(denied):
        code += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ERRNO | _EPERM)]
    code.append((_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in code)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _seccomp(libc: ctypes.CDLL, machine: str) -> bool:
    if machine not in _DENIED:
        return False
    code = filter_program(machine, _DENIED[machine].values())
    if libc.prctl(_SECCOMP, _FILTER, ctypes.byref(_Program(len(code) // 8, code)), 0, 0) != 0:
        if ctypes.get_errno() == 22:  # EINVAL: a kernel built without it
            return False
        raise _failed("PR_SET_SECCOMP")
    return True


def _failed(what: str) -> BadState:
    return BadState("confine.failed", f"{what}: {os.strerror(ctypes.get_errno())}", hint="this kernel refuses to confine the process")
