"""Request probes: HTTP at a fixed rate with sequence numbers, single requests with the time to refusal, open streams.

Standard library only, so that a probe starts at once: `python -m mesh.probe get|http|stream URL` runs inside a
workload's namespace and prints JSON; tests use the classes in process with `netns=`.

Honest counting: a request has `window` seconds to be answered, from its scheduled time; failed attempts are repeated on
new connections meanwhile and such a request counts as `retried`. Unanswered then means lost. `gap_ms` is the
longest time without any answer while requests were due, both ends of the run included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

RETRY_PAUSE: Final = 0.01  # seconds between attempts, so that a refusal does not become a flood
MAX_RESPONSE: Final = 1 << 20


class Sockets:
    """Makes non-blocking sockets in a network namespace (None: the present one), on one thread that lives there."""

    def __init__(self, netns: str | None = None) -> None:
        self._pool: ThreadPoolExecutor | None = None
        if netns is not None:
            from mesh.lab_process import enter

            self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"sockets-{netns}", initializer=enter, initargs=(netns,))

    def make(self, family: int, kind: int) -> socket.socket:
        """A socket. Raises OSError."""
        sock = socket.socket(family, kind) if self._pool is None else self._pool.submit(socket.socket, family, kind).result()
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False)


def family_of(address: str) -> int:
    """AF_INET6 for an address with a colon, else AF_INET."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@dataclass(frozen=True, slots=True)
class Answer:
    """One attempt. `ms` runs from connect() to the answer or the refusal; `error` is an errno name or ``timeout``."""

    status: int | None
    ms: float
    error: str | None = None
    served_by: str = ""
    body: bytes = b""

    @property
    def ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def error_name(e: BaseException) -> str:
    """``ECONNREFUSED``, ``EHOSTUNREACH``, ``timeout``, ``cut``, or the type's name."""
    if isinstance(e, TimeoutError):
        return "timeout"
    if isinstance(e, OSError) and e.errno is not None:
        return errno.errorcode.get(e.errno, str(e.errno))
    return "cut" if isinstance(e, EOFError) else type(e).__name__


@dataclass(frozen=True, slots=True)
class Target:
    """Where an ``http://ADDRESS:PORT/path`` URL points; addresses only, no name resolution."""

    address: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Target:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"not an http://ADDRESS:PORT/ URL: {url}")
        return cls(parts.hostname, parts.port or 80, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))

    def request(self, seq: int) -> bytes:
        host = f"[{self.address}]" if ":" in self.address else self.address
        lines = [f"GET {self.path} HTTP/1.1", f"Host: {host}:{self.port}", f"X-Seq: {seq}", "Connection: close", "", ""]
        return "\r\n".join(lines).encode()


async def _receive(sock: socket.socket) -> bytes:
    data = await asyncio.get_running_loop().sock_recv(sock, 65536)
    if not data:
        raise EOFError
    return data


async def get(target: Target, sockets: Sockets, *, seq: int = 0, timeout: float = 1.0) -> Answer:
    """One request on one new connection; never raises for what the network does."""
    loop = asyncio.get_running_loop()
    begin = time.monotonic()
    sock: socket.socket | None = None
    try:
        sock = sockets.make(family_of(target.address), socket.SOCK_STREAM)
        async with asyncio.timeout(timeout):
            await loop.sock_connect(sock, (target.address, target.port))
            await loop.sock_sendall(sock, target.request(seq))
            data = b""
            while chunk := await loop.sock_recv(sock, 65536):
                data += chunk
                if len(data) > MAX_RESPONSE:
                    raise EOFError
        head, found, body = data.partition(b"\r\n\r\n")
        if not found:
            raise EOFError
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        if headers.get("x-seq", str(seq)) != str(seq) or int(headers.get("content-length", len(body))) != len(body):
            raise EOFError
        return Answer(int(lines[0].split()[1]), (time.monotonic() - begin) * 1000, None, headers.get("x-served-by", ""), body)
    except (OSError, EOFError, ValueError, IndexError) as e:
        return Answer(None, (time.monotonic() - begin) * 1000, error_name(e))
    finally:
        if sock is not None:
            sock.close()


@dataclass(slots=True)
class HttpResult:
    """What became of the requests of one run. sent = answered + lost; retried is a part of answered."""

    sent: int = 0
    answered: int = 0
    retried: int = 0
    lost: int = 0
    gap_ms: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    attempts: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    served_by: dict[str, int] = field(default_factory=dict)
    lost_seqs: list[int] = field(default_factory=list)


