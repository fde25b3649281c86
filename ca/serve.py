"""The server process: one directory, one TLS listener, one admin socket; starts whole or not at all, stops gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import web

from ca import admin_api, api
from ca.authority import Lifetimes, ServerIdentity
from ca.client import socket_path
from ca.federation_service import (
    HINT_S,
    WebIdentity,
    bundle_endpoint,
    refresh_for_ever,
    spiffe_context,
    web_context,
)
from ca.gate import PREFIX
from ca.listener import Caps, Listener, allow_files, small_buffers
from ca.moves import Leases
from ca.plane import Plane
from ca.service import MAINTAIN_S, Service
from identity import certs, cliout
from identity.cliout import clean
from identity.confine import Bounds, enter
from identity.errors import BadInput, BadState, Conflict, NoPrivilege
from identity.signals import heed

log = structlog.get_logger("retinue.ca")

IDLE_S: Final = 30.0  # a connection without a request, also before its first
LINGER_S: Final = 0.5  # for so long the rest of a body that was refused is read and thrown away, so that its sender hears why
STOP_S: Final = 5.0  # for running requests at the end
SWITCH_S: Final = 0.0005  # the loop gives the lock up at every system call, and the worker would keep it for 5 ms each time
FOLLOW_S: Final = 2 * HINT_S  # for so long other trust domains may not know a new root of ours yet
RECHECK_S: Final = 600.0  # how often the TLS certificate is looked at


@dataclass(frozen=True, slots=True)
class Options:
    """`listen` as given: HOST:PORT, IPv6 in brackets; port 0 picks a free one. `heartbeat` in seconds."""

    directory: Path
    listen: str = "[::]:8443"
    heartbeat: float = 2.0
    limits: api.Limits | None = None
    caps: Caps | None = None
    lifetimes: Lifetimes | None = None
    upkeep: float = MAINTAIN_S
    bundle_listen: str | None = None  # where our bundle is served to other trust domains
    bundle_identity: WebIdentity | None = None  # a web certificate for that; without one, our own SVID
    web_roots: Path | None = None
    leases: Leases | None = None


# ---- addresses


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port. Raises BadInput."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (
        not host
        or not (port.isascii() and port.isdigit())
        or int(port) > 65535
        or (":" in host and "[" not in text)
    ):
        raise BadInput(
            "serve.listen",
            f"not an address to listen on: {ascii(text)[:80]}",
            hint="write 0.0.0.0:8443 or [::]:8443",
        )
    return host, int(port)


def listener(host: str, port: int) -> socket.socket:
    """A bound TCP socket; ``::`` takes IPv4 too, and becomes 0.0.0.0 on a machine without IPv6.

    Raises Conflict ``serve.port`` for a taken port, NoPrivilege, BadInput for an address that is not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise BadInput("serve.listen", f"not an address of this machine: {clean(host)}") from None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError:
        if host != "::":
            raise BadInput("serve.listen", f"this machine cannot listen on {host}") from None
        return listener("0.0.0.0", port)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(4096)
    except OSError as e:
        sock.close()
        if isinstance(e, PermissionError):
            raise NoPrivilege(
                "serve.privilege",
                f"may not listen on port {port}",
                hint="use a port above 1023, or run as root",
            ) from None
        if host == "::" and e.errno != errno.EADDRINUSE:
            return listener("0.0.0.0", port)
        taken = e.errno == errno.EADDRINUSE
        kind: Any = Conflict if taken else BadInput
        raise kind(
            "serve.port" if taken else "serve.listen",
            f"port {port} on {host} is in use" if taken else f"cannot listen on {host}: {e.strerror}",
            hint="choose another with --listen, or stop what uses it"
            if taken
            else "choose an address of this machine",
        ) from None
    sock.setblocking(False)
    return sock


def show(sock: socket.socket) -> str:
    """``host:port`` of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---- the directory


@contextmanager
def sole(directory: Path) -> Iterator[None]:
    """One server a directory. Raises Conflict ``serve.running``, BadState for an unusable directory."""
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        raise BadState(
            "ca.missing",
            f"there is no directory {directory}",
            hint="make a control plane with: retinue-ca init --dir DIR --trust-domain NAME",
        ) from None
    except PermissionError:
        raise NoPrivilege(
            "ca.dir", f"may not write {directory}", hint="run it as root or as the CA's own user"
        ) from None
    except OSError as e:
        raise BadState("ca.dir", f"cannot use {directory}: {e.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise Conflict(
            "serve.running", f"a server is running on {directory}", hint="see: retinue-ca info"
        ) from None
    try:
        yield
    finally:
        os.close(fd)


def tls_context(identity: ServerIdentity, roots: str) -> ssl.SSLContext:
    """TLS 1.3, no tickets; a client certificate may be shown and is then checked against the root."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_verify_locations(cadata=roots)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_cert_chain(identity.certificate, identity.key)
    return context


