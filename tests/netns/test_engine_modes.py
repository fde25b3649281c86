"""The engine's ways of working: workers, switches, ciphers, clocks and hosts without IPv6; and rekeying by timer."""

from __future__ import annotations

import base64
import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.netns.engine_rig import (
    OURS,
    THEIRS,
    End,
    carry,
    endpoint,
    iperf,
    ours_set,
    pair_on,
    run,
    shim,
    site,
    transfers,
    two_ends,
    udp_socket,
    until,
)  # fmt: skip

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

SO_RCVBUFFORCE = 33  # linux/socket.h
TWO = [*OURS, "--workers", "2"]
LONG = bool(os.environ.get("RETINUE_LONG"))


def threads_of(end: End) -> dict[str, int]:
    """How often each thread of the engine was woken, by name."""
    woken = {}
    for task in Path(f"/proc/{end.process.pid}/task").iterdir():
        lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        woken[lines["Name"].strip()] = int(lines["voluntary_ctxt_switches"]) + int(lines["nonvoluntary_ctxt_switches"])
    return woken


# ---- several workers


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize(("first", "second"), [(TWO, THEIRS), (TWO, TWO)], ids=["two-theirs", "two-two"])
def test_two_workers_carry_both_families_both_ways(first: list[str], second: list[str], outer: int, tmp_path: Path) -> None:
    with two_ends(first, second, tmp_path, outer=outer) as (a, b):
        assert {"worker0", "worker1"} <= set(threads_of(a))
        for family in (0, 1):
            a.ping(b.tunnel[family])
            carry(a, b, family)
            carry(b, a, family)
        a.wg("listen-port", "7777")
        a.ping(b.tunnel[0])
        report = iperf(a, b, b.tunnel[1], "-n", "4M", "-P", "4")
        assert report["sum_sent"]["bytes"] >= 4 << 20


def numbered(s: socket.socket, to: tuple[str, int], count: int, go: threading.Barrier) -> None:
    """Datagrams with a running number, in bursts small enough for everyone's buffers."""
    go.wait()
    for n in range(count):
        s.sendto(struct.pack("!I", n) + bytes(200), to)
        if n % 8 == 7:
            time.sleep(0.002)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_two_workers_keep_the_order_of_every_flow(family: int, tmp_path: Path) -> None:
    """Eight flows at once from three peers, each flow in order; the flows and the peers are spread over both workers."""
    flows, count = 8, 2000
    with site(tmp_path) as s:
        hub_space = s.space("hub")
        hub = s.end(hub_space, 9, TWO)
        leaves = []
        for number in range(1, 4):
            space = s.space(f"l{number}")
            s.link(hub_space, space, (f"u{number}", "u0"))
            s.address(hub_space, f"u{number}", f"10.99.{number}.9/24")
            s.address(space, "u0", f"10.99.{number}.1/24")
            leaf = s.end(space, number, TWO, port=20_000 + 17 * number)
            leaf.wg("peer", hub.public, "endpoint", f"10.99.{number}.9:51820", "allowed-ips", "10.98.0.0/24,fd98::/64")
            hub.wg("peer", leaf.public, "allowed-ips", ",".join(leaf.tunnel))
            leaves.append(leaf)
        for end in (hub, *leaves):
            s.up(end)
        for leaf in leaves:
            leaf.ping(hub.tunnel[family])
        before = {leaf.name: threads_of(leaf) for leaf in (hub, *leaves)}
        sinks = [udp_socket(hub.name, hub.tunnel[family], 6000 + n) for n in range(flows)]
        sources = [udp_socket(leaves[n % 3].name, leaves[n % 3].tunnel[family]) for n in range(flows)]
        # And as many back, from the hub through its two TUN queues.
        back_sinks = [udp_socket(leaves[n % 3].name, leaves[n % 3].tunnel[family], 6100 + n) for n in range(flows)]
        back_sources = [udp_socket(hub.name, hub.tunnel[family]) for _ in range(flows)]
        for x in (*sinks, *back_sinks):
            x.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        go = threading.Barrier(2 * flows)
        senders = [
            threading.Thread(target=numbered, args=(x, (hub.tunnel[family], 6000 + n), count, go)) for n, x in enumerate(sources)
        ] + [
            threading.Thread(target=numbered, args=(x, (leaves[n % 3].tunnel[family], 6100 + n), count, go))
            for n, x in enumerate(back_sources)
        ]
        for t in senders:
            t.start()
        for t in senders:
            t.join()
        time.sleep(0.3)
        for n, x in enumerate((*sinks, *back_sinks)):
            x.setblocking(False)
            got = []
            try:
                while True:
                    got.append(struct.unpack("!I", x.recv(2000)[:4])[0])
            except BlockingIOError:
                pass
            assert len(got) > count / 2, f"flow {n}: {len(got)} of {count} arrived"
            assert got == sorted(set(got)), f"flow {n}: out of order or twice"
        worked = {leaf.name: {k: v - before[leaf.name].get(k, 0) for k, v in threads_of(leaf).items()} for leaf in (hub, *leaves)}
        busy = [name for name, woken in worked.items() if min(woken["worker0"], woken["worker1"]) > 20]
        assert busy, f"one worker did everything: {worked}"
        for x in (*sinks, *sources, *back_sinks, *back_sources):
            x.close()


