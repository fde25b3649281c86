"""Administration of the authority's members and of the block list."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from ca import recovery, succession
from ca.http import body, reply, text
from ca.principals import ACTOR
from ca.service import Service
from identity.wire.admin import HostRef
from identity.wire.authority import AuthorityInfo, BlockRef, KindRef, MemberRef
from identity.wire.recovery import HostRecover


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""
    plane = service.plane

    async def changed(job: Callable[[], AuthorityInfo]) -> web.Response:
        done, _ = await service.change(job)
        return reply(done)

    async def show(_: web.Request) -> web.Response:
        return reply(await service.read(lambda: succession.show(plane)))

    async def prepare(request: web.Request) -> web.Response:
        asked, actor = await body(request, KindRef), request[ACTOR]
        return await changed(lambda: succession.prepare(plane, asked.kind, actor))

    async def activate(request: web.Request) -> web.Response:
        asked, actor = await body(request, KindRef), request[ACTOR]
        return await changed(lambda: succession.activate(plane, asked.kind, actor))

    async def taint(request: web.Request) -> web.Response:
        asked, actor = await body(request, MemberRef), request[ACTOR]
        return await changed(lambda: succession.taint(plane, asked.name, asked.spread, actor))

    async def revoke(request: web.Request) -> web.Response:
        asked, actor = await body(request, MemberRef), request[ACTOR]
        return await changed(
            lambda: succession.revoke(plane, asked.name, actor, force=asked.force, compromised=asked.compromised)
        )

    async def block(request: web.Request) -> web.Response:
        asked, actor = await body(request, BlockRef), request[ACTOR]
        return await changed(lambda: succession.block(plane, asked.entry, asked.until, actor))

    async def unblock(request: web.Request) -> web.Response:
        asked, actor = await body(request, BlockRef), request[ACTOR]
        return await changed(lambda: succession.unblock(plane, asked.entry, actor))

    async def standing(request: web.Request) -> web.Response:
        name = text(request, "name")
        return reply(await service.read(lambda: recovery.standing(plane.store, name, plane.now)))

    async def recover(request: web.Request) -> web.Response:
        asked, actor = await body(request, HostRecover), request[ACTOR]
        done, _ = await service.change(lambda: recovery.grant(plane.store, asked.name, asked.budget, plane.now, actor))
        return reply(done)

    async def unquarantine(request: web.Request) -> web.Response:
        asked, actor = await body(request, HostRef), request[ACTOR]
        await service.change(lambda: recovery.release(plane.store, asked.name, plane.now, actor))
        return reply(await service.read(lambda: recovery.standing(plane.store, asked.name, plane.now)))

    return [
        web.get("/v1/hosts/standing", standing),
        web.post("/v1/hosts/recover", recover),
        web.post("/v1/hosts/unquarantine", unquarantine),
        web.get("/v1/authority", show),
        web.post("/v1/authority/prepare", prepare),
        web.post("/v1/authority/activate", activate),
        web.post("/v1/authority/taint", taint),
        web.post("/v1/authority/revoke", revoke),
        web.post("/v1/authority/block", block),
        web.post("/v1/authority/unblock", unblock),
    ]
