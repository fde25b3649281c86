"""The live engine under attack from the network and on its control socket.

Nothing forged or recorded is delivered, not a byte is sent in answer, nothing crashes, and the tunnel works afterwards.
RETINUE_ATTACKS=1000000 is the full run (`make attacks`); CI plays a tenth of it.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2s
from pathlib import Path

import pytest

from tests.netns.engine_rig import (
    OURS,
    PORT,
    End,
    Site,
    run,
    shim,
    site,
    transfers,
    uapi_ask,
    udp_socket,
    until,
)

pytestmark = [pytest.mark.netns, pytest.mark.timeout(900)]

MUTATED = int(os.environ.get("RETINUE_ATTACKS", "100000"))
REPLAYED = max(10_000, MUTATED // 100)
REQUESTS = 10_000
INITIATION, RESPONSE, COOKIE, DATA = 1, 2, 3, 4


@dataclass
class Tap:
    """Between the ends: A's endpoint is the tap, which hands on and records what A sends; B answers to the tap."""

    victim: End
    peer: End
    sockets: list[socket.socket]
    """v4, v6 towards the victim, bound to fixed ports."""
    recorded: list[bytes] = field(default_factory=list)
    held: list[bytes] = field(default_factory=list)
    hold: bool = False
    stop: bool = False
    family: int = 0


def relay(tap: Tap, side: list[socket.socket]) -> None:
    """Until told to stop: A -> tap -> B and back, on the family in use."""
    where: list[tuple[str, int] | None] = [None, None]
    while not tap.stop:
        ready, _, _ = select.select([*side, *tap.sockets], [], [], 0.05)
        for s in ready:
            data, origin = s.recvfrom(65536)
            if s in side:
                family = side.index(s)
                where[family] = origin
                tap.recorded.append(data)
                if tap.hold:
                    tap.held.append(data)
                else:
                    tap.sockets[family].sendto(data, (tap.victim.underlay[family], PORT))
            elif (back := where[tap.sockets.index(s)]) is not None:
                side[tap.sockets.index(s)].sendto(data, back)


def sent_by(end: End) -> tuple[int, int]:
    """UDP datagrams this namespace ever sent over IPv4 and IPv6: what an answer would count."""
    proc = Path(f"/proc/{end.process.pid}/net")
    v4 = [line.split() for line in (proc / "snmp").read_text().splitlines() if line.startswith("Udp:")]
    v6 = dict(line.split() for line in (proc / "snmp6").read_text().splitlines())
    return int(v4[1][v4[0].index("OutDatagrams")]), int(v6["Udp6OutDatagrams"])


def dropped_in(end: End) -> int:
    """Datagrams the kernel dropped before the engine saw them: full buffers would make the attack easy to survive."""
    proc = Path(f"/proc/{end.process.pid}/net")
    v4 = [line.split() for line in (proc / "snmp").read_text().splitlines() if line.startswith("Udp:")]
    v6 = dict(line.split() for line in (proc / "snmp6").read_text().splitlines())
    return int(v4[1][v4[0].index("RcvbufErrors")]) + int(v6["Udp6RcvbufErrors"])


def queue_of(end: End) -> int:
    """Bytes waiting in the receive buffers of the engine's sockets."""
    proc = Path(f"/proc/{end.process.pid}/net")
    lines = [line.split() for name in ("udp", "udp6") for line in (proc / name).read_text().splitlines()[1:]]
    return sum(int(f[4].split(":")[1], 16) for f in lines if f[1].endswith(f":{PORT:04X}"))


