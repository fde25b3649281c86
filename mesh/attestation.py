"""Who is at the other end of a unix socket: facts of the kernel about a process, read so that they are about that process.

    accept -> SO_PEERCRED, SO_PEERPIDFD -> /proc/PID -> the pidfd says it still lives -> the facts are its facts

A process number is used again after a process ended; a pidfd is not (pidfd_open(2)). Kernels before 6.5 cannot name the
peer by pidfd: there it is opened by number at accept, and the effective user that /proc shows has to be the peer's.
The facts are those of whoever called connect(2): a process that hands its connection on answers for what is done with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from identity.errors import Refused, RetinueError
from mesh import netns

SO_PEERPIDFD: Final = 77  # asm-generic/socket.h, Linux 6.5; not in the socket module
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class NotAttested(Refused):
    """The caller cannot be told for certain, so it is nobody."""


@dataclass(frozen=True, slots=True)
class NamespaceId:
    """What names a network namespace while it lives: device and inode of its file in nsfs (namespaces(7))."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Caller:
    """One process. uid and gid as they were at connect(2); `pidfd` is ours to close."""

    pid: int
    uid: int
    gid: int
    pidfd: int = field(repr=False)

    def alive(self) -> bool:
        """Does the process that connected still live?"""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)  # readable once it has ended
        return not poll.poll(0)

    def close(self) -> None:
        """Give the pidfd back."""
        os.close(self.pidfd)

    @contextlib.contextmanager
    def namespace(self) -> Iterator[NamespaceId]:
        """The network namespace it is in now, kept from ending inside the block, so that its inode means nothing else.

        Raises NotAttested.
        """
        try:
            fd = netns.open_path(Path(f"/proc/{self.pid}/ns/net"))
        except RetinueError:
            raise NotAttested("attest.gone", "the calling process has ended or is in no namespace of ours") from None
        except PermissionError:
            raise NotAttested(
                "attest.hidden", f"process {self.pid} may not be looked at", hint="the agent needs CAP_SYS_PTRACE"
            ) from None
        except OSError:
            raise NotAttested("attest.gone", "the calling process has ended") from None
        try:
            found = os.fstat(fd)
            if not self.alive():
                raise NotAttested("attest.gone", "the calling process has ended")
            yield NamespaceId(found.st_dev, found.st_ino)
        finally:
            os.close(fd)


def attest(connection: socket.socket) -> Caller:
    """The process that connected; close it when done. Raises NotAttested ``attest.unseen``, ``attest.gone``."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    if pid <= 0:
        raise NotAttested(
            "attest.unseen", "the calling process is in another PID namespace",
            hint="share the PID namespace of the workload with the agent or sidecar",
        )  # fmt: skip
    try:
        return Caller(pid, uid, gid, _peer_pidfd(connection))
    except OSError as e:
        if e.errno not in {errno.ENOPROTOOPT, errno.EINVAL}:
            raise NotAttested("attest.gone", "the calling process has ended") from None
    return _by_number(pid, uid, gid)


def _peer_pidfd(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)


def _by_number(pid: int, uid: int, gid: int) -> Caller:
    """For kernels that cannot name the peer by pidfd."""
    try:
        caller = Caller(pid, uid, gid, os.pidfd_open(pid))
    except OSError:
        raise NotAttested("attest.gone", "the calling process has ended") from None
    if effective_uid(pid) != uid or not caller.alive():
        caller.close()
        raise NotAttested("attest.gone", "the calling process has ended or changed its user")
    return caller


def effective_uid(pid: int) -> int | None:
    """Effective user of a process (proc(5), status, field Uid); None when there is none."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("Uid:"):
                return int(line.split()[2])
    except (OSError, ValueError, IndexError):
        pass
    return None


def own_namespace() -> NamespaceId:
    """The network namespace of this process."""
    found = os.stat("/proc/self/ns/net")
    return NamespaceId(found.st_dev, found.st_ino)


def namespace_at(place: str) -> NamespaceId | None:
    """The network namespace that a name or path means now; None when there is none.

    The device tells a namespace from a file that merely has the inode number.
    """
    try:
        with netns.opened(place) as fd:
            found = os.fstat(fd)
    except (OSError, RetinueError):
        return None
    return NamespaceId(found.st_dev, found.st_ino)
