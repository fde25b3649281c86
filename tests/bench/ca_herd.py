"""``python -m tests.bench.ca_herd [--agents 2000] [--changes 20] [--postgres]``: many TLS agents on one CA.

Real certificates, real mTLS 1.3 connections, real feeds to a real ``retinue-ca serve`` of its own; all agents live in one
client process on the same machine, so the figures hold both sides' handshakes. Measured:

    memory a stream   growth of the server's resident memory over its open feeds
    fan-out           a policy change until an agent's frame has arrived, over all agents and changes
    revocation        the request to revoke a placed workload until the frame that says so, over the agents that see it
    back              the server is killed and started again: until every agent has its feed; admin requests meanwhile

Prints one row a measure. Nothing here asserts a timing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import resource
import select
import ssl
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ca.client import AdminClient
from ca.plane import Plane
from ca.registry import Applicant
from identity import certs
from identity.enrollment import JoinToken
from identity.errors import RetinueError
from identity.keys import b64, ed25519_public, private_pem, x25519_public
from identity.names import SpiffeId
from identity.wire import LEVEL_HEADER, WIRE_LEVEL
from identity.wire.admin import (
    Info,
    PolicyApply,
    PolicyFileIn,
    PolicyReply,
    TokenCreate,
    Workload,
    WorkloadAdd,
    WorkloadRef,
)
from mesh.control import backoff
from tests.bench.ca_issuing import rate
from tests.ha.processes import TD, Process
from tests.postgres_server import server

APP = 10  # hosts whose workloads may talk with one another


def policy(count: int, port: int) -> str:
    """Many small applications: what an endpoint sees does not grow with the number of endpoints."""
    apps = (f"{{app: a{n}}}" for n in range(max(1, count // APP)))
    rules = "".join(f"      - {{id: r{n}, from: {a}, to: {a}, on: tcp/{port}}}\n" for n, a in enumerate(apps))
    return f"meshpolicy: 1\nlabels: {{keys: [app]}}\nsegments:\n  - name: s\n    allow:\n{rules}"


@dataclass
class Agent:
    """One endpoint's feed over a connection of its own, nothing but what the wire needs."""

    name: str
    context: ssl.SSLContext
    port: int
    frames: int = 0
    at: float = 0.0  # when the newest frame that is no heartbeat arrived
    open: asyncio.Event = field(default_factory=asyncio.Event)
    retries: int = 0

    async def run(self) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, ssl.SSLError, TimeoutError, ValueError):
                await self._follow()
            self.open.clear()
            self.retries += 1
            await asyncio.sleep(backoff(min(self.retries, 4), random.random(), cap=5.0))

    async def _follow(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context, limit=1 << 22)
        try:
            writer.write(f"GET /v1/feed HTTP/1.1\r\nHost: ca\r\n{LEVEL_HEADER}: {WIRE_LEVEL}\r\n\r\n".encode())
            if b" 200 " not in await reader.readline():
                raise OSError
            await reader.readuntil(b"\r\n\r\n")
            while line := await reader.readline():
                if line.startswith(b"{") and b'"kind":"beat"' not in line[:20]:
                    self.frames, self.at, self.retries = self.frames + 1, time.perf_counter(), 0
                    self.open.set()
        finally:
            writer.close()


def enrol(plane: Plane, count: int, root: Path) -> list[ssl.SSLContext]:
    """`count` hosts with a workload each, by the registry itself; their TLS contexts."""
    roots = plane.authority.trust_bundle(0, plane.clock()).roots_pem()
    contexts: list[ssl.SSLContext] = []
    key = ec.generate_private_key(ec.SECP256R1())
    csr = certs.make_csr(key)
    (root / "key.pem").write_bytes(private_pem(key))
    for n in range(count):
        name = f"h{n}"
        token = JoinToken.parse(plane.token(TokenCreate(host=name), "bench").token)
        applicant = Applicant(
            b64(x25519_public(X25519PrivateKey.generate())), b64(ed25519_public(Ed25519PrivateKey.generate())), [], ["chacha20poly1305"]
        )
        row = plane.registry.claim(token.id, applicant, plane.now)
        with plane.issuing(name):  # as Plane.enroll does it, without the proofs
            chain = plane.authority.issue_endpoint(csr, SpiffeId.parse(row.spiffe_id), plane.clock())
        plane.registry.finish(name, certs.not_after(certs.parse_chain(chain)[0]), plane.now, name)
        plane.placements.add(WorkloadAdd(name=f"w/{name}", host=name, labels={"app": f"a{n // APP}"}), plane.now, "bench")
        (root / "chain.pem").write_text("".join(chain))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=roots)
        context.load_cert_chain(root / "chain.pem", root / "key.pem")
        contexts.append(context)
    return contexts


