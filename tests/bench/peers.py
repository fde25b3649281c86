"""Many peers: the time to configure 10,000, to change one of them, and the memory of one that is idle."""

from __future__ import annotations

import ipaddress
import os
import statistics
import time

from tests.bench.measures import Row, _engine
from tests.bench.rig import Pair, rss_kib, wait_for
from tests.bench.subjects import engine_program, uapi_set

COUNT = 10_000


def many_peers(pair: Pair) -> list[Row]:
    """Rows for our engine; the peers never speak."""
    from pathlib import Path

    directory = Path(os.environ.get("TMPDIR", "/tmp"))  # the socket is 0600 and lives for seconds
    name = f"rbp{os.getpid() % 10000}"
    process = pair.spawn(0, *engine_program(), name, env={"WG_UAPI_DIR": str(directory)})
    socket = directory / f"{name}.sock"
    wait_for("retinue-engine", [socket])
    uapi_set(socket, f"private_key={os.urandom(32).hex()}\n")
    before = rss_kib(_engine(process.pid))
    base = int(ipaddress.IPv4Address("100.64.0.1"))
    body = "".join(f"public_key={os.urandom(31).hex()}00\nallowed_ip={ipaddress.IPv4Address(base + i)}/32\n" for i in range(COUNT))
    started = time.perf_counter()
    uapi_set(socket, body)
    rows: list[Row] = [(f"set {COUNT} peers", (time.perf_counter() - started) * 1000, "ms")]
    rows.append(("RSS idle peer", (rss_kib(_engine(process.pid)) - before) / COUNT, "KiB"))
    changes = []
    for i in range(50):
        one = f"public_key={os.urandom(31).hex()}00\nallowed_ip={ipaddress.IPv4Address(base + COUNT + i)}/32\n"
        started = time.perf_counter()
        uapi_set(socket, one)
        changes.append((time.perf_counter() - started) * 1e6)
    rows.append((f"change 1 of {COUNT} peers", statistics.median(changes), "us"))
    process.terminate()
    process.wait()
    pair.processes.remove(process)
    return rows
