"""Loss probes: a sender of sequence-numbered messages and a receiver that keeps the set of what arrived.

UDP and TCP, IPv4 and IPv6, in any namespace, on the running asyncio loop. The receiver tells senders apart by source
address and tag, so that one port serves a permitted and a denied sender at once, and a forger cannot pass for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, Self

from mesh.probe import Sockets, error_name, family_of

Transport = Literal["udp", "tcp"]
CONNECT_TIMEOUT: Final = 0.25  # seconds
MAX_MESSAGE: Final = 2048


@dataclass(slots=True)
class Delivered:
    """What arrived from one source under one tag. Times are CLOCK_MONOTONIC seconds."""

    seqs: set[int] = field(default_factory=set)
    duplicates: int = 0
    first: float = 0.0
    last: float = 0.0
    longest_gap_ms: float = 0.0

    def add(self, seq: int, now: float) -> None:
        if self.seqs:
            self.longest_gap_ms = max(self.longest_gap_ms, (now - self.last) * 1000)
        else:
            self.first = now
        self.last = now
        if seq in self.seqs:
            self.duplicates += 1
        self.seqs.add(seq)


def parse_message(line: bytes) -> tuple[str, int] | None:
    """``tag seq`` or None for anything else."""
    tag, space, seq = line.strip().rpartition(b" ")
    if not space or not seq.isdigit() or len(seq) > 12:
        return None
    return tag.decode("latin-1"), int(seq)


class Receiver:
    """Binds `address` (None: all of `family`) and `port` until closed. `arrived` maps (source, tag) to what came."""

    def __init__(
        self, transport: Transport, port: int, *, netns: str | None = None, address: str | None = None, v6: bool = False
    ) -> None:
        self.arrived: dict[tuple[str, str], Delivered] = {}
        self._transport, self._port = transport, port
        self._family = family_of(address) if address else socket.AF_INET6 if v6 else socket.AF_INET
        self._address = address or ("::" if self._family == socket.AF_INET6 else "0.0.0.0")
        self._sockets = Sockets(netns)
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._socket: socket.socket | None = None

    async def __aenter__(self) -> Self:
        kind = socket.SOCK_DGRAM if self._transport == "udp" else socket.SOCK_STREAM
        sock = self._socket = self._sockets.make(self._family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((self._address, self._port))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        self._spawn(self._datagrams(sock) if kind == socket.SOCK_DGRAM else self._accept(sock))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
        self._sockets.close()

    def of(self, tag: str, source: str | None = None) -> Delivered:
        """What arrived under a tag, from one source or from all (merged)."""
        found = [d for (src, t), d in self.arrived.items() if t == tag and source in {None, src}]
        if len(found) == 1:
            return found[0]
        merged = Delivered(set().union(*(d.seqs for d in found)), sum(d.duplicates for d in found))
        merged.first, merged.last = min((d.first for d in found), default=0.0), max((d.last for d in found), default=0.0)
        return merged

    async def wait(self, tag: str, count: int, timeout: float = 10.0) -> None:
        """Until `count` different messages of a tag arrived. Raises TimeoutError."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: len(self.of(tag).seqs) >= count)

    async def wait_more(self, tag: str, more: int, timeout: float = 10.0) -> None:
        """Until `more` further messages of a tag arrived. Raises TimeoutError."""
        await self.wait(tag, len(self.of(tag).seqs) + more, timeout)

    def _spawn(self, coroutine: object) -> None:
        task = asyncio.ensure_future(coroutine)  # type: ignore[call-overload]  # a coroutine of one of two methods
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _note(self, source: str, lines: Iterable[bytes]) -> None:
        now = time.monotonic()
        async with self._changed:
            for line in lines:
                if (message := parse_message(line)) is not None:
                    self.arrived.setdefault((source, message[0]), Delivered()).add(message[1], now)
            self._changed.notify_all()

    async def _datagrams(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(OSError):
                data, peer = await loop.sock_recvfrom(sock, MAX_MESSAGE)
                await self._note(peer[0], [data])

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, peer = await loop.sock_accept(sock)
            self._spawn(self._lines(connection, peer[0]))

    async def _lines(self, sock: socket.socket, source: str) -> None:
        loop, rest = asyncio.get_running_loop(), b""
        with sock, contextlib.suppress(OSError):
            while data := await loop.sock_recv(sock, 65536):
                *lines, rest = (rest + data).split(b"\n")
                await self._note(source, lines)


class Sender:
    """Sends ``tag seq`` at `rate` per second from `start` to `stop`.

    TCP keeps one connection and, when it fails, connects again (at most once a tick); a message that was written to a
    connection which then broke may not have arrived: the receiver's set is the truth.
    """

    def __init__(
        self, transport: Transport, to: str, port: int, *, tag: str, rate: float = 200.0,
        netns: str | None = None, bind: str | None = None,
    ) -> None:  # fmt: skip
        self.sent = 0  # messages given to the kernel; their numbers are 0..sent-1
        self.attempts = 0
        self.connections = 0
        self.errors: Counter[str] = Counter()
        self._transport, self._to, self._rate, self._tag, self._bind = transport, (to, port), rate, tag, bind
        self._family = family_of(to)
        self._changed = asyncio.Condition()
        self._sockets = Sockets(netns)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def stop(self) -> Self:
        """Send no more and close."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._drop()
        self._sockets.close()
        return self

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def attempted(self, more: int, timeout: float = 10.0) -> None:
        """Wait until `more` further sends were tried, successful or not. Raises TimeoutError."""
        goal = self.attempts + more
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: self.attempts >= goal)

    def lost(self, delivered: Delivered) -> list[int]:
        """Numbers that were sent and did not arrive."""
        return sorted(set(range(self.sent)) - delivered.seqs)

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _run(self) -> None:
        begin = time.monotonic()
        while True:
            async with self._changed:
                self.attempts += 1
                self._changed.notify_all()
            try:
                await self._send(f"{self._tag} {self.sent}\n".encode())
                self.sent += 1
            except OSError as e:
                self.errors[error_name(e)] += 1
                if self._transport == "tcp":
                    self._drop()
            await asyncio.sleep(max(0.0, begin + self.attempts / self._rate - time.monotonic()))

    async def _send(self, message: bytes) -> None:
        loop = asyncio.get_running_loop()
        if self._socket is None:
            kind = socket.SOCK_DGRAM if self._transport == "udp" else socket.SOCK_STREAM
            sock = self._sockets.make(self._family, kind)
            try:
                if self._bind is not None:
                    sock.bind((self._bind, 0))
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await loop.sock_connect(sock, self._to)
            except BaseException:
                sock.close()
                raise
            self._socket = sock
            self.connections += 1
        await loop.sock_sendall(self._socket, message)
