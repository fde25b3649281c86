"""The ingress gateway on real hosts: outside callers become identities, and the packet itself must hold up to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mesh.lab_process import command, in_netns, ip_batch
from mesh.probe import Answer

TOKENS = {"partner/acme": "acme-token", "partner/zeta": "zeta-token"}
POLICY = """\
meshpolicy: 1
segments:
  - name: edge
    allow:
      - {id: acme-to-api, from: {role: acme}, to: {role: api}, on: tcp/8080, why: contract 12}
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
      - {id: acme-later, from: {role: acme}, to: {role: later}, on: tcp/8080}
"""
CONFIG = """\
agent = "{run}/agent.sock"
state_dir = "{state}"
health = "127.0.0.1:8089"
drain = 1.0
[[listen]]
address = "[::]:8443"
plaintext = true
{callers}
[[route]]
path = "/v6"
workload = "shop/api"
port = 8080
family = "ipv6"
[[route]]
path = "/"
workload = "shop/api"
port = 8080
[[route]]
path = "/admin"
workload = "shop/api"
port = 9090
"""


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    """Two partners placed on host gw, the API on host-b, web on host-b too; `outside` is a machine without an agent."""
    made = make_mesh("gw", "host-b", extra=["outside"])
    for name in TOKENS:
        made.add(name, "gw")
    made.add("shop/api", "host-b")
    made.add("web", "host-b")
    api = made.place("shop/api", "host-b")
    made.place("web", "host-b")
    made.apply(POLICY)
    backend = Path(__file__).with_name("gateway_backend.py")
    made.serve(api, "shop/api", argv=[sys.executable, str(backend), "8080"])
    gw = made.lab.nodes["gw"]
    callers = "".join(
        f'[[caller]]\nworkload = "{name}"\ntoken_sha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]\n'
        for name, token in TOKENS.items()
    )
    config = made.lab.dir / "gateway.toml"
    config.write_text(CONFIG.format(run=gw.run_dir, state=gw.state_dir, callers=callers))
    made.lab.spawn([*command("retinue-gateway"), "--config", str(config)], name="gateway", netns=gw.netns).wait_ready()
    asyncio.run(until_ready(made))
    return made


def sockets_in(netns: str) -> Any:
    """An aiohttp socket factory that makes its sockets in a namespace."""

    def make(info: Any) -> socket.socket:
        sock = in_netns(netns, lambda: socket.socket(info[0], info[1], info[2]))
        sock.setblocking(False)
        return sock

    return make


def client(netns: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=sockets_in(netns)))


async def until_ready(mesh: Any) -> None:
    """The gateway has a verified state, and its callers are active on its host."""
    wanted = set(TOKENS)
    await mesh.lab.until("gw", lambda s: wanted <= {a.name for a in s.attachments if a.state == "active"})
    async with client(mesh.lab.nodes["gw"].netns) as http, asyncio.timeout(15):
        while True:
            async with http.get("http://127.0.0.1:8089/healthz") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.05)


class Outside:
    def __init__(self, mesh: Any, http: aiohttp.ClientSession) -> None:
        self.mesh, self.http = mesh, http

    def url(self, path: str, *, v6: bool = False, scheme: str = "http") -> str:
        node = self.mesh.lab.nodes["gw"]
        return f"{scheme}://{f'[{node.v6}]' if v6 else node.v4}:8443{path}"

    def get(self, path: str, token: str | None = "acme-token", *, v6: bool = False, **headers: str) -> Any:
        sent = ({"Authorization": f"Bearer {token}"} if token else {}) | headers
        return self.http.get(self.url(path, v6=v6), headers=sent)


@pytest.fixture
async def outside(mesh: Any) -> AsyncIterator[Outside]:
    await mesh.aapply(POLICY)
    async with client(mesh.lab.nodes["outside"].netns) as http:
        yield Outside(mesh, http)


@pytest.mark.parametrize("v6", [False, True], ids=["outer-v4", "outer-v6"])
@pytest.mark.parametrize(("path", "family"), [("/orders?n=1", 0), ("/v6", 1)], ids=["inner-v4", "inner-v6"])
async def test_a_permitted_caller_reaches_the_workload_from_its_own_address(outside: Outside, v6: bool, path: str, family: int) -> None:
    async with outside.get(path, v6=v6, **{"X-Retinue-Caller": "spiffe://netns.example/wl/web"}) as answer:
        said = await answer.json()
    assert answer.status == 200
    assert said["caller"] == outside.mesh.addresses["partner/acme"][family]
    assert said["path"] == path
    outer = outside.mesh.lab.nodes["outside"]
    assert said["headers"]["X-Forwarded-For"] == (outer.v6 if v6 else outer.v4)
    assert said["headers"]["X-Retinue-Caller"] == "spiffe://netns.example/wl/partner/acme"
    assert "Authorization" not in said["headers"]


async def test_a_denied_caller_is_told_why(outside: Outside) -> None:
    async with outside.get("/orders", "zeta-token") as answer:
        body = await answer.json()
    assert (answer.status, body["verdict"], body["rule"]) == (403, "deny", None)
    assert "default deny" in body["reason"]
    assert body["caller"] == "spiffe://netns.example/wl/partner/zeta"
    assert body["smallest_change"]
    async with outside.get("/admin", Accept="text/plain") as answer:
        text = await answer.text()
    assert answer.status == 403
    assert "denied:" in text
    assert "tcp/9090" in text


async def test_unknown_callers_are_all_the_same(outside: Outside) -> None:
    seen = set()
    for path, token in (("/orders", None), ("/orders", "wrong"), ("/admin", "wrong"), ("/nothing", None)):
        async with outside.get(path, token) as answer:
            seen.add((answer.status, await answer.text()))
    assert len(seen) == 1
    assert next(iter(seen))[0] == 401


async def test_bodies_go_up(outside: Outside) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 25_000

    async with outside.http.post(outside.url("/up"), data=chunks(), headers={"Authorization": "Bearer acme-token"}) as answer:
        assert (await answer.json())["length"] == 1_000_000


async def test_streams_and_websockets_live_until_policy_says_no(outside: Outside) -> None:
    auth = {"Authorization": "Bearer acme-token"}
    async with outside.http.ws_connect(outside.url("/chat"), headers=auth) as chat, outside.get("/stream") as stream:
        greeting = await chat.receive_str()
        assert greeting == f"hello spiffe://netns.example/wl/partner/acme at {outside.mesh.addresses['partner/acme'][0]}"
        await chat.send_str("one")
        assert await chat.receive_str() == "echo one"
        for number in range(5):
            assert await stream.content.readline() == f"line {number}\n".encode()
        await outside.mesh.aapply(POLICY.replace("role: acme}, to: {role: api}", "role: nobody}, to: {role: api}"))
        async with asyncio.timeout(10):
            message = await chat.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1008)
            with pytest.raises(aiohttp.ClientError):
                while await stream.content.readline():
                    pass
    async with outside.get("/orders") as answer:
        assert answer.status == 403


async def speak_as(mesh: Any, source: str, to: str, port: int) -> Answer:
    """A TCP connection from the gateway's host with this source address: what root there can do without the gateway."""
    netns = mesh.lab.nodes["gw"].netns

    def bound() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        sock.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
        sock.bind((source, 0))
        return sock

    sock = in_netns(netns, bound)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(2):
            await asyncio.get_running_loop().sock_connect(sock, (to, port))
        return Answer(200, 0.0)
    except OSError as e:
        return Answer(None, 0.0, type(e).__name__)
    finally:
        sock.close()


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
async def test_root_on_the_gateway_speaks_only_for_its_callers(outside: Outside, family: int) -> None:
    mesh = outside.mesh
    api = mesh.addresses["shop/api"][family]
    acme, zeta, web = (mesh.addresses[n][family] for n in ("partner/acme", "partner/zeta", "web"))
    assert (await speak_as(mesh, acme, api, 8080)).ok, "positive control: this is the way"
    assert not (await speak_as(mesh, zeta, api, 8080)).ok, "an identity that policy denies, though it is placed here"
    assert not (await speak_as(mesh, acme, api, 9090)).ok, "a port that policy denies"
    netns = mesh.lab.nodes["gw"].netns
    ip_batch([f"addr add {web}/{'128' if family else '32'} dev lo" + (" nodad" if family else "")], netns=netns)
    try:
        assert not (await speak_as(mesh, web, api, 8080)).ok, "web is permitted, and is not ours"
    finally:
        ip_batch([f"addr del {web}/{'128' if family else '32'} dev lo"], netns=netns)


async def test_a_caller_that_moved_away_is_no_longer_ours(outside: Outside) -> None:
    mesh = outside.mesh
    await mesh.lab.aca("workload", "revoke", "partner/zeta")
    async with asyncio.timeout(15):
        while True:
            async with outside.get("/orders", "zeta-token") as answer:
                body = await answer.json()
            if body["error"]["code"] == "gateway.unplaced":
                break
    assert answer.status == 403


async def test_the_access_log_and_the_end(outside: Outside) -> None:
    process = outside.mesh.lab.processes["gateway"]
    async with outside.get("/last?secret=hidden") as answer:
        assert answer.status == 200
    process.send(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait) == 0
    log = process.err.read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    last = next(x for x in reversed(lines) if x.get("path") == "/last")
    assert (last["caller"], last["verdict"], last["rule"], last["status"]) == ("partner/acme", "ok", "acme-to-api", 200)
    for secret in (*TOKENS.values(), "hidden"):
        assert secret not in log
