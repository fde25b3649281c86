"""Thousands of endpoints in one process: ``python -m tests.ha.simulated DIRECTORY HOST PORT [--count N] [--from ADDRESS]``.

Each has a certificate and TLS 1.3 connections of its own, follows its feed, and takes nothing unverified: the heartbeat and
every record by its signature, the position, and the state hash over all it holds. No asyncio: one epoll loop, so that the
figures are the server's. Every endpoint has a source address of its own (ADDRESS is the first's). With --reports each says what it
has applied over a second connection, as an agent does. Equal envelopes are verified once for all who get them, since on machines of their own they would
not wait for one another.

DIRECTORY (made by `enrol`) holds root.pem, bundle.txt, key.pem and chain-N.pem. Commands are JSON lines on standard input, one
answer each: connect, mark, wait (a key of the feed, how many endpoints), back, stats.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import os
import random
import resource
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ca.plane import Plane
from ca.registry import Applicant
from identity import certs
from identity.bundle import TrustBundle, open_bundle
from identity.enrollment import JoinToken
from identity.entries import EntriesRecord
from identity.errors import NotVerified
from identity.keys import b64, ed25519_public, private_pem, x25519_public
from identity.names import SpiffeId, TrustDomain
from identity.records import EndpointRecord, Heartbeat, Payload, PlacementRecord, PolicyRecord, envelope_hash
from identity.wire import LEVEL_HEADER, WIRE_LEVEL
from identity.wire.admin import TokenCreate, WorkloadAdd
from mesh.control import CONNECT_TIMEOUT, FEED_IDLE, backoff
from mesh.uplink import FEED_CAP

READ: Final = 1 << 16
BIND_NO_PORT: Final = 24  # IP_BIND_ADDRESS_NO_PORT, linux/in.h
AT_ONCE: Final = 48  # handshakes under way while the crowd is first built; a herd knows no such manners
KINDS: Final[dict[str, type[Payload]]] = {
    "placement": PlacementRecord, "prepare": PlacementRecord, "endpoint": EndpointRecord, "policy": PolicyRecord, "entries": EntriesRecord,
}  # fmt: skip


def enrol(plane: Plane, count: int, directory: Path, labels: Callable[[int], dict[str, str]]) -> None:
    """`count` hosts sim-N with a workload crowd/sim-N each, by the registry itself, and their certificates."""
    directory.mkdir(mode=0o700)
    trust = plane.authority.trust_bundle(0, plane.clock())
    (directory / "root.pem").write_text(trust.roots_pem())
    (directory / "bundle.txt").write_text(f"{trust.trust_domain.name}\n{plane.bundle}")
    key = ec.generate_private_key(ec.SECP256R1())
    csr = certs.make_csr(key)
    (directory / "key.pem").write_bytes(private_pem(key))
    for n in range(count):
        name = f"sim-{n}"
        token = JoinToken.parse(plane.token(TokenCreate(host=name), "crowd").token)
        applicant = Applicant(
            b64(x25519_public(X25519PrivateKey.generate())), b64(ed25519_public(Ed25519PrivateKey.generate())), [], ["chacha20poly1305"]
        )
        row = plane.registry.claim(token.id, applicant, plane.now)
        with plane.issuing(name):  # as Plane.enroll does it, without the proofs
            chain = plane.authority.issue_endpoint(csr, SpiffeId.parse(row.spiffe_id), plane.clock())
        plane.registry.finish(name, certs.not_after(certs.parse_chain(chain)[0]), plane.now, name)
        plane.placements.add(WorkloadAdd(name=f"crowd/{name}", host=name, labels=labels(n)), plane.now, "crowd")
        (directory / f"chain-{n}.pem").write_text("".join(chain))
    plane.seal()


class Remote:
    """The process of them, from the other side. `inside` goes before its command: the namespace it is to be in."""

    def __init__(self, directory: Path, host: str, port: int, *args: str, inside: Sequence[str] = ()) -> None:
        command = [*inside, sys.executable, "-m", "tests.ha.simulated", str(directory), host, str(port), *args]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.count = int(self._answer()["agents"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulated endpoints ended with status {self._process.wait(10)}")
        found: dict[str, Any] = json.loads(line)
        return found

    def send(self, do: str, **more: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self._process.stdin.flush()

    def ask(self, do: str, **more: object) -> dict[str, Any]:
        self.send(do, **more)
        return self._answer()

    def during(self, key: str, act: Callable[[], object], seconds: float = 60.0, count: int | None = None) -> list[float]:
        """Milliseconds from the start of `act` until each endpoint (or `count` of them) had verified a change of this key."""
        self.ask("mark")
        with ThreadPoolExecutor(1) as pool:
            at = time.time()
            doing = pool.submit(act)
            times = self.ask("wait", key=key, count=self.count if count is None else count, seconds=seconds)["times"]
            doing.result()
        return sorted((t - at) * 1000 for t in times)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Link:
    """One TLS connection without blocking. `loop` calls `ready`; whoever has it gets `opened`, `took` and `lost`."""

    __slots__ = ("context", "fd", "lost", "opened", "out", "since", "sock", "took", "up")

    def __init__(
        self, loop: Loop, agent: Agent, opened: Callable[[], None], took: Callable[[bytes], None], lost: Callable[[], None]
    ) -> None:
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_IP, BIND_NO_PORT, 1)
        raw.bind((agent.source, 0))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.connect_ex(loop.address)
        self.sock: socket.socket | ssl.SSLSocket = raw
        self.context = agent.context
        self.opened, self.took, self.lost = opened, took, lost
        self.up, self.out, self.since, self.fd = False, b"", time.monotonic(), raw.fileno()
        loop.add(self)

    def ready(self, loop: Loop) -> None:
        try:
            if not isinstance(self.sock, ssl.SSLSocket):
                if (error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) != 0:
                    raise OSError(error, os.strerror(error))
                self.sock = self.context.wrap_socket(self.sock, do_handshake_on_connect=False)
            tls = self.sock
            if not self.up:
                tls.do_handshake()
                self.up = True
                self.opened()
            if self.out:
                self.out = self.out[tls.send(self.out) :]
            while data := tls.recv(READ):
                self.took(data)
                if not tls.pending():
                    break
            else:
                raise EOFError
        except (ssl.SSLWantReadError, BlockingIOError):
            loop.watch(self, select.EPOLLIN)
            return
        except ssl.SSLWantWriteError:
            loop.watch(self, select.EPOLLIN | select.EPOLLOUT)
            return
        except (OSError, EOFError, ValueError, NotVerified):
            loop.drop(self)
            self.lost()
            return
        loop.watch(self, select.EPOLLIN)


class Loop:
    """epoll, timers, and who is who."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.epoll = select.epoll()
        self.links: dict[int, Link] = {}
        self.masks: dict[int, int] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def add(self, link: Link) -> None:
        self.links[link.fd], self.masks[link.fd] = link, select.EPOLLOUT
        self.epoll.register(link.fd, select.EPOLLOUT)

    def watch(self, link: Link, mask: int) -> None:
        if self.masks.get(link.fd) not in {None, mask}:
            self.masks[link.fd] = mask
            self.epoll.modify(link.fd, mask)

    def drop(self, link: Link) -> None:
        if self.links.pop(link.fd, None) is link:
            self.masks.pop(link.fd)
            self.epoll.unregister(link.fd)
            link.sock.close()

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self.timers, (time.monotonic() + seconds, self._number, what))

    def turn(self, most: float) -> bool:
        """Events until `most` seconds are over. True when standard input has something to say."""
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()
        if self.timers:
            most = min(most, max(0.0, self.timers[0][0] - time.monotonic()))
        asked = False
        for fd, _ in self.epoll.poll(most, 512):
            if fd == 0:
                asked = True
            elif (link := self.links.get(fd)) is not None:
                link.ready(self)
        return asked


