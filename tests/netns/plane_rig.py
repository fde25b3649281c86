"""Two hosts on an underlay and three workloads (two of them on one host), each in its own namespace, with real data
planes and without a control plane: plans are compiled here and handed over.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from identity.keys import b64, x25519_public
from identity.names import TrustDomain
from identity.records import EndpointRecord, PlacementRecord
from mesh import netns
from mesh.compile import LocalAttachment, LocalFacts, compile_plan
from mesh.devices.userspace import start_time
from mesh.plan import Plan
from mesh.snapshot import InstanceKey, Snapshot
from policy.ports import PortMap, parse_ports, union
from policy.program import Action, Named, Program, Rule, Tier

T = TypeVar("T")
TD = TrustDomain("plane.test")
REPOSITORY = Path(__file__).resolve().parents[2]
_unique = itertools.count()


def engine() -> Path:
    """The engine under test: RETINUE_TEST_ENGINE, the installed one, or the crate's build, else wireguard-go."""
    wished = os.environ.get("RETINUE_TEST_ENGINE")
    installed = Path(sys.executable).with_name("retinue-engine")
    built = REPOSITORY / "mesh/engine/target/release/retinue-engine"
    native = list((REPOSITORY / "mesh").glob("_native*.so"))
    for path in (wished, str(installed) if native else None, str(built), shutil.which("wireguard-go")):
        if path and Path(path).exists():
            return Path(path)
    raise AssertionError("no tunnel engine: build the crate or install wireguard-go")


def ports(*words: str) -> PortMap:
    return union(parse_ports(word) for word in words)


def program(*allow: tuple[str, str, PortMap]) -> Program:
    """Allow rules between workloads by name; everything else is denied."""
    rules = tuple(
        Rule(f"r{n}", Action.ALLOW, Named(frozenset({src})), Named(frozenset({dst})), allowed)
        for n, (src, dst, allowed) in enumerate(allow)
    )
    return Program((Tier("test", rules),), digest="d")


def ip(*args: str, ns: str | None = None) -> None:
    subprocess.run(["ip", *(("-n", ns) if ns else ()), *args], check=True, capture_output=True, text=True)


def inside(ns: str, work: Callable[[], T]) -> T:
    return netns.inside(ns, work)


