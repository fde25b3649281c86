"""A packet reader for proofs: counts frames on a switch and searches them for byte strings. AF_PACKET, no tcpdump.

Every frame is seen once, as it enters the switch (packet(7): outgoing copies are skipped), whole, superpackets
included. What the kernel had to drop is counted too: with drops, absence proves nothing.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from identity.errors import TimedOut
from mesh.lab_process import in_netns

ETH_P_ALL: Final = 0x0003  # linux/if_ether.h
SOL_PACKET: Final = 263  # linux/socket.h
PACKET_STATISTICS: Final = 6  # linux/if_packet.h
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
BUFFER: Final = 32 * 1024 * 1024
MAX_FRAME: Final = 256 * 1024
BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class Seen:
    """What went by: frames and bytes, frames that are WireGuard-shaped UDP, how many frames held each needle, drops."""

    frames: int = 0
    bytes: int = 0
    tunnel_frames: int = 0
    tunnel_bytes: int = 0
    hits: Mapping[str, int] = field(default_factory=dict)
    dropped: int = 0


def udp_payload(frame: bytes) -> bytes | None:
    """Payload of an Ethernet frame that carries UDP over IPv4 or IPv6 without extension headers, else None."""
    if frame[12:14] == b"\x08\x00" and len(frame) >= 42 and frame[23] == socket.IPPROTO_UDP:
        return frame[14 + (frame[14] & 0x0F) * 4 + 8 :]
    if frame[12:14] == b"\x86\xdd" and len(frame) >= 62 and frame[20] == socket.IPPROTO_UDP:
        return frame[62:]
    return None


def is_tunnel(payload: bytes) -> bool:
    """Does a UDP payload have the shape of a WireGuard message: type 1-4, three zero bytes (whitepaper 5.4)?"""
    return len(payload) >= 32 and payload[0] in {1, 2, 3, 4} and payload[1:4] == b"\0\0\0"


class Capture:
    """Reads on a thread from `start` to `stop`. `needles` maps a name to the bytes that are looked for."""

    def __init__(self, netns: str, needles: Mapping[str, bytes]) -> None:
        if not all(needles.values()):
            raise ValueError("an empty needle is in every frame")
        self._netns, self._needles = netns, dict(needles)
        self._changed = threading.Condition()
        self._zero()
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._wake = -1

    def _zero(self) -> None:
        self._frames = self._bytes = self._tunnel_frames = self._tunnel_bytes = self._dropped = 0
        self._hits = dict.fromkeys(self._needles, 0)

    def start(self) -> Self:
        """Open the socket in the namespace (all its interfaces) and read. Raises OSError without the privilege."""

        def opened() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            sock.setblocking(False)
            return sock

        self._socket = in_netns(self._netns, opened)
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._read, name=f"capture-{self._netns}", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> Seen:
        """Stop reading; what was seen since the last `take`."""
        if self._thread is not None and self._socket is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._socket.close()
            os.close(self._wake)
            self._thread = self._socket = None
        with self._changed:
            return self._seen()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def take(self) -> Seen:
        """What was read since the start or the last `take`; counting begins anew."""
        with self._changed:
            seen = self._seen()
            self._zero()
        return seen

    def wait_hit(self, name: str, timeout: float = 5.0) -> None:
        """Block until a frame with this needle was read. Frames are read in order, so it is also a barrier for all
        traffic before it. Raises TimedOut.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._hits[name]:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TimedOut("capture.silent", f"no frame with {name} was seen within {timeout:g} s")

    def _seen(self) -> Seen:
        if self._socket is not None:
            packed = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)  # reading it resets it
            self._dropped += int(struct.unpack("II", packed)[1])
        return Seen(
            self._frames, self._bytes, self._tunnel_frames, self._tunnel_bytes, dict(self._hits), self._dropped
        )  # fmt: skip

    def _read(self) -> None:
        sock = self._socket
        assert sock is not None
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            batch: list[bytes] = []
            while len(batch) < BATCH:
                try:
                    frame, address = sock.recvfrom(MAX_FRAME)
                except BlockingIOError:
                    break
                if address[2] != socket.PACKET_OUTGOING and address[0] not in {"lo", "br0"}:
                    batch.append(frame)
            if batch:
                self._count(batch)
            elif self._wake in ready:
                return

    def _count(self, batch: list[bytes]) -> None:
        with self._changed:
            for frame in batch:
                self._frames += 1
                self._bytes += len(frame)
                payload = udp_payload(frame)
                if payload is not None and is_tunnel(payload):
                    self._tunnel_frames += 1
                    self._tunnel_bytes += len(payload)
                for name, needle in self._needles.items():
                    if needle in frame:
                        self._hits[name] += 1
            self._changed.notify_all()


def send_clear(netns: str, to: str, payload: bytes, *, count: int = 1, port: int = 9) -> None:
    """Send datagrams in clear between underlay addresses (discard port): the positive control of a capture."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET

    def send() -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            for _ in range(count):
                sock.sendto(payload, (to, port))

    in_netns(netns, send)
