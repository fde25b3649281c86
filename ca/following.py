"""How a further process follows the authority of the one that it was copied from: by the bundle in the database.

A replica changes no keys and signs with copies (ca/replica.py). What is believed is what the stored bundle says, as far as
this copy's own roots vouch for it. When that bundle has no place for the keys here any more, nothing is signed with them:
no certificate once the intermediate is tainted, and nothing at all once a record key, the intermediate or the root is out.
The endpoints then go to the next address of their list. A new copy of the directory is taken over while the process runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from ca.mirror import BUNDLE
from ca.rotation import RECORD_KEYS
from identity.bundle import TrustBundle, open_bundle
from identity.errors import BadState, Conflict, NotVerified
from identity.revocation import BlockList, spki_hash

if TYPE_CHECKING:
    from ca.plane import Plane

log = structlog.get_logger("retinue.ca.replica")

HINT = "on the first process: retinue-ca replica DIR, for this one's directory; it goes on by itself"


class Following:
    """`stale`: why nothing may be signed here; `no_certificates`: why no certificate may. None: it may."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._newest: TrustBundle | None = None
        self.stale: str | None = None
        self.no_certificates: str | None = None

    def trust(self, blocked: Sequence[str]) -> TrustBundle:
        """What is believed here, with what the database says is blocked. Raises NotVerified when nothing can be."""
        plane = self._plane
        with plane.store.read() as tx:
            envelope = plane.store.get(tx, BUNDLE)
        known = self._newest
        if envelope is None or (known is not None and known.envelope == envelope):
            found = known
        else:
            roots = plane.authority.roots if known is None else known.roots
            found = open_bundle(envelope, roots, plane.trust_domain, plane.clock())
            if known is not None and found.sequence < known.sequence:
                log.critical("the database shows an older bundle than before; the newer one stays", sequence=found.sequence)
                found = known
        if found is None:
            return plane.authority.trust_bundle(0, plane.clock(), blocked)
        self._newest = found
        return replace(found, blocked=found.blocked.union(BlockList.parse(blocked)))

    def look(self) -> None:
        """After the bundle or the directory changed: may the keys here still be used?"""
        before = (self.stale, self.no_certificates)
        try:
            self.stale, self.no_certificates = self._judge()
        except NotVerified as e:
            self.stale = self.no_certificates = f"the bundle in force is nothing that its roots vouch for ({e.message})"
        if (self.stale, self.no_certificates) != before:
            said = log.critical if self.no_certificates else log.info
            said("the keys of this copy were judged", nothing=self.stale, no_certificates=self.no_certificates)

    def _judge(self) -> tuple[str | None, str | None]:
        plane, authority = self._plane, self._plane.authority
        trust, ring = plane.trust, self._plane.authority.ring
        if (why := self._others_sign()) is not None:
            return why, why
        if authority.root not in trust.roots:
            why = f"{ring.active('root').name} is a root no more"
            return why, why
        for role in RECORD_KEYS:
            name = ring.active(role).name
            if authority.signer(name).public_key not in trust.keys.get(role, ()):
                why = f"{name} signs no more"
                return why, why
        name = ring.active("intermediate").name
        if spki_hash(authority.intermediate) in trust.blocked.keys:
            why = f"{name} is revoked"
            return why, why
        if trust.taint_of([authority.intermediate, authority.root]) is not None:
            return None, f"{name} is tainted"
        return None, None

    def check(self, *, certificate: bool = False) -> None:
        """Raises BadState ``replica.keys``.

        Whose keys sign records is asked each time: a writer holds the lock under which the first process changes that, so
        no record is signed with a key whose records were all signed anew already, and which may soon be out.
        """
        why = self.no_certificates if certificate else self.stale
        if why is None and not certificate:
            why = self.stale = self._others_sign()
        if why is not None:
            raise BadState("replica.keys", f"this process has an older copy of the authority: {why}", hint=HINT)

    def _others_sign(self) -> str | None:
        """Which record keys sign, when they are not ours (succession.follow writes it, where all was signed anew)."""
        plane = self._plane
        mine = " ".join(plane.authority.ring.active(kind).name for kind in RECORD_KEYS)
        with plane.store.read() as tx:
            theirs = plane.store.get(tx, "record_keys") or " ".join(RECORD_KEYS)
        return None if mine == theirs else f"{theirs} sign now, not {mine}"

    def check_token(self, kid: str) -> None:
        """May this JWT key sign? Raises BadState ``replica.keys``."""
        self.check()
        if kid not in {one.kid for one in self._plane.trust.jwt_authorities}:
            raise BadState("replica.keys", "this process has an older copy of the authority: its key for tokens is out", hint=HINT)


def keeper_only(plane: Plane) -> None:
    """Raises Conflict ``replica.keeper`` in a further process."""
    if plane.replica:
        raise Conflict(
            "replica.keeper", "keys are changed in the process that this one was copied from",
            hint="run it there, then: retinue-ca replica DIR, for each further process",
        )  # fmt: skip