@dataclass
class Stage:
    site: Site
    tap: Tap
    a: End
    b: End
    sink: socket.socket
    """Inner UDP on the victim: everything that is delivered arrives here."""
    thread: threading.Thread

    def delivered(self) -> list[bytes]:
        got = []
        self.sink.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                got.append(self.sink.recv(65536))
        return got

    def say(self, text: bytes) -> None:
        """A sends one inner datagram to the sink."""
        s = udp_socket(self.a.name, self.a.tunnel[0])
        s.sendto(text, (self.b.tunnel[0], 7000))
        s.close()

    def arrives(self, text: bytes) -> None:
        got: list[bytes] = []

        def there() -> bool:
            self.say(text)
            got.extend(self.delivered())
            return text in got

        until(there, f"{text!r} never arrived: {got}", 30)
        time.sleep(0.1)
        self.delivered()

    def quiet(self) -> None:
        """Leave the victim without a timer: it sent data (no keepalive due), and heard a keepalive since (no rekey due)."""
        back = udp_socket(self.a.name, self.a.tunnel[0], 7001)
        s = udp_socket(self.b.name, self.b.tunnel[0])
        back.settimeout(10)
        s.sendto(b"quiet", (self.a.tunnel[0], 7001))
        assert back.recv(100) == b"quiet"
        back.close()
        s.close()
        seen = transfers(self.b)[0]
        self.a.wg("peer", self.b.public, "persistent-keepalive", "1000")
        until(lambda: transfers(self.b)[0] >= seen + 32, "no keepalive came")
        self.a.wg("peer", self.b.public, "persistent-keepalive", "off")
        # A is not to speak by itself any more: its own keepalive may be due, and then B's counters move. It is stopped.
        self.a.process.send_signal(19)

    def awake(self) -> None:
        self.a.process.send_signal(18)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with site(tmp_path) as s:
        spaces = [s.space(word) for word in "aeb"]
        s.link(spaces[0], spaces[1], ("u0", "ua"))
        s.link(spaces[1], spaces[2], ("ub", "u0"))
        s.address(spaces[0], "u0", "10.97.0.1/24", "fd97::1/64")
        s.address(spaces[1], "ua", "10.97.0.9/24", "fd97::9/64")
        s.address(spaces[1], "ub", "10.99.0.9/24", "fd99::9/64")
        s.address(spaces[2], "u0", "10.99.0.2/24", "fd99::2/64")
        # What the victim's kernel would say by itself is no answer of the engine, but is not to be confused with one.
        a, b = s.end(spaces[0], 1, OURS), s.end(spaces[2], 2, OURS)
        side = [udp_socket(spaces[1], "10.97.0.9", PORT), udp_socket(spaces[1], "fd97::9", PORT)]
        front = [udp_socket(spaces[1], "10.99.0.9", 4000), udp_socket(spaces[1], "fd99::9", 4000)]
        psk = s.secret(run("wg", "genpsk").strip())
        a.wg("peer", b.public, "preshared-key", str(psk), "endpoint", f"10.97.0.9:{PORT}", "allowed-ips", ",".join(b.tunnel))
        b.wg("peer", a.public, "preshared-key", str(psk), "allowed-ips", ",".join(a.tunnel))
        for end in (a, b):
            s.up(end)
        tap = Tap(b, a, front)
        sink = udp_socket(b.name, b.tunnel[0], 7000)
        thread = threading.Thread(target=relay, args=(tap, side))
        thread.start()
        try:
            yield Stage(s, tap, a, b, sink, thread)
        finally:
            with contextlib.suppress(ProcessLookupError):
                a.process.send_signal(18)
            tap.stop = True
            thread.join()
            for x in (*side, *front, sink):
                x.close()


def material(stage: Stage) -> list[bytes]:
    """Genuine datagrams, delivered and never delivered, of two sessions and over both families."""
    for n in range(20):
        stage.arrives(b"first %d" % n) if n == 0 else stage.say(b"first %d" % n)
    stage.a.wg("peer", stage.b.public, "endpoint", f"[fd97::9]:{PORT}")
    stage.arrives(b"over IPv6")
    stage.a.wg("peer", stage.b.public, "endpoint", f"10.97.0.9:{PORT}")
    stage.arrives(b"and back")
    # A session of its own for later, by a changed preshared key: replays then cross a rekey.
    psk = stage.site.secret(run("wg", "genpsk").strip())
    stage.b.wg("peer", stage.a.public, "remove")
    stage.b.wg("peer", stage.a.public, "preshared-key", str(psk), "allowed-ips", ",".join(stage.a.tunnel))
    stage.a.wg("peer", stage.b.public, "remove")
    stage.a.wg("peer", stage.b.public, "preshared-key", str(psk), "endpoint", f"10.97.0.9:{PORT}",
               "allowed-ips", ",".join(stage.b.tunnel))  # fmt: skip
    stage.arrives(b"second session")
    recorded = list(stage.tap.recorded)
    assert {d[0] for d in recorded} >= {INITIATION, DATA}
    return recorded


