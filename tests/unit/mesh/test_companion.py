"""The sidecar's own part: joining, readiness, SVID files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import urllib.error
import urllib.request

import pytest

from identity.errors import BadInput, Conflict, RetinueError, Unreachable
from identity.wire.enroll import SidecarTokenReply
from identity.wire.local import SvidFiles
from mesh import companion
from mesh.companion import SidecarConfig, guess_underlay, not_ready, own_place
from mesh.endpoint import AgentConfig
from mesh.plan import AttachmentPlan
from mesh.uplink import boottime


async def tell(agent, line: bytes) -> None:
    await agent._on_events(agent.machine.receive(line, wall=time.time(), mono=boottime()))
    await agent._apply()


@pytest.fixture
async def agent(make_agent, sidecar_enrollment):
    made = make_agent(sidecar_enrollment)
    await made._apply()
    return made


async def test_its_place_is_its_own_namespace(agent, live):
    assert own_place(agent) is None
    assert "no state" in not_ready(agent)
    await tell(agent, live.snapshot())
    place = own_place(agent)
    assert (place.key, place.kind, place.active) == ("cart/0", "host", True)
    assert not_ready(agent) is None


async def test_readiness_says_why_not(agent, live):
    await tell(agent, live.snapshot())
    agent.plane.failed = {"cart/0": "no"}
    await agent._apply()
    assert "could not be set up" in not_ready(agent)
    agent.plane.failed = {}
    agent.plane.fail = Unreachable("device.gone", "no engine")
    await agent._apply()
    assert "could not be applied" in not_ready(agent)
    agent.plane.fail = None
    await tell(agent, live.delta({"placement/cart/0": live.placement("cart", "host-b", 2, index=7)}))
    assert not_ready(agent) == "no instance is placed on this sidecar"
    agent.in_force.plan.attachments["cart/0"] = AttachmentPlan("cart/0", "host", None, None, "prepared", 3, (), "a move")
    assert not_ready(agent) == "cart/0 is prepared: a move"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(port: int, path: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as r:
            return r.status, json.loads(r.read())
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.loads(e.read())


async def test_the_readiness_endpoint(agent, live):
    port = free_port()
    async with companion._readiness(agent, port):
        code, body = await asyncio.to_thread(get, port, "/readyz")
        assert (code, body["ready"]) == (503, False)
        assert await asyncio.to_thread(get, port, "/livez") == (200, {"live": True})
        with pytest.raises(Conflict) as caught:
            async with companion._readiness(agent, port):
                pass
        assert caught.value.code == "ready.port"
        await tell(agent, live.snapshot())
        assert await asyncio.to_thread(get, port, "/readyz") == (200, {"ready": True, "reason": None})


async def test_svid_files_follow_what_is_in_force(agent, live, tmp_path, monkeypatch):
    directory, reloaded = tmp_path / "svid", []
    files = SvidFiles(spiffe_id="s", certificate="c1", key="k", bundle="b", expires=1)
    answers: list[object] = [files]

    async def give(name, instance):
        assert (name, instance) == ("cart", 0)
        answer = answers[0]
        if isinstance(answer, RetinueError):
            raise answer
        return answer

    monkeypatch.setattr(agent.svids, "get", give)
    monkeypatch.setattr("mesh.svid_files.reload", reloaded.append)
    config = SidecarConfig(agent=agent.config, ready_port=0, svid_dir=directory, reload="systemctl reload x")
    task = asyncio.create_task(companion._beside(agent, config))

    async def until(what) -> None:
        async with asyncio.timeout(5):
            while not what():  # noqa: ASYNC110 -- files have no event
                await asyncio.sleep(0.005)

    try:
        await tell(agent, live.snapshot())
        await until(lambda: reloaded == ["systemctl reload x"])
        assert (directory / "cert.pem").read_text() == "c1"
        answers[0] = Unreachable("ca.unreachable", "no")
        await tell(agent, live.delta())
        await until(lambda: "svid.files" in agent.health)
        assert (directory / "cert.pem").read_text() == "c1"
        answers[0] = files.model_copy(update={"certificate": "c2"})
        await tell(agent, live.delta())
        await until(lambda: (directory / "cert.pem").read_text() == "c2" and "svid.files" not in agent.health)
        agent.in_force.plan.attachments["cart/0"] = AttachmentPlan("cart/0", "host", None, None, "fenced", None, (), "moved")
        await companion._write_files(agent, directory, companion.SidecarConfig(agent.config))
        assert list(directory.iterdir()) == []
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# ---- joining


def config(tmp_path, **changes) -> SidecarConfig:
    return SidecarConfig(agent=AgentConfig(state_dir=tmp_path / "s", run_dir=tmp_path / "r"), **changes)


async def test_joining_needs_a_token_from_somewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("RETINUE_TOKEN", raising=False)
    for changes in ({}, {"from_agent": tmp_path / "x"}, {"ca": "https://127.0.0.1:1"}):
        with pytest.raises(BadInput):
            await companion.join(config(tmp_path, **changes))
    with pytest.raises(Unreachable):
        await companion.join(config(tmp_path, from_agent=tmp_path / "x", workload="cart"))


async def test_joining_with_a_token_of_the_host_agent(tmp_path, monkeypatch, enrollment):
    asked: list[object] = []

    class HostAgent:
        def __init__(self, path) -> None:
            asked.append(path)

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            return None

        async def sidecar_token(self, request):
            return SidecarTokenReply(token="rt1.t", endpoint=f"{request.workload}-sidecar-1", expires_in=60, ca="https://[::1]:1")

    async def enroll(ca, token, state_dir, underlay, ciphers):
        asked.append((ca, token, state_dir, underlay, ciphers))
        return enrollment

    async def offers():
        return ["aes-256-gcm", "chacha20poly1305"]

    monkeypatch.setattr("mesh.local_client.LocalClient", HostAgent)
    monkeypatch.setattr("mesh.devices.offers.offers", offers)
    monkeypatch.setattr(companion, "enroll", enroll)
    await companion.join(config(tmp_path, from_agent=tmp_path / "agent.sock", workload="cart"))
    assert asked == [
        tmp_path / "agent.sock", ("https://[::1]:1", "rt1.t", tmp_path / "s", ["[::1]:51820"], ["aes-256-gcm", "chacha20poly1305"]),
    ]  # fmt: skip
    await companion.join(config(tmp_path, from_agent=tmp_path / "a", workload="cart", ca="https://127.0.0.1:1", underlay=("192.0.2.1:5",)))
    assert asked[-1][0] == "https://127.0.0.1:1"
    assert asked[-1][3] == ["192.0.2.1:5"]


def test_the_hint_that_is_found_out():
    assert guess_underlay("https://127.0.0.1:8443", 7) == ["127.0.0.1:7"]
    assert guess_underlay("https://[::1]:8443", 7) == ["[::1]:7"]
    assert guess_underlay("https://no.such.host.invalid:1", 7) == []


async def test_a_second_start_joins_no_more(tmp_path, monkeypatch):
    served: list[object] = []

    async def serve(agent_config, *, beside):
        served.append(agent_config)

    async def join(_: SidecarConfig) -> None:
        served.append("joined")
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "endpoint.json").write_text("{}")

    monkeypatch.setattr(companion, "serve", serve)
    monkeypatch.setattr(companion, "join", join)
    made = config(tmp_path)
    await companion.serve_sidecar(made)
    await companion.serve_sidecar(made)
    assert served == ["joined", made.agent, made.agent]
