"""One endpoint's open feed: frames in, in order, and out over its connection.

A frame that can go out at once is written by whoever has it: one loop over all streams, without a task's turn for each.
Only what a connection does not take yet waits in its queue, for the task that `pump` is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ca.feed import Frame

if TYPE_CHECKING:
    from aiohttp import web

MAX_QUEUE: Final = 512  # frames an endpoint may lag behind before its stream is closed
JOIN: Final = 64 * 1024
WRITE_S: Final = 30.0  # a stream that takes nothing for this long is closed


@dataclass(slots=True)
class Stream:
    """`closed` holds the reason once it is to end. `told` counts the frames put, heartbeats and held ones included."""

    endpoint: str
    expires: int  # of the certificate it was opened with
    queue: asyncio.Queue[Frame] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUE))
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""
    turn: int = 0
    serial: int | None = None  # of that certificate
    chain: tuple[bytes, ...] = ()  # it and its issuers, DER
    older: bool = False  # reads only what the first release did
    held: list[Frame] | None = None  # frames that wait for their turn in a handover, oldest first
    told: int = 0
    _idle: asyncio.Transport | None = None  # while everything before has been written

    def put(self, frame: Frame) -> None:
        self.told += 1
        if self.held is not None:
            self.held.append(frame)
        elif not self._written(frame):
            try:
                self.queue.put_nowait(frame)
            except asyncio.QueueFull:
                self.close("too slow")

    def release(self) -> None:
        """Let through what is held."""
        held, self.held = self.held, None
        for frame in held or ():
            self.put(frame)

    def close(self, why: str) -> None:
        if not self.closed.is_set():
            self.why = why
            self.closed.set()
            if self.queue.empty():
                self.queue.put_nowait(())  # wakes whoever waits for a frame

    def _written(self, frame: Frame) -> bool:
        """Write it now, as one chunk of the response (RFC 9112, 7.1). False when it has to wait or is too large for that."""
        to = self._idle
        if to is None or not self.queue.empty() or self.closed.is_set() or to.is_closing() or to.get_write_buffer_size():
            return False
        data = b"".join(frame)
        if len(data) > JOIN:
            return False
        to.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    async def pump(self, response: web.StreamResponse, transport: asyncio.Transport) -> None:
        """Write frames until the stream is closed. A client that takes nothing ends it."""
        while True:
            frame = await self.queue.get()
            self._idle = None
            if self.closed.is_set():
                return
            try:
                async with asyncio.timeout(WRITE_S):
                    for data in _pieces(frame):
                        await response.write(data)
            except TimeoutError:
                self.close("takes no frames")
                return
            self._idle = transport  # the headers are out, and this was the newest frame unless the queue says otherwise


def _pieces(frame: Frame) -> Frame:
    """A small frame is one write; the parts of a large one are shared with other streams and not copied."""
    return (b"".join(frame),) if sum(map(len, frame)) <= JOIN else tuple(part for part in frame if part)
