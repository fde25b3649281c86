"""The workload behind the gateway: HTTP, streaming and WebSocket on both families. Run inside its namespace."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

from mesh.sd_notify import notify


async def echo(request: web.Request) -> web.Response:
    body = await request.read()
    said = {"caller": request.remote, "path": request.path_qs, "length": len(body), "headers": dict(request.headers)}
    return web.json_response(said)


async def stream(request: web.Request) -> web.StreamResponse:
    out = web.StreamResponse()
    await out.prepare(request)
    for number in range(1_000_000):
        await out.write(f"line {number}\n".encode())
        await asyncio.sleep(0.02)
    return out


async def chat(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_str(f"hello {request.headers.get('X-Retinue-Caller')} at {request.remote}")
    async for message in socket:
        await socket.send_str(f"echo {message.data}")
    return socket


async def main(port: int) -> None:
    app = web.Application()
    app.router.add_get("/stream", stream)
    app.router.add_get("/chat", chat)
    app.router.add_route("*", "/{rest:.*}", echo)
    runner = web.AppRunner(app)
    await runner.setup()
    for host in ("0.0.0.0", "::"):
        await web.TCPSite(runner, host, port).start()
    notify("READY=1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
