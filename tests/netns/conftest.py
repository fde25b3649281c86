"""Real hosts in namespaces for the tests: everything here is marked `netns`, which fails instead of skipping under CI."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mesh.lab import Lab
from mesh.lab_process import Process, run
from mesh.probe import Answer, Sockets, Target, get

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.netns)


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    """Nothing of an interrupted run disturbs this one."""
    Lab.sweep()


class Mesh:
    """A lab with a CA and enrolled hosts, and short words for what tests do in it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.addresses: dict[str, list[str]] = {}
        self.services: dict[str, Process] = {}

    def apply(self, text: str, *, name: str = "test.yaml") -> dict[str, Any]:
        """Publish a policy; returns when every agent of the lab enforces it."""
        path = self.lab.dir / name
        path.write_text(text)
        done: dict[str, Any] = self.lab.ca("policy", "apply", str(path))
        asyncio.run(self._everywhere(done["digest"]))
        return done

    async def aapply(self, text: str) -> dict[str, Any]:
        return await asyncio.to_thread(self.apply, text)

    async def _everywhere(self, digest: str) -> None:
        agents = [name.removeprefix("agent-") for name in self.lab.processes if name.startswith("agent-")]
        await asyncio.gather(*(self.lab.until(a, lambda s: s.policy_digest == digest) for a in agents))

    def add(self, name: str, host: str, *, role: str | None = None) -> list[str]:
        """Register a workload on a host; returns its overlay addresses."""
        made = self.lab.ca("workload", "add", name, "--host", host, "--label", f"role={role or name.rpartition('/')[2]}")
        self.addresses[name] = made["addresses"]
        return self.addresses[name]

    def place(self, name: str, host: str, *, wait: float = 15.0) -> str:
        """A namespace on this host for it, attached; returns the namespace's full name."""
        space = self.lab.add_workload(f"{name.replace('/', '-')}-{host}")
        self.lab.retinue(host, "attach", name, "--netns", space, *(["--wait", str(wait)] if wait else []))
        return space

    def serve(self, space: str, name: str, *, port: int = 8080, argv: Sequence[str] | None = None) -> Process:
        """An HTTP service in a namespace, listening on both families."""
        words = list(argv) if argv else [sys.executable, "-m", "mesh.demo_service", "--name", name, "--port", str(port)]
        process = self.lab.spawn(words, name=f"service-{name.replace('/', '-')}-{port}", netns=space)
        process.wait_ready()
        return process

    def url(self, name: str, family: int, path: str = "/", *, port: int = 8080) -> str:
        address = self.addresses[name][family]
        return f"http://{f'[{address}]' if family else address}:{port}{path}"

    async def get(self, space: str, url: str, *, timeout: float = 2.0) -> Answer:
        """One request from a namespace."""
        sockets = Sockets(space)
        try:
            return await get(Target.parse(url), sockets, timeout=timeout)
        finally:
            sockets.close()

    async def answered(self, space: str, url: str, *, patience: float = 15.0) -> Answer:
        """One request, tried again until it is answered: the tunnel may still be shaking hands. Raises TimeoutError."""
        async with asyncio.timeout(patience):
            while not (answer := await self.get(space, url)).ok:
                pass
            return answer


@pytest.fixture(scope="module")
def make_mesh() -> Iterator[Callable[..., Mesh]]:
    """Build labs with enrolled hosts; all of them are removed at the end of the module, with nothing left."""
    labs: list[Lab] = []

    def make(*hosts: str, extra: Sequence[str] = ()) -> Mesh:
        lab = Lab([*hosts, *extra], trust_domain="netns.example")
        labs.append(lab)
        lab.start()
        lab.bring_up(hosts)
        return Mesh(lab)

    yield make
    with ThreadPoolExecutor() as pool:
        left = list(pool.map(lambda lab: lab.stop(), labs))
    assert left == [[] for _ in labs]


def events(text: str) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@pytest.fixture
def retinue(repository: Path) -> Callable[..., Any]:
    """Run the installed-or-not `retinue` and return the finished process, whatever its exit status."""

    def call(*args: str, **kwargs: Any) -> Any:
        from mesh.lab_process import command

        return run([*command("retinue"), *args], cwd=repository, codes=range(256), **kwargs)

    return call
