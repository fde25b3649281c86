"""Probe streams of their own processes: a sender and a receiver for many flows, with one log per flow in shared memory.

    python -m tests.chaos.traffic send SPEC...     python -m tests.chaos.traffic receive CONTROL SPEC...

A flow's log is a file of doubles that both sides and the reader map: slot n holds when message n was sent, and when it
arrived (CLOCK_REALTIME seconds; arrivals are the kernel's time stamp, so a busy receiver adds no delay). Nothing is
asked over the network that is being broken. A TCP receiver can hand its open connections over to a receiver in another
namespace (TCP_REPAIR, tcp(7)): what a live migration does with the sockets of a workload.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mesh.sd_notify import notify

SLOTS: Final = 1 << 20  # messages of one flow: 87 min at 200/s
HEAD: Final = 8  # doubles before the slots: counters of the sender and the receiver
CONNECTS, ERRORS, DUPLICATES, STRANGE, BROKEN = range(5)
MESSAGE: Final = struct.Struct("<16sQ")  # tag, number
PAUSE: Final = 0.005

SO_TIMESTAMPNS: Final = 35  # asm-generic/socket.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 19, 20, 21, 22, 24, 29
RECV_QUEUE, SEND_QUEUE = 1, 2
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
TCPOPT_MSS, TCPOPT_WINDOW, TCPOPT_SACK, TCPOPT_TIMESTAMP = 2, 3, 4, 8


@dataclass(frozen=True, slots=True)
class Spec:
    """One flow. `bind` is the sender's source address; a receiver listens on all of the family unless `address`."""

    tag: str
    transport: str
    to: str
    port: int
    log: str
    rate: float = 200.0
    bind: str | None = None

    @property
    def family(self) -> int:
        return socket.AF_INET6 if ":" in self.to else socket.AF_INET

    @property
    def stream(self) -> bool:
        return self.transport == "tcp"

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Spec:
        return cls(**json.loads(text))


class Log:
    """The shared doubles of one flow."""

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        if create:
            with open(path, "wb") as f:
                f.truncate(8 * (HEAD + 2 * SLOTS))
        with open(path, "r+b") as f:
            self._map = mmap.mmap(f.fileno(), 0)
        self.cells = memoryview(self._map).cast("d")

    def close(self) -> None:
        self.cells.release()
        self._map.close()

    def count(self, what: int) -> int:
        return int(self.cells[what])

    def add(self, what: int, many: int = 1) -> None:
        self.cells[what] += many

    @property
    def upcoming(self) -> int:
        """Number of the next message to be sent."""
        return int(self.cells[7])

    @upcoming.setter
    def upcoming(self, number: int) -> None:
        self.cells[7] = number

    def sent(self, n: int) -> float:
        return self.cells[HEAD + n]

    def arrived(self, n: int) -> float:
        return self.cells[HEAD + SLOTS + n]

    def note_sent(self, n: int, when: float) -> None:
        self.cells[HEAD + n] = when

    def note_arrived(self, n: int, when: float) -> None:
        at = HEAD + SLOTS + n
        if self.cells[at]:
            self.cells[DUPLICATES] += 1
        else:
            self.cells[at] = when


# ---- sending


