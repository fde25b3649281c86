"""Administration of administrators, and of what waits for a second one."""

from __future__ import annotations

from aiohttp import web

from ca.http import body, reply
from ca.principals import ACTOR, PRINCIPAL
from ca.service import Service
from identity.wire.people import (
    AdminAdd,
    AdminCertify,
    AdminList,
    AdminRef,
    AdminRenew,
    ApprovalList,
    ApprovalRef,
)


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""
    plane = service.plane

    async def admins(_: web.Request) -> web.Response:
        return reply(AdminList(admins=await service.read(plane.people.admins)))

    async def add(request: web.Request) -> web.Response:
        asked, actor = await body(request, AdminAdd), request[ACTOR]
        return reply(await service.read(lambda: plane.people.add(asked, actor)))

    async def certify(request: web.Request) -> web.Response:
        asked, actor = await body(request, AdminCertify), request[ACTOR]
        return reply(await service.read(lambda: plane.people.certify(asked.name, asked.csr, actor)))

    async def renew(request: web.Request) -> web.Response:
        asked, who = await body(request, AdminRenew), request[PRINCIPAL]
        return reply(await service.read(lambda: plane.people.renew(who, asked.csr)))

    async def revoke(request: web.Request) -> web.Response:
        asked, actor = await body(request, AdminRef), request[ACTOR]
        return reply(await service.read(lambda: plane.people.revoke(asked.name, actor)))

    async def approvals(_: web.Request) -> web.Response:
        return reply(ApprovalList(approvals=await service.read(plane.people.approvals)))

    async def approve(request: web.Request) -> web.Response:
        asked, who = await body(request, ApprovalRef), request[PRINCIPAL]
        return reply(await service.read(lambda: plane.people.approve(asked.id, who)))

    return [
        web.get("/v1/admins", admins),
        web.post("/v1/admins", add),
        web.post("/v1/admins/certify", certify),
        web.post("/v1/admins/renew", renew),
        web.post("/v1/admins/revoke", revoke),
        web.get("/v1/approvals", approvals),
        web.post("/v1/approvals", approve),
    ]
