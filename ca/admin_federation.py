"""Administration of federation."""

from __future__ import annotations

from aiohttp import web

from ca import federation, federation_service
from ca.http import body, reply
from ca.principals import ACTOR
from ca.service import Service
from identity.wire.federation import FederationAdd, FederationInfo, FederationList, FederationRef
from identity.wire.recovery import BundleReply


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""
    plane = service.plane

    def listed() -> list[FederationInfo]:
        with plane.store.read() as tx:
            return [one.info() for one in federation.all_of(tx)]

    def known(name: str) -> federation.Federation:
        with plane.store.read() as tx:
            return federation.get(tx, name)

    async def show(_: web.Request) -> web.Response:
        return reply(FederationList(federations=await service.read(listed)))

    async def add(request: web.Request) -> web.Response:
        asked, actor = await body(request, FederationAdd), request[ACTOR]
        done, _ = await service.change(lambda: federation.add(plane, asked, actor))
        return reply(done)

    async def remove(request: web.Request) -> web.Response:
        asked, actor = await body(request, FederationRef), request[ACTOR]
        done, _ = await service.change(lambda: federation.remove(plane, asked.trust_domain, actor))
        return reply(done)

    async def refresh(request: web.Request) -> web.Response:
        asked = await body(request, FederationRef)
        one = await service.read(lambda: known(asked.trust_domain))
        await federation_service.refresh(service, one, {}, service.web_roots)
        return reply((await service.read(lambda: known(asked.trust_domain))).info())

    async def own(_: web.Request) -> web.Response:
        return reply(BundleReply(bundle=await service.read(lambda: plane.bundle)))

    return [
        web.get("/v1/federation/own", own),
        web.get("/v1/federation", show),
        web.post("/v1/federation", add),
        web.post("/v1/federation/remove", remove),
        web.post("/v1/federation/refresh", refresh),
    ]
