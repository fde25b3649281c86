"""What an endpoint knows of the policy authority: which operators may sign policy, and the newest it saw of each scope.

Once an endpoint knows an authority, no policy is taken without its signatures, whatever key of the CA signed the record
around it; the authority itself only moves on by documents that its own root signers signed. Kept on disk beside the
epochs, so neither a restart nor another CA with the same root takes it back. Before an endpoint knows one, the CA's
policy key alone decides, and `status` says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from identity.errors import BadState, NotVerified, RetinueError
from identity.keys import write_secret
from identity.records import PolicyRecord
from identity.wire import parse
from policy.signing import Authority, Part, PartMark, open_authority, verify_bundle

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


@dataclass(slots=True)
class PolicyTrust:
    """The authority that is pinned here (None: none is known yet) and the marks of its scopes."""

    trust_domain: str
    authority: Authority | None = None
    marks: dict[str, PartMark] = field(default_factory=dict)
    _verified: tuple[PolicyRecord, Authority | None, dict[str, Part]] | None = None  # the last one checked
    _noted: PolicyRecord | None = None

    def check(self, record: PolicyRecord) -> None:
        """Is a record of the CA signed as the authority asks? Changes nothing.

        Raises NotVerified ``authority.*``, ``policy.*``, or BadPolicy; what is in force then stays.
        """
        authority, parts = self._judge(record)
        self._verified = (record, authority, parts)

    def _judge(self, record: PolicyRecord) -> tuple[Authority | None, dict[str, Part]]:
        authority = self.next_authority(record.authority)
        if authority is None:
            if record.parts or (record.trial is not None and record.trial.parts):
                raise NotVerified("authority.missing", "a signed policy without the authority that its signers belong to")
            return None, {}
        files = [(f.name, f.text) for f in record.files]
        parts = verify_bundle(authority, files, record.parts, self.marks)
        if record.trial is not None:
            trial = record.trial
            # The trial may not go behind what it is tried beside.
            beside = self.marks | {scope: part.mark for scope, part in parts.items()}
            verify_bundle(authority, [(f.name, f.text) for f in trial.files], trial.parts, beside)
        return authority, parts

    def next_authority(self, chain: Sequence[str]) -> Authority | None:
        """The authority after this chain. Raises NotVerified for one that does not continue what is known."""
        if not chain:
            if self.authority is not None:
                raise NotVerified(
                    "policy.unsigned", "the policy comes without its operators' signatures, and an authority is known here",
                    hint="the CA alone cannot publish a policy once an authority exists",
                )  # fmt: skip
            return None
        return open_authority(chain, self.trust_domain, known=self.authority)

    def note(self, record: PolicyRecord) -> None:
        """A record is in force now: remember its authority and the serials of its parts."""
        if self._noted is record:
            return
        known = self._verified
        authority, parts = (known[1], known[2]) if known is not None and known[0] is record else self._judge(record)
        self._noted, self._verified = record, None
        self.authority = authority
        for scope, part in parts.items():
            self.marks[scope] = part.mark

    # ---- on disk

    def saved(self) -> Saved | None:
        """What to keep; None while no authority is known."""
        if self.authority is None:
            return None
        marks = {s: _Mark(serial=m.serial, body=m.body, approvals=m.approvals) for s, m in sorted(self.marks.items())}
        kept = Saved(chain=self.authority.texts(), marks=marks)
        return kept.model_copy(update={"check": kept.digest()})


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
        saved = parse(Saved, data)
        if saved.check != saved.digest():
            raise BadState("state.authority", "its checksum does not match")
        authority = open_authority(saved.chain, trust_domain)
    except (RetinueError, ValidationError) as error:
        why = error.message if isinstance(error, RetinueError) else "not its schema"
        raise BadState("state.authority", f"{directory / FILE} is damaged: {why}", hint=_HINT) from None
    marks = {scope: PartMark(m.serial, m.body, m.approvals) for scope, m in saved.marks.items()}
    return PolicyTrust(trust_domain, authority, marks)


def save(directory: Path, trust: PolicyTrust) -> None:
    """Write what is known; nothing where no authority is. Raises OSError."""
    saved = trust.saved()
    if saved is not None:
        write_secret(directory / FILE, saved.model_dump_json().encode() + b"\n")


def describe(trust: PolicyTrust, parts: Mapping[str, PartMark] | None = None) -> str:
    """One line for people."""
    if trust.authority is None:
        return "the CA's policy key alone (no policy authority is known here)"
    marks = parts if parts is not None else trust.marks
    serials = ", ".join(f"{scope or 'mesh'}#{mark.serial}" for scope, mark in sorted(marks.items()))
    return f"authority {trust.authority.fingerprint[:16]} version {trust.authority.version}" + (f" ({serials})" if serials else "")