class Trust:
    """What all of them believe, and what was verified already."""

    def __init__(self, directory: Path) -> None:
        name, envelope = (directory / "bundle.txt").read_text().split("\n")
        domain = TrustDomain(name)
        roots = certs.parse_chain((directory / "root.pem").read_text())
        self.bundle: TrustBundle = open_bundle(envelope, roots, domain, time.time())
        self.record = functools.lru_cache(1 << 17)(self._record)
        self.line = functools.lru_cache(1 << 17)(self._line)

    def _record(self, kind: str, envelope: str) -> Payload | None:
        if kind == "bundle":
            self.bundle = self.bundle.accept_next(envelope, time.time())
            return None
        return self.bundle.verify(KINDS[kind], envelope)

    def heartbeat(self, envelope: str) -> Heartbeat:
        found = self.beat(envelope)
        assert isinstance(found, Heartbeat)
        return found

    @functools.cached_property
    def beat(self) -> Callable[[str], Payload]:
        return functools.lru_cache(64)(lambda envelope: self.bundle.verify(Heartbeat, envelope))

    @staticmethod
    def _line(key: str, envelope: str) -> bytes:
        return f"{key}\0{envelope_hash(envelope)}\n".encode()

    def hash(self, objects: dict[str, str]) -> str:
        """identity.records.state_hash, with each line made once."""
        import hashlib

        return hashlib.sha256(b"".join(self.line(key, objects[key]) for key in sorted(objects))).hexdigest()


