"""The endpoint's client of the control plane: HTTPS with TLS 1.3, our own check of the server, JSON in and out, the feed.

The server is checked inside the TLS handshake: its chain must lead to the pinned root and its leaf must be named cp/ca
of that trust domain. Until that held, neither the client certificate nor one byte of a request leaves this machine.
Host names play no part: a name in DNS proves nothing here.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
from cryptography.hazmat.primitives.serialization import Encoding

from identity import certs
from identity.bundle import TrustBundle
from identity.errors import (
    BadInput,
    BadState,
    Bug,
    NotVerified,
    RetinueError,
    TimedOut,
    Unreachable,
    from_wire,
)
from identity.names import SpiffeId
from identity.wire import LEVEL_HEADER, WIRE_LEVEL, Message, parse
from identity.wire.feed import MAX_FRAME

R = TypeVar("R", bound=Message)

# Our limits.
MAX_REPLY: Final = 1024 * 1024  # bytes of one JSON reply
MAX_ERROR: Final = 64 * 1024
CONNECT_TIMEOUT: Final = 10.0  # seconds, TCP and TLS together
REQUEST_TIMEOUT: Final = 30.0
FEED_IDLE: Final = 15.0  # seconds without a byte: several heartbeats were missed


class Busy(Unreachable):
    """The server asks to come back later; `retry_after` is in seconds, 0 when it did not say."""

    def __init__(self, code: str, message: str, *, hint: str = "", retry_after: float = 0.0) -> None:
        super().__init__(code, message, hint=hint)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class RootPin:
    """What is known before enrolment: the fingerprint of the root (lower-case hex SHA-256 of its DER)."""

    fingerprint: str


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """PEM files of the endpoint's own SVID: chain (leaf first) and key."""

    chain: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Unverified:
    """Any server: good for fetching a public document that proves itself, and for nothing else."""


Trust = RootPin | TrustBundle | Unverified


def backoff(attempt: int, unit: float, *, base: float = 0.2, cap: float = 30.0, retry_after: float = 0.0) -> float:
    """Seconds to wait before attempt number `attempt` (0-based): full jitter under a doubling ceiling.

    `unit` is uniform in [0, 1). What the server asked for is waited out first, and the jitter comes on top of it, so
    that a herd told the same number does not return together.
    """
    ceiling = min(cap, base * 2.0 ** min(max(attempt, 0), 64))
    return max(0.0, retry_after) + unit * ceiling


def check_url(url: str) -> str:
    """``https://HOST:PORT`` in its one form, without a trailing slash; several, for a CA of several processes, with
    commas between. Raises BadInput ``ca.url``.
    """
    if isinstance(url, str) and "," in url:
        return ",".join(dict.fromkeys(check_url(one) for one in url.split(",")))
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except (ValueError, AttributeError):
        parts, port = urlsplit(""), None
    plain = not (parts.username or parts.password or parts.query or parts.fragment) and parts.path in {"", "/"}
    if parts.scheme != "https" or not parts.hostname or not plain or port == 0:
        raise BadInput("ca.url", f"not the address of a CA: {ascii(url)[:120]}", hint="write https://HOST:PORT")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"https://{host}:{port or 443}"


def verify_server(chain: list[bytes], trust: RootPin | TrustBundle, now: float) -> certs.Svid:
    """Is the presenter of this DER chain (leaf first) the control plane we trust? Raises NotVerified.

    With a RootPin the chain must contain the pinned root itself; its leaf then also tells the trust domain.
    """
    presented = certs.parse_der_chain(chain)
    if isinstance(trust, RootPin):
        roots = [cert for cert in presented if certs.fingerprint(cert) == trust.fingerprint]
        if not roots:
            raise NotVerified(
                "ca.fingerprint", "the server's certificates do not lead to the root that the token names",
                hint="nothing secret was sent; check --ca, and that the token was made by this CA",
            )  # fmt: skip
        trust_domain = certs.claimed_id(presented[0]).trust_domain
        certs.check_root(roots[0], trust_domain, now)
        svid = certs.verify_chain(presented, roots, trust_domain, now)
    else:
        svid = trust.verify_svid(presented, now)
    if svid.spiffe_id != SpiffeId(svid.spiffe_id.trust_domain, certs.SERVER_NAME):
        raise NotVerified("ca.name", f"the server is {svid.spiffe_id}, not the control plane")
    return svid


