"""Our engine against the distribution's wireguard-go, over the real UAPI, with `wg` as the judge of what it reads."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path

import pytest

from tests.netns.engine_rig import OURS, PAIRS, THEIRS, UAPI, carry, run, transfers, two_ends

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
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
