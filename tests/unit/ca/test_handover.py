"""A committed move is told to the new holder, then to the receivers, then to the old holder; and nobody waits long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ca import service as service_module
from ca.service import Service
from ca.streams import Stream
from identity.wire.admin import WorkloadAdd, WorkloadMove
from identity.wire.feed import Report, parse_frame

HOSTS = ("a", "b", "c")
POLICY = "meshpolicy: 1\nsegments:\n  - name: s\n    allow:\n      - {id: x, from: {role: web}, to: {role: api}, on: tcp/1}\n"


class Stage:
    """A service with three connected hosts: web on a, api on b, and room for api on c. No host reports by itself."""

    def __init__(self, plane: Any, enrol: Any) -> None:
        self.service = Service(plane, heartbeat=3600)
        for host in HOSTS:
            enrol(plane, host)
        for name, host in (("web", "a"), ("api", "b")):
            plane.placements.add(WorkloadAdd(name=name, host=host, labels={"role": name}), plane.now, "t")
        plane.policies.apply([("p.yaml", POLICY)], "t", plane.now, "t")
        plane.publish()
        self.plane = plane
        self.streams: dict[str, Stream] = {}

    async def connect(self) -> None:
        for host in HOSTS:
            self.streams[host] = Stream(host, expires=1 << 40)
            await self.service.open_stream(self.streams[host], None, None)
        for host in HOSTS:
            await self.told(host)

    def drain(self) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {}
        for host, stream in self.streams.items():
            out[host] = []
            while stream.queue.qsize():
                out[host].append(parse_frame(b"".join(stream.queue.get_nowait())))
        return out

    def report(self, host: str, attached: list[str] | None = None) -> None:
        revision = self.plane.feed.revision
        report = Report(timeline=self.plane.store.timeline, revision=revision, hash="0" * 64, held={}, attached=attached or [])
        self.service.report(host, report)

    async def told(self, host: str) -> Any:
        """The next frame of one stream."""
        async with asyncio.timeout(5):
            return parse_frame(b"".join(await self.streams[host].queue.get()))

    async def prepared(self) -> asyncio.Task[Any]:
        """A move of api to c that all have made ready; returns it, committed or about to be."""
        move = asyncio.create_task(self.service.move(WorkloadMove(name="api", to="c", wait=5), "t"))
        for host in HOSTS:
            await self.told(host)
        for host in HOSTS:
            self.report(host, ["api/0"] if host == "c" else [])
        return move


@pytest.fixture
async def stage(plane: Any, enrol: Any) -> AsyncIterator[Stage]:
    made = Stage(plane, enrol)
    await made.service.start()
    await made.connect()
    yield made
    await made.service.stop()


async def test_the_order(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HAND_OVER_S", 60.0)
    move = await stage.prepared()
    assert "placement/api/0" in (await stage.told("c")).upserts
    assert stage.drain() == {"a": [], "b": [], "c": []}
    stage.report("c", ["api/0"])
    assert "placement/api/0" in (await stage.told("a")).upserts
    assert stage.drain()["b"] == [], "the old holder serves on until the receivers have followed"
    stage.report("a")
    assert "placement/api/0" in (await stage.told("b")).upserts
    stage.report("b")
    assert (await move).waiting_for == []


async def test_nobody_waits_for_a_new_holder_that_says_nothing(stage: Stage) -> None:
    move = await stage.prepared()
    for host in ("c", "a", "b"):
        assert "placement/api/0" in (await stage.told(host)).upserts
        stage.report(host)
    await move


async def test_a_later_change_does_not_wait(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revocation while receivers are held back: they get both at once, in order."""
    monkeypatch.setattr(service_module, "HAND_OVER_S", 60.0)
    move = await stage.prepared()
    await stage.told("c")
    plane = stage.plane
    await stage.service.change(lambda: plane.placements.revoke("web", 0, plane.now, "t"))
    first, second = await stage.told("a"), await stage.told("a")
    assert "placement/api/0" in first.upserts
    assert second.from_revision == first.revision
    for host in HOSTS:
        stage.report(host)
    await move


async def test_a_stop_lets_everything_through(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HAND_OVER_S", 60.0)
    move = await stage.prepared()
    await stage.told("c")
    move.cancel()
    await asyncio.gather(move, return_exceptions=True)
    for task in list(stage.service._handovers):
        task.cancel()
    assert "placement/api/0" in (await stage.told("a")).upserts
    assert "placement/api/0" in (await stage.told("b")).upserts
