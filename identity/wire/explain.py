"""Why an instance has, or has not, its identity: asked of an agent or of the CA.

    GET /v1/explain/identity?name=&instance=&pid=   -> IdentityExplained   (agent's local API)
    GET /v1/explain/identity?name=&instance=        -> IdentityExplained   (administration)
"""

from __future__ import annotations

from typing import Literal

from identity.wire import Message

State = Literal["active", "prepared", "waiting", "fenced", "moving", "unplaced", "revoked", "unknown"]


class SelectorFinding(Message):
    selector: str
    wanted: str
    found: str
    ok: bool


class EntryExplained(Message):
    """One registration entry of the workload. holds is None when no process was asked about."""

    id: str
    parent: str = ""
    selectors: str
    labels_ok: bool = True
    ends: int | None = None
    holds: bool | None = None
    findings: list[SelectorFinding] = []


class CertificateShown(Message):
    """The newest certificate known. renew_at is None where only the holder knows it."""

    serial: str
    issuer: str
    not_before: int
    not_after: int
    renew_at: int | None = None


class IdentityExplained(Message):
    """holds: does whoever is asked about hold it now, here (agent: this endpoint or the process; CA: anybody)."""

    name: str
    instance: int
    spiffe_id: str
    asked: str  # the endpoint that answers, or "ca"
    holds: bool
    reason: str
    proof: list[str] = []
    holder: str | None = None
    state: State
    epoch: int | None = None
    since: int | None = None
    ends: int | None = None
    ends_with: str | None = None
    fence: str | None = None
    labels: dict[str, str] = {}
    certificate: CertificateShown | None = None
    entries: list[EntryExplained] = []
    fences: list[str] = []
