"""Whole data planes on the kernel device: policy on real packets, alone and together with the userspace engine."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Iterator

import pytest

from tests.netns.plane_rig import Rig, echo, ports, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def kind(rig: Rig, host: str) -> str:
    """What the kernel calls the tunnel device of a host."""
    one = rig.hosts[host]
    shown = run("ip", "-n", one.ns, "-d", "link", "show", one.interface)
    return next(word for word in ("wireguard", "tun") if f" {word} " in f"{shown} ".replace("\n", " "))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The kernel device on both hosts, chosen by itself."""
    rig = Rig(tmp_path_factory.mktemp("kernels"))
    for host in rig.hosts.values():
        host.launch = functools.partial(host.launch, "--device", "auto")  # type: ignore[method-assign]  # of these hosts only
    with rig:
        assert [kind(rig, host) for host in "ab"] == ["wireguard", "wireguard"]
        yield rig


@pytest.mark.parametrize("family", [4, 6])
def test_policy_holds_on_the_kernel_device(kernels: Rig, family: int) -> None:
    rig = kernels
    rig.family = family
    rig.apply(("web", "api", ports("tcp/8080", "udp/9000")))
    tap = rig.tap("api")
    with rig.server("api", 8080, family) as server:
        for denied, port in (("batch", 8080), ("web", 8081)):
            with pytest.raises(ConnectionRefusedError):
                rig.connect(denied, "api", port, family, timeout=10)
        udp = rig.udp("batch", family=family)
        with contextlib.suppress(OSError):
            for _ in range(5):
                udp.sendto(b"no", (rig.address("api", family), 9000))
        assert list(tap.packets()) == []
        assert server.accepted == 0
        with rig.connect("web", "api", 8080, family, timeout=20) as sock:  # positive control
            assert echo(sock) == b"ping"
        assert list(tap.packets())
    receiver, sender = rig.udp("api", 9000, family), rig.udp("web", 0, family)
    receiver.settimeout(10)
    sender.sendto(b"hello", (rig.address("api", family), 9000))
    data, source = receiver.recvfrom(100)
    assert (data, source[0]) == (b"hello", rig.address("web", family))
    receiver.close()
    counted = rig.hosts["a"].ask("counters")
    assert max(counted["handshakes"].values()) > 0
    assert (rig.address("batch", family), rig.address("api", family), "tcp", 8080) in {tuple(d[:4]) for d in counted["denied"]}


def test_taking_a_rule_away_cuts_what_is_open_and_nothing_else(kernels: Rig) -> None:
    rig = kernels
    both = (("web", "api", ports("tcp/8080")), ("batch", "api", ports("tcp/8080")))
    rig.apply(*both)
    with rig.server("api", 8080) as server:
        cut, kept = (rig.connect(name, "api", 8080, timeout=20) for name in ("web", "batch"))
        assert echo(cut) == echo(kept) == b"ping"
        before = server.received
        rig.apply(both[1])
        with pytest.raises(OSError):
            cut.sendall(b"more")
            if cut.recv(100) == b"":
                raise ConnectionResetError
        assert server.received == before
        assert echo(kept) == b"ping"


def test_traffic_survives_the_agent_which_takes_the_device_over(kernels: Rig) -> None:
    rig, a = kernels, kernels.hosts["a"]
    rig.apply(("web", "api", ports("tcp/8080")))
    with rig.server("api", 8080), rig.connect("web", "api", 8080, timeout=20) as sock:
        assert echo(sock) == b"ping"
        handshakes = a.ask("counters")["handshakes"]
        a.kill()
        assert echo(sock) == b"ping"
        with pytest.raises(ConnectionRefusedError):
            rig.connect("batch", "api", 8080, timeout=10)
        a.launch()
        assert a.ask("start").startswith("kernel: ")
        a.apply(rig.plan("a"))
        assert echo(sock) == b"ping"
        assert a.ask("counters")["handshakes"] == handshakes  # the session is the one from before
        assert a.ask("verify") == []


def test_a_device_deleted_by_hand_comes_back(kernels: Rig) -> None:
    rig, a = kernels, kernels.hosts["a"]
    rig.apply(("web", "api", ports("tcp/8080")))
    with rig.server("api", 8080):
        rig.connect("web", "api", 8080, timeout=20).close()
        run("ip", "-n", a.ns, "link", "del", a.interface)
        assert until(lambda: "device.restarted" in a.ask("events"), 30)
        assert until(lambda: _talks(rig), 30)
    assert kind(rig, "a") == "wireguard"


def _talks(rig: Rig) -> bool:
    try:
        with rig.connect("web", "api", 8080, timeout=2) as sock:
            return echo(sock) == b"ping"
    except OSError:
        return False


def test_the_kernel_and_the_engine_carry_one_policy_together(kernels: Rig) -> None:
    """Host b goes over to the userspace engine, with its key and port; a keeps the kernel."""
    rig, b = kernels, kernels.hosts["b"]
    b.finish()
    assert b.interface not in run("ip", "-n", b.ns, "-br", "link")
    assert run("ip", "netns", "exec", b.ns, "nft", "list", "ruleset") == ""
    b.launch("--device", "userspace")
    assert b.ask("start").startswith("userspace ")
    assert [kind(rig, host) for host in "ab"] == ["wireguard", "tun"]
    rig.apply(("web", "api", ports("tcp/8080")), ("api", "batch", ports("tcp/7000")))
    for family in (4, 6):
        with rig.server("api", 8080, family), rig.server("batch", 7000, family):
            for src, dst, port in (("web", "api", 8080), ("api", "batch", 7000)):
                with rig.connect(src, dst, port, family, timeout=20) as sock:
                    assert echo(sock) == b"ping"
            for src, dst, port in (("batch", "api", 8080), ("api", "web", 7000)):
                with pytest.raises(ConnectionRefusedError):
                    rig.connect(src, dst, port, family, timeout=10)