def quietly(stage: Stage, datagrams: Iterator[tuple[int, bytes]], why: str) -> int:
    """Send these to the victim over (family, bytes) from many ports; it must neither deliver nor answer."""
    space, victim = stage.site.spaces[1], stage.b
    ports = [[udp_socket(space, address) for _ in range(20)] for address in ("10.99.0.9", "fd99::9")]
    # The peer's own address and port as well: what looks like it comes from the right place.
    for family, s in enumerate(stage.tap.sockets):
        ports[family].append(s)
    targets = [(victim.underlay[0], PORT), (victim.underlay[1], PORT)]
    before, told, lost = sent_by(victim), victim.show("transfer"), dropped_in(victim)
    where = victim.show("endpoints")
    sent = 0
    for family, data in datagrams:
        ports[family][sent % 21].sendto(data, targets[family])
        sent += 1
        if sent % 256 == 0:
            # What the kernel drops before the engine sees it would prove nothing.
            until(lambda: queue_of(victim) < 1 << 20, "the engine does not read its sockets")
    # Everything sent has been worked off when a packet sent afterwards has been: the socket is a queue.
    until(lambda: queue_of(victim) == 0, "the engine does not read its sockets")
    time.sleep(0.2)
    assert victim.process.poll() is None, f"{why}: the engine crashed"
    assert stage.delivered() == [], f"{why}: delivered"
    assert sent_by(victim) == before, f"{why}: answered"
    after = victim.show("transfer")
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in told.items()}
    assert victim.show("endpoints") == where, f"{why}: the peer was moved"
    for group in ports:
        for s in group[:20]:
            s.setblocking(False)
            with pytest.raises(BlockingIOError):
                s.recv(1)
            s.close()
    assert dropped_in(victim) == lost, f"{why}: the kernel dropped some, which proves nothing"
    return sent


def mutations(recorded: list[bytes], count: int, public: bytes) -> Iterator[tuple[int, bytes]]:
    rng = random.Random(7)
    known = set(recorded)
    made = 0
    mac1_key = blake2s(b"mac1----" + public).digest()
    while made < count:
        data = bytearray(rng.choice(recorded))
        match rng.randrange(8):
            case 0:
                del data[rng.randrange(len(data)) :]
            case 1:
                data += rng.randbytes(rng.randrange(1, 64))
            case 2:
                data = bytearray(rng.randbytes(rng.randrange(1, 200)))
            case 3 if len(data) >= 16:
                data[8:16] = rng.choice([0, 1, 2**64 - 1, 2**63, 2**64 - 2**13, rng.getrandbits(64)]).to_bytes(8, "little")
            case 4:
                data[0] = rng.choice([0, 1, 2, 3, 4, 5, 255])
            case _:
                pass
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        # Some know the public key and make mac1 right: few, for under load those may be asked for a cookie.
        if made % 500 == 0 and len(data) == 148 and data[:4] == b"\x01\0\0\0":
            data[116:132] = blake2s(bytes(data[:116]), digest_size=16, key=mac1_key).digest()
            data[132:] = bytes(16)
            if bytes(data[8:116]) in {d[8:116] for d in recorded if d[0] == INITIATION}:
                continue
        if not data or bytes(data) in known:
            continue
        yield made % 2, bytes(data)
        made += 1


def test_mutated_and_replayed_datagrams_get_nothing(stage: Stage) -> None:
    recorded = material(stage)
    stage.quiet()
    started = time.monotonic()
    sent = quietly(stage, mutations(recorded, MUTATED, unhex_public(stage.b)), "mutated")
    middle = time.monotonic()
    rng = random.Random(3)
    replayed = quietly(stage, ((n % 2, rng.choice(recorded)) for n in range(REPLAYED)), "replayed")
    print(f"{sent} mutated in {middle - started:.1f} s, {replayed} replayed in {time.monotonic() - middle:.1f} s: "
          "0 delivered, 0 answered, 0 crashes")  # fmt: skip
    stage.awake()
    stage.arrives(b"still here")


