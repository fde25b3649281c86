"""The whole product as a subject: two enrolled hosts, agents, a signed policy and the firewall in the path.

Measured between two workload namespaces, so a packet also crosses both veths and takes both verdicts. The hosts are joined
by one veth pair, as the other subjects are; the lab's switch is for the CA only. The extra elements are permitted pairs
that never speak: what a large policy costs the packets of others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
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


class EnforcedPair(Pair):
    """Workload namespaces of a lab, in the shape the measurements expect."""

    def __init__(self, number: int, lab: Lab) -> None:
        super().__init__(number)
        self.names = (lab.netns("left"), lab.netns("right"))

    def up(self) -> None:
        """The lab has made everything."""


@contextlib.contextmanager
def enforced(number: int, *, aes: bool = False, elements: int = 0, options: str = "") -> Iterator[tuple[EnforcedPair, str, list[int]]]:
    """(pair, far address, engine pids) of a running mesh. `options`: more words of the engine's command line."""
    with Lab(HOSTS, trust_domain="bench.example") as lab:
        lab.start_ca()
        for host, address in _direct(number, lab).items():
            token = lab.ca("token", "create", "--host", host)["token"]
            ciphers = ["--cipher", "chacha20poly1305", *(["--cipher", "aes-256-gcm"] if aes else [])]
            underlay = ("--underlay", f"{address}:51820")
            lab.retinue(host, "enroll", "--ca", lab.ca_url, "--token-file", "-", *underlay, *ciphers, stdin=token)
            with _environment("RETINUE_ENGINE_OPTIONS", options):
                lab.start_agent(host)
        homes = dict(zip(("left", "right"), HOSTS, strict=True))
        made = {name: lab.ca("workload", "add", name, "--host", host, "--label", f"role={name}") for name, host in homes.items()}
        text = POLICY
        if elements:
            quiet = ",".join(str(20000 + 2 * i) for i in range(elements))
            text += f"      - {{id: quiet, from: left, to: right, on: \"tcp/{quiet}\", why: elements that never match}}\n"
        policy = lab.dir / "bench.yaml"
        policy.write_text(text)
        lab.ca("policy", "apply", str(policy))
        for name, host in homes.items():
            space = lab.add_workload(name)
            lab.retinue(host, "attach", name, "--netns", space, "--wait", "20")
        pair = EnforcedPair(number, lab)
        far = made["right"]["addresses"][0]
        pair.at(0, "ping", "-c", "3", "-i", "0.3", "-W", "5", far)
        pids = engines(lab.dir)
        if options and not all(options.encode() in environment(pid) for pid in pids):
            raise RuntimeError(f"the engines did not get {options}")
        yield pair, far, pids


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable of the processes started within."""
    if value:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _direct(number: int, lab: Lab) -> dict[str, str]:
    """Host -> underlay address on a veth pair between the two."""
    addresses = {host: f"10.77.{number}.{end}" for end, host in enumerate(HOSTS, 1)}
    near, far = (lab.netns(host) for host in addresses)
    run("ip", "link", "add", "rbA", "netns", near, "type", "veth", "peer", "name", "rbA", "netns", far)
    for host, address in addresses.items():
        run("ip", "-n", lab.netns(host), "address", "add", f"{address}/24", "dev", "rbA")
        run("ip", "-n", lab.netns(host), "link", "set", "rbA", "up")
    return addresses


def environment(pid: int) -> bytes:
    """As the process was given it; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def engines(directory: Path) -> list[int]:
    """Processes of the engine whose control socket lies below this lab's directory."""
    found = run("pgrep", "-f", "retinue-engine", check=False).split()
    return [int(pid) for pid in found if str(directory).encode() in environment(int(pid))]
