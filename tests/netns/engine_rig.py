"""Two tunnel ends on a veth pair, driven over UAPI with `wg`; ours and the distribution's wireguard-go alike.

    +-- A ------------------+    veth    +-- B ------------------+
    | 10.99.0.1 fd99::1     |------------| 10.99.0.2 fd99::2     |
    | tunnel 10.98.0.1/fd98 |            | tunnel 10.98.0.2/fd98 |
    +-----------------------+            +-----------------------+
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.netns import inside

UAPI = Path("/var/run/wireguard")
OURS = [str(Path(sys.executable).with_name("retinue-engine")), "--foreground"]
THEIRS = ["wireguard-go", "-f"]
PORT = 51820
PAIRS = {"ours-theirs": (OURS, THEIRS), "theirs-ours": (THEIRS, OURS), "ours-ours": (OURS, OURS)}
# The scenario itself is sound when the reference passes it too.
CONTROL = {**PAIRS, "theirs-theirs": (THEIRS, THEIRS)}
RECEIVE = """
import hashlib, socket, sys
s = socket.create_server((sys.argv[1], 9000), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("ready", flush=True)
c, _ = s.accept(); h = hashlib.sha256()
while data := c.recv(65536): h.update(data)
print(h.hexdigest(), flush=True)
"""
SEND = "import socket, sys; c = socket.create_connection((sys.argv[1], 9000), 10); c.sendall(bytes(range(256)) * 8192)"
PAYLOAD = hashlib.sha256(bytes(range(256)) * 8192).hexdigest()
_unique = itertools.count()


def run(*argv: str, stdin: str | None = None, timeout: float = 30) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, input=stdin, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr or done.stdout}"
    return done.stdout


def until(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def in_space(space: str, *argv: str) -> str:
    return run("ip", "netns", "exec", space, *argv)


@dataclass
class End:
    name: str
    interface: str
    number: int
    process: subprocess.Popen[bytes]
    private: str
    public: str
    inner: str = ""
    """Namespace of the tunnel interface, when it was moved away from that of the sockets."""

    def sh(self, *argv: str) -> str:
        """Run a command where the tunnel interface is."""
        return in_space(self.inner or self.name, *argv)

    def out(self, *argv: str) -> str:
        """Run a command where the underlay is."""
        return in_space(self.name, *argv)

    def wg(self, *argv: str) -> None:
        run("wg", "set", self.interface, *argv)

    def show(self, what: str) -> dict[str, list[str]]:
        """``wg show IF WHAT`` as {public key: fields}."""
        lines = run("wg", "show", self.interface, what).splitlines()
        return {key: rest for key, *rest in (line.split() for line in lines)}

    def pings(self, *args: str) -> bool:
        return subprocess.run(
            ["ip", "netns", "exec", self.inner or self.name, "ping", "-n", *args], check=False, capture_output=True, timeout=30
        ).returncode == 0  # fmt: skip

    def ping(self, address: str, *args: str) -> None:
        assert self.pings("-c", "1", "-W", "10", *args, address), f"{self.name} cannot ping {address} {args}"

    @property
    def tunnel(self) -> tuple[str, str]:
        return f"10.98.0.{self.number}", f"fd98::{self.number}"

    @property
    def underlay(self) -> tuple[str, str]:
        return f"10.99.0.{self.number}", f"fd99::{self.number}"


def answers(interface: str) -> bool:
    """Does the engine listen? `wg` must not be asked before: wireguard-go's socket has its name before it listens, and a `wg`
    that is refused removes it."""
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(str(UAPI / f"{interface}.sock"))
        except OSError:
            return False
    return True


def endpoint(address: str, port: int = PORT) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def transfers(end: End) -> tuple[int, int]:
    """(received, sent) bytes as `wg` reads them, of all peers."""
    rows = list(end.show("transfer").values())
    return sum(int(r[0]) for r in rows), sum(int(r[1]) for r in rows)


@dataclass
class Site:
    """Namespaces, links and engines that go away together."""

    tmp: Path
    spaces: list[str] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)

    def space(self, word: str) -> str:
        name = f"rtit-{word}{os.getpid() % 100000}-{next(_unique)}"
        run("ip", "netns", "add", name)
        self.spaces.append(name)
        in_space(name, "ip", "link", "set", "lo", "up")
        in_space(name, "sysctl", "-qw", "net.ipv4.conf.all.promote_secondaries=1")
        return name

    def link(self, a: str, b: str, names: tuple[str, str] = ("u0", "u0"), *, mtu: int = 1500) -> None:
        run("ip", "link", "add", names[0], "netns", a, "mtu", str(mtu), "type", "veth",
            "peer", "name", names[1], "netns", b, "mtu", str(mtu))  # fmt: skip
        for space, name in zip((a, b), names, strict=True):
            in_space(space, "ip", "link", "set", name, "up")

    def address(self, space: str, device: str, *addresses: str) -> None:
        for a in addresses:
            in_space(space, "ip", "address", "add", a, "dev", device, *(("nodad",) if ":" in a else ()))

    def end(self, space: str, number: int, program: list[str], *, port: int = PORT, env: Mapping[str, str] | None = None) -> End:
        """Start an engine and give it a key and the port."""
        interface = f"rt{number}x{os.getpid() % 100000}{next(_unique) % 100:02}"
        process = subprocess.Popen(
            ["ip", "netns", "exec", space, *program, interface], env={**os.environ, "WG_PROCESS_FOREGROUND": "1", **(env or {})},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        private = run("wg", "genkey").strip()
        made = End(space, interface, number, process, private, run("wg", "pubkey", stdin=private).strip())
        self.ends.append(made)
        until(lambda: answers(interface), f"{interface} did not come up")
        made.wg("private-key", str(self.secret(private)), "listen-port", str(port))
        return made

    def secret(self, text: str) -> Path:
        path = self.tmp / f"secret{next(_unique)}"
        path.write_text(text + "\n")
        path.chmod(0o600)
        return path

    def up(self, end: End, mtu: int = 1420) -> None:
        """Addresses on the tunnel interface, and the interface up."""
        for argv in (
            ("address", "add", f"{end.tunnel[0]}/24", "dev", end.interface),
            ("address", "add", f"{end.tunnel[1]}/64", "dev", end.interface, "nodad"),
            ("link", "set", end.interface, "mtu", str(mtu), "up"),
        ):
            end.sh("ip", *argv)

    def close(self) -> None:
        for end in self.ends:
            end.process.terminate()
        for end in self.ends:
            with contextlib.suppress(subprocess.TimeoutExpired):
                end.process.wait(5)
            end.process.kill()
            end.process.wait()
            (UAPI / f"{end.interface}.sock").unlink(missing_ok=True)  # of one that was killed
        for name in self.spaces:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def site(tmp: Path) -> Iterator[Site]:
    for program in ("wireguard-go", "wg", "iperf3", "ping", "nft"):
        assert shutil.which(program), f"{program} is missing: make setup installs it"
    made = Site(tmp)
    try:
        yield made
    finally:
        made.close()


def introduce(a: End, b: End, *, outer: int, psk: Path | None = None, extra: tuple[str, ...] = ()) -> None:
    """Make each the other's peer over the outer family 4 or 6."""
    for end, far in ((a, b), (b, a)):
        end.wg("peer", far.public, "endpoint", endpoint(far.underlay[outer == 6]), "allowed-ips", ",".join(far.tunnel),
               *(("preshared-key", str(psk)) if psk else ()), *extra)  # fmt: skip


@contextlib.contextmanager
def two_ends(
    first: list[str], second: list[str], tmp: Path, *, outer: int, psk: bool = False, mtu: int = 1420,
    env: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> Iterator[tuple[End, End]]:  # fmt: skip
    """Both ends up and configured over the outer family 4 or 6."""
    with site(tmp) as s:
        a, b = pair_on(s, first, second, outer=outer, psk=psk, mtu=mtu, env=env)
        yield a, b


def pair_on(
    s: Site, first: list[str], second: list[str], *, outer: int, psk: bool = False, mtu: int = 1420,
    env: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> tuple[End, End]:  # fmt: skip
    spaces = [s.space(word) for word in "ab"]
    s.link(spaces[0], spaces[1], mtu=max(1500, mtu + 80))
    ends = []
    for number, (space, program) in enumerate(zip(spaces, (first, second), strict=True), 1):
        s.address(space, "u0", f"10.99.0.{number}/24", f"fd99::{number}/64")
        ends.append(s.end(space, number, program, env=env[number - 1]))
    introduce(ends[0], ends[1], outer=outer, psk=s.secret(run("wg", "genpsk").strip()) if psk else None)
    for end in ends:
        s.up(end, mtu)
    return ends[0], ends[1]


def carry(source: End, target: End, family: int) -> None:
    """2 MiB over TCP through the tunnel, compared by digest. family: 0 = IPv4, 1 = IPv6 inside."""
    address = target.tunnel[family]
    receiver = subprocess.Popen(
        ["ip", "netns", "exec", target.inner or target.name, sys.executable, "-c", RECEIVE, address],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert receiver.stdout is not None
        assert receiver.stdout.readline().strip() == "ready"
        source.sh(sys.executable, "-c", SEND, address)
        assert receiver.stdout.readline().strip() == PAYLOAD
    finally:
        receiver.kill()
        receiver.wait()
        receiver.stdout.close()


def iperf(source: End, target: End, address: str, *args: str) -> dict[str, Any]:
    """One iperf3 run; its report's ``end`` object."""
    server = subprocess.Popen(
        ["ip", "netns", "exec", target.inner or target.name, "iperf3", "-s", "-1", "-B", address, "--forceflush"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        while "listening" not in (line := server.stdout.readline()):
            assert line, "the iperf3 server ended"
        report: dict[str, Any] = json.loads(source.sh("iperf3", "-c", address, "-J", *args))
        assert "error" not in report, report["error"]
        end: dict[str, Any] = report["end"]
        return end
    finally:
        server.kill()
        server.communicate()


def udp_socket(space: str, address: str, port: int = 0) -> socket.socket:
    """A bound UDP socket in a namespace."""

    def make() -> socket.socket:
        s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        s.bind((address, port))
        return s

    return inside(space, make)


def uapi_ask(interface: str, body: bytes) -> bytes:
    """One raw exchange on the UAPI socket: what it answers until it closes or says errno."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(str(UAPI / f"{interface}.sock"))
        answer = b""
        with contextlib.suppress(OSError):
            s.sendall(body)
            s.shutdown(socket.SHUT_WR)
            while data := s.recv(65536):
                answer += data
        return answer


@functools.cache
def _shim() -> Path:
    out = Path(tempfile.mkdtemp(prefix="engine-shim-")) / "shim.so"
    atexit.register(shutil.rmtree, out.parent, True)
    run("cc", "-shared", "-fPIC", "-O1", "-o", str(out), str(Path(__file__).with_name("engine_shim.c")), "-ldl")
    return out


def shim(*, rate: int = 1, wall_seconds: int = 0, no_ipv6: bool = False) -> dict[str, str]:
    """Environment of an engine whose boot clock runs `rate` times as fast, whose wall clock is off, or that has no IPv6.

    Only our engine follows it: Go programs ask the kernel without the C library.
    """
    return {"LD_PRELOAD": str(_shim()), "SHIM_RATE": str(rate), "SHIM_WALL_SECONDS": str(wall_seconds),
            **({"SHIM_NO_IPV6": "1"} if no_ipv6 else {})}  # fmt: skip


def ours_set(end: End, *lines: str) -> None:
    """A raw `set` on our engine, for the extension keys that `wg` does not know."""
    answer = uapi_ask(end.interface, ("set=1\n" + "".join(f"{line}\n" for line in lines) + "\n").encode())
    assert answer == b"errno=0\n\n", answer
