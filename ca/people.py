"""Administrators as the plane serves them: adding, certifying, renewing, revoking, approving."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ca import approvals, audit
from ca.admins import Admins
from ca.roles import Principal
from identity import certs
from identity.errors import Refused
from identity.wire.people import AdminAdd, AdminCredential, AdminInfo, Approval

if TYPE_CHECKING:
    from ca.plane import Plane


class People:
    """Blocking calls of the worker thread, like everything of the plane."""

    def __init__(self, plane: Plane, admins: Admins, now: Callable[[], int]) -> None:
        self._plane, self._admins, self._now = plane, admins, now

    def admins(self) -> list[AdminInfo]:
        with self._plane.store.read() as tx:
            return [self._admins.info(tx, row) for row in self._admins.all(tx)]

    def add(self, request: AdminAdd, actor: str) -> AdminCredential:
        """A new administrator with a first certificate. Raises Conflict, BadInput."""
        certs.csr_key(request.csr)  # before anything is written
        with self._plane.store.write() as tx:
            self._admins.add(tx, request.name, request.role, request.scopes, self._now(), actor)
        return self._issue(request.name, request.csr)

    def certify(self, name: str, csr: str, actor: str) -> AdminCredential:
        """A new certificate for an administrator whose own has expired or is lost; earlier ones stay in force.

        Raises NotFound, Refused ``admin.revoked``, BadInput.
        """
        certs.csr_key(csr)
        with self._plane.store.write() as tx:
            self._admins.living(tx, name)
            audit.append(tx, self._now(), actor, "admin.certify", name)
        return self._issue(name, csr)

    def renew(self, who: Principal, csr: str) -> AdminCredential:
        """One's own certificate anew. Raises Refused ``admin.local`` over the socket, where nobody has one; BadInput."""
        if who.local:
            raise Refused("admin.local", "root has no administrator's certificate", hint="retinue-ca admin certify NAME")
        certs.csr_key(csr)
        with self._plane.store.write() as tx:
            self._admins.living(tx, who.name)
            audit.append(tx, self._now(), who.actor, "admin.renew", who.name)
        return self._issue(who.name, csr)

    def revoke(self, name: str, actor: str) -> AdminInfo:
        """Raises NotFound."""
        with self._plane.store.write() as tx:
            return self._admins.info(tx, self._admins.revoke(tx, name, self._now(), actor))

    def approvals(self) -> list[Approval]:
        with self._plane.store.read() as tx:
            return approvals.listed(tx, self._now())

    def approve(self, approval_id: str, who: Principal) -> Approval:
        """Raises what `approvals.approve` raises."""
        with self._plane.store.write() as tx:
            return approvals.approve(tx, approval_id, who, self._now())

    def _issue(self, name: str, csr: str) -> AdminCredential:
        plane = self._plane
        chain = plane.authority.issue_admin(csr, self._admins.spiffe_id(name), plane.clock())
        with plane.store.read() as tx:
            info = self._admins.info(tx, self._admins.get(tx, name))
        return AdminCredential(
            admin=info, trust_domain=str(plane.trust_domain), chain=chain, roots=plane.trust.roots_pem(),
            expires=certs.not_after(certs.parse_chain(chain)[0]),
        )  # fmt: skip
