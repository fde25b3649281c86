"""The reverse proxy: one request in, who is calling, may it, then over the mesh from the caller's own overlay address.

The source address is the point: the destination's host checks it against its own rules and against the tunnel it came
through, so a gateway in wrong hands speaks for the callers placed on it and for nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import ssl
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from gateway import federation, headers
from gateway.callers import Proven, identify
from gateway.config import Config, Route
from gateway.upstream import Upstreams
from gateway.view import Ruling, View, refusal, refusal_text, rule_on
from identity.errors import BadInput, NotVerified
from identity.records import PlacementRecord

CHUNK: Final = 64 * 1024
POLICY_CLOSE: Final = 1008  # RFC 6455 section 7.4.1: policy violation
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})  # RFC 9110 section 9.2.1: may be repeated
REPEAT: Final = 3
LONGEST_TIMER: Final = 86400.0  # seconds
REFUSED_METHODS: Final = frozenset({"CONNECT", "TRACE"})
ACCESS = logging.getLogger("retinue.gateway.access")
LOG = logging.getLogger("retinue.gateway")

Explainer = Callable[[str, str, str, int], Awaitable[Mapping[str, Any] | None]]


class TooLarge(Exception):
    """The request body passed the route's limit."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One request under way: what the access log will say, and how to end it when policy stops permitting it."""

    request: web.BaseRequest
    id: str
    begin: float
    proven: Proven | None = None
    route: Route | None = None
    ruling: Ruling | None = None
    target: PlacementRecord | None = None
    upstream: str = ""
    status: int = 0
    received: int = 0
    sent: int = 0
    outcome: str = ""
    websocket: web.WebSocketResponse | None = None
    task: asyncio.Task[web.StreamResponse] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def log(self) -> dict[str, Any]:
        """The access-log object. No query, no header, no token, no certificate: nothing that could be a secret."""
        caller = self.proven.caller.workload if self.proven else None
        return {
            "event": "request", "time": round(time.time(), 3), "id": self.id, "client": client_address(self.request),
            "caller": caller, "foreign": self.proven.spiffe_id if self.proven else None,
            "proof": self.proven.by if self.proven else None, "method": self.request.method,
            "host": self.request.host[:255], "path": self.request.raw_path.partition("?")[0][:1024], "status": self.status,
            "verdict": self.ruling.code if self.ruling else None, "rule": self.ruling.rule if self.ruling else None,
            "destination": self.route.workload if self.route and self.proven else None, "upstream": self.upstream or None,
            "bytes_in": self.received, "bytes_out": self.sent, "ms": round((time.monotonic() - self.begin) * 1000, 2),
            "outcome": self.outcome or "done", **self.notes,
        }  # fmt: skip


