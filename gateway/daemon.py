"""`retinue-gateway`: listeners, health, reload on SIGHUP, graceful drain on SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from identity import cliout
from identity.errors import BadInput, Conflict, NoPrivilege, RetinueError
from identity.signals import heed

if TYPE_CHECKING:
    from aiohttp import web

    from gateway.config import Config, Listen
    from gateway.ingress import Ingress
    from gateway.view import Pin, View

LOG = logging.getLogger("retinue.gateway")
BACKLOG = 512


def pin_of(config: Config) -> Pin:
    """Where trust begins: what the file says, else what the agent's enrolment pinned. Raises BadState, BadInput."""
    from gateway.view import Pin
    from identity.names import TrustDomain
    from identity.wire import parse
    from mesh.enroll import EndpointFile

    if config.trust_domain is not None and config.root_fingerprint is not None:
        return Pin(TrustDomain(config.trust_domain), config.root_fingerprint)
    path = config.state_dir / "endpoint.json"
    try:
        about = parse(EndpointFile, path.read_bytes())
    except OSError as e:
        raise BadInput(
            "gateway.pin", f"cannot read {path}: {e.strerror}",
            hint="enrol this host, or set trust_domain and root_fingerprint in the configuration",
        ) from None  # fmt: skip
    return Pin(TrustDomain(about.trust_domain), about.root_fingerprint)


def tls_context(listen: Listen, view: View | None) -> ssl.SSLContext | None:
    """TLS 1.2+ with optional client certificates. Raises BadInput for files that cannot be used."""
    if listen.plaintext:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET  # a resumed session would skip the check of the client's certificate
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a pinned certificate is an anchor by itself
    file: Path | None = listen.certificate
    try:
        context.load_cert_chain(str(listen.certificate), str(listen.key))
        for file in listen.client_ca:
            context.load_verify_locations(cafile=str(file))
    except (OSError, ssl.SSLError) as e:
        why = e.strerror if isinstance(e, OSError) and not isinstance(e, ssl.SSLError) else "not usable PEM"
        raise BadInput("gateway.certificate", f"cannot use {file}: {why}") from None
    if view is not None and (roots := client_roots(listen, view)):
        context.load_verify_locations(cadata=roots)
    return context


def client_roots(listen: Listen, view: View) -> str:
    """PEM roots of the one trust domain whose client certificates this listener takes; empty: none is known now."""
    from gateway.federation import roots_pem

    return view.trust.roots_pem() if listen.federation is None else roots_pem(view.foreign, listen.federation)


