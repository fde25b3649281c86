"""The endpoints' API: HTTPS, TLS 1.3 only, a client certificate on every route but the two of enrolment.

OpenSSL checks a presented chain against the root; `Plane.caller` checks it again by our own rules on every request,
and that endpoint, certificate and placement are in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog
from aiohttp import web

from ca.http import Buckets, Handler, body, errors, number, peer_chain, reply, source, text
from ca.log_api import prove
from ca.older import is_older
from ca.rows import EndpointRow
from ca.service import Service
from ca.streams import Stream
from identity import certs
from identity.errors import Refused, RetinueError
from identity.wire.enroll import (
    ChallengeRequest,
    EnrollRequest,
    RenewRequest,
    SidecarTokenRequest,
    SvidRequest,
    UnderlayUpdate,
)
from identity.wire.feed import Report
from identity.wire.jwt import JwtRequest
from identity.wire.log import LogRequest
from identity.wire.recovery import BundleReply, RecoverChallengeRequest, RecoverRequest

log = structlog.get_logger("retinue.ca.api")

MAX_BODY: Final = 512 * 1024  # a report of some thousand instances; everything else is far smaller
ENROLL_RATE, ENROLL_BURST = 20.0, 200.0  # requests a second and at once, one client address

SERVICE = web.AppKey("service", Service)


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests a second, and how many at once, that one client address may make to enrol."""

    rate: float = ENROLL_RATE
    burst: float = ENROLL_BURST


def make_app(
    service: Service, server_leaf: Callable[[], bytes], limits: Limits | None = None
) -> web.Application:
    """`server_leaf` gives the DER certificate the server shows now: enrolment proofs are bound to it."""
    chosen = limits or Limits()
    api = _Api(service, server_leaf, Buckets(chosen.rate, chosen.burst))
    app = web.Application(middlewares=[errors], client_max_size=MAX_BODY)
    app.add_routes([
        web.post("/v1/enroll/challenge", api.challenge),
        web.post("/v1/enroll", api.enroll),
        web.get("/v1/bundle", api.bundle),
        web.post("/v1/recover/challenge", api.recover_challenge),
        web.post("/v1/recover", api.recover),
        web.post("/v1/renew", api.member(api.renew)),
        web.post("/v1/svid", api.member(api.svid)),
        web.post("/v1/jwt", api.member(api.jwt)),
        web.post("/v1/sidecar-token", api.member(api.sidecar_token)),
        web.post("/v1/underlay", api.member(api.underlay)),
        web.post("/v1/report", api.member(api.report)),
        web.get("/v1/explain", api.member(api.explain)),
        web.post("/v1/log", api.member(api.log)),
        web.get("/v1/feed", api.feed),
    ])  # fmt: skip
    return app


