"""The two running halves of federation: our bundle for others, theirs fetched when their hint says so."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from ca import federation
from ca.federation import Federation
from ca.http import errors
from ca.service import Service
from identity.errors import BadState, RetinueError

log = structlog.get_logger("retinue.ca.federation")

LOOK_S: Final = 1.0  # how often it is looked who is due
HINT_S: Final = 300


@dataclass(frozen=True, slots=True)
class WebIdentity:
    """PEM files of a web certificate (profile https_web)."""

    chain: Path
    key: Path


@asynccontextmanager
async def bundle_endpoint(
    service: Service, sock: object, context: Callable[[], ssl.SSLContext], hint: int = HINT_S
) -> AsyncIterator[None]:
    """Serve our bundle at every path of a bound socket; nobody is asked for a certificate."""
    plane = service.plane

    async def show(_: web.Request) -> web.Response:
        text = await service.read(lambda: federation.own_bundle(plane, hint))
        return web.Response(text=text, content_type="application/json", headers={"Cache-Control": "no-cache"})

    app = web.Application(middlewares=[errors], client_max_size=1024)
    app.router.add_get("/{path:.*}", show)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=10.0, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.SockSite(runner, sock, ssl_context=context()).start()  # type: ignore[arg-type]  # a bound socket
        yield
    finally:
        await runner.cleanup()


def web_context(identity: WebIdentity) -> ssl.SSLContext:
    """TLS for the profile https_web. Raises BadState ``federation.certificate``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(identity.chain, identity.key)
    except (OSError, ssl.SSLError):
        raise BadState("federation.certificate", f"cannot use {identity.chain} with {identity.key}") from None
    return context


def spiffe_context(chain: Path, key: Path) -> ssl.SSLContext:
    """TLS for the profile https_spiffe, with the control plane's own SVID; kept fresh by the caller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(chain, key)
    return context


async def refresh_for_ever(service: Service, web_roots: str | None = None) -> None:
    """Fetch what is due, one after the other, until cancelled."""
    failed: dict[str, float] = {}
    while True:
        await asyncio.sleep(LOOK_S)
        with contextlib.suppress(RetinueError):
            for one in await service.read(lambda: federation.due(service.plane, failed, time.monotonic())):
                await refresh(service, one, failed, web_roots)


async def refresh(service: Service, one: Federation, failed: dict[str, float], web_roots: str | None = None) -> bool:
    """Fetch one bundle and take it over; False when it could not be: then what is known stays."""
    plane = service.plane
    try:
        # Not in the worker: the network may be slow, and the store is not to wait for it.
        text = await asyncio.to_thread(federation.fetch, one, plane.clock(), web_roots=web_roots)
        await service.change(lambda: federation.take(plane, one.trust_domain, text, "federation"))
        failed.pop(one.trust_domain, None)
        return True
    except RetinueError as e:
        error = e
        failed[one.trust_domain] = time.monotonic()
        log.warning("a foreign bundle could not be taken", trust_domain=one.trust_domain, code=e.code, why=e.message)
        with contextlib.suppress(RetinueError):
            await service.change(lambda: federation.note(plane, one.trust_domain, error))
        return False
