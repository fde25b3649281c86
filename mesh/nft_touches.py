"""Which commits of nftables touched one table: the kernel tells of every one, so that those of others need no look at ours.

The messages of a commit come in its order and end with its generation (linux/netfilter/nf_tables.h: NFT_MSG_NEWGEN). What
was lost (ENOBUFS, a gap between generations) is not known, and `between` says so.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from mesh import nft
from mesh.netlink_watch import RULESETS, Watcher

REMEMBERED: Final = 256  # commits that touched the table


class Touches:
    """`changed` is called on the event loop after every commit of anyone."""

    def __init__(self, table: str, changed: Callable[[], None]) -> None:
        self._name = table.encode() + b"\0"
        self._watcher = Watcher(RULESETS, changed, self._take)
        self._since: int | None = None  # all commits after this generation are known, up to `_seen`
        self._seen = 0
        self._lost = False  # since the socket last ran dry
        self._ours = False  # does the commit whose messages are being read name the table?
        self._touched: deque[int] = deque(maxlen=REMEMBERED)

    def start(self) -> None:
        """Subscribe. Raises NoPrivilege."""
        self._watcher.start()
        self._anchor()

    def stop(self) -> None:
        """Unsubscribe; nothing is known afterwards."""
        self._watcher.stop()
        self._since = None

    def between(self, since: int, until: int) -> int | None:
        """How many commits after generation `since`, up to `until`, touched the table; None when that is not known."""
        if not self._watcher.drain() or self._since is None:
            return None
        if not self._since <= since <= until <= self._seen:
            return None
        if len(self._touched) == REMEMBERED and since < self._touched[0]:
            return None
        return sum(since < one <= until for one in self._touched)

    def behind(self, generation: int) -> bool:
        """Will the kernel still tell of that one? It is in force a moment before its messages are sent."""
        return self._watcher.drain() and self._since is not None and self._seen < generation

    def _anchor(self) -> None:
        """Begin to know: whatever was committed before this generation was queued or lost before the socket ran dry."""
        now = nft.generation()
        self._watcher.drain()
        self._since = max(now, self._seen)
        self._seen, self._ours = self._since, False

    def _take(self, data: bytes | None) -> None:
        """See Watcher. A commit that was lost in part may still end with its generation: it counts as not known."""
        if not data:
            if data is None:
                self._since = None
            self._lost = data is None
            return
        at = 0
        while at + 16 <= len(data):
            size, kind = struct.unpack_from("=IH", data, at)
            if size < 16 or at + size > len(data):
                self._since = None
                return
            if kind == nft.NEWGEN:
                self._committed(nft.generation_of(data[at : at + size]))
            elif not self._ours:
                # A name of another kind is one look too many, no more.
                self._ours = self._name in data[at : at + size]
            at += (size + 3) & ~3

    def _committed(self, generation: int) -> None:
        if self._since is None or generation != self._seen + 1:
            self._since = None if self._lost else generation  # what came before is not known whole
        if self._ours:
            self._touched.append(generation)
        self._seen, self._ours = generation, False