# ---- kill switches


SWITCHES = {
    "low-power": ["--low-power"],
    "no-poll": ["--poll-us", "0"],
    "no-tun-offload": ["--no-tun-offload"],
    "no-udp-gso": ["--no-udp-gso"],
    "no-udp-gro": ["--no-udp-gro"],
    "nothing": ["--low-power", "--no-tun-offload", "--no-udp-gso", "--no-udp-gro", "--workers", "2"],
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_leaves_a_working_tunnel(switches: list[str], tmp_path: Path) -> None:
    """Against an end of ours with everything on, so that what one joins the other has to cut."""
    with two_ends([*OURS, *switches], OURS, tmp_path, outer=4) as (a, b):
        for family in (0, 1):
            carry(a, b, family)
            carry(b, a, family)
        assert iperf(a, b, b.tunnel[0], "-u", "-b", "20M", "-n", "1M", "-l", "1200")["sum"]["lost_percent"] < 20


def test_switches_reach_an_engine_through_its_environment(tmp_path: Path) -> None:
    """How an operator reaches an engine that an agent started."""
    with two_ends(OURS, THEIRS, tmp_path, outer=4, env=({"RETINUE_ENGINE_OPTIONS": "--workers 2 --no-udp-gso"}, {})) as (a, b):
        assert {"worker0", "worker1"} <= set(threads_of(a))
        carry(a, b, 0)


def test_an_idle_engine_sleeps(tmp_path: Path) -> None:
    """No polling, no per-peer scan: with 2,000 peers and nothing to do no thread is scheduled more than now and then."""
    with two_ends(OURS, OURS, tmp_path, outer=4) as (a, b):
        conf = tmp_path / "many.conf"
        conf.write_text(
            "".join(f"[Peer]\nPublicKey = {n:04d}{'A' * 36}AAA=\nAllowedIPs = 100.64.{n >> 8}.{n & 255}/32\n" for n in range(2000))
        )
        run("wg", "addconf", a.interface, str(conf))
        carry(a, b, 0)

        time.sleep(0.5)
        before = sum(threads_of(a).values())
        time.sleep(2)
        assert sum(threads_of(a).values()) - before < 30


def test_a_host_without_ipv6_has_a_tunnel_over_ipv4(tmp_path: Path) -> None:
    with two_ends(OURS, THEIRS, tmp_path, outer=4, env=(shim(no_ipv6=True), {})) as (a, b):
        for family in (0, 1):
            a.ping(b.tunnel[family])
        assert a.out("ss", "-Hnul6").strip() == ""
        # And one whose kernel has it switched off.
        b.out("sysctl", "-qw", "net.ipv6.conf.u0.disable_ipv6=1")
        carry(a, b, 0)


# ---- the transport cipher


def choose(end: End, far: End, cipher: str) -> None:
    ours_set(end, f"public_key={base64.b64decode(far.public).hex()}", f"retinue_cipher={cipher}")


@pytest.mark.parametrize("first", [0, 1], ids=["initiator-first", "responder-first"])
def test_a_changed_offer_heals_on_the_living_tunnel(first: int, tmp_path: Path) -> None:
    """AES on both, then one side's record changes, then the other's; and back. In between nothing passes in the other cipher."""
    with two_ends(OURS, OURS, tmp_path, outer=4) as ends:
        a, b = ends
        a.ping(b.tunnel[0])
        order = [ends[first], ends[1 - first]]
        for cipher in ("aes-256-gcm", "chacha20poly1305", "aes-256-gcm"):
            choose(order[0], order[1], cipher)
            assert not a.pings("-c", "2", "-i", "0.2", "-W", "0.5", b.tunnel[0]), "a session under two ciphers"
            choose(order[1], order[0], cipher)
            until(lambda: a.pings("-c", "1", "-W", "1", b.tunnel[1]), f"no tunnel after both chose {cipher}")
            carry(b, a, 0)


def test_stock_wireguard_gets_no_session_under_aes_and_one_without(tmp_path: Path) -> None:
    with two_ends(OURS, THEIRS, tmp_path, outer=4) as (a, b):
        a.ping(b.tunnel[0])
        choose(a, b, "aes-256-gcm")
        assert not a.pings("-c", "2", "-i", "0.2", "-W", "0.5", b.tunnel[0])
        assert not b.pings("-c", "1", "-W", "0.5", a.tunnel[0])
        choose(a, b, "chacha20poly1305")
        until(lambda: a.pings("-c", "1", "-W", "1", b.tunnel[0]), "never healed")
        carry(a, b, 1)


# ---- rekeying by timer


def handshake_time(end: End, far: End) -> int:
    return int(end.show("latest-handshakes")[far.public][0])


def test_our_side_rekeys_by_its_timer_and_the_reference_follows(tmp_path: Path) -> None:
    """Our boot clock runs sixty times as fast: REKEY_AFTER_TIME is two seconds away. Not a ping is lost over three rekeys."""
    with two_ends(OURS, THEIRS, tmp_path, outer=4, env=(shim(rate=60), {})) as (a, b):
        a.ping(b.tunnel[0])
        seen = {handshake_time(b, a)}
        lost = 0
        deadline = time.monotonic() + 40
        while len(seen) < 4:
            assert time.monotonic() < deadline, f"{len(seen)} handshakes"
            lost += not a.pings("-c", "5", "-i", "0.1", "-W", "2", b.tunnel[0])
            seen.add(handshake_time(b, a))
        assert lost == 0
        carry(b, a, 1)


def test_dead_sessions_end_and_start_again_by_timer(tmp_path: Path) -> None:
    """Beyond REJECT_AFTER_TIME nothing of the old session is used: the first packet after a long silence makes a new one."""
    with two_ends(OURS, OURS, tmp_path, outer=6, env=(shim(rate=100), shim(rate=100))) as (a, b):
        a.ping(b.tunnel[0])
        first = handshake_time(a, b)
        time.sleep(2.2)  # 220 s of theirs
        b.ping(a.tunnel[1])
        assert handshake_time(a, b) > first


@pytest.mark.skipif(not LONG, reason="takes two minutes: make attacks")
def test_rekeying_by_timer_in_real_time_both_ways(tmp_path: Path) -> None:
    """REKEY_AFTER_TIME as it is: three tunnels side by side, each end of ours and the reference initiating once."""
    with site(tmp_path) as s:
        pairs = [pair_on(s, OURS, THEIRS, outer=4), pair_on(s, THEIRS, OURS, outer=6), pair_on(s, OURS, OURS, outer=4)]
        for a, b in pairs:
            a.ping(b.tunnel[0])
        first = [handshake_time(b, a) for a, b in pairs]
        lost, sent = 0, 0
        start = time.monotonic()
        while time.monotonic() - start < 135:
            for a, b in pairs:
                for family in (0, 1):
                    sent += 1
                    lost += not a.pings("-c", "1", "-W", "1", b.tunnel[family])
            time.sleep(0.2)
        ages = [handshake_time(b, a) - t for (a, b), t in zip(pairs, first, strict=True)]
        print(f"{sent} pings, {lost} lost; new sessions after {ages} s")
        assert all(115 <= age <= 130 for age in ages), ages
        assert lost == 0
        for a, b in pairs:
            assert transfers(a)[1] > 1000
            assert a.show("endpoints")[b.public][0] in (endpoint(b.underlay[0]), endpoint(b.underlay[1]))
