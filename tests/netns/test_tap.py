"""A workload that is a virtual machine: the host's side is a tap, which is not ours, and the guest obeys policy."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh import netns
from mesh.lab_process import ProcessFailed, ip_batch
from mesh.probe_pairs import Receiver, Sender

NEWS = 7000
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
      - {id: news, from: [{role: api}, {role: batch}], to: {role: web}, on: udp/7000}
"""


class Guest:
    """One machine on a host: a namespace for its inside, and the process that moves its frames."""

    def __init__(self, mesh: Any, host: str, *, space: str = "") -> None:
        self.mesh, self.host, self.device = mesh, host, "vm0"
        self.space = space or mesh.lab.add_workload(f"guest-{host}")

    def start(self) -> None:
        vm = str(Path(__file__).with_name("vm.py"))
        words = [sys.executable, vm, self.mesh.lab.nodes[self.host].netns, self.space, self.device]
        self.process = self.mesh.lab.spawn(words, name=f"vm-{self.host}")
        self.process.wait_ready()

    def attach(self, wait: float = 15.0) -> dict[str, Any]:
        done: dict[str, Any] = self.mesh.lab.retinue(self.host, "attach", "api", "--tap", self.device, *(["--wait", str(wait)] if wait else []))
        return done

    def configure(self, addresses: list[str], said: dict[str, Any]) -> None:
        """What the agent printed, done by the guest."""
        v4, v6 = addresses
        ip_batch([
            "link set lo up", f"link set eth0 up mtu {said['mtu']}", f"addr add {v4}/32 dev eth0", f"addr add {v6}/128 dev eth0 nodad",
            f"route add {said['overlay'][0]} via {said['gateways'][0]} dev eth0 onlink src {v4}",
            f"route add {said['overlay'][1]} via {said['gateways'][1]} dev eth0 onlink src {v6}",
        ], netns=self.space)  # fmt: skip


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    made = make_mesh("host-a", "host-b", "host-c")
    for name, host in (("web", "host-a"), ("api", "host-b"), ("batch", "host-b")):
        made.add(name, host)
    made.place("web", "host-a")
    made.place("batch", "host-b")
    made.apply(POLICY)
    made.guest = Guest(made, "host-b")
    made.guest.start()
    made.before = netns.inside(made.lab.nodes["host-b"].netns, lambda: netns.sysctl("ipv4/conf/vm0/arp_ignore"))
    said = made.guest.attach()
    assert said["state"] == "active"
    made.guest.configure(made.addresses["api"], said)
    made.serve(made.guest.space, "api@guest-b")
    made.lab.spawn([sys.executable, "-m", "http.server", "--bind", "::", "9099"], name="host-service", netns=made.lab.nodes["host-b"].netns)
    return made


async def connects(space: str, address: str) -> bool:
    """Does the service of the host answer a connection from this namespace?"""
    words = ["ip", "netns", "exec", space, sys.executable, "-c", "import socket,sys\nsocket.create_connection((sys.argv[1],9099),2)", address]
    done = await asyncio.create_subprocess_exec(*words, stderr=asyncio.subprocess.DEVNULL)
    return await done.wait() == 0


