"""The whole product as a subject: two enrolled hosts, agents, a signed policy and the firewall in the path.

Measured between the two places where identities are held, of either kind:

- workload namespaces: a packet also crosses both veths and is forwarded on both hosts, which the peers' packets are not;
- the hosts themselves (`host`): the application is where the peers' applications are, the verdicts are the same.

The hosts are joined by one veth pair, as the other subjects are; the lab's switch is for the CA only. The extra elements
are permitted pairs that never speak: what a large policy costs the packets of others. That policy is enforced while it is
measured is not taken for granted: see `Product.prove`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mesh.lab import Lab
from tests.bench.rig import Pair, run

POLICY = """\
meshpolicy: 1
groups:
  left: {role: left}
  right: {role: right}
segments:
  - name: bench
    allow:
      - {id: left-to-right, from: left, to: right, on: [tcp/5201, udp/5201, udp/7007, icmp], why: benchmark}
"""
HOSTS = ("host-a", "host-b")
DENIED_PORT = 5299
LISTENER = """
import socket, sys
s = socket.create_server(("", int(sys.argv[1]))); print("ready", flush=True)
while True: s.accept()[0].close()
"""
CALLER = """
import socket, sys
try: socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close(); print("connected")
except ConnectionRefusedError: print("refused")
except OSError as e: print(type(e).__name__)
"""


class NotEnforced(Exception):
    """The product let something pass that its policy denies, or was not in the path."""


class EnforcedPair(Pair):
    """The places of a lab's two workloads, in the shape the measurements expect."""

    def __init__(self, number: int, lab: Lab, places: tuple[str, str]) -> None:
        super().__init__(number)
        self.names = (lab.netns(places[0]), lab.netns(places[1]))

    def up(self) -> None:
        """The lab has made everything."""


@dataclass
class Product:
    """A running mesh between two places. `control`: an address of the far end that no policy guards."""

    pair: EnforcedPair
    far: str
    pids: list[int]
    hosts: tuple[str, str]
    control: tuple[int, str]  # from which end, and the address
    refused: int = 0
    passed: dict[str, int] = field(default_factory=dict)

    def prove(self) -> None:
        """A port that the policy does not name is refused while somebody listens there, and somebody does, for a call
        around the mesh reaches him; and the firewall's chains have counted packets since the last time, on both hosts.
        Raises NotEnforced.
        """
        listener = self.pair.spawn(1, sys.executable, "-IS", "-c", LISTENER, str(DENIED_PORT))
        try:
            deadline = time.monotonic() + 10
            while f":{DENIED_PORT}" not in self.pair.at(1, "ss", "-Hlnt"):
                if time.monotonic() > deadline:
                    raise RuntimeError("nobody listens on the denied port")
                time.sleep(0.03)
            end, around = self.control
            if (said := self._call(end, around)) != "connected":
                raise RuntimeError(f"the control found nobody listening: {said}")
            if (said := self._call(0, self.far)) != "refused":
                raise NotEnforced(f"tcp/{DENIED_PORT} is denied, the call ended with: {said}")
        finally:
            listener.kill()
            listener.wait()
            self.pair.processes.remove(listener)
        self.refused += 1
        now = {host: accepted(host) for host in self.hosts}
        if any(now[host] <= self.passed.get(host, 0) for host in self.hosts):
            raise NotEnforced(f"the firewall has counted no packets: {now}, before {self.passed}")
        self.passed = now

    def _call(self, end: int, address: str) -> str:
        return self.pair.at(end, sys.executable, "-IS", "-c", CALLER, address, str(DENIED_PORT)).strip()

    def evidence(self) -> dict[str, object]:
        """What was seen."""
        return {"denied calls": self.refused, "refused": self.refused, "packets passed": sum(self.passed.values())}


def accepted(netns: str) -> int:
    """Packets that the firewall of a host has passed since its table was made."""
    listed = json.loads(run("ip", "netns", "exec", netns, "nft", "-j", "list", "counters", "table", "inet", "retinue"))
    return sum(int(e["counter"]["packets"]) for e in listed["nftables"] if e.get("counter", {}).get("name") == "accepted")


@contextlib.contextmanager
def enforced(number: int, *, host: bool = False, aes: bool = False, elements: int = 0, options: tuple[str, ...] = ()) -> Iterator[Product]:
    """A running mesh, its enforcement proven. `host`: identities held by the hosts; `options`: switches of the engine."""
    with Lab(HOSTS, trust_domain="bench.example") as lab:
        lab.start_ca()
        underlay = _direct(number, lab)
        for name, address in underlay.items():
            token = lab.ca("token", "create", "--host", name)["token"]
            ciphers = ["--cipher", "chacha20poly1305", *(["--cipher", "aes-256-gcm"] if aes else [])]
            hint = ("--underlay", f"{address}:51820")
            lab.retinue(name, "enroll", "--ca", lab.ca_url, "--token-file", "-", *hint, *ciphers, stdin=token)
            lab.start_agent(name, args=[word for option in options for word in ("--engine-option", option)])
        homes = dict(zip(("left", "right"), HOSTS, strict=True))
        made = {name: lab.ca("workload", "add", name, "--host", home, "--label", f"role={name}") for name, home in homes.items()}
        text = POLICY
        if elements:
            quiet = ",".join(str(20000 + 2 * i) for i in range(elements))
            text += f"      - {{id: quiet, from: left, to: right, on: \"tcp/{quiet}\", why: elements that never match}}\n"
        policy = lab.dir / "bench.yaml"
        policy.write_text(text)
        lab.ca("policy", "apply", str(policy))
        for name, home in homes.items():
            place = ["--host"] if host else ["--netns", lab.add_workload(name)]
            lab.retinue(home, "attach", name, *place, "--wait", "20")
        pair = EnforcedPair(number, lab, HOSTS if host else ("left", "right"))
        far = made["right"]["addresses"][0]
        pair.at(0, "ping", "-c", "3", "-i", "0.3", "-W", "5", far)
        pids = engines(lab.dir)
        if any(f"--{option}" not in words(pid) for pid in pids for option in options):
            raise RuntimeError(f"the engines did not get {' '.join(options)}")
        spaces = (lab.netns(HOSTS[0]), lab.netns(HOSTS[1]))
        product = Product(pair, far, pids, spaces, (0, underlay[HOSTS[1]]) if host else (1, "127.0.0.1"))
        product.prove()
        yield product


def _direct(number: int, lab: Lab) -> dict[str, str]:
    """Host -> underlay address on a veth pair between the two."""
    addresses = {host: f"10.77.{number}.{end}" for end, host in enumerate(HOSTS, 1)}
    near, far = (lab.netns(host) for host in addresses)
    run("ip", "link", "add", "rbA", "netns", near, "type", "veth", "peer", "name", "rbA", "netns", far)
    for host, address in addresses.items():
        run("ip", "-n", lab.netns(host), "address", "add", f"{address}/24", "dev", "rbA")
        run("ip", "-n", lab.netns(host), "link", "set", "rbA", "up")
    return addresses


def words(pid: int) -> list[str]:
    """The command line of a process; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return []


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def engines(directory: Path) -> list[int]:
    """Processes of the engine whose control socket lies below this lab's directory."""
    found = run("pgrep", "-f", "retinue-engine", check=False).split()
    return [int(pid) for pid in found if str(directory).encode() in _environment(int(pid))]