@dataclass
class Host:
    """An endpoint: its namespace, key and data plane process."""

    name: str
    ns: str
    interface: str
    underlay: tuple[str, str]
    dir: Path
    engine: Path
    key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    process: subprocess.Popen[str] | None = None
    attachments: dict[InstanceKey, LocalAttachment] = field(default_factory=dict)
    held: frozenset[InstanceKey] = frozenset()

    @property
    def tunnel_key(self) -> str:
        return b64(x25519_public(self.key))

    def record(self, family: int, offers: list[str]) -> EndpointRecord:
        address = self.underlay[0] if family == 4 else f"[{self.underlay[1]}]"
        return EndpointRecord(
            trust_domain=TD.name, endpoint=self.name, kind="host", tunnel_key=self.tunnel_key,
            underlay=[f"{address}:51820"], ciphers=offers, generation=1, issued=1, expires=1 << 40,
        )  # fmt: skip

    def launch(self, *extra: str) -> None:
        key_file = self.dir / "key"
        key_file.write_bytes(self.key.private_bytes_raw())
        self.process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.ns}", sys.executable, str(Path(__file__).with_name("plane_driver.py")),  # /sys stays, with the groups
             "--interface", self.interface, "--port", "51820", "--key", str(key_file), "--run-dir", str(self.dir / "run"),
             "--engine", str(self.engine), *extra],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip

    def ask(self, verb: str, argument: str = "") -> Any:
        assert self.process is not None
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{verb} {argument}".strip() + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "died", "message": "no answer"}')
        assert "error" not in answer, answer
        return answer["ok"]

    def apply(self, plan: Plan) -> Any:
        return self.ask("apply", base64.b64encode(pickle.dumps(plan)).decode())

    def kill(self) -> None:
        """SIGKILL the driver: what `kill -9` of the agent is."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        assert self.process is not None
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process = None

    def finish(self) -> None:
        if self.process is not None:
            with contextlib.suppress(Exception):
                self.ask("clean")
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait(10)
            self._close()
        for pid_file in (self.dir / "run").glob("engine-*.json"):  # the agent was killed; its engine lives on
            saved = json.loads(pid_file.read_text())
            if start_time(saved["pid"]) == saved["started"]:
                os.kill(saved["pid"], signal.SIGTERM)
                until(lambda pid=saved["pid"], at=saved["started"]: start_time(pid) != at)


class Rig:
    """Hosts a and b (and more, by letter) on one underlay switch; workloads web and batch on a, api on b."""

    def __init__(self, directory: Path, hosts: str = "ab") -> None:
        tag = f"{os.getpid() % 100000}x{next(_unique)}"
        self.tag = tag
        self.hosts = {
            name: Host(name, f"dp{tag}-{name}", f"dp{name}{os.getpid() % 10000}x0", (f"192.168.77.{n}", f"fd77::{n}"),
                       directory / name, engine())
            for n, name in enumerate(hosts, 1)
        }  # fmt: skip
        self.switch = f"dp{tag}-sw"
        self.workloads = {name: f"dp{tag}-{name}" for name in ("web", "batch", "api")}
        self.where = {"web": "a", "batch": "a", "api": "b"}
        self.epochs = dict.fromkeys(self.workloads, 1)
        self.prepares: dict[str, tuple[str, int]] = {}
        self.family = 4
        self.offers = ["chacha20poly1305"]
        self.closing = contextlib.ExitStack()
        self.program = program()
        self._made: list[str] = []

    def __enter__(self) -> Rig:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        for host in self.hosts.values():
            (host.dir / "run").mkdir(parents=True)
        self._made = [*(h.ns for h in self.hosts.values()), *self.workloads.values()]
        for ns in self._made:
            ip("netns", "add", ns)
            ip("link", "set", "lo", "up", ns=ns)
        ip("netns", "add", self.switch)
        ip("link", "add", "br0", "type", "bridge", ns=self.switch)
        ip("link", "set", "br0", "up", ns=self.switch)
        for host in self.hosts.values():
            ip("link", "add", "eth0", "netns", host.ns, "type", "veth", "peer", "name", f"p{host.name}", "netns", self.switch)
            ip("link", "set", f"p{host.name}", "master", "br0", "up", ns=self.switch)
            ip("addr", "add", f"{host.underlay[0]}/24", "dev", "eth0", ns=host.ns)
            ip("addr", "add", f"{host.underlay[1]}/64", "dev", "eth0", "nodad", ns=host.ns)
            ip("link", "set", "eth0", "up", ns=host.ns)
            host.launch()
        for host in self.hosts.values():  # they start side by side
            host.ask("start")
        for name in self.workloads:
            self.attach(name, self.where[name])

    def __exit__(self, *exc: object) -> None:
        self.closing.close()
        for host in self.hosts.values():
            host.finish()
        for ns in (*self._made, self.switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", ns)

    def namespace(self, suffix: str) -> str:
        """One more namespace for a workload."""
        ns = f"dp{self.tag}-{suffix}"
        ip("netns", "add", ns)
        self.closing.callback(ip, "netns", "del", ns)
        return ns

    def attach(self, name: str, host: str, ns: str | None = None) -> None:
        """A place for a workload on a host; `ns` the host itself when it is the empty string."""
        if ns == "":
            self.hosts[host].attachments[InstanceKey(f"{name}/0")] = LocalAttachment("host")
            return
        place = ns or self.workloads[name]
        self.hosts[host].attachments[InstanceKey(f"{name}/0")] = LocalAttachment("netns", place, netns.identify(place))

    def address(self, name: str, family: int = 4) -> str:
        v4, v6 = TD.overlay(1 + sorted(self.workloads).index(name))
        return str(v4 if family == 4 else v6)

    def placement(self, name: str, host: str, epoch: int, state: str = "active") -> PlacementRecord:
        return PlacementRecord(
            trust_domain=TD.name, spiffe_id=f"spiffe://{TD}/wl/{name}", name=name, instance=0, endpoint=host,
            tunnel_key=self.hosts[host].tunnel_key, epoch=epoch, state=state,
            addresses=[self.address(name, 4), self.address(name, 6)], labels={}, issued=1,
        )  # fmt: skip

    def plan(self, host: str) -> Plan:
        snapshot = Snapshot(
            trust_domain=TD.name, timeline="t", revision=1,
            placements={InstanceKey(f"{n}/0"): self.placement(n, h, self.epochs[n]) for n, h in self.where.items()},
            prepares={InstanceKey(f"{n}/0"): self.placement(n, h, e, "prepare") for n, (h, e) in self.prepares.items()},
            endpoints={h.name: h.record(self.family, self.offers) for h in self.hosts.values()},
        )  # fmt: skip
        one = self.hosts[host]
        facts = LocalFacts(one.name, one.tunnel_key, one.interface, attachments=dict(one.attachments), held=one.held)
        return compile_plan(snapshot, facts, program=self.program)

    def apply(self, *allow: tuple[str, str, PortMap]) -> Mapping[str, Any]:
        """Put a policy in force on both hosts; without rules the one before."""
        if allow:
            self.program = program(*allow)
        return {name: host.apply(self.plan(name)) for name, host in self.hosts.items()}

    # ---- traffic

    def server(self, name: str, port: int, family: int = 4, *, at: str | None = None) -> Server:
        return Server(at or self.workloads[name], self.address(name, family), port)

    def udp(self, name: str, port: int = 0, family: int = 4, *, at: str | None = None) -> socket.socket:
        def make() -> socket.socket:
            return socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)

        sock = self.closing.enter_context(inside(at or self.workloads[name], make))
        sock.bind((self.address(name, family), port))
        sock.settimeout(1)
        return sock

    def tap(self, name: str, *, at: str | None = None) -> Tap:
        """What reaches the device of a workload."""
        return self.closing.enter_context(contextlib.closing(Tap(at or self.workloads[name])))

    def connect(self, src: str, dst: str, port: int, family: int = 4, timeout: float = 3.0) -> socket.socket:
        """A TCP connection from one workload to another. Raises OSError."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
            sock.settimeout(timeout)
            return sock

        sock = self.closing.enter_context(inside(self.workloads[src], make))
        sock.connect((self.address(dst, family), port))
        return sock


