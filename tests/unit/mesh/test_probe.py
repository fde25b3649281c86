"""mesh.probe and mesh.probe_pairs over loopback: what is counted is what happened."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.demo_service import Service
from mesh.probe import HttpProber, Sockets, Target, error_name, get, stream
from mesh.probe_pairs import Delivered, Receiver, Sender, parse_message


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
async def service() -> AsyncIterator[int]:
    made = Service("svc", greeting="hi")
    port = free_port()
    await made.start("127.0.0.1", port)
    yield port
    await made.close()
    current = asyncio.current_task()
    for task in asyncio.all_tasks() - {current}:
        task.cancel()


@pytest.mark.parametrize(
    ("url", "want"),
    [("http://1.2.3.4:80/a?b", ("1.2.3.4", 80, "/a?b")), ("http://[fd00::1]:9", ("fd00::1", 9, "/")), ("http://1.2.3.4", ("1.2.3.4", 80, "/"))],
)
def test_targets(url: str, want: tuple[str, int, str]) -> None:
    target = Target.parse(url)
    assert (target.address, target.port, target.path) == want
    assert b"X-Seq: 7\r\n" in target.request(7)


@pytest.mark.parametrize("url", ["https://1.2.3.4/", "1.2.3.4", "http://"])
def test_bad_targets(url: str) -> None:
    with pytest.raises(ValueError, match="not an http"):
        Target.parse(url)


def test_error_names() -> None:
    assert error_name(ConnectionRefusedError(111, "x")) == "ECONNREFUSED"
    assert error_name(TimeoutError()) == "timeout"
    assert error_name(EOFError()) == "cut"
    assert error_name(ValueError()) == "ValueError"


async def test_get(service: int) -> None:
    answer = await get(Target.parse(f"http://127.0.0.1:{service}/x?y"), Sockets(), seq=3)
    assert (answer.ok, answer.served_by, answer.error) == (True, "svc", None)
    assert json.loads(answer.body)["path"] == "/x?y"
    refused = await get(Target.parse(f"http://127.0.0.1:{free_port()}/"), Sockets())
    assert (refused.ok, refused.status, refused.error) == (False, None, "ECONNREFUSED")
    assert 0 <= refused.ms < 1000


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"HTTP/1.1 200 OK\r\nX-Seq: 8\r\n\r\n", b"?\r\n\r\n"]
)
async def test_half_and_foreign_answers_do_not_count(said: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    answer = await get(Target.parse(f"http://127.0.0.1:{port}/"), Sockets(), seq=3)
    assert not answer.ok
    assert answer.error is not None
    server.close()


async def test_prober_counts_retries_and_losses() -> None:
    port = free_port()
    prober = HttpProber([f"http://127.0.0.1:{port}/"], rate=200, window=0.2).start()
    while not prober.lost_so_far:
        await prober.progressed()
    late = Service("late")
    await late.start("127.0.0.1", port)
    await prober.answered(20)
    result = await prober.stop()
    await late.close()
    assert result.sent == result.answered + result.lost
    assert result.lost == len(result.lost_seqs) >= 1
    assert result.retried >= 1
    assert result.attempts == result.answered + sum(result.errors.values())
    assert {"ECONNREFUSED"} <= set(result.errors) <= {"ECONNREFUSED", "timeout"}
    assert result.served_by == {"late": result.answered}
    assert result.gap_ms >= 190, "the dead time at the start counts too"


async def test_prober_without_an_answer() -> None:
    prober = HttpProber([f"http://127.0.0.1:{free_port()}/"], rate=100, window=0.05).start()
    while prober.lost_so_far < 3:
        await prober.progressed()
    result = await prober.stop()
    assert (result.answered, result.p50_ms) == (0, 0.0)
    assert result.lost == result.sent >= 3


async def test_streams_end_for_a_reason(service: int) -> None:
    target, stop = Target.parse(f"http://127.0.0.1:{service}/stream"), asyncio.Event()
    opened = asyncio.Event()
    reading = asyncio.create_task(stream(target, Sockets(), silence=5, stop=stop, on_open=opened.set))
    await opened.wait()
    stop.set()
    result = await reading
    assert (result.opened, result.ended) == (True, "stopped")
    assert result.first <= result.last
    refused = await stream(Target.parse(f"http://127.0.0.1:{free_port()}/"), Sockets(), silence=1)
    assert (refused.opened, refused.ended) == (False, "ECONNREFUSED")
    cut = await stream(Target.parse(f"http://127.0.0.1:{service}/"), Sockets(), silence=1)
    assert (cut.opened, cut.ended) == (True, "cut")

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    silent = await stream(Target.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"), Sockets(), silence=0.05)
    assert (silent.opened, silent.ended) == (False, "silence")
    server.close()


async def test_the_command(service: int) -> None:
    url = f"http://127.0.0.1:{service}/"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mesh.probe", "get", url, f"http://127.0.0.1:{free_port()}/", "--count", "2", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    first, second = map(json.loads, out.splitlines())
    assert (first["ok"], first["status"], second["ok"], second["error"]) == (True, 200, False, "ECONNREFUSED")
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "mesh.probe", "http", url, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline()) == {"event": "first"}
    process.terminate()
    result = json.loads(await process.stdout.readline())
    assert result["event"] == "result"
    assert result["sent"] == result["answered"] > 0
    assert await process.wait() == 0


@given(st.binary(max_size=40))
def test_messages_parse_or_do_not(line: bytes) -> None:
    found = parse_message(line)
    assert found is None or found[1] >= 0


def test_messages() -> None:
    assert parse_message(b"host-b 12\n") == ("host-b", 12)
    assert parse_message(b"a b 3") == ("a b", 3)
    for bad in (b"", b"12", b"x -1", b"x 1a", b"x " + b"9" * 13):
        assert parse_message(bad) is None


def test_delivered() -> None:
    one = Delivered()
    for seq, now in ((0, 1.0), (2, 1.5), (2, 1.6)):
        one.add(seq, now)
    assert (one.seqs, one.duplicates, one.first, one.last) == ({0, 2}, 1, 1.0, 1.6)
    assert one.longest_gap_ms == 500


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_pairs(transport: str, address: str) -> None:
    port = free_port(socket.SOCK_DGRAM if transport == "udp" else socket.SOCK_STREAM)
    async with Receiver(transport, port, address=address) as receiver:  # type: ignore[arg-type]
        async with Sender(transport, address, port, tag="t", rate=500) as sender:  # type: ignore[arg-type]
            await receiver.wait("t", 20)
            await sender.attempted(5)
        assert sender.lost(receiver.of("t", address)) in ([], [sender.sent - 1])
        assert receiver.of("t", "192.0.2.1").seqs == receiver.of("other").seqs == set()
        with pytest.raises(TimeoutError):
            await receiver.wait("other", 1, timeout=0.01)
    async with Sender(transport, address, port, tag="t", rate=500) as lonely:  # type: ignore[arg-type]
        await lonely.attempted(5)
        await lonely.attempted(5)
    assert lonely.errors["ECONNREFUSED"] > 0
