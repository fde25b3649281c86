"""The whole product as a subject: two enrolled hosts, agents, a signed policy and the firewall in the path.

Measured between two workload namespaces, so a packet also crosses both veths and takes both verdicts. The extra
elements are permitted pairs that never speak: what a large policy costs the packets of others.
"""

from __future__ import annotations

import contextlib
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


class EnforcedPair(Pair):
    """Workload namespaces of a lab, in the shape the measurements expect."""

    def __init__(self, number: int, lab: Lab) -> None:
        super().__init__(number)
        self.names = (lab.netns("left"), lab.netns("right"))

    def up(self) -> None:
        """The lab has made everything."""


@contextlib.contextmanager
def enforced(number: int, *, aes: bool, elements: int = 0) -> Iterator[tuple[EnforcedPair, str, list[int]]]:
    """(pair, far address, engine pids) of a running mesh."""
    with Lab(["host-a", "host-b"], trust_domain="bench.example") as lab:
        lab.start_ca()
        for host in ("host-a", "host-b"):
            node = lab.nodes[host]
            token = lab.ca("token", "create", "--host", host)["token"]
            hints = [word for hint in node.underlay for word in ("--underlay", hint)]
            ciphers = ["--cipher", "chacha20poly1305", *(["--cipher", "aes-256-gcm"] if aes else [])]
            lab.retinue(host, "enroll", "--ca", lab.ca_url, "--token-file", "-", *hints, *ciphers, stdin=token)
            lab.start_agent(host)
        homes = {"left": "host-a", "right": "host-b"}
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
        pair.at(0, "ping", "-c", "3", "-W", "5", far)
        yield pair, far, engines(lab.dir)


def engines(directory: Path) -> list[int]:
    """Processes of the engine whose control socket lies below this lab's directory."""
    found = []
    for pid in run("pgrep", "-f", "retinue-engine", check=False).split():
        with contextlib.suppress(OSError):
            if str(directory) in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace"):
                found.append(int(pid))
    return found