class _Flow:
    def __init__(self, spec: Spec) -> None:
        self.spec, self.log = spec, Log(spec.log)
        self.tag = spec.tag.encode().ljust(16)[:16]
        self.sock: socket.socket | None = None
        self.connected = False
        self.backlog = b""
        self.due = 0.0

    def tick(self) -> None:
        n = self.log.upcoming
        message = MESSAGE.pack(self.tag, n)
        now = time.time()
        if self.spec.stream:
            if not self._ready():
                return  # a message that cannot be written yet is not numbered: TCP loses connections, not messages
            self.backlog += message
        else:
            sock = self.sock or self._open()
            try:
                sock.sendto(message, (self.spec.to, self.spec.port))
            except OSError:
                self.log.add(ERRORS)  # it counts as sent: the workload tried
        self.log.note_sent(n, now)
        self.log.upcoming = n + 1
        if self.spec.stream:
            self._flush()

    def _open(self) -> socket.socket:
        kind = socket.SOCK_STREAM if self.spec.stream else socket.SOCK_DGRAM
        sock = socket.socket(self.spec.family, kind)
        sock.setblocking(False)
        if self.spec.stream:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.spec.bind is not None:
            with contextlib.suppress(OSError):
                sock.bind((self.spec.bind, 0))
        self.sock = sock
        return sock

    def _ready(self) -> bool:
        if self.sock is None:
            sock = self._open()
            self.connected, self.backlog = False, b""
            with contextlib.suppress(OSError):
                sock.connect((self.spec.to, self.spec.port))
            self.began = time.monotonic()
        if not self.connected:
            assert self.sock is not None
            if select.select([], [self.sock], [], 0)[1]:
                if (code := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) != 0:
                    self._broken(code)
                    return False
                self.connected = True
                self.log.add(CONNECTS)
            elif time.monotonic() - self.began > 3:
                self._broken(errno.ETIMEDOUT)
        return self.connected

    def _flush(self) -> None:
        assert self.sock is not None
        try:
            if self.backlog:
                self.backlog = self.backlog[self.sock.send(self.backlog) :]
            with contextlib.suppress(BlockingIOError):
                if self.sock.recv(1 << 16) == b"":
                    self._broken(0)
        except BlockingIOError:
            pass
        except OSError as e:
            self._broken(e.errno or 0)

    def _broken(self, code: int) -> None:
        self.log.add(BROKEN if self.connected else ERRORS)
        if self.sock is not None:
            self.sock.close()
        self.sock, self.connected = None, False


def send(specs: list[Spec]) -> None:
    """Until SIGTERM: every flow at its rate on an absolute schedule; ticks that were missed are sent late, not skipped."""
    flows = [_Flow(s) for s in specs]
    begin = time.monotonic()
    for k, flow in enumerate(flows):
        flow.due = begin + k * PAUSE / max(1, len(flows))
    while True:
        flow = min(flows, key=lambda f: f.due)
        if (wait := flow.due - time.monotonic()) > 0:
            time.sleep(wait)
        flow.tick()
        flow.due += 1 / flow.spec.rate


# ---- receiving


