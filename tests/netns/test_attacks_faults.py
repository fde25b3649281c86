"""Root by mistake, or half-way in: flushed rules and routes, deleted devices, killed and stopped processes; and the wire.

All the while a permitted and a denied pair send over both families. The denied pair delivers nothing, ever; the
permitted one goes on or comes back.

    host-a: web, batch      host-b: api      web -> api udp/9000 permitted, batch -> api not
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
from typing import Any

import pytest

from mesh.lab import TUNNEL_PORT
from mesh.probe_pairs import Receiver, Sender
from tests.netns import attack_tools as at
from tests.netns.attack_tools import Tap, until

pytestmark = [pytest.mark.timeout(120)]

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, api, batch]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: udp/9000}
"""


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    made = make_mesh("host-a", "host-b")
    made.spaces = {}
    for name, host in (("web", "host-a"), ("batch", "host-a"), ("api", "host-b")):
        made.add(name, host)
        made.spaces[name] = made.place(name, host)
    made.apply(POLICY)
    return made


def sh(netns: str, *commands: str) -> None:
    """As root there; what is not there to be removed is no error."""
    subprocess.run(["ip", "netns", "exec", netns, "sh", "-c", "; ".join(commands)], check=False, capture_output=True)


class Pairs:
    """Both pairs over both families, and what came of them."""

    def __init__(self, mesh: Any) -> None:
        self.mesh, self.stack = mesh, contextlib.AsyncExitStack()
        self.receivers: list[Receiver] = []
        self.senders: list[tuple[str, Sender, Receiver]] = []

    async def __aenter__(self) -> Pairs:
        for v6 in (False, True):
            box = await self.stack.enter_async_context(Receiver("udp", 9000, netns=self.mesh.spaces["api"], v6=v6))
            self.receivers.append(box)
            for name in ("web", "batch"):
                sender = Sender("udp", self.mesh.addresses["api"][v6], 9000, tag=name, rate=100, netns=self.mesh.spaces[name])
                self.senders.append((name, await self.stack.enter_async_context(sender), box))
        await self.recover()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stack.aclose()

    async def recover(self, seconds: float = 20.0) -> None:
        """The permitted pair delivers, in both families; the denied one has tried and delivered nothing."""
        for box in self.receivers:
            await box.wait_more("web", 20, seconds)
        for name, sender, box in self.senders:
            if name == "batch":
                await sender.attempted(5)
                assert box.of("batch").seqs == set()

    async def goes_on(self, sends: int = 40) -> None:
        """For so many sends, whatever the permitted pair does, the denied one delivers nothing."""
        for name, sender, box in self.senders:
            await sender.attempted(sends)
            if name == "batch":
                assert box.of("batch").seqs == set()


WRECKS = {
    "flush ruleset": ["nft flush ruleset"],
    "delete table": ["nft delete table inet retinue"],
    "an accepting table in its place": ["nft 'flush ruleset; table inet retinue { chain prerouting { type filter hook prerouting priority -300; accept; }; }'"],
    "flush rules": ["ip rule flush", "ip -6 rule flush", "ip rule add lookup main priority 32766", "ip rule add lookup local priority 0", "ip -6 rule add lookup main priority 32766",
                    "ip -6 rule add lookup local priority 0"],
    "flush tables": [f"ip {f} route flush table {t}" for f in ("-4", "-6") for t in (21000, 21001, 21002)],
    "flush rules and ruleset": ["nft flush ruleset", "ip rule flush", "ip -6 rule flush", "ip rule add lookup main priority 32766", "ip -6 rule add lookup main priority 32766"],
    "delete the tunnel device": ["ip link del rtn0"],
    "delete the workloads' links": ["for l in $(ls /sys/class/net | grep '^rt.*[0-9a-f]\\{8\\}'); do ip link del $l; done"],
    "forwarding off": ["sysctl -w net.ipv4.ip_forward=0", "sysctl -w net.ipv6.conf.all.forwarding=0"],
    "flush addresses and routes": ["ip addr flush dev rtn0", "ip route flush cache", "ip link set rtn0 down"],
}  # fmt: skip


