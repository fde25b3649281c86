"""What somebody who verifies policies knows of their authority: who may sign, and the newest seen of each scope. Pure.

Once an authority is known, no policy is taken without its signatures, whatever key of the CA signed the record around it;
the authority itself only moves on by documents that its own root signers signed. Before one is known, the CA's policy key
alone decides. Hosts keep this on disk (mesh/policy_trust.py); the gateway and the offline history start from what they see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from identity.errors import NotVerified
from identity.records import PolicyRecord
from policy.signing import Authority, Part, PartMark, open_authority, verify_bundle


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


def describe(trust: PolicyTrust, parts: Mapping[str, PartMark] | None = None) -> str:
    """One line for people."""
    if trust.authority is None:
        return "the CA's policy key alone (no policy authority is known here)"
    marks = parts if parts is not None else trust.marks
    serials = ", ".join(f"{scope or 'mesh'}#{mark.serial}" for scope, mark in sorted(marks.items()))
    return f"authority {trust.authority.fingerprint[:16]} version {trust.authority.version}" + (f" ({serials})" if serials else "")
