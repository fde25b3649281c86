"""Admission: may this request become this endpoint? A pure decision over the token's row and the challenge it answers.

The registry then claims the token by one conditional UPDATE in the transaction that stores the host: a decision here is
permission to try, never the claim itself.
"""

from __future__ import annotations

import hmac
import os
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from identity import certs, enrollment
from identity.enrollment import NONCE_LEN, Offer, Proofs
from identity.errors import BadInput, Conflict, NotVerified, Refused, Unreachable
from identity.keys import X25519_LEN, b64, canonical_x25519, ed25519_public, unb64, x25519_public
from identity.wire.enroll import Challenge, EnrollRequest

CHALLENGE_SECONDS: Final = 60
MAX_CHALLENGES: Final = 4096  # 64 a second for a minute; beyond it the newcomer waits
MAX_OF_SOURCE: Final = 512  # so that one address cannot keep the others out
RECOVERY_SECONDS: Final = 300  # a lost reply may be fetched again for this long

Kind = Literal["host", "sidecar"]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """What the store knows of a join token. Times are seconds since the epoch.

    `public_key` is the token's Ed25519 key (32 bytes); `used_at` and `enroll_key` (raw, 32 bytes) are None until it is
    claimed and name the claimant afterwards; `tunnel_key` likewise.
    """

    id: str
    public_key: bytes
    endpoint: str
    kind: Kind
    expires: int
    workload: str | None = None
    used_at: int | None = None
    enroll_key: bytes | None = None
    tunnel_key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request may have this endpoint. Raw canonical keys; `again` repeats a reply that was lost (claim nothing)."""

    endpoint: str
    kind: Kind
    workload: str | None
    token_id: str | None
    public_key: certs.PublicKey
    csr: str
    tunnel_key: bytes
    enroll_key: bytes
    underlay: tuple[str, ...]
    ciphers: tuple[str, ...]
    again: bool = False


@dataclass(frozen=True, slots=True)
class OpenChallenge:
    """One outstanding nonce: the ephemeral key made for it and the TLS leaf the server showed then."""

    nonce: bytes
    key: X25519PrivateKey = field(repr=False)
    server_leaf: bytes = field(repr=False)
    token_id: str
    expires: float
    source: str = ""

    def to_wire(self, now: float) -> Challenge:
        return Challenge(
            nonce=b64(self.nonce), server_key=b64(x25519_public(self.key)), expires_in=max(0, int(self.expires - now))
        )


class Challenges:
    """Nonces handed out and not yet answered: each good once, for CHALLENGE_SECONDS.

    At most `limit` at a time, and `of_source` of them for one source.
    """

    def __init__(self, limit: int = MAX_CHALLENGES, of_source: int = MAX_OF_SOURCE) -> None:
        self._limit, self._of_source = limit, of_source
        self._open: OrderedDict[bytes, OpenChallenge] = OrderedDict()
        self._count: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, token_id: str, server_leaf: bytes, now: float, source: str = "") -> OpenChallenge:
        """A new nonce; the answer's shape does not depend on whether the token exists.

        Raises Unreachable ``enroll.busy`` when too many are open: those already given out keep their turn.
        """
        self._forget(now)
        if len(self._open) >= self._limit or self._count[source] >= self._of_source:
            raise Unreachable("enroll.busy", "too many enrolments are being made", hint="try again in a minute")
        made = OpenChallenge(
            os.urandom(NONCE_LEN), X25519PrivateKey.generate(), server_leaf, token_id, now + CHALLENGE_SECONDS, source
        )
        self._open[made.nonce] = made
        self._count[source] += 1
        return made

    def take(self, nonce: str, now: float) -> OpenChallenge:
        """The challenge of a nonce, which is then spent. Raises NotVerified ``enroll.nonce``."""
        self._forget(now)
        try:
            found = self._open.pop(unb64(nonce, length=NONCE_LEN), None)
        except BadInput:
            found = None
        if found is None:
            raise NotVerified("enroll.nonce", "the challenge is unknown, used or too old", hint="enrol again")
        self._closed(found)
        return found

    def _closed(self, challenge: OpenChallenge) -> None:
        self._count[challenge.source] -= 1
        if self._count[challenge.source] <= 0:
            del self._count[challenge.source]

    def _forget(self, now: float) -> None:
        # In order of issue, and every one lives as long: the oldest are first.
        while self._open and next(iter(self._open.values())).expires < now:
            self._closed(self._open.popitem(last=False)[1])


class Attestor(Protocol):
    """Decides from one kind of evidence which endpoint a request may become."""

    def attest(self, request: EnrollRequest, offer: Offer, proofs: Proofs, now: float) -> Granted:
        """Raises a RetinueError when the evidence does not hold."""


@dataclass(frozen=True, slots=True)
class Granted:
    """What the evidence is good for."""

    endpoint: str
    kind: Kind
    workload: str | None
    token_id: str | None
    again: bool = False


class JoinTokenAttestor:
    """Evidence: a signature under the token's key. `row` is None for a token that does not exist."""

    def __init__(self, row: TokenRow | None) -> None:
        self._row = row

    def attest(self, request: EnrollRequest, offer: Offer, proofs: Proofs, now: float) -> Granted:
        """Raises NotVerified ``token.refused`` for an unknown token and a wrong proof alike; only who proved the token
        is told that it is ``token.used`` or ``token.expired``.
        """
        row = self._row
        # An unknown token costs the same check, against a key nobody has.
        enrollment.check_token(offer, proofs, row.public_key if row is not None else _NOBODY)
        if row is None or row.id != request.token_id:
            raise enrollment.refused()
        if row.used_at is not None:
            if not self._same_claimant(row, offer, now):
                raise Conflict(
                    "token.used", f"the join token for {row.endpoint} was already used",
                    hint="if that was not you, revoke the host; make a new token with: retinue-ca token create",
                )  # fmt: skip
            return Granted(row.endpoint, row.kind, row.workload, row.id, again=True)
        if now >= row.expires:
            raise Refused(
                "token.expired", f"the join token for {row.endpoint} has expired",
                hint="make a new token with: retinue-ca token create",
            )  # fmt: skip
        return Granted(row.endpoint, row.kind, row.workload, row.id)

    @staticmethod
    def _same_claimant(row: TokenRow, offer: Offer, now: float) -> bool:
        if row.used_at is None or row.enroll_key is None or row.tunnel_key is None:
            return False
        same = hmac.compare_digest(row.enroll_key, offer.enroll_key) and hmac.compare_digest(
            row.tunnel_key, offer.tunnel_key
        )
        return same and now < row.used_at + RECOVERY_SECONDS


