"""A further CA process on one PostgreSQL database: the copy of a directory that it needs, and going on after a restore.

All processes sign with the same keys: one root, one intermediate, one set of record keys, so an endpoint cannot tell them
apart and nothing has to be distributed when one is added. The price: a rotation of keys is done on the first process, the
keeper, and the copies are made again, which a running process takes over; until then it signs nothing with keys that are
out (ca/following.py). A replica renews nothing but its own TLS certificate and publishes no bundle; it has no root key.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ca import postgres
from ca.directory import REPLICA
from ca.keyring import MANIFEST
from identity.errors import BadState, Conflict
from identity.keys import write_secret

_OWN: Final = frozenset({"root.key", "server.key", "server.pem", "lock", "highwater", REPLICA})
_LAST: Final = frozenset({"jwt.json", MANIFEST})
_KINDS: Final = frozenset({".key", ".pem", ".json", ".url"})


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied where."""

    directory: str
    files: list[str]


def copy(directory: Path, target: Path) -> Copied:
    """Copy what a further process needs into a new directory (0700), without the root key and what is the process's own.

    Raises BadState ``replica.store`` for a control plane on SQLite, Conflict for a directory that is in use.
    """
    if postgres.address_of(directory) is None:
        raise BadState(
            "replica.store", f"{directory} keeps its registry in SQLite, which one process writes",
            hint="several processes need PostgreSQL: retinue-ca init --store-file FILE",
        )  # fmt: skip
    if target.exists() and any(p.name not in _OWN and p.name != "admin.sock" for p in target.iterdir()) and not (target / REPLICA).exists():
        raise Conflict("ca.dir_used", f"{target} is not empty", hint="choose an empty or a new directory")
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.chmod(0o700)
        files: list[str] = []
        # What says which keys there are comes after the keys: a process that runs there takes the copy over when it sees it.
        for path in sorted(directory.rglob("*"), key=lambda p: (p.name in _LAST, p)):
            name = path.relative_to(directory)
            if not path.is_file() or path.is_symlink() or path.suffix not in _KINDS or str(name) in _OWN:
                continue
            (target / name.parent).mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(path, target / f"{name}.new")
            os.chmod(target / f"{name}.new", path.stat().st_mode & 0o777)
            os.rename(target / f"{name}.new", target / name)
            files.append(str(name))
        if not (target / REPLICA).exists():
            write_secret(target / REPLICA, b"a copy: keys are rotated where it was made\n")
    except OSError as e:
        raise BadState("ca.dir", f"cannot write in {target}: {e.strerror}", hint="choose another directory") from None
    return Copied(str(target), files)
