"""What every part of the registry works with: the store, the record signer and the trust domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ca.store import Store
from identity.names import TrustDomain
from identity.records import Payload


@dataclass(frozen=True, slots=True)
class Desk:
    """`sign` seals a payload with the key of its role (records or policy)."""

    store: Store
    trust_domain: TrustDomain
    sign: Callable[[Payload], str]
