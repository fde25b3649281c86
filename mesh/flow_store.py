"""Recorded flows on disk: a ring of JSON-lines files of bounded size, the oldest going first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from identity.errors import BadInput
from policy.flows import FlowRecord, dump_flows, read_flows

FILES: Final = 8
FILE_BYTES: Final = 1 << 20
DIRECTORY: Final = "flows"


class FlowStore:
    """Appends records; never more than FILES files of about FILE_BYTES. A disk that is full loses records and counts them."""

    def __init__(self, state_dir: Path, *, files: int = FILES, file_bytes: int = FILE_BYTES) -> None:
        self.path = state_dir / DIRECTORY
        self.files, self.file_bytes = files, file_bytes
        self.lost = self.damaged = 0

    def _ring(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return sorted(p for p in self.path.glob("*.jsonl") if p.stem.isdigit() and not p.is_symlink())
        return []

    def append(self, records: Iterable[FlowRecord]) -> None:
        """Write records to the newest file; blocking."""
        records = list(records)
        if not records:
            return
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            ring = self._ring()
            newest = ring[-1] if ring else self.path / "00000001.jsonl"
            if ring and newest.stat().st_size >= self.file_bytes:
                newest = self.path / f"{int(newest.stem) + 1:08d}.jsonl"
                for old in [*ring, newest][: -self.files]:
                    old.unlink(missing_ok=True)
            fd = os.open(newest, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(dump_flows(records))
        except OSError:
            self.lost += len(records)

    def read(self, *, since: int = 0, limit: int = 100_000) -> list[FlowRecord]:
        """Records seen at or after `since`, oldest first, the newest `limit`; lines that are none are passed over and counted."""
        out: list[FlowRecord] = []
        self.damaged = 0
        for path in reversed(self._ring()):
            try:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError:
                continue
            found = []
            for line in lines:
                try:
                    found += [r for r in read_flows(path.name, [line]) if r.time >= since]
                except BadInput:
                    self.damaged += 1  # cut off by a crash, or not ours
            out = found + out
            if len(out) >= limit:
                break
        return out[-limit:]
