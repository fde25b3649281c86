"""What every part of the registry works with: the store, the record signer and the trust domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ca.store import Store
from identity.names import TrustDomain
from identity.records import P, Payload


class Opener(Protocol):
    """Verify an envelope of a record type."""

    def __call__(self, kind: type[P], envelope: str, /) -> P: ...


@dataclass(frozen=True, slots=True)
class Desk:
    """`sign` seals a payload with the key of its role (records or policy); `open` verifies what was sealed and raises
    NotVerified. `process` names this CA process among those on one database.
    """

    store: Store
    trust_domain: TrustDomain
    sign: Callable[[Payload], str]
    open: Opener
    process: str = "only"
