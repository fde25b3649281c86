"""The statistics of the impairment bridge, and the bridge itself between two namespaces."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time

import pytest

from mesh.lab import Lab
from mesh.lab_process import in_netns, ip_batch
from tests.chaos.impair import Impairment, Profile, plain

N = 20_000


def fates(profile: Profile, seed: int = 1, length: int = 100) -> list[list[float]]:
    one = Impairment(profile, seed)
    return [one.decide(length) for _ in range(N)]


def near(found: float, wanted: float, share: float = 0.1) -> bool:
    return abs(found - wanted) <= share * wanted


def test_nothing_is_done_unless_asked() -> None:
    assert fates(Profile()) == [[0.0]] * N


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("burst", [1.0, 5.0])
def test_the_share_of_losses(loss: float, burst: float) -> None:
    lost = sum(not f for f in fates(Profile(loss=loss, burst=burst)))
    assert near(lost / N, loss, 0.25)


def test_the_length_of_runs() -> None:
    found = fates(Profile(loss=0.1, burst=5.0))
    runs = [len(list(run)) for missing, run in itertools.groupby(found, key=lambda f: not f) if missing]
    assert near(sum(runs) / len(runs), 5.0, 0.15)


def test_delay_and_jitter() -> None:
    delays = [f[0] for f in fates(Profile(delay_ms=20, jitter_ms=5))]
    assert near(sum(delays) / N, 0.020, 0.02)
    assert 0.015 <= min(delays) < 0.016
    assert 0.024 < max(delays) <= 0.025


def test_doubles_and_hurried_ones() -> None:
    found = fates(Profile(delay_ms=10, duplicate=0.05, reorder=0.1))
    assert near(sum(len(f) == 2 for f in found) / N, 0.05, 0.15)
    assert near(sum(f[0] == 0.0 for f in found) / N, 0.1, 0.1)


def test_a_black_hole_takes_the_long_ones_only() -> None:
    profile = Profile(mtu=1300)
    assert not any(fates(profile, length=1315))
    assert all(fates(profile, length=1314))


def test_the_same_seed_is_the_same_network_and_settings_do_not_disturb_each_other() -> None:
    profile = Profile(loss=0.1, jitter_ms=3, delay_ms=5)
    assert fates(profile, 7) == fates(profile, 7) != fates(profile, 8)
    lossy = [not f for f in fates(Profile(loss=0.1), 7)]
    assert lossy == [not f for f in fates(Profile(loss=0.1, delay_ms=9, duplicate=0.5, reorder=0.3), 7)]


@pytest.mark.netns
def test_frames_over_the_real_bridge() -> None:
    """5,000 datagrams each way over a bridge that loses a tenth and doubles a twentieth: what arrives is what was decided."""
    with Lab(trust_domain="bridge.example", ca=False) as lab:
        left, right, middle = (lab.add_workload(n) for n in ("left", "right", "middle"))
        ip_batch([f"link add west type veth peer name eth0 netns {left}", f"link add east type veth peer name eth0 netns {right}",
                  "link set west addrgenmode none up", "link set east addrgenmode none up"], netns=middle)  # fmt: skip
        for n, space in enumerate((left, right)):
            ip_batch([f"addr add 192.0.2.{n + 1}/24 dev eth0", "link set eth0 addrgenmode none up"], netns=space)
            in_netns(space, lambda: plain("eth0"))
        profile = Profile(delay_ms=2, loss=0.1, duplicate=0.05)
        bridge = lab.spawn([sys.executable, "-m", "tests.chaos.impair", "west", "east", "3", profile.dump()], name="bridge", netns=middle)
        bridge.wait_ready()

        def box(space: str) -> socket.socket:
            sock = in_netns(space, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
            sock.settimeout(1.0)
            return sock

        a, b = box(left), box(right)
        b.bind(("192.0.2.2", 7000))
        got: list[int] = []
        for n in range(5000):
            a.sendto(n.to_bytes(4, "big") + os.urandom(60), ("192.0.2.2", 7000))
            if n % 50 == 0:
                time.sleep(0.005)
        try:
            while True:
                got.append(int.from_bytes(b.recv(100)[:4], "big"))
        except TimeoutError:
            pass
        a.close()
        b.close()
        assert near(1 - len(set(got)) / 5000, 0.1, 0.3)
        assert near((len(got) - len(set(got))) / len(set(got)), 0.05, 0.4)
