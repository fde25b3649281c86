"""Policy on real packets: what is permitted passes, what is not does not arrive, on one host and between hosts."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.plane_rig import Rig, echo, inside, ports, program, until

pytestmark = pytest.mark.netns


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as built:
        yield built


@pytest.mark.parametrize("family", [4, 6])
def test_a_permitted_pair_talks_and_a_denied_one_delivers_nothing(rig: Rig, family: int) -> None:
    rig.family = family
    rig.apply(("web", "api", ports("tcp/8080", "udp/9000", "icmp")))
    tap = rig.tap("api")
    with rig.server("api", 8080, family) as server:
        for denied, port in (("batch", 8080), ("web", 8081)):
            with pytest.raises(ConnectionRefusedError):
                rig.connect(denied, "api", port, family)
        udp = rig.udp("batch", family=family)
        with contextlib.suppress(OSError):  # the answer to the first is the error of the second
            for _ in range(5):
                udp.sendto(b"no", (rig.address("api", family), 9000))
        assert list(tap.packets()) == []
        assert server.accepted == 0
        with rig.connect("web", "api", 8080, family) as sock:  # positive control
            assert echo(sock) == b"ping"
        assert list(tap.packets())
    for dst in ("web", "batch"):  # permission has a direction
        with pytest.raises(ConnectionRefusedError):
            rig.connect("api", dst, 8080, family)
    receiver, sender = rig.udp("api", 9000, family), rig.udp("web", 0, family)
    sender.sendto(b"hello", (rig.address("api", family), 9000))
    data, source = receiver.recvfrom(100)
    assert (data, source[0]) == (b"hello", rig.address("web", family))
    receiver.sendto(b"back", source)  # a reply needs no rule of its own
    assert sender.recv(100) == b"back"
    denied = {tuple(d[:4]) for d in rig.hosts["a"].ask("counters")["denied"]}
    assert (rig.address("batch", family), rig.address("api", family), "tcp", 8080) in denied
    assert (rig.address("batch", family), rig.address("api", family), "udp", 9000) in denied


@pytest.mark.parametrize("family", [4, 6])
def test_two_workloads_on_one_host_obey_policy_too(rig: Rig, family: int) -> None:
    rig.apply(("web", "batch", ports("tcp/7000")))
    tap = rig.tap("web")
    with rig.server("batch", 7000, family) as batch, rig.server("web", 7000, family) as web:
        with rig.connect("web", "batch", 7000, family) as sock:
            assert echo(sock) == b"ping"
        list(tap.packets())
        with pytest.raises(ConnectionRefusedError):
            rig.connect("batch", "web", 7000, family)
        with pytest.raises(ConnectionRefusedError):
            rig.connect("web", "batch", 7001, family)
        assert (batch.accepted, web.accepted) == (1, 0)
        # What reached web is the reset for its own refused packet, nothing of batch's.
        assert not any(rig.address("batch", family) in _source(p) for p in tap.packets() if _is_syn(p))


def _source(frame: bytes) -> str:
    if frame[12:14] == b"\x08\x00":
        return socket.inet_ntop(socket.AF_INET, frame[26:30])
    return socket.inet_ntop(socket.AF_INET6, frame[22:38])


def _is_syn(frame: bytes) -> bool:
    offset = 34 if frame[12:14] == b"\x08\x00" else 54
    return len(frame) > offset + 13 and frame[offset + 13] & 0x16 == 0x02


@pytest.mark.parametrize("family", [4, 6])
def test_taking_a_rule_away_cuts_what_is_open_and_nothing_else(rig: Rig, family: int) -> None:
    both = (("web", "api", ports("tcp/8080", "udp/9000")), ("batch", "api", ports("tcp/8080")))
    rig.apply(*both)
    with rig.server("api", 8080, family) as server:
        cut, kept = rig.connect("web", "api", 8080, family), rig.connect("batch", "api", 8080, family)
        receiver, sender = rig.udp("api", 9000, family), rig.udp("web", 0, family)
        assert echo(cut) == echo(kept) == b"ping"
        sender.sendto(b"one", (rig.address("api", family), 9000))
        assert receiver.recv(100) == b"one"
        before = server.received
        rig.apply(both[1])
        with pytest.raises(ConnectionResetError):  # told at once, rather than left to wait
            cut.sendall(b"more")
            cut.recv(100)
        with contextlib.suppress(OSError):
            for _ in range(3):
                sender.sendto(b"two", (rig.address("api", family), 9000))
        receiver.settimeout(0.2)
        with pytest.raises(TimeoutError):
            receiver.recv(100)
        assert server.received == before
        assert echo(kept) == b"ping"  # positive control: the other flow never noticed
        rig.apply(*both)
        with rig.connect("web", "api", 8080, family) as again:
            assert echo(again) == b"ping"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("between", [False, True])
def test_a_flow_the_other_way_on_the_same_ports_is_no_answer_to_the_one_that_was_cut(rig: Rig, family: int, between: bool) -> None:
    rig.apply(("web", "api", ports("udp/9000")))
    web, api = rig.udp("web", 9000, family), rig.udp("api", 9000, family)
    web.sendto(b"there", (rig.address("api", family), 9000))
    assert api.recv(100) == b"there"
    if between:
        rig.apply()  # nothing goes the other way yet, so what is tracked may be forgotten later
    rig.apply(("api", "web", ports("udp/9000")))
    api.sendto(b"and back", (rig.address("web", family), 9000))
    assert web.recv(100) == b"and back"
    web.sendto(b"an answer", (rig.address("api", family), 9000))
    assert api.recv(100) == b"an answer"


def test_the_answering_side_of_an_open_flow_is_cut_as_well(rig: Rig) -> None:
    rig.apply(("web", "api", ports("tcp/8080")))
    with rig.server("api", 8080) as server, rig.connect("web", "api", 8080) as sock:
        assert echo(sock) == b"ping"
        rig.apply(("batch", "api", ports("tcp/8080")))
        tap = rig.tap("web")
        assert until(lambda: bool(server._open))
        with contextlib.suppress(OSError):
            for _ in range(3):
                server._open[0].sendall(b"from the server")
        assert list(tap.packets()) == []


@pytest.mark.parametrize("family", [4, 6])
def test_wide_ranges_whole_protocols_and_exceptions(rig: Rig, family: int) -> None:
    rig.apply(("web", "api", (ports("any") - ports("tcp/8080", "icmp"))), ("batch", "api", ports("tcp/20000-30000", "udp")))
    address = rig.address("api", family)
    with rig.server("api", 8080, family), rig.server("api", 25000, family), rig.server("api", 30001, family):
        for src, port, passes in (("web", 8080, False), ("web", 25000, True), ("batch", 25000, True), ("batch", 30001, False),
                                  ("batch", 8080, False), ("web", 30001, True)):  # fmt: skip
            if passes:
                rig.connect(src, "api", port, family).close()
            else:
                with pytest.raises(ConnectionRefusedError):
                    rig.connect(src, "api", port, family)
    receiver, sender = rig.udp("api", 5, family), rig.udp("batch", 0, family)
    sender.sendto(b"x", (address, 5))
    assert receiver.recv(10) == b"x"
    assert not _ping(rig, "web", "api", family)
    rig.apply(("web", "api", ports("icmp")))
    assert _ping(rig, "web", "api", family)  # positive control
    assert not _ping(rig, "api", "web", family)  # permission to ping has a direction


def _ping(rig: Rig, src: str, dst: str, family: int) -> bool:
    """One echo request over a datagram ICMP socket."""

    def make() -> socket.socket:
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
        kind = socket.IPPROTO_ICMP if family == 4 else socket.IPPROTO_ICMPV6
        return socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM, kind)

    with inside(rig.workloads[src], make) as sock:
        sock.settimeout(0.3)
        try:
            sock.sendto(bytes([8 if family == 4 else 128, 0, 0, 0, 0, 0, 0, 1]), (rig.address(dst, family), 0))
            return sock.recv(100)[0] in {0, 129}
        except OSError:
            return False


def test_a_place_without_a_placement_gets_nothing(rig: Rig) -> None:
    del rig.where["web"]
    rig.apply(("web", "api", ports("tcp/8080")))
    with pytest.raises(OSError):
        rig.connect("web", "api", 8080)
    rig.where["web"] = "a"
    rig.apply()
    with rig.server("api", 8080), rig.connect("web", "api", 8080) as sock:
        assert echo(sock) == b"ping"
    del rig.where["web"]  # and it is withdrawn again
    rig.apply()
    with pytest.raises(OSError):
        rig.connect("web", "api", 8080)


def test_several_instances_may_share_a_namespace(rig: Rig) -> None:
    rig.workloads["edge"] = rig.workloads["web"]
    rig.where["edge"], rig.epochs["edge"] = "a", 1
    rig.attach("edge", "a")
    rig.apply(("web", "api", ports("tcp/8080")), ("edge", "api", ports("tcp/8081")))
    with rig.server("api", 8080), rig.server("api", 8081):
        for name, port, other in (("web", 8080, 8081), ("edge", 8081, 8080)):

            def make(name: str = name) -> socket.socket:
                sock = socket.socket()
                sock.bind((rig.address(name), 0))
                sock.settimeout(3)
                return sock

            with inside(rig.workloads["web"], make) as sock:
                sock.connect((rig.address("api"), port))
                assert echo(sock) == b"ping"
            with inside(rig.workloads["web"], make) as sock, pytest.raises(ConnectionRefusedError):
                sock.connect((rig.address("api"), other))
    del rig.workloads["edge"]


@pytest.mark.parametrize("family", [4, 6])
def test_a_member_whose_own_host_knows_less_is_answered_by_the_other_end(rig: Rig, family: int) -> None:
    rig.apply(("web", "api", ports("tcp/8080", "udp/9000")))
    with rig.server("api", 8080, family) as server:
        sock = rig.connect("web", "api", 8080, family)
        assert echo(sock) == b"ping"
        rig.program = program(("batch", "api", ports("tcp/8080")), ("web", "api", ports("icmp")))
        rig.hosts["b"].apply(rig.plan("b"))
        with pytest.raises(ConnectionResetError):
            echo(sock)
        with pytest.raises(ConnectionRefusedError):
            rig.connect("web", "api", 8080, family)
        assert (server.accepted, server.received) == (1, 4)
    denied = {tuple(d[:4]) for d in rig.hosts["b"].ask("counters")["denied"]}
    assert (rig.address("web", family), rig.address("api", family), "tcp", 8080) in denied


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("foreign", ["a", "b"])
def test_the_far_end_may_run_another_implementation(tmp_path: Path, foreign: str, family: int) -> None:
    rig = Rig(tmp_path)
    rig.hosts[foreign].engine = Path(shutil.which("wireguard-go") or "/nonexistent")
    rig.family = family
    with rig:
        rig.apply(("web", "api", ports("tcp/8080")))
        with rig.server("api", 8080, family), rig.connect("web", "api", 8080, family) as sock:
            assert echo(sock) == b"ping"


def test_ends_that_both_offer_aes_talk_and_go_on_when_one_stops_offering_it(rig: Rig) -> None:
    rig.offers = ["chacha20poly1305", "aes-256-gcm"]
    for offers in (rig.offers, ["chacha20poly1305"], rig.offers):
        rig.offers = offers
        rig.apply(("web", "api", ports("tcp/8080")))
        assert {p.cipher for p in rig.plan("a").peers.values()} == {offers[-1]}

        def talks() -> bool:
            try:
                with rig.server("api", 8080), rig.connect("web", "api", 8080, timeout=2) as sock:
                    return echo(sock) == b"ping"
            except OSError:
                return False

        assert until(talks, timeout=30)
