"""The small HTTP service that plays `web`, `api` and `batch` in the demo, the examples and the tests.

    GET /            200, JSON: who answered and the caller's address; echoes the X-Seq header and the query
    GET /stream      a chunked response with one `tick` line every 10 ms, without end
    POST /echo       the body back

`python -m mesh.demo_service --name api@host-b --port 8080`; tells READY=1 to NOTIFY_SOCKET.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from mesh.sd_notify import notify

TICK: Final = 0.01  # seconds
MAX_HEAD: Final = 16 * 1024
MAX_BODY: Final = 1 << 20


class Service:
    """Listens on both families (or one address) and answers until closed."""

    def __init__(self, name: str, *, greeting: str = "") -> None:
        self.name, self.greeting = name, greeting
        self._server: asyncio.Server | None = None

    async def start(self, address: str | None, port: int) -> None:
        """Raises OSError for a taken port."""
        self._server = await asyncio.start_server(self._serve, address, port, limit=MAX_HEAD)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            await self._answer(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        extra = f"X-Served-By: {self.name}\r\n" + (f"X-Seq: {int(headers['x-seq'])}\r\n" if "x-seq" in headers else "")
        if path.startswith("/stream"):
            writer.write(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{extra}\r\n".encode())
            seq = 0
            while True:
                line = f"tick {seq} {self.greeting}\n"
                writer.write(f"{len(line):x}\r\n{line}\r\n".encode())
                await writer.drain()
                seq += 1
                await asyncio.sleep(TICK)
        if method == "POST":
            body = await reader.readexactly(min(int(headers.get("content-length", "0")), MAX_BODY))
        else:
            peer = writer.get_extra_info("peername")[0]
            seen = {k: v for k, v in headers.items() if k.startswith(("x-forwarded", "x-retinue"))}
            said = {"service": self.name, "path": path, "caller": peer, "says": self.greeting, "forwarded": seen}
            body = json.dumps(said).encode() + b"\n"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()


async def _main(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    service = Service(args.name, greeting=os.environ.get("GREETING", ""))
    await service.start(args.listen, args.port)
    notify("READY=1")
    await stop.wait()
    await service.close()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m mesh.demo_service`."""
    parser = argparse.ArgumentParser(prog="mesh.demo_service", description="A small HTTP service to try things with.")
    parser.add_argument("--name", required=True)
    parser.add_argument("--listen", default=None, help="address; without it all addresses of both families")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args(argv)
    try:
        asyncio.run(_main(args))
    except OSError as e:
        print(f"{args.name}: cannot listen on port {args.port}: {e.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
