"""Alerts: sinks from configuration alone, one message an incident, a spool that survives, sinks that hang or answer garbage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from identity.errors import BadInput
from mesh import alerts
from mesh.alerts import AlertDesk, Sink, Spool
from policy.flows import FlowRecord, ProcessInfo
from policy.program import Alert, Everything

ALERT = Alert("shop", Everything(), "page", 30)


def record(port: int = 80, *, src: str = "web", dst: str = "api", by: str = "default", time: int = 100) -> FlowRecord:
    return FlowRecord(time, src, dst, 6, port, verdict="deny", by=by, src_process=ProcessInfo(), src_instance=0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(tmp_path: Path, clock: Clock) -> AlertDesk:
    return AlertDesk("h1", [Sink.parse("page=unix:/nowhere")], tmp_path, mono=clock)


def ready(desk: AlertDesk) -> list[dict[str, Any]]:
    spool = desk.spools["page"]
    return [m for key in spool.waiting() if key not in desk._held and (m := spool.get(key))]


@pytest.mark.parametrize(
    "text",
    ["page", "page=", "nobody=https://x/", "page=ftp://x/", "page=https://", "page=https://u:p@x/", "page=https://x:0/", "page=http://x:y/",
     "page=unix:relative", "page=unix:/" + "x" * 120, "page=syslog:relative", "page=syslog://host", "page=syslog://host:0",
     "page=https://x/ y", "page=https://x/\ny", "page=syslog://:514", "=https://x/"],
)  # fmt: skip
def test_what_is_no_sink_is_refused(text: str) -> None:
    with pytest.raises(BadInput) as error:
        Sink.parse(text)
    assert error.value.code == "alert.sink"


def test_sinks_are_read() -> None:
    for text in ("page=https://h:8443/p?q=1", "page=http://[::1]:1/", "log=syslog:/dev/log", "log=syslog://h:514", "webhook=unix:/run/x"):
        sink = Sink.parse(text)
        assert text == f"{sink.name}={sink.target if '://' in sink.target else sink.scheme + ':' + sink.target}"


def test_one_attempt_is_one_message_and_nothing_is_told_before_it_settles(desk: AlertDesk, clock: Clock) -> None:
    desk.attempt(ALERT, record(), 1)
    assert len(desk.spools["page"].waiting()) == 1  # on disk at once
    assert ready(desk) == []
    clock.now = 2
    desk.tick()
    (message,) = ready(desk)
    assert (message["src"], message["dst"], message["proto"], message["port"], message["by"], message["count"]) == ("web", "api", "tcp", 80, "default", 1)
    assert (message["update"], message["host"], message["src_process"]["executable"]) == (False, "h1", "unknown")
    clock.now = 40
    desk.tick()
    desk.tick()
    assert ready(desk) == [message]  # nothing more happened, so nothing more is told


def test_a_scan_is_one_incident_and_its_end_is_told_once(desk: AlertDesk, clock: Clock) -> None:
    for port in range(1, 1001):
        clock.now += 0.001
        desk.attempt(ALERT, record(port), 1)
    clock.now += 2
    desk.tick()
    (message,) = ready(desk)
    assert (message["count"], len(message["flows"]), message["more_flows"]) == (1000, alerts.LISTED, 1000 - alerts.LISTED)
    desk.attempt(ALERT, record(7), 5)
    clock.now += 40
    desk.tick()
    first, last = ready(desk)
    assert (last["id"], last["update"], last["count"]) == (first["id"], True, 1005)


def test_a_slow_scan_is_told_while_it_goes_on(desk: AlertDesk, clock: Clock) -> None:
    for _ in range(20):
        clock.now += 0.5
        desk.attempt(ALERT, record(), 1)
        desk.tick()
    assert len(ready(desk)) == 1


def test_a_sweep_over_many_is_bounded(desk: AlertDesk, clock: Clock) -> None:
    for n in range(500):
        desk.attempt(ALERT, record(dst=f"w{n}"), 1)
    clock.now = 2
    desk.tick()
    found = ready(desk)
    assert len(found) == alerts.SWEEP + 1
    assert found[-1]["dst"] == "*"
    assert sum(m["count"] for m in found) == 500


def test_many_sources_are_bounded(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "OPEN", 10)
    monkeypatch.setattr(alerts, "SPOOL", 15)
    desk = AlertDesk("h", [Sink.parse("page=unix:/nowhere")], tmp_path, mono=clock)
    desk.spools["page"].size = 15
    for n in range(100):
        desk.attempt(ALERT, record(src=f"s{n}"), 1)
    assert len(desk._incidents) == 10
    assert len(desk.spools["page"].waiting()) == 15
    assert desk.spools["page"].dropped == 85


def test_a_policy_cannot_name_a_destination(tmp_path: Path) -> None:
    said: list[tuple[str, str | None]] = []
    desk = AlertDesk("h", [], tmp_path, tell=lambda code, text: said.append((code, text)))
    desk.attempt(Alert("s", Everything(), "http://169.254.169.254/", 60), record(), 3)
    assert said[0][0] == "alert.no_sink"
    assert not (tmp_path / "alerts").exists()


def test_control_characters_stay_inside_the_message(desk: AlertDesk, clock: Clock) -> None:
    desk.attempt(ALERT, record(by="a\nb\x1b[31m", src="x\ny"), 1)
    clock.now = 2
    desk.tick()
    text = next((desk.spools["page"].path).glob("*.json")).read_text()
    assert text.isprintable()
    assert json.loads(text)["by"] == "a\nb\x1b[31m"


def test_a_damaged_spool_loses_only_the_damage(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.put("2", {"last": 5})
    for name, text in (("1", "{"), ("3", "[1]"), ("4", '{"last": "x"}'), ("5", "[" * 100_000)):
        (tmp_path / "s" / f"{name}.json").write_text(text)
    assert [spool.get(key) for key in spool.waiting()] == [None, {"last": 5}, None, None, None]
    assert spool.waiting() == ["2"]


def test_a_disk_that_takes_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file in the way")
    spool = Spool(tmp_path / "s")
    spool.put("1", {"last": 5})
    assert spool.dropped == 1
    assert spool.waiting() == []


# ---- real sinks


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def delivered(desk: AlertDesk, until: asyncio.Event, patience: float = 15) -> None:
    task = asyncio.create_task(desk.run())
    try:
        async with asyncio.timeout(patience):
            await until.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "RETRY", (0.02, 0.05))
    monkeypatch.setattr(alerts, "TIMEOUT", 0.3)


@pytest.mark.parametrize("trouble", ["none", "garbage", "hangs", "500", "redirect"])
async def test_a_webhook_that_gives_trouble_gets_it_again(tmp_path: Path, quick: None, trouble: str) -> None:
    got: list[Any] = []
    done, visits = asyncio.Event(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        body = await reader.readexactly(length)
        if visits == 1 and trouble != "none":
            if trouble == "hangs":
                await done.wait()
            answer = {"garbage": b"\x00\xffnonsense\r\n\r\n", "500": b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
                      "redirect": b"HTTP/1.1 302 Go\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"}.get(trouble, b"")  # fmt: skip
            writer.write(answer)
        else:
            got.append(json.loads(body))
            writer.write(b"HTTP/1.1 204 OK\r\nContent-Length: 0\r\n\r\n")
            done.set()
        await closed(writer)

    tasks: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(lambda r, w: tasks.append(asyncio.ensure_future(serve(r, w))), "127.0.0.1", 0)
    said: list[str] = []
    port = server.sockets[0].getsockname()[1]
    desk = AlertDesk("h", [Sink.parse(f"page=http://127.0.0.1:{port}/x")], tmp_path, settle=0.05,
                     tell=lambda code, text: said.append(text or "well"))  # fmt: skip
    desk.attempt(ALERT, record(), 1)
    try:
        await delivered(desk, done)
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.gather(*tasks)
    assert [m["port"] for m in got] == [80]
    assert any("wait for the sink page" in text for text in said) == (trouble != "none")


async def test_one_hanging_sink_does_not_hold_up_another(tmp_path: Path, quick: None) -> None:
    done, release = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def hang(writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await closed(writer)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        done.set()
        await closed(writer)

    bad = await asyncio.start_server(lambda r, w: tasks.append(asyncio.ensure_future(hang(w))), "127.0.0.1", 0)
    good = await asyncio.start_unix_server(lambda r, w: tasks.append(asyncio.ensure_future(take(r, w))), tmp_path / "good")
    sinks = [Sink.parse(f"page=http://127.0.0.1:{bad.sockets[0].getsockname()[1]}/"), Sink.parse(f"log=unix:{tmp_path}/good")]
    desk = AlertDesk("h", sinks, tmp_path, settle=0.05)
    desk.attempt(ALERT, record(), 1)
    desk.attempt(Alert("s", Everything(), "log", 30), record(), 1)
    try:
        await delivered(desk, done)
        assert desk.spools["log"].waiting() == [] or done.is_set()
        assert len(desk.spools["page"].waiting()) == 1  # it stays on disk
    finally:
        release.set()
        bad.close()
        good.close()
        await asyncio.gather(*tasks)


async def test_syslog_gets_one_datagram(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        sock.bind(str(tmp_path / "log"))
        udp.bind(("127.0.0.1", 0))
        message = {"last": 1_900_000_000, "host": "h1", "kind": "denied"}
        await Sink.parse(f"log=syslog:{tmp_path}/log").send(message)
        await Sink.parse(f"log=syslog://127.0.0.1:{udp.getsockname()[1]}").send(message)
        for one in (sock, udp):
            one.settimeout(5)
            assert one.recv(4096) == b'<36>1 2030-03-17T17:46:40Z h1 retinue - denied - ' + json.dumps(message).encode()
    with pytest.raises(OSError):
        await Sink.parse(f"log=syslog:{tmp_path}/nobody").send({"last": 1, "host": ""})


async def test_what_was_open_at_the_end_is_told_by_the_next_life(tmp_path: Path, quick: None) -> None:
    got: list[Any] = []
    done = asyncio.Event()

    async def take(request: web.Request) -> web.Response:
        got.append(await request.json())
        done.set()
        return web.Response()

    first = AlertDesk("h", [Sink.parse("page=unix:/nowhere")], tmp_path)
    first.attempt(ALERT, record(), 1)
    first.attempt(ALERT, record(81), 2)
    first.flush()
    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        await delivered(AlertDesk("h", [Sink.parse(f"page=http://127.0.0.1:{port}/")], tmp_path, settle=0.05), done)
    finally:
        await runner.cleanup()
    assert [(m["count"], [f["on"] for f in m["flows"]]) for m in got] == [(3, ["tcp/80", "tcp/81"])]
