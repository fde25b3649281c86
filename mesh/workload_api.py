"""The SPIFFE Workload API on RUN_DIR/workload.sock: X.509 SVIDs and bundles for the programs of this machine.

Everybody may connect; who the caller is says the kernel (mesh/attestation.py), and mesh/identities.py what it is given.

Each message of a stream is everything the caller has; one is sent at once, then at every change: a renewed certificate, a
new bundle, an instance attached or gone. When nothing is left (moved, revoked, ended, detached) the stream ends with
PermissionDenied. JWT-SVIDs are signed by the CA for instances that are placed here, and validated here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from grpclib.config import Configuration
from grpclib.const import Cardinality, Status
from grpclib.const import Handler as Method
from grpclib.exceptions import GRPCError
from grpclib.protocol import H2Protocol
from grpclib.server import Handler, Server, Stream

from identity.errors import BadInput, BadState, NotFound, NotVerified, Refused, RetinueError, Unreachable
from identity.jwt import check_audience, jwks
from identity.names import SpiffeId
from identity.records import JwtAuthority
from identity.wire.local import SvidFiles
from mesh.attestation import Caller, NotAttested, attest, own_namespace
from mesh.identities import Given, check_given, foreign_bundles, identities, instance_order, svid_of_given
from mesh.jwt_svid import verify as verify_jwt
from mesh.local_api import listen_on
from mesh.svid_files import API_SOCKET
from mesh.workload_proto import (
    MAX_REQUEST,
    Codec,
    Empty,
    Encodable,
    JwtBundlesResponse,
    JwtSvid,
    JwtSvidRequest,
    JwtSvidResponse,
    ValidateJwtSvidRequest,
    ValidateJwtSvidResponse,
    X509BundlesResponse,
    X509Svid,
    X509SvidResponse,
)

if TYPE_CHECKING:
    from mesh.endpoint import Agent

HEADER: Final = "workload.spiffe.io"
LOOK: Final = 2.0  # seconds, the longest time between two looks whether a certificate wants renewal
REQUEST_TIMEOUT: Final = 10.0  # seconds until a stream has to have sent its request
_WINDOW: Final = 2**16 - 1  # bytes a client may send ahead: HTTP/2's smallest default, requests are empty

log = structlog.get_logger("retinue.workload")
# grpclib writes a traceback whenever a client goes away; what matters is said here.
logging.getLogger("grpclib").setLevel(logging.CRITICAL)


# ---- limits


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings. A caller, here, is one user in one network namespace; strangers are connections without an identity yet.

    Of strangers, each user but root has so many: a container's root is the machine's, as far as the kernel tells.
    """

    connections: int = 256
    strangers: int = 64
    user_strangers: int = 16
    caller_connections: int = 64
    caller_streams: int = 128
    process_streams: int = 32

    @classmethod
    def here(cls) -> Limits:
        """With as many connections as a quarter of the files this process may open: each holds two."""
        return cls(connections=max(64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)))


class Full(Refused):
    """A ceiling is reached."""


class Tally:
    """How many of what are open."""

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()

    def take(self, ceilings: Mapping[Hashable, int]) -> Callable[[], None]:
        """Count one more under each key, all or none; returns what gives them back. Raises Full."""
        for key, ceiling in ceilings.items():
            if self._counts[key] >= ceiling:
                raise Full("workload.limit", f"at most {ceiling} of these may be open at a time")
        self._counts.update(ceilings.keys())

        def give_back() -> None:
            for key in ceilings:
                self._counts[key] -= 1
            self._counts += Counter()  # keys at zero go

        return give_back

    def __len__(self) -> int:
        return len(self._counts)


# ---- what is said


def x509_svid(hint: str, files: SvidFiles) -> X509Svid:
    """The message for an identity."""
    private = load_pem_private_key(files.key.encode(), None)
    return X509Svid(
        spiffe_id=files.spiffe_id, svid=_der(files.certificate),
        key=private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()), bundle=_der(files.bundle), hint=hint,
    )  # fmt: skip


def _der(pem: str) -> bytes:
    return b"".join(cert.public_bytes(Encoding.DER) for cert in x509.load_pem_x509_certificates(pem.encode()))


