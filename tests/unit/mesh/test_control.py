"""The control-plane client over real TLS: what it refuses, what it never sends, how it reads a feed."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from ca.authority import Authority
from identity import certs
from identity.errors import (
    BadInput,
    BadPolicy,
    BadState,
    Bug,
    Conflict,
    NotFound,
    NotVerified,
    TimedOut,
    Unreachable,
)
from identity.keys import private_pem, write_secret
from identity.names import SpiffeId, TrustDomain
from identity.wire import Message
from identity.wire.enroll import UnderlayUpdate
from mesh import control
from mesh.control import (
    Busy,
    ClientFiles,
    ControlClient,
    LineSplitter,
    RootPin,
    backoff,
    check_url,
    verify_server,
)

NOW = 1_800_000_000
TD = TrustDomain("prod.example")


class Echo(Message):
    text: str


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca"), TD, NOW)


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory) -> ClientFiles:
    home = tmp_path_factory.mktemp("client")
    return identity_files(authority, home, SpiffeId.endpoint(TD, "web-1"))


def identity_files(authority: Authority, home: Path, name: SpiffeId, *, root: bool = False) -> ClientFiles:
    key = ec.generate_private_key(ec.SECP256R1())
    chain = authority._issue(certs.SERVER if name.kind == "cp" else certs.ENDPOINT, key.public_key(), name, NOW)
    write_secret(home / "chain.pem", "".join(chain + ([certs.pem(authority.root)] if root else [])).encode())
    write_secret(home / "key.pem", private_pem(key))
    return ClientFiles(home / "chain.pem", home / "key.pem")


def server_context(chain: Path, key: Path, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(chain, key)
    return context


@asynccontextmanager
async def serving(authority: Authority, handler, *, context: ssl.SSLContext | None = None):
    """A real HTTPS server with the authority's own certificate; yields its address."""
    if context is None:
        own = authority.server_chain(NOW)
        context = server_context(own.certificate, own.key)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=certs.pem(authority.root))
    context.verify_flags |= ssl.VerifyFlags(0x200000)  # no check of time: these certificates live in NOW
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield f"https://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


def client(url: str, authority: Authority, files: ClientFiles | None = None, **more) -> ControlClient:
    trust = more.pop("trust", None) or authority.trust_bundle(1, NOW)
    return ControlClient(url, trust, files, clock=lambda: more.get("now", NOW))


async def answer(request: web.Request) -> web.Response:
    return web.json_response({"text": "hello"})


# -- who is there -----------------------------------------------------------------------------------------------------


async def test_the_server_is_known_by_pin_or_bundle(authority, files):
    async with serving(authority, answer) as url:
        for trust in (RootPin(authority.root_fingerprint), authority.trust_bundle(1, NOW)):
            async with ControlClient(url, trust, files, clock=lambda: NOW) as c:
                assert await c.get("/x", Echo) == Echo(text="hello")
                assert str(c.server.spiffe_id) == "spiffe://prod.example/cp/ca"
                assert c.server_leaf == authority.server_chain(NOW).leaf_der


async def test_the_client_certificate_reaches_the_server(authority, files):
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
        seen.append(request.transport.get_extra_info("ssl_object").version())
        return await answer(request)

    async with serving(authority, handler) as url, client(url, authority, files) as c:
        await c.get("/x", Echo)
    svid = authority.trust_bundle(1, NOW).verify_svid([*certs.parse_der_chain(seen[:1]), authority.intermediate], NOW)
    assert svid.spiffe_id == SpiffeId.endpoint(TD, "web-1")
    assert seen[1] == "TLSv1.3"


async def test_connections_go_on_under_newer_trust_that_believes_their_server(authority, files):
    made = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal made
        made += request.protocol is not seen[-1] if seen else 1
        seen.append(request.protocol)
        return await answer(request)

    seen: list = []
    async with serving(authority, handler) as url, client(url, authority, files) as c:
        assert not c.adopt(authority.trust_bundle(2, NOW)), "there is no server yet"
        await c.get("/x", Echo)
        assert c.adopt(authority.trust_bundle(2, NOW))
        await c.get("/x", Echo)
        assert made == 1
        server = f"serial:{c.server.revocation_id.issuer}:{c.server.serial:x}"
        assert not c.adopt(authority.trust_bundle(3, NOW, [server])), "its server is revoked"
    with pytest.raises(Unreachable):
        _ = client("https://127.0.0.1:1", authority, files).server