def unhex_public(end: End) -> bytes:
    return base64.b64decode(end.public)


def odd(recorded: list[bytes]) -> Iterator[tuple[int, bytes]]:
    newest = next(d for d in reversed(recorded) if d[0] == DATA)
    counter = int.from_bytes(newest[8:16], "little")
    for c in (0, 1, 2**64 - 1, 2**64 - 2, 2**63, counter + 2**63, counter ^ 2**63, 2**64 - 2**13, 2**64 - 2**13 - 1):
        data = newest[:8] + (c % 2**64).to_bytes(8, "little") + newest[16:]
        yield from ((f, data) for f in (0, 1) if data not in recorded)
    seeds = [next(d for d in recorded if d[0] == kind) for kind in (INITIATION, DATA)]
    for seed in seeds:
        for kind in (0, 5, 6, 127, 128, 254, 255):
            yield from ((f, bytes([kind]) + seed[1:]) for f in (0, 1))
        for reserved in (1, 2, 3):
            yield from ((f, seed[:reserved] + b"\1" + seed[reserved + 1 :]) for f in (0, 1))
        for length in range(len(seed)):
            yield from ((f, seed[:length]) for f in (0, 1))
        for length in (1500, 9000, 65507):
            yield from ((f, seed + bytes(length - len(seed))) for f in (0, 1))
            yield from ((f, seed[:16] + os.urandom(length - 16)) for f in (0, 1))


def test_odd_counters_types_truncations_and_sizes_get_nothing(stage: Stage) -> None:
    recorded = material(stage)
    stage.quiet()
    assert quietly(stage, odd(recorded), "odd") > 500
    stage.awake()
    stage.arrives(b"still here")


def test_recorded_packets_stay_dead_when_the_peer_starts_anew(stage: Stage) -> None:
    """The peer's engine is killed and started again with the same key; all it ever said is said again."""
    recorded = material(stage)
    stage.a.process.kill()
    stage.a.process.wait()
    again = stage.site.end(stage.a.name, 1, OURS)
    again.wg("private-key", str(stage.site.secret(stage.a.private)))
    psk = stage.site.secret(stage.b.show("preshared-keys")[stage.a.public][0])
    again.wg("peer", stage.b.public, "preshared-key", str(psk), "endpoint", f"10.97.0.9:{PORT}", "allowed-ips", ",".join(stage.b.tunnel))
    again.private, again.public = stage.a.private, stage.a.public
    stage.site.up(again)
    stage.a = again
    stage.arrives(b"anew")
    stage.quiet()
    quietly(stage, ((n % 2, d) for n, d in enumerate(recorded * 5)), "replayed after a restart")
    stage.awake()
    stage.arrives(b"still here")


def test_one_initiation_from_the_future_locks_nobody_out(stage: Stage) -> None:
    """The peer's clock is ten years ahead for one handshake (CVE-2021-46873); its initiation is replayed ever after."""
    stage.arrives(b"before")
    stage.a.process.kill()
    stage.a.process.wait()
    psk = stage.site.secret(stage.b.show("preshared-keys")[stage.a.public][0])

    def start(wall_seconds: int) -> End:
        end = stage.site.end(stage.a.name, 1, OURS, env=shim(wall_seconds=wall_seconds))
        end.wg("private-key", str(stage.site.secret(stage.a.private)))
        end.wg("peer", stage.b.public, "preshared-key", str(psk), "endpoint", f"10.97.0.9:{PORT}",
               "allowed-ips", ",".join(stage.b.tunnel))  # fmt: skip
        end.private, end.public = stage.a.private, stage.a.public
        stage.site.up(end)
        return end

    stage.tap.recorded.clear()
    stage.a = start(315_360_000)
    stage.arrives(b"from the future")
    jumped = next(d for d in stage.tap.recorded if d[0] == INITIATION)
    stage.a.process.kill()
    stage.a.process.wait()
    stage.a = start(0)
    attacker = udp_socket(stage.site.spaces[1], "10.99.0.9")
    stopped = threading.Event()

    def replay() -> None:
        while not stopped.wait(0.05):
            attacker.sendto(jumped, (stage.b.underlay[0], PORT))

    thread = threading.Thread(target=replay)
    thread.start()
    try:
        stage.arrives(b"the clock is right again")
        attacker.setblocking(False)
        with pytest.raises(BlockingIOError):
            attacker.recv(1)
    finally:
        stopped.set()
        thread.join()
        attacker.close()