# ---- the process


def set_up_logs() -> None:
    """To standard error: JSON unless it is a terminal. Values are escaped either way."""
    # Never the values of variables: a trace may pass through a secret.
    terminal = sys.stderr.isatty()
    render: Any = structlog.processors.JSONRenderer()
    traces: Any = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    if terminal:
        render = structlog.dev.ConsoleRenderer(
            colors=cliout.colour(sys.stderr), exception_formatter=structlog.dev.plain_traceback
        )
        traces = _as_is
    structlog.configure(
        processors=[
            structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True), _escape,
            traces, render,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )  # fmt: skip
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    # A malformed request is its sender's business: no trace and none of its bytes for every one of them. What goes
    # wrong in a handler is logged by ca/http.py.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def harden(*writable: Path) -> None:
    """No core dumps and no look into this process by others: the keys are in it (prctl(2), PR_SET_DUMPABLE). No system
    calls it does not need, and with `writable` no file outside those directories can be changed (identity/confine.py).

    As many open files as the machine lets us have: strangers who open connections must not use them up.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)
    enter(Bounds(read=(Path("/"),) if writable else None, write=writable))


def _escape(_: Any, __: str, event: Any) -> Any:
    return {k: clean(v) if isinstance(v, str) else v for k, v in event.items()}


def _as_is(_: Any, __: str, event: Any) -> Any:
    return event


def notify(text: str) -> None:
    """Tell the service manager (sd_notify(3)); nothing when there is none."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s,
    ):
        s.sendto(text.encode(), "\0" + path[1:] if path.startswith("@") else path)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts requests."""

    service: Service
    listen: str
    admin: Path
    front: Listener
    bundle: str | None = None


@asynccontextmanager
async def running(options: Options) -> AsyncIterator[Running]:
    """Start everything, yield, stop everything. Raises RetinueError when any part cannot start."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole(options.directory))
        admin_path = socket_path(options.directory)
        sock = stack.enter_context(contextlib.closing(listener(*parse_listen(options.listen))))
        plane = Plane.open(options.directory, time.time, lifetimes=options.lifetimes)
        plane.listen = show(sock)
        service = Service(plane, heartbeat=options.heartbeat, upkeep=options.upkeep, leases=options.leases)
        await service.start()
        async with contextlib.AsyncExitStack() as late:
            late.push_async_callback(service.stop)
            tls = await _listen_tls(late, service, sock, options)
            await _listen_admin(late, service, admin_path, show(sock))
            renewing = asyncio.create_task(_renew_tls(service, tls))
            late.callback(renewing.cancel)
            service.web_roots = None if options.web_roots is None else str(options.web_roots)
            if not plane.replica:
                fetching = asyncio.create_task(refresh_for_ever(service, service.web_roots))
                late.callback(fetching.cancel)
            bundle_at = await _listen_bundle(late, service, tls, options)
            assert tls.front is not None
            # Nobody new, then everybody out at once; what else runs has STOP_S to come to its end.
            late.callback(service.hang_up)
            late.push_async_callback(tls.front.close)
            yield Running(service, show(sock), admin_path, tls.front, bundle_at)


@dataclass(slots=True)
class _Tls:
    context: ssl.SSLContext
    identity: ServerIdentity
    root: str  # PEM, of what the identity hangs from
    front: Listener | None = None
    bundle: ssl.SSLContext | None = None
    bundle_shows: tuple[str, int] = ("", 0)  # root and end of the certificate in it
    bundle_turns: int | None = None  # when it shows a new root, if it still shows the one before


