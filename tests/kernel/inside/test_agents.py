"""The whole product in the guest: a CA, two enrolled hosts whose agents choose the kernel's WireGuard, and a signed policy
on real packets, through a policy change, a killed agent and a move.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from mesh import netns
from mesh.lab import Lab

pytestmark = [pytest.mark.netns, pytest.mark.timeout(280)]

HOMES = {"left": "host-a", "right": "host-b"}
OPEN = """\
meshpolicy: 1
segments:
  - name: kernel
    allow:
      - {id: left-to-right, from: {role: left}, to: {role: right}, on: [tcp/8080], why: the test}
"""
SHUT = OPEN.replace("tcp/8080", "tcp/9090")
WAIT = 60.0  # seconds for a packet that has to come


class World:
    """The lab, where its workloads are, and what tests do there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.address: list[str] = []
        self.spaces: dict[str, str] = {}

    def build(self) -> None:
        self.lab.bring_up(list(HOMES.values()))
        for name, host in HOMES.items():
            made = self.lab.ca("workload", "add", name, "--host", host, "--label", f"role={name}")
            self.address = made["addresses"]
        self.apply(OPEN)
        for name, host in HOMES.items():
            self.spaces[name] = self.lab.add_workload(name)
            self.lab.retinue(host, "attach", name, "--netns", self.spaces[name], "--wait", str(int(WAIT)))

    def apply(self, text: str) -> None:
        policy = self.lab.dir / "kernel.yaml"
        policy.write_text(text)
        self.lab.ca("policy", "apply", str(policy))

    def listen(self, space: str, family: int) -> socket.socket:
        kind = (socket.AF_INET, socket.AF_INET6)[family]
        server = netns.inside(space, lambda: socket.create_server((self.address[family], 8080), family=kind))
        server.settimeout(WAIT)
        return server

    def connect(self, family: int, port: int = 8080) -> socket.socket:
        kind = (socket.AF_INET, socket.AF_INET6)[family]
        made = netns.inside(self.spaces["left"], lambda: socket.socket(kind, socket.SOCK_STREAM))
        made.settimeout(WAIT)
        made.connect((self.address[family], port))
        return made


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab(tuple(HOMES.values()), trust_domain="kernel.example") as lab:
        made = World(lab)
        made.build()
        yield made


def talk(near: socket.socket, far: socket.socket) -> None:
    near.sendall(b"ping")
    assert far.recv(100) == b"ping"
    far.sendall(b"pong")
    assert near.recv(100) == b"pong"


def test_agents_choose_the_kernel_device(world: World) -> None:
    for host in HOMES.values():
        shown = subprocess.run(
            ["ip", "-n", world.lab.netns(host), "-d", "link", "show", "rtn0"], check=True, capture_output=True, text=True
        )
        assert " wireguard " in shown.stdout.replace("\n", " ")


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_agents_hold_the_policy(world: World, family: int) -> None:
    with world.listen(world.spaces["right"], family) as server:
        with world.connect(family) as near, server.accept()[0] as far:
            talk(near, far)
        with pytest.raises(ConnectionRefusedError):
            world.connect(family, 8081)
    transfer = subprocess.run(
        ["ip", "netns", "exec", world.lab.netns("host-a"), "wg", "show", "rtn0", "transfer"], check=True, capture_output=True, text=True
    )
    assert min(int(word) for word in transfer.stdout.split()[-2:]) > 0


def test_agents_may_be_killed_and_a_change_cuts_what_is_open(world: World) -> None:
    with world.listen(world.spaces["right"], 0) as server, world.connect(0) as near, server.accept()[0] as far:
        agent = world.lab.processes["agent-host-a"]
        agent.send(signal.SIGKILL)
        agent.wait()
        talk(near, far)
        world.lab.start_agent("host-a")
        talk(near, far)
        world.apply(SHUT)
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            try:
                near.sendall(b"ping")
            except OSError:
                break
            time.sleep(0.2)
        else:
            pytest.fail("the open connection was not cut")
    world.apply(OPEN)


def test_agents_move_a_workload(world: World) -> None:
    space = world.lab.add_workload("right-moved")
    world.lab.retinue("host-a", "attach", "right", "--netns", space)
    world.lab.ca("workload", "move", "right", "--to", "host-a", "--wait", str(int(WAIT)))
    with world.listen(space, 0) as server, world.connect(0) as near, server.accept()[0] as far:
        talk(near, far)