class HttpProber:
    """GETs at `rate` per second on new connections, on an absolute schedule, from `start` to `stop`."""

    def __init__(
        self, urls: Sequence[str], *, rate: float = 100.0, timeout: float = 0.25, window: float = 1.0, netns: str | None = None
    ) -> None:
        self._targets = [Target.parse(u) for u in urls]
        self._rate, self._timeout, self._window = rate, timeout, window
        self._sockets = Sockets(netns)
        self._result = HttpResult()
        self._errors: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._answers: list[tuple[float, float]] = []  # (when, how long in seconds)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._progress = asyncio.Condition()
        self._begin = self._last = 0.0
        self._runner: asyncio.Task[None] | None = None

    def start(self) -> HttpProber:
        """Begin on the running loop."""
        self._runner = asyncio.create_task(self._run())
        return self

    async def answered(self, more: int, timeout: float = 10.0) -> None:
        """Wait for this many further answers. Raises TimeoutError."""
        goal = self._result.answered + more
        async with asyncio.timeout(timeout), self._progress:
            await self._progress.wait_for(lambda: self._result.answered >= goal)

    @property
    def lost_so_far(self) -> int:
        """Requests whose window is over without an answer."""
        return len(self._result.lost_seqs)

    async def progressed(self, timeout: float = 10.0) -> None:
        """Wait until one more request was answered or lost. Raises TimeoutError."""
        async with asyncio.timeout(timeout), self._progress:
            await self._progress.wait()

    async def stop(self) -> HttpResult:
        """Send no more, give what is under way its window, and count."""
        self._stopping.set()
        if self._runner is not None:
            await self._runner
        await asyncio.gather(*self._tasks)
        self._sockets.close()
        result = self._result
        result.errors, result.served_by = dict(self._errors), dict(self._served)
        result.lost = result.sent - result.answered
        times = sorted(when for when, _ in self._answers)
        edges = [self._begin, *times, max(self._last, times[-1] if times else self._last)]
        result.gap_ms = round(max((b - a for a, b in zip(edges, edges[1:], strict=False)), default=0.0) * 1000, 1)
        spent = sorted(s for _, s in self._answers)
        if spent:
            result.p50_ms = round(spent[len(spent) // 2] * 1000, 2)
            result.p99_ms = round(spent[min(len(spent) - 1, len(spent) * 99 // 100)] * 1000, 2)
        return result

    async def _run(self) -> None:
        self._begin = time.monotonic()
        while not self._stopping.is_set():
            due = self._begin + self._result.sent / self._rate
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    await self._stopping.wait()
                    return
            task = asyncio.create_task(self._one(self._result.sent, due))
            self._result.sent += 1
            self._last = due
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, seq: int, due: float) -> None:
        target = self._targets[seq % len(self._targets)]
        tries = 0
        while (left := due + self._window - time.monotonic()) > 0:
            tries += 1
            self._result.attempts += 1
            answer = await get(target, self._sockets, seq=seq, timeout=min(self._timeout, left))
            if answer.ok:
                now = time.monotonic()
                self._answers.append((now, now - due))
                self._served[answer.served_by] += 1
                async with self._progress:
                    self._result.answered += 1
                    self._result.retried += tries > 1
                    self._progress.notify_all()
                return
            self._errors[answer.error or str(answer.status)] += 1
            await asyncio.sleep(RETRY_PAUSE)
        async with self._progress:
            self._result.lost_seqs.append(seq)
            self._progress.notify_all()


@dataclass(slots=True)
class StreamResult:
    """An open response read until it ended. Times are CLOCK_MONOTONIC seconds, comparable across processes."""

    opened: bool = False
    ticks: int = 0
    first: float = 0.0
    last: float = 0.0
    ended: str = ""  # silence, cut, stopped or an errno name
    longest_gap_ms: float = 0.0


async def stream(
    target: Target, sockets: Sockets, *, silence: float, stop: asyncio.Event | None = None, on_open: Any = None
) -> StreamResult:  # fmt: skip
    """Read one response until nothing came for `silence` seconds, the connection was cut, or `stop` is set."""
    loop, result = asyncio.get_running_loop(), StreamResult()
    stopped = asyncio.create_task((stop or asyncio.Event()).wait())
    sock: socket.socket | None = None
    try:
        sock = sockets.make(family_of(target.address), socket.SOCK_STREAM)
        async with asyncio.timeout(silence):
            await loop.sock_connect(sock, (target.address, target.port))
            await loop.sock_sendall(sock, target.request(0))
        while not stopped.done():
            reading = asyncio.create_task(_receive(sock))
            await asyncio.wait({reading, stopped}, timeout=silence, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
                if not stopped.done():
                    raise TimeoutError
                break
            data, now = reading.result(), time.monotonic()
            if not result.opened:
                result.opened, result.first, result.last = True, now, now
                if on_open is not None:
                    on_open()
            result.longest_gap_ms = max(result.longest_gap_ms, round((now - result.last) * 1000, 1))
            result.ticks += data.count(b"tick")
            result.last = now
        result.ended = "stopped"
    except (OSError, EOFError) as e:
        result.ended = "silence" if isinstance(e, TimeoutError) else error_name(e)
    finally:
        stopped.cancel()
        if sock is not None:
            sock.close()
    return result


def say(data: object) -> None:
    """One JSON line on standard output."""
    print(json.dumps(data), flush=True)


async def _main(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    if args.what == "get":
        for seq in range(args.count):
            answer = await get(Target.parse(args.url[seq % len(args.url)]), Sockets(), seq=seq, timeout=args.timeout)
            say(asdict(answer) | {"ok": answer.ok, "body": answer.body.decode(errors="replace")})
    elif args.what == "http":
        prober = HttpProber(args.url, rate=args.rate, timeout=args.timeout, window=args.window).start()
        await prober.answered(1, timeout=3600)
        say({"event": "first"})
        await stop.wait()
        say({"event": "result", **asdict(await prober.stop())})
    else:
        result = await stream(
            Target.parse(args.url[0]), Sockets(), silence=args.silence, stop=stop, on_open=lambda: say({"event": "open"})
        )  # fmt: skip
        say({"event": "result", **asdict(result)})


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m mesh.probe`."""
    parser = argparse.ArgumentParser(prog="mesh.probe", description="Send sequence-numbered HTTP requests and count honestly.")
    parser.add_argument("what", choices=["get", "http", "stream"])
    parser.add_argument("url", nargs="+")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--timeout", type=float, default=0.25, help="seconds for one attempt")
    parser.add_argument("--window", type=float, default=1.0, help="seconds in which a request must be answered")
    parser.add_argument("--silence", type=float, default=1.0, help="seconds without data that end a stream")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
