"""A moved identity has one holder: every receiver refuses the old one, even when the old host never hears of the move."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from mesh.capture import Capture
from mesh.lab_process import ProcessFailed
from mesh.probe_pairs import Receiver, Sender

NEWS = 7000
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
      - {id: api-news, from: {role: api}, to: {role: web}, on: [udp/7000, tcp/7000]}
"""


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    """web on host-a; api on host-b, with a place ready on host-c."""
    made = make_mesh("host-a", "host-b", "host-c")
    for name, host in (("web", "host-a"), ("api", "host-b")):
        made.add(name, host)
        made.place(name, host)
    made.place("api", "host-c", wait=0)
    made.apply(POLICY)
    for host in ("host-b", "host-c"):
        made.serve(made.lab.netns(f"api-{host}"), f"api@{host}")
    return made


class Traffic:
    """Both places of api talk to web all the time, over one family; who is heard, and how much of it?"""

    def __init__(self, mesh: Any, family: int) -> None:
        self.mesh, self.family = mesh, family
        self.web, self.api = mesh.addresses["web"][family], mesh.addresses["api"][family]
        self.news = Receiver("udp", NEWS, netns=mesh.lab.netns("web-host-a"), address=self.web)

    def sender(self, host: str) -> Sender:
        return Sender("udp", self.web, NEWS, tag=host, rate=200, netns=self.mesh.lab.netns(f"api-{host}"), bind=self.api)

    def heard(self, host: str) -> int:
        return len(self.news.of(host).seqs)


@pytest.fixture(params=[0, 1], ids=["v4", "v6"])
async def traffic(mesh: Any, request: pytest.FixtureRequest) -> AsyncIterator[Traffic]:
    """With api at home on host-b, and both sides knowing it."""
    placed = next(w for w in await mesh.lab.aca("workload", "list") if w["name"] == "api")
    if placed["host"] != "host-b":
        await move(mesh, "host-b")
    made = Traffic(mesh, request.param)
    async with made.news:
        yield made


async def move(mesh: Any, to: str, *args: str) -> dict[str, Any]:
    done: dict[str, Any] = await mesh.lab.aca("workload", "move", "api", "--to", to, *args)
    return done


async def test_there_and_back_again(mesh: Any, traffic: Traffic) -> None:
    epochs = []
    async with AsyncExitStack() as stack:
        await mesh.answered(mesh.lab.netns("web-host-a"), mesh.url("api", traffic.family))
        b = await stack.enter_async_context(traffic.sender("host-b"))
        await traffic.news.wait("host-b", 50)
        for to, old in (("host-c", "host-b"), ("host-b", "host-c")):
            moved = await move(mesh, to)
            assert moved["waiting_for"] == [], "everybody followed"
            assert moved["workload"]["addresses"] == mesh.addresses["api"]
            epochs.append(moved["workload"]["epoch"])
            fenced = traffic.heard(old)
            if to == "host-c":
                c = await stack.enter_async_context(traffic.sender("host-c"))
            await traffic.news.wait_more(to, 50)
            await (b if old == "host-b" else c).attempted(50)
            assert traffic.heard(old) == fenced, "nothing is accepted from the old holder after its fence"
            answer = await mesh.answered(mesh.lab.netns("web-host-a"), mesh.url("api", traffic.family))
            assert answer.served_by == f"api@{to}"
    assert epochs[1] == epochs[0] + 1


async def test_an_old_holder_that_never_hears_of_the_move(mesh: Any, traffic: Traffic) -> None:
    """Its agent is stopped: tunnel, routes and rules there stay as they were, and it goes on speaking as api."""
    agent = mesh.lab.processes["agent-host-b"]
    async with AsyncExitStack() as stack:
        b = await stack.enter_async_context(traffic.sender("host-b"))
        await traffic.news.wait("host-b", 50)
        agent.send(signal.SIGSTOP)
        try:
            with pytest.raises(ProcessFailed):
                await mesh.lab.aca("workload", "move", "api", "--to", "nowhere")
            moved = await move(mesh, "host-c", "--wait", "1", "--force")
            assert moved["waiting_for"] == ["host-b"], "only the stopped one has not followed"
            fenced, errors = traffic.heard("host-b"), b.errors.total()
            nodes = mesh.lab.nodes
            outer = b"".join(ipaddress.ip_address(nodes[n].v4).packed for n in ("host-b", "host-a"))  # IPv4 source, destination
            c = await stack.enter_async_context(traffic.sender("host-c"))
            with Capture(mesh.lab.switch, {"b to a": outer}) as capture:
                await traffic.news.wait_more("host-c", 50)
                await b.attempted(100)
                seen = capture.take()
            assert b.errors.total() == errors, "positive control: the old holder sends without an error"
            assert seen.hits["b to a"] >= 50, "and its packets are on the wire"
            assert traffic.heard("host-b") == fenced, "web's host refuses every one of them"
            # nor do answers find the old place
            answer = await mesh.answered(mesh.lab.netns("web-host-a"), mesh.url("api", traffic.family))
            assert answer.served_by == "api@host-c"
        finally:
            agent.send(signal.SIGCONT)
        status = await mesh.lab.until("host-b", lambda s: all(a.state != "active" for a in s.attachments if a.name == "api"))
        assert {a.name: a.state for a in status.attachments}["api"] in {"fenced", "waiting"}
        await c.attempted(20)
        await b.attempted(20)
        assert traffic.heard("host-b") == fenced
    peers = {p.endpoint: p.allowed_ips for p in (await mesh.lab.until("host-a", lambda _: True)).peers}
    assert not any(traffic.api in ip for ip in peers.get("host-b", []))
    assert any(traffic.api in ip for ip in peers["host-c"])


async def test_a_killed_old_host_does_not_hold_the_move_up(mesh: Any, traffic: Traffic) -> None:
    """kill -9 of the old holder's agent: api lives on at the new place, and the old one comes back fenced."""
    agent = mesh.lab.processes["agent-host-b"]
    agent.kill()
    with pytest.raises(ProcessFailed, match="host-b"):
        await move(mesh, "host-b")
    await move(mesh, "host-c", "--wait", "2", "--force")
    answer = await mesh.answered(mesh.lab.netns("web-host-a"), mesh.url("api", traffic.family))
    assert answer.served_by == "api@host-c"
    await asyncio.to_thread(mesh.lab.start_agent, "host-b")
    await mesh.lab.until("host-b", lambda s: s.control == "connected" and all(a.state != "active" for a in s.attachments))
    before = traffic.heard("host-b")
    async with traffic.sender("host-b") as b, traffic.sender("host-c"):
        await traffic.news.wait("host-c", 50)
        await b.attempted(50)
    assert traffic.heard("host-b") == before == 0
