"""Network namespaces: resolve a name or path, tell two apart, run a function inside one."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from identity.errors import BadInput, NoPrivilege, NotFound, Refused, RetinueError

T = TypeVar("T")

NAMED: Final = Path("/run/netns")  # where iproute2 keeps them
CLONE_NEWNET: Final = 0x4000_0000  # linux/sched.h
_NS_GET_NSTYPE: Final = 0xB703  # linux/nsfs.h
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,254}")


def path_of(netns: str) -> Path:
    """Path of a namespace given by name (``ip netns``) or by absolute path. Raises BadInput."""
    if netns.startswith("/"):
        if "\0" in netns or len(netns) > 4096:
            raise BadInput("netns.path", "not a path of a network namespace")
        return Path(netns)
    if not _NAME.fullmatch(netns):
        raise BadInput("netns.name", f"not a network namespace: {ascii(netns)[:80]}",
                       hint="give a name of `ip netns list`, or a path such as /proc/PID/ns/net")  # fmt: skip
    return NAMED / netns


def open_here(path: Path) -> int:
    """Open the file of a namespace with privileges of our own. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


_opener: Callable[[Path], int] = open_here


def open_with(opener: Callable[[Path], int]) -> None:
    """From now on this process has namespaces opened by somebody who may (mesh/broker.py). Called once, at its start."""
    global _opener
    _opener = opener


def open_path(path: Path) -> int:
    """The namespace file at a path, opened by whom this process has for it. Raises OSError, RetinueError."""
    return _opener(path)


def is_network(fd: int) -> bool:
    """Is it a network namespace, and no other file?"""
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


@contextlib.contextmanager
def opened(netns: str) -> Iterator[int]:
    """A file descriptor of the namespace. Raises NotFound, BadInput (something else), NoPrivilege."""
    path = path_of(netns)
    try:
        fd = open_path(path)
    except PermissionError:
        raise NoPrivilege("netns.privilege", f"may not open {path}", hint="run as root") from None
    except OSError as e:
        raise NotFound("netns.unknown", f"no network namespace {ascii(netns)[:80]}: {e.strerror}",
                       hint="see `ip netns list`, or give /proc/PID/ns/net of a running process") from None  # fmt: skip
    try:
        if not is_network(fd):
            raise BadInput("netns.kind", f"{path} is not a network namespace")
        yield fd
    finally:
        os.close(fd)


def identify(netns: str) -> int:
    """The inode number that names the namespace while it lives. Raises as `opened`."""
    with opened(netns) as fd:
        return os.fstat(fd).st_ino


def own() -> int:
    """Inode of the namespace of this process."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def foreign(netns: str) -> int:
    """`identify`, for a namespace that must not be our own. Raises Refused too."""
    inode = identify(netns)
    if inode == own():
        raise Refused("netns.own", "that is the network namespace of the agent itself", hint="attach with kind host instead")
    return inode


def inside(netns: str, work: Callable[[], T], *, inode: int | None = None) -> T:
    """Run `work` on a thread of its own inside the namespace; blocks. Raises what `opened` and `work` raise.

    inode: refuse when the name means another namespace by now. Sockets that `work` makes stay in the namespace.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            with opened(netns) as fd:
                if inode is not None and os.fstat(fd).st_ino != inode:
                    raise NotFound("netns.replaced", f"{ascii(netns)[:80]} is another network namespace by now")
                _enter(fd)
            result.append(work())
        except BaseException as e:
            failure.append(e)

    # The thread ends inside the namespace and is never used again, so nothing can be left in the wrong one.
    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _enter(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        cls: type[RetinueError] = NoPrivilege if number == 1 else NotFound
        raise cls("netns.enter", f"cannot enter the network namespace: {os.strerror(number)}", hint="run as root")


def sysctl(name: str, value: str | None = None) -> str | None:
    """Read (and write, when `value` is given and differs) ``net.…`` of the calling thread's namespace.

    `name` is slash-separated below /proc/sys/net, for interface names may hold dots. Returns the old value, None when
    the kernel has no such setting.
    """
    path = Path("/proc/sys/net") / name
    try:
        old = path.read_text().strip()
        if value is not None and old != value:
            path.write_text(value)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise NoPrivilege("host.sysctl", f"may not write {path}", hint="run as root, with /proc/sys writable") from None
    except OSError as e:
        raise Refused("host.sysctl", f"cannot set {path}: {e.strerror}") from None
    return old
