"""Notices what changes in a network namespace, by whomever, so that nobody has to look all the time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Final

from identity.errors import NoPrivilege

_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
# linux/netlink.h, linux/netfilter/nfnetlink.h
_NETLINK_ROUTE: Final = 0
_NETLINK_NETFILTER: Final = 12
_NFNLGRP_NFTABLES: Final = 7
_DATAGRAM: Final = 65536
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
_BUFFER: Final = 4 * 1024 * 1024  # the messages of whole tables, while we are busy; the default lost them
# linux/rtnetlink.h: links, addresses, routes and rules of both families, and what is forwarded
_RTNLGRP: Final = (1, 5, 7, 8, 9, 11, 19, 24, 25)

RULESETS: Final = (_NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,))  # every commit of nftables
NETWORK: Final = (_NETLINK_ROUTE, _RTNLGRP)


class Watcher:
    """Calls `changed` on the event loop whenever one of the groups tells of a change, ours included.

    take: gets every datagram, None when some were lost, and an empty one when nothing more waits. After a loss the kernel
    queues nothing until that.
    """

    def __init__(
        self,
        what: tuple[int, tuple[int, ...]],
        changed: Callable[[], None],
        take: Callable[[bytes | None], None] = lambda _: None,
    ) -> None:
        self._protocol, self._groups = what
        self._changed = changed
        self._take = take
        self._sock: socket.socket | None = None

    def start(self) -> None:
        """Subscribe. Raises NoPrivilege."""
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, self._protocol)
        try:
            with contextlib.suppress(PermissionError):
                sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            sock.bind((0, 0))
            for group in self._groups:
                sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except PermissionError:
            sock.close()
            raise NoPrivilege(
                "netlink.watch", "may not watch the network's settings", hint="run as root"
            ) from None
        asyncio.get_running_loop().add_reader(sock.fileno(), self._readable)
        self._sock = sock

    def _readable(self) -> None:
        self.drain()
        self._changed()

    def drain(self) -> bool:
        """Read what has come. False when nothing is watched."""
        if self._sock is None:
            return False
        while True:
            try:
                data = self._sock.recv(_DATAGRAM, socket.MSG_TRUNC)
            except BlockingIOError:
                self._take(b"")
                return True
            except OSError as e:
                self._take(None)  # ENOBUFS: notifications were lost, and something certainly changed
                if e.errno != errno.ENOBUFS:
                    return False
            else:
                self._take(data if len(data) <= _DATAGRAM else None)

    def stop(self) -> None:
        """Unsubscribe."""
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