class _Api:
    def __init__(self, service: Service, server_leaf: Callable[[], bytes], buckets: Buckets) -> None:
        self._service = service
        self._plane = service.plane
        self._plain = service.plane.plain
        self._leaf = server_leaf
        self._buckets = buckets

    # ---- without a certificate

    async def challenge(self, request: web.Request) -> web.Response:
        self._buckets.take(request.remote or "")
        asked = await body(request, ChallengeRequest)
        leaf, origin = self._leaf(), source(request.remote or "")
        return reply(await self._service.serve(lambda: self._plane.challenge(asked.token_id, leaf, origin)))

    async def enroll(self, request: web.Request) -> web.Response:
        self._buckets.take(request.remote or "")
        asked = await body(request, EnrollRequest)
        done = await self._service.enroll(asked)
        log.info("enrolled", endpoint=done.endpoint, kind=done.kind, remote=request.remote)
        return reply(self._plain.fitting(request, done, done.endpoint))

    # ---- with one

    def member(self, handler: Callable[[web.Request, EndpointRow], Awaitable[web.Response]]) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            caller, _ = await self._caller(request)
            return await handler(request, caller)

        return checked

    async def _caller(self, request: web.Request) -> tuple[EndpointRow, int]:
        chain = peer_chain(request)
        if not chain:
            raise Refused(
                "caller.anonymous",
                "this needs the endpoint's certificate",
                hint="enrol first: retinue enroll",
            )
        where, remote = request.path, request.remote or ""

        def check() -> tuple[EndpointRow, int]:
            try:
                return self._plane.caller(chain)
            except RetinueError as e:
                log.warning("a caller was refused", code=e.code, path=where, remote=remote)
                self._plane.refused("call", where, e, actor=f"address:{remote}")
                raise

        return await self._service.serve(check)

    async def renew(self, request: web.Request, caller: EndpointRow) -> web.Response:
        asked = await body(request, RenewRequest)
        serial = certs.parse_der_chain(peer_chain(request))[0].serial_number
        done = await self._service.accept(lambda: self._plane.renew(caller, asked, serial))
        return reply(self._plain.fitting(request, done, caller.name))

    # ---- coming back: no certificate, it is of no use any more

    async def bundle(self, request: web.Request) -> web.Response:
        self._buckets.take(request.remote or "")
        return reply(BundleReply(bundle=await self._service.serve(lambda: self._plane.bundle)))

    async def recover_challenge(self, request: web.Request) -> web.Response:
        self._buckets.take(request.remote or "")
        asked, plane = await body(request, RecoverChallengeRequest), self._plane
        leaf, origin = self._leaf(), source(request.remote or "")
        return reply(
            await self._service.serve(lambda: plane.challenge(plane.returns.challenge(asked.endpoint), leaf, origin))
        )

    async def recover(self, request: web.Request) -> web.Response:
        self._buckets.take(request.remote or "")
        asked = await body(request, RecoverRequest)
        done = await self._service.accept(lambda: self._plane.returns.recover(asked))
        log.info("a machine came back", endpoint=asked.endpoint, remote=request.remote)
        return reply(done)

    async def svid(self, request: web.Request, caller: EndpointRow) -> web.Response:
        asked = await body(request, SvidRequest)
        done = await self._service.serve(lambda: self._plane.svid(caller, asked))
        return reply(self._plain.fitting(request, done, caller.name))

    async def jwt(self, request: web.Request, caller: EndpointRow) -> web.Response:
        asked = await body(request, JwtRequest)
        return reply(await self._service.serve(lambda: self._plane.jwt_svid(caller, asked)))

    async def sidecar_token(self, request: web.Request, caller: EndpointRow) -> web.Response:
        asked = await body(request, SidecarTokenRequest)
        return reply(await self._service.serve(lambda: self._plane.sidecar_token(caller, asked.workload)))

    async def underlay(self, request: web.Request, caller: EndpointRow) -> web.Response:
        asked = await body(request, UnderlayUpdate)
        await self._service.accept(lambda: self._plane.underlay(caller, asked.underlay))
        return web.json_response({})

    async def report(self, request: web.Request, caller: EndpointRow) -> web.Response:
        self._service.report(caller.name, await body(request, Report))
        return web.json_response({})

    async def explain(self, request: web.Request, caller: EndpointRow) -> web.Response:
        src, dst, proto = text(request, "src"), text(request, "dst"), request.query.get("proto", "tcp")
        port = number(request, "port")
        return reply(await self._service.serve(lambda: self._plane.explain_for(caller, src, dst, proto, port)))

    async def log(self, request: web.Request, _: EndpointRow) -> web.Response:
        asked = await body(request, LogRequest)
        return reply(await self._service.serve(lambda: prove(self._plane, asked)))

    async def feed(self, request: web.Request) -> web.StreamResponse:
        caller, expires = await self._caller(request)
        shown = peer_chain(request)
        stream = Stream(caller.name, expires, serial=certs.parse_der_chain(shown)[0].serial_number, chain=tuple(shown), older=is_older(request))
        timeline, revision = request.query.get("timeline"), number(request, "revision")
        await self._service.open_stream(stream, timeline, revision)
        try:
            response = web.StreamResponse(
                headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"}
            )
            await response.prepare(request)
            log.info("feed opened", endpoint=caller.name, remote=request.remote)
            if request.transport is not None:
                await stream.pump(response, request.transport)
        finally:
            if not self._service.stopping:  # then it is said once for all
                log.info("feed closed", endpoint=caller.name, why=stream.why or "disconnected")
            await asyncio.shield(asyncio.ensure_future(self._service.close_stream(stream)))
        if request.transport is not None:
            request.transport.abort()  # an ending is not a complete answer
        return response