def test_a_flood_with_valid_macs_costs_less_than_it_sends_and_stops_nobody(stage: Stage) -> None:
    """A stranger who knows the public key: it gets cookies at most; the peer's traffic and its handshakes go on."""
    stage.arrives(b"before")
    stage.tap.recorded.clear()
    mac1_key = blake2s(b"mac1----" + unhex_public(stage.b)).digest()
    stopped = threading.Event()
    tally = [0, 0]
    kinds: set[int] = set()
    sockets = [udp_socket(stage.site.spaces[1], "10.99.0.9") for _ in range(50)]

    def flood() -> None:
        rng = random.Random(1)
        while not stopped.is_set():
            for s in sockets:
                body = b"\x01\0\0\0" + rng.randbytes(112)
                s.sendto(body + blake2s(body, digest_size=16, key=mac1_key).digest() + bytes(16), (stage.b.underlay[0], PORT))
                tally[0] += 148
                with contextlib.suppress(BlockingIOError):
                    answer = s.recv(2000, socket.MSG_DONTWAIT)
                    tally[1] += len(answer)
                    kinds.add(answer[0])

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        until(lambda: tally[0] > 148 * 5000, "no flood")
        stage.arrives(b"data goes through")
        # A fresh peer device must handshake in the middle of it.
        stage.a.wg("private-key", str(stage.site.secret(stage.a.private)))
        stage.a.wg("peer", stage.b.public, "remove")
        psk = stage.site.secret(stage.b.show("preshared-keys")[stage.a.public][0])
        stage.a.wg("peer", stage.b.public, "preshared-key", str(psk), "endpoint", f"10.97.0.9:{PORT}",
                   "allowed-ips", ",".join(stage.b.tunnel))  # fmt: skip
        stage.arrives(b"and so do handshakes")
    finally:
        stopped.set()
        thread.join()
        for s in sockets:
            s.close()
    assert kinds <= {COOKIE}
    assert tally[1] < tally[0] / 2
    print(f"flood: {tally[0] // 148} initiations, {tally[1]} bytes of cookies for {tally[0]} bytes")


# ---- the control socket

KEYS = ["private_key", "listen_port", "fwmark", "replace_peers", "public_key", "remove", "update_only", "preshared_key", "endpoint",
        "persistent_keepalive_interval", "replace_allowed_ips", "allowed_ip", "protocol_version", "retinue_cipher", "errno",
        "nonsense", "", "set", "get", "listen_port "]  # fmt: skip


