"""Instances that move between hosts, and identities held by a host itself."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.plane_rig import Rig, Server, echo, inside, ports, until

pytestmark = pytest.mark.netns


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, "abc") as built:
        yield built


def drain(sock: socket.socket) -> list[bytes]:
    sock.settimeout(0.3)
    got = []
    with contextlib.suppress(TimeoutError):
        while True:
            got.append(sock.recv(100))
    return got


@pytest.mark.parametrize("family", [4, 6])
def test_a_move_takes_the_address_along_and_the_old_place_is_refused(rig: Rig, family: int) -> None:
    rig.apply(("web", "api", ports("udp/9000")), ("api", "web", ports("udp/9100")))
    old_place, new_place = rig.workloads["api"], rig.namespace("api-new")
    web_out, web_in = rig.udp("web", 0, family), rig.udp("web", 9100, family)
    old = rig.udp("api", 9000, family)
    to_api, to_web = (rig.address("api", family), 9000), (rig.address("web", family), 9100)
    web_out.sendto(b"before", to_api)
    old.sendto(b"old", to_web)
    assert (old.recv(100), web_in.recv(100)) == (b"before", b"old")

    rig.attach("api", "c", new_place)
    assert rig.hosts["c"].apply(rig.plan("c"))["failed"] == {}
    with pytest.raises(OSError):  # waiting: no address yet
        rig.udp("api", 9000, family, at=new_place)
    rig.prepares["api"] = ("c", 2)
    rig.apply()
    new, tap = rig.udp("api", 9000, family, at=new_place), rig.tap("api", at=new_place)
    new_key = rig.hosts["c"].tunnel_key
    assert until(lambda: rig.hosts["a"].ask("counters")["handshakes"][new_key] is not None)  # warm
    assert rig.hosts["a"].ask("counters")["allowed"][new_key] == []
    web_out.sendto(b"still", to_api)
    for _ in range(3):
        with contextlib.suppress(OSError):
            new.sendto(b"too early", to_web)
    assert old.recv(100) == b"still"
    assert drain(web_in) == []
    assert list(tap.packets()) == []

    rig.prepares.clear()
    rig.where["api"], rig.epochs["api"] = "c", 2
    for host in "ac":  # b, which lost it, has not heard of it yet
        rig.hosts[host].apply(rig.plan(host))
    web_out.sendto(b"after", to_api)
    assert new.recv(100) == b"after"
    new.sendto(b"new", to_web)
    assert web_in.recv(100) == b"new"
    for _ in range(3):
        old.sendto(b"stale", to_web)
    assert drain(web_in) == []
    assert drain(old) == []
    rig.hosts["b"].apply(rig.plan("b"))
    with pytest.raises(OSError):
        rig.udp("api", 1, family, at=old_place)  # the address is gone from there
    web_out.sendto(b"settled", to_api)
    assert new.recv(100) == b"settled"


def test_a_move_within_reach_of_a_local_peer_switches_from_tunnel_to_link(rig: Rig) -> None:
    rig.apply(("web", "api", ports("tcp/8080")), ("batch", "web", ports("tcp/1")))
    new_place = rig.namespace("api-new")
    rig.attach("api", "a", new_place)
    rig.prepares["api"] = ("a", 2)
    rig.apply()
    with Server(new_place, rig.address("api"), 8080) as prepared, rig.server("api", 8080) as active:
        with rig.connect("web", "api", 8080) as sock:
            assert echo(sock) == b"ping"
        assert (active.accepted, prepared.accepted) == (1, 0)  # until the commit the old one serves, also its neighbours
        rig.prepares.clear()
        rig.where["api"], rig.epochs["api"] = "a", 2
        rig.apply()
        with rig.connect("web", "api", 8080) as sock:
            assert echo(sock) == b"ping"
        assert (active.accepted, prepared.accepted) == (1, 1)
        with pytest.raises(ConnectionRefusedError):
            rig.connect("batch", "api", 8080)


@pytest.mark.parametrize("family", [4, 6])
def test_a_host_that_holds_an_identity_itself(rig: Rig, family: int) -> None:
    """As a sidecar does: kind host on both ends, and a neighbour in a namespace of the same host."""
    del rig.hosts["b"].attachments["api/0"]
    rig.attach("api", "b", "")
    rig.workloads["side"] = rig.hosts["c"].ns
    rig.where["side"], rig.epochs["side"] = "c", 1
    rig.attach("side", "c", "")
    near = rig.namespace("near")
    rig.workloads["near"] = near
    rig.where["near"], rig.epochs["near"] = "b", 1
    rig.attach("near", "b", near)
    rig.workloads["api"] = rig.hosts["b"].ns
    rig.apply(("side", "api", ports("tcp/8080")), ("api", "near", ports("tcp/8080")), ("near", "api", ports("tcp/8081")))

    def plain(src: str, dst: str, port: int) -> socket.socket:
        """Connect without naming a source address: routing has to choose it."""
        make = lambda: socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
        sock = rig.closing.enter_context(inside(rig.workloads[src], make))
        sock.settimeout(3)
        sock.connect((rig.address(dst, family), port))
        return sock

    with (
        rig.server("api", 8080, family) as api, rig.server("api", 8081, family), rig.server("near", 8080, family),
        rig.server("side", 8080, family) as side,
    ):  # fmt: skip
        sock = plain("side", "api", 8080)
        assert echo(sock) == b"ping"
        assert sock.getsockname()[0] == rig.address("side", family)
        assert echo(plain("api", "near", 8080)) == b"ping"
        assert echo(plain("near", "api", 8081)) == b"ping"
        assert echo(plain("api", "api", 8080)) == b"ping"  # itself
        for src, dst, port in (("side", "api", 8081), ("api", "side", 8080), ("api", "near", 8081), ("near", "api", 8080),
                               ("side", "near", 8080), ("side", "web", 8080)):  # fmt: skip
            with pytest.raises(OSError) as refused:
                plain(src, dst, port)
            assert not isinstance(refused.value, TimeoutError), (src, dst, port)
        assert side.accepted == 0
        accepted = api.accepted
        # Flushed on both ends, the flow that was open stands still.
        for name in "bc":
            rig.hosts[name].kill()
            subprocess.run(["ip", "netns", "exec", rig.hosts[name].ns, "nft", "flush", "ruleset"], check=True)
        received = api.received
        sock.settimeout(0.5)
        sock.sendall(b"more")
        with pytest.raises(TimeoutError):
            sock.recv(10)
        assert (api.received, api.accepted) == (received, accepted)
