"""The link to the control plane over a fake client: connect, lose, resume, report, renew."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from identity.errors import BadInput, Conflict, NotVerified, Refused, TimedOut, Unreachable
from identity.wire.enroll import SidecarTokenRequest, SvidRequest
from identity.wire.feed import Report
from mesh import uplink as uplink_module
from mesh.control import Busy
from mesh.health import Health
from mesh.sync import Accepted, NeedSnapshot, SyncMachine
from mesh.uplink import Uplink


class Server:
    """What the fake clients talk to. `script` holds, for each connection, what the feed does: lines or an error."""

    def __init__(self) -> None:
        self.script: list[list[bytes | Exception]] = []
        self.connections: list[dict | None] = []
        self.sent: list[Report] = []
        self.calls: list[tuple[str, object]] = []
        self.refuse: list[Exception] = []
        self.idle = asyncio.Event()
        self.reported = asyncio.Event()
        self.clients = 0
        self.believed = True
        self.adopted: list = []
        self.closed = 0


class FakeClient:
    def __init__(self, server: Server) -> None:
        self.server = server
        server.clients += 1

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def close(self) -> None:
        self.server.closed += 1

    def believed(self, _trust) -> bool:
        return self.server.believed

    def adopt(self, trust) -> bool:
        if self.server.believed:
            self.server.adopted.append(trust)
        return self.server.believed

    @contextlib.asynccontextmanager
    async def stream(self, path, *, params=None, idle=0.0):
        assert path == "/v1/feed"
        self.server.connections.append(params)
        steps = self.server.script.pop(0) if self.server.script else []
        if steps and isinstance(steps[0], Exception):
            raise steps[0]
        yield self._lines(steps)

    async def _lines(self, steps) -> AsyncIterator[bytes]:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            yield step
        self.server.idle.set()
        await asyncio.Event().wait()

    async def send(self, path, message, *, timeout=0.0):
        assert path == "/v1/report"
        if self.server.refuse:
            raise self.server.refuse.pop(0)
        self.server.sent.append(message)
        self.server.reported.set()

    async def post(self, path, message, reply):
        self.server.calls.append((path, message))

    async def get(self, path, reply, *, params=None, timeout=0.0):
        self.server.calls.append((path, params))


class Rig:
    def __init__(self, live, enrollment, server: Server) -> None:
        self.server = server
        self.machine = SyncMachine(enrollment.bundle, "host-a")
        self.health = Health()
        self.events: list = []
        self.report: Report | None = None
        self.uplink = Uplink(enrollment, self.machine, self.health, on_events=self.on_events, report=lambda: self.report)

    async def on_events(self, events) -> None:
        self.events += events

    @contextlib.asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.uplink.run())
        try:
            async with asyncio.timeout(10):
                yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def rig(live, enrollment, monkeypatch):
    server = Server()
    monkeypatch.setattr("mesh.enroll.Enrollment.client", lambda *_: FakeClient(server))
    monkeypatch.setattr(uplink_module, "backoff", lambda *_, **__: 0.0)
    return Rig(live, enrollment, server)


async def test_it_connects_and_hands_on_what_it_hears(rig, live):
    rig.server.script = [[live.snapshot(), live.delta()]]
    async with rig.running():
        await rig.server.idle.wait()
        assert rig.uplink.control == "connected"
    assert rig.server.connections == [None]
    assert [e.position.revision for e in rig.events if isinstance(e, Accepted)] == [1, 2]
    assert rig.server.closed == rig.server.clients


@pytest.mark.parametrize(
    "error",
    [
        Unreachable("ca.unreachable", "no"), TimedOut("feed.silent", "no"), NotVerified("ca.name", "no"), BadInput("feed.large", "x"),
        Busy("api.busy", "later", retry_after=0.0), Refused("host.revoked", "no"), ZeroDivisionError("a bug"),
    ],
)  # fmt: skip
async def test_whatever_ends_a_feed_it_comes_back_and_keeps_what_it_has(rig, live, error):
    rig.server.script = [[live.snapshot(), error], [error], [live.delta()]]
    async with rig.running():
        await rig.server.idle.wait()
        assert rig.uplink.control == "connected"
        assert "control.disconnected" not in rig.health
    resumed = {"timeline": "t1", "revision": "1"}
    assert rig.server.connections == [None, resumed, resumed]
    assert rig.machine.position.revision == 2


async def test_a_gap_makes_it_ask_for_a_snapshot(rig, live):
    first = live.snapshot()
    live.delta()
    rig.server.script = [[first, live.delta()], [live.snapshot()]]
    async with rig.running():
        await rig.server.idle.wait()
    assert rig.server.connections == [None, None]
    assert any(isinstance(e, NeedSnapshot) for e in rig.events)
    assert rig.machine.position.revision == 3


async def test_a_bad_record_is_logged_and_the_stream_goes_on(rig, live):
    lines = [live.snapshot(), live.delta({"placement/web/0": "a.b.c"}), b"garbage"]
    rig.server.script = [lines, [live.snapshot()]]
    async with rig.running():
        await rig.server.idle.wait()
    assert rig.machine.refused.keys() == {"placement/web/0"}


async def test_reports_go_out_once_connected_and_are_tried_again(rig, live):
    rig.report = Report(timeline="t1", revision=1, hash="h")
    rig.server.refuse = [Unreachable("x", "no"), Conflict("y", "no")]
    rig.server.script = [[live.snapshot()]]
    async with rig.running():
        await rig.server.reported.wait()
        assert rig.server.sent == [rig.report]
        rig.uplink.tell()  # the same again is not worth a request
        rig.server.reported.clear()
        await asyncio.sleep(0.01)
        rig.report = Report(timeline="t1", revision=2, hash="h")
        rig.uplink.tell()
        await rig.server.reported.wait()
    assert [r.revision for r in rig.server.sent] == [1, 2]


async def test_a_report_that_nobody_waits_for_is_not_sent_at_once(rig, live, monkeypatch):
    monkeypatch.setattr(uplink_module, "SPREAD", 3600.0)
    monkeypatch.setattr(uplink_module.random, "uniform", lambda _, most: most)
    rig.report = Report(timeline="t1", revision=1, hash="h")
    rig.server.script = [[live.snapshot()]]

    async def reported(report: Report) -> None:
        rig.server.reported.clear()
        rig.report = report
        rig.uplink.tell()

    async with rig.running():
        await rig.server.reported.wait()
        await reported(Report(timeline="t1", revision=2, hash="h"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rig.server.reported.wait(), 0.2)
        await reported(Report(timeline="t1", revision=3, hash="h", held={"api/0": 1}))  # a move may wait for this one
        await rig.server.reported.wait()
        await reported(Report(timeline="t1", revision=4, hash="h", held={"api/0": 1}, attached=["api/0"]))
        await rig.server.reported.wait()
        prepared = live.placement("web", "host-b", epoch=2, state="prepare")
        assert rig.machine.receive(live.delta({"prepare/web/0": prepared}), wall=time.time(), mono=0.0)
        await reported(Report(timeline="t1", revision=5, hash="h", held={"api/0": 1}, attached=["api/0"]))
        await rig.server.reported.wait()
    assert [r.revision for r in rig.server.sent] == [1, 3, 4, 5]


async def test_after_coming_back_the_report_is_said_again(rig, live, monkeypatch):
    """The CA may be another process now, which knows nothing of us."""
    monkeypatch.setattr(uplink_module, "RETURNING", 0.01)
    rig.report = Report(timeline="t1", revision=1, hash="h")
    lost = asyncio.Event()

    async def lines(client, steps):
        for step in steps:
            yield step
        rig.server.idle.set()
        await (asyncio.Event() if lost.is_set() else lost).wait()
        raise Unreachable("feed.closed", "gone")

    monkeypatch.setattr(FakeClient, "_lines", lines)
    rig.server.script = [[live.snapshot()], [live.delta()]]
    async with rig.running():
        await rig.server.reported.wait()
        rig.server.reported.clear()
        lost.set()
        await rig.server.reported.wait()
    assert rig.server.sent == [rig.report, rig.report]


async def test_requests_share_a_client_until_newer_trust_ends_its_server(rig, live, live_authority):
    await rig.uplink.svid(SvidRequest(workload="web", instance=0, csr="x"))
    await rig.uplink.sidecar_token(SidecarTokenRequest(workload="web"))
    await rig.uplink.explain("a", "b", "tcp", 80)
    await rig.uplink.explain("a", "b", "icmp", None)
    assert [path for path, _ in rig.server.calls] == ["/v1/svid", "/v1/sidecar-token", "/v1/explain", "/v1/explain"]
    assert rig.server.calls[2][1] == {"src": "a", "dst": "b", "proto": "tcp", "port": "80"}
    assert rig.server.clients == 1
    live.objects["bundle"] = live_authority.bundle(5, live.now)
    rig.machine.receive(live.snapshot(), wall=time.time(), mono=0.0)
    assert rig.uplink.trust.sequence == 5
    await rig.uplink.explain("a", "b", "icmp", None)
    await rig.uplink.explain("a", "b", "icmp", None)
    assert (rig.server.clients, rig.server.closed) == (1, 0)
    assert rig.server.adopted == [rig.uplink.trust]  # asked once a bundle
    live.objects["bundle"] = live_authority.bundle(6, live.now)
    rig.machine.receive(live.snapshot(), wall=time.time(), mono=0.0)
    rig.server.believed = False
    await rig.uplink.explain("a", "b", "icmp", None)
    assert (rig.server.clients, rig.server.closed) == (2, 1)
    await rig.uplink.close()
    await rig.uplink.close()
    assert rig.server.closed == 2


async def test_the_certificate_is_renewed_when_due(rig, monkeypatch, enrollment):
    asked, answers = [], [Unreachable("x", "no"), Refused("host.revoked", "no"), enrollment]
    done = asyncio.Event()

    async def renew(old, underlay, ciphers, *, bundle):
        asked.append((tuple(underlay), tuple(ciphers)))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        done.set()
        monkeypatch.setattr(uplink_module, "renew_at", lambda *_: time.time() + 1000)
        return answer

    monkeypatch.setattr(uplink_module, "renew", renew)
    monkeypatch.setattr(uplink_module, "renew_at", lambda *_: time.time() - 1)
    async with rig.running():
        await done.wait()
        await asyncio.sleep(0)
    assert asked == [(tuple(enrollment.record.underlay), tuple(enrollment.record.ciphers))] * 3
    assert "svid.refused" not in rig.health


async def test_a_promise_the_device_cannot_keep_is_taken_back_at_once(rig, monkeypatch, enrollment):
    asked, twice = [], asyncio.Event()

    async def renew(old, underlay, ciphers, *, bundle):
        asked.append(list(ciphers))
        if len(asked) == 2:
            twice.set()
        return old  # as a CA that does not take it back

    monkeypatch.setattr(uplink_module, "renew", renew)
    monkeypatch.setattr(uplink_module, "backoff", lambda *_, **__: 0.0)
    rig.uplink._instead = lambda promised: ["chacha20poly1305"]
    async with rig.running():
        await twice.wait()
    assert asked[:2] == [["chacha20poly1305"]] * 2


async def test_a_certificate_that_is_not_renewed_is_said(rig, monkeypatch, enrollment):
    tried = asyncio.Event()

    async def renew(*_, **__):
        tried.set()
        raise Refused("host.revoked", "this host is revoked")

    end = enrollment.svid.not_after
    monkeypatch.setattr(uplink_module, "renew", renew)
    monkeypatch.setattr(uplink_module.time, "time", lambda: end - 60.0)
    async with rig.running():
        await tried.wait()
        await asyncio.sleep(0.01)
        assert {"svid.expiring", "svid.refused"} <= {c.code for c in rig.health.conditions()}
