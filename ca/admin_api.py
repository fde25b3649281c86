"""The administrators' API: on a unix socket for root, and below /admin beside the endpoints' API for administrators with
a certificate. ca/gate.py says who may ask, ca/roles.py for what.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import structlog
from aiohttp import web

from ca import (
    admin_authority,
    admin_entries,
    admin_explain,
    admin_federation,
    admin_moves,
    admin_people,
    admin_policy,
    audit,
    log_api,
    orchestrator,
)
from ca.gate import audited, door
from ca.http import body, errors, number, reply, text
from ca.principals import ACTOR
from ca.service import Service
from ca.transparency import Entry, Head
from identity.errors import BadInput
from identity.wire.admin import (
    HostList,
    HostRef,
    Info,
    PolicyApply,
    TokenCreate,
    WorkloadAdd,
    WorkloadList,
    WorkloadMove,
    WorkloadRef,
)

log = structlog.get_logger("retinue.ca.admin")

MAX_BODY: Final = 16 * 1024 * 1024  # a policy
MAX_AUDIT: Final = 10_000  # entries in one answer


def make_app(service: Service, listen: Callable[[], str]) -> web.Application:
    """`listen` tells where the endpoints' API is."""
    admin = _Admin(service, listen)
    app = web.Application(middlewares=[errors, audited(service), door(service, MAX_BODY)], client_max_size=MAX_BODY)
    app.add_routes([
        web.get("/v1/info", admin.info),
        web.post("/v1/tokens", admin.token),
        web.get("/v1/hosts", admin.hosts),
        web.post("/v1/hosts/revoke", admin.revoke_host),
        web.get("/v1/workloads", admin.workloads),
        web.post("/v1/workloads", admin.add),
        web.post("/v1/workloads/move", admin.move),
        web.post("/v1/workloads/revoke", admin.revoke),
        *admin_entries.routes(service),
        *admin_moves.routes(service),
        *orchestrator.routes(service),
        *admin_people.routes(service),
        *admin_explain.routes(service),
        *admin_authority.routes(service),
        *admin_federation.routes(service),
        *admin_policy.routes(service),
        web.get("/v1/policy", admin.policy),
        web.post("/v1/policy", admin.apply),
        web.get("/v1/policy/history", admin.history),
        web.get("/v1/explain", admin.explain),
        web.get("/v1/audit", admin.audit),
        web.get("/v1/audit/verify", admin.verify),
        *log_api.routes(service),
    ])  # fmt: skip
    return app


class _Admin:
    def __init__(self, service: Service, listen: Callable[[], str]) -> None:
        self._service = service
        self._plane = service.plane
        self._listen = listen

    async def info(self, _: web.Request) -> web.Response:
        plane = self._plane
        revision = await self._service.read(lambda: plane.mirror.revision)
        return reply(
            Info(
                trust_domain=str(plane.trust_domain), timeline=plane.store.timeline, revision=revision,
                listen=self._listen(), root_fingerprint=plane.authority.root_fingerprint, pid=os.getpid(),
            )
        )  # fmt: skip

    # ---- hosts

    async def token(self, request: web.Request) -> web.Response:
        asked, actor = await body(request, TokenCreate), request[ACTOR]
        return reply(await self._service.read(lambda: self._plane.token(asked, actor)))

    async def hosts(self, _: web.Request) -> web.Response:
        rows = await self._service.read(self._plane.registry.all)
        return reply(HostList(hosts=[self._service.host(row) for row in rows]))

    async def revoke_host(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, HostRef), request[ACTOR], self._plane
        done, _ = await self._service.change(lambda: plane.registry.revoke(asked.name, plane.now, actor))
        log.info("host revoked", endpoints=done.endpoints, instances=done.instances)
        return reply(self._service.host(await self._service.read(lambda: plane.registry.get(asked.name))))

    # ---- workloads

    async def workloads(self, _: web.Request) -> web.Response:
        rows = await self._service.read(self._plane.placements.all)
        return reply(WorkloadList(workloads=[self._service.workload(row) for row in rows]))

    async def add(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, WorkloadAdd), request[ACTOR], self._plane
        row, _ = await self._service.change(lambda: plane.placements.add(asked, plane.now, actor))
        return reply(self._service.workload(row))

    async def move(self, request: web.Request) -> web.Response:
        return reply(await self._service.move(await body(request, WorkloadMove), request[ACTOR]))

    async def revoke(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, WorkloadRef), request[ACTOR], self._plane
        row, _ = await self._service.change(
            lambda: plane.placements.revoke(asked.name, asked.instance, plane.now, actor)
        )
        await self._service.change(plane.expire)  # what ends with it
        return reply(self._service.workload(row))

    # ---- policy

    async def policy(self, request: web.Request) -> web.Response:
        revision = number(request, "revision")
        return reply(await self._service.read(lambda: self._plane.policies.show(revision)))

    async def history(self, _: web.Request) -> web.Response:
        found = await self._service.read(self._plane.policies.history)
        return web.json_response(
            {"revisions": [one.model_dump(exclude={"files", "gained", "lost"}) for one in found]}
        )

    async def apply(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, PolicyApply), request[ACTOR], self._plane
        files = [(f.name, f.text) for f in asked.files]
        author = asked.author or actor
        done, _ = await self._service.change(
            lambda: plane.policies.apply(files, author, plane.now, actor, dry_run=asked.dry_run, parts=asked.parts)
        )
        return reply(done)

    async def explain(self, request: web.Request) -> web.Response:
        src, dst, proto = text(request, "src"), text(request, "dst"), request.query.get("proto", "tcp")
        port, plane = number(request, "port"), self._plane
        return reply(
            await self._service.read(lambda: plane.policies.explain(src, dst, proto, port, plane.now))
        )

    # ---- audit

    async def audit(self, request: web.Request) -> web.Response:
        after, limit, subject = (
            number(request, "after") or 0,
            number(request, "limit"),
            request.query.get("subject"),
        )
        limit = 1000 if limit is None else limit
        if not 1 <= limit <= MAX_AUDIT:
            raise BadInput("api.query", f"limit is 1 to {MAX_AUDIT}")

        def run() -> list[Entry]:
            with self._plane.store.read() as tx:
                return audit.entries(tx, after=after, limit=limit, subject=subject)

        return web.json_response({"entries": [entry.as_dict() for entry in await self._service.read(run)]})

    async def verify(self, request: web.Request) -> web.Response:
        size, root = number(request, "size"), request.query.get("root")
        noted = Head(size, root) if size is not None and root is not None else None

        def run() -> Head:
            with self._plane.store.read() as tx:
                return self._plane.log.verify(tx, noted)

        done = await self._service.read(run)
        return web.json_response({"size": done.size, "root": done.root})