class Receiver:
    """All flows of one namespace. The datagrams ``freeze FILE`` and ``thaw FILE`` at `control` are commands (see the module)."""

    def __init__(self, control: str, specs: list[Spec]) -> None:
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.control.bind(control)
        self.logs = {s.tag.encode().ljust(16)[:16]: Log(s.log) for s in specs}
        self.poll = select.epoll()
        self.listeners: dict[int, socket.socket] = {}
        self.boxes: dict[int, socket.socket] = {}
        self.streams: dict[int, tuple[socket.socket, bytearray]] = {}
        for family, stream, port in sorted({(s.family, s.stream, s.port) for s in specs}):
            sock = socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if not stream:
                sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
            if stream:
                sock.listen(256)
            (self.listeners if stream else self.boxes)[sock.fileno()] = sock
            self.poll.register(sock, select.EPOLLIN)

    def run(self) -> None:
        self.poll.register(self.control, select.EPOLLIN)
        while True:
            for fd, _ in self.poll.poll():
                if fd == self.control.fileno():
                    line, asker = self.control.recvfrom(4096)
                    self.control.sendto(self._command(line.decode()).encode(), asker)
                elif fd in self.boxes:
                    self._datagrams(self.boxes[fd])
                elif fd in self.listeners:
                    self._accept(self.listeners[fd])
                elif fd in self.streams:
                    self._read(fd)

    def _note(self, message: bytes, when: float) -> None:
        tag, n = MESSAGE.unpack(message)
        log = self.logs.get(tag)
        if log is not None and n < SLOTS:
            log.note_arrived(n, when)

    def _datagrams(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                data, extra, _, _ = sock.recvmsg(2048, 64)
                when = time.time()
                for level, kind, value in extra:
                    if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                        seconds, nanos = struct.unpack("qq", value)
                        when = seconds + nanos / 1e9
                if len(data) == MESSAGE.size:
                    self._note(data, when)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            self._adopt(sock)

    def _adopt(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.streams[sock.fileno()] = (sock, bytearray())
        self.poll.register(sock, select.EPOLLIN)

    def _read(self, fd: int) -> None:
        sock, rest = self.streams[fd]
        try:
            data = sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            del self.streams[fd]
            sock.close()
            return
        now = time.time()
        rest += data
        while len(rest) >= MESSAGE.size:
            self._note(bytes(rest[: MESSAGE.size]), now)
            del rest[: MESSAGE.size]

    # ---- handing connections over

    def _command(self, line: str) -> str:
        verb, _, path = line.partition(" ")
        try:
            if verb == "freeze":
                Path(path).write_text(json.dumps([frozen for fd in list(self.streams) for frozen in self._freeze(fd)]))
                return "frozen"
            if verb == "thaw":
                states = json.loads(Path(path).read_text())
                for state in states:
                    self._thaw(state)
                return f"thawed {len(states)}"
        except OSError as e:
            return f"failed: {e!r}"
        return "failed: unknown"

    def _freeze(self, fd: int) -> Iterator[dict[str, Any]]:
        """Take a connection's state out of the kernel; the socket goes without a word on the wire."""
        sock, rest = self.streams.pop(fd)
        self.poll.unregister(fd)
        with sock:
            _silence(sock)
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            state, options = info[0], info[5]
            if state != 1:  # ESTABLISHED
                return
            sequence = {}
            for queue in (RECV_QUEUE, SEND_QUEUE):
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
                sequence[queue] = sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFF_FFFF
                if queue == RECV_QUEUE:
                    try:
                        unread = sock.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        unread = b""
            yield {
                "family": sock.family, "local": sock.getsockname()[:2], "peer": sock.getpeername()[:2], "seq": list(sequence.values()),
                "options": options, "scale": [info[6] & 15, info[6] >> 4], "mss": struct.unpack_from("I", info, 16)[0],
                "window": sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, 20).hex(),
                "stamp": sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFF_FFFF,
                "unread": unread.hex(), "rest": bytes(rest).hex(),
            }  # fmt: skip

    def _thaw(self, state: dict[str, Any]) -> None:
        """The same connection in this namespace."""
        sock = socket.socket(state["family"], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _silence(sock)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        for queue, number, back in ((RECV_QUEUE, state["seq"][0], len(state["unread"]) // 2), (SEND_QUEUE, state["seq"][1], 0)):
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
            value = (number - back) & 0xFFFF_FFFF
            sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("I", value))
        sock.bind(tuple(state["local"]))
        sock.connect(tuple(state["peer"]))
        options = [(TCPOPT_MSS, state["mss"])]
        if state["options"] & 4:
            options.append((TCPOPT_WINDOW, state["scale"][0] | state["scale"][1] << 16))
        if state["options"] & 2:
            options.append((TCPOPT_SACK, 0))
        if state["options"] & 1:
            options.append((TCPOPT_TIMESTAMP, 0))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, b"".join(struct.pack("II", *o) for o in options))
        if state["options"] & 1:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, struct.pack("I", state["stamp"]))
        if state["unread"]:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, RECV_QUEUE)
            sock.send(bytes.fromhex(state["unread"]))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, bytes.fromhex(state["window"]))
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        self._adopt(sock)
        self.streams[sock.fileno()][1].extend(bytes.fromhex(state["rest"]))


def _silence(sock: socket.socket) -> None:
    """It hears nothing from now on: what arrives while its state is copied would be acknowledged and lost (BPF: ret 0)."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(code)))


def main(argv: list[str]) -> int:
    """See the module."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    specs = [Spec.load(text) for text in argv[1:] if text.startswith("{")]
    # A probe that waits for its turn would report the machine's load as an outage of what is measured.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    if argv[0] == "send":
        send(specs)
    else:
        receiver = Receiver(argv[1], specs)
        notify("READY=1")
        receiver.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
