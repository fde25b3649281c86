"""The wiring of an endpoint with a fake data plane: what is applied, saved, reported, and when."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from identity.errors import BadState, NotFound, Unreachable
from identity.wire.local import Attach
from mesh.dataplane import Event as PlaneEvent
from mesh.endpoint import Agent
from mesh.uplink import boottime


async def tell(agent: Agent, line: bytes) -> None:
    """One line of the feed, as the uplink would hand it on, and the apply that follows."""
    events = agent.machine.receive(line, wall=time.time(), mono=boottime())
    await agent._on_events(events)
    await agent._apply()


def states(agent: Agent) -> dict[str, str]:
    return {k: a.state for k, a in agent.in_force.plan.attachments.items()}


@pytest.fixture
async def agent(make_agent, enrollment) -> Agent:
    made = make_agent(enrollment)
    made._restore()
    return made


async def test_nothing_is_permitted_before_anything_was_received(agent):
    await agent._apply()
    (plan,) = agent.plane.plans
    assert (plan.peers, plan.pairs, plan.attachments) == ({}, {}, {})
    assert not agent.ready
    assert agent.report() is None


async def test_a_snapshot_is_saved_applied_and_reported(agent, live):
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    assert agent.ready
    assert states(agent) == {"web/0": "active"}
    assert [p.endpoint for p in agent.plane.plans[-1].peers.values()] == ["host-b"]
    report = agent.report()
    assert (report.timeline, report.revision, report.hash) == ("t1", 1, agent.machine.received_hash)
    assert (report.held, report.attached) == ({"web/0": 1}, ["web/0"])
    assert {p.name for p in agent.state.path.iterdir()} >= {"snapshot.json", "epochs.json", "attachments.json"}
    assert agent.health.conditions() == []


async def test_a_restart_restores_without_the_network(agent, live, make_agent, enrollment):
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    again = make_agent(enrollment)
    again._restore()
    await again._apply()
    assert again.plane.plans[-1] == agent.plane.plans[-1]
    assert again.ready
    assert again.machine.marks == agent.machine.marks


async def test_damage_is_said_and_nothing_of_it_is_used(agent, live, make_agent, enrollment):
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    path = agent.state.path / "snapshot.json"
    path.write_text(path.read_text().replace("host-b", "host-c"))
    (agent.state.path / "attachments.json").write_text("{")
    again = make_agent(enrollment)
    again._restore()
    await again._apply()
    assert {"state.snapshot", "state.attachments"} <= {c.code for c in again.health.conditions()}
    assert again.plane.plans[-1].peers == {}
    assert not again.ready
    assert again.machine.marks == agent.machine.marks
    await tell(again, live.snapshot())
    assert "state.snapshot" not in again.health


@pytest.mark.parametrize("name", ["snapshot.json", "attachments.json"])
async def test_a_file_that_others_can_write_stops_it(agent, live, make_agent, enrollment, name):
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    (agent.state.path / name).chmod(0o666)
    with pytest.raises(BadState) as caught:
        make_agent(enrollment)._restore()
    assert caught.value.code == "state.mode"


async def test_a_placement_elsewhere_is_fenced_here(agent, live):
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    await tell(agent, live.delta({"placement/web/0": live.placement("web", "host-b", 2)}))
    assert states(agent) == {"web/0": "fenced"}
    assert agent.report().held == {}
    assert agent.report().attached == ["web/0"]


async def test_a_strict_instance_ends_with_the_lease_and_returns(agent, live, monkeypatch):
    agent.attachments.attach(Attach(name="web", kind="host"))
    own = agent.enrollment.record.tunnel_key
    live.objects["placement/web/0"] = live.placement("web", "host-a", 1, fence="strict", tunnel_key=own)
    await tell(agent, live.snapshot())
    assert states(agent) == {"web/0": "active"}
    now = boottime()
    monkeypatch.setattr("mesh.endpoint.boottime", lambda: now + 31)
    assert agent._due()
    await agent._apply()
    assert states(agent) == {"web/0": "fenced"}
    assert "fence.closed" in agent.health
    live.time += 40
    agent._wake.clear()
    await agent._on_events(agent.machine.receive(live.beat(), wall=time.time() + 40, mono=now + 31))
    assert agent._wake.is_set()
    await agent._apply()
    assert states(agent) == {"web/0": "active"}
    assert "fence.closed" not in agent.health


async def test_a_failed_apply_leaves_what_is_in_force_and_is_tried_again(agent, live, monkeypatch):
    monkeypatch.setattr("mesh.endpoint.RETRY", 0.0)
    await tell(agent, live.snapshot())
    before, agent.plane.fail = agent.in_force, Unreachable("device.gone", "no engine")
    await tell(agent, live.delta(removes=["placement/shop/api/0"]))
    assert agent.in_force is before
    assert agent.report().revision == 1
    assert "apply.failed" in agent.health
    agent._wake.clear()
    async with asyncio.timeout(5):
        await agent._wake.wait()
    agent.plane.fail = None
    await agent._apply()
    assert agent.report().revision == 2
    assert "apply.failed" not in agent.health


async def test_what_came_is_in_force_before_it_is_on_disk_and_reported_after(agent, live, monkeypatch):
    await tell(agent, live.snapshot())
    disk, save = threading.Event(), agent.state.save_snapshot
    monkeypatch.setattr(agent.state, "save_snapshot", lambda *given: disk.wait() and save(*given))
    line = live.delta(removes=["placement/shop/api/0"])
    agent._wake.clear()
    saving = asyncio.create_task(agent._on_events(agent.machine.receive(line, wall=time.time(), mono=boottime())))
    try:
        await agent._wake.wait()
        await agent._apply()
        assert agent.plane.plans[-1].peers == {}
        assert agent.report() is None
    finally:
        disk.set()
        await saving
    assert agent.report().revision == 2


async def test_what_cannot_be_saved_is_applied_but_not_reported(agent, live, monkeypatch):
    await tell(agent, live.snapshot())

    def full(*_: object) -> None:
        raise BadState("state.write", "no space", hint="free some")

    with monkeypatch.context() as patch:
        patch.setattr(agent.state, "save_snapshot", full)
        await tell(agent, live.delta(removes=["placement/shop/api/0"]))
        assert agent.plane.plans[-1].peers == {}
        assert agent.report() is None
        assert "state.write" in agent.health
    await tell(agent, live.beat(time=live.time + 1))
    assert agent.report().revision == 2
    assert "state.write" not in agent.health


async def test_instances_that_could_not_be_set_up_are_not_reported(agent, live):
    agent.plane.failed = {"web/0": "no such namespace"}
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    assert agent.report().attached == []
    assert [c.code for c in agent.health.conditions()] == ["attach.failed"]
    agent.plane.failed = {}
    agent._on_plane_event(PlaneEvent("netns.gone", "gone"))
    await agent._apply()
    assert agent.report().attached == ["web/0"]
    assert agent.health.conditions() == []


async def test_a_policy_whose_digest_lies_or_that_does_not_compile_is_refused(agent, live):
    await tell(agent, live.snapshot())
    from identity.records import PolicyFile, PolicyRecord

    lie = PolicyRecord(
        trust_domain="test.example", revision=2, digest="0" * 64, files=[PolicyFile(name="p", text="meshpolicy: 1\n")],
        author="", issued=live.now,
    )  # fmt: skip
    await tell(agent, live.delta({"policy": live.sign(lie)}))
    assert agent.machine.refused["policy"].code == "policy.digest"
    await tell(agent, live.delta({"policy": live.policy(3, "nonsense: [")}))
    assert "feed.refused" in agent.health
    assert agent.in_force.view.snapshot.policy.revision == 1


async def test_time_windows_open_and_close_by_themselves(agent, live, monkeypatch):
    window = '{id: w, from: {role: web}, to: {role: shop-api}, on: tcp/8080, when: {cron: "30 12 * * *", for: 10m, tz: UTC}}'
    text = f"meshpolicy: 1\nsegments:\n  - {{name: shop, members: {{role: [web, shop-api]}}, mode: enforce, allow: [{window}]}}\n"
    live.objects["policy"] = live.policy(1, text)
    noon = live.now - live.now % 86400 + 12 * 3600
    clock = [float(noon)]
    monkeypatch.setattr("mesh.endpoint.time.time", lambda: clock[0])
    agent.machine.receive(live.snapshot(), wall=float(live.now), mono=boottime())
    agent.attachments.attach(Attach(name="web", kind="host"))
    for minute, allowed in ((0, False), (30, True), (39, True), (40, False)):
        clock[0] = noon + minute * 60.0
        if minute in {30, 40}:
            assert agent._due()
        await agent._apply()
        assert bool(agent.in_force.plan.pairs) is allowed, minute
        assert not agent._due()


async def test_clock_skew_and_age_are_said(agent, live, monkeypatch):
    await tell(agent, live.snapshot())
    live.time += 100
    await tell(agent, live.beat())
    assert "behind" in next(c.text for c in agent.health.conditions() if c.code == "clock.skew")
    now = boottime()
    monkeypatch.setattr("mesh.endpoint.boottime", lambda: now + 8)
    agent._say_age()
    assert "control.stale" in agent.health
    monkeypatch.setattr("mesh.endpoint.boottime", lambda: now)
    agent._say_age()
    assert "control.stale" not in agent.health


async def test_no_policy_is_said(agent, live):
    del live.objects["policy"]
    await tell(agent, live.snapshot())
    assert [c.code for c in agent.health.conditions()] == ["policy.none"]


async def test_detaching_what_is_not_attached(agent):
    with pytest.raises(NotFound):
        agent.detach("web", 0)


async def test_run_applies_first_and_leaves_traffic_or_takes_it_down(make_agent, enrollment, monkeypatch, tmp_path):
    said: list[str] = []
    monkeypatch.setattr("mesh.endpoint.notify", lambda text: said.append(text) or True)
    for clean in (False, True):
        agent = make_agent(enrollment, clean_on_exit=clean)
        stop, ran = asyncio.Event(), asyncio.Event()

        async def beside(ran: asyncio.Event = ran) -> None:
            ran.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(agent.run(stop, beside))
        async with asyncio.timeout(10):
            await ran.wait()
            assert agent.plane.plans
            agent.touch()
            await agent.applied()
            stop.set()
            await task
        assert agent.plane.stopped is clean
    assert said == ["STOPPING=1", "STOPPING=1"]  # never ready: nothing was received


async def test_what_runs_beside_ends_the_endpoint_when_it_fails(make_agent, enrollment):
    agent = make_agent(enrollment)

    async def beside() -> None:
        raise Unreachable("x", "it broke")

    with pytest.raises(Unreachable):
        async with asyncio.timeout(10):
            await agent.run(asyncio.Event(), beside)
    assert agent.plane.stopped is False


async def test_watchers_see_every_change_once(agent, live):
    await agent._apply()
    seen: list[int] = []

    async def read() -> None:
        async with contextlib.aclosing(agent.watch()) as changes:
            async for state in changes:
                seen.append(state.plan.revision)
                if len(seen) == 3:
                    return

    task = asyncio.create_task(read())
    async with asyncio.timeout(5):
        for line in (live.snapshot(), live.delta()):
            await asyncio.sleep(0)
            await tell(agent, line)
            while len(seen) < agent.machine.position.revision + 1:  # noqa: ASYNC110 -- the reader has no event
                await asyncio.sleep(0)
        await task
    assert seen == [0, 1, 2]
