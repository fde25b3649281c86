"""Renewal and coming back, as the plane does them: who asks is judged first, the compare-and-swap precedes the signature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ca import recovery, rows
from identity import certs
from identity import recovery as proofs
from identity.errors import Conflict, RetinueError
from identity.keys import unb64, x25519_public
from identity.names import SpiffeId
from identity.recovery import Return
from identity.wire.enroll import RenewReply, RenewRequest
from identity.wire.recovery import RecoverRequest

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ca.authority import Issuing
    from ca.plane import Plane
    from ca.rows import EndpointRow

_PREFIX: Final = "return:"  # of the names of challenges: a nonce for coming back is none for enrolling


class Returns:
    """Of one plane; its worker thread calls."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._shown: str | None = None  # the certificate that is being renewed

    # ---- between the serial and the signature

    def note(self, about: Issuing, endpoint: str | None) -> Callable[[Connection], None] | None:
        """What is to be written with the serial of an endpoint's certificate; None for any other certificate.

        It raises Conflict when another renewal was first.
        """
        if endpoint is None or about.profile != certs.ENDPOINT.name:
            return None

        def write(tx: Connection) -> None:
            if self._shown is None:
                recovery.begin(tx, endpoint, f"{about.serial:x}", about.spki)
            elif not recovery.advance(tx, endpoint, f"{about.serial:x}", about.spki, self._shown):
                raise Conflict("renew.twice", f"{endpoint} is being renewed by another request", hint="try again")

        return write

    @contextmanager
    def _renewing(self, shown: str) -> Iterator[None]:
        self._shown = shown
        try:
            yield
        finally:
            self._shown = None

    # ---- requests

    def check(self, endpoint: str) -> None:
        """Raises Refused ``caller.quarantined``."""
        with self._plane.store.read() as tx:
            known = recovery.get(tx, endpoint)
        if known is not None and known.quarantined_at is not None:
            raise recovery.out(endpoint, known.reason)

    def renew(self, caller: EndpointRow, serial: int | None, request: RenewRequest) -> RenewReply:
        """A new certificate for a caller whose own was verified; `serial` is that one's.

        Raises Refused ``caller.quarantined`` when it was not the newest.
        """
        spki = _spki(request.csr)
        shown = f"{serial or 0:x}"
        if serial is not None:
            self._judge(caller.name, shown, spki, "a certificate was renewed that is not the newest")
        return self._issue(caller, shown, request)

    def challenge(self, endpoint: str) -> str:
        return _PREFIX + endpoint

    def recover(self, request: RecoverRequest) -> RenewReply:
        """Raises NotVerified ``recover.refused``, ``enroll.nonce``; Refused ``caller.quarantined``, ``recover.budget``,
        ``caller.revoked``.
        """
        plane = self._plane
        try:
            row = self._proved(request)
        except RetinueError as e:
            plane.refused("recover", request.endpoint, e)
            raise
        self.check(row.name)
        spki = _spki(request.csr)
        self._judge(row.name, request.serial, spki, "a machine came back with a certificate that is not the newest")
        with plane.store.read() as tx:
            again = recovery.repeats(recovery.get(tx, row.name), request.serial, spki)
        if not again:
            with plane.store.write() as tx:
                recovery.spend(tx, row.name, plane.now, row.name)
        wanted = RenewRequest(csr=request.csr, underlay=request.underlay, ciphers=request.ciphers)
        return self._issue(row, request.serial, wanted)

    # ---- inside

    def _proved(self, request: RecoverRequest) -> EndpointRow:
        plane = self._plane
        challenge = plane.challenges.take(request.nonce, plane.clock())
        if challenge.token_id != self.challenge(request.endpoint):
            raise proofs.refused()
        with plane.store.read() as tx:
            row = rows.endpoint_or_none(tx, request.endpoint)
        if row is None or row.state != "enrolled":
            raise proofs.refused()
        said = Return(
            endpoint=row.name, serial=request.serial, nonce=challenge.nonce, server_leaf=challenge.server_leaf,
            server_key=x25519_public(challenge.key), csr=request.csr, tunnel_key=unb64(row.tunnel_key),
            enroll_key=unb64(row.enroll_key), underlay=tuple(request.underlay), ciphers=tuple(request.ciphers),
        )  # fmt: skip
        proofs.check(said, unb64(request.tunnel_proof), unb64(request.enroll_proof), challenge.key)
        return row

    def _judge(self, endpoint: str, shown: str, spki: str, reason: str) -> None:
        plane = self._plane
        with plane.store.read() as tx:
            known = recovery.get(tx, endpoint)
            fine = recovery.current(tx, known, shown, spki)
        if not fine:
            raise recovery.quarantine(plane.store, endpoint, reason, plane.now)

    def _issue(self, row: EndpointRow, shown: str, request: RenewRequest) -> RenewReply:
        plane = self._plane
        with plane.issuing(row.name), self._renewing(shown):
            chain = plane.authority.issue_endpoint(request.csr, SpiffeId.parse(row.spiffe_id), plane.clock())
        expires = certs.not_after(certs.parse_chain(chain)[0])
        done = plane.registry.renew(row.name, expires, request.underlay, request.ciphers, plane.now)
        assert done.record is not None
        return RenewReply(chain=chain, bundle=plane.bundle, record=done.record)


def _spki(csr: str) -> str:
    """SHA-256 of a request's key, hex; its signature holds. Raises BadInput ``csr.*``."""
    return hashlib.sha256(certs.spki(certs.csr_key(csr))).hexdigest()
