"""The agent's durable state: what was last verified, the highest epochs ever seen, and who is attached here.

    snapshot.json     envelopes in force and their position; every envelope is verified again when it is loaded
    epochs.json       highest epoch of every instance and highest policy revision; outlives removals
    policy-authority.json  who may sign policy, and the newest part of each scope; only where there is an authority
    attachments.json  instances attached on this host

Written in that order: a crash between two files leaves the marks behind the signed records, never ahead of them, so
only an older snapshot put back by hand can be behind the marks, and that is refused. Each write is temporary file,
fsync, rename, fsync of the directory. The directory is 0700, the files 0600, all owned by the agent's user.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from identity.errors import BadInput, BadState, Conflict
from identity.keys import write_secret
from identity.wire import parse
from identity.wire.local import Attach
from mesh import policy_trust
from mesh.acceptance import Mark
from mesh.snapshot import InstanceKey
from mesh.sync import Position, SyncMachine

STATE_VERSION: Final = 1
MAX_FILE: Final = 128 * 1024 * 1024


class _File(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    version: Literal[1] = STATE_VERSION


class SavedSnapshot(_File):
    """snapshot.json. `heard` is CLOCK_BOOTTIME in seconds when the heartbeat arrived, valid within `boot` only."""

    endpoint: str
    timeline: str
    revision: int
    hash: str
    proof: str  # the heartbeat that came with the position
    heartbeat: str  # the newest
    boot: str
    heard: float
    objects: dict[str, str]


class SavedMark(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    number: int = Field(ge=0)
    body: str = Field(max_length=64)


class SavedMarks(_File):
    """epochs.json; `check` is the SHA-256 of the rest, so that an edited or cut file is seen."""

    timeline: str = ""
    revision: int = 0
    policy: SavedMark | None = None
    epochs: dict[str, SavedMark] = {}
    check: str = ""

    def digest(self) -> str:
        """SHA-256 (hex) of everything but `check`."""
        return hashlib.sha256(self.model_dump_json(exclude={"check"}).encode()).hexdigest()


class SavedPlace(BaseModel):
    """One attachment. `inode` names its network namespace; `started` is the start time of the process in its path
    (clock ticks after boot), so that a recycled process number is not taken for the old one.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    attach: Attach
    inode: int | None = None
    started: int | None = None


class SavedAttachments(_File):
    """attachments.json."""

    boot: str = ""
    places: list[SavedPlace] = []


S = TypeVar("S", bound=_File)


