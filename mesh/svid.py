"""SVIDs of the instances held here: made on demand, renewed at half of their life or when the trust they rest on goes,
gone with the instance.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from identity import certs
from identity.bundle import TrustBundle
from identity.errors import NotVerified
from identity.keys import private_pem
from identity.names import SpiffeId
from identity.records import Taint
from identity.wire.enroll import SvidReply, SvidRequest
from identity.wire.local import SvidFiles
from mesh.snapshot import InstanceKey, instance_key

JITTER = 0.1  # of the lifetime, to each side of its middle
RETRY: Final = 15.0  # seconds after a failed renewal until the next


def renew_at(not_before: int, not_after: int, unit: float) -> float:
    """When to renew a certificate: half of its life, give or take a tenth of it. `unit` is uniform in [0, 1)."""
    life = not_after - not_before
    return not_before + life * (0.5 + JITTER * (2 * unit - 1))


def taint_at(taint: Taint, heard: float, unit: float) -> float:
    """When to renew what hangs from a tainted authority: at a moment of what is left of its span once it was heard of.

    Never over less than half of the span: a crowd that hears late, all together (a CA that was away, a busy machine),
    asks for at most twice the mean. Whoever hears of it after its end has nothing to wait for. `unit` is uniform in [0, 1).
    """
    if heard >= taint.until:
        return heard
    start = max(heard, taint.since)
    return start + unit * max(taint.until - start, (taint.until - taint.since) / 2)


@dataclass(frozen=True, slots=True)
class WorkloadSvid:
    """One instance's certificate, verified under the bundle with this sequence, and its key."""

    files: SvidFiles = field(repr=False)
    svid: certs.Svid = field(repr=False)
    renew_at: float
    trusted: int
    tainted: str | None = None  # the taint that `renew_at` was drawn for


Ask = Callable[[SvidRequest], Awaitable[SvidReply]]


class WorkloadSvids:
    """Key material by instance; keys never leave this process but to who may ask for them.

    ask: sends a request to the CA; trust: the bundle in force now; wall: seconds since the epoch.
    """

    def __init__(self, ask: Ask, trust: Callable[[], TrustBundle], wall: Callable[[], float]) -> None:
        self._ask, self._trust, self._wall = ask, trust, wall
        self._held: dict[InstanceKey, WorkloadSvid] = {}
        self._locks: dict[InstanceKey, asyncio.Lock] = {}

    async def get(self, name: str, instance: int) -> SvidFiles:
        """Certificate, key and bundle, renewed when due. A failed renewal serves the old one while it lasts and is
        trusted, and is tried again after RETRY.

        Raises what the CA answered, Unreachable, or NotVerified.
        """
        key = instance_key(name, instance)
        async with self._locks.setdefault(key, asyncio.Lock()):
            held = self._held.get(key)
            now = self._wall()
            if held is not None:
                held = self._still_trusted(held, now)
            if held is None or now >= held.renew_at:
                try:
                    held = await self._issue(name, instance)
                except Exception:
                    if held is None or now >= held.svid.not_after:
                        self._held.pop(key, None)
                        raise
                    held = replace(held, renew_at=now + RETRY * (1 + random.random()))  # noqa: S311 -- jitter
            # Kept also when nothing is due: a moment drawn at every look would be the earliest of them.
            self._held[key] = held
            return held.files.model_copy(update={"bundle": self._trust().roots_pem()})

    def _still_trusted(self, held: WorkloadSvid, now: float) -> WorkloadSvid | None:
        """The same, or None when a newer bundle does not hold what its chain rests on (nor is it of use when it ended)."""
        trust = self._trust()
        if trust.sequence == held.trusted:
            return held
        try:
            trust.verify_svid(held.files.certificate, now, expect=held.svid.spiffe_id)
        except NotVerified:
            return None
        taint = trust.taint_of(held.svid.chain)
        due = held.renew_at
        if taint is not None and held.tainted != taint.key:  # drawn once: at every new bundle, the earliest would win
            due = min(due, taint_at(taint, now, random.random()))  # noqa: S311 -- jitter
        return replace(held, trusted=trust.sequence, renew_at=due, tainted=None if taint is None else taint.key)

    def certificates(self) -> dict[str, x509.Certificate]:
        """The leaves held now, by SPIFFE ID and serial."""
        return {f"{h.svid.spiffe_id} {h.svid.serial:x}": h.svid.chain[0] for h in self._held.values()}

    def shown(self, key: InstanceKey) -> WorkloadSvid | None:
        """What is held for an instance, without asking anybody."""
        return self._held.get(key)

    def drop(self, key: InstanceKey) -> None:
        """Forget an instance's key: it is not held here any more."""
        self._held.pop(key, None)
        self._locks.pop(key, None)

    def keep_only(self, active: frozenset[InstanceKey]) -> None:
        """Forget every instance that is not active here."""
        for key in [k for k in self._held if k not in active]:
            self.drop(key)

    def due(self) -> float | None:
        """When the next of those held wants renewal (seconds since the epoch)."""
        return min((h.renew_at for h in self._held.values()), default=None)

    async def _issue(self, name: str, instance: int) -> WorkloadSvid:
        key = ec.generate_private_key(ec.SECP256R1())
        reply = await self._ask(SvidRequest(workload=name, instance=instance, csr=certs.make_csr(key)))
        trust = self._trust()
        now = self._wall()
        svid = trust.verify_svid(reply.chain, now, expect=SpiffeId.workload(trust.trust_domain, name))
        if certs.spki(svid.public_key) != certs.spki(key.public_key()):
            raise NotVerified("svid.foreign_key", "the certificate is for a key that is not ours")
        files = SvidFiles(
            spiffe_id=str(svid.spiffe_id), certificate="".join(reply.chain), key=private_pem(key).decode(),
            bundle=trust.roots_pem(), expires=svid.not_after,
        )  # fmt: skip
        due = renew_at(svid.not_before, svid.not_after, random.random())  # noqa: S311 -- jitter
        return WorkloadSvid(files, svid, due, trust.sequence)