async def _listen_tls(
    late: contextlib.AsyncExitStack, service: Service, sock: socket.socket, options: Options
) -> _Tls:
    plane = service.plane
    identity, roots, root = await service.read(lambda: _shown(plane))
    tls = _Tls(tls_context(identity, roots), identity, root)
    app = api.make_app(service, lambda: tls.identity.leaf_der, options.limits)
    app.add_subapp(PREFIX, admin_api.make_app(service, lambda: show(sock)))
    runner = web.AppRunner(
        app,
        access_log=None, keepalive_timeout=IDLE_S, shutdown_timeout=STOP_S, handler_cancellation=True,
        auto_decompress=False, lingering_time=LINGER_S,
    )  # fmt: skip
    await runner.setup()
    late.push_async_callback(runner.cleanup)
    assert runner.server is not None
    small_buffers()
    server, caps = runner.server, options.caps or Caps()
    caps = replace(caps, established=allow_files(caps.established))
    front = Listener(sock, server, tls.context, lambda: len(server.connections), caps)
    late.push_async_callback(front.close)  # when a later part does not start
    tls.front = front
    return tls


async def _listen_bundle(
    late: contextlib.AsyncExitStack, service: Service, tls: _Tls, options: Options
) -> str | None:
    if options.bundle_listen is None:
        return None
    sock = listener(*parse_listen(options.bundle_listen))
    late.callback(sock.close)

    def context() -> ssl.SSLContext:
        if options.bundle_identity is not None:
            return web_context(options.bundle_identity)
        tls.bundle = spiffe_context(tls.identity.certificate, tls.identity.key)
        tls.bundle_shows = (tls.root, tls.identity.not_after)
        return tls.bundle

    await late.enter_async_context(bundle_endpoint(service, sock, context))
    return show(sock)


def _shown(plane: Plane) -> tuple[ServerIdentity, str, str]:
    """Our TLS identity now, the roots that callers may come from, and the one that the identity hangs from."""
    identity = plane.authority.server_chain(plane.clock())
    return identity, plane.trust.roots_pem(), certs.pem(plane.authority.root)


async def _listen_admin(late: contextlib.AsyncExitStack, service: Service, path: Path, listen: str) -> None:
    runner = web.AppRunner(
        admin_api.make_app(service, lambda: listen),
        access_log=None,
        keepalive_timeout=IDLE_S,
        shutdown_timeout=STOP_S,
        auto_decompress=False,
    )
    await runner.setup()
    late.push_async_callback(runner.cleanup)
    path.unlink(missing_ok=True)  # of a server that was killed: we hold the lock
    old = os.umask(0o177)
    try:
        await web.UnixSite(runner, str(path)).start()
    except OSError as e:
        raise BadState("ca.dir", f"cannot make {path}: {e.strerror}") from None
    finally:
        os.umask(old)
    late.callback(path.unlink, missing_ok=True)


async def _renew_tls(service: Service, tls: _Tls) -> None:
    """A new certificate when it is time or its issuer went, and a new context whenever the roots may be others."""
    plane = service.plane
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(RECHECK_S, service.upkeep)):
                await service.trust_changed.wait()
        service.trust_changed.clear()
        try:
            identity, roots, root = await service.read(lambda: _shown(plane))
            context = tls_context(identity, roots)
            assert tls.front is not None
            tls.front.use(context)
            tls.context, tls.identity, tls.root = context, identity, root
            if tls.bundle is not None and not _followers_wait(tls, roots, plane.now):
                tls.bundle.load_cert_chain(identity.certificate, identity.key)
                tls.bundle_shows, tls.bundle_turns = (root, identity.not_after), None
        except Exception as e:
            log.critical("the TLS certificate could not be renewed", why=f"{type(e).__name__}: {e}")


def _followers_wait(tls: _Tls, roots: str, now: int) -> bool:
    """Does the bundle endpoint still show a certificate of the root before? Other trust domains know a new root only once they
    have fetched the bundle, so they get FOLLOW_S to do so, unless the old root is trusted no more.
    """
    root, end = tls.bundle_shows
    if root == tls.root or root not in roots:
        return False
    tls.bundle_turns = tls.bundle_turns or now + FOLLOW_S
    return now < min(tls.bundle_turns, end - HINT_S)


async def serve(options: Options, ready: Any) -> None:
    """Run until SIGTERM or SIGINT. `ready` is called with Running once requests are accepted."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    sys.setswitchinterval(SWITCH_S)
    heed(loop, (signal.SIGTERM, signal.SIGINT), stop.set)
    async with running(options) as server:
        ready(server)
        notify(f"READY=1\nSTATUS=listening on {server.listen}")
        log.info("ready", listen=server.listen, trust_domain=str(server.service.plane.trust_domain))
        await stop.wait()
        notify("STOPPING=1")
        log.info("stopping")