class Ingress:
    """Handles requests under a configuration and a view, both replaceable at any time."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.view: View | None = None
        self.draining = False
        self.exchanges: set[Exchange] = set()
        self.explain: Explainer | None = None
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.upstreams = Upstreams(config.limits.connect)

    # ---- changes

    def update(self, view: View) -> None:
        """A newer verified view: connections to moved instances are not used again, forbidden exchanges end now."""
        self.view = view
        self.upstreams.keep(view.placements)
        self._recheck()
        self._wake_at(view)

    def _wake_at(self, view: View) -> None:
        """Look again when a time window of the policy opens or closes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        if (change := view.changes_at(now)) is not None:
            wait = min(max(change - now, 0.0) + 0.05, LONGEST_TIMER)
            self._timer = asyncio.get_running_loop().call_later(wait, self.update, view)

    def reconfigure(self, config: Config) -> None:
        """A newer configuration; callers and routes that are gone end now."""
        self.config = config
        self._recheck()

    def _recheck(self) -> None:
        for exchange in list(self.exchanges):
            if exchange.proven is None or exchange.route is None or exchange.ruling is None or self.view is None:
                continue
            if not exchange.ruling.allowed:
                continue  # it is being refused, and is to hear why
            still = exchange.proven.caller in self.config.caller and exchange.route in self.config.route
            now = self._clock()
            ruling = rule_on(self.view, exchange.proven.caller, exchange.route, now, exchange.proven.spiffe_id)
            held = exchange.target is None or any(t.addresses == exchange.target.addresses for t in ruling.targets)
            known = still_federated(self.view, exchange.proven, now)
            if not still or not ruling.allowed or not held or not known:
                exchange.outcome = "cut: configuration" if not still else "cut: policy" if known else "cut: federation"
                if exchange.task is not None:
                    exchange.task.cancel()

    async def drained(self, timeout: float) -> bool:
        """Refuse new requests; True when all under way ended within `timeout` seconds."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End what is left and close the connections to the mesh."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [e.task for e in self.exchanges if e.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.upstreams.close()

    # ---- one request

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The handler for aiohttp's low-level server."""
        exchange = Exchange(request, os.urandom(8).hex(), time.monotonic())
        exchange.task = asyncio.create_task(self._respond(exchange))
        self.exchanges.add(exchange)
        self._idle.clear()
        try:
            response = await exchange.task
            exchange.status = exchange.status or response.status
            return response
        except asyncio.CancelledError:
            if not exchange.outcome.startswith("cut"):
                exchange.outcome = "client gone"
                raise
            return self._abort(exchange)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as e:
            exchange.outcome = exchange.outcome or f"broken: {type(e).__name__}"
            return self._abort(exchange)
        except Exception as e:
            # The place of a defect, never the values that met there.
            frame = traceback.extract_tb(e.__traceback__)[-1]
            LOG.critical("defect: %s at %s:%s (request %s)", type(e).__name__, frame.filename, frame.lineno, exchange.id)
            if exchange.status:
                return self._abort(exchange)
            return self._error(exchange, 500, "bug", "this is a defect in the gateway", {"Connection": "close"})
        finally:
            self.exchanges.discard(exchange)
            if not self.exchanges:
                self._idle.set()
            ACCESS.info(json.dumps(exchange.log()))

    @staticmethod
    def _abort(exchange: Exchange) -> web.StreamResponse:
        """End without a clean end: a cut answer must not look complete."""
        if exchange.request.transport is not None:
            exchange.request.transport.abort()
        exchange.status = exchange.status or 499
        return web.Response(status=502)

    async def _respond(self, exchange: Exchange) -> web.StreamResponse:
        request, config, view = exchange.request, self.config, self.view
        now = self._clock()
        exchange.proven = identify(
            config.caller, client_chain(request), request.headers.get("Authorization"), view.trust if view else None, now,
            view.foreign if view else None, exchange.notes,
        )  # fmt: skip
        if exchange.proven is None:
            return self._unknown(exchange)
        if self.draining or view is None:
            return self._error(exchange, 503, "gateway.draining" if self.draining else "gateway.not_ready",
                               "the gateway is going away" if self.draining else "the gateway has no verified state yet",
                               {"Retry-After": "1", "Connection": "close"})  # fmt: skip
        if request.method in REFUSED_METHODS:
            return self._error(exchange, 405, "gateway.method", f"{request.method} is not proxied", {})
        try:
            path, host = headers.checked_path(request.raw_path), headers.host_only(request.host)
        except BadInput as e:
            return self._error(exchange, e.http, e.code, e.message, {})
        route = exchange.route = config.find_route(host, path)
        if route is None:
            return self._error(exchange, 404, "gateway.no_route", "no route for this host and path", {})
        ruling = exchange.ruling = rule_on(view, exchange.proven.caller, route, now, exchange.proven.spiffe_id)
        if not ruling.allowed:
            return await self._denied(exchange, ruling, route, view)
        if (request.content_length or 0) > route.max_body:
            return self._error(exchange, 413, "gateway.body", f"at most {route.max_body} bytes", {"Connection": "close"})
        return await self._forward(exchange, ruling, route)

    # ---- refusals

    def _wants_text(self, request: web.BaseRequest) -> bool:
        accept = request.headers.get("Accept", "")
        return "json" not in accept and "text/" in accept

    def _unknown(self, exchange: Exchange) -> web.Response:
        """One answer for every unknown caller, whatever was wrong and whatever was asked for."""
        return self._error(
            exchange, 401, "gateway.unknown_caller", "a client certificate or bearer token of a known caller is needed",
            {"WWW-Authenticate": "Bearer"},
        )  # fmt: skip

    def _error(self, exchange: Exchange, status: int, code: str, message: str, extra: Mapping[str, str]) -> web.Response:
        exchange.outcome = code
        said = {"X-Request-Id": exchange.id, **extra}
        if self._wants_text(exchange.request):
            return web.Response(status=status, text=f"{message}\n", headers=said)
        return web.json_response({"error": {"code": code, "message": message}}, status=status, headers=said)

    async def _denied(self, exchange: Exchange, ruling: Ruling, route: Route, view: View) -> web.Response:
        exchange.outcome = "denied"
        explained: Mapping[str, Any] | None = None
        full = self.config.explain == "full"
        if full and ruling.code != "unplaced" and self.explain is not None and exchange.proven is not None:
            explained = await self.explain(ruling.asked or exchange.proven.caller.workload, route.workload, "tcp", route.port)
        foreign = exchange.proven.spiffe_id if exchange.proven is not None else None
        body = refusal(ruling, route, view, full=full, explained=explained, spiffe_id=foreign)
        said = {"X-Request-Id": exchange.id}
        if self._wants_text(exchange.request):
            return web.Response(status=403, text=refusal_text(body), headers=said)
        return web.json_response(body, status=403, headers=said)

    # ---- forwarding

    def _headers(self, exchange: Exchange, ruling: Ruling, *, websocket: bool) -> CIMultiDict[str]:
        request, proven = exchange.request, exchange.proven
        assert proven is not None
        assert ruling.source is not None
        ours = headers.statements(
            client=client_address(request), proto="https" if request.secure else "http", host=request.host,
            caller=proven.spiffe_id or ruling.source.spiffe_id, by=proven.by, request_id=exchange.id,
        )  # fmt: skip
        given = ((k.decode("utf-8", "surrogateescape"), v.decode("utf-8", "surrogateescape")) for k, v in request.raw_headers)
        return CIMultiDict(headers.upstream_headers(given, ours, drop_authorization=proven.consumed, websocket=websocket))

    def _url(self, exchange: Exchange, route: Route, address: str) -> URL:
        raw = exchange.request.raw_path
        if route.strip_prefix:
            raw = "/" + raw[len(route.path.rstrip("/")) :].lstrip("/")
        return URL(f"http://{headers.authority(address, route.port)}{raw}", encoded=True)

    async def _forward(self, exchange: Exchange, ruling: Ruling, route: Route) -> web.StreamResponse:
        request = exchange.request
        websocket = is_websocket(request)
        sent = self._headers(exchange, ruling, websocket=websocket)
        if not websocket and request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # only now that the request is permitted
        last: Exception | None = None
        repeatable = request.method in SAFE_METHODS and not request.body_exists and not websocket
        for _ in range(REPEAT if repeatable else 1):
            for session, target, address in self.upstreams.candidates(ruling, route):
                exchange.target, exchange.upstream = target, headers.authority(address, route.port)
                url = self._url(exchange, route, address)
                try:
                    if websocket:
                        return await self._websocket(exchange, session, url, sent, route)
                    return await self._http(exchange, session, url, sent, route)
                except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
                    last = e  # nothing was sent: the next address may be tried
                except TooLarge:
                    said = {"Connection": "close"}
                    return self._error(exchange, 413, "gateway.body", f"at most {route.max_body} bytes", said)
                except aiohttp.WSServerHandshakeError as e:
                    said_ws = f"the workload answered {e.status} to the upgrade"
                    return self._error(exchange, 502, "gateway.websocket", said_ws, {})
                except (aiohttp.ClientError, ConnectionError, TimeoutError) as e:
                    if exchange.status:
                        raise  # the answer has begun: it can only be cut
                    last = e
                    break
            # A connection that broke may have belonged to an instance that has just moved: ask again where it is.
            if self.view is not None and exchange.proven is not None:
                ruling = rule_on(self.view, exchange.proven.caller, route, self._clock(), exchange.proven.spiffe_id)
            if not ruling.allowed or isinstance(last, TimeoutError | aiohttp.ClientConnectorError):
                break
            exchange.notes["repeated"] = True
        if isinstance(last, TimeoutError):
            return self._error(exchange, 504, "gateway.timeout", f"{route.workload} did not answer in time", {})
        return self._error(exchange, 502, "gateway.upstream", f"{route.workload} could not be reached", {})

    async def _http(
        self, exchange: Exchange, session: aiohttp.ClientSession, url: URL, sent: CIMultiDict[str], route: Route
    ) -> web.StreamResponse:
        request = exchange.request
        body = _Body(exchange, route.max_body)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.config.limits.connect, sock_read=route.timeout)
        try:
            async with session.request(
                request.method, url, headers=sent, data=body.stream() if request.body_exists else None,
                allow_redirects=False, timeout=timeout, skip_auto_headers=AUTO_HEADERS,
            ) as answer:  # fmt: skip
                given = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in answer.raw_headers]
                out = web.StreamResponse(
                    status=answer.status, reason=answer.reason, headers=CIMultiDict(headers.downstream_headers(given))
                )
                out.headers["X-Request-Id"] = exchange.id
                if "Content-Length" not in out.headers and answer.status not in {204, 304} and request.version >= (1, 1):
                    out.enable_chunked_encoding()
                exchange.status = answer.status
                await out.prepare(request)
                async for chunk in answer.content.iter_any():
                    exchange.sent += len(chunk)
                    await out.write(chunk)
                await out.write_eof()
                return out
        except Exception as e:
            if body.too_large:
                raise TooLarge from e
            raise

    async def _websocket(
        self, exchange: Exchange, session: aiohttp.ClientSession, url: URL, sent: CIMultiDict[str], route: Route
    ) -> web.StreamResponse:
        request = exchange.request
        asked = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p.strip()]
        async with asyncio.timeout(route.timeout):
            inner = await session.ws_connect(
                url, headers=sent, protocols=asked, autoping=False, autoclose=False, max_msg_size=route.max_message
            )
        chosen = [inner.protocol] if inner.protocol else []
        outer = web.WebSocketResponse(autoping=False, autoclose=False, protocols=chosen, max_msg_size=route.max_message)
        outer.headers["X-Request-Id"] = exchange.id
        exchange.status, exchange.websocket = 101, outer
        ends: set[asyncio.Task[None]] = set()
        try:
            await outer.prepare(request)
            ends = {asyncio.create_task(_pump(outer, inner, exchange, inbound=True)),
                    asyncio.create_task(_pump(inner, outer, exchange, inbound=False))}  # fmt: skip
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1):
                    await outer.close(code=POLICY_CLOSE if exchange.outcome.startswith("cut") else 1001)
            raise
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            await inner.close()
            if not outer.closed and outer.prepared:
                await outer.close(code=sendable(inner.close_code))
        return outer


