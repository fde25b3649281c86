"""An owner's monitor: everything that the log says about a name, with the whole tree checked on the way.

It reads every entry in order, makes each leaf hash itself and grows a tree of its own; every head it is shown must be the
root of that tree. So it needs no proof from the server and nothing can be left out, put in or changed behind it without
being noticed. What it remembers between runs is the right edge of the tree: about log2(size) hashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ca.transparency import ACT, CERTIFICATE, Entry, computed
from identity.errors import BadState, NotVerified
from identity.keys import write_secret
from identity.merkle import Tree, grow

BATCH: Final = 1000


class Seen(BaseModel):
    """A monitor's memory. `edge`: "level/position" -> hash (hex) of the complete subtrees at the right edge."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    version: Literal[1] = 1
    size: int = Field(default=0, ge=0)
    root: str = ""
    edge: dict[str, str] = {}


class Monitor:
    """Feed it entries by their place, then `check` the head they came with."""

    def __init__(self, seen: Seen | None = None) -> None:
        seen = seen or Seen()
        self.size = seen.size
        self._edge = {(int(n), int(p)): bytes.fromhex(h) for key, h in seen.edge.items() for n, _, p in [key.partition("/")]}
        if seen.root and self.root != seen.root:
            raise BadState("state.monitor", "the monitor's memory does not hold together", hint="begin anew without it")

    @property
    def root(self) -> str:
        return Tree(self.size, lambda level, position: self._edge[level, position]).root().hex()

    @property
    def seen(self) -> Seen:
        """What to remember."""
        return Seen(size=self.size, root=self.root, edge={f"{n}/{p}": h.hex() for (n, p), h in self._edge.items()})

    def take(self, entries: Iterable[Entry]) -> list[Entry]:
        """Grow the tree. Raises NotVerified ``log.gap`` for a missing entry, ``log.entry`` for one that is not its leaf."""
        taken: list[Entry] = []
        for entry in entries:
            if entry.leaf != self.size:
                raise NotVerified("log.gap", f"the log leaves out entry {self.size}")
            found = computed(entry)
            if found.hex() != entry.hash:
                raise NotVerified("log.entry", f"entry {self.size} is not what its hash says")
            for level, position, digest in grow(self.size, [found], lambda n, p: self._edge[n, p]):
                self._edge[level, position] = digest
            self.size += 1
            self._edge = {(n, p): h for (n, p), h in self._edge.items() if p == (self.size >> n) - 1 and not p & 1}
            taken.append(entry)
        return taken

    def check(self, size: int, root: str) -> None:
        """Is that head of our tree? Raises NotVerified ``log.fork``; a head further on is for later."""
        if size < self.size or (size == self.size and root != self.root):
            raise NotVerified(
                "log.fork", f"the log's head at {size} entries does not fit the {self.size} that were read",
                hint="the CA shows different histories: keep this monitor's state file, it is evidence",
            )  # fmt: skip


def load(path: Path) -> Seen | None:
    """A memory from an earlier run; None when there is none. Raises BadState ``state.monitor``."""
    try:
        return Seen.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise BadState("state.monitor", f"{path} is not the memory of a monitor", hint="begin anew without it") from None


def save(path: Path, seen: Seen) -> None:
    """Durably, 0600."""
    write_secret(path, seen.model_dump_json().encode())


def entry_of(data: Mapping[str, Any]) -> Entry:
    """An entry as it came over the wire."""
    return Entry(**data)


def concerns(entry: Entry, name: str) -> bool:
    """Is the entry about a workload, an instance, an endpoint or a SPIFFE ID of that name?"""
    subject = entry.subject
    if entry.kind == CERTIFICATE:
        return subject == name or subject.partition("://")[2].partition("/")[2] in {name, f"host/{name}", f"sidecar/{name}", f"wl/{name}"}
    return subject == name or (subject.rpartition("/")[0] == name and subject.rpartition("/")[2].isdigit())


def told(entry: Entry) -> dict[str, Any]:
    """What is shown of an entry."""
    detail: Any = entry.detail
    if entry.kind not in {ACT, CERTIFICATE} and isinstance(detail, str):
        detail = _payload(detail)
    return {"leaf": entry.leaf, "at": entry.at, "kind": entry.kind, "actor": entry.actor, "action": entry.action,
            "subject": entry.subject, "outcome": entry.outcome, "detail": detail}  # fmt: skip


def _payload(envelope: str) -> Any:
    from identity.keys import unb64

    try:
        return json.loads(unb64(envelope.split(".")[1]))
    except (ValueError, IndexError):
        return envelope
