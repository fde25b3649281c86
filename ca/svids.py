"""What an endpoint is given for the workloads placed on it: certificates and JWT-SVIDs, never beyond the identity's end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ca import transparency
from ca.rows import EndpointRow, InstanceRow
from identity import jwt
from identity.errors import Refused
from identity.names import SpiffeId
from identity.wire.enroll import SvidReply, SvidRequest
from identity.wire.jwt import JwtReply, JwtRequest

if TYPE_CHECKING:
    from ca.plane import Plane


class Svids:
    """Of one plane; its worker thread calls."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def svid(self, caller: EndpointRow, request: SvidRequest) -> SvidReply:
        """A workload's certificate, for the endpoint that holds the instance or is about to. Raises Refused."""
        plane = self._plane
        row = plane.placements.get(request.workload, request.instance)
        if caller.name not in {row.endpoint, row.target}:
            raise Refused("svid.not_here", f"{row.key} is not placed on {caller.name}")
        self._check_life(row)
        addresses = plane.trust_domain.overlay(row.overlay)
        with plane.store.read() as tx:
            ttl = plane.entries.ttl(tx, row.name, caller.name)
        left = [x for x in (ttl, None if row.ends_at is None else row.ends_at - plane.now) if x is not None]
        with plane.issuing(caller.name):
            chain = plane.authority.issue_workload(
                request.csr, SpiffeId.parse(row.spiffe_id), addresses, plane.clock(), lifetime=min(left, default=None)
            )
        return SvidReply(spiffe_id=row.spiffe_id, chain=chain, bundle=plane.bundle)

    def _check_life(self, row: InstanceRow) -> None:
        """Raises Refused for an identity that is over."""
        if row.state == "revoked" or (row.ends_at is not None and row.ends_at <= self._plane.now):
            raise Refused("svid.ended", f"{row.key} is over")

    def jwt_svid(self, caller: EndpointRow, request: JwtRequest) -> JwtReply:
        """A JWT-SVID of an instance that the calling endpoint holds, in the log before it is given out.

        Raises Refused, BadInput ``jwt.audience``, and what the store raises: what cannot be logged is not issued.
        """
        plane = self._plane
        row = plane.placements.get(request.workload, request.instance)
        if caller.name != row.endpoint or row.state not in {"active", "moving"}:
            raise Refused("svid.not_here", f"{row.key} is not placed on {caller.name}")
        self._check_life(row)
        if plane.following is not None:
            plane.following.check_token(plane.jwt.kid(plane.clock()))
        token, expires = plane.jwt.sign(SpiffeId.parse(row.spiffe_id), request.audience, plane.clock(), row.ends_at)
        with plane.store.record() as tx:
            transparency.record_jwt(tx, plane.now, caller.name, jwt.about(token))
        return JwtReply(spiffe_id=row.spiffe_id, token=token, expires=expires)
