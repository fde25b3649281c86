"""What both HTTP faces share: errors as JSON, bodies with a limit and a deadline, token buckets."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any, ClassVar, Final, TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel

from identity.errors import BadInput, Bug, NotFound, RetinueError, TimedOut, Unreachable
from identity.wire import parse

log = structlog.get_logger("retinue.ca.http")

M = TypeVar("M", bound=BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

BODY_S: Final = 10.0  # to send a whole body
MAX_ADDRESSES: Final = 16_384  # buckets kept


class TooMany(Unreachable):
    """Answered with 429; `retry_after` in seconds."""

    http: ClassVar[int] = 429

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            "api.rate", "too many requests from this address", hint="wait a little, then try again"
        )
        self.retry_after = max(1, round(retry_after + 0.5))


def answer(error: RetinueError) -> web.Response:
    """An error as it goes over the wire."""
    headers = {}
    if error.http in {429, 503}:
        headers["Retry-After"] = str(getattr(error, "retry_after", 1))
    return web.json_response(error.as_dict(), status=error.http, headers=headers)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever a handler raises into an answer; a defect gives its type, never its trace or text."""
    try:
        return await handler(request)
    except RetinueError as e:
        return answer(e)
    except web.HTTPNotFound:
        return answer(NotFound("api.path", "there is no such resource"))
    except web.HTTPMethodNotAllowed as e:
        response = answer(
            BadInput("api.method", f"that resource takes {', '.join(sorted(e.allowed_methods))}")
        )
        response.set_status(405)
        return response
    except web.HTTPRequestEntityTooLarge:
        response = answer(BadInput("api.large", "the request is too large"))
        response.set_status(413)
        return response
    except web.HTTPException as e:
        return answer(BadInput("api.request", f"the request is not acceptable ({e.status})"))
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as e:
        log.exception("a request met a defect", path=request.path)
        return answer(Bug("bug", f"{type(e).__name__}: this is a defect in Retinue"))


async def body(request: web.Request, kind: type[M]) -> M:
    """The request's JSON. Raises BadInput, TimedOut; the size limit is the application's."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise BadInput("api.encoding", "compressed requests are not taken")
    try:
        async with asyncio.timeout(BODY_S):
            data = await request.read()
    except TimeoutError:
        raise TimedOut("api.slow", f"the request's body did not arrive within {BODY_S:g} s") from None
    return parse(kind, data)


def peer_chain(request: web.Request) -> list[bytes]:
    """DER of the certificates the client presented, leaf first; empty when none."""
    tls = request.transport.get_extra_info("ssl_object") if request.transport else None
    if tls is None:
        return []
    public = getattr(tls, "get_unverified_chain", None)  # Python 3.13
    if public is not None:
        return list(public())
    sent: Any = tls._sslobj.get_unverified_chain() or ()
    return [ssl.PEM_cert_to_DER_cert(cert.public_bytes()) for cert in sent if cert is not None]


def reply(message: BaseModel) -> web.Response:
    """A message as JSON."""
    return web.Response(text=message.model_dump_json(), content_type="application/json")


def number(request: web.Request, name: str) -> int | None:
    """A whole number of the query, None when absent. Raises BadInput."""
    text = request.query.get(name)
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BadInput("api.query", f"{name} is not a number")
    return int(text)


def text(request: web.Request, name: str) -> str:
    """A required word of the query. Raises BadInput."""
    value = request.query.get(name, "")
    if not value or len(value) > 512:
        raise BadInput("api.query", f"{name} is missing or too long")
    return value


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


class Buckets:
    """Token buckets by client address (an IPv6 client by its /64), at most MAX_ADDRESSES of them."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, address: str) -> None:
        """One request. Raises TooMany with the seconds until the next would pass."""
        now, key = self._clock(), source(address)
        bucket = self._buckets.pop(key, None) or _Bucket(self._burst, now)
        bucket.level = min(self._burst, bucket.level + (now - bucket.at) * self._rate)
        bucket.at = now
        self._buckets[key] = bucket
        while len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        if bucket.level < 1:
            raise TooMany((1 - bucket.level) / self._rate)
        bucket.level -= 1


def source(text: str) -> str:
    """What counts as one client: an IPv4 address, an IPv6 /64."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return text[:64]
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped else str(IPv6Address(int(address) >> 64 << 64))
    return str(address)
