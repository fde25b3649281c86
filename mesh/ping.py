"""`retinue ping`: TCP connections from an instance attached here to every address of a workload."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from identity import records
from identity.errors import NotFound, RetinueError
from identity.records import PlacementRecord
from identity.wire.local import Attachment, SnapshotReply
from mesh import netns, units
from mesh.local_client import LocalClient

PAUSE = 0.2  # seconds between two connections


@dataclass(frozen=True, slots=True)
class Result:
    """Connections to one address; times in milliseconds, None when none was answered."""

    address: str
    sent: int
    answered: int
    minimum: float | None
    median: float | None
    maximum: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Ping:
    """reason: why policy denies the flow, None when it allows it."""

    source: str
    workload: str
    port: int
    results: tuple[Result, ...]
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def ping_workload(
    agent: LocalClient, name: str, port: int, source: str | None, count: int, timeout: float
) -> Ping:
    """Try every address. Raises NotFound for a workload unknown here, and what the agent answered."""
    from mesh.cli_node import only_attachment

    here = only_attachment(await agent.status(), source)
    addresses = addresses_of(await agent.snapshot(), name)
    try:
        verdict = await agent.explain(f"{here.name}/{here.instance}", name, "tcp", port)
        reason = verdict.reason if verdict.verdict == "deny" else None
    except RetinueError as e:
        reason = e.message
    if not addresses:
        raise NotFound(
            "ping.unknown", f"this host knows no address of {name}", hint=reason or "see: retinue status"
        )
    before = units.join(here.cgroup) if here.cgroup is not None else None
    try:
        tried = [asyncio.to_thread(_try, here, address, port, count, timeout) for address in addresses]
        return Ping(f"{here.name}/{here.instance}", name, port, tuple(await asyncio.gather(*tried)), reason)
    finally:
        if before is not None:
            units.join(before)


def addresses_of(snapshot: SnapshotReply, name: str) -> list[str]:
    """Overlay addresses of the active instances of a workload. The agent verified the records; this is a look-up."""
    found: list[str] = []
    for key, envelope in sorted(snapshot.objects.items()):
        if key.startswith(f"placement/{name}/"):
            record = records.unverified(PlacementRecord, envelope, trust_domain=snapshot.trust_domain)
            if record.name == name and record.state == "active":
                found.extend(record.addresses)
    return found


def _try(here: Attachment, address: str, port: int, count: int, timeout: float) -> Result:
    def work() -> Result:
        times: list[float] = []
        error: str | None = None
        for number in range(count):
            if number:
                time.sleep(PAUSE)
            began = time.perf_counter()
            try:
                _connect(here, address, port, timeout)
                times.append((time.perf_counter() - began) * 1e3)
            except TimeoutError:
                error = "no answer"
            except OSError as e:
                error = _why(e)
        if not times:
            return Result(address, count, 0, None, None, None, error)
        low, middle, high = (round(t, 2) for t in (min(times), statistics.median(times), max(times)))
        return Result(address, count, len(times), low, middle, high, error)

    return work() if here.kind in {"host", "unit"} or here.netns is None else netns.inside(here.netns, work)


def _connect(here: Attachment, address: str, port: int, timeout: float) -> None:
    six = ":" in address
    with socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(timeout)
        if here.kind in {"host", "unit"}:
            s.bind((here.addresses[1 if six else 0], 0))
        s.connect((address, port))


def _why(error: OSError) -> str:
    if error.errno in {errno.EHOSTUNREACH, errno.EACCES, errno.EPERM, errno.ENETUNREACH}:
        return f"refused by the firewall ({os.strerror(error.errno)})"
    if error.errno == errno.ECONNREFUSED:
        return "refused: nobody listens there, or policy denies it"
    return os.strerror(error.errno or 0)