AUTO_HEADERS: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
CLOSE_CODES: Final = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, *range(3000, 5000)})  # RFC 6455 7.4


class _Body:
    """The request body as it arrives, counted against the limit."""

    def __init__(self, exchange: Exchange, limit: int) -> None:
        self._exchange, self._limit = exchange, limit
        self.too_large = False

    async def stream(self) -> AsyncIterator[bytes]:
        async for chunk in self._exchange.request.content.iter_any():
            self._exchange.received += len(chunk)
            if self._exchange.received > self._limit:
                self.too_large = True
                raise TooLarge
            yield chunk


async def _pump(
    source: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
    sink: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
    exchange: Exchange, *, inbound: bool,
) -> None:  # fmt: skip
    """Messages, pings and the close code, one way, until it ends."""
    while True:
        message = await source.receive()
        if message.type in {aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY}:
            size = len(message.data)
            exchange.received += size if inbound else 0
            exchange.sent += 0 if inbound else size
            await (sink.send_str(message.data) if message.type is aiohttp.WSMsgType.TEXT else sink.send_bytes(message.data))
        elif message.type is aiohttp.WSMsgType.PING:
            await sink.ping(message.data)
        elif message.type is aiohttp.WSMsgType.PONG:
            await sink.pong(message.data)
        else:
            code = message.data if message.type is aiohttp.WSMsgType.CLOSE else source.close_code
            await sink.close(code=sendable(code))
            return


