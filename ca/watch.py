"""An owner's monitor: everything that the log says about a name, with the whole tree checked on the way.

It reads every entry in order, makes each leaf hash itself and grows a tree of its own; every head it is shown must be the
root of that tree and be signed by a record key that a pinned root certified (`Pins`). So it needs no proof from the server,
nothing can be left out, put in or changed behind it without being noticed, and a head that does not fit is evidence that
the CA itself signed. What an entry is about is read from what its leaf hash covers, never from the columns beside it.
What it remembers between runs is the right edge of the tree (about log2(size) hashes), the timeline, and whom it believes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ca.transparency import ACT, CERTIFICATE, JWT, TOLD, Entry, computed
from identity import certs
from identity.bundle import TrustBundle, open_bundle
from identity.errors import BadInput, BadState, NotVerified
from identity.keys import unb64, write_secret
from identity.merkle import Tree, grow
from identity.names import TrustDomain
from identity.transparency import TreeHead

BATCH: Final = 1000


class Seen(BaseModel):
    """A monitor's memory. `edge`: "level/position" -> hash (hex) of the complete subtrees at the right edge; `roots`: PEM of
    the roots believed for `trust_domain`, `sequence` of the bundle that named them.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    version: Literal[1, 2] = 2
    size: int = Field(default=0, ge=0)
    root: str = ""
    edge: dict[str, str] = {}
    timeline: str | None = None
    trust_domain: str = ""
    roots: list[str] = []
    sequence: int = Field(default=0, ge=0)


class Pins:
    """Whom a monitor believes: roots, or the fingerprint of one before the first bundle came."""

    def __init__(self, trust_domain: TrustDomain, trusted: str | Sequence[x509.Certificate], sequence: int = 0) -> None:
        self.trust_domain, self.sequence = trust_domain, sequence
        self._trusted = trusted
        self._bundle: TrustBundle | None = None

    def head(self, bundle: str, envelope: str, now: float) -> TreeHead:
        """The head in a signed envelope, by the newest bundle. Raises NotVerified ``bundle.*``, ``record.*``, ``chain.*``."""
        if self._bundle is None:
            self._bundle = open_bundle(bundle, self._trusted, self.trust_domain, now)
            if self._bundle.sequence < self.sequence:
                raise NotVerified("bundle.rollback", f"a bundle with sequence {self._bundle.sequence} after {self.sequence}")
        elif bundle != self._bundle.envelope:
            self._bundle = self._bundle.accept_next(bundle, now)
        self.sequence = self._bundle.sequence
        return self._bundle.verify(TreeHead, envelope)

    def remember(self, seen: Seen) -> Seen:
        """What to remember, with whom is believed now."""
        found = self._trusted if self._bundle is None else self._bundle.roots
        roots = [] if isinstance(found, str) else [certs.pem(root) for root in found]
        return seen.model_copy(update={"trust_domain": self.trust_domain.name, "roots": roots, "sequence": self.sequence})


class Monitor:
    """Feed it entries by their place, then `check` the head they came with."""

    def __init__(self, seen: Seen | None = None) -> None:
        seen = seen or Seen()
        self.size, self.timeline = seen.size, seen.timeline
        self._edge = {(int(n), int(p)): bytes.fromhex(h) for key, h in seen.edge.items() for n, _, p in [key.partition("/")]}
        if seen.root and self.root != seen.root:
            raise BadState("state.monitor", "the monitor's memory does not hold together", hint="begin anew without it")

    @property
    def root(self) -> str:
        return Tree(self.size, lambda level, position: self._edge[level, position]).root().hex()

    @property
    def seen(self) -> Seen:
        """What to remember."""
        edge = {f"{n}/{p}": h.hex() for (n, p), h in self._edge.items()}
        return Seen(size=self.size, root=self.root, edge=edge, timeline=self.timeline)

    def begin(self, head: TreeHead) -> None:
        """A verified head, before its entries are read. Raises NotVerified ``log.restarted`` for another timeline."""
        if self.timeline is not None and head.timeline != self.timeline:
            raise NotVerified(
                "log.restarted", f"the log began anew with another timeline, after {self.size} entries",
                hint="was the CA restored from a backup? keep this monitor's state file, and begin anew without it",
            )  # fmt: skip
        self.timeline = head.timeline

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


def about(entry: Entry) -> frozenset[str]:
    """The names an entry is about, from what its leaf hash covers: subjects of acts, identities of certificates and tokens, and what
    the envelope of a record says. Nothing for a record that cannot be read (no endpoint could either).
    """
    if entry.kind == ACT:
        return _with_workload(entry.subject)
    if entry.kind in {CERTIFICATE, JWT}:
        assert isinstance(entry.detail, dict)
        named = str(entry.detail.get("spiffe_id"))
        path = named.partition("://")[2].partition("/")[2]
        return frozenset({named, path, path.partition("/")[2]} - {""})
    said = payload(entry)
    names = {str(said[key]) for key in ("endpoint", "foreign") if said.get(key)}
    if "instance" in said:
        names |= {str(said.get("name")), f"{said.get('name')}/{said['instance']}", str(said.get("spiffe_id"))}
    names |= {str(one.get("name")) for one in said.get("entries") or () if isinstance(one, dict)}
    return frozenset(names)


def _with_workload(subject: str) -> frozenset[str]:
    """``shop/api/0`` is about shop/api as well."""
    name, _, number = subject.rpartition("/")
    return frozenset({subject, name} if name and number.isdigit() else {subject})


def concerns(entry: Entry, name: str) -> bool:
    """Is the entry about a workload, an instance, an endpoint or a SPIFFE ID of that name?"""
    return name in about(entry)


def told(entry: Entry) -> dict[str, Any]:
    """What is shown of an entry."""
    detail: Any = entry.detail if entry.kind in TOLD else payload(entry) or entry.detail
    return {"leaf": entry.leaf, "at": entry.at, "kind": entry.kind, "actor": entry.actor, "action": entry.action,
            "subject": entry.subject, "outcome": entry.outcome, "detail": detail}  # fmt: skip


def payload(entry: Entry) -> dict[str, Any]:
    """What a record says; empty when it cannot be read."""
    try:
        said = json.loads(unb64(str(entry.detail).split(".")[1]))
    except (BadInput, ValueError, IndexError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
