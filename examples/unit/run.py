"""A service of the host itself, moved to another host. Run as root: sudo python3 examples/unit/run.py

The ledger is an ordinary unit: no network namespace, no container. Its control group holds the identity. The drop-in
beside this file is carried out as systemd would, in a lab of network namespaces that has no service manager.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from mesh import units
from mesh.lab import Lab
from mesh.lab_process import Process, command, run

HERE = Path(__file__).parent
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode(), end='')"
ENTER = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"


def get(netns: str, url: str, *, cgroup: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A page, read from inside a namespace."""
    entered = [sys.executable, "-c", ENTER, str(cgroup / "cgroup.procs")] if cgroup else []
    return run([*entered, sys.executable, "-c", GET, url], netns=netns, codes=(0, 1))


class Unit:
    """ledger.service on one host, as its manager treats it."""

    def __init__(self, lab: Lab, host: str) -> None:
        self.lab, self.host = lab, host
        self.path = f"/retinue-{lab.id}-{host}.slice/ledger.service"
        self.group = units.root() / self.path.strip("/")

    def start(self) -> Process:
        """The group, then ExecStartPre, then the service, all of it in there."""
        self.group.mkdir(parents=True)
        self._hook("ExecStartPre")
        argv = [sys.executable, "-m", "mesh.demo_service", "--name", f"ledger@{self.host}", "--port", "8000"]
        entered = [sys.executable, "-c", ENTER, str(self.group / "cgroup.procs"), *argv]
        process = self.lab.spawn(entered, name=f"ledger-{self.host}", netns=self.lab.nodes[self.host].netns)
        process.wait_ready()
        return process

    def stop(self) -> None:
        self.lab.forget(f"ledger-{self.host}")
        self._hook("ExecStopPost")
        self.group.rmdir()
        self.group.parent.rmdir()

    def _hook(self, key: str) -> None:
        line = next(text for text in (HERE / "10-retinue.conf").read_text().splitlines() if text.startswith(f"{key}=+"))
        words = shlex.split(line.partition("+")[2])
        # There is nobody to ask for the group of a unit here, so it is named.
        words = [self.path if w == "%n" else "--cgroup" if w == "--unit" else w for w in words]
        print(f"{self.host:<6}$ {' '.join(words)}")
        run([*command("retinue"), *words[1:]], netns=self.lab.nodes[self.host].netns, env=self.lab.nodes[self.host].env)


def main() -> int:
    with Lab(["office", "left", "right"], trust_domain="books.example") as lab:
        lab.bring_up(["office", "left", "right"])
        for name, host in (("desk", "office"), ("ledger", "left")):
            made = lab.ca("workload", "add", name, "--host", host, "--label", f"role={name}")
        desk = lab.add_workload("desk")
        lab.retinue("office", "attach", "desk", "--netns", desk, "--wait", "15")
        lab.ca("policy", "apply", str(HERE / "policy.yaml"))
        left, right = Unit(lab, "left"), Unit(lab, "right")
        ok = True
        try:
            left.start()
            url = f"http://{made['addresses'][0]}:8000/"
            ok &= told(desk, url, "ledger@left")
            beside = get(lab.nodes["left"].netns, url)
            print(f"beside it -> {url}  {'NOT REFUSED' if beside.returncode == 0 else beside.stderr.strip().splitlines()[-1]}")
            ok &= beside.returncode == 1
            right.start()
            print("      $ retinue-ca workload move ledger --to right --wait 10")
            moved = lab.ca("workload", "move", "ledger", "--to", "right", "--wait", "10")
            ok &= moved["workload"]["addresses"] == made["addresses"] and told(desk, url, "ledger@right")
            left.stop()
            ok &= told(desk, url, "ledger@right")
        finally:
            for unit in (left, right):
                if unit.group.exists():
                    unit.stop()
    print("as promised" if ok else "NOT as promised")
    return 0 if ok else 1


def told(desk: str, url: str, by: str) -> bool:
    """Does the desk read the page, and who served it?"""
    for _ in range(50):  # policy and tunnel are on their way
        said = get(desk, url)
        if said.returncode == 0:
            break
    good = by in said.stdout
    print(f"desk      -> {url}  {by if good else 'NOT ' + by + ': ' + (said.stdout or said.stderr).strip()}")
    return good


if __name__ == "__main__":
    sys.exit(main())
