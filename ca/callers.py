"""Certificate chains that were verified a moment ago: an endpoint shows the same one with every request."""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from identity import certs
from identity.bundle import TrustBundle
from identity.names import SpiffeId

KEPT: Final = 16_384  # chains, about a kilobyte each


@dataclass(frozen=True, slots=True)
class Caller:
    """What a verified leaf says; the parsed chain would be a hundred times as large. Times are seconds since the epoch."""

    spiffe_id: SpiffeId
    serial: int
    not_before: int
    not_after: int


@dataclass(frozen=True, slots=True)
class _Verified:
    """A caller, when every certificate of its path is valid, and what a block list may name of them."""

    caller: Caller
    begins: int
    ends: int
    path: tuple[certs.RevocationId, ...]


class Callers:
    """`TrustBundle.verify_svid` for chains as connections show them: signatures and profile are verified once.

    That holds for exactly the same bytes, under the same roots, and at times at which every certificate of the path is
    valid. What is revoked is asked every time: after a revocation the chain of every open stream is looked at again.
    """

    def __init__(self) -> None:
        self._trust: TrustBundle | None = None
        self._roots: tuple[str, ...] = ()
        self._known: OrderedDict[bytes, _Verified] = OrderedDict()

    def verify(self, chain: Sequence[bytes], trust: TrustBundle, now: float) -> Caller:
        """`chain` in DER, leaf first. Raises NotVerified."""
        self._under(trust)
        key = hashlib.sha256(b"".join(len(der).to_bytes(4, "big") + der for der in chain)).digest()
        known = self._known.get(key)
        if known is None or not known.begins <= now < known.ends:
            known = self._known[key] = _verified(trust.verify_svid(certs.parse_der_chain(chain), now))
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        trust.blocked.check_named(known.path, known.caller.spiffe_id, known.caller.not_before)
        return known.caller

    def _under(self, trust: TrustBundle) -> None:
        """Other roots end everything."""
        if trust is self._trust:
            return
        roots = (str(trust.trust_domain), *(certs.fingerprint(root) for root in trust.roots))
        if roots != self._roots:
            self._known.clear()
        self._trust, self._roots = trust, roots


def _verified(svid: certs.Svid) -> _Verified:
    # Issuers are the same few for all; equal strings are kept once.
    named = (certs.revocation_id(cert) for cert in svid.chain)
    path = tuple(certs.RevocationId(sys.intern(one.issuer), one.serial, sys.intern(one.spki)) for one in named)
    begins, ends = max(map(certs.not_before, svid.chain)), min(map(certs.not_after, svid.chain))
    return _Verified(Caller(svid.spiffe_id, svid.serial, svid.not_before, svid.not_after), begins, ends, path)