@pytest.mark.parametrize("wreck", WRECKS)
@pytest.mark.parametrize("host", ["host-a", "host-b"])
async def test_wrecked_and_repaired(mesh: Any, wreck: str, host: str) -> None:
    async with Pairs(mesh) as pairs:
        await asyncio.to_thread(sh, mesh.lab.nodes[host].netns, *WRECKS[wreck])
        await pairs.recover()


async def test_wrecked_on_both_hosts_while_both_agents_are_stopped(mesh: Any) -> None:
    """Nobody repairs; still nothing that is denied gets through, whatever is flushed, in any order."""
    agents = [mesh.lab.processes[f"agent-{h}"] for h in ("host-a", "host-b")]
    nodes = [mesh.lab.nodes[h].netns for h in ("host-a", "host-b")]
    async with Pairs(mesh) as pairs:
        for one in agents:
            one.send(signal.SIGSTOP)
        try:
            await pairs.recover()  # a stopped agent stops no traffic
            for netns in nodes:
                await asyncio.to_thread(sh, netns, "nft flush ruleset")
            await pairs.goes_on()
            for netns in nodes:
                await asyncio.to_thread(sh, netns, *WRECKS["flush tables"])
            await pairs.goes_on()
        finally:
            for one in agents:
                one.send(signal.SIGCONT)
        await pairs.recover()


def engine_pid(mesh: Any, host: str) -> int:
    return int(json.loads(next(mesh.lab.nodes[host].run_dir.glob("engine-*.json")).read_text())["pid"])


@pytest.mark.parametrize("host", ["host-a", "host-b"])
async def test_engine_and_agent_killed_in_every_order(mesh: Any, host: str) -> None:
    lab = mesh.lab
    async with Pairs(mesh) as pairs:
        os.kill(engine_pid(mesh, host), signal.SIGKILL)
        await pairs.recover()
        lab.processes[f"agent-{host}"].kill()
        os.kill(engine_pid(mesh, host), signal.SIGKILL)
        await asyncio.to_thread(sh, lab.nodes[host].netns, "nft flush ruleset")
        await pairs.goes_on()
        await asyncio.to_thread(lab.start_agent, host)
        await pairs.recover()


# ---- the wire


def raw_udp(netns: str) -> socket.socket:
    return at.sock_in(netns, socket.AF_INET, socket.SOCK_DGRAM)


async def test_a_hundred_thousand_bad_datagrams(mesh: Any) -> None:
    """A23: every type, reserved bytes, every length, noise; from a stranger (the CA's machine). Silence, and traffic goes on."""
    lab, dice = mesh.lab, random.Random(23)
    target = (lab.nodes["host-b"].v4, TUNNEL_PORT)
    pid = engine_pid(mesh, "host-b")
    async with Pairs(mesh) as pairs:
        with contextlib.closing(raw_udp(lab.nodes["ca"].netns)) as sock:
            sock.setblocking(False)

            def flood() -> None:
                noise = dice.randbytes(1 << 17)
                sock.setblocking(True)
                for n in range(100_000):
                    size = (n % 200) if n % 50 else dice.randrange(65_000)
                    at_ = dice.randrange(60_000)
                    kind = struct.pack("<I", (1, 2, 3, 4, 0, 5, 255, 0x0101)[n % 8])
                    sock.sendto((kind + noise[at_ : at_ + size])[: max(size, n % 5)], target)
                sock.sendto(noise[:65_507], target)
                sock.setblocking(False)

            await asyncio.to_thread(flood)
            await pairs.recover()
            with pytest.raises(BlockingIOError):
                sock.recv(2000)
    assert engine_pid(mesh, "host-b") == pid, "the engine lives"