def bad_requests(rng: random.Random, key: str) -> Iterator[bytes]:
    """Requests each of which holds at least one line that no device may accept, after lines that are fine."""
    wrong = [
        b"listen_port=65536", b"listen_port=-1", b"listen_port=+1", b"listen_port=", b"listen_port=1e3", b"private_key=00",
        b"private_key=" + b"g" * 64, b"fwmark=0x", b"fwmark=4294967296", b"replace_peers=false", b"nonsense=1", b"listen_port",
        b"=", b"\xff\xfe", b"public_key=" + b"0" * 63, b"remove=true", b"allowed_ip=10.0.0.0/8",
    ]  # fmt: skip
    wrong_peer = [
        b"remove=yes", b"endpoint=1.2.3.4", b"endpoint=1.2.3.4:70000", b"endpoint=[::1]", b"endpoint=host:1", b"allowed_ip=10.0.0.0/33",
        b"allowed_ip=::/129", b"allowed_ip=10.0.0.0", b"allowed_ip=/", b"persistent_keepalive_interval=65536", b"protocol_version=2",
        b"preshared_key=zz", b"retinue_cipher=rot13", b"retinue_cipher=", b"private_key=" + b"1" * 64, b"listen_port=7",
        b"replace_peers=true", b"update_only=1", b"\0\0",
    ]  # fmt: skip
    fine = [b"fwmark=77", b"listen_port=12345", b"replace_peers=true"]
    peer = b"public_key=" + key.encode()
    fine_peer = [b"remove=true", b"allowed_ip=10.98.0.0/16", b"persistent_keepalive_interval=9", b"preshared_key=" + b"5" * 64,
                 b"replace_allowed_ips=true", b"retinue_cipher=aes-256-gcm", b"endpoint=192.0.2.1:1"]  # fmt: skip
    while True:
        match rng.randrange(6):
            case 0:
                lines = [*rng.sample(fine, rng.randrange(3)), rng.choice(wrong), *rng.sample(fine, rng.randrange(2))]
                yield b"set=1\n" + b"\n".join(lines) + b"\n\n"
            case 1 | 2:
                lines = [*rng.sample(fine, rng.randrange(2)), peer, *rng.sample(fine_peer, rng.randrange(4)), rng.choice(wrong_peer)]
                yield b"set=1\n" + b"\n".join(lines) + b"\n\n"
            case 3:
                yield rng.choice([b"get=2", b"set=2", b"set=", b"GET=1", b"get=1\nx=1", b"hello", b"\0"]) + b"\n\n"
            case 4:
                # Cut off in the middle: never applied in part.
                yield (b"set=1\nreplace_peers=true\n" + peer + b"\nremove=true\nfwmark")[: rng.randrange(7, 60)]
            case _:
                line = rng.choice(KEYS).encode() + b"=" + rng.randbytes(rng.randrange(12)).replace(b"\n", b"") + b"\xff"
                yield b"set=1\nfwmark=3\n" + line + b"\n\n"


def state(end: End) -> bytes:
    """What the device says of itself, without what its own attempts at a handshake count."""
    lines = uapi_ask(end.interface, b"get=1\n\n").split(b"\n")
    return b"\n".join(line for line in lines if not line.startswith(b"tx_bytes="))


def test_garbage_on_the_control_socket_is_an_errno_and_changes_nothing(tmp_path: Path) -> None:
    with site(tmp_path) as s:
        space = s.space("u")
        end = s.end(space, 1, OURS)
        public = run("wg", "pubkey", stdin=run("wg", "genkey")).strip()
        end.wg("fwmark", "0x20", "peer", public, "allowed-ips", "10.98.0.2/32,fd98::2/128", "endpoint", "192.0.2.9:9", "persistent-keepalive", "25")
        before = state(end)
        assert b"errno=0" in before
        requests = bad_requests(random.Random(5), base64.b64decode(public).hex())
        silent = 0
        for n in range(REQUESTS):
            request = next(requests)
            answer = uapi_ask(end.interface, request)
            if answer:
                assert b"errno=-" in answer, (request, answer)
            else:
                silent += 1
            assert b"errno=0" not in answer, request
            if n % 100 == 0:
                assert state(end) == before, request
        assert state(end) == before
        assert silent < REQUESTS / 10
        assert end.process.poll() is None
        # 40 MB are refused before they fill the memory.
        huge = b"set=1\n" + b"fwmark=1\n" * 4_500_000 + b"\n"
        assert b"errno=0" not in uapi_ask(end.interface, huge)
        assert state(end) == before


def test_many_clients_that_say_nothing_keep_nobody_out(tmp_path: Path) -> None:
    with site(tmp_path) as s:
        end = s.end(s.space("u"), 1, OURS)
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                c = stack.enter_context(socket.socket(socket.AF_UNIX))
                c.connect(f"/var/run/wireguard/{end.interface}.sock")
                c.sendall(b"set=1\nprivate_key=")
            assert uapi_ask(end.interface, b"get=1\n\n").endswith(b"errno=0\n\n")
        assert subprocess.run(["wg", "show", end.interface], check=False, capture_output=True).returncode == 0
