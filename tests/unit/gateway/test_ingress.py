"""gateway.ingress over loopback: a real proxy, a real upstream, and the caller's own source address."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from gateway.config import Config, parse_config
from gateway.connections import FrontServer
from gateway.ingress import Ingress

TOKEN = "t0p-secret-bearer"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
CONFIG = """
agent = "/nowhere"
[[listen]]
address = "127.0.0.1:0"
plaintext = true
[[caller]]
workload = "partner/acme"
token_sha256 = ["%s"]
[[route]]
path = "/"
workload = "shop/api"
port = %d
family = "ipv4"
max_body = 1000000
max_message = 70000
timeout = 5.0
[[route]]
path = "/ssh"
workload = "shop/api"
port = 22
[[route]]
path = "/strip"
workload = "shop/api"
port = %d
family = "ipv4"
strip_prefix = true
[[route]]
path = "/dead"
workload = "shop/api"
port = %d
[[route]]
path = "/db"
workload = "shop/db"
port = 5432
[limits]
header = %s
header_bytes = 8192
"""


class Backend:
    """The workload: an aiohttp application on the destination's address."""

    def __init__(self) -> None:
        self.seen: list[web.Request] = []
        self.streaming = asyncio.Event()
        self.gate = asyncio.Event()
        self.port = 0

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/ws", self.ws)
        app.router.add_get("/slow", self.slow)
        app.router.add_get("/cut", self.cut)
        app.router.add_route("*", "/{rest:.*}", self.echo)
        runner = web.AppRunner(app, shutdown_timeout=0.1, auto_decompress=False)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.41", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def echo(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        body = await request.read()
        said = {
            "source": request.remote, "path": request.raw_path, "method": request.method, "headers": dict(request.headers),
            "length": len(body), "sha": hashlib.sha256(body).hexdigest(),
        }  # fmt: skip
        headers = {"X-Hop": "1", "Connection": "x-hop", "Set-Cookie": "a=b", "Location": "/elsewhere"}
        return web.json_response(said, status=302 if request.path == "/moved" else 200, headers=headers)

    async def slow(self, request: web.Request) -> web.StreamResponse:
        out = web.StreamResponse()
        await out.prepare(request)
        await out.write(b"first\n")
        self.streaming.set()
        await self.gate.wait()
        await out.write(b"second\n")
        return out

    async def cut(self, request: web.Request) -> web.StreamResponse:
        out = web.StreamResponse(headers={"Content-Length": "1000"})
        await out.prepare(request)
        await out.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return out

    async def ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=["chat.v2"], max_msg_size=0)
        await socket.prepare(request)
        await socket.send_json({"source": request.remote, "caller": request.headers.get("X-Retinue-Caller")})
        async for message in socket:
            if message.data == "bye":
                await socket.close(code=4001)
            elif message.type is aiohttp.WSMsgType.BINARY:
                await socket.send_bytes(message.data)
            else:
                await socket.send_str(f"echo {message.data}")
        return socket


class Stage:
    def __init__(self, world: Any, ingress: Ingress, backend: Backend, url: str, client: aiohttp.ClientSession) -> None:
        self.world, self.ingress, self.backend, self.url, self.client = world, ingress, backend, url, client

    def repolicy(self, port: int, revision: int = 2) -> None:
        self.world.policy(self.world.template % port, revision=revision)
        self.ingress.update(self.world.view(self.ingress.view))

    def get(self, path: str, **kwargs: Any) -> Any:
        return self.client.get(URL(self.url + path, encoded=True), headers=AUTH | kwargs.pop("headers", {}), allow_redirects=False, **kwargs)


def config_for(port: int, header: float = 15.0) -> Config:
    return parse_config(CONFIG % (hashlib.sha256(TOKEN.encode()).hexdigest(), port, port, port + 1 if port < 65535 else 1, header))


@pytest.fixture
async def stage(world: Any) -> AsyncIterator[Stage]:
    backend = Backend()
    runner = await backend.start()
    world.policy(world.template % backend.port)
    ingress = Ingress(config_for(backend.port))
    ingress.update(world.view())
    server = FrontServer(ingress.handle, ingress.config.limits)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        yield Stage(world, ingress, backend, url, client)
    listener.close()
    await ingress.close()
    await server.shutdown(0.1)
    await runner.cleanup()


