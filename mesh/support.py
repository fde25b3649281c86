"""`retinue support`: one file for whoever helps, with what this machine's agent is and does, and without its secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Final

from identity.errors import BadInput, RetinueError
from identity.support import Redactor, pack, secrets_in
from mesh.doctor import examine
from mesh.local_client import LocalClient

# Of the state directory: what holds no key. The snapshot's records are public, but long: their names are enough.
STATE_FILES: Final = ("endpoint.json", "attachments.json", "epochs.json")
UNITS: Final = ("retinue-agent", "retinue-broker")
COMMANDS: Final = {
    "net/addresses.txt": ("ip", "-d", "address"), "net/rules4.txt": ("ip", "-4", "rule"), "net/rules6.txt": ("ip", "-6", "rule"),
    "net/routes4.txt": ("ip", "-4", "route", "show", "table", "all"), "net/routes6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "net/nft.txt": ("nft", "list", "ruleset"), "net/sockets.txt": ("ss", "-lunp"),
}  # fmt: skip
COMMAND_S: Final = 10.0
MAX_LOG: Final = 2 << 20  # bytes of the end of each log
MAX_KEY_FILE: Final = 65536
PACKAGES: Final = ("retinue", "cryptography", "pydantic", "aiohttp", "pyroute2", "structlog", "typer")


async def collect(state_dir: Path, socket: Path, logs: Sequence[Path]) -> dict[str, str]:
    """Name -> text, not yet redacted. What cannot be had says so in its place. Raises BadInput for a log that is not there."""
    members = {"versions.json": json.dumps(versions(), indent=1), "state/listing.txt": listing(state_dir)}
    members["doctor.json"] = json.dumps([asdict(c) for c in await examine(state_dir, socket)], indent=1)
    members |= await _agent(socket)
    for name in STATE_FILES:
        try:
            members[f"state/{name}"] = (state_dir / name).read_text(errors="replace")
        except OSError as e:
            members[f"state/{name}"] = f"cannot be read: {e.strerror}\n"
    members |= _processes(socket.parent)
    for name, command in COMMANDS.items():
        members[name] = await asyncio.to_thread(said, command)
    if logs:
        members |= {f"logs/{n}-{path.name}": tail(path) for n, path in enumerate(logs)}
    else:
        journal = ("journalctl", "--no-pager", "-n", "5000", *(word for unit in UNITS for word in ("-u", unit)))
        members["logs/journal.txt"] = await asyncio.to_thread(said, journal)
    return members


def versions() -> dict[str, str]:
    """Of this program, what it stands on, and the machine."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine(),
            "collected": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip


async def _agent(socket: Path) -> dict[str, str]:
    out: dict[str, str] = {}
    try:
        async with asyncio.timeout(COMMAND_S), LocalClient(socket) as agent:
            out["status.json"] = (await agent.status()).model_dump_json(indent=1)
            snapshot = await agent.snapshot()
            shown = {key: len(envelope) for key, envelope in sorted(snapshot.objects.items())}
            about = {"timeline": snapshot.timeline, "revision": snapshot.revision, "record_bytes": shown}
            out["snapshot.json"] = json.dumps(about, indent=1)
    except (RetinueError, TimeoutError) as e:
        out.setdefault("status.json", f"the agent does not answer: {e}\n")
    return out


def _processes(run_dir: Path) -> dict[str, str]:
    """Status and limits of the engines, and whether this machine writes core dumps. No environment, no memory."""
    pattern = Path("/proc/sys/kernel/core_pattern")
    out = {"process/core.txt": f"pattern {pattern.read_text().strip() if pattern.exists() else '?'}\n"
           f"limit of this shell {resource.getrlimit(resource.RLIMIT_CORE)}\n"}  # fmt: skip
    for file in sorted(run_dir.glob("engine-*.json")):
        try:
            about = json.loads(file.read_text())
            proc = Path(f"/proc/{int(about['pid'])}")
            out[f"process/{file.stem}.txt"] = "".join((proc / name).read_text() for name in ("status", "limits"))
        except (OSError, ValueError, KeyError) as e:
            out[f"process/{file.stem}.txt"] = f"{type(e).__name__}\n"
    return out


def said(command: Sequence[str]) -> str:
    """What a program of this machine says; why not, where it does not."""
    program = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        return f"{command[0]} is not installed\n"
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, check=False, timeout=COMMAND_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{command[0]}: {type(e).__name__}\n"
    return (done.stdout + done.stderr)[-MAX_LOG :].decode(errors="replace")


def secrets_of(directory: Path) -> list[bytes]:
    """The secret bytes of every key file below a directory (``*.key``): the key itself, and as its file shows it."""
    found: list[bytes] = []
    for path in sorted(directory.rglob("*.key")):
        with contextlib.suppress(OSError):
            if not path.is_symlink() and path.is_file():
                found += secrets_in(path.read_bytes()[:MAX_KEY_FILE])
    return found


def tail(path: Path, limit: int = MAX_LOG) -> str:
    """The end of a file, from the beginning of a line. Raises BadInput ``support.log``."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError as e:
        raise BadInput("support.log", f"cannot read {path}: {e.strerror}") from None
    return (data if size <= limit else data.partition(b"\n")[2]).decode(errors="replace")


def listing(directory: Path) -> str:
    """Names, modes, owners and sizes below a directory; never a content."""
    lines = []
    with contextlib.suppress(OSError):
        for path in sorted(directory.rglob("*")):
            with contextlib.suppress(OSError):
                at = path.lstat()
                lines.append(f"{at.st_mode:06o} {at.st_uid:>5} {at.st_gid:>5} {at.st_size:>10} {path.relative_to(directory)}")
    return "\n".join(lines) + "\n"


def write(path: Path, data: bytes) -> None:
    """A new file of mode 0600. Raises BadInput ``support.file`` when there is one, or it cannot be written."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except OSError as e:
        raise BadInput("support.file", f"cannot write {path}: {e.strerror}", hint="name a new file with --out") from None


async def bundle(state_dir: Path, socket: Path, logs: Sequence[Path], out: Path) -> list[str]:
    """Write it; the names in it. Raises BadInput ``support.file``/``support.log``, BadState ``support.secret``."""
    members = await collect(state_dir, socket, logs)
    redactor = Redactor(secrets_of(state_dir))
    write(out, pack(members, redactor, now=time.time()))
    return sorted(members)