class Server:
    """A TCP echo server inside a namespace; `received` counts bytes of all connections, `accepted` connections."""

    def __init__(self, ns: str, address: str, port: int) -> None:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(16)
            return sock

        self.accepted = self.received = 0
        self._sock = inside(ns, make)
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.append(connection)
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(65536):
                self.received += len(data)
                connection.sendall(data)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(2)  # first: it may have accepted one just now
        self._sock.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def echo(sock: socket.socket, data: bytes = b"ping") -> bytes:
    sock.sendall(data)
    return sock.recv(65536)


def until(check: Callable[[], bool], timeout: float = 5.0) -> bool:
    """Bounded wait for a condition."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.02)
    return check()


class Tap:
    """What reaches a namespace's own device, below any socket; without the multicast chatter of the host's kernel."""

    def __init__(self, ns: str, device: str = "rtn0") -> None:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
            sock.bind((device, 0x0003))
            sock.setblocking(False)
            return sock

        self._sock = inside(ns, make)

    def packets(self) -> Iterator[bytes]:
        """Incoming packets since the last call (outgoing ones are not counted)."""
        while True:
            try:
                data, source = self._sock.recvfrom(65536)
            except BlockingIOError:
                return
            if source[2] not in {socket.PACKET_OUTGOING, socket.PACKET_MULTICAST}:
                yield data

    def close(self) -> None:
        self._sock.close()