async def test_forwards_from_the_callers_own_address(stage: Stage) -> None:
    spoofed = {"X-Forwarded-For": "6.6.6.6", "X-Retinue-Caller": "spiffe://edge.example/wl/admin", "x_forwarded_for": "6.6.6.6"}
    async with stage.get("/a%20b?x=1&y=%2F", headers=spoofed) as answer:
        said = await answer.json()
        assert answer.status == 200
        assert "X-Hop" not in answer.headers
        assert answer.headers["Set-Cookie"] == "a=b"
        assert len(answer.headers["X-Request-Id"]) == 16
    assert said["source"] == "127.0.0.31"
    assert said["path"] == "/a%20b?x=1&y=%2F"
    assert said["headers"]["X-Retinue-Caller"] == "spiffe://edge.example/wl/partner/acme"
    assert said["headers"]["X-Retinue-Caller-Proof"] == "token"
    assert said["headers"]["X-Forwarded-For"] == "127.0.0.1"
    assert said["headers"]["X-Forwarded-Proto"] == "http"
    assert "Authorization" not in said["headers"]
    assert "6.6.6.6" not in json.dumps(said)


async def test_answers_pass_as_they_are(stage: Stage) -> None:
    async with stage.get("/moved") as answer:
        assert (answer.status, answer.headers["Location"]) == (302, "/elsewhere")
    async with stage.client.head(stage.url + "/x", headers=AUTH) as answer:
        assert answer.status == 200
        assert int(answer.headers["Content-Length"]) > 0
    async with stage.get("/strip/deep?q") as answer:
        assert (await answer.json())["path"] == "/deep?q"


