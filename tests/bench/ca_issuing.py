"""``python -m tests.bench.ca_issuing [--seconds 4] [--machines 8]``: certificates a second, enrolments a second, on both stores.

`workload certificates`: CSR checked, serial and log entry committed (fsync), profile linted, signed: one thread, no TLS.
`enrolments` and `over TLS`: a real server, real handshakes, every proof; the client shares the machine with the server.
Prints one row a measure. Nothing here asserts a timing.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from ca.api import Limits
from ca.plane import Plane
from ca.serve import Options, running
from identity import certs
from identity.enrollment import JoinToken
from identity.names import SpiffeId, TrustDomain
from identity.wire.admin import TokenCreate
from mesh.control import ControlClient, RootPin
from tests.ha.claims import Machine
from tests.postgres_server import programs, server

TD = TrustDomain("bench.test")


def rate(seconds: float, act: Callable[[], object]) -> float:
    """How often `act` runs in a second."""
    act()
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        act()
        count += 1
    return count / spent


def certificates(directory: Path, seconds: float) -> float:
    """Workload certificates signed a second by one process's working thread."""
    plane = Plane.open(directory, time.time)
    csr = certs.make_csr(ec.generate_private_key(ec.SECP256R1()))
    name, addresses = SpiffeId.workload(TD, "shop/api"), TD.overlay(1)
    try:
        return rate(seconds, lambda: plane.authority.issue_workload(csr, name, addresses, plane.clock()))
    finally:
        plane.close()


async def enrolments(directory: Path, count: int, at_once: int) -> tuple[float, float]:
    """Enrolments a second over TLS, and head signing of the log meanwhile included; seconds for all."""
    options = Options(directory, "127.0.0.1:0", limits=Limits(rate=1e6, burst=1e6))
    async with running(options) as here:
        plane = here.service.plane
        tokens = [
            JoinToken.parse((await here.service.read(lambda n=n: plane.token(TokenCreate(host=f"h{n}"), "bench"))).token)
            for n in range(count)
        ]
        left = iter(tokens)
        began = time.perf_counter()

        async def work() -> None:
            for token in left:
                async with ControlClient(f"https://{here.listen}", RootPin(token.root_fingerprint)) as client:
                    outcome = await Machine(client).enrol(token)
                    assert outcome.startswith("h"), outcome

        await asyncio.gather(*(work() for _ in range(at_once)))
        spent = time.perf_counter() - began
    return count / spent, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--machines", type=int, default=300)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retinue-bench-", dir=Path.cwd()) as root:
        _one("SQLite", Path(root) / "sqlite", None, asked.seconds, asked.machines)
        if programs() is not None:
            with server() as postgres:
                _one("PostgreSQL", Path(root) / "postgresql", postgres.database(), asked.seconds, asked.machines)


def _one(engine: str, directory: Path, address: str | None, seconds: float, machines: int) -> None:
    Plane.create(directory, TD, time.time(), address=address)
    print(f"{engine:<12} workload certificates  {certificates(directory, seconds):8.0f} /s", flush=True)
    each, spent = asyncio.run(enrolments(directory, machines, 16))
    print(f"{engine:<12} enrolments over TLS    {each:8.0f} /s   ({machines} in {spent:.1f} s, client on the same cores)", flush=True)


if __name__ == "__main__":
    main()
