"""The policy authority as an endpoint keeps it on disk, beside the epochs: neither a restart nor another CA takes it back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from identity.errors import BadState, NotVerified, RetinueError
from identity.keys import write_secret
from identity.wire import parse
from policy.signing import PartMark, open_authority
from policy.trust import PolicyTrust

FILE: Final = "policy-authority.json"
_HINT: Final = "put the file back from a backup; or enrol again with a new token, --replace and --policy-authority"


class _Mark(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    serial: int = Field(ge=0)
    body: str = Field(max_length=64)
    approvals: int = Field(default=0, ge=0)


class Saved(BaseModel):
    """policy-authority.json; `check` is the SHA-256 of the rest, so that an edited or cut file is seen."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    version: int = 1
    chain: list[str] = Field(min_length=1)
    marks: dict[str, _Mark] = {}
    check: str = ""

    def digest(self) -> str:
        """SHA-256 (hex) of everything but `check`."""
        return hashlib.sha256(self.model_dump_json(exclude={"check"}).encode()).hexdigest()


def pin(
    trust_domain: str, chain: Sequence[str], fingerprint: str | None = None, known: PolicyTrust | None = None
) -> PolicyTrust:
    """The trust that an enrolment begins with: the CA's authority, which must have the fingerprint if one was given.

    known: what this machine knew before. Raises NotVerified ``authority.*``.
    """
    if known is not None and known.authority is not None:
        known.next_authority(chain)
    if not chain:
        if fingerprint is not None:
            raise NotVerified("authority.missing", "the CA has no policy authority, and one was asked for",
                              hint="leave --policy-authority out, or ask who runs the CA")  # fmt: skip
        return known or PolicyTrust(trust_domain)
    before = known.authority if known is not None else None
    authority = open_authority(chain, trust_domain, known=before, fingerprint=fingerprint)
    return PolicyTrust(trust_domain, authority, dict(known.marks) if known is not None else {})


def load(directory: Path, trust_domain: str) -> PolicyTrust:
    """What the state directory knows. Raises BadState ``state.authority`` rather than forget it."""
    from mesh.state import read_owned  # mesh/state.py stands on mesh/sync.py, which stands on this module

    data = read_owned(directory / FILE)
    if data is None:
        return PolicyTrust(trust_domain)
    try:
        found = parse(Saved, data)
        if found.check != found.digest():
            raise BadState("state.authority", "its checksum does not match")
        authority = open_authority(found.chain, trust_domain)
    except (RetinueError, ValidationError) as error:
        why = error.message if isinstance(error, RetinueError) else "not its schema"
        raise BadState("state.authority", f"{directory / FILE} is damaged: {why}", hint=_HINT) from None
    marks = {scope: PartMark(m.serial, m.body, m.approvals) for scope, m in found.marks.items()}
    return PolicyTrust(trust_domain, authority, marks)


def saved(trust: PolicyTrust) -> Saved | None:
    """What to keep; None while no authority is known."""
    if trust.authority is None:
        return None
    marks = {s: _Mark(serial=m.serial, body=m.body, approvals=m.approvals) for s, m in sorted(trust.marks.items())}
    kept = Saved(chain=trust.authority.texts(), marks=marks)
    return kept.model_copy(update={"check": kept.digest()})


def save(directory: Path, trust: PolicyTrust) -> None:
    """Write what is known; nothing where no authority is. Raises OSError."""
    kept = saved(trust)
    if kept is not None:
        write_secret(directory / FILE, kept.model_dump_json().encode() + b"\n")