@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_stream_upward(stage: Stage, chunked: bool) -> None:
    data = b"x" * 900_000

    async def chunks() -> AsyncIterator[bytes]:
        for i in range(0, len(data), 50_000):
            yield data[i : i + 50_000]

    sent = chunks() if chunked else data
    async with stage.client.put(stage.url + "/up", data=sent, headers=AUTH) as answer:
        said = await answer.json()
    assert (said["length"], said["sha"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert ("Transfer-Encoding" in said["headers"]) is chunked


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_the_limit_is_refused(stage: Stage, chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 50_000

    try:
        async with stage.client.post(stage.url + "/up", data=chunks() if chunked else io.BytesIO(b"x" * 1_500_000), headers=AUTH) as answer:
            assert answer.status == 413
    except aiohttp.ClientError:
        assert chunked, "a stated length is refused with an answer"
    assert all(r.method != "POST" for r in stage.backend.seen) or chunked


async def test_answers_stream_downward_before_they_end(stage: Stage) -> None:
    async with stage.get("/slow") as answer:
        assert await answer.content.readline() == b"first\n"
        assert not stage.backend.gate.is_set()
        stage.backend.gate.set()
        assert await answer.content.read() == b"second\n"


async def test_a_cut_answer_never_looks_complete(stage: Stage) -> None:
    with pytest.raises(aiohttp.ClientError):
        async with stage.get("/cut") as answer:
            await answer.read()


async def test_unknown_callers_learn_nothing(stage: Stage) -> None:
    answers = set()
    for path, headers in [("/", {}), ("/", {"Authorization": "Bearer no"}), ("/nothing", {}), ("/../x", {}), ("/ssh", {"Authorization": "Basic x"})]:
        async with stage.client.get(stage.url + path, headers=headers) as answer:
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            answers.add((answer.status, await answer.text()))
    assert len(answers) == 1
    assert next(iter(answers))[0] == 401
    assert stage.backend.seen == []


async def test_a_refusal_says_why(stage: Stage) -> None:
    async def explain(src: str, dst: str, proto: str, port: int) -> dict[str, Any]:
        assert (src, dst, proto, port) == ("partner/acme", "shop/api", "tcp", 22)
        return {"reason": "default deny: no rule", "smallest_change": "allow tcp/22 in edge"}

    stage.ingress.explain = explain
    async with stage.get("/ssh") as answer:
        body = await answer.json()
    assert answer.status == 403
    assert (body["verdict"], body["rule"], body["smallest_change"]) == ("deny", None, "allow tcp/22 in edge")
    async with stage.get("/ssh", headers={"Accept": "text/plain"}) as answer:
        text = await answer.text()
    assert answer.content_type == "text/plain"
    assert "denied: default deny: no rule" in text
    assert "rule: none (default deny)" in text


async def test_who_is_being_refused_hears_why_also_when_the_state_changes_meanwhile(stage: Stage) -> None:
    asked, answer_now, calls = asyncio.Event(), asyncio.Event(), []

    async def explain(*flow: object) -> dict[str, Any]:
        calls.append(flow)
        asked.set()
        await answer_now.wait()
        return {"reason": "default deny: no rule", "smallest_change": "allow tcp/22 in edge"}

    stage.ingress.explain = explain

    async def call() -> tuple[int, dict[str, Any]]:
        async with stage.get("/ssh") as answer:
            return answer.status, await answer.json()

    calling = asyncio.create_task(call())
    await asked.wait()
    stage.world.place("shop/api", "host-c", "127.0.0.41", role="api", epoch=2)
    stage.ingress.update(stage.world.view(stage.ingress.view))
    answer_now.set()
    status, body = await calling
    assert (status, body["smallest_change"]) == (403, "allow tcp/22 in edge")
    assert len(calls) == 1, "the client had to ask again"


async def test_an_unknown_destination_is_a_denial(stage: Stage) -> None:
    async with stage.get("/db") as answer:
        assert answer.status == 403
        assert "no rule permits partner/acme -> shop/db tcp/5432" in await answer.text()


async def test_other_refusals(stage: Stage) -> None:
    stage.world.policy(stage.world.template.replace("tcp/%d", "tcp"), revision=2)
    stage.ingress.update(stage.world.view(stage.ingress.view))
    async with stage.get("/dead") as answer:
        assert answer.status == 502
    async with stage.client.request("TRACE", stage.url + "/", headers=AUTH) as answer:
        assert answer.status == 405
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rpartition(":")[2]))
    writer.write(f"GET /a/../b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.close()


async def test_without_state_nothing_is_forwarded(stage: Stage) -> None:
    stage.ingress.view = None
    async with stage.get("/") as answer:
        assert answer.status == 503
    assert stage.backend.seen == []


async def test_websocket_both_ways(stage: Stage) -> None:
    async with stage.client.ws_connect(stage.url + "/ws", headers=AUTH, protocols=["chat.v1", "chat.v2"]) as socket:
        first = await socket.receive_json()
        assert first == {"source": "127.0.0.31", "caller": "spiffe://edge.example/wl/partner/acme"}
        assert socket.protocol == "chat.v2"
        await socket.send_str("hello")
        assert await socket.receive_str() == "echo hello"
        await socket.send_bytes(b"\0" * 60_000)
        assert await socket.receive_bytes() == b"\0" * 60_000
        await socket.ping(b"x")
        await socket.send_str("bye")
        message = await socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE
        assert message.data == 4001


async def test_websocket_refused_for_the_denied_and_the_unknown(stage: Stage) -> None:
    for headers, status in ((AUTH, 403), ({}, 401)):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await stage.client.ws_connect(stage.url + "/ssh", headers=headers)
        assert caught.value.status == status


async def test_websocket_upgrade_that_the_workload_refuses(stage: Stage) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await stage.client.ws_connect(stage.url + "/plain", headers=AUTH)
    assert caught.value.status == 502


async def test_a_policy_change_ends_open_exchanges_and_spares_the_others(stage: Stage) -> None:
    async with stage.client.ws_connect(stage.url + "/ws", headers=AUTH) as socket, stage.get("/slow") as answer:
        await socket.receive_json()
        assert await answer.content.readline() == b"first\n"
        stage.ingress.update(stage.world.view(stage.ingress.view))
        await socket.send_str("still")
        assert await socket.receive_str() == "echo still"
        stage.repolicy(1)
        message = await socket.receive()
        assert message.data == 1008
        with pytest.raises(aiohttp.ClientError):
            await answer.content.read()
    async with stage.get("/") as answer:
        assert answer.status == 403


async def test_a_moved_destination_gets_new_connections(stage: Stage) -> None:
    async with stage.get("/") as answer:
        await answer.read()
    before = set(stage.ingress.upstreams._sessions.values())
    stage.world.place("shop/api", "host-c", "127.0.0.41", role="api", epoch=2)
    stage.ingress.update(stage.world.view(stage.ingress.view))
    assert stage.ingress.upstreams._sessions == {}
    async with stage.get("/") as answer:
        assert answer.status == 200
    assert not before & set(stage.ingress.upstreams._sessions.values())


async def test_callers_never_share_connections(stage: Stage) -> None:
    stage.world.place("partner/b", stage.world.host, "127.0.0.32", role="partner")
    extra = f'[[caller]]\nworkload = "partner/b"\ntoken_sha256 = ["{hashlib.sha256(b"b").hexdigest()}"]\n'
    text = CONFIG % (hashlib.sha256(TOKEN.encode()).hexdigest(), stage.backend.port, stage.backend.port, 1, 15.0)
    stage.ingress.reconfigure(parse_config(text + extra))
    stage.ingress.update(stage.world.view(stage.ingress.view))
    for token, source in ((TOKEN, "127.0.0.31"), ("b", "127.0.0.32"), (TOKEN, "127.0.0.31")):
        async with stage.client.get(stage.url + "/", headers={"Authorization": f"Bearer {token}"}) as answer:
            assert (await answer.json())["source"] == source


async def test_a_removed_caller_is_cut_and_unknown(stage: Stage) -> None:
    async with stage.get("/slow") as answer:
        await answer.content.readline()
        stage.ingress.reconfigure(parse_config(CONFIG % ("b" * 64, stage.backend.port, 1, 1, 15.0)))
        with pytest.raises(aiohttp.ClientError):
            await answer.content.read()
    async with stage.get("/") as answer:
        assert answer.status == 401


async def test_the_access_log_tells_who_and_never_a_secret(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="retinue.gateway.access"):
        for path in ("/ok?key=hidden", "/ssh"):
            async with stage.get(path, headers={"Cookie": "hidden"}) as answer:
                await answer.read()
        async with stage.client.get(stage.url + "/", headers={"Authorization": "Bearer hidden"}) as answer:
            await answer.read()
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "retinue.gateway.access"]
    assert [(x["caller"], x["status"], x["verdict"], x["outcome"]) for x in lines] == [
        ("partner/acme", 200, "ok", "done"),
        ("partner/acme", 403, "policy", "denied"),
        (None, 401, None, "gateway.unknown_caller"),
    ]
    assert lines[0]["rule"] == "partner-to-api"
    assert lines[0]["upstream"].startswith("127.0.0.41:")
    assert lines[0]["bytes_out"] > 0
    assert "hidden" not in caplog.text
    assert TOKEN not in caplog.text


async def test_draining_refuses_new_and_waits_for_the_old(stage: Stage) -> None:
    async with stage.get("/slow") as answer:
        await answer.content.readline()
        draining = asyncio.create_task(stage.ingress.drained(5))
        await asyncio.sleep(0)
        async with stage.get("/") as refused:
            assert refused.status == 503
        assert not draining.done()
        stage.backend.gate.set()
        assert await answer.content.read() == b"second\n"
    assert await draining
    stage.backend.gate.clear()
    stage.ingress.draining = False
    async with stage.get("/slow") as answer:
        await answer.content.readline()
        assert not await stage.ingress.drained(0.01)


async def test_expect_continue_comes_after_the_verdict(stage: Stage) -> None:
    for path, want in (("/up", b"HTTP/1.1 100 Continue"), ("/ssh", b"HTTP/1.1 403 Forbidden")):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rpartition(":")[2]))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        writer.write(head.encode())
        assert (await reader.readline()).strip() == want
        writer.close()


async def test_slow_heads_are_closed_and_huge_ones_refused(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    config = config_for(stage.backend.port, header=0.05)
    server = FrontServer(stage.ingress.handle, config.limits)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n")
    assert b" 400 " in await reader.readline()
    assert "aaaa" not in caplog.text
    writer.close()
    listener.close()
    await server.shutdown(0.1)


async def test_connections_above_the_limit_are_turned_away(stage: Stage) -> None:
    limits = stage.ingress.config.limits.model_copy(update={"connections": 1})
    server = FrontServer(stage.ingress.handle, limits)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    first_reader, first = await asyncio.open_connection("127.0.0.1", port)
    first.write(f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    assert (await first_reader.readline()).startswith(b"HTTP/1.1 200")
    reader, second = await asyncio.open_connection("127.0.0.1", port)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    for writer in (first, second):
        writer.close()
    listener.close()
    await server.shutdown(0.1)
