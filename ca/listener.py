"""The TLS front of the endpoints' API: handshakes are bounded, by source and together, before anything is known of a peer.

A connection that does not finish its handshake costs memory and says nothing. Of one source at most `per_source` are kept
half-open, of all together `half_open`; beyond that the oldest makes room once it had `grace_s`, which is far more than an
honest handshake takes, and a newcomer is turned away while none had. Where all together are too many, the source that holds
the most makes room at once for one that holds less, so a few addresses keep no other out. Established connections have a
limit of their own.

Handshakes are the dearest thing a herd can ask for. `at_once` of them have a turn; the others wait in the kernel's queue, so
that between two of them everybody else is served. A turn ends after `turn_s`: who is slow goes on, but holds nobody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import time
from asyncio import sslproto
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from ca.http import source

log = structlog.get_logger("retinue.ca.listener")

SPARE_FILES: Final = 256  # for the database, logs and administrators
PAUSE_S: Final = 0.2  # after the system had no file or memory for a connection
READ_SIZE: Final = 4 * 1024
SAY_S: Final = 10.0  # between two log lines about refusals


@dataclass(frozen=True, slots=True)
class Caps:
    """Connections at once: half-open of one source, half-open of all, established. Times in seconds.

    Of silent peers half_open / grace_s are let in a second, each for a turn of turn_s: fewer than at_once at a time, so
    they alone never take every turn.
    """

    per_source: int = 256
    half_open: int = 384
    established: int = 16_384
    grace_s: float = 2.0
    handshake_s: float = 10.0
    at_once: int = 32
    turn_s: float = 0.1


@dataclass(slots=True)
class _Half:
    """A connection in its handshake."""

    sock: socket.socket
    source: str
    since: float
    task: asyncio.Task[None] | None = None
    turn: asyncio.TimerHandle | None = None  # until its turn ends


class Listener:
    """Accepts on a bound socket until `close`. `established` says how many connections the protocol side has."""

    def __init__(
        self, sock: socket.socket, factory: Callable[[], asyncio.Protocol], tls: ssl.SSLContext,
        established: Callable[[], int], caps: Caps | None = None,
    ) -> None:  # fmt: skip
        self._sock, self._factory, self._tls, self._established = sock, factory, tls, established
        self._caps = caps or Caps()
        self._half: OrderedDict[int, _Half] = OrderedDict()  # oldest first
        self._of: defaultdict[str, OrderedDict[int, _Half]] = defaultdict(OrderedDict)
        self._number = 0
        self._refused, self._said = 0, 0.0
        self._turns = asyncio.Semaphore(self._caps.at_once)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    @property
    def half_open(self) -> int:
        """Connections in their handshake."""
        return len(self._half)

    def use(self, tls: ssl.SSLContext) -> None:
        """Another context for the handshakes from now on: OpenSSL cannot drop a root from a living one."""
        self._tls = tls

    async def close(self) -> None:
        """Stop accepting and end the handshakes; established connections stay."""
        left = list(self._half.values())
        tasks = [self._accepting, *(h.task for h in left if h.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted let go of their sockets
        for half in left:
            half.sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._turns.acquire()
            try:
                sock, address = await loop.sock_accept(self._sock)
            except OSError as e:
                self._turns.release()
                log.warning("a connection could not be taken", why=e.strerror)
                await asyncio.sleep(PAUSE_S)
                continue
            half = self._admit(sock, source(str(address[0])))
            if half is None:
                self._turns.release()
                continue
            half.turn = loop.call_later(self._caps.turn_s, self._turn_over, half)
            assert half.task is not None
            half.task.add_done_callback(partial(self._done, half))

    def _done(self, half: _Half, _: asyncio.Task[None]) -> None:
        self._turn_over(half)

    def _turn_over(self, half: _Half) -> None:
        turn, half.turn = half.turn, None
        if turn is not None:
            turn.cancel()
            self._turns.release()

    def _admit(self, sock: socket.socket, origin: str) -> _Half | None:
        caps, now = self._caps, time.monotonic()
        mine = len(self._of.get(origin, ()))
        if mine >= caps.per_source or len(self._half) >= caps.half_open:
            most = max(self._of.values(), key=len)
            if mine < caps.per_source and len(most) > mine + 1:
                oldest = next(iter(most.values()))  # who holds the most makes room for who holds less, however young
            else:
                oldest = next(iter((self._of[origin] if mine >= caps.per_source else self._half).values()))
                if now - oldest.since < caps.grace_s:
                    self._refuse(sock, origin)
                    return None
            self._end(oldest)
        if self._established() + len(self._half) >= caps.established:
            self._refuse(sock, origin)
            return None
        self._number += 1
        half = _Half(sock, origin, now)
        self._half[self._number] = self._of[origin][self._number] = half
        half.task = asyncio.get_running_loop().create_task(self._shake(half, self._number))
        return half

    async def _shake(self, half: _Half, number: int) -> None:
        try:
            with contextlib.suppress(OSError):  # a handshake that fails is the peer's business
                half.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await asyncio.get_running_loop().connect_accepted_socket(
                    self._factory, half.sock, ssl=self._tls, ssl_handshake_timeout=self._caps.handshake_s,
                    ssl_shutdown_timeout=1.0,
                )  # fmt: skip
        finally:
            self._forget(half, number)

    def _end(self, half: _Half) -> None:
        number = next(n for n, h in self._of[half.source].items() if h is half)
        self._forget(half, number)
        with contextlib.suppress(OSError):
            half.sock.shutdown(socket.SHUT_RDWR)  # also when its transport has not begun to read
        if half.task is not None:
            half.task.cancel()

    def _forget(self, half: _Half, number: int) -> None:
        self._half.pop(number, None)
        mine = self._of[half.source]
        mine.pop(number, None)
        if not mine:
            del self._of[half.source]

    def _refuse(self, sock: socket.socket, origin: str) -> None:
        sock.close()
        self._refused += 1
        if time.monotonic() - self._said >= SAY_S:
            log.warning("connections were turned away", count=self._refused, latest=origin)
            self._refused, self._said = 0, time.monotonic()


def small_buffers() -> None:
    """Let asyncio keep 4 KiB for what a TLS peer sends, in place of 256 KiB: it is held, touched, by every connection.

    Endpoints send requests of a few KiB; the size of the buffer bounds nothing but one read.
    """
    if hasattr(sslproto.SSLProtocol, "max_size"):
        sslproto.SSLProtocol.max_size = READ_SIZE


def allow_files(wanted: int) -> int:
    """Raise this process's limit of open files as far as needed and allowed; how many connections it then may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + SPARE_FILES:
        most = wanted + SPARE_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + SPARE_FILES)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))
