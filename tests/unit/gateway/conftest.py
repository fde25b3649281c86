"""A signed world for the gateway: a real authority, records signed by it, an agent's local API over a unix socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ca.authority import Authority
from gateway.view import Pin, View, verify_reply
from identity.keys import b64
from identity.names import SpiffeId, TrustDomain
from identity.records import EndpointRecord, PlacementRecord, PolicyFile, PolicyRecord
from identity.wire.local import SnapshotReply, Status
from policy.language import digest

DOMAIN = TrustDomain("edge.example")
ENDPOINT = "gw"
POLICY = """meshpolicy: 1
segments:
  - name: edge
    allow:
      - {id: partner-to-api, from: {role: partner}, to: {role: api}, on: tcp/%d, why: contract 7}
"""


@dataclass
class World:
    """What the CA would have signed. Addresses are loopback ones, so that source binding is real without a mesh."""

    authority: Authority
    revision: int = 1
    host: str = ENDPOINT  # the gateway's own endpoint
    template: str = POLICY  # %d: the port of api that partners may use
    objects: dict[str, str] = field(default_factory=dict)

    @property
    def pin(self) -> Pin:
        return Pin(DOMAIN, self.authority.root_fingerprint)

    def endpoint(self, name: str = ENDPOINT) -> None:
        now = int(time.time())
        record = EndpointRecord(
            trust_domain=DOMAIN.name, endpoint=name, kind="host", tunnel_key=b64(name.encode().ljust(32, b"k")), underlay=[],
            ciphers=["chacha20poly1305"], generation=1, issued=now, expires=now + 86400,
        )  # fmt: skip
        self.objects[f"endpoint/{name}"] = self.authority.sign_record(record)

    def place(
        self, name: str, endpoint: str, v4: str, *, role: str, epoch: int = 1, state: Any = "active", instance: int = 0
    ) -> None:
        record = PlacementRecord(
            trust_domain=DOMAIN.name, spiffe_id=str(SpiffeId.workload(DOMAIN, name)), name=name, instance=instance,
            endpoint=endpoint, tunnel_key=b64(endpoint.encode().ljust(32, b"k")), epoch=epoch, state=state,
            addresses=[v4, "::1"], labels={"role": role}, issued=int(time.time()),
        )  # fmt: skip
        self.objects[f"placement/{name}/{instance}"] = self.authority.sign_record(record)

    def policy(self, text: str, revision: int = 1) -> None:
        record = PolicyRecord(
            trust_domain=DOMAIN.name, revision=revision, digest=digest([("edge.yaml", text)]),
            files=[PolicyFile(name="edge.yaml", text=text)], author="t", issued=int(time.time()),
        )  # fmt: skip
        self.objects["policy"] = self.authority.sign_record(record)

    def reply(self) -> SnapshotReply:
        self.revision += 1
        return SnapshotReply(timeline="t", revision=self.revision, trust_domain=DOMAIN.name, objects=dict(self.objects))

    def view(self, before: View | None = None) -> View:
        return verify_reply(self.reply(), ENDPOINT, self.pin, before, time.time())


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "dir", DOMAIN, time.time())


@pytest.fixture
def world(authority: Authority) -> World:
    """partner on the gateway's endpoint, api elsewhere; 8080 of api is open to partners."""
    made = World(authority)
    made.objects["bundle"] = authority.bundle(1, time.time())
    made.endpoint()
    made.place("partner/acme", ENDPOINT, "127.0.0.31", role="partner")
    made.place("shop/api", "host-b", "127.0.0.41", role="api")
    made.policy(POLICY % 8080)
    return made


@dataclass
class LocalAgent:
    """The agent's local API, as far as the gateway uses it."""

    world: World
    path: Path
    attached: list[dict[str, Any]] = field(default_factory=list)
    explanation: dict[str, Any] = field(default_factory=dict)
    refuse_attach: bool = False
    lines: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)

    def push(self, data: bytes | None = None) -> None:
        self.lines.put_nowait(data if data is not None else self.world.reply().model_dump_json().encode())

    async def status(self, _: web.Request) -> web.Response:
        said = Status(
            version="1", trust_domain=DOMAIN.name, endpoint=ENDPOINT, kind="host", spiffe_id="spiffe://edge.example/host/gw",
            device="none", interface="rtn0", control="connected", timeline="t", revision=1, policy_revision=1, policy_digest=None,
            staleness_s=0.1, svid_expires=0, attachments=[], peers=[], firewall_elements=0, conditions=[], ready=True,
        )  # fmt: skip
        return web.Response(text=said.model_dump_json(), content_type="application/json")

    async def watch(self, request: web.Request) -> web.StreamResponse:
        out = web.StreamResponse()
        await out.prepare(request)
        await out.write(self.world.reply().model_dump_json().encode() + b"\n")
        while (line := await self.lines.get()) is not None:
            await out.write(line + b"\n")
        return out

    async def attach(self, request: web.Request) -> web.Response:
        if self.refuse_attach:
            return web.json_response({"code": "attach.no", "message": "not here"}, status=409)
        self.attached.append(json.loads(await request.text()))
        return web.json_response({"attachment": None})

    async def explain(self, request: web.Request) -> web.Response:
        if not self.explanation:
            return web.json_response({"code": "explain.unknown", "message": "no"}, status=404)
        said = {"src": "a", "dst": "b", "proto": "tcp", "port": 1, "verdict": "deny", "rule": None, "where": None, "digest": ""}
        return web.json_response(said | self.explanation)


@pytest.fixture
async def agent(world: World, tmp_path: Path) -> AsyncIterator[LocalAgent]:
    local = LocalAgent(world, tmp_path / "agent.sock")
    app = web.Application()
    app.router.add_get("/v1/status", local.status)
    app.router.add_get("/v1/watch", local.watch)
    app.router.add_post("/v1/attach", local.attach)
    app.router.add_get("/v1/explain", local.explain)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(local.path)).start()
    yield local
    local.lines.put_nowait(None)
    await runner.cleanup()

