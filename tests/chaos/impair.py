"""A bad network made of a program: a bridge of two links that delays, loses, reorders, doubles and shortens, by seed.

netem is not in every kernel and cannot be repeated; this one is, frame for frame. `Impairment` decides (pure);
`python -m tests.chaos.impair LINK LINK SEED JSON` carries frames between two links of its namespace. The ends must send
real packets, not superpackets with unfinished checksums: `plain` switches those offloads off.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import random
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

ETH_P_ALL: Final = 3
SIOCETHTOOL: Final = 0x8946
# linux/ethtool.h: set rx/tx checksums, scatter-gather, TSO, GSO, GRO
OFFLOADS: Final = (0x17, 0x1F, 0x24, 0x2C)
SOL_PACKET, PACKET_IGNORE_OUTGOING, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC = 263, 23, 1, 1


@dataclass(frozen=True, slots=True)
class Profile:
    """Milliseconds and probabilities. A frame that is reordered comes `delay_ms` earlier than its turn (at least 1 ms).

    mtu: longer IP packets vanish without a word (a black hole); 0 for none. burst: mean length of a run of losses.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    burst: float = 1.0
    duplicate: float = 0.0
    reorder: float = 0.0
    mtu: int = 0

    def dump(self) -> str:
        return json.dumps(asdict(self))


class Impairment:
    """One direction. `decide` says when a frame leaves: nothing, once or twice, in seconds from its coming."""

    def __init__(self, profile: Profile, seed: int) -> None:
        self.profile, self._dice = profile, random.Random(seed)
        self._losing = False
        self.seen = self.lost = self.doubled = self.hurried = self.too_long = 0

    def decide(self, length: int) -> list[float]:
        """`length` in bytes, with the Ethernet header of 14."""
        p, dice = self.profile, self._dice
        self.seen += 1
        # The same numbers are drawn for every frame, so that one setting does not change what another does.
        draws = [dice.random() for _ in range(4)]
        if p.mtu and length - 14 > p.mtu:
            self.too_long += 1
            return []
        if self._lose(draws[0]):
            self.lost += 1
            return []
        delay = (p.delay_ms + (2 * draws[1] - 1) * p.jitter_ms) / 1000
        if draws[2] < p.reorder:
            self.hurried += 1
            delay = 0.0
        out = [max(0.0, delay)]
        if draws[3] < p.duplicate:
            self.doubled += 1
            out.append(out[0] + 0.0005)
        return out

    def _lose(self, draw: float) -> bool:
        """Two states (Gilbert): the long-run share is `loss`, a run has `burst` frames on average."""
        p = self.profile
        if p.loss <= 0:
            return False
        if p.burst <= 1:
            return draw < p.loss
        leave = 1 / p.burst
        enter = min(1.0, p.loss * leave / max(1e-9, 1 - p.loss))
        self._losing = draw >= leave if self._losing else draw < enter
        return self._losing


def plain(link: str) -> None:
    """Switch segmentation and checksum offloads of a link in this namespace off (ethtool ioctl). Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", link.encode(), ctypes.addressof(value))
            fcntl.ioctl(sock, SIOCETHTOOL, request)


class Bridge:
    """Carries frames between two links, impaired in both directions."""

    def __init__(self, links: tuple[str, str], seed: int, profile: Profile) -> None:
        self.sides = [self._open(link) for link in links]
        self.directions = [Impairment(profile, seed * 2), Impairment(profile, seed * 2 + 1)]
        self.queue: list[tuple[float, int, int, bytes]] = []
        self._number = 0
        self.carried = 0

    @staticmethod
    def _open(link: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sock.bind((link, ETH_P_ALL))
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        index = socket.if_nametoindex(link)
        sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, struct.pack("iHH8s", index, PACKET_MR_PROMISC, 0, b""))
        sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        sock.setblocking(False)
        return sock

    def run(self) -> None:
        """For ever."""
        poll = select.poll()
        for side in self.sides:
            poll.register(side, select.POLLIN)
        while True:
            wait = max(0.0, self.queue[0][0] - time.monotonic()) * 1000 if self.queue else 1000.0
            poll.poll(wait if wait < 1 else min(wait, 1000.0))
            for k, side in enumerate(self.sides):
                self._take(k, side)
            self._give()

    def _take(self, k: int, side: socket.socket) -> None:
        for _ in range(64):
            try:
                frame = side.recv(70_000)
            except BlockingIOError:
                return
            now = time.monotonic()
            for delay in self.directions[k].decide(len(frame)):
                self._number += 1
                heapq.heappush(self.queue, (now + delay, self._number, 1 - k, frame))

    def _give(self) -> None:
        now = time.monotonic()
        while self.queue and self.queue[0][0] <= now:
            _, _, k, frame = heapq.heappop(self.queue)
            try:
                self.sides[k].send(frame)
                self.carried += 1
            except OSError:
                pass  # the link is down or its queue full: a loss like any other

    def figures(self) -> dict[str, Any]:
        return {name: sum(getattr(d, name) for d in self.directions) for name in ("seen", "lost", "doubled", "hurried", "too_long")}


def main(argv: list[str]) -> int:
    """See the module; SIGUSR1 changes nothing but prints the figures so far."""
    from mesh.sd_notify import notify

    bridge = Bridge((argv[0], argv[1]), int(argv[2]), Profile(**json.loads(argv[3])))
    signal.signal(signal.SIGUSR1, lambda *_: print(json.dumps(bridge.figures()), flush=True))
    notify("READY=1")
    bridge.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
