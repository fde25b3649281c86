"""The local API through a real unix socket, both ends ours."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time

import aiohttp
import pytest

from identity.errors import (
    BadInput,
    BadState,
    Conflict,
    NoPrivilege,
    NotFound,
    Refused,
    TimedOut,
    Unreachable,
)
from identity.wire.admin import ExplainReply
from identity.wire.enroll import SidecarTokenReply, SidecarTokenRequest, SvidReply
from identity.wire.local import Attach, InstanceRef
from mesh import local_api, local_client
from mesh.endpoint import Agent
from mesh.local_api import LocalApi, listen_on
from mesh.local_client import LocalClient, socket_path
from mesh.uplink import boottime


async def told(agent: Agent, line: bytes) -> None:
    await agent._on_events(agent.machine.receive(line, wall=time.time(), mono=boottime()))
    await agent.applied()


@pytest.fixture
async def agent(make_agent, enrollment, live):
    made = make_agent(enrollment)
    made._restore()
    await made._apply()
    applying = asyncio.create_task(made._applying())
    yield made
    applying.cancel()
    await asyncio.gather(applying, return_exceptions=True)


@pytest.fixture
async def served(agent):
    stop = asyncio.Event()
    async with LocalApi(agent, stop) as api:
        api.stopped = stop
        yield api


@pytest.fixture
async def client(served):
    async with LocalClient(served.path) as made:
        yield made


async def test_status_before_and_after_the_first_state(agent, client, live):
    before = await client.status()
    assert (before.ready, before.revision, before.policy_digest, before.peers) == (False, None, None, [])
    await client.attach(Attach(name="web", kind="host"))
    await told(agent, live.snapshot())
    after = await client.status()
    assert after.ready
    assert (after.endpoint, after.kind, after.trust_domain) == ("host-a", "host", "test.example")
    assert (after.timeline, after.revision, after.policy_revision) == ("t1", 1, 1)
    assert [(a.name, a.state, a.epoch, len(a.addresses)) for a in after.attachments] == [("web", "active", 1, 2)]
    (peer,) = after.peers
    assert (peer.endpoint, peer.underlay, peer.latest_handshake, peer.rx_bytes) == ("host-b", "192.0.2.7:1", 5, 10)
    assert after.firewall_elements == 7
    assert after.staleness_s is not None
    assert after.staleness_s < 60


async def test_attach_and_detach(client, agent, live):
    await told(agent, live.snapshot())
    reply = await client.attach(Attach(name="web", kind="host"))
    assert (reply.attachment.state, reply.attachment.epoch) == ("active", 1)
    again = await client.attach(Attach(name="web", kind="host"))
    assert again == reply
    waiting = await client.attach(Attach(name="later", instance=3, kind="host"))
    assert (waiting.attachment.state, waiting.attachment.addresses) == ("waiting", [])
    await client.detach(InstanceRef(name="later", instance=3))
    assert [a.name for a in (await client.status()).attachments] == ["web"]
    with pytest.raises(NotFound) as caught:
        await client.detach(InstanceRef(name="later", instance=3))
    assert caught.value.code == "attach.unknown"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Attach(name="WEB", kind="host"), BadInput),
        (Attach(name="web", kind="host", netns="x"), BadInput),
        (Attach(name="web"), BadInput),
        (Attach(name="web", netns="../etc"), BadInput),
        (Attach(name="web", netns="/etc/passwd"), BadInput),
        (Attach(name="web", netns="no-such-namespace"), NotFound),
        (Attach(name="web", netns="/proc/4194305/ns/net"), NotFound),
        (Attach(name="web", netns="/proc/self/ns/net"), Refused),
    ],
)
async def test_bad_attachments_change_nothing(client, request_, error):
    with pytest.raises(error):
        await client.attach(request_)
    assert (await client.status()).attachments == []


@pytest.fixture
def process():
    """A process in a network namespace of its own (root)."""
    if os.geteuid() != 0:
        pytest.skip("making a namespace needs root")
    made = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo up; exec sleep 30"], stdout=subprocess.PIPE)
    with made:
        assert made.stdout.readline() == b"up\n"
        yield made
        made.kill()


async def test_an_instance_has_one_place_and_ends_with_its_process(client, agent, process):
    place = f"/proc/{process.pid}/ns/net"
    await client.attach(Attach(name="web", kind="host"))
    with pytest.raises(Conflict) as caught:
        await client.attach(Attach(name="web", netns=place))
    assert caught.value.code == "attach.taken"
    assert (await client.attach(Attach(name="batch", netns=place))).attachment.netns == place
    process.kill()
    async with asyncio.timeout(5):
        while any(a.name == "batch" for a in (await client.status()).attachments):  # noqa: ASYNC110 -- as a user sees it
            await asyncio.sleep(0.01)


# ---- explain


async def test_explain_from_the_policy_in_force(client, agent, live):
    await told(agent, live.snapshot())
    allowed = await client.explain("web", "shop/api/0", "tcp", 8080)
    assert (allowed.verdict, allowed.rule, allowed.where) == ("allow", "web-to-api", "p.yaml:7")
    denied = await client.explain("batch", "shop/api", "tcp", 8080)
    assert denied.verdict == "deny"
    assert any("web-to-api" in miss for miss in denied.near_misses)
    assert denied.smallest_change
    them = await client.explain("spiffe://other.example/shop/web", "shop/api", "tcp", 8080)
    assert (them.verdict, them.src) == ("deny", "spiffe://other.example/shop/web")
    assert "from: \"spiffe://other.example/shop/web\"" in str(them.smallest_change) or "spiffe-other" in str(them.smallest_change)
    with pytest.raises(BadInput):
        await client.explain("spiffe://other.example/a/../b", "shop/api", "tcp", 8080)
    for proto, port in (("tcp", 70000), ("nonsense", 1)):
        with pytest.raises(BadInput):
            await client.explain("web", "shop/api", proto, port)


async def test_explain_asks_the_ca_for_strangers(client, agent, live, monkeypatch):
    await told(agent, live.snapshot())
    asked = []

    async def ask(src, dst, proto, port):
        asked.append((src, dst, proto, port))
        if dst == "nobody":
            raise NotFound("workload.unknown", "no")
        return ExplainReply(
            src=src, dst=dst, proto=proto, port=port, verdict="deny", reason="r", rule=None, where=None, digest=""
        )

    monkeypatch.setattr(agent.uplink, "explain", ask)
    assert (await client.explain("web/0", "far", "udp", 53)).reason == "r"
    assert asked == [("web", "far", "udp", 53)]
    with pytest.raises(NotFound) as caught:
        await client.explain("web", "nobody", "icmp", None)
    assert caught.value.code == "workload.unknown"

    async def gone(*_):
        raise Unreachable("ca.unreachable", "no")

    monkeypatch.setattr(agent.uplink, "explain", gone)
    with pytest.raises(NotFound) as caught:
        await client.explain("web", "far", "tcp", 1)
    assert caught.value.code == "explain.unknown"


# ---- snapshot, watch


async def test_the_snapshot_leaves_out_what_is_fenced(client, agent, live, monkeypatch):
    assert (await client.snapshot()).objects == {}
    live.objects["placement/db/0"] = live.placement("db", "host-b", index=9, fence="strict")
    await told(agent, live.snapshot())
    assert (await client.snapshot()).objects == live.objects
    now = boottime()
    monkeypatch.setattr("mesh.endpoint.boottime", lambda: now + 31)
    await agent.applied()
    reply = await client.snapshot()
    assert reply.objects == {k: v for k, v in live.objects.items() if k != "placement/db/0"}
    assert (reply.timeline, reply.revision) == ("t1", 1)


async def test_watch_tells_every_change_and_ends_with_the_agent(served, client, agent, live):
    seen = []

    async def follow() -> None:
        async for reply in client.watch():
            if reply.revision in seen:
                continue  # `told` has it applied once more
            seen.append(reply.revision)
            if reply.revision is None:
                await told(agent, live.snapshot())
            elif reply.revision == 1:
                await told(agent, live.delta())
            else:
                break

    async with asyncio.timeout(10):
        await follow()
    assert seen == [None, 1, 2]
    watching = asyncio.create_task(_drain(client))
    await asyncio.sleep(0.05)
    await served.__aexit__(None, None, None)
    with pytest.raises(Unreachable):
        async with asyncio.timeout(10):
            await watching


async def _drain(client: LocalClient) -> None:
    async for _ in client.watch():
        pass


# ---- SVIDs and tokens


async def test_svids_only_for_what_is_active_here(client, agent, live, monkeypatch):
    issued = []

    async def issue(request):
        issued.append(request.workload)
        name = live.trust.verify_svid  # the real authority signs
        assert name
        from identity.names import SpiffeId

        chain = live.authority.issue_workload(
            request.csr, SpiffeId.workload(live.trust.trust_domain, request.workload), [], time.time()
        )
        return SvidReply(spiffe_id="unused", chain=chain, bundle="")

    monkeypatch.setattr(agent.svids, "_ask", issue)
    await told(agent, live.snapshot())
    with pytest.raises(NotFound):
        await client.svid(InstanceRef(name="web"))
    await client.attach(Attach(name="web", kind="host"))
    files = await client.svid(InstanceRef(name="web"))
    assert files.spiffe_id == "spiffe://test.example/wl/web"
    assert "PRIVATE KEY" in files.key
    assert await client.svid(InstanceRef(name="web")) == files
    assert issued == ["web"]
    await told(agent, live.delta({"placement/web/0": live.placement("web", "host-b", 2)}))
    with pytest.raises(Refused) as caught:
        await client.svid(InstanceRef(name="web"))
    assert "fenced" in caught.value.message
    assert agent.svids._held == {}


async def test_sidecar_tokens_carry_the_address_of_the_ca(client, agent, monkeypatch):
    async def grant(request):
        return SidecarTokenReply(token="rt1.x", endpoint=f"{request.workload}-sidecar-1", expires_in=60)

    monkeypatch.setattr(agent.uplink, "sidecar_token", grant)
    reply = await client.sidecar_token(SidecarTokenRequest(workload="web"))
    assert (reply.endpoint, reply.ca) == ("web-sidecar-1", "https://127.0.0.1:1")


async def test_down_says_how(served, client, agent):
    await client.down(clean=False)
    assert served.stopped.is_set()
    assert agent.clean is False
    await client.down(clean=True)
    assert agent.clean is True


# ---- who may ask, and how


def raw(path: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.UnixConnector(path))


async def test_other_users_and_web_pages_are_refused(served, client, monkeypatch):
    assert served.path.stat().st_mode & 0o777 == 0o600
    async with raw(str(served.path)) as session:
        async with session.get("http://evil.example/v1/status", headers={"Host": "evil.example"}) as reply:
            assert reply.status == 200  # a host name proves nothing, so none is asked for
        async with session.get("http://agent/v1/status", headers={"Origin": "http://evil.example"}) as reply:
            assert (reply.status, (await reply.json())["code"]) == (403, "local.origin")
        monkeypatch.setattr(local_api, "peer_of", lambda _: (1, 65534))
        async with session.get("http://agent/v1/status") as reply:
            assert (reply.status, (await reply.json())["code"]) == (403, "local.uid")
        monkeypatch.setattr(local_api, "peer_of", lambda _: (1, 0))
        async with session.get("http://agent/v1/status") as reply:
            assert reply.status == 200


async def test_malformed_requests_are_clear_errors(served, agent, monkeypatch):
    async with raw(str(served.path)) as session:
        for method, path, body, status, code in (
            ("POST", "/v1/attach", b"{", 400, "wire.schema"),
            ("POST", "/v1/attach", b'{"name":"web","extra":1}', 400, "wire.schema"),
            ("POST", "/v1/attach", b"x" * 70000, 400, "wire.large"),
            ("GET", "/v1/explain?src=a", None, 400, "explain.form"),
            ("GET", "/v1/explain?src=a&dst=b&port=x", None, 400, "explain.form"),
            ("GET", "/v1/none", None, 404, "api.path"),
            ("DELETE", "/v1/status", None, 405, "api.path"),
        ):
            async with session.request(method, f"http://agent{path}", data=body) as reply:
                assert (reply.status, json.loads(await reply.read())["code"]) == (status, code)

        async def broken(_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(local_api, "status_of", broken)
        async with session.get("http://agent/v1/status") as reply:
            body = await reply.json()
            assert (reply.status, body["code"]) == (500, "bug")
            assert "Zero" not in str(body)


async def test_a_socket_left_by_a_dead_agent_is_replaced_and_a_live_one_is_not(tmp_path, served):
    path = tmp_path / "old" / "agent.sock"
    listen_on(path).close()
    assert path.exists()
    listen_on(path).close()
    with pytest.raises(Conflict) as caught:
        listen_on(served.path)
    assert caught.value.code == "agent.running"
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "agent.sock", tmp_path / ("x" * 200) / "agent.sock"):
        with pytest.raises(BadState):
            listen_on(bad)


async def test_the_client_says_what_is_wrong(tmp_path, monkeypatch):
    async with LocalClient(tmp_path / "none.sock") as client:
        with pytest.raises(Unreachable) as caught:
            await client.status()
        assert caught.value.code == "agent.unreachable"
        with pytest.raises(Unreachable):
            await _drain(client)
    assert isinstance(client._unreachable(PermissionError(13, "no")), NoPrivilege)
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / "silent.sock"))
    silent.listen()
    monkeypatch.setattr(local_client, "TIMEOUT", 0.1)
    async with LocalClient(tmp_path / "silent.sock") as client:
        with pytest.raises(TimedOut):
            await client.status()
    silent.close()


def test_where_the_socket_is(monkeypatch, tmp_path):
    monkeypatch.delenv("RETINUE_RUN_DIR", raising=False)
    assert str(socket_path(None)) == "/run/retinue/agent.sock"
    monkeypatch.setenv("RETINUE_RUN_DIR", "/elsewhere")
    assert str(socket_path(None)) == "/elsewhere/agent.sock"
    assert socket_path(tmp_path) == tmp_path / "agent.sock"
