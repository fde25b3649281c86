"""Certificate chains that were verified a moment ago: an endpoint shows the same one with every request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from identity import certs
from identity.bundle import TrustBundle
from identity.names import SpiffeId

KEPT: Final = 16_384  # chains


class Caller(NamedTuple):
    """What a verified leaf says; the parsed chain would be a hundred times as large. Times are seconds since the epoch."""

    spiffe_id: SpiffeId
    serial: int
    not_before: int
    not_after: int


class Callers:
    """`TrustBundle.verify_svid` for chains as connections show them, each verified once under one bundle.

    What was verified holds for exactly the same bytes, under the same bundle object (whose roots and revocations never
    change), and at times at which every certificate of the path is valid.
    """

    def __init__(self) -> None:
        self._trust: TrustBundle | None = None
        self._known: OrderedDict[bytes, tuple[Caller, int, int]] = OrderedDict()

    def verify(self, chain: Sequence[bytes], trust: TrustBundle, now: float) -> Caller:
        """`chain` in DER, leaf first. Raises NotVerified."""
        if trust is not self._trust:
            self._trust = trust
            self._known.clear()
        key = hashlib.sha256(b"".join(len(der).to_bytes(4, "big") + der for der in chain)).digest()
        if (known := self._known.get(key)) is not None and known[1] <= now < known[2]:
            return known[0]
        svid = trust.verify_svid(certs.parse_der_chain(chain), now)
        begins = max(certs.not_before(cert) for cert in svid.chain)
        ends = min(certs.not_after(cert) for cert in svid.chain)
        caller = Caller(svid.spiffe_id, svid.serial, svid.not_before, svid.not_after)
        self._known[key] = caller, begins, ends
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return caller
