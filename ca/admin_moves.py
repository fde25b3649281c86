"""Administration of moves: told step by step, taken back, and of whole hosts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from aiohttp import web

from ca import drain
from ca.http import body, reply
from ca.principals import ACTOR
from ca.service import Service
from identity.errors import RetinueError
from identity.wire import Message
from identity.wire.admin import HostRef, WorkloadMove, WorkloadRef
from identity.wire.moves import Drain, MoveDone, MoveFailed

Say = Callable[[Message], None]


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""
    plane = service.plane

    async def steps(request: web.Request) -> web.StreamResponse:
        asked, actor = await body(request, WorkloadMove), request[ACTOR]

        async def work(say: Say) -> Message:
            return MoveDone(move=await service.move(asked, actor, say))

        return await lines(request, work)

    async def abort(request: web.Request) -> web.Response:
        asked, actor = await body(request, WorkloadRef), request[ACTOR]
        return reply(service.workload(await service.abort_move(asked.name, asked.instance, actor)))

    async def empty(request: web.Request) -> web.StreamResponse:
        asked, actor = await body(request, Drain), request[ACTOR]

        async def work(say: Say) -> Message:
            return await drain.drain(service, asked, actor, say, say)

        return await lines(request, work)

    async def undrain(request: web.Request) -> web.Response:
        asked, actor = await body(request, HostRef), request[ACTOR]
        return reply(service.host(await service.read(
            lambda: drain.mark(plane.store, asked.name, plane.now, actor, draining=False)
        )))  # fmt: skip

    return [
        web.post("/v1/workloads/move/steps", steps),
        web.post("/v1/workloads/abort", abort),
        web.post("/v1/hosts/drain", empty),
        web.post("/v1/hosts/undrain", undrain),
    ]


async def lines(request: web.Request, work: Callable[[Say], Awaitable[Message]]) -> web.StreamResponse:
    """What `work` says, a line each, and its result as the last one. What fails before the first line has its own status.

    Who hangs up takes back what is not committed, as with any other request.
    """
    said: asyncio.Queue[Message | None] = asyncio.Queue()

    async def run() -> Message:
        try:
            return await work(said.put_nowait)
        finally:
            said.put_nowait(None)

    task = asyncio.ensure_future(run())
    response: web.StreamResponse | None = None

    async def write(message: Message) -> None:
        nonlocal response
        if response is None:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
        await response.write(message.model_dump_json().encode() + b"\n")

    try:
        while (message := await said.get()) is not None:
            await write(message)
        try:
            await write(await task)
        except RetinueError as e:
            if response is None:
                raise
            await write(MoveFailed(status=e.http, error=e.as_dict()))
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RetinueError):
            await task
    assert response is not None
    return response
