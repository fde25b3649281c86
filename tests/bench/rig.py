"""The rig: two network namespaces on a veth pair per subject, all up at once so that rounds can interleave.

    +-- rbXXa-N ------------+   veth, MTU 1500   +-- rbXXb-N ------------+
    | 10.77.N.1  fd77:N::1  |--------------------| 10.77.N.2  fd77:N::2  |
    | tunnel 10.78.N.1      |                    | tunnel 10.78.N.2      |
    +-----------------------+                    +-----------------------+
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = f"rb{os.getpid()}"


def run(*argv: str, check: bool = True, timeout: float = 60) -> str:
    """Run a command, return its standard output."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


@dataclass
class Pair:
    """Two namespaces, numbered so that addresses never clash."""

    number: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)  # directories that go with the pair

    def __post_init__(self) -> None:
        self.names = (f"{PREFIX}a-{self.number}", f"{PREFIX}b-{self.number}")
        self.underlay = (f"10.77.{self.number}.1", f"10.77.{self.number}.2")
        self.tunnel = (f"10.78.{self.number}.1", f"10.78.{self.number}.2")

    def up(self) -> None:
        """Make the namespaces and the underlay between them."""
        links = tuple(f"{n}v" for n in ("rbA", "rbB"))
        for name in self.names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", links[0], "netns", self.names[0], "type", "veth", "peer", "name", links[1], "netns", self.names[1])
        for end in (0, 1):
            self.at(end, "ip", "link", "set", "lo", "up")
            self.at(end, "ip", "address", "add", f"{self.underlay[end]}/24", "dev", links[end])
            self.at(end, "ip", "link", "set", links[end], "up")

    def at(self, end: int, *argv: str, check: bool = True, timeout: float = 60) -> str:
        """Run a command inside one end."""
        return run("ip", "netns", "exec", self.names[end], *argv, check=check, timeout=timeout)

    def spawn(self, end: int, *argv: str, env: dict[str, str] | None = None, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a long-running process inside one end."""
        with open(log or os.devnull, "wb") as out:
            process = subprocess.Popen(
                # It ends with us, however we end.
                ["ip", "netns", "exec", self.names[end], "setpriv", "--pdeathsig", "KILL", *argv],
                env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def down(self) -> None:
        """End what was started here and remove the namespaces."""
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in self.names:
            run("ip", "netns", "del", name, check=False)
        for directory in self.leftovers:
            shutil.rmtree(directory, ignore_errors=True)


def sweep() -> None:
    """Namespaces of runs that were killed."""
    for line in run("ip", "netns", "list").splitlines():
        found = re.match(r"rb(\d+)[ab]-\d+\b", line)
        if found and not Path("/proc", found[1]).exists():
            run("ip", "netns", "del", found[0], check=False)


def wait_for(what: str, paths: Sequence[Path], seconds: float = 20, ready: Callable[[], bool] = lambda: True) -> None:
    """Wait until every path exists and `ready` says so."""
    deadline = time.monotonic() + seconds
    while not (all(p.exists() for p in paths) and ready()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not become ready")
        time.sleep(0.02)


def system_cpu_seconds() -> float:
    """Busy CPU time of the whole machine since boot, seconds (everything but idle and iowait)."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def rss_kib(pid: int) -> int:
    """Resident memory of a process, KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0