async def test_replayed_packets_deliver_nothing_also_after_a_restart(mesh: Any) -> None:
    """A19: everything captured between the hosts is sent again, at once, and after a new engine has shaken hands."""
    lab = mesh.lab
    a, b = lab.nodes["host-a"], lab.nodes["host-b"]
    wire = Tap(lab.switch, port_of(lab, a), outgoing=True)
    try:
        async with Pairs(mesh) as pairs:
            os.kill(engine_pid(mesh, "host-a"), signal.SIGKILL)  # so that a handshake is among it
            await pairs.recover()
        captured = [f for f in wire.frames() if f[12:14] == b"\x08\0" and f[23] == 17 and struct.unpack_from("!H", f, 36)[0] == TUNNEL_PORT]
    finally:
        wire.close()
    packets = list(dict.fromkeys(f[14:] for f in captured))
    kinds = {p[28] for p in packets}
    assert {1, 2, 4} <= kinds, "positive control: initiations, responses and data were captured"

    def replay() -> None:
        for node in (a, b):
            own = at.ip_address(node.v4).packed
            mine = [p for p in packets if p[12:16] != own and p[16:20] == own]
            for packet in mine:
                send_to(lab, node, packet)

    with contextlib.closing(Tap(mesh.spaces["api"], "rtn0")) as far:
        await asyncio.to_thread(replay)
        async with Pairs(mesh) as pairs:
            await asyncio.to_thread(replay)
            await pairs.recover()
            for _, sender, box in pairs.senders:
                assert box.of("web").duplicates == 0, sender
        await asyncio.to_thread(lab.forget, "agent-host-b")
        os.kill(engine_pid(mesh, "host-b"), signal.SIGKILL)
        await asyncio.to_thread(lab.start_agent, "host-b")
        list(far.frames())
        await asyncio.to_thread(replay)
        assert far.count(b"web ") == 0
        async with Pairs(mesh) as pairs:
            await asyncio.to_thread(replay)
            await pairs.recover()
            for _, sender, box in pairs.senders:
                assert box.of("web").duplicates == 0, sender


def send_to(lab: Any, node: Any, packet: bytes) -> None:
    """A captured IP packet, word for word with its source address, onto the node's link."""
    with contextlib.closing(at.sock_in(lab.switch, socket.AF_PACKET, socket.SOCK_DGRAM)) as sock:
        sock.sendto(packet, (port_of(lab, node), 0x0800, 0, 0, mac_of(node)))


def port_of(lab: Any, node: Any) -> str:
    """The switch's port that leads to a node."""
    return f"p{list(lab.nodes).index(node.name)}"


_MACS: dict[str, bytes] = {}


def mac_of(node: Any) -> bytes:
    if node.netns not in _MACS:
        shown = subprocess.run(["ip", "-n", node.netns, "-j", "link", "show", "eth0"], check=True, capture_output=True).stdout
        _MACS[node.netns] = bytes.fromhex(json.loads(shown)[0]["address"].replace(":", ""))
    return _MACS[node.netns]


async def test_a_neighbour_that_lies_about_addresses_gets_no_plaintext_and_no_identity(mesh: Any) -> None:
    """A35: the CA's machine claims host-b's address for a while: loss is allowed, delivery of denied traffic or clear text is not."""
    lab = mesh.lab
    a, b, ca = lab.nodes["host-a"], lab.nodes["host-b"], lab.nodes["ca"]
    async with Pairs(mesh) as pairs:
        with contextlib.closing(Tap(ca.netns, "eth0")) as tap, contextlib.closing(at.sock_in(ca.netns, socket.AF_PACKET, socket.SOCK_RAW)) as raw:
            raw.bind(("eth0", 0))
            claim = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + mac_of(ca) + at.ip_address(b.v4).packed + mac_of(a) + at.ip_address(a.v4).packed
            stolen: list[bytes] = []

            def taken() -> bool:
                raw.send(mac_of(a) + mac_of(ca) + b"\x08\6" + claim)
                stolen.extend(f for f in tap.frames() if f[12:14] == b"\x08\0" and f[30:34] == at.ip_address(b.v4).packed)
                return len(stolen) > 5

            assert await asyncio.to_thread(until, taken), "positive control: packets for host-b come here"
            assert not any(b"web " in f or b"batch " in f for f in stolen)
            # What was taken is sent on later, from here: it is authentic once, and only once.
        await asyncio.to_thread(sh, a.netns, "ip neigh flush all")
        await pairs.recover()
        for _, _, box in pairs.senders:
            assert box.of("web").duplicates == 0