@pytest.fixture(params=[0, 1], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


async def test_the_guest_serves_whom_policy_permits(mesh: Any, family: int) -> None:
    answer = await mesh.answered(mesh.lab.netns("web-host-a"), mesh.url("api", family))
    assert answer.served_by == "api@guest-b"
    refused = await mesh.get(mesh.lab.netns("batch-host-b"), mesh.url("api", family), timeout=2.0)
    assert not refused.ok, "batch is on the same host, and not permitted"


async def test_the_guest_speaks_as_itself_only(mesh: Any, family: int) -> None:
    """Root in the guest takes other addresses: of a workload on the same host that may speak, of web itself, of nobody."""
    web, batch = (mesh.addresses[n][family] for n in ("web", "batch"))
    stranger = "203.0.113.9" if family == 0 else "2001:db8::9"
    length = 32 if family == 0 else 128
    ip_batch([f"addr add {a}/{length} dev eth0{' nodad' if family else ''}" for a in (batch, stranger)], netns=mesh.guest.space)
    news = Receiver("udp", NEWS, netns=mesh.lab.netns("web-host-a"), address=web)

    def sender(tag: str, bind: str, space: str = mesh.guest.space) -> Sender:
        return Sender("udp", web, NEWS, tag=tag, rate=100, netns=space, bind=bind)

    async with news, sender("own", mesh.addresses["api"][family]) as own, sender("as-batch", batch) as one, sender("stranger", stranger) as two:
        async with sender("batch", batch, mesh.lab.netns("batch-host-b")):
            await news.wait("batch", 20)  # positive control: that address may speak, from its own place
        await news.wait("own", 50)
        for each in (own, one, two):
            await each.attempted(100)
    assert len(news.of("as-batch").seqs) == 0
    assert len(news.of("stranger").seqs) == 0


async def test_the_host_itself_is_not_open_to_the_guest(mesh: Any, family: int) -> None:
    """The gateway answers ARP and neighbour discovery, and nothing else."""
    gateway = "169.254.82.1" if family == 0 else "fe80::1%eth0"
    assert not await connects(mesh.guest.space, gateway)
    assert await connects(mesh.lab.nodes["host-b"].netns, "127.0.0.1" if family == 0 else "::1"), "positive control: the service is there"
    shown = await asyncio.create_subprocess_exec(
        "ip", "-n", mesh.guest.space, "neigh", "show", gateway.partition("%")[0], "dev", "eth0", stdout=asyncio.subprocess.PIPE
    )
    text = (await shown.communicate())[0].decode()
    assert "lladdr" in text, "the gateway itself was found"


@pytest.mark.parametrize(("device", "code"), [("lo", r"attach\.device"), ("eth0", r"attach\.device"), ("nothere", r"attach\.device"), ("rtn0", r"attach\.device")])
async def test_only_a_guests_link_is_taken(mesh: Any, device: str, code: str) -> None:
    with pytest.raises(ProcessFailed, match=code):
        await mesh.lab.aretinue("host-b", "attach", "batch", "--instance", "7", "--tap", device)


async def test_flushed_rules_let_nothing_of_the_guest_in(mesh: Any, family: int) -> None:
    """Between the flush and the repair the routing rules hold: the routes of an unmarked packet of the tap end nowhere."""
    space = mesh.lab.nodes["host-b"].netns
    shown = await asyncio.create_subprocess_exec(
        "ip", "-n", space, *(["-6"] if family else []), "rule", "show", stdout=asyncio.subprocess.PIPE
    )
    text = (await shown.communicate())[0].decode()
    gate = next(line for line in text.splitlines() if "iif vm0" in line)
    assert "blackhole" in gate
    assert "fwmark 0/" in gate or "fwmark 0x0/" in gate


async def test_it_moves_to_another_host(mesh: Any) -> None:
    other = Guest(mesh, "host-c")
    other.start()
    said = other.attach(wait=0)
    other.configure(mesh.addresses["api"], said)
    mesh.serve(other.space, "api@guest-c", port=8080)
    moved = await mesh.lab.aca("workload", "move", "api", "--to", "host-c", "--wait", "10")
    assert moved["waiting_for"] == []
    for family in (0, 1):
        answer = await mesh.answered(mesh.lab.netns("web-host-a"), mesh.url("api", family))
        assert answer.served_by == "api@guest-c"
    await mesh.lab.aca("workload", "move", "api", "--to", "host-b", "--wait", "10")


async def test_a_link_that_vanishes_takes_the_attachment_along(mesh: Any) -> None:
    """The next tap of that name is another machine, and is nobody."""
    mesh.guest.process.kill()
    await mesh.lab.until("host-b", lambda s: all(a.name != "api" for a in s.attachments))
    again = Guest(mesh, "host-b", space=mesh.guest.space)
    again.start()
    ip_batch(["link set vm0 up"], netns=mesh.lab.nodes["host-b"].netns)
    said = {"mtu": 1420, "overlay": ["100.64.0.0/10", "fd00::/8"], "gateways": ["169.254.82.1", "fe80::1"]}
    again.configure(mesh.addresses["api"], said)
    assert not (await mesh.get(mesh.lab.netns("web-host-a"), mesh.url("api", 0), timeout=1.0)).ok
    said = again.attach()
    assert said["state"] == "active"
    mesh.guest = again


async def test_detached_it_is_what_it_was(mesh: Any) -> None:
    """The link stays, without our addresses and settings."""
    space = mesh.lab.nodes["host-b"].netns
    assert netns.inside(space, lambda: netns.sysctl("ipv4/conf/vm0/arp_ignore")) == "1"
    await mesh.lab.aretinue("host-b", "detach", "api")
    shown = await asyncio.create_subprocess_exec("ip", "-n", space, "addr", "show", "dev", "vm0", stdout=asyncio.subprocess.PIPE)
    text = (await shown.communicate())[0].decode()
    assert "169.254.82.1" not in text
    assert "vm0" in text
    assert netns.inside(space, lambda: netns.sysctl("ipv4/conf/vm0/arp_ignore")) == mesh.before
    with pytest.raises(ProcessFailed, match=r"attach\.unknown"):
        await mesh.lab.aretinue("host-b", "detach", "api")
    assert (await mesh.lab.aretinue("host-b", "detach", "api", "--if-attached"))["changed"] is False
