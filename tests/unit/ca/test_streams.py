"""A stream: frames go out in order, at once where the connection takes them, and through the queue where it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ca.streams import JOIN, Stream, _pieces

WAIT = 5.0


class Transport:
    """Takes everything while `full` is 0."""

    def __init__(self) -> None:
        self.full, self.closing, self.written = 0, False, b""

    def get_write_buffer_size(self) -> int:
        return self.full

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.written += data


class Response:
    """aiohttp's chunked response; `gate` holds a write back."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.gate = transport, asyncio.Event()
        self.gate.set()

    async def write(self, data: bytes) -> None:
        await self.gate.wait()
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class Rig:
    def __init__(self) -> None:
        self.stream, self.transport = Stream("a", expires=1 << 40), Transport()
        self.response: Any = Response(self.transport)
        to: Any = self.transport
        self.pumping = asyncio.create_task(self.stream.pump(self.response, to))

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def said(self) -> list[bytes]:
        """The chunks' data so far."""
        out, rest = [], self.transport.written
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            out.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        return out


@pytest.fixture
async def rig() -> Any:
    made = Rig()
    yield made
    made.stream.close("over")
    await asyncio.wait_for(made.pumping, WAIT)


async def test_the_first_frame_takes_the_headers_along_and_the_next_go_at_once(rig: Rig) -> None:
    rig.stream.put((b"first", b"\n"))
    assert rig.said() == []
    await rig.settle()
    assert rig.said() == [b"first\n"]
    rig.stream.put((b"sec", b"ond\n"))
    assert rig.said() == [b"first\n", b"second\n"]
    assert rig.stream.told == 2


async def test_what_the_connection_does_not_take_waits_and_nothing_overtakes_it(rig: Rig) -> None:
    rig.stream.put((b"0",))
    await rig.settle()
    rig.transport.full = 1
    rig.stream.put((b"1",))
    rig.transport.full = 0
    rig.stream.put((b"2",))  # the connection would take it, but 1 has not gone
    assert rig.said() == [b"0"]
    await rig.settle()
    assert rig.said() == [b"0", b"1", b"2"]


async def test_nothing_is_written_into_the_middle_of_a_large_frame(rig: Rig) -> None:
    rig.stream.put((b"0",))
    await rig.settle()
    rig.response.gate.clear()
    large = (b"a" * JOIN, b"b" * JOIN)
    rig.stream.put(large)
    await rig.settle()
    rig.stream.put((b"2",))
    assert rig.said() == [b"0"]
    rig.response.gate.set()
    await rig.settle()
    assert rig.said() == [b"0", *large, b"2"]


async def test_what_is_held_goes_out_in_order_on_release(rig: Rig) -> None:
    rig.stream.put((b"0",))
    await rig.settle()
    rig.stream.held = []
    rig.stream.put((b"1",))
    rig.stream.put((b"2",))
    assert rig.said() == [b"0"]
    rig.stream.release()
    assert rig.said() == [b"0", b"1", b"2"]


async def test_a_closed_stream_writes_no_more(rig: Rig) -> None:
    rig.stream.put((b"0",))
    await rig.settle()
    rig.stream.close("over")
    rig.stream.put((b"1",))
    await asyncio.wait_for(rig.pumping, WAIT)
    assert (rig.said(), rig.stream.why) == ([b"0"], "over")


async def test_a_connection_that_is_going_is_not_written_to(rig: Rig) -> None:
    rig.stream.put((b"0",))
    await rig.settle()
    rig.transport.closing = True
    rig.stream.put((b"1",))
    assert rig.said() == [b"0"]


async def test_a_connection_that_takes_nothing_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ca.streams.WRITE_S", 0.01)
    rig.response.gate.clear()
    rig.stream.put((b"0",))
    await asyncio.wait_for(rig.pumping, WAIT)
    assert rig.stream.why == "takes no frames"


async def test_a_queue_that_is_full_ends_the_stream() -> None:
    stream = Stream("a", expires=1 << 40)
    for _ in range(stream.queue.maxsize):
        stream.put((b"x",))
    assert not stream.closed.is_set()
    stream.put((b"x",))
    assert stream.why == "too slow"


def test_parts_of_a_large_frame_are_not_copied() -> None:
    part = b"x" * JOIN
    assert _pieces((part, b"", part))[0] is part
    assert _pieces((b"a", b"b")) == (b"ab",)