class Tap:
    """A TLS server that writes down every decrypted byte and every client certificate it got."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context, self.heard, self.certificates, self.connections = context, b"", [], 0

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.certificates.append(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        self.heard += await reader.read(65536)
        writer.close()


@asynccontextmanager
async def tapped(context: ssl.SSLContext, authority: Authority):
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=certs.pem(authority.root))
    context.verify_flags |= ssl.VerifyFlags(0x200000)
    tap = Tap(context)
    server = await asyncio.start_server(tap.run, "127.0.0.1", 0, ssl=context)
    async with server:
        yield tap, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("case", ["other root", "not the CA", "expired", "pin", "no root sent"])
async def test_nothing_reaches_a_server_that_is_not_ours(authority, files, tmp_path, case):
    """Neither a byte of the request nor the client certificate; the control case below shows the tap can hear."""
    rogue = Authority.create(tmp_path / "rogue", TD, NOW)
    own, theirs = authority.server_chain(NOW), rogue.server_chain(NOW)
    named = identity_files(authority, tmp_path, SpiffeId.endpoint(TD, "web-9"), root=True)
    bundle, pin = authority.trust_bundle(1, NOW), RootPin(authority.root_fingerprint)
    short = tmp_path / "short.pem"
    short.write_text("".join(certs.pem(c) for c in certs.parse_chain(own.certificate.read_text())[:2]))
    chain, key, trust, now, code = {
        "other root": (theirs.certificate, theirs.key, bundle, NOW, "cert.untrusted"),
        "not the CA": (named.chain, named.key, pin, NOW, "ca.name"),
        "expired": (own.certificate, own.key, bundle, NOW + 90_000, "cert.expired"),
        "pin": (theirs.certificate, theirs.key, pin, NOW, "ca.fingerprint"),
        "no root sent": (short, own.key, pin, NOW, "ca.fingerprint"),
    }[case]
    async with (
        tapped(server_context(chain, key), authority) as (tap, url),
        ControlClient(url, trust, files, clock=lambda: now) as c,
    ):
        with pytest.raises(NotVerified) as e:
            await c.post("/v1/underlay", UnderlayUpdate(underlay=["secret"]), Echo)
        assert e.value.code == code
        with pytest.raises(Unreachable):
            _ = c.server
    assert tap.heard == b""
    assert [x for x in tap.certificates if x] == []


async def test_the_tap_hears_a_client_that_trusts_it(authority, files):
    own = authority.server_chain(NOW)
    async with (
        tapped(server_context(own.certificate, own.key), authority) as (tap, url),
        client(url, authority, files) as c,
    ):
        with pytest.raises(Unreachable) as e:
            await c.post("/v1/underlay", UnderlayUpdate(underlay=["secret"]), Echo)
        assert e.value.code == "ca.disconnected"
    assert b"secret" in tap.heard
    assert tap.certificates[0]


async def test_older_tls_is_refused(authority, files):
    own = authority.server_chain(NOW)
    old = server_context(own.certificate, own.key, newest=ssl.TLSVersion.TLSv1_2)
    async with serving(authority, answer, context=old) as url, client(url, authority, files) as c:
        with pytest.raises(Unreachable) as e:
            await c.get("/x", Echo)
        # The server may hang up before its alert is out.
        assert e.value.code in {"ca.tls", "ca.unreachable"}


async def test_a_server_without_tls_is_refused():
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with ControlClient(url, RootPin("0" * 64)) as c:
            with pytest.raises(Unreachable) as e:
                await c.get("/x", Echo)
            assert e.value.code in {"ca.tls", "ca.disconnected"}


async def test_nobody_there():
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{s.getsockname()[1]}"
        async with ControlClient(url, RootPin("0" * 64)) as c:
            with pytest.raises(Unreachable) as e:
                await c.get("/x", Echo)
    assert (e.value.code, e.value.exit) == ("ca.unreachable", 3)
    async with ControlClient("https://no-such-host.invalid:1", RootPin("0" * 64)) as c:
        with pytest.raises(Unreachable) as e:
            await c.get("/x", Echo)
    assert e.value.code == "ca.unreachable"


def test_damaged_client_files_are_a_bad_state(files, tmp_path):
    (tmp_path / "bad").write_text("x")
    for pair in (ClientFiles(tmp_path / "bad", files.key), ClientFiles(files.chain, tmp_path / "none")):
        with pytest.raises(BadState) as e:
            ControlClient("https://127.0.0.1:1", RootPin("0" * 64), pair)
        assert e.value.code == "state.tls"
    locked = ec.generate_private_key(ec.SECP256R1())
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, PrivateFormat

    (tmp_path / "locked").write_bytes(
        locked.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    )
    with pytest.raises(BadState):
        ControlClient("https://127.0.0.1:1", RootPin("0" * 64), ClientFiles(files.chain, tmp_path / "locked"))


def test_verify_server_needs_a_chain(authority):
    with pytest.raises(NotVerified) as e:
        verify_server([], authority.trust_bundle(1, NOW), NOW)
    assert e.value.code == "chain.empty"


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (404, {"code": "host.unknown", "message": "no", "hint": "h"}, NotFound, "host.unknown"),
        (409, {"code": "token.used", "message": "no"}, Conflict, "token.used"),
        (400, {"code": "policy.x", "message": "no", "file": "f", "line": 3, "column": 2}, BadPolicy, "policy.x"),
        (500, "<html>", Bug, "api.unexpected"),
        (302, None, Bug, "api.unexpected"),
        (503, {"code": "enroll.busy", "message": "no"}, Busy, "enroll.busy"),
        (429, None, Busy, "api.unexpected"),
    ],
)
async def test_error_answers_become_the_same_errors(authority, status, body, kind, code):
    async def handler(request: web.Request) -> web.Response:
        headers = {"Retry-After": "7", "Location": "https://elsewhere.example/"}
        if isinstance(body, dict):
            return web.json_response(body, status=status, headers=headers)
        return web.Response(text=body or "", status=status, headers=headers)

    async with serving(authority, handler) as url, client(url, authority) as c:
        with pytest.raises(kind) as e:
            await c.send("/x", Echo(text="a"))
        assert e.value.code == code
        if isinstance(e.value, Busy):
            assert e.value.retry_after == 7.0
        with pytest.raises(kind):
            async with c.stream("/x"):
                pass


async def test_answers_are_bounded_and_strict(authority, monkeypatch):
    monkeypatch.setattr(control, "MAX_REPLY", 1000)
    bodies = {"/big": '{"text":"' + "x" * 2000 + '"}', "/odd": '{"text":"a","more":1}', "/cut": '{"text":', "/deep": "[" * 900}

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=bodies[request.path], content_type="application/json")

    async with serving(authority, handler) as url, client(url, authority) as c:
        for path, code in (("/big", "api.large"), ("/odd", "wire.schema"), ("/cut", "wire.schema"), ("/deep", "wire.schema")):
            with pytest.raises(BadInput) as e:
                await c.get(path, Echo)
            assert e.value.code == code


async def test_hostile_error_bodies_are_survived(authority):
    bodies = {"/deep": "[" * 60_000, "/big": "x" * 100_000, "/list": "[]"}

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=bodies[request.path], status=503, headers={"Retry-After": "soon"})

    async with serving(authority, handler) as url, client(url, authority) as c:
        for path in bodies:
            with pytest.raises(Busy) as e:
                await c.get(path, Echo)
            assert (e.value.code, e.value.retry_after) == ("api.unexpected", 0.0)


async def test_a_silent_server_times_out(authority):
    gate = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        await gate.wait()
        return await answer(request)

    async with serving(authority, handler) as url, client(url, authority) as c:
        with pytest.raises(TimedOut) as e:
            await c.get("/x", Echo, timeout=0.2)
        assert (e.value.code, e.value.exit) == ("ca.timeout", 5)
        gate.set()


async def test_cancelling_a_request_is_not_an_error_of_the_network(authority):
    async def handler(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return await answer(request)

    async with serving(authority, handler) as url, client(url, authority) as c:
        task = asyncio.create_task(c.get("/x", Echo))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# -- the feed ---------------------------------------------------------------------------------------------------------


def feeding(*chunks: bytes, then: asyncio.Event | None = None):
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        if then is not None:
            await then.wait()
        return response

    return handler


async def test_a_feed_is_read_line_by_line_and_its_end_is_an_error(authority):
    async with serving(authority, feeding(b"a\nb", b"b\n\nccc")) as url, client(url, authority) as c:
        got = []
        with pytest.raises(Unreachable) as e:
            async with c.stream("/v1/feed", params={"timeline": "t"}) as lines:
                async for line in lines:
                    got.append(line)
        assert e.value.code == "feed.closed"
        assert got == [b"a", b"bb"], "half a line is no line"


async def test_a_silent_feed_times_out(authority):
    gate = asyncio.Event()
    async with serving(authority, feeding(b"a\n", then=gate)) as url, client(url, authority) as c:
        async with c.stream("/v1/feed", idle=0.2) as lines:
            assert await anext(lines) == b"a"
            with pytest.raises(TimedOut) as e:
                await anext(lines)
        assert e.value.code == "feed.silent"
        gate.set()


async def test_a_line_too_long_is_refused(authority):
    async with serving(authority, feeding(b"x" * 5000)) as url, client(url, authority) as c:
        with pytest.raises(BadInput) as e:
            async with c.stream("/v1/feed", limit=1000) as lines:
                await anext(lines)
        assert e.value.code == "feed.large"


async def test_a_broken_feed_is_unreachable(authority):
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"a\n")
        request.transport.abort()
        return response

    async with serving(authority, handler) as url, client(url, authority) as c:
        with pytest.raises(Unreachable):
            async with c.stream("/v1/feed") as lines:
                async for _ in lines:
                    pass


async def test_closing_the_client_ends_its_feed(authority):
    gate = asyncio.Event()
    async with serving(authority, feeding(b"a\n", then=gate)) as url:
        c = client(url, authority)
        with pytest.raises(Unreachable):
            async with c.stream("/v1/feed") as lines:
                await anext(lines)
                await c.close()
                await anext(lines)
        gate.set()


@given(st.lists(st.binary(max_size=20).filter(lambda b: b"\n" not in b)), st.data())
def test_splitting_does_not_depend_on_the_chunks(lines, data):
    text = b"".join(line + b"\n" for line in lines)
    splitter, got, position = LineSplitter(20), [], 0
    while position < len(text):
        size = data.draw(st.integers(1, 7))
        got += splitter.feed(text[position : position + size])
        position += size
    assert got == [line for line in lines if line]


def test_the_limit_is_of_one_line():
    splitter = LineSplitter(3)
    assert splitter.feed(b"abc\nabc\nab") == [b"abc", b"abc"]
    with pytest.raises(BadInput):
        splitter.feed(b"cd")


# -- small pure parts -------------------------------------------------------------------------------------------------


@given(st.integers(-3, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0, 1000))
def test_backoff_is_full_jitter_under_a_doubling_ceiling(attempt, unit, asked):
    wait = backoff(attempt, unit)
    assert 0 <= wait <= min(30.0, 0.2 * 2.0 ** max(0, min(attempt, 64)))
    assert backoff(attempt, 0.0) == 0
    assert backoff(attempt, unit, retry_after=asked) == pytest.approx(asked + wait)


def test_backoff_grows_to_its_cap():
    assert [backoff(n, 0.5) for n in (0, 1, 2, 10)] == [0.1, 0.2, 0.4, 15.0]


@pytest.mark.parametrize(
    ("given_", "form"),
    [
        ("https://ca.example:8443", "https://ca.example:8443"),
        (" https://CA.example/ ", "https://ca.example:443"),
        ("https://[2001:db8::1]:7", "https://[2001:db8::1]:7"),
    ],
)
def test_addresses_have_one_form(given_, form):
    assert check_url(given_) == form


@pytest.mark.parametrize(
    "bad",
    ["", "ca.example", "http://ca.example", "https://", "https://u:p@ca.example", "https://ca.example/path",
     "https://ca.example?q", "https://ca.example#f", "https://ca.example:x", "https://ca.example:70000",
     "https://ca.example:0", "https://[::1", None],
)  # fmt: skip
def test_bad_addresses_are_refused(bad):
    with pytest.raises(BadInput) as e:
        check_url(bad)
    assert e.value.code == "ca.url"


def test_several_processes_are_one_address() -> None:
    assert check_url("https://a:1, https://[::1]:2/,https://a:1") == "https://a:1,https://[::1]:2"
    with pytest.raises(BadInput):
        check_url("https://a:1,http://b")


async def test_a_process_that_fails_is_left_for_the_next_one() -> None:
    with socket.socket() as one, socket.socket() as other:
        for sock in (one, other):  # bound and never listening: refused at once
            sock.bind(("127.0.0.1", 0))
        urls = [f"https://127.0.0.1:{sock.getsockname()[1]}" for sock in (one, other)]
        async with ControlClient(",".join(urls), control.RootPin("0" * 64)) as client, control.ControlClient(",".join(urls), RootPin("0" * 64)) as second:
            for _ in range(4):
                before = client.url
                assert second.url == before  # what one endpoint says goes to one process
                with pytest.raises(Unreachable):
                    await client.send("/v1/underlay", UnderlayUpdate(underlay=[]))
                assert client.url != before
                assert {before, client.url} == set(urls)
