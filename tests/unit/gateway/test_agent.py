"""gateway.agent: follows the local API, verifies, attaches, and keeps what it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.agent import AgentLink
from gateway.config import Caller
from gateway.view import View

CALLER = Caller(workload="partner/acme", token_sha256=["a" * 64])


class Following:
    def __init__(self, agent: Any, world: Any) -> None:
        self.views: asyncio.Queue[View] = asyncio.Queue()
        self.link = AgentLink(agent.path, world.pin, self.views.put_nowait)
        self.link.callers = [CALLER]
        self.task = asyncio.create_task(self.link.run())

    async def next(self) -> View:
        async with asyncio.timeout(10):
            return await self.views.get()


@pytest.fixture
async def following(agent: Any, world: Any) -> AsyncIterator[Following]:
    made = Following(agent, world)
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)


async def test_views_arrive_and_callers_are_attached_once(following: Following, agent: Any) -> None:
    first = await following.next()
    assert first.endpoint == "gw"
    agent.push()
    assert (await following.next()).revision > first.revision
    agent.push()
    await following.next()
    assert [(a["name"], a["kind"]) for a in agent.attached] == [("partner/acme", "host")]
    assert following.link.error is None


async def test_a_refused_attachment_is_told_and_tried_again(following: Following, agent: Any) -> None:
    agent.refuse_attach = True
    await following.next()
    agent.push()
    await following.next()
    assert following.link.unattached == {"partner/acme/0": "not here"}
    agent.refuse_attach = False
    agent.push()
    await following.next()
    agent.push()
    await following.next()
    assert following.link.unattached == {"partner/acme/0": ""}


async def test_what_does_not_verify_changes_nothing(following: Following, agent: Any, world: Any) -> None:
    first = await following.next()
    forged = world.reply()
    agent.push(forged.model_copy(update={"trust_domain": "evil.example"}).model_dump_json().encode())
    agent.push()
    second = await following.next()
    assert second.revision > first.revision
    assert following.views.empty()


async def test_the_link_comes_back(following: Following, agent: Any) -> None:
    first = await following.next()
    agent.lines.put_nowait(None)
    assert (await following.next()).revision > first.revision


async def test_explain(following: Following, agent: Any) -> None:
    assert await following.link.explain("a", "b", "tcp", 1) is None
    agent.explanation = {"reason": "because"}
    said = await following.link.explain("a", "b", "tcp", 1)
    assert said is not None
    assert said["reason"] == "because"


async def test_no_agent(tmp_path: Any, world: Any) -> None:
    link = AgentLink(tmp_path / "none.sock", world.pin, lambda _: None)
    task = asyncio.create_task(link.run())
    assert await link.explain("a", "b", "tcp", 1) is None
    for _ in range(1000):
        await asyncio.sleep(0)
        if "agent.unreachable" in str(link.error):
            break
    assert "agent.unreachable" in str(link.error)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_new_caller_is_attached_at_once(following: Following, agent: Any) -> None:
    await following.next()
    agent.push()
    await following.next()
    await following.link.attach([CALLER, Caller(workload="partner/new", token_sha256=["b" * 64])])
    assert [a["name"] for a in agent.attached] == ["partner/acme", "partner/new"]