class StateDir:
    """One agent's state directory. Every method raises BadState for an unsafe or damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def open(self) -> None:
        """Check the directory and take its lock. Raises BadState, or Conflict when another agent has it."""
        check_dir(self.path)
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise Conflict(
                "agent.running",
                f"another agent uses {self.path}",
                hint="stop it, or give this one its own --state-dir",
            ) from None
        self._lock = fd

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ---- snapshot

    def save_snapshot(self, machine: SyncMachine, boot: str) -> None:
        """Write what the machine holds in force. Nothing to save before the first position."""
        if machine.position is None or machine.heartbeat is None or machine.proof is None:
            return
        objects = machine.objects
        saved = SavedSnapshot(
            endpoint=machine.endpoint, timeline=machine.position.timeline, revision=machine.position.revision,
            hash=machine.received_hash, proof=machine.proof.envelope,
            heartbeat=machine.heartbeat.envelope, boot=boot, heard=machine.heard, objects=objects,
        )  # fmt: skip
        self._write("snapshot.json", saved)

    def restore(self, machine: SyncMachine, *, boot: str, wall: float, mono: float) -> bool:
        """Load and verify snapshot.json into `machine`; False when there is none. Raises BadState, machine untouched."""
        saved = self._read("snapshot.json", SavedSnapshot, "state.snapshot")
        if saved is None:
            return False
        if saved.endpoint != machine.endpoint:
            raise BadState(
                "state.snapshot",
                f"snapshot.json belongs to endpoint {ascii(saved.endpoint)[:80]}",
                hint=_REPLACED,
            )
        marks = self._marks()
        if marks.timeline == saved.timeline and saved.revision < marks.revision:
            raise BadState(
                "state.rollback",
                f"snapshot.json is at revision {saved.revision}, but revision {marks.revision} was in force before",
                hint=_REPLACED,
            )
        machine.restore(
            saved.objects, Position(saved.timeline, saved.revision), saved.proof, saved.heartbeat,
            heard=saved.heard if saved.boot == boot and saved.heard <= mono else None, wall=wall, mono=mono, stored_hash=saved.hash,
        )  # fmt: skip
        return True

    # ---- epochs

    def save_marks(self, machine: SyncMachine) -> None:
        """Write the highest epochs and policy revision."""
        here = machine.position
        marks = SavedMarks(
            timeline=here.timeline if here else "",
            revision=here.revision if here else 0,
            policy=_saved(machine.policy_mark) if machine.policy_mark else None,
            epochs={key: _saved(mark) for key, mark in sorted(machine.marks.items())},
        )
        self._write("epochs.json", marks.model_copy(update={"check": marks.digest()}))
        authority = policy_trust.saved(machine.policy_trust)
        if authority is not None:
            self._write(policy_trust.FILE, authority)

    def load_marks(self) -> tuple[dict[InstanceKey, Mark], Mark | None]:
        """Highest epoch of each instance, and of the policy. Raises BadState ``state.epochs`` rather than forget them."""
        marks = self._marks()
        epochs = {InstanceKey(key): Mark(m.number, m.body) for key, m in marks.epochs.items()}
        return epochs, Mark(marks.policy.number, marks.policy.body) if marks.policy else None

    def _marks(self) -> SavedMarks:
        marks = self._read("epochs.json", SavedMarks, "state.epochs", hint=_EPOCHS)
        if marks is None:
            if (self.path / "snapshot.json").exists():
                raise BadState("state.epochs", "epochs.json is missing beside a snapshot.json", hint=_EPOCHS)
            return SavedMarks()
        if marks.check != marks.digest():
            raise BadState(
                "state.epochs", "epochs.json was altered: its checksum does not match", hint=_EPOCHS
            )
        return marks

    def forget_marks(self) -> None:
        """Put a damaged epochs.json aside, on the operator's explicit word; the snapshot goes with it."""
        for name in ("epochs.json", "snapshot.json"):
            path = self.path / name
            if path.exists():
                path.replace(path.with_name(f"{name}.damaged"))

    # ---- attachments

    def save_attachments(self, places: Sequence[SavedPlace], boot: str) -> None:
        """Write who is attached here."""
        self._write("attachments.json", SavedAttachments(boot=boot, places=list(places)))

    def load_attachments(self, boot: str) -> list[SavedPlace]:
        """Who was attached here; empty when nobody ever was. What a process held is gone after a reboot."""
        hint = f"move {self.path}/attachments.json away and attach again"
        saved = self._read("attachments.json", SavedAttachments, "state.attachments", hint=hint)
        if saved is None:
            return []
        if saved.boot == boot:
            return saved.places
        return [SavedPlace(attach=p.attach) for p in saved.places if p.started is None]

    # ---- files

    def _write(self, name: str, content: BaseModel) -> None:
        try:
            write_secret(self.path / name, content.model_dump_json().encode() + b"\n")
        except OSError as e:
            hint = (
                "free some space"
                if e.errno in {errno.ENOSPC, errno.EDQUOT}
                else "check the disk and the mode of the directory"
            )
            raise BadState(
                "state.write", f"cannot write {self.path / name}: {e.strerror}", hint=hint
            ) from None

    def _read(self, name: str, kind: type[S], code: str, *, hint: str = "") -> S | None:
        data = read_owned(self.path / name)
        if data is None:
            return None
        try:
            return parse(kind, data)
        except (BadInput, ValidationError) as e:
            raise BadState(code, f"{self.path / name} is damaged ({e})", hint=hint or _REPLACED) from None


_REPLACED: Final = "nothing of it is used; the next contact with the CA replaces it"
_EPOCHS: Final = (
    "put the file back from a backup; or accept that older placements could be replayed to this host and "
    "start once with --forget-epochs"
)


def check_dir(path: Path) -> None:
    """Raise BadState unless `path` is a directory of ours that nobody else can enter."""
    try:
        info = os.lstat(path)
    except OSError as e:
        raise BadState(
            "state.dir", f"no state directory {path}: {e.strerror}", hint="run retinue enroll first"
        ) from None
    if not stat.S_ISDIR(info.st_mode):
        raise BadState("state.dir", f"{path} is not a directory")
    _check_owner(path, info)


def read_owned(path: Path) -> bytes | None:
    """A file of ours that nobody else can read or write; None when it does not exist. Raises BadState."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise BadState("state.file", f"cannot read {path}: {e.strerror}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise BadState("state.file", f"{path} is not a regular file")
        _check_owner(path, info)
    except BaseException:
        os.close(fd)
        raise
    with os.fdopen(fd, "rb") as f:
        data = f.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise BadState("state.file", f"{path} is larger than {MAX_FILE} bytes")
    return data


def _check_owner(path: Path, info: os.stat_result) -> None:
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid != os.geteuid():
        raise BadState(
            "state.owner", f"{path} belongs to uid {info.st_uid}, not to uid {os.geteuid()}",
            hint=f"chown -R {os.geteuid()} {path}",
        )  # fmt: skip
    if mode & 0o077:
        fixed = "700" if stat.S_ISDIR(info.st_mode) else "600"
        raise BadState(
            "state.mode", f"{path} has mode {mode:04o}: others can reach it", hint=f"chmod {fixed} {path}"
        )


def _saved(mark: Mark) -> SavedMark:
    return SavedMark(number=mark.number, body=mark.body)