class ServerRefused(ssl.SSLCertVerificationError):
    """Ends the handshake from our side; `reason` is what the user is told."""

    def __init__(self, reason: RetinueError) -> None:
        super().__init__(1, reason.message)
        self.refusal = reason


class _Context(ssl.SSLContext):
    """A client context whose connections run `check` on the peer's chain as the last step of the handshake."""

    check: Callable[[list[bytes]], None]


class _CheckedConnection(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        # Here our Finished and the client certificate are still in the outgoing buffer: raising drops them.
        context = self.context
        if not isinstance(context, _Context):
            raise ServerRefused(Bug("ca.unverified", "a connection whose server nobody checks"))
        try:
            context.check(_peer_chain(self))
        except RetinueError as e:
            raise ServerRefused(e) from None


def _peer_chain(connection: ssl.SSLObject) -> list[bytes]:
    """DER of every certificate the peer sent, leaf first."""
    public = getattr(connection, "get_unverified_chain", None)  # Python 3.13
    if public is not None:
        return list(public())
    sent = connection._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]  # same call, before it was public
    return [_der(cert) for cert in sent]


def _der(cert: Any) -> bytes:
    return ssl.PEM_cert_to_DER_cert(cert.public_bytes())


def client_context(check: Callable[[list[bytes]], None], files: ClientFiles | None) -> ssl.SSLContext:
    """TLS 1.3 only. OpenSSL's own path check is off because `check` replaces it. Raises BadState ``state.tls``."""
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    context.check = check
    context.sslobject_class = _CheckedConnection
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if files is not None:
        try:
            context.load_cert_chain(files.chain, files.key, password=_no_password)
        except (OSError, ValueError):
            raise BadState(
                "state.tls", f"cannot use {files.chain} with {files.key}", hint="enrol again with --replace"
            ) from None
    return context


def _no_password() -> str:
    """Never ask on a terminal: an encrypted key file is a damaged state."""
    raise ValueError("encrypted")


class LineSplitter:
    """Newline-delimited frames out of chunks, each at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that end in this chunk, without their newline; empty ones are left out. Raises BadInput."""
        *ended, rest = chunk.split(b"\n")
        lines = []
        for piece in ended:
            self._add(piece)
            line = b"".join(self._parts)
            self._parts, self._size = [], 0
            if line:
                lines.append(line)
        self._add(rest)
        return lines

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            raise BadInput("feed.large", f"a feed frame is larger than {self._limit} bytes")
        if piece:
            self._parts.append(piece)


class _Choice:
    """Which of the CA's processes this endpoint talks to: one for all it says, until that one fails."""

    known: ClassVar[dict[str, _Choice]] = {}

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = urls
        self.at = random.randrange(len(urls))  # noqa: S311 -- spreads endpoints over the processes

    @classmethod
    def of(cls, url: str) -> _Choice:
        """Shared by every client of the same list."""
        return cls.known.setdefault(url, cls(url.split(",")))

    @property
    def url(self) -> str:
        return self.urls[self.at]

    def failed(self, url: str) -> None:
        """Go on with the next one, unless somebody did already."""
        if self.url == url:
            self.at = (self.at + 1) % len(self.urls)


