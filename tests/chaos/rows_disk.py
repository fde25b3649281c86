"""Rows about the CA's disk: killed at any system call, and any byte of it damaged."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ca.directory import DATABASE
from ca.plane import Plane
from identity.errors import RetinueError
from identity.names import TrustDomain
from identity.records import BundleRecord, EndpointRecord, PlacementRecord, PolicyRecord
from identity.wire.admin import WorkloadAdd
from tests.chaos.registry import Run, row
from tests.sim.joining import join

NOW = 1_800_000_000.0
TD = TrustDomain("disk.example")
HOSTS = ("a", "b")


def make(directory: Path) -> None:
    """A control plane with two hosts and a few workloads."""
    Plane.create(directory, TD, NOW)
    plane = Plane.open(directory, lambda: NOW)
    for host in HOSTS:
        join(plane, host)
    for n in range(6):
        plane.placements.add(WorkloadAdd(name=f"w{n}", host=HOSTS[n % 2], labels={"role": "web" if n % 2 else "api"}), plane.now, "t")
    text = "meshpolicy: 1\nsegments:\n  - name: s\n    allow:\n      - {id: x, from: {role: web}, to: {role: api}, on: tcp/1}\n"
    plane.policies.apply([("p.yaml", text)], "t", plane.now, "t")
    plane.close()


def shown(directory: Path) -> dict[str, dict[str, str]]:
    """What each host is sent. Raises RetinueError when the database is refused."""
    plane = Plane.open(directory, lambda: NOW)
    try:
        return {h: dict(plane.mirror.world.view(h).objects) for h in HOSTS}
    finally:
        plane.close()


def holds(directory: Path, envelope: str) -> bool:
    """Would a host believe this record? Only then is a damaged one dangerous."""
    plane = Plane.open(directory, lambda: NOW)
    try:
        for kind in (PlacementRecord, EndpointRecord, PolicyRecord, BundleRecord):
            with contextlib.suppress(RetinueError):
                plane.trust.verify(kind, envelope)
                return True
        return False
    finally:
        plane.close()


def bundle_of(envelope: str) -> dict[str, Any] | None:
    """What a bundle says of keys; None of any other record. Its number and date are those of its making."""
    try:
        said = json.loads(base64.urlsafe_b64decode(envelope.split(".")[1] + "=="))
    except (ValueError, IndexError):
        return None
    return {k: v for k, v in said.items() if k not in {"sequence", "issued"}} if "roots" in said and "signers" in said else None


@row("F5", "Damaged or cut database", "500 cases: noticed by the CA, or by every host (signatures), or served right; 0 empty or partial maps", stage="none")
async def damaged(_: Any, run: Run) -> None:
    cases = 500 if run.seconds is not None else 60
    await asyncio.to_thread(_damage, run, cases)
    if cases < 500:
        run.caveat(f"{cases} cases instead of 500 (ARGS=\"--seconds 1\")")


def _damage(run: Run, cases: int) -> None:
    dice = random.Random(run.seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
        good = Path(temporary) / "good"
        make(good)
        truth = shown(good)
        refused = right = wrong = unbelieved = repaired = 0
        for n in range(cases):
            here = Path(temporary) / f"case{n}"
            shutil.copytree(good, here)
            path = here / DATABASE
            data = bytearray(path.read_bytes())
            if n % 4 == 0:
                data = data[: dice.randrange(1, len(data))]
            else:
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            path.write_bytes(data)
            try:
                served = shown(here)
            except (RetinueError, sqlite3.DatabaseError):
                refused += 1
            else:
                changed = {e for h in HOSTS for k, e in served[h].items() if truth[h].get(k) != e}
                mended = {e for e in changed if bundle_of(e) and bundle_of(e) in map(bundle_of, truth[HOSTS[0]].values())}
                repaired += bool(mended)  # the CA said so and signed the same anew
                changed -= mended
                whole = all(served[h].keys() == truth[h].keys() for h in HOSTS)
                right += served == truth
                unbelieved += whole and bool(changed) and not any(holds(good, e) for e in changed)
                wrong += not whole or any(holds(good, e) for e in changed)
            shutil.rmtree(here)
    run.note(cases=cases, noticed_by_ca=refused, signed_anew_by_ca=repaired, served_right=right, noticed_by_every_host=unbelieved, served_wrong=wrong)
    run.check("0 empty or partial maps", wrong == 0)
    run.check("some damage was seen (control)", refused > 0)


@row("F4", "kill -9 in the middle of issuing", ">= 200 kill points: 0 certificates without a record, 0 duplicate serials, restart <= 3 s", stage="none")
async def killed(_: Any, run: Run) -> None:
    points = 200 if run.seconds is not None else 12
    await asyncio.to_thread(_kill, run, points)
    if points < 200:
        run.caveat(f"{points} kill points instead of 200 (ARGS=\"--seconds 1\")")


def _kill(run: Run, points: int) -> None:
    missing = duplicates = died = acknowledged = 0
    dice = random.Random(run.seed)
    with tempfile.TemporaryDirectory() as temporary:
        good = Path(temporary) / "good"
        make(good)
        for n in range(points):
            here = Path(temporary) / "run"
            shutil.copytree(good, here)
            call = ("pwrite64", "fdatasync")[n % 2]
            done = subprocess.run(
                ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={dice.randrange(4, 40)}",
                 sys.executable, "-m", "tests.chaos.issue_loop", str(here)],
                capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2], timeout=60,
            )  # fmt: skip
            died += done.returncode != 0
            told = done.stdout.split()
            acknowledged += len(told)
            with sqlite3.connect(here / DATABASE) as raw:
                known = [r[0] for r in raw.execute("select serial from serials")]
            raw.close()
            missing += len(set(told) - set(known))
            duplicates += len(known) - len(set(known)) + len(told) - len(set(told))
            shown(here)
            shutil.rmtree(here)
    run.note(kill_points=points, killed=died, acknowledged=acknowledged, without_record=missing, duplicates=duplicates)
    run.check("0 without a record", missing == 0)
    run.check("0 duplicates", duplicates == 0)
    run.check("killed in the middle (control)", died > points // 2 and acknowledged > 0)
