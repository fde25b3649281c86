"""The high-water mark: the newest position that was acknowledged, kept beside the database and not inside it.

A database that was put back from a copy is whole and signed and still wrong: what was acknowledged after the copy is
missing, and numbers would be given out twice. The mark is written and synced before anybody is told of a position, so a
database that ends before it is known to be old. Two slots are written in turn, each within one disk sector and with its
own checksum: a power failure loses the newer one at most, which nobody was told of yet.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from identity.errors import BadState, NoPrivilege
from identity.keys import write_secret

FILE: Final = "highwater"
SLOT: Final = 512
_HEAD: Final = "retinue-highwater-1"


@dataclass(frozen=True, slots=True)
class Mark:
    """A position, and `base`: no number of the timeline (epoch, generation, revision) is above base + revision."""

    timeline: str
    revision: int
    base: int

    @property
    def top(self) -> int:
        """No number was ever given out above this."""
        return self.base + self.revision


class HighWater:
    """The mark of one directory. `mark` is None until the first one. One writer: the holder of the directory's lock."""

    def __init__(self, path: Path) -> None:
        """Raises BadState ``state.highwater`` for a file that is not one, NoPrivilege when it may not be read."""
        self.path = path
        self.mark: Mark | None = None
        self._turn = 0
        self._fd: int | None = None
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except PermissionError:
            raise NoPrivilege("ca.dir", f"may not read {path}", hint="run it as root or as the CA's own user") from None
        except OSError as e:
            raise BadState("state.highwater", f"cannot read {path}: {e.strerror}") from None
        found = [slot for n in (0, 1) if (slot := _parse(data[n * SLOT : (n + 1) * SLOT])) is not None]
        if not found:
            raise BadState(
                "state.highwater", f"{path} is damaged: it does not say what was acknowledged",
                hint="when the database is certainly the newest, remove that file; else restore with --new-timeline",
            )  # fmt: skip
        self._turn, self.mark = max(found, key=lambda slot: slot[0])

    def raise_to(self, mark: Mark) -> None:
        """Write and sync a new mark. Raises OSError: then nobody may be told of that position."""
        if mark == self.mark:
            return
        turn = self._turn + 1
        slot = _format(turn, mark)
        if self._fd is None:
            if self.mark is None:
                write_secret(self.path, slot + slot)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.pwrite(self._fd, slot, (turn % 2) * SLOT)
        os.fdatasync(self._fd)
        self._turn, self.mark = turn, mark

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _format(turn: int, mark: Mark) -> bytes:
    text = f"{_HEAD} {turn} {mark.timeline} {mark.revision} {mark.base} "
    return f"{text}{_sum(text)}".encode().ljust(SLOT - 1) + b"\n"


def _parse(slot: bytes) -> tuple[int, Mark] | None:
    try:
        text, _, checksum = slot.decode("ascii").rstrip().rpartition(" ")
        head, turn, timeline, revision, base = text.split(" ")
        if head != _HEAD or checksum != _sum(text + " "):
            return None
        return int(turn), Mark(timeline, int(revision), int(base))
    except ValueError:
        return None


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