class ControlClient:
    """One endpoint's connections to the control plane. Cheap: make a new one after a renewal or a new trust bundle.

    url: ``https://HOST:PORT``, or several with commas, of which one is used until it fails; trust: what the server is checked against; files: None before enrolment;
    clock: seconds since the epoch. Every method raises RetinueError only: Unreachable, Busy, TimedOut, NotVerified, or
    what the server answered.
    """

    def __init__(
        self, url: str, trust: Trust, files: ClientFiles | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._choice = _Choice.of(check_url(url))
        self._trust = trust
        self._clock = clock
        if isinstance(trust, Unverified) and files is not None:
            raise Bug("ca.unverified", "a certificate is shown to no server that was not verified")
        self._context = client_context(self._check, files)
        self._session: aiohttp.ClientSession | None = None
        self._server: certs.Svid | None = None
        self._servers: dict[bytes, certs.Svid] = {}  # by their own certificates, as shown since the client was made

    def _check(self, chain: list[bytes]) -> None:
        self._server = None
        if not isinstance(self._trust, Unverified):
            self._server = verify_server(chain, self._trust, self._clock())
            self._servers[chain[0]] = self._server

    @property
    def url(self) -> str:
        """The process that is talked to."""
        return self._choice.url

    @contextmanager
    def _process(self) -> Iterator[str]:
        """Its address; when it cannot be reached or stops, the next try goes to another one."""
        url = self.url
        try:
            with _told(url):
                yield url
        except (Unreachable, TimedOut) as e:
            if not isinstance(e, Busy):
                self._choice.failed(url)
            raise

    @property
    def server(self) -> certs.Svid:
        """The control plane as it showed itself in the newest handshake. Raises Unreachable before the first."""
        if self._server is None:
            raise Unreachable("ca.unreachable", f"not connected to {self.url}")
        return self._server

    def believed(self, trust: TrustBundle) -> bool:
        """Would every server that this may be connected to be accepted under this bundle?"""
        try:
            for server in self._servers.values():
                trust.verify_svid(server.chain, self._clock(), expect=server.spiffe_id)
        except NotVerified:
            return False
        return bool(self._servers)

    def adopt(self, trust: TrustBundle) -> bool:
        """Go on under a newer bundle with the connections there are. False when it does not believe them: then nothing
        changed, and a new client has to be made.
        """
        if isinstance(self._trust, Unverified) or not self.believed(trust):
            return False
        self._trust = trust
        return True

    @property
    def server_leaf(self) -> bytes:
        """DER of the server's own certificate, for the enrolment transcript."""
        return self.server.leaf.public_bytes(Encoding.DER)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; an open feed ends with Unreachable."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._context, limit=8, ttl_dns_cache=None, use_dns_cache=False),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": "retinue", LEVEL_HEADER: str(WIRE_LEVEL)},
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT, sock_connect=CONNECT_TIMEOUT),
            )
        return self._session

    async def post(self, path: str, message: Message, reply: type[R], *, timeout: float = REQUEST_TIMEOUT) -> R:
        """POST a message, parse the answer. `timeout` in seconds for all of it."""
        body = message.model_dump_json(exclude_none=True).encode()
        return parse(reply, await self._exchange("POST", path, timeout, data=body))

    async def get(
        self, path: str, reply: type[R], *, params: Mapping[str, str] | None = None, timeout: float = REQUEST_TIMEOUT
    ) -> R:
        """GET and parse the answer."""
        return parse(reply, await self._exchange("GET", path, timeout, params=params))

    async def send(self, path: str, message: Message, *, timeout: float = REQUEST_TIMEOUT) -> None:
        """POST a message whose answer says nothing more than that it arrived."""
        await self._exchange("POST", path, timeout, data=message.model_dump_json(exclude_none=True).encode())

    async def _exchange(
        self, method: str, path: str, timeout: float, *, data: bytes | None = None, params: Mapping[str, str] | None = None
    ) -> bytes:
        with self._process() as url:
            async with (
                asyncio.timeout(timeout),
                self._open().request(
                    method, url + path, data=data, params=params, allow_redirects=False,
                    headers={"Content-Type": "application/json"} if data is not None else None,
                ) as response,
            ):  # fmt: skip
                if response.status != 200:
                    raise await _error_of(response)
                return await _read(response, MAX_REPLY)

    @asynccontextmanager
    async def stream(
        self, path: str, *, params: Mapping[str, str] | None = None, idle: float = FEED_IDLE, limit: int = MAX_FRAME
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """A long response as an iterator of its lines (raw bytes, no newline).

        idle: seconds without a byte after which the server counts as gone (TimedOut ``feed.silent``); limit: bytes of
        one line (BadInput ``feed.large``). The iterator never just ends: an ending is Unreachable ``feed.closed``.
        """
        with self._process() as url:
            async with asyncio.timeout(CONNECT_TIMEOUT + idle) as opening:
                response = await self._open().get(url + path, params=params, allow_redirects=False)
                try:
                    if response.status != 200:
                        raise await _error_of(response)
                    opening.reschedule(None)
                except BaseException:
                    response.close()
                    raise
        lines = _lines(response, url, idle, limit)
        try:
            yield lines
        except (Unreachable, TimedOut):
            self._choice.failed(url)
            raise
        finally:
            await lines.aclose()
            response.close()


async def _lines(response: aiohttp.ClientResponse, url: str, idle: float, limit: int) -> AsyncGenerator[bytes, None]:
    splitter = LineSplitter(limit)
    while True:
        with _told(url):
            try:
                async with asyncio.timeout(idle):
                    chunk = await response.content.readany()
            except RuntimeError:  # how aiohttp says that its own side closed the connection meanwhile
                raise Unreachable("feed.closed", f"the connection to {url} was closed") from None
            except TimeoutError:
                raise TimedOut("feed.silent", f"nothing came from {url} for {idle:g} s") from None
        if not chunk:
            raise Unreachable("feed.closed", f"{url} ended the feed")
        for line in splitter.feed(chunk):
            yield line


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > limit:
            raise BadInput("api.large", f"the server's answer is larger than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def _error_of(response: aiohttp.ClientResponse) -> RetinueError:
    try:
        body = json.loads(await _read(response, MAX_ERROR))
    except (ValueError, RecursionError, BadInput):
        body = None
    error = from_wire(response.status, body)
    if response.status in {429, 503}:
        asked = response.headers.get("Retry-After", "")
        seconds = float(asked) if asked.isascii() and asked.isdigit() and len(asked) < 6 else 0.0
        return Busy(error.code, error.message, hint=error.hint, retry_after=seconds)
    return error


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turns what the HTTP and TLS stacks raise into the error tree."""
    try:
        yield
    except RetinueError:
        raise
    except Exception as e:
        translated = _translate(e, url)
        if translated is None:
            raise
        raise translated from None


def _translate(error: Exception, url: str) -> RetinueError | None:
    if isinstance(error, aiohttp.ClientConnectorCertificateError) and isinstance(
        error.certificate_error, ServerRefused
    ):
        return error.certificate_error.refusal
    if isinstance(error, TimeoutError):  # asyncio's, aiohttp's and the socket's are all this one
        return TimedOut("ca.timeout", f"no answer from {url} in time", hint="is the CA running and reachable?")
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return Unreachable(
            "ca.tls", f"no TLS 1.3 connection to {url}: {_ssl_reason(error)}", hint="is this the port of the CA?"
        )
    if isinstance(error, aiohttp.ClientConnectorError):
        return Unreachable(
            "ca.unreachable", f"cannot connect to {url}: {error.strerror or 'no such host'}",
            hint="is the CA running and reachable?",
        )  # fmt: skip
    if isinstance(error, aiohttp.ClientError | OSError):
        return Unreachable("ca.disconnected", f"the connection to {url} broke", hint="try again")
    return None


def _ssl_reason(error: Exception) -> str:
    inner = getattr(error, "os_error", error)
    reason = getattr(inner, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else "the handshake failed"