def resident(pid: int) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1048576


def show(what: str, values: list[float], unit: str = "ms") -> None:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.99)]
    print(f"{what:<34} p50 {at[0]:9.1f}   p99 {at[1]:9.1f}   max {ordered[-1]:9.1f} {unit}   ({len(ordered)} samples)", flush=True)


async def bench(process: Process, contexts: list[ssl.SSLContext], changes: int) -> None:
    assert process.running is not None
    agents = [Agent(f"h{n}", context, process.port) for n, context in enumerate(contexts)]
    before = resident(process.running.pid)
    tasks = [asyncio.create_task(a.run()) for a in agents]
    began = time.perf_counter()
    await asyncio.gather(*(a.open.wait() for a in agents))
    print(f"{len(agents)} agents connected in {time.perf_counter() - began:.1f} s; {(resident(process.running.pid) - before) * 1024 / len(agents):.0f} KiB a stream, views included", flush=True)

    async def change(message: object, path: str, reply: type, who: list[Agent]) -> list[float]:
        seen = [a.frames for a in who]
        at = time.perf_counter()
        await asyncio.to_thread(process.admin.post, path, message, reply)
        async with asyncio.timeout(120):
            while any(a.frames == n for a, n in zip(who, seen, strict=True)):  # noqa: ASYNC110 -- thousands of flags
                await asyncio.sleep(0.005)
        return [(a.at - at) * 1000 for a in who]

    spread: list[float] = []
    for n in range(changes):
        files = [PolicyFileIn(name="p.yaml", text=policy(len(agents), n + 1))]
        spread += await change(PolicyApply(files=files), "/v1/policy", PolicyReply, agents)
    show("policy change to every stream", spread)
    spread = []
    for n in range(0, min(changes * APP, len(agents) - APP + 1), APP):
        spread += await change(WorkloadRef(name=f"w/h{n}", instance=0), "/v1/workloads/revoke", Workload, agents[n : n + APP])
    show("revocation to all who see it", spread)

    # An administrator in a process of its own: this one is busy with its agents.
    asking = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.ca_herd", "--ask", str(process.directory),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert asking.stdin is not None
    assert asking.stdout is not None
    await asking.stdout.readline()
    process.kill()
    await asyncio.sleep(1.0)
    for a in agents:
        a.open.clear()
    await asyncio.to_thread(process.start)
    asking.stdin.write(b"go\n")
    began = time.perf_counter()
    await asyncio.gather(*(a.open.wait() for a in agents))
    print(f"{len(agents)} agents back {time.perf_counter() - began:.1f} s after the server was ready again", flush=True)
    said, _ = await asking.communicate(b"")
    show("admin requests meanwhile", [float(line) for line in said.split()] or [0.0])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def ask(directory: Path) -> None:
    """After a first line of input: milliseconds of one administrator's request after the other, until the input ends."""
    client = AdminClient(directory, timeout=120.0)
    print(flush=True)
    sys.stdin.readline()
    while not select.select([0], [], [], 0.1)[0]:
        at = time.perf_counter()
        with contextlib.suppress(RetinueError):
            client.get("/v1/info", Info)
            print((time.perf_counter() - at) * 1000, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--agents", type=int, default=2000)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ask is not None:
        return ask(asked.ask)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retinue-herd-")))
        address = stack.enter_context(server()).database() if asked.postgres else None
        Plane.create(root / "ca", TD, time.time(), address=address)
        plane = Plane.open(root / "ca", time.time)
        began = time.perf_counter()
        contexts = enrol(plane, asked.agents, root)
        print(f"{asked.agents} hosts with a workload each made in {time.perf_counter() - began:.0f} s")
        plane.seal()
        with plane.store.read() as tx:
            head = plane.log.head(tx)
            print(f"log of {head.size} entries: {rate(1.0, lambda: plane.log.consistency(tx, head.size // 3, head.size)):.0f} consistency proofs /s")
        plane.close()
        process = Process(root / "ca", heartbeat=2.0)
        process.start()
        try:
            asyncio.run(bench(process, contexts, asked.changes))
        finally:
            process.end()


if __name__ == "__main__":
    main()
