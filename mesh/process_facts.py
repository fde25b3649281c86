"""What the kernel says about a calling process, for the selectors of registration entries.

    pidfd of the caller -> it lives -> /proc/PID/status, cgroup, exe -> it still lives -> the facts are its facts

The user must still be the one that connected. What these facts do not say: who talks on the connection now. A process
can connect and then exec another program, or hand the connection on; what it execs answers for what it did before.
So a path or digest tells programs of one user apart and keeps no user out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Final

from identity.entries import NOBODY, Facts
from mesh.attestation import Caller, NotAttested

MAX_PROGRAM: Final = 64 * 1024 * 1024  # bytes; a larger one has no digest
_CHUNK: Final = 1 << 20
_digests: OrderedDict[tuple[int, int, int, int, int], str] = OrderedDict()  # of files as they were, newest last


def facts_of(caller: Caller, netns: frozenset[str], *, program: bool = False, digest: bool = False) -> Facts:
    """The facts; `program` and `digest` ask for the path and SHA-256 of what runs.

    Raises NotAttested ``attest.gone``, ``attest.changed``, ``attest.nobody``.
    """
    if not caller.alive():
        raise _gone()
    uid, gid, groups = credentials(caller.pid)
    cgroup = _cgroup(caller.pid)
    path = _program(caller.pid) if program else None
    sha256 = _digest(caller.pid) if digest else None
    if not caller.alive():
        raise _gone()
    if (uid, gid) != (caller.uid, caller.gid):
        raise NotAttested("attest.changed", "the calling process has changed its user since it connected")
    if NOBODY in {uid, gid}:
        raise NotAttested(
            "attest.nobody", "the user of the calling process has no number here, or none of its own",
            hint="map the users of its user namespace, or give it a user other than nobody",
        )  # fmt: skip
    return Facts(uid, gid, groups, cgroup, netns, path, sha256)


def _gone() -> NotAttested:
    return NotAttested("attest.gone", "the calling process has ended")


def credentials(pid: int) -> tuple[int, int, frozenset[int]]:
    """Effective user and group, supplementary groups (proc(5), status). Raises NotAttested ``attest.gone``."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        raise _gone() from None
    # The name of a process stands in the first line and is its own choice: a newline in it is escaped there.
    fields = dict(line.split(":\t", 1) for line in text.splitlines()[1:] if ":\t" in line)
    try:
        ids = [int(fields[name].split()[1]) for name in ("Uid", "Gid")]
        return ids[0], ids[1], frozenset(map(int, fields.get("Groups", "").split()))
    except (KeyError, ValueError, IndexError):
        raise _gone() from None


def _cgroup(pid: int) -> str:
    try:
        return cgroup_of(Path(f"/proc/{pid}/cgroup").read_text(errors="replace"))
    except OSError:
        raise _gone() from None


def cgroup_of(text: str) -> str:
    """The control group in /proc/PID/cgroup: of the unified hierarchy, else of systemd's named one; ``/`` for the root
    (cgroups(7)).
    """
    lines = [line.split(":", 2) for line in text.split("\n") if line.count(":") >= 2]
    paths = {controllers: path for _, controllers, path in reversed(lines)}
    unified, named = paths.get("", "/"), paths.get("name=systemd", "/")
    return unified if unified != "/" else named


def _program(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None


def _digest(pid: int) -> str | None:
    """SHA-256 of the program's file, which is what runs: a replaced file is another inode."""
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_PROGRAM:
                return None
            key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            found = _digests.get(key)
            if found is None:
                made = hashlib.sha256()
                while chunk := file.read(_CHUNK):
                    made.update(chunk)
                found = _digests[key] = made.hexdigest()
                while len(_digests) > 256:
                    _digests.popitem(last=False)
            with contextlib.suppress(KeyError):
                _digests.move_to_end(key)
            return found
    except OSError:
        return None
