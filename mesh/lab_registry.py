"""What a lab leaves on the machine, written down before it exists, so that a later run can remove it.

One JSON file a lab under /run/retinue-lab: owner and processes (pid and start time, so that a reused pid is never
touched), the directory, the name prefix. Everything else of a lab lives in its namespaces and goes with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from identity.keys import write_file
from mesh.lab_process import NETNS_DIR, start_time

ROOT: Final = Path("/run/retinue-lab")
PREFIX: Final = "rtnlab-"
_ID: Final = re.compile(r"[0-9a-f]{6}")
KILL_WAIT_MS: Final = 3000


@dataclass(slots=True)
class Entry:
    """The registry file of one lab. `kept`: its owner left it up on purpose."""

    id: str
    owner: tuple[int, int]
    kept: bool = False
    processes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        return f"{PREFIX}{self.id}-"

    @property
    def directory(self) -> Path:
        return ROOT / self.id

    @property
    def file(self) -> Path:
        return ROOT / f"{self.id}.json"

    @property
    def owner_alive(self) -> bool:
        return start_time(self.owner[0]) == self.owner[1]

    def dump(self) -> bytes:
        data = {"id": self.id, "owner": self.owner, "kept": self.kept, "processes": self.processes}
        return json.dumps(data).encode()

    def save(self) -> None:
        write_file(self.file, self.dump(), 0o600)


def create() -> Entry:
    """Register a new lab owned by this process and make its directory (0700)."""
    ROOT.mkdir(mode=0o700, exist_ok=True)
    while True:
        entry = Entry(os.urandom(3).hex(), (os.getpid(), start_time(os.getpid()) or 0))
        draft = ROOT / f".{entry.id}.{os.getpid()}"
        write_file(draft, entry.dump(), 0o600)
        try:
            os.link(draft, entry.file)  # appears whole or not at all: a sweep never meets an ownerless new lab
        except FileExistsError:
            continue
        finally:
            draft.unlink()
        entry.directory.mkdir(mode=0o700)
        return entry


def entries() -> list[Entry]:
    """All registered labs. A damaged file still names its lab by its file name: it is then ownerless."""
    return [_read(path) for path in sorted(ROOT.glob("*.json")) if _ID.fullmatch(path.stem)] if ROOT.is_dir() else []


def _read(path: Path) -> Entry:
    entry = Entry(path.stem, (0, 0))
    try:
        data: Any = json.loads(path.read_text())
        entry.owner = (int(data["owner"][0]), int(data["owner"][1]))
        entry.processes = [(int(p), int(t)) for p, t in data["processes"]]
        entry.kept = bool(data["kept"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    return entry


def namespaces(prefix: str) -> list[str]:
    """Named network namespaces that begin with `prefix`."""
    return sorted(p.name for p in NETNS_DIR.glob(f"{prefix}*")) if NETNS_DIR.is_dir() else []


def _inode(path: str | Path) -> tuple[int, int] | None:
    try:
        st = os.stat(path)
    except OSError:
        return None
    return st.st_dev, st.st_ino


def processes_in(names: Iterable[str]) -> Iterator[int]:
    """Pids whose network namespace is one of the named ones, whoever started them."""
    wanted = {i for i in (_inode(NETNS_DIR / name) for name in names) if i is not None} - {_inode("/proc/self/ns/net")}
    if wanted:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _inode(entry / "ns/net") in wanted:
                yield int(entry.name)


def _kill(pid: int, *, still: Iterable[str] | None = None, started: int | None = None) -> int | None:
    """SIGKILL one process through a pidfd, after checking again that it is the one meant. Returns the pidfd."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    same = start_time(pid) == started if started is not None else pid in set(processes_in(still or ()))
    if not same or pid == os.getpid():
        os.close(fd)
        return None
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    return fd


def _await(fds: list[int]) -> None:
    for fd in fds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(KILL_WAIT_MS)
        os.close(fd)


def remove(entry: Entry) -> None:
    """Remove everything of one lab: registered processes, whatever runs in its namespaces, the namespaces, its files.

    Idempotent. The registry file goes last, so an interrupted removal is taken up again by the next sweep.
    """
    _await([fd for pid, started in entry.processes if (fd := _kill(pid, started=started)) is not None])
    for _ in range(5):  # an agent that dies may just have started an engine
        names = namespaces(entry.prefix)
        pids = list(processes_in(names))
        if not pids:
            break
        _await([fd for pid in pids if (fd := _kill(pid, still=names)) is not None])
    names = namespaces(entry.prefix)
    if names:
        lines = "".join(f"netns del {name}\n" for name in names)
        subprocess.run(["ip", "-force", "-batch", "-"], input=lines, text=True, capture_output=True, check=False)
    shutil.rmtree(entry.directory, ignore_errors=True)
    if not leftovers(entry, registered=False):
        entry.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            ROOT.rmdir()


def sweep(*, kept: bool = False) -> list[str]:
    """Remove every lab whose owner is gone (those left up on purpose only with `kept`). Returns their ids."""
    gone = [e for e in entries() if not e.owner_alive and (kept or not e.kept)]
    for entry in gone:
        remove(entry)
    return [e.id for e in gone]


def tables() -> set[str]:
    """Tables of nftables in the current network namespace."""
    done = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    return set(done.stdout.splitlines())


def links() -> set[str]:
    """Links of the current network namespace."""
    done = subprocess.run(["ip", "-o", "link", "show"], capture_output=True, text=True, check=False)
    return {line.split(": ")[1].split("@")[0] for line in done.stdout.splitlines() if ": " in line}


def leftovers(entry: Entry, *, registered: bool = True) -> list[str]:
    """What of this lab is still on the machine, counted by looking: processes, namespaces, links, tables, files."""
    names = namespaces(entry.prefix)
    found = [f"namespace {n}" for n in names]
    found += [f"process {p}" for p in processes_in(names)]
    found += [f"process {p}" for p, t in entry.processes if start_time(p) == t]
    found += [f"link {n}" for n in links() if entry.id in n]
    found += [f"table {t}" for t in tables() if entry.id in t]
    found += [f"directory {entry.directory}"] if entry.directory.exists() else []
    return found + ([f"file {entry.file}"] if registered and entry.file.exists() else [])