def sendable(code: object) -> int:
    """A close code that may be sent: 1005, 1006 and 1015 exist only inside an endpoint (RFC 6455 section 7.4.1)."""
    return code if isinstance(code, int) and code in CLOSE_CODES else 1000 if code in {None, 1005} else 1011


def still_federated(view: View, proven: Proven, now: float) -> bool:
    """Does the SVID of a foreign caller still hold under what is known of its trust domain? True for all others."""
    if proven.foreign is None:
        return True
    try:
        federation.verify(proven.foreign.chain, view.trust, view.foreign, now)
    except NotVerified:
        return False
    return True


def is_websocket(request: web.BaseRequest) -> bool:
    """Does the request ask for a WebSocket upgrade (RFC 6455 section 4.2.1)?"""
    tokens = headers.connection_tokens(request.headers.items())
    return request.method == "GET" and "upgrade" in tokens and request.headers.get("Upgrade", "").lower() == "websocket"


def client_address(request: web.BaseRequest) -> str:
    """The peer's address; an IPv4 caller of an IPv6 socket is shown as IPv4."""
    remote = request.remote or ""
    return remote.removeprefix("::ffff:") if remote.startswith("::ffff:") and "." in remote else remote


def client_chain(request: web.BaseRequest) -> list[bytes]:
    """DER certificates the client presented, leaf first; empty without TLS or certificate."""
    tls = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
    if tls is None:
        return []
    public = getattr(tls, "get_unverified_chain", None)  # Python 3.13
    if public is not None:
        return list(public() or ())
    sent = tls._sslobj.get_unverified_chain() or ()  # [None] when no certificate came
    return [ssl.PEM_cert_to_DER_cert(c.public_bytes()) for c in sent if c is not None]
