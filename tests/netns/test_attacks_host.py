"""A member host whose root is hostile: it holds a real enrolment and a tunnel, and sends what it likes into it.

    host-a: web, batch      host-b: api, db      host-m (hostile): mal
    web -> api tcp/8080 udp/9000 icmp permitted, mal -> api udp/7000, nothing else

host-m's agent is stopped, its firewall and rules are gone, and its engine sends everything to host-b.
"""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.lab_process import run
from tests.netns import attack_tools as at
from tests.netns.attack_tools import ACK, ICMP, ICMPV6, MARKER, RST, SYN, TCP, UDP, Box, Tap, emit, until

pytestmark = [pytest.mark.timeout(120)]

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, api, batch, mal, db]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: [tcp/8080, udp/9000, icmp]}
      - {id: mal-to-api, from: {role: mal}, to: {role: api}, on: udp/7000}
"""
OPEN = b"THE-PERMITTED-ONE"


def wg(node: Any, *lines: str) -> str:
    """Speak to an engine's socket as root there would."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(node.run_dir / "rtn0.sock"))
        sock.sendall(("\n".join(lines) + "\n\n").encode())
        said = b""
        while not said.endswith(b"\n\n"):
            data = sock.recv(65536)
            if not data:
                break
            said += data
    assert "errno=0" in said.decode(), said
    return said.decode()


@pytest.fixture(scope="module")
def field(make_mesh: Any) -> Iterator[Any]:
    mesh = make_mesh("host-a", "host-b", "host-m")
    for name, host in (("web", "host-a"), ("batch", "host-a"), ("api", "host-b"), ("db", "host-b"), ("mal", "host-m")):
        mesh.add(name, host)
    spaces = {n: mesh.place(n, h) for n, h in (("web", "host-a"), ("batch", "host-a"), ("api", "host-b"), ("db", "host-b"), ("mal", "host-m"))}
    mesh.apply(POLICY)
    lab = mesh.lab
    evil = lab.nodes["host-m"]
    warm(spaces["mal"], mesh.addresses["api"][0])
    lab.processes["agent-host-m"].send(signal.SIGSTOP)
    for words in (["nft", "flush", "ruleset"], ["ip", "rule", "flush"], ["ip", "-6", "rule", "flush"]):
        run(words, netns=evil.netns)
    for words in (["ip", "rule", "add", "lookup", "main"], ["ip", "-6", "rule", "add", "lookup", "main"]):
        run(words, netns=evil.netns)
    key = wg(evil, "get=1").split("public_key=")[1].split("\n")[0]
    wg(evil, "set=1", f"public_key={key}", "replace_allowed_ips=true", "allowed_ip=0.0.0.0/0", "allowed_ip=::/0")
    try:
        yield SimpleNamespace(mesh=mesh, lab=lab, evil=evil, b=lab.nodes["host-b"], a=lab.nodes["host-a"], spaces=spaces)
    finally:
        lab.processes["agent-host-m"].send(signal.SIGCONT)


