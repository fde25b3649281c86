"""Many peers: the time to configure 10,000, to change one of them, and the memory of one that is idle."""

from __future__ import annotations

import ipaddress
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.measures import Row, engine
from tests.bench.rig import Pair, rss_kib, wait_for
from tests.bench.subjects import UAPI_DIR, engine_program, uapi_set, wireguard_go

COUNT = 10_000


def many_peers(pair: Pair, rounds: int) -> list[tuple[str, Row]]:
    """(subject, row) of every round for our engine and each wireguard-go; the peers never speak."""
    out: list[tuple[str, Row]] = []
    with tempfile.TemporaryDirectory(prefix="retinue-bench-") as directory:
        engines = [("retinue bare", engine_program(), Path(directory))]
        engines += [(f"wireguard-go {version.removeprefix('v')}", [program, "-f"], UAPI_DIR) for program, version in wireguard_go()]
        for number in range(rounds):
            for subject, program, where in engines:
                try:
                    out += [(subject, row) for row in _round(pair, program, where, f"rbp{number}")]
                except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
                    print(f"  left out 10,000 peers of {subject}: {e}", file=sys.stderr)
    return out


def _round(pair: Pair, program: list[str], where: Path, name: str) -> list[Row]:
    process = pair.spawn(0, *program, name, env={"WG_UAPI_DIR": str(where), "WG_PROCESS_FOREGROUND": "1"})
    control = where / f"{name}.sock"
    try:
        wait_for(program[0], [control])
        uapi_set(control, f"private_key={os.urandom(32).hex()}\n")
        before = rss_kib(engine(process.pid))
        base = int(ipaddress.IPv4Address("100.64.0.1"))
        body = "".join(f"public_key={os.urandom(31).hex()}00\nallowed_ip={ipaddress.IPv4Address(base + i)}/32\n" for i in range(COUNT))
        started = time.perf_counter()
        uapi_set(control, body)
        rows: list[Row] = [(f"set {COUNT} peers", (time.perf_counter() - started) * 1000, "ms")]
        rows.append(("RSS idle peer", (rss_kib(engine(process.pid)) - before) / COUNT, "KiB"))
        changes = []
        for i in range(50):
            one = f"public_key={os.urandom(31).hex()}00\nallowed_ip={ipaddress.IPv4Address(base + COUNT + i)}/32\n"
            started = time.perf_counter()
            uapi_set(control, one)
            changes.append((time.perf_counter() - started) * 1e6)
        rows.append((f"change 1 of {COUNT} peers", statistics.median(changes), "us"))
        return rows
    finally:
        process.terminate()
        process.wait(10)
        pair.processes.remove(process)
