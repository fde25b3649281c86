"""Administration of registration entries and of how long identities live."""

from __future__ import annotations

from aiohttp import web

from ca.http import body, reply
from ca.principals import ACTOR, PRINCIPAL
from ca.roles import out_of_scope
from ca.service import Service
from identity.wire.admin import WorkloadLife
from identity.wire.entries import EntryCreate, EntryInfo, EntryList, EntryRef


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""
    plane = service.plane

    def newest() -> int:
        with plane.store.read() as tx:
            return plane.store.revision(tx)

    async def followed(done: EntryInfo, seconds: float) -> web.Response:
        """Once the endpoints concerned have applied it, or the time is over."""
        revision = await service.read(newest)
        late = await service.followed(done.hosts, revision, seconds)
        return reply(done.model_copy(update={"waiting_for": late}))

    async def entries(_: web.Request) -> web.Response:
        return reply(EntryList(entries=await service.read(plane.list_entries)))

    async def create(request: web.Request) -> web.Response:
        asked, actor = await body(request, EntryCreate), request[ACTOR]
        done, _ = await service.change(lambda: plane.create_entry(asked, actor))
        return await followed(done, asked.wait)

    async def remove(request: web.Request) -> web.Response:
        asked, who = await body(request, EntryRef), request[PRINCIPAL]

        def run() -> EntryInfo:
            with plane.store.read() as tx:
                name = plane.entries.get(tx, asked.id).name
            if not who.covers(name):
                raise out_of_scope(who, who.scopes)
            return plane.delete_entry(asked.id, who.actor)

        done, _ = await service.change(run)
        return await followed(done, asked.wait)

    async def life(request: web.Request) -> web.Response:
        asked, actor = await body(request, WorkloadLife), request[ACTOR]
        row, _ = await service.change(lambda: plane.placements.set_life(asked, plane.now, actor))
        return reply(service.workload(row))

    return [
        web.get("/v1/entries", entries),
        web.post("/v1/entries", create),
        web.post("/v1/entries/delete", remove),
        web.post("/v1/workloads/life", life),
    ]
