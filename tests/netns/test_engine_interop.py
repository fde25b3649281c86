"""Our engine against the distribution's wireguard-go, over the real UAPI, with `wg` as the judge of what it reads.

    +-- A ------------------+    veth    +-- B ------------------+
    | 10.99.0.1 fd99::1     |------------| 10.99.0.2 fd99::2     |
    | tunnel 10.98.0.1/fd98 |            | tunnel 10.98.0.2/fd98 |
    +-----------------------+            +-----------------------+
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

UAPI = Path("/var/run/wireguard")
OURS = [str(Path(sys.executable).with_name("retinue-engine")), "--foreground"]
THEIRS = ["wireguard-go", "-f"]
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


def run(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, input=stdin, timeout=30)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


@dataclass
class End:
    name: str
    interface: str
    number: int
    process: subprocess.Popen[bytes]
    private: str
    public: str

    def sh(self, *argv: str) -> str:
        return run("ip", "netns", "exec", self.name, *argv)

    def wg(self, *argv: str) -> None:
        self.sh("wg", "set", self.interface, *argv)

    @property
    def tunnel(self) -> tuple[str, str]:
        return f"10.98.0.{self.number}", f"fd98::{self.number}"

    @property
    def underlay(self) -> tuple[str, str]:
        return f"10.99.0.{self.number}", f"fd99::{self.number}"


def transfers(end: End) -> tuple[int, int]:
    """(received, sent) bytes as `wg` reads them."""
    _, received, sent = end.sh("wg", "show", end.interface, "transfer").split()
    return int(received), int(sent)


def until(condition: object, what: str, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]  # a callable
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextlib.contextmanager
def two_ends(first: list[str], second: list[str], tmp: Path, *, outer: int, psk: bool = False) -> Iterator[tuple[End, End]]:
    """Both ends up and configured over the outer family 4 or 6."""
    assert shutil.which("wireguard-go"), "wireguard-go is missing: make setup installs it"
    tag = f"{os.getpid() % 100000}"
    names = [f"rtit-a{tag}", f"rtit-b{tag}"]
    ends: list[End] = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "u0", "netns", names[0], "type", "veth", "peer", "name", "u0", "netns", names[1])
        for number, (name, program) in enumerate(zip(names, (first, second), strict=True), 1):
            at = ("ip", "netns", "exec", name)
            for argv in (
                ("link", "set", "lo", "up"), ("address", "add", f"10.99.0.{number}/24", "dev", "u0"),
                ("address", "add", f"fd99::{number}/64", "dev", "u0", "nodad"), ("link", "set", "u0", "up"),
            ):  # fmt: skip
                run(*at, "ip", *argv)
            interface = f"rt{number}{tag}"
            process = subprocess.Popen(
                [*at, *program, interface], env={**os.environ, "WG_PROCESS_FOREGROUND": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            private = run("wg", "genkey").strip()
            ends.append(End(name, interface, number, process, private, run("wg", "pubkey", stdin=private).strip()))
        secret = tmp / "psk"
        secret.write_text(run("wg", "genpsk"))
        for end, far in (ends, ends[::-1]):
            until((UAPI / f"{end.interface}.sock").exists, f"{end.interface} did not come up")
            key = tmp / f"key{end.number}"
            key.write_text(end.private)
            host = far.underlay[0] if outer == 4 else f"[{far.underlay[1]}]"
            end.wg("private-key", str(key), "listen-port", "51820", "peer", far.public, "endpoint", f"{host}:51820",
                   "allowed-ips", ",".join(far.tunnel), *(("preshared-key", str(secret)) if psk else ()))  # fmt: skip
            for argv in (
                ("address", "add", f"{end.tunnel[0]}/24", "dev", end.interface),
                ("address", "add", f"{end.tunnel[1]}/64", "dev", end.interface, "nodad"),
                ("link", "set", end.interface, "mtu", "1420", "up"),
            ):
                end.sh("ip", *argv)
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.process.terminate()
        for end in ends:
            with contextlib.suppress(subprocess.TimeoutExpired):
                end.process.wait(5)
            end.process.kill()
            end.process.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def carry(source: End, target: End, family: int) -> None:
    """2 MiB over TCP through the tunnel, compared by digest."""
    address = target.tunnel[family]
    receiver = subprocess.Popen(
        ["ip", "netns", "exec", target.name, sys.executable, "-c", RECEIVE, address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert receiver.stdout is not None
        assert receiver.stdout.readline().strip() == "ready"
        source.sh(sys.executable, "-c", SEND, address)
        assert receiver.stdout.readline().strip() == PAYLOAD
    finally:
        receiver.kill()
        receiver.wait()
        receiver.stdout.close()


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize(("first", "second"), [(OURS, THEIRS), (THEIRS, OURS), (OURS, OURS)], ids=["ours-theirs", "theirs-ours", "ours-ours"])
def test_both_directions(first: list[str], second: list[str], outer: int, tmp_path: Path) -> None:
    """The first end initiates; then data flows both ways over IPv4 and IPv6 inside, IPv4 or IPv6 outside."""
    with two_ends(first, second, tmp_path, outer=outer) as (a, b):
        a.sh("ping", "-c", "1", "-W", "10", b.tunnel[0])
        for family in (0, 1):
            carry(a, b, family)
            carry(b, a, family)
        for end, far in ((a, b), (b, a)):
            shown = end.sh("wg", "show", end.interface)
            assert far.public in shown
            assert "latest handshake" in shown
            received, sent = transfers(end)
            assert received > 2 << 20
            assert sent > 2 << 20
            assert end.private not in shown


def test_preshared_key_must_agree(tmp_path: Path) -> None:
    with two_ends(OURS, THEIRS, tmp_path, outer=4, psk=True) as (a, b):
        a.sh("ping", "-c", "1", "-W", "10", b.tunnel[0])
        other = tmp_path / "other"
        other.write_text(run("wg", "genpsk"))
        b.wg("peer", a.public, "remove")
        b.wg("peer", a.public, "preshared-key", str(other), "endpoint", f"{a.underlay[0]}:51820", "allowed-ips", ",".join(a.tunnel))
        failed = subprocess.run(
            ["ip", "netns", "exec", b.name, "ping", "-c", "2", "-W", "1", a.tunnel[0]], check=False, capture_output=True
        )
        assert failed.returncode != 0


def test_roaming_follows_the_authenticated_packet(tmp_path: Path) -> None:
    """wireguard-go changes its port and address; our end follows and answers there."""
    with two_ends(THEIRS, OURS, tmp_path, outer=4) as (roamer, ours):
        roamer.sh("ping", "-c", "1", "-W", "10", ours.tunnel[0])
        roamer.sh("ip", "address", "flush", "dev", "u0", "scope", "global")
        roamer.sh("ip", "address", "add", "10.99.0.77/24", "dev", "u0")
        roamer.wg("listen-port", "51999")
        roamer.sh("ping", "-c", "2", "-W", "10", ours.tunnel[0])
        assert "10.99.0.77:51999" in ours.sh("wg", "show", ours.interface, "endpoints")


def test_a_stranger_gets_no_answer(tmp_path: Path) -> None:
    """Positive control first: the known peer is answered; then its key is removed and nothing comes back at all."""
    with two_ends(THEIRS, OURS, tmp_path, outer=4) as (stranger, ours):
        stranger.sh("ping", "-c", "1", "-W", "10", ours.tunnel[0])
        ours.wg("peer", stranger.public, "remove")
        stranger.wg("peer", ours.public, "remove")
        stranger.wg("peer", ours.public, "endpoint", f"{ours.underlay[0]}:51820", "allowed-ips", ",".join(ours.tunnel))
        before = transfers(stranger)
        subprocess.run(["ip", "netns", "exec", stranger.name, "ping", "-c", "3", "-W", "1", ours.tunnel[0]], check=False, capture_output=True)
        received, sent = transfers(stranger)
        assert sent > before[1]
        assert received == before[0]


def test_garbage_on_the_control_socket_changes_nothing(tmp_path: Path) -> None:
    import socket

    with two_ends(OURS, THEIRS, tmp_path, outer=4) as (ours, _):
        before = ours.sh("wg", "showconf", ours.interface)
        for body in (b"set=1\npublic_key=zz\n\n", b"set=1\nlisten_port=99999\n\n", b"get=2\n\n", b"\x00\xff" * 64 + b"\n\n",
                     b"set=1\nprivate_key=" + b"0" * 63 + b"\n\n", b"set=1\nlisten_port=4000\nnonsense=1\n\n"):  # fmt: skip
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(5)
                s.connect(str(UAPI / f"{ours.interface}.sock"))
                s.sendall(body)
                with contextlib.suppress(OSError):
                    answer = s.recv(4096)
                    assert not answer or (b"errno=" in answer and b"errno=0" not in answer)
        assert ours.sh("wg", "showconf", ours.interface) == before