class Agent:
    """One endpoint: its feed, its state, its reports."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self.crowd, self.source = crowd, str(crowd.sources + number)
        self.context = context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(crowd.directory / "root.pem")
        context.load_cert_chain(crowd.directory / f"chain-{number}.pem", crowd.directory / "key.pem")
        self.objects: dict[str, str] = {}
        self.timeline, self.revision = "", -1
        self.attempt, self.generation, self.tries = 0, 0, 0
        self.feed: Link | None = None
        self.talk: Link | None = None
        self.report: bytes = b""
        self.rest, self.head = b"", True
        self.line: list[bytes] = []
        self.heard = 0.0

    # ---- the feed

    def connect(self) -> None:
        crowd = self.crowd
        self.rest, self.head, self.line, self.heard = b"", True, [], time.monotonic()
        where = f"?timeline={self.timeline}&revision={self.revision}" if self.revision >= 0 else ""
        request = f"GET /v1/feed{where} HTTP/1.1\r\nHost: ca\r\n{LEVEL_HEADER}: {WIRE_LEVEL}\r\n\r\n".encode()
        crowd.connecting += 1

        def opened() -> None:
            crowd.connecting -= 1
            link.out = request

        def lost() -> None:
            if not link.up:
                crowd.connecting -= 1
            self._gone()

        self.feed = link = Link(crowd.loop, self, opened, self._took, lost)

    def _gone(self) -> None:
        if self.feed is not None and self.generation == self.crowd.generation:
            self.generation -= 1
        self.feed = None
        self.crowd.reconnects += 1
        self.crowd.loop.after(backoff(self.attempt, random.random(), cap=FEED_CAP), self.connect)
        self.attempt += 1

    def check(self, now: float) -> None:
        """What the agent's own timeouts would end."""
        link = self.feed
        if link is None:
            return
        if now - (self.heard if link.up else link.since) > (FEED_IDLE if link.up else CONNECT_TIMEOUT):
            self.crowd.loop.drop(link)
            link.lost()

    def _took(self, data: bytes) -> None:
        self.heard = time.monotonic()
        data = self.rest + data
        if self.head:
            status, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self.rest = status
                return
            if b" 200 " not in status[:20]:
                raise OSError("the feed was refused")
            self.head = False
        while True:
            size, found, after = data.partition(b"\r\n")
            if not found:
                break
            length = int(size, 16)
            if len(after) < length + 2:
                break
            *ended, rest = after[:length].split(b"\n")
            for piece in ended:
                self.line.append(piece)
                self._frame(b"".join(self.line))
                self.line = []
            if rest:
                self.line.append(rest)
            data = after[length + 2 :]
        self.rest = data

    def _frame(self, line: bytes) -> None:
        crowd = self.crowd
        frame = json.loads(line)
        if frame["kind"] == "beat":
            crowd.trust.heartbeat(frame["heartbeat"])
            return
        snapshot = frame["kind"] == "snapshot"
        put = frame["objects"] if snapshot else frame["upserts"]
        if "bundle" in put:
            crowd.trust.record("bundle", put["bundle"])
        beat = crowd.trust.heartbeat(frame["heartbeat"])
        if beat.timeline != frame["timeline"] or beat.revision < frame["revision"]:
            raise NotVerified("feed.position", "the heartbeat does not cover its frame")
        gone = [] if snapshot else frame["removes"]
        if not snapshot and frame["from_revision"] != self.revision:
            raise NotVerified("feed.gap", "a delta does not continue")
        objects = put if snapshot else self.objects | put
        for key in gone:
            objects.pop(key, None)
        for key, envelope in put.items():
            crowd.trust.record(key.partition("/")[0], envelope)
        if crowd.trust.hash(objects) != frame["hash"]:
            raise NotVerified("feed.hash", "the set has another hash")
        self.objects, self.timeline, self.revision = objects, frame["timeline"], frame["revision"]
        self.attempt = 0
        self.generation = crowd.generation
        crowd.frames += 1
        if not snapshot:
            at = time.time()
            for key in (*put, *gone):
                crowd.hits.setdefault(key, []).append(at)
        if crowd.reports:
            body = json.dumps({"timeline": self.timeline, "revision": self.revision, "hash": frame["hash"]}).encode()
            head = f"POST /v1/report HTTP/1.1\r\nHost: ca\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            self.report = head.encode() + body
            self._say()

    # ---- reports: on a connection of their own, which the server closes when it was idle

    def _say(self) -> None:
        if self.talk is None:
            self.talk = Link(self.crowd.loop, self, self._send, self._answered, self._hung_up)
        elif self.talk.up:
            self._send()

    def _send(self) -> None:
        assert self.talk is not None
        self.talk.out, self.report = self.report, b""
        self.crowd.loop.watch(self.talk, select.EPOLLIN | select.EPOLLOUT)

    def _answered(self, data: bytes) -> None:
        self.crowd.reported += data.count(b"HTTP/1.1 200")
        self.tries = 0

    def _hung_up(self) -> None:
        self.talk = None
        if self.report:
            self.tries += 1
            self.crowd.loop.after(backoff(self.tries, random.random(), cap=5.0), self._again)

    def _again(self) -> None:
        if self.report and self.talk is None:
            self._say()


