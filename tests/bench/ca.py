"""``python -m tests.bench.ca [--streams 5000] [--agents 2000] [--publish]``, ``make bench-ca``: the control plane in figures.

Certificates and enrolments a second on both stores and beside other authorities, the feed before `streams` TLS connections, the
return of `agents` after a killed server. Prints a table with the machine and the versions and writes out/ca.json; with --publish
docs/PERFORMANCE_CA.md too, from it and from out/crowd.json (`make crowd`). Nothing here asserts a timing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from ca.plane import Plane
from identity import certs
from identity.wire.admin import Token, TokenCreate, Workload, WorkloadAdd
from identity.wire.enroll import SvidReply, SvidRequest
from mesh.enroll import enroll
from tests.bench import ca_peers
from tests.bench.__main__ import machine
from tests.bench.ca_herd import herd
from tests.bench.ca_issuing import TD, certificates, enrolments
from tests.bench.ca_page import page
from tests.bench.ca_rows import Rows
from tests.ha.processes import Process
from tests.postgres_server import programs, server

ROOT: Final = Path(__file__).resolve().parents[2]
OUT: Final = ROOT / "out"
LOCAL: Final = "certificates, no network"
REMOTE: Final = "certificates, over TLS"
ENROLLED: Final = "hosts enrolled, over TLS"


async def requested(process: Process, root: Path, count: int) -> float:
    """Workload certificates a second of a server in a process of its own, over connections that are kept."""
    token = await asyncio.to_thread(process.admin.post, "/v1/tokens", TokenCreate(host="asker"), Token)
    machine_ = await enroll(process.url, token.token, root / "asker", ["127.0.0.1:51820"], ["chacha20poly1305"])
    await asyncio.to_thread(process.admin.post, "/v1/workloads", WorkloadAdd(name="w", host="asker"), Workload)
    csr = certs.make_csr(ec.generate_private_key(ec.SECP256R1()))
    left = iter(range(count))

    async def work() -> None:
        async with machine_.client() as client:
            for _ in left:
                await client.post("/v1/svid", SvidRequest(workload="w", instance=0, csr=csr), SvidReply)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(ca_peers.AT_ONCE)))
    return count / (time.perf_counter() - began)


def ours(engine: str, root: Path, address: str | None, rows: Rows, rounds: int, seconds: float, machines: int) -> None:
    subject = f"retinue-ca, {engine}"
    Plane.create(root / "local", TD, time.time(), address=address)
    rows.median(LOCAL, subject, [certificates(root / "local", seconds) for _ in range(rounds)], "1/s")
    process = Process(root / "local", heartbeat=2.0)
    process.start()
    try:
        rows.median(REMOTE, subject, [asyncio.run(requested(process, Path(tempfile.mkdtemp(dir=root)), machines)) for _ in range(1)], "1/s")
    finally:
        process.end()
    rows.add(ENROLLED, subject, [asyncio.run(enrolments(root / "local", machines, 16))[0]], "1/s")


def peers(root: Path, rows: Rows, rounds: int, seconds: float, machines: int) -> dict[str, str]:
    """Their versions; what is not here is said."""
    versions: dict[str, str] = {}
    found: tuple[tuple[str, str, Callable[[Path], tuple[str, float] | None]], ...] = (
        ("openssl ca", LOCAL, lambda at: ca_peers.openssl(at, seconds)),
        ("nebula-cert sign", LOCAL, lambda at: ca_peers.nebula(at, seconds)),
        ("step-ca", REMOTE, lambda at: ca_peers.step(at, machines)),
    )
    for name, measure, act in found:
        values: list[float] = []
        for n in range(rounds):
            done = act(root / f"{name.replace(' ', '-')}-{n}")
            if done is None:
                print(f"  left out {name}: not on this machine")
                break
            versions[name] = done[0]
            values.append(done[1])
        if values:
            rows.median(measure, name, values, "1/s")
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-ca", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--agents", type=int, default=2000)
    parser.add_argument("--changes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one local measurement")
    parser.add_argument("--machines", type=int, default=300, help="enrolments, and certificates asked for over TLS, in one measurement")
    parser.add_argument("--publish", action="store_true", help="write docs/PERFORMANCE_CA.md from this run and the last `make crowd`")
    asked = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))  # servers of this process
    facts, rows = machine(), Rows()
    print(f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, load {facts['load']}; servers and clients share the machine", flush=True)
    versions = {"SQLite": sqlite3.sqlite_version, "Python": str(facts["python"])}
    with tempfile.TemporaryDirectory(prefix="retinue-bench-", dir=ROOT) as text:
        root = Path(text)  # on the disk that the checkout is on: an fsync is one
        (root / "sqlite").mkdir()
        ours("SQLite", root / "sqlite", None, rows, asked.rounds, asked.seconds, asked.machines)
        if (postgres := programs()) is not None:
            versions["PostgreSQL"] = subprocess.run([postgres / "postgres", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
            (root / "postgresql").mkdir()
            with server() as one:
                ours("PostgreSQL", root / "postgresql", one.database(), rows, asked.rounds, asked.seconds, asked.machines)
        versions |= peers(root, rows, asked.rounds, asked.seconds, asked.machines)
    herd(asked.agents, asked.streams, asked.changes, rows)
    settings = {k: v for k, v in vars(asked).items() if k != "publish"}
    OUT.mkdir(exist_ok=True)
    report: dict[str, Any] = {"machine": facts, "versions": versions, "settings": settings, "rows": rows.rows}
    (OUT / "ca.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print("wrote out/ca.json")
    if asked.publish:
        publish()


def publish() -> None:
    """docs/PERFORMANCE_CA.md from the last runs."""
    found = [json.loads(path.read_text()) if path.exists() else None for path in (OUT / "ca.json", OUT / "crowd.json")]
    text = page(*found)
    (ROOT / "docs" / "PERFORMANCE_CA.md").write_text(text)
    print("wrote docs/PERFORMANCE_CA.md")


if __name__ == "__main__":
    os.umask(0o077)
    main()