_NOBODY: Final = ed25519_public(Ed25519PrivateKey.generate())


def offer_of(request: EnrollRequest, challenge: OpenChallenge) -> tuple[Offer, Proofs]:
    """The request as raw bytes, with what the server itself knows of the challenge. Raises BadInput."""
    tunnel_key = unb64(request.tunnel_key, length=X25519_LEN)
    if canonical_x25519(tunnel_key) != tunnel_key:
        raise BadInput("key.tunnel", "the tunnel key is not in its canonical form")
    offer = Offer(
        token_id=request.token_id, nonce=challenge.nonce, server_leaf=challenge.server_leaf,
        server_key=x25519_public(challenge.key), csr=request.csr, tunnel_key=tunnel_key,
        enroll_key=unb64(request.enroll_key, length=32), underlay=tuple(request.underlay), ciphers=tuple(request.ciphers),
    )  # fmt: skip
    proofs = Proofs(
        token=unb64(request.token_proof, length=64), tunnel=unb64(request.tunnel_proof, length=32),
        enroll=unb64(request.enroll_proof, length=64),
    )  # fmt: skip
    return offer, proofs


def admit(request: EnrollRequest, challenge: OpenChallenge, attestor: Attestor, now: float) -> Admitted:
    """Decide one request. Raises BadInput for its form, NotVerified, Refused or Conflict for its proofs.

    The evidence comes first: who cannot show it learns nothing about the rest.
    """
    if challenge.token_id != request.token_id:
        raise enrollment.refused()
    offer, proofs = offer_of(request, challenge)
    granted = attestor.attest(request, offer, proofs, now)
    enrollment.check_keys(offer, proofs, challenge.key)
    key = certs.csr_key(request.csr)
    return Admitted(
        granted.endpoint, granted.kind, granted.workload, granted.token_id, key, request.csr, offer.tunnel_key,
        offer.enroll_key, tuple(offer.underlay), tuple(offer.ciphers), granted.again,
    )  # fmt: skip
