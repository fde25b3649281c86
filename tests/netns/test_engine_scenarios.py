"""What a WireGuard device must do, played through two live engines: ours, and wireguard-go to show the scenario is sound."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.netns.engine_rig import (
    CONTROL,
    OURS,
    PORT,
    THEIRS,
    UAPI,
    End,
    answers,
    carry,
    endpoint,
    introduce,
    iperf,
    pair_on,
    run,
    site,
    transfers,
    two_ends,
    until,
)  # fmt: skip

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]

# A scenario is played by both, in both seats: what the reference cannot do either is no fault of ours.
seats = pytest.mark.parametrize(("first", "second"), [(THEIRS, OURS), (OURS, THEIRS)], ids=["ours", "theirs"])
alone = pytest.mark.parametrize("program", [OURS, THEIRS], ids=["ours", "theirs"])


@pytest.mark.parametrize(
    ("first", "second", "mtu"),
    [(*p, 1420) for p in CONTROL.values()] + [(THEIRS, OURS, 34720), (OURS, THEIRS, 34720)],
    ids=[f"{name}-1420" for name in CONTROL] + ["theirs-ours-34720", "ours-theirs-34720"],
)
def test_traffic_of_every_kind_at_a_small_and_a_large_mtu(first: list[str], second: list[str], mtu: int, tmp_path: Path) -> None:
    """Pings that fill the MTU, TCP and UDP streams over both families, and counters that agree on both ends."""
    with two_ends(first, second, tmp_path, outer=6 if first is second else 4, mtu=mtu) as (a, b):
        for end, far in ((a, b), (b, a)):
            end.ping(far.tunnel[0], "-M", "do", "-s", str(mtu - 28))
            end.ping(far.tunnel[1], "-M", "do", "-s", str(mtu - 48))
            assert not end.pings("-c", "1", "-W", "1", "-M", "do", "-s", str(mtu - 27), far.tunnel[0]), "one byte too many"
        # Equal in the end; the reference does not count all of its handshakes.
        slack = 0 if first is second is OURS else 400

        def agree() -> bool:
            (got, sent), (far_got, far_sent) = transfers(a), transfers(b)
            return abs(got - far_sent) <= slack and abs(far_got - sent) <= slack

        until(agree, "the counters do not agree")
        assert transfers(a)[1] > 4 * (mtu - 48)
        size = 4 << 20
        assert iperf(b, a, a.tunnel[0], "-n", str(size))["sum_received"]["bytes"] > size / 16
        for family in (0, 1):
            end = iperf(a, b, b.tunnel[family], "-n", str(size))
            assert end["sum_received"]["bytes"] > size / 16  # what had arrived when the client stopped: it may be far ahead
            length = str(mtu - 100)
            udp = iperf(a, b, b.tunnel[family], "-u", "-b", "20M", "-n", "1M", "-l", length)
            assert udp["sum"]["packets"] > 10
            assert udp["sum"]["lost_percent"] < 20
        assert transfers(a)[1] > 4 << 20


@seats
def test_roaming_of_port_address_and_family(first: list[str], second: list[str], tmp_path: Path) -> None:
    with two_ends(first, second, tmp_path, outer=4) as (a, b):
        a.ping(b.tunnel[0])

        def seen() -> str:
            return b.show("endpoints")[a.public][0]

        assert seen() == endpoint(a.underlay[0])
        a.wg("listen-port", "9999")
        a.ping(b.tunnel[0])
        assert seen() == endpoint(a.underlay[0], 9999)

        def follows(where: str, family: int) -> None:
            if first is THEIRS:
                # The reference keeps to a source address that is gone until its handshake times out; fresh sockets do not.
                a.wg("listen-port", "9998")
                a.wg("listen-port", "9999")
            until(lambda: a.pings("-c", "1", "-W", "1", b.tunnel[family]) and seen() == where, f"never seen at {where}")

        a.out("ip", "address", "add", "10.99.0.77/24", "dev", "u0")
        a.out("ip", "address", "del", f"{a.underlay[0]}/24", "dev", "u0")
        follows("10.99.0.77:9999", 1)
        # To IPv6, by the one that knows; the other follows.
        a.wg("peer", b.public, "endpoint", endpoint(b.underlay[1]))
        follows(endpoint(a.underlay[1], 9999), 0)
        a.out("ip", "address", "add", "fd99::77/64", "dev", "u0", "nodad")
        a.out("ip", "address", "del", f"{a.underlay[1]}/64", "dev", "u0")
        follows("[fd99::77]:9999", 0)
        a.wg("peer", b.public, "endpoint", endpoint(b.underlay[0]))
        follows("10.99.0.77:9999", 1)
        # Back the other way it goes to where the peer is now.
        b.ping(a.tunnel[1])


@seats
def test_a_source_address_belongs_to_one_key(first: list[str], second: list[str], tmp_path: Path) -> None:
    """Cryptokey routing both ways, and a more specific prefix of another peer takes addresses out of a wide one."""
    with two_ends(first, second, tmp_path, outer=4) as (a, b):
        stranger = run("wg", "pubkey", stdin=run("wg", "genkey")).strip()
        for n in (0, 1):
            a.ping(b.tunnel[n])
        for address in ("10.98.7.7/32", "10.98.8.8/32", "fd98::7:7/128"):
            a.sh("ip", "address", "add", address, "dev", a.interface, *(("nodad",) if ":" in address else ()))
        for route, device in (("10.98.0.0/16", b.interface), ("fd98::/64", b.interface)):
            b.sh("ip", "route", "replace", route, "dev", device)

        def answered(source: str, target: str) -> bool:
            return a.pings("-c", "1", "-W", "0.5", "-I", source, target)

        assert not answered("10.98.7.7", b.tunnel[0]), "not in the list of its key"
        assert not answered("fd98::7:7", b.tunnel[1])
        b.wg("peer", a.public, "allowed-ips", "10.98.0.0/16,fd98::/64")
        assert answered("10.98.7.7", b.tunnel[0])
        assert answered("fd98::7:7", b.tunnel[1])
        b.wg("peer", stranger, "allowed-ips", "10.98.7.0/24,fd98::7:0/112")
        assert not answered("10.98.7.7", b.tunnel[0]), "another key's by the longer prefix"
        assert not answered("fd98::7:7", b.tunnel[1])
        assert answered("10.98.8.8", b.tunnel[0])
        b.wg("peer", stranger, "remove")
        assert answered("10.98.7.7", b.tunnel[0])
        assert answered("fd98::7:7", b.tunnel[1])
        # An address of nobody is not sent anywhere.
        before = transfers(a)
        assert not a.pings("-c", "1", "-W", "1", "10.98.0.200")
        assert transfers(a) == before


@seats
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_answers_leave_from_the_address_that_was_written_to(first: list[str], second: list[str], family: int, tmp_path: Path) -> None:
    """Sticky source address, and the fall to another one when it goes."""
    second_address, width = (("10.99.0.200", 24), ("fd99::200", 64))[family]
    with two_ends(first, second, tmp_path, outer=6 if family else 4) as (a, b):
        a.ping(b.tunnel[0])
        b.out("ip", "address", "add", f"{second_address}/{width}", "dev", "u0", *(("nodad",) if family else ()))
        a.wg("peer", b.public, "endpoint", endpoint(second_address))
        for _ in range(3):
            a.ping(b.tunnel[family])
        assert a.show("endpoints")[b.public][0] == endpoint(second_address), "the answer came from another address"
        if second is THEIRS:
            return  # it falls as well, but only when a handshake has timed out
        b.out("ip", "address", "del", f"{second_address}/{width}", "dev", "u0")
        # The peer speaks, from an address it still has; the other end learns it.
        until(lambda: b.pings("-c", "1", "-W", "1", a.tunnel[family]), "never fell to the other address")
        assert a.show("endpoints")[b.public][0] == endpoint(b.underlay[family])


@seats
def test_keys_change_on_the_living_device(first: list[str], second: list[str], tmp_path: Path) -> None:
    with two_ends(first, second, tmp_path, outer=4) as (a, b):
        a.ping(b.tunnel[0])
        private = run("wg", "genkey").strip()
        public = run("wg", "pubkey", stdin=private).strip()
        key = tmp_path / "new"
        key.write_text(private)
        a.wg("private-key", str(key))
        assert not a.pings("-c", "1", "-W", "1", b.tunnel[0]), "nobody knows the new key"
        b.wg("peer", public, "endpoint", endpoint(a.underlay[0]), "allowed-ips", ",".join(a.tunnel))
        assert run("wg", "show", a.interface, "public-key").strip() == public
        until(lambda: b.pings("-c", "1", "-W", "1", a.tunnel[0]), "no tunnel under the new key")
        assert b.show("allowed-ips")[a.public] == ["(none)"], "the addresses went to the new key"
        # Its own key as a peer is no peer.
        a.wg("peer", public, "allowed-ips", "10.98.0.1/32")
        assert set(a.show("peers")) == {b.public}


@alone
def test_moves_to_another_namespace_and_keeps_its_sockets(program: list[str], tmp_path: Path) -> None:
    """The way to give a container nothing but the tunnel: the interface goes in, the sockets stay outside."""
    with site(tmp_path) as s:
        a, b = pair_on(s, program, THEIRS, outer=4)
        a.ping(b.tunnel[0])
        inner = s.space("in")
        run("ip", "-n", a.name, "link", "set", a.interface, "netns", inner)
        a.inner = inner
        s.up(a, 1380)
        for family in (0, 1):
            a.ping(b.tunnel[family])
            b.ping(a.tunnel[family])
        carry(a, b, 0)
        assert a.out("ip", "-br", "link").split().count(a.interface) == 0
        assert a.process.poll() is None


@alone
def test_ends_when_its_interface_is_deleted(program: list[str], tmp_path: Path) -> None:
    with site(tmp_path) as s:
        a, _ = pair_on(s, program, OURS, outer=4)
        run("ip", "-n", a.name, "link", "delete", a.interface)
        until(lambda: a.process.poll() is not None, "the engine outlives its interface")
        assert not (UAPI / f"{a.interface}.sock").exists()


def test_ends_when_its_moved_interface_is_deleted(tmp_path: Path) -> None:
    with site(tmp_path) as s:
        a, _ = pair_on(s, OURS, OURS, outer=4)
        inner = s.space("in")
        run("ip", "-n", a.name, "link", "set", a.interface, "netns", inner)
        run("ip", "-n", inner, "link", "delete", a.interface)
        until(lambda: a.process.poll() is not None, "the engine outlives its interface")


@alone
def test_without_a_tun_device_it_says_so_and_leaves_nothing(program: list[str], tmp_path: Path) -> None:
    hidden = f"mount -t tmpfs none /dev/net && exec {' '.join(program)} rtmiss0"
    done = subprocess.run(["unshare", "-m", "sh", "-c", hidden], check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert not (UAPI / "rtmiss0.sock").exists()
    if program is OURS:
        assert done.returncode == 4
        assert done.stderr.count("\n") == 1
        assert "load the tun module" in done.stderr


def test_a_second_engine_for_the_same_interface_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with two_ends(OURS, THEIRS, tmp_path, outer=4) as (a, b):
        done = subprocess.run(
            ["ip", "netns", "exec", a.name, *OURS, a.interface], check=False, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 4
        assert "another engine" in done.stderr
        a.ping(b.tunnel[0])


def test_the_control_socket_listens_from_the_moment_it_has_its_name(tmp_path: Path) -> None:
    """A `wg` that is refused would remove the socket of an engine that is starting."""
    with site(tmp_path) as s:
        space = s.space("u")
        refused = 0
        for n in range(12):
            path = UAPI / f"rtsock{n}.sock"
            process = subprocess.Popen(
                ["ip", "netns", "exec", space, *OURS, path.stem], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                deadline = time.monotonic() + 20
                while not path.exists():
                    assert time.monotonic() < deadline
                refused += not answers(path.stem)
            finally:
                process.terminate()
                process.wait()
        assert refused == 0
        assert not list(UAPI.glob("rtsock*")), "nothing is left, under no other name either"


def test_a_taken_port_is_an_error_and_the_old_one_stays(tmp_path: Path) -> None:
    with site(tmp_path) as s:
        a, b = pair_on(s, OURS, THEIRS, outer=4)
        a.ping(b.tunnel[0])
        other = s.end(a.name, 3, OURS, port=0)
        chosen = run("wg", "show", other.interface, "listen-port")
        failed = subprocess.run(["wg", "set", other.interface, "listen-port", str(PORT), "fwmark", "7"], check=False, capture_output=True)
        assert failed.returncode != 0
        assert run("wg", "show", other.interface, "listen-port") == chosen
        assert run("wg", "show", other.interface, "fwmark").strip() == "off", "nothing of a refused change is kept"
        a.ping(b.tunnel[0])


def forwarding(end: End) -> None:
    for knob in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        end.out("sysctl", "-qw", f"{knob}=1")


def test_three_ends_through_one_in_the_middle(tmp_path: Path) -> None:
    """A packet that comes out of one tunnel and goes into the next of the same device, over both families."""
    with site(tmp_path) as s:
        hub_space, spaces = s.space("hub"), [s.space("l"), s.space("r")]
        s.address(hub_space, "lo", "10.99.9.9/32")
        hub = s.end(hub_space, 9, OURS)
        leaves = []
        for number, space in enumerate(spaces, 1):
            s.link(hub_space, space, (f"u{number}", "u0"))
            s.address(hub_space, f"u{number}", f"10.99.{number}.9/24")
            s.address(space, "u0", f"10.99.{number}.1/24")
            leaf = s.end(space, number, THEIRS if number == 1 else OURS)
            leaf.wg("peer", hub.public, "endpoint", f"10.99.{number}.9:{PORT}", "allowed-ips", "10.98.0.0/24,fd98::/64")
            hub.wg("peer", leaf.public, "endpoint", f"10.99.{number}.1:{PORT}", "allowed-ips", ",".join(leaf.tunnel))
            leaves.append(leaf)
        for end in (hub, *leaves):
            s.up(end)
        forwarding(hub)
        for family in (0, 1):
            leaves[0].ping(leaves[1].tunnel[family])
            carry(leaves[1], leaves[0], family)


def test_peers_are_introduced_in_any_order(tmp_path: Path) -> None:
    """Addresses and routes first, keys later: what waits goes out when it can."""
    with site(tmp_path) as s:
        spaces = [s.space(word) for word in "ab"]
        s.link(spaces[0], spaces[1])
        ends = []
        for number, space in enumerate(spaces, 1):
            s.address(space, "u0", f"10.99.0.{number}/24", f"fd99::{number}/64")
            ends.append(s.end(space, number, OURS))
            s.up(ends[-1])
        a, b = ends
        assert not a.pings("-c", "1", "-W", "1", b.tunnel[0])
        introduce(a, b, outer=6)
        a.ping(b.tunnel[0])
