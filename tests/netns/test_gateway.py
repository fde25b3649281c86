"""The ingress gateway on real hosts: outside callers become identities, and the packet itself must hold up to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from ca.authority import Authority
from identity import certs
from identity.federation import make_bundle
from identity.keys import private_pem
from identity.names import SpiffeId, TrustDomain
from mesh.lab_process import command, in_netns, ip_batch
from mesh.probe import Answer
from tests.unit.gateway.test_daemon import self_signed

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


FEDERATED = """\
agent = "{run}/agent.sock"
state_dir = "{state}"
health = "127.0.0.1:8090"
[[listen]]
address = "[::]:8444"
certificate = "{dir}/server.pem"
key = "{dir}/server.key"
federation = "other.example"
[[caller]]
workload = "partner/acme"
federated = ["spiffe://other.example/wl/shop/*"]
[[route]]
workload = "shop/api"
port = 8080
"""
THEIRS = "      - {id: theirs, from: spiffe://other.example/wl/shop/web, to: {role: api}, on: tcp/8080}\n"


async def test_callers_of_another_trust_domain(outside: Outside, tmp_path: Path) -> None:
    """Two authorities, one federation: an SVID of theirs reaches the workload when it and its stand-in are permitted."""
    mesh, gw = outside.mesh, outside.mesh.lab.nodes["gw"]
    other, now = TrustDomain("other.example"), time.time()
    theirs = Authority.create(tmp_path / "theirs", other, now)
    self_signed(tmp_path, "server")
    (tmp_path / "other.json").write_text(make_bundle(theirs.roots, 1))
    (tmp_path / "gateway.toml").write_text(FEDERATED.format(run=gw.run_dir, state=gw.state_dir, dir=tmp_path))
    (tmp_path / "server.key").chmod(0o600)
    url = f"https://{gw.v4}:8444/orders"

    async def call(name: str) -> tuple[int, Any]:
        """(status, answer); status 0 when TLS refuses."""
        key = ec.generate_private_key(ec.SECP256R1())
        chain = theirs.issue_workload(certs.make_csr(key), SpiffeId.workload(other, name), [], time.time())
        (tmp_path / "chain.pem").write_text("".join(chain))
        (tmp_path / "key.pem").write_bytes(private_pem(key))
        tls = ssl.create_default_context(cafile=str(tmp_path / "server.pem"))
        tls.check_hostname = False
        tls.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
        connector = aiohttp.TCPConnector(socket_factory=sockets_in(mesh.lab.nodes["outside"].netns), ssl=tls)
        async with aiohttp.ClientSession(connector=connector) as http:
            try:
                async with http.get(url) as answer:
                    return answer.status, await answer.json()
            except aiohttp.ClientError:
                return 0, None

    async def until(name: str, status: int) -> Any:
        async with asyncio.timeout(20):
            while True:
                found, said = await call(name)
                if found == status:
                    return said
                await asyncio.sleep(0.1)

    await mesh.aapply(POLICY + THEIRS)
    process = mesh.lab.spawn([*command("retinue-gateway"), "--config", str(tmp_path / "gateway.toml")], name="federated", netns=gw.netns)
    try:
        await asyncio.to_thread(process.wait_ready)
        assert (await call("shop/web"))[0] == 0, "nobody has told of them yet"
        await mesh.lab.aca("federation", "add", "other.example", "--url", "https://192.0.2.1/", "--profile", "https_web",
                           "--bundle-file", str(tmp_path / "other.json"))  # fmt: skip
        said = await until("shop/web", 200)
        assert said["caller"] == mesh.addresses["partner/acme"][0], "the packets are the stand-in's"
        assert said["headers"]["X-Retinue-Caller"] == "spiffe://other.example/wl/shop/web"
        status, body = await call("shop/batch")
        assert (status, body["verdict"], body["caller"]) == (403, "deny", "spiffe://other.example/wl/shop/batch")
        assert "spiffe://other.example/wl/shop/batch" in body["smallest_change"] or "default deny" in body["reason"]
        assert (await call("pay/web"))[0] == 401, "no caller of this gateway"
        # Each of the two rules is needed.
        await mesh.aapply(POLICY)
        assert "default deny" in (await until("shop/web", 403))["reason"]
        await mesh.aapply(POLICY.replace("role: acme}, to: {role: api}", "role: nobody}, to: {role: api}") + THEIRS)
        await until("shop/web", 403)
        await mesh.aapply(POLICY + THEIRS)
        await until("shop/web", 200)
        await mesh.lab.aca("federation", "remove", "other.example")
        await until("shop/web", 0)
    finally:
        process.send(signal.SIGTERM)
        await asyncio.to_thread(process.wait)


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