class Listener:
    """One public address. TLS settings are exchanged under it without a moment in which nobody listens."""

    def __init__(self, listen: Listen, handshake: float) -> None:
        self.listen, self._handshake = listen, handshake
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1]) if self._socket is not None else 0

    def bind(self) -> None:
        """Raises Conflict for a taken address, NoPrivilege for a port that needs one."""
        from gateway.config import split_address

        host, port = split_address(self.listen.address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if host == "::":
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((host, port))
            sock.listen(BACKLOG)
        except OSError as e:
            sock.close()
            if isinstance(e, PermissionError):
                raise NoPrivilege("gateway.port", f"cannot listen on {self.listen.address}: {e.strerror}") from None
            raise Conflict("gateway.port", f"cannot listen on {self.listen.address}: {e.strerror}",
                           hint="another process has it: ss -ltnp") from None  # fmt: skip
        sock.setblocking(False)
        self._socket = sock

    async def serve(self, factory: Any, context: ssl.SSLContext | None) -> None:
        """Accept with these settings from now on; connections made before keep theirs."""
        assert self._socket is not None
        before = self._server
        self._server = await asyncio.get_running_loop().create_server(
            factory, sock=self._socket.dup(), ssl=context, ssl_handshake_timeout=self._handshake if context else None
        )  # fmt: skip
        if before is not None:
            await _retire(before)

    async def close(self) -> None:
        """Accept no more."""
        if self._socket is not None:
            self._socket.close()
        if self._server is not None:
            await _retire(self._server)


async def _retire(server: asyncio.Server) -> None:
    """Close a server without losing a connection that it has accepted and not yet given a transport.

    asyncio (3.11) drops such a connection without closing it when the server is closed in between.
    """
    loop = asyncio.get_running_loop()
    for sock in server.sockets:
        loop.remove_reader(sock.fileno())
    for _ in range(3):  # turns of the loop: accept, then the task that makes the transport
        await asyncio.sleep(0)
    server.close()


class Gateway:
    """The process: configuration, agent link, ingress, listeners, health."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listeners: dict[str, Listener] = {}
        self._stop = asyncio.Event()
        self._refresh = asyncio.Event()
        self._roots = ""

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises what the configuration or the ports make impossible at the start."""
        from gateway.agent import AgentLink
        from gateway.config import load_config
        from gateway.connections import FrontServer
        from gateway.ingress import Ingress
        from mesh.sd_notify import notify

        config = load_config(self.path)
        pin = pin_of(config)
        ingress = Ingress(config)
        link = AgentLink(config.agent, pin, lambda view: self._on_view(ingress, view))
        ingress.explain = link.explain
        link.callers = config.caller
        server = FrontServer(ingress.handle, config.limits)
        await self._apply(config, ingress, server)
        health = await self._health(config, ingress, link)
        following = asyncio.create_task(link.run())
        loop = asyncio.get_running_loop()
        heed(loop, (signal.SIGTERM, signal.SIGINT), self._stop.set)
        reload = asyncio.Event()
        heed(loop, [signal.SIGHUP], reload.set)
        refreshing = asyncio.create_task(self._refresher(ingress, server))
        reloading = asyncio.create_task(self._reloader(reload, ingress, server, link))
        notify("READY=1")
        LOG.info("ready: %s", ", ".join(f"{a} (port {x.port})" for a, x in self._listeners.items()))
        await self._stop.wait()

        notify("STOPPING=1")
        for listener in self._listeners.values():
            await listener.close()
        server.pre_shutdown()
        clean = await ingress.drained(ingress.config.drain)
        LOG.info("drained" if clean else "drain time is over: the rest is cut")
        for task in (following, refreshing, reloading):
            task.cancel()
        await asyncio.gather(following, refreshing, reloading, return_exceptions=True)
        await ingress.close()
        await server.shutdown(1.0)
        if health is not None:
            await health.cleanup()

    def _on_view(self, ingress: Ingress, view: View) -> None:
        ingress.update(view)
        roots = "\n".join(client_roots(x, view) for x in ingress.config.listen)
        if roots != self._roots:  # the TLS layer must learn the new roots
            self._roots = roots
            self._refresh.set()

    async def _refresher(self, ingress: Ingress, server: web.Server) -> None:
        while True:
            await self._refresh.wait()
            self._refresh.clear()
            try:
                await self._apply(ingress.config, ingress, server)
            except RetinueError as e:
                LOG.warning("listeners keep their settings: [%s] %s", e.code, e.message)

    async def _reloader(self, reload: asyncio.Event, ingress: Ingress, server: web.Server, link: Any) -> None:
        from gateway.config import load_config

        while True:
            await reload.wait()
            reload.clear()
            try:
                config = load_config(self.path)
                await self._apply(config, ingress, server)
            except RetinueError as e:
                LOG.warning("configuration not reloaded, the one before stays: [%s] %s", e.code, e.message)
                continue
            ingress.reconfigure(config)
            await link.attach(config.caller)
            LOG.info("configuration reloaded")

    async def _apply(self, config: Config, ingress: Ingress, server: web.Server) -> None:
        """Make the listeners fit. All new settings are made before any old one is given up."""
        contexts = {x.address: tls_context(x, ingress.view) for x in config.listen}
        made: dict[str, Listener] = {}
        try:
            for listen in config.listen:
                if listen.address not in self._listeners:
                    listener = Listener(listen, config.limits.handshake)
                    listener.bind()
                    made[listen.address] = listener
        except RetinueError:
            for listener in made.values():
                await listener.close()
            raise
        wanted = {x.address for x in config.listen}
        for address in [a for a in self._listeners if a not in wanted]:
            await self._listeners.pop(address).close()
        self._listeners |= made
        for listen in config.listen:
            self._listeners[listen.address].listen = listen
            await self._listeners[listen.address].serve(server, contexts[listen.address])

    async def _health(self, config: Config, ingress: Ingress, link: Any) -> web.ServerRunner | None:
        if config.health is None:
            return None
        from aiohttp import web

        from gateway.config import split_address

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            if request.path != "/healthz":
                return web.Response(status=404)
            view = ingress.view
            ready = view is not None and not ingress.draining
            body = {
                "ready": ready, "draining": ingress.draining, "timeline": view.timeline if view else None,
                "revision": view.revision if view else None, "policy_digest": view.policy.digest if view and view.policy else None,
                "exchanges": len(ingress.exchanges), "problem": link.error,
                "unattached": {name: why for name, why in link.unattached.items() if why},
            }  # fmt: skip
            return web.json_response(body, status=200 if ready else 503)

        runner = web.ServerRunner(web.Server(answer, access_log=None))
        await runner.setup()
        host, port = split_address(config.health)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as e:
            await runner.cleanup()
            raise Conflict("gateway.port", f"cannot listen on {config.health} for health: {e.strerror}") from None
        return runner


class _JsonLines(logging.Formatter):
    """One JSON object a line; the access log brings its own."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "retinue.gateway.access":
            return record.getMessage()
        return json.dumps({"event": "log", "level": record.levelname.lower(), "message": record.getMessage()})


class _Parser(argparse.ArgumentParser):
    """Usage errors in the one form."""

    def error(self, message: str) -> NoReturn:
        raise BadInput("usage", message, hint=f"see: {self.prog} --help")



def _harden() -> None:
    """It faces everybody and writes no file: from now on it cannot. No core dumps: keys are in it."""
    import ctypes
    import resource

    from identity.confine import Bounds, enter

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    enter(Bounds(read=(Path("/"),)))

def main() -> None:
    """The console script."""
    parser = _Parser(
        prog="retinue-gateway", description="North-south ingress: outside callers become identities, policy decides, the mesh carries.",
        epilog="Example: retinue-gateway --config /etc/retinue/gateway.toml --check",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML; see examples/gateway")
    parser.add_argument("--check", action="store_true", help="read and check the configuration, then leave")

    def body() -> None:
        args = parser.parse_args()
        from gateway.config import load_config

        if args.check:
            config = load_config(args.config)
            for listen in config.listen:
                tls_context(listen, None)
            print(f"{args.config}: {len(config.listen)} listeners, {len(config.caller)} callers, {len(config.route)} routes: ok")
            return
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonLines())
        logging.getLogger("retinue").addHandler(handler)
        logging.getLogger("retinue").setLevel(logging.INFO)
        _harden()
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_serve(args.config))

    cliout.run(body)


async def _serve(path: Path) -> None:
    await Gateway(path).run()


def entry(argv: Sequence[str]) -> None:
    """`main` with an argument list."""
    sys.argv = ["retinue-gateway", *argv]
    main()


if __name__ == "__main__":
    main()