class Crowd:
    """All of them, and what they are asked."""

    def __init__(self, directory: Path, host: str, port: int, count: int, sources: str, *, reports: bool) -> None:
        self.directory, self.reports, self.sources = directory, reports, IPv4Address(sources)
        self.loop, self.trust = Loop((host, port)), Trust(directory)
        self.hits: dict[str, list[float]] = {}
        self.connecting = self.frames = self.reconnects = self.reported = 0
        self.generation = 1
        self.agents = [Agent(self, n) for n in range(min(count, len(list(directory.glob("chain-*.pem")))))]

    @property
    def open(self) -> int:
        """Endpoints that have had a frame since the last mark of `back`, over a connection that is open."""
        return sum(a.generation == self.generation and a.feed is not None for a in self.agents)

    def until(self, done: Callable[[], bool], seconds: float, every: float = 0.05) -> float:
        """Seconds it took, also when it did not come about."""
        began = checked = time.monotonic()
        while not done() and time.monotonic() - began < seconds:
            self.loop.turn(every)
            if time.monotonic() - checked > 1:
                checked = time.monotonic()
                for agent in self.agents:
                    agent.check(checked)
        return time.monotonic() - began

    def connect(self) -> dict[str, Any]:
        waiting = iter(self.agents)
        left = len(self.agents)

        def fill() -> bool:
            nonlocal left
            while left and self.connecting < AT_ONCE:
                next(waiting).connect()
                left -= 1
            return not left and self.open == len(self.agents)

        return {"seconds": self.until(fill, 300.0, 0.01), "open": self.open}

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        match asked["do"]:
            case "connect":
                return self.connect()
            case "mark":
                self.hits.clear()
                return {}
            case "wait":
                key, count = asked["key"], asked["count"]
                self.until(lambda: len(self.hits.get(key, ())) >= count, asked["seconds"])
                return {"times": self.hits.get(key, [])}
            case "lose":  # from here on a connection counts only when it is a new one
                self.generation += 1
                return {}
            case "back":
                seconds = self.until(lambda: self.open >= len(self.agents), asked["seconds"])
                return {"seconds": seconds, "open": self.open}
            case "stats":
                return {"open": self.open, "frames": self.frames, "reconnects": self.reconnects, "reported": self.reported}
        raise ValueError(asked)

    def run(self) -> None:
        """Until standard input ends."""
        self.loop.epoll.register(0, select.EPOLLIN)
        checked = 0.0
        while True:
            if self.loop.turn(0.5):
                line = sys.stdin.readline()
                if not line:
                    return
                self.loop.epoll.unregister(0)
                print(json.dumps(self.answer(json.loads(line))), flush=True)
                self.loop.epoll.register(0, select.EPOLLIN)
            if (now := time.monotonic()) - checked > 1:
                checked = now
                for agent in self.agents:
                    agent.check(now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--count", type=int, default=1 << 20)
    parser.add_argument("--from", dest="sources", default="127.1.0.1")
    parser.add_argument("--reports", action="store_true")
    asked = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    crowd = Crowd(asked.directory, asked.host, asked.port, asked.count, asked.sources, reports=asked.reports)
    print(json.dumps({"agents": len(crowd.agents)}), flush=True)
    crowd.run()


if __name__ == "__main__":
    main()
