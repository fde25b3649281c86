"""Real `retinue-ca serve` processes on loopback, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ca.client import AdminClient
from ca.plane import Plane
from ca.replica import copy
from identity.names import TrustDomain

TD = TrustDomain("ha.test")
START_S = 60.0


@dataclass
class Process:
    """One server on one directory. `wrap`: what it is started under, e.g. strace."""

    directory: Path
    port: int = 0
    wrap: tuple[str, ...] = ()
    heartbeat: float = 0.25
    running: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.directory.with_name(self.directory.name + ".log")

    def start(self) -> None:
        """Until it is ready. Raises AssertionError with its log when it is not."""
        command = [
            *self.wrap, sys.executable, "-c", "from ca.cli import main; main()", "serve", "--dir", str(self.directory),
            "--listen", f"127.0.0.1:{self.port}", "--heartbeat", str(self.heartbeat), "--json",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        assert self.running.stdout is not None
        line = self.running.stdout.readline()
        assert line, f"{self.directory.name} did not start:\n{self.log.read_text()[-3000:]}"
        self.port = int(json.loads(line)["listen"].rpartition(":")[2])

    @property
    def admin(self) -> AdminClient:
        return AdminClient(self.directory, timeout=120.0)

    def kill(self) -> None:
        """At once, with whatever it was started under."""
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, how)
            self.running.wait(60)
            if self.running.stdout is not None:
                self.running.stdout.close()
            self.running = None


@contextlib.contextmanager
def pair(root: Path, address: str, now: float, *, count: int = 2) -> Iterator[list[Process]]:
    """`count` processes on one database: the first is the keeper of the keys, the others its replicas."""
    keeper = root / "ca-1"
    Plane.create(keeper, TD, now, address=address)
    made = [Process(keeper)]
    for n in range(2, count + 1):
        copy(keeper, root / f"ca-{n}")
        made.append(Process(root / f"ca-{n}"))
    try:
        for process in made:
            process.start()
        yield made
    finally:
        for process in made:
            process.end()


async def wait_for(done: object, seconds: float = 30.0) -> None:
    """Until `done()` is true. Raises TimeoutError."""
    assert callable(done)
    async with asyncio.timeout(seconds):
        while not done():  # noqa: ASYNC110 -- what is waited for is state of other processes
            await asyncio.sleep(0.02)