def warm(space: str, to: str) -> None:
    """Any packet, so that the tunnel is up."""
    with contextlib.closing(at.sock_in(space, socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.sendto(b"warm", (to, 7000))


class Watch:
    """Everywhere a packet of host-m could come out: api's and db's device, host-b's sockets and other links, and host-a."""

    def __init__(self, field: Any, *, v6: bool) -> None:
        self.field, self.v6 = field, v6
        self.stack = contextlib.ExitStack()
        self.src, self.dst = (field.mesh.addresses[n][v6] for n in ("mal", "api"))
        keep = lambda thing: self.stack.enter_context(contextlib.closing(thing))
        self.taps = {
            "db": keep(Tap(field.spaces["db"], "rtn0")), "web": keep(Tap(field.spaces["web"], "rtn0")),
            "batch": keep(Tap(field.spaces["batch"], "rtn0")), "host-b eth0": keep(Tap(field.b.netns, "eth0", outgoing=True)),
            "host-b lo": keep(Tap(field.b.netns, "lo")),
        }  # fmt: skip
        self.api = keep(Tap(field.spaces["api"], "rtn0"))
        self.answers = keep(Tap(field.evil.netns, "rtn0"))  # what host-b says back through the tunnel
        self.boxes = [keep(Box(field.b.netns, port, v6=v6)) for port in (7000, 9000, 53)]
        self.server = keep(at.sock_in(field.b.netns, socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM))
        self.server.bind(("::" if v6 else "0.0.0.0", 8080))
        self.server.listen(8)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def control(self) -> bytes:
        return at.udp(self.src, self.dst, 1, 7000, OPEN)

    def send(self, packets: list[bytes], count: int = 2) -> None:
        """The attack, and then one permitted packet: when it is there, all before it have been decided."""
        assert emit(self.field.evil.netns, "rtn0", packets, count=count) == len(packets) * count
        frames: list[bytes] = []

        def arrived() -> bool:
            emit(self.field.evil.netns, "rtn0", [self.control()])
            frames.extend(self.api.frames())
            return any(OPEN in frame for frame in frames)

        assert until(arrived), "positive control: the permitted packet arrives the same way"
        self.frames = frames + list(self.api.frames())

    def nothing(self) -> None:
        assert [f for f in self.frames if MARKER in f] == []
        assert {name: tap.count() for name, tap in self.taps.items()} == dict.fromkeys(self.taps, 0)
        assert [d for box in self.boxes for d in box.got()] == []
        replies = [f for f in self.answers.frames() if f[9 if f[0] >> 4 == 4 else 6] == TCP]
        flags = {f[((f[0] & 15) * 4 if f[0] >> 4 == 4 else 40) + 13] & (SYN | RST) for f in replies}
        assert SYN not in flags, "no SYN-ACK came back"


@pytest.fixture(params=[False, True], ids=["v4", "v6"])
def watch(field: Any, request: pytest.FixtureRequest) -> Iterator[Watch]:
    with Watch(field, v6=request.param) as made:
        yield made


def addresses(watch: Watch) -> dict[str, str]:
    return {name: both[watch.v6] for name, both in watch.field.mesh.addresses.items()}


def test_foreign_sources_are_dropped(watch: Watch) -> None:
    """A24: other members', unknown members', the receiver's own, the underlay's and loopback addresses as inner source."""
    where = addresses(watch)
    dst = where["api"]
    claims = [where[n] for n in ("web", "batch", "db", "api")]
    claims += (["::1", watch.field.b.v6, watch.field.a.v6, "fe80::1", "::", "ff02::1", f"::ffff:{watch.field.mesh.addresses['web'][0]}"]
               if watch.v6 else ["127.0.0.1", watch.field.b.v4, watch.field.a.v4, "169.254.82.1", "0.0.0.0", "224.0.0.1"])  # fmt: skip
    packets = []
    for claimed in claims:
        packets += [at.udp(claimed, dst, 1, 7000), at.udp(claimed, dst, 1, 9000), at.tcp(claimed, dst, 1, 8080), at.echo(claimed, dst, 7)]
    watch.send(packets)
    watch.nothing()


def test_no_destination_but_the_permitted_one(watch: Watch) -> None:
    """The far host's own addresses, its loopback, its gateway, its neighbours, other members, everybody."""
    where, f = addresses(watch), watch.field
    targets = [where[n] for n in ("web", "batch", "db", "mal")]
    targets += (["::1", f.b.v6, f.a.v6, f.lab.nodes["ca"].v6, "fe80::1", "ff02::1", "ff02::2", "ff05::2", "::", f"::ffff:{f.mesh.addresses['api'][0]}",
                 f"64:ff9b::{f.b.v4}", "2002:c633:640b::1"]
                if watch.v6 else ["127.0.0.1", "127.1.2.3", f.b.v4, f.a.v4, f.lab.nodes["ca"].v4, "169.254.82.1", "224.0.0.1", "224.0.0.251",
                                  "255.255.255.255", "0.0.0.0", "198.51.100.255", "10.0.0.1"])  # fmt: skip
    packets = []
    for target in targets:
        for port in (7000, 9000, 53):
            packets.append(at.udp(watch.src, target, 1, port))
        packets += [at.tcp(watch.src, target, 7000, 8080), at.tcp(watch.src, target, 8080, 8443), at.echo(watch.src, target, 7)]
    watch.send(packets)
    watch.nothing()


def test_packets_shaped_like_answers_open_nothing(watch: Watch) -> None:
    where = addresses(watch)
    packets = []
    for dst in (where["api"], where["web"], where["db"]):
        for sport, dport in ((8080, 40000), (9000, 40000), (7000, 40000), (7000, 22), (8080, 8080)):
            packets += [at.tcp(watch.src, dst, sport, dport, flags) for flags in (ACK, SYN | ACK, RST, RST | ACK, 0x01 | ACK, 0, 0x3F)]
            packets.append(at.udp(watch.src, dst, sport, dport))
        packets += [at.echo(watch.src, dst, 7, reply=True), at.echo(watch.src, dst, 8)]
    watch.send(packets)
    watch.nothing()


def test_echo_permitted_one_way_is_not_permitted_back(field: Any) -> None:
    """A32: web may ping api. api's host sends echo requests with web's id, and replies nobody asked for."""
    for v6 in (False, True):
        web, api = (field.mesh.addresses[n][v6] for n in ("web", "api"))
        with contextlib.closing(Tap(field.spaces["web"], "rtn0")) as tap, contextlib.closing(Tap(field.spaces["api"], "rtn0")) as far:
            mac = {n: at.gateway_mac(field.spaces[n]) for n in ("web", "api")}
            forged = [at.echo(api, web, 77), at.echo(api, web, 78, reply=True)]
            seen: list[bytes] = []

            def asked(src: str = web, dst: str = api, tap: Tap = tap, seen: list[bytes] = seen, mac: dict[str, bytes] = mac) -> bool:
                emit(field.spaces["web"], "rtn0", [at.echo(src, dst, 77)], mac=mac["web"])
                seen.extend(tap.frames())
                return any(MARKER in frame for frame in seen)

            assert until(asked), "positive control: an answer to web's own echo request arrives"
            assert far.count() > 0
            for space, device, how in ((field.spaces["api"], "rtn0", mac["api"]), (field.b.netns, "rtn0", None)):
                emit(space, device, forged, mac=how, count=3)
            emit(field.spaces["web"], "rtn0", [at.icmp(web, api, (8, 128), 0, struct.pack("!HH", 79, 9), b"LAST")], mac=mac["web"])
            later: list[bytes] = []
            assert until(lambda later=later, tap=tap: later.extend(tap.frames()) or any(b"LAST" in x for x in later))
            head = 14 + (40 if v6 else 20)
            kinds = [(x[head], struct.unpack_from("!H", x, head + 4)[0]) for x in later if MARKER in x]
            assert all(k == (129 if v6 else 0, 77) for k in kinds), kinds


def test_icmp_errors_about_flows_of_others(watch: Watch) -> None:
    """A33: every error and redirect that quotes web's open flow, from a member that has nothing to do with it."""
    where = addresses(watch)
    web, api = where["web"], where["api"]
    packets = []
    for src, dst in ((web, api), (api, web)):
        for quoted in (at.udp(src, dst, 40000, 9000), at.tcp(src, dst, 40000, 8080)):
            for kind, code, rest in (((3, 1), 4, 68), ((3, 1), 1, 0), ((11, 3), 0, 0), ((12, 4), 0, 0), ((5, 137), 1, 0), ((3, 2), 4, 1280)):
                for target in (web, api):
                    packets.append(at.icmp(watch.src, target, kind, code, struct.pack("!I", rest), quoted))
    with contextlib.closing(at.sock_in(watch.field.spaces["web"], socket.AF_INET6 if watch.v6 else socket.AF_INET, socket.SOCK_DGRAM)) as flow:
        flow.bind((web, 40000))
        flow.sendto(b"open", (api, 9000))
        watch.send(packets)
        watch.nothing()
    for name in ("web", "api"):
        cached = run(["ip", *(["-6"] if watch.v6 else []), "route", "show", "cache"], netns=watch.field.spaces[name]).stdout
        assert "mtu" not in cached


def test_router_and_neighbour_messages(watch: Watch) -> None:
    """A34: advertisements, solicitations and redirects out of the tunnel change nothing at the far host or workload."""
    before = [run(["ip", "-6", "route"], netns=n).stdout + run(["ip", "-6", "addr"], netns=n).stdout for n in (watch.field.b.netns, watch.field.spaces["api"])]
    api = addresses(watch)["api"]
    packets = []
    if watch.v6:
        for target in ("ff02::1", "fe80::1", api):
            for src in ("fe80::1", watch.src):
                for kind in (133, 134, 135, 136, 137, 130, 143):
                    packets.append(at.icmp(src, target, (0, kind), 0, b"\x40\x80\xff\xff", bytes(8) + MARKER))
    else:
        packets += [at.ip(watch.src, target, 2, b"\x11\0\xee\xfe\0\0\0\0" + MARKER) for target in ("224.0.0.1", api)]  # IGMP
        packets += [at.icmp(watch.src, api, (kind, 0), 0, bytes(4)) for kind in (9, 10, 13, 15, 17, 5)]
    watch.send(packets)
    watch.nothing()
    after = [run(["ip", "-6", "route"], netns=n).stdout + run(["ip", "-6", "addr"], netns=n).stdout for n in (watch.field.b.netns, watch.field.spaces["api"])]
    assert after == before


def test_fragments(watch: Watch) -> None:
    """A31: tiny heads, overlaps that rewrite the port, tails alone, heads of other protocols. A decent one passes."""
    src, dst = watch.src, watch.dst
    ok, bad = (at.udp_body(src, dst, 1, port, MARKER + bytes(59)) for port in (7000, 9999))
    syn = at.tcp_body(src, dst, 1, 8080, SYN, bytes(12))
    attacks: list[list[bytes]] = []

    def attack(proto: int, *pieces: tuple[int, bool, bytes]) -> None:
        attacks.append(at.fragments(src, dst, proto, pieces, random.Random(len(attacks)).getrandbits(16)))

    attack(UDP, (0, True, bad[:8]), (8, False, bad[8:]))  # the head alone, of a port that is not permitted
    attack(UDP, (0, True, ok[:8]), (0, True, bad[:8]), (8, False, ok[8:]))  # the head twice
    attack(UDP, (8, False, ok[8:]), (0, True, ok[:16]), (0, True, bad[:8]))  # overlap, out of order
    attack(UDP, (0, True, ok[:40]), (8, True, bad[8:40]), (40, False, ok[40:]))  # overlap behind the head
    attack(TCP, (0, True, syn[:8]), (8, False, syn[8:]))  # flags in the second fragment
    attack(TCP, (0, True, syn[:16]), (8, False, syn[8:]))
    attack(UDP, (64, False, ok[64:]))  # a tail alone
    attack(UDP, (8, False, ok[8:]))
    attack(UDP, (65528, False, ok[:64]))  # longer than a packet can be
    attack(ICMP if not watch.v6 else ICMPV6, (0, True, ok[:8]), (8, False, ok[8:]))
    attack(0 if watch.v6 else 4, (0, True, bytes(8)), (8, False, MARKER + bytes(3)))
    flat = [piece for one in attacks for piece in one]
    with contextlib.closing(Box(watch.field.spaces["api"], 9999, v6=watch.v6)) as closed:
        watch.send(flat, count=1)
        assert closed.got() == []
    # The kernel fragments again what it put together: heads tell the port, and no other protocol is there.
    for frame in (x for x in watch.frames if MARKER in x or bytes(12) in x):
        head = frame[14:]
        if watch.v6:
            proto, offset, body = (head[40], struct.unpack_from("!H", head, 42)[0] & ~7, head[48:]) if head[6] == 44 else (head[6], 0, head[40:])
        else:
            proto, offset, body = head[9], (struct.unpack_from("!H", head, 6)[0] & 0x1FFF) * 8, head[20:]
        assert proto == UDP
        assert offset or struct.unpack_from("!H", body, 2)[0] == 7000
    assert {n: t.count() for n, t in watch.taps.items()} == dict.fromkeys(watch.taps, 0)
    # Positive control: a datagram in decent fragments arrives, in any order.
    whole = at.udp_body(src, dst, 1, 7000, b"DECENT" + bytes(2042))
    pieces = at.fragments(src, dst, UDP, [(1024, False, whole[1024:]), (0, True, whole[:1024])], 4242)
    emit(watch.field.evil.netns, "rtn0", pieces)
    got: list[bytes] = []
    assert until(lambda: got.extend(watch.api.frames()) or any(b"DECENT" in x for x in got))


def test_protocols_and_headers_before_the_port(watch: Watch) -> None:
    """A29, A30: the port that counts is that of the real transport header; wrapped packets are their own protocol."""
    src, dst = watch.src, watch.dst
    inner = at.udp(src, dst, 1, 7000)
    bare = at.udp_body(src, dst, 1, 7000)
    packets = [at.ip(src, dst, proto, bare) for proto in (0, 4, 41, 47, 50, 51, 94, 115, 132, 136, 33, 255, TCP)]
    packets += [at.ip(src, dst, proto, inner) for proto in (4, 41, 47)]
    if watch.v6:
        pad = b"\x01\x04\0\0\0\0"  # PadN
        for port in (9999, 22):
            body = at.udp_body(src, dst, 7000, port)
            packets += [
                at.ip(src, dst, 60, bytes([UDP, 0]) + pad + body),
                at.ip(src, dst, 0, bytes([60, 0]) + pad + bytes([UDP, 0]) + pad + body),
                at.ip(src, dst, 43, bytes([UDP, 2, 0, 1]) + bytes(4) + bytes(16) + body),  # routing type 0
                at.ip(src, dst, 51, bytes([UDP, 1, 0x1B, 0x58]) + bytes(8) + body),  # an AH whose "port" is 7000
                at.ip(src, dst, 135, bytes([UDP, 0]) + pad + body),
                at.ip(src, dst, 60, bytes([60, 0]) + pad + b"".join([bytes([60, 0]) + pad] * 40) + bytes([UDP, 0]) + pad + body),
                at.ip(src, dst, 60, bytes([UDP, 255]) + pad + body),  # longer than the packet
                at.ip(src, dst, 59, body),
                at.ip(src, dst, 60, bytes([UDP, 0, 0x1B, 0x58, 0, 0, 0, 0]) + body),
            ]  # fmt: skip
    else:
        for port in (9999, 22):
            body = at.udp_body(src, dst, 7000, port)
            packets += [
                at.ip(src, dst, UDP, body, options=bytes([131, 7, 4]) + at.ip_address(dst).packed + b"\0"),  # LSRR
                at.ip(src, dst, UDP, body, options=b"\x94\x04\0\0"),  # router alert
                at.ip(src, dst, UDP, body, options=struct.pack("!HH", 1, 7000) * 2),
                at.ip(src, dst, 51, bytes([UDP, 1, 0x1B, 0x58]) + bytes(8) + body),
            ]  # fmt: skip
        short = bytearray(at.udp(src, dst, 1, 9999))
        for first in (0x41, 0x4F, 0x55, 0x65):
            packets.append(bytes([first]) + bytes(short[1:]))
    watch.send(packets)
    watch.nothing()


def test_truncated_and_random_packets(watch: Watch) -> None:
    """Every truncation of packets that are not permitted, and noise behind a valid IP header."""
    dice = random.Random(11)
    whole = [at.udp(watch.src, watch.dst, 7000, 9999), at.tcp(watch.src, watch.dst, 7000, 8080)]
    packets = [p[:n] for p in whole for n in range(1, len(p))]
    for _ in range(400):
        # Whatever the protocol number is, a UDP packet to port 7000 would be permitted: none is made by chance.
        proto = dice.choice([n for n in range(256) if n not in {UDP, 0, 43, 44, 60, 135, 139, 140}])
        packets.append(at.ip(watch.src, watch.dst, proto, dice.randbytes(dice.randrange(0, 60)) + MARKER))
    watch.send([p for p in packets if p], count=1)
    watch.nothing()
    assert run(["ip", "-d", "link", "show", "rtn0"], netns=watch.field.b.netns).returncode == 0