def grpc_error(error: RetinueError) -> GRPCError:
    """How a refusal is said: nothing that a retry could mend is final for a client."""
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    match error:
        case Full():
            return GRPCError(Status.RESOURCE_EXHAUSTED, text)
        case NotVerified():
            return GRPCError(Status.UNAVAILABLE, "the certificate that the CA sent was refused")
        case Refused() | NotFound():
            return GRPCError(Status.PERMISSION_DENIED, text)
        case BadInput(code="proto.malformed" | "workload.header" | "workload.request" | "jwt.audience" | "jwt.invalid"):
            return GRPCError(Status.INVALID_ARGUMENT, text)
        case _:
            return GRPCError(Status.UNAVAILABLE, text)


# ---- the server


@dataclass(slots=True)
class Peer:
    """The other end of one connection: attested, or why not. group: its user and network namespace."""

    caller: Caller | None
    group: Hashable
    denied: NotAttested | None
    known: bool
    give_back: Callable[[], None] = field(repr=False)


class WorkloadApi:
    """The server. It may fail to start without taking the agent along: health says so, traffic goes on."""

    def __init__(self, agent: Agent, limits: Limits | None = None) -> None:
        self.agent = agent
        self.path = agent.config.run_dir / API_SOCKET
        self.limits = limits or Limits.here()
        self.own = own_namespace()
        self.connections: set[Connection] = set()
        self._tally = Tally()
        self._bells: set[asyncio.Event] = set()
        self._server: _Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        try:
            make_reachable(self.path.parent)
            listener = listen_on(self.path, mode=0o666)
        except RetinueError as e:
            self.agent.health.put("workload.socket", "error", f"no Workload API: {e.message}")
            log.error("no Workload API", code=e.code, why=e.message)  # noqa: TRY400 -- a refusal, not a defect
            return self
        server = _Server(self)
        # grpclib's own start() would take the path, but not a listener whose mode was right from the first moment.
        server._server = await asyncio.get_running_loop().create_unix_server(server._protocol_factory, sock=listener)
        self._server = server
        self._tasks = [
            asyncio.create_task(self._steadily(self._follow), name="workload changes"),
            asyncio.create_task(self._steadily(self._renew), name="workload renewals"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        server, self._server = self._server, None
        if server is not None and server._server is not None:
            server._server.close()
            for connection in list(self.connections):
                connection.end()
            await asyncio.gather(*(handler.wait_closed() for handler in server._handlers))
            self.path.unlink(missing_ok=True)

    # ---- callers

    def admit(self, connection: Any) -> Peer:
        """The peer of a new connection, counted. Raises Full."""
        caller, denied, group, known = None, None, None, False
        try:
            caller = attest(connection)
            with caller.namespace() as space:
                group = (caller.uid, space)
            known = bool(identities(self.agent, caller, self.own))
        except NotAttested as e:
            denied = e
        except RetinueError:
            pass  # it may be given an identity later
        ceilings: dict[Hashable, int] = {"connections": self.limits.connections}
        if known:
            ceilings["connections", group] = self.limits.caller_connections
        else:
            ceilings["strangers"] = self.limits.strangers
            if caller is None or caller.uid != 0:
                ceilings["strangers", caller and caller.uid] = self.limits.user_strangers
        try:
            return Peer(caller, group, denied, known, self._tally.take(ceilings))
        except Full:
            if caller is not None:
                caller.close()
            raise

    def welcome(self, peer: Peer) -> None:
        """It has an identity by now: its connection is no stranger's any more. Without room for it it stays one."""
        if not peer.known:
            with contextlib.suppress(Full):
                known = self._tally.take({("connections", peer.group): self.limits.caller_connections})
                peer.give_back()
                connection = self._tally.take({"connections": self.limits.connections})  # the place just given back

                def give_back() -> None:
                    known()
                    connection()

                peer.known, peer.give_back = True, give_back

    def open_stream(self, peer: Peer, caller: Caller) -> Callable[[], None]:
        """Count one more stream of the peer. Raises Full."""
        return self._tally.take({
            ("streams", peer.group): self.limits.caller_streams, ("process", caller.pid): self.limits.process_streams,
        })  # fmt: skip

    # ---- what is told

    async def svids(self, caller: Caller) -> X509SvidResponse:
        """Everything the caller has. Raises what `identities` raises and what the CA answered."""
        for _ in range(5):  # an instance may come or go while the CA is asked
            given = identities(self.agent, caller, self.own)
            try:
                found = [x509_svid(one.hint, await svid_of_given(self.agent, one)) for one in given]
            except (Refused, NotFound):
                if identities(self.agent, caller, self.own) == given:
                    raise
                continue
            if identities(self.agent, caller, self.own) == given:
                return X509SvidResponse(tuple(found), federated=self._foreign_roots())
        raise Unreachable("workload.busy", "the instances of this namespace keep changing")

    async def bundles(self, caller: Caller) -> X509BundlesResponse:
        """The roots of the trust domain and of those it federates with. Raises what `identities` raises."""
        identities(self.agent, caller, self.own)
        trust = self.agent.uplink.trust
        return X509BundlesResponse({**self._foreign_roots(), f"spiffe://{trust.trust_domain}": _der(trust.roots_pem())})

    def _foreign_roots(self) -> dict[str, bytes]:
        return {f"spiffe://{one.foreign}": _der("".join(one.roots)) for one in foreign_bundles(self.agent)}

    # ---- JWT-SVIDs

    async def jwt_svids(self, caller: Caller, request: JwtSvidRequest) -> JwtSvidResponse:
        """A token of each identity, or of the one asked for. Raises as `svids`, and BadInput ``jwt.audience``."""
        check_audience(request.audience)
        trust_domain = self.agent.uplink.trust.trust_domain
        wanted: dict[str, Given] = {}
        for one in identities(self.agent, caller, self.own):
            wanted.setdefault(str(SpiffeId.workload(trust_domain, instance_order(one.key)[0])), one)
        if request.spiffe_id:
            wanted = {k: v for k, v in wanted.items() if k == request.spiffe_id}
            if not wanted:
                raise Refused("workload.nobody", "the calling process does not have that identity")
        out = []
        for one in wanted.values():
            check_given(self.agent, one)
            name, number = instance_order(one.key)
            held = await self.agent.jwts.get(name, number, request.audience)
            out.append(JwtSvid(held.spiffe_id, held.token, one.hint))
        if not {one.key for one in wanted.values()} <= {one.key for one in identities(self.agent, caller, self.own)}:
            raise Unreachable("workload.busy", "the instances of this namespace keep changing")
        return JwtSvidResponse(tuple(out))

    async def jwt_bundles(self, caller: Caller) -> JwtBundlesResponse:
        """The JWT keys of the trust domain and of those it federates with. Raises what `identities` raises."""
        identities(self.agent, caller, self.own)
        known: dict[str, Sequence[JwtAuthority]] = {one.foreign: one.jwt_authorities for one in foreign_bundles(self.agent)}
        trust = self.agent.uplink.trust
        known[trust.trust_domain.name] = trust.jwt_authorities
        return JwtBundlesResponse({f"spiffe://{name}": jwks(keys) for name, keys in known.items()})

    async def validate_jwt(self, caller: Caller, request: ValidateJwtSvidRequest) -> ValidateJwtSvidResponse:
        """What a token says, if it holds. Raises what `identities` raises, BadInput ``jwt.invalid`` when it does not."""
        identities(self.agent, caller, self.own)
        check_audience([request.audience])
        foreign = {one.foreign: one.jwt_authorities for one in foreign_bundles(self.agent)}
        try:
            found = verify_jwt(self.agent.uplink.trust, request.svid, request.audience, time.time(), foreign)
        except NotVerified as e:
            raise BadInput("jwt.invalid", e.message, hint=e.hint) from None
        return ValidateJwtSvidResponse(str(found.spiffe_id), found.claims)

    async def changes(self, ask: Callable[[], Awaitable[Encodable]]) -> AsyncIterator[Encodable]:
        """What `ask` answers now, and every answer that differs from the one before."""
        bell, last = asyncio.Event(), None
        self._bells.add(bell)
        try:
            while True:
                bell.clear()
                answer = await ask()
                if answer != last:
                    last = answer
                    yield answer
                await bell.wait()
        finally:
            self._bells.discard(bell)

    def ring(self) -> None:
        """Something may have changed: every stream looks."""
        for bell in self._bells:
            bell.set()

    async def _steadily(self, work: Callable[[], Awaitable[None]]) -> None:
        """`work`, for ever: streams that nobody wakes would tell an old truth."""
        while True:
            try:
                await work()
            except Exception:
                log.exception("the Workload API stumbled")
            self.ring()
            await asyncio.sleep(1.0)

    async def _follow(self) -> None:
        async for _ in self.agent.watch():
            self.ring()

    async def _renew(self) -> None:
        """Let the streams look when a certificate wants renewal; who looks first renews it."""
        while True:
            due = self.agent.svids.due()
            left = LOOK if due is None else due - time.time()
            await asyncio.sleep(max(0.2, min(left, LOOK)))
            if due is not None and left <= LOOK:
                self.ring()


def make_reachable(directory: Path) -> None:
    """Let every user reach the socket, and none but us replace it. Raises BadState."""
    try:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        found = directory.stat()
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o022 or found.st_uid not in {0, os.geteuid()}:
            raise BadState(
                "workload.directory", f"{directory} can be written by others", hint=f"chmod go-w {directory}"
            )
        if mode & 0o011 != 0o011:
            directory.chmod(mode | 0o011)  # to pass through, not to list
    except OSError as e:
        raise BadState("workload.directory", f"cannot prepare {directory}: {e.strerror}") from None


class _Server(Server):
    """grpclib's server, with connections that know their caller. What is overridden is pinned with its version."""

    def __init__(self, api: WorkloadApi) -> None:
        config = Configuration(http2_connection_window_size=_WINDOW, http2_stream_window_size=_WINDOW)
        super().__init__([], codec=Codec(), config=config)
        self.api = api

    def _protocol_factory(self) -> H2Protocol:
        self.__gc_step__()
        handler = Handler({}, self._codec, None, self.__dispatch__)
        self._handlers.add(handler)
        return Connection(self.api, handler, self._config, self._h2_config)


class Connection(H2Protocol):
    """One HTTP/2 connection: attested before a byte of it is read, dropped when it sends more than requests."""

    def __init__(self, api: WorkloadApi, handler: Handler, *args: Any) -> None:
        super().__init__(handler, *args)
        self.api, self._methods = api, handler
        self.transport: asyncio.Transport | None = None
        self.peer: Peer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        try:
            self.peer = self.api.admit(transport.get_extra_info("socket"))
        except Full as e:
            log.warning("a connection was refused", why=e.message)
            transport.abort()
            return
        self._methods.mapping = Service(self.api, self.peer).__mapping__()
        self.api.connections.add(self)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        try:
            super().data_received(data)
        except Exception as e:  # whatever a hostile client makes the HTTP/2 machine raise
            log.info("a connection was dropped", why=type(e).__name__)
            self.transport.abort()
            return
        if any(stream.data_received > MAX_REQUEST for stream in self.processor.streams.values()):
            log.info("a connection was dropped", why="a request is too large")
            self.transport.abort()

    def end(self) -> None:
        """The server ends: the client sees its connection close, and comes back to the next one."""
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.peer is None:
            return
        super().connection_lost(exc)
        self.api.connections.discard(self)
        self.peer.give_back()
        if self.peer.caller is not None:
            self.peer.caller.close()
        self.peer = None


RpcStream = Stream[Any, Any]


class Service:
    """The calls of one connection."""

    def __init__(self, api: WorkloadApi, peer: Peer) -> None:
        self.api, self.peer = api, peer
        self._said = False

    def __mapping__(self) -> dict[str, Method]:
        """Path -> method, as grpclib wants it. The service has no package."""
        return {
            f"/SpiffeWorkloadAPI/{name}": Method(method, cardinality, bytes, Encodable)
            for name, method, cardinality in (
                ("FetchX509SVID", self.fetch_x509_svid, Cardinality.UNARY_STREAM),
                ("FetchX509Bundles", self.fetch_x509_bundles, Cardinality.UNARY_STREAM),
                ("FetchJWTSVID", self.fetch_jwt_svid, Cardinality.UNARY_UNARY),
                ("FetchJWTBundles", self.fetch_jwt_bundles, Cardinality.UNARY_STREAM),
                ("ValidateJWTSVID", self.validate_jwt_svid, Cardinality.UNARY_UNARY),
            )
        }

    async def fetch_x509_svid(self, stream: RpcStream) -> None:
        """Certificates, keys and roots of the caller; again at every change."""
        await self._follow(stream, self.api.svids)

    async def fetch_x509_bundles(self, stream: RpcStream) -> None:
        """Roots; again at every change."""
        await self._follow(stream, self.api.bundles)

    async def fetch_jwt_svid(self, stream: RpcStream) -> None:
        """Tokens of the caller."""
        await self._once(stream, lambda caller, data: self.api.jwt_svids(caller, JwtSvidRequest.decode(data)))

    async def fetch_jwt_bundles(self, stream: RpcStream) -> None:
        """Keys that tokens are checked with; again at every change."""
        await self._follow(stream, self.api.jwt_bundles)

    async def validate_jwt_svid(self, stream: RpcStream) -> None:
        """Does a token of somebody hold?"""
        await self._once(stream, lambda caller, data: self.api.validate_jwt(caller, ValidateJwtSvidRequest.decode(data)))

    def _caller(self, stream: RpcStream, counted: contextlib.ExitStack) -> Caller:
        check_header(stream)
        caller = self.peer.caller
        if caller is None or self.peer.denied is not None:
            raise self.peer.denied or NotAttested("attest.gone", "the calling process is not known")
        counted.callback(self.api.open_stream(self.peer, caller))
        return caller

    async def _once(self, stream: RpcStream, ask: Callable[[Caller, bytes], Awaitable[Encodable]]) -> None:
        with self._errors(), contextlib.ExitStack() as counted:
            caller = self._caller(stream, counted)
            answer = await ask(caller, await read_request(stream))
            self.api.welcome(self.peer)
            await stream.send_message(answer)

    async def _follow(self, stream: RpcStream, ask: Callable[[Caller], Awaitable[Encodable]]) -> None:
        with self._errors(), contextlib.ExitStack() as counted:
            caller = self._caller(stream, counted)
            Empty.decode(await read_request(stream))
            async with contextlib.aclosing(self.api.changes(lambda: ask(caller))) as answers:  # type: ignore[type-var]  # it is a generator
                async for answer in answers:
                    self.api.welcome(self.peer)
                    await stream.send_message(answer)
                    log.debug("answered", pid=caller.pid, uid=caller.uid, what=type(answer).__name__)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except GRPCError:
            raise
        except RetinueError as e:
            if not self._said:  # once a connection: clients try again for ever
                self._said = True
                caller = self.peer.caller
                who = {"pid": caller.pid, "uid": caller.uid} if caller is not None else {}
                log.info("a caller was refused", code=e.code, why=e.message, **who)
            raise grpc_error(e) from None
        except ConnectionError:
            raise
        except Exception:
            log.exception("a call failed")
            raise GRPCError(Status.INTERNAL, "the agent failed at this call; its log says how") from None


def check_header(stream: RpcStream) -> None:
    """A browser or a proxy that is talked into a request cannot set it. Raises BadInput ``workload.header``."""
    values = stream.metadata.getall(HEADER, []) if stream.metadata is not None else []
    if values != ["true"]:
        raise BadInput("workload.header", f"the request has to carry the metadata {HEADER}: true")


async def read_request(stream: RpcStream) -> bytes:
    """The one message of a request. Raises BadInput ``workload.request``, GRPCError for a compressed one."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT):
            message = await stream.recv_message()
    except (TimeoutError, AssertionError):
        raise BadInput("workload.request", "the request did not come whole") from None
    except NotImplementedError:
        raise GRPCError(Status.UNIMPLEMENTED, "compressed requests are not supported") from None
    if not isinstance(message, bytes):
        raise BadInput("workload.request", "the request has no message")
    return message
