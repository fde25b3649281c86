"""An endpoint and the transparency log: what it was given is in the log, and the log only grows. No socket, no clock.

What it was given: every record it acts upon, its own certificate and those of the workloads placed on it.

Every head has to continue the one remembered (kept on disk over restarts); one that does not is a fork: it is refused,
the remembered one stays, and the alarm ``log.fork`` stands until the process is told otherwise. An object in force whose
leaf is not proved LAG seconds after it was first seen, while the log answered, is ``log.missing``. Neither takes anything
out of force nor puts anything in: records are believed for their signatures and epochs, the log makes lies about them
show. `mono` is seconds of a clock that never steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from identity import certs
from identity.bundle import TrustBundle
from identity.errors import BadState, NotVerified
from identity.keys import write_secret
from identity.merkle import verify_inclusion
from identity.transparency import Seen, TreeHead, about_certificate, certificate_leaf, follow, record_leaf
from identity.wire.log import MAX_LEAVES, LogReply, LogRequest

FILE: Final = "heads.json"
LAG: Final = 120.0  # seconds an object may be in force without a proof, while the log answers
# What is logged when it is published: all that an endpoint acts upon, but for heartbeats, which say a position and a time.
KINDS: Final = ("policy", "bundle", "endpoint/", "placement/", "prepare/", "entries", "federation/")


class SavedHead(BaseModel):
    """heads.json: the newest head that was accepted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    version: Literal[1] = 1
    timeline: str
    size: int = Field(ge=0)
    root: str


def _leaf_of(cert: x509.Certificate) -> bytes:
    profile = "workload" if certs.claimed_id(cert).kind == "wl" else "endpoint"
    return certificate_leaf(about_certificate(cert, profile))


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition to raise or end: `text` None ends it."""

    code: Literal["log.fork", "log.missing", "log.restarted"]
    text: str | None


class Heads:
    """What one endpoint knows of the log. Raises BadState ``state.heads`` for a file that is not one."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self.seen: Seen | None = None
        self.forked: str | None = None
        self._proved: set[str] = set()  # leaf hashes, of what is in force
        self._waiting: dict[str, float] = {}  # leaf hash -> mono when it was first asked for
        self._names: dict[str, str] = {}
        try:
            saved = SavedHead.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValidationError):
            raise BadState(
                "state.heads", f"{self._path} is damaged: it does not say which log was seen",
                hint="remove it to trust the CA's log as it is now",
            ) from None  # fmt: skip
        self.seen = Seen(saved.timeline, saved.size, saved.root)

    def ask(self, objects: Mapping[str, str], mono: float, certificates: Mapping[str, x509.Certificate] | None = None) -> LogRequest:
        """What to ask next, for the objects in force (key -> envelope) and our own certificates (name -> leaf)."""
        self._names = {record_leaf(e).hex(): key for key, e in objects.items() if key.startswith(KINDS)}
        self._names |= {_leaf_of(cert).hex(): f"certificate {name}" for name, cert in (certificates or {}).items()}
        self._proved &= self._names.keys()
        missing = [leaf for leaf in self._names if leaf not in self._proved]
        self._waiting = {leaf: self._waiting.get(leaf, mono) for leaf in missing}
        oldest = sorted(self._waiting, key=lambda leaf: self._waiting[leaf])
        seen = self.seen
        return LogRequest(
            timeline=seen.timeline if seen else None, size=seen.size if seen else 0, leaves=oldest[:MAX_LEAVES]
        )

    def take(self, asked: LogRequest, reply: LogReply, trust: TrustBundle, mono: float) -> list[Finding]:
        """Check an answer and remember what it proves. Raises NotVerified ``log.*`` for one that does not hold."""
        head = trust.verify(TreeHead, reply.head)
        before = self.seen
        try:
            seen = follow(before, head, [bytes.fromhex(step) for step in reply.consistency])
        except NotVerified as e:
            self.forked = e.message
            return [Finding("log.fork", f"{e.message}: the CA may be showing different histories to different endpoints")]
        findings = [Finding("log.fork", None)] if self.forked is None else []
        if before is not None and before.timeline != seen.timeline:
            findings.append(Finding("log.restarted", f"the log began anew after {before.size} entries, with another timeline"))
        if seen != before:
            self._save(seen)
        if head.size == seen.size:
            for leaf in asked.leaves:
                if (proof := reply.proofs.get(leaf)) is not None:
                    path = [bytes.fromhex(step) for step in proof.path]
                    verify_inclusion(bytes.fromhex(leaf), proof.index, head.size, path, bytes.fromhex(head.root))
                    self._proved.add(leaf)
                    self._waiting.pop(leaf, None)
        late = sorted(self._names[leaf] for leaf in asked.leaves if mono - self._waiting.get(leaf, mono) >= LAG)
        text = f"not in the transparency log: {', '.join(late[:5])}{' ...' if len(late) > 5 else ''}" if late else None
        return [*findings, Finding("log.missing", text)]

    @property
    def pending(self) -> int:
        """How many objects in force are not proved yet."""
        return len(self._waiting)

    def _save(self, seen: Seen) -> None:
        self.seen = seen
        saved = SavedHead(timeline=seen.timeline, size=seen.size, root=seen.root)
        write_secret(self._path, saved.model_dump_json().encode())
