"""How a machine gets in: join tokens, challenges, and the enrolment that uses one up."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ca.attestors import attestor_for
from ca.enroll import Admitted, admit
from ca.enroll import TokenRow as TokenEvidence
from ca.registry import Applicant, Grant
from ca.rows import EndpointRow, TokenRow
from identity import certs
from identity.enrollment import SECRET_LEN, JoinToken
from identity.errors import BadInput, Refused, RetinueError
from identity.keys import b64, unb64
from identity.names import SpiffeId, host_name, workload_path
from identity.wire.admin import Token, TokenCreate
from identity.wire.enroll import Challenge, EnrollReply, EnrollRequest, SidecarTokenReply

if TYPE_CHECKING:
    from ca.plane import Plane

SIDECAR_TOKEN_S: Final = 600


class Joining:
    """Of one plane; its worker thread calls."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def token(self, request: TokenCreate, actor: str) -> Token:
        """Make a join token. Raises BadInput unless exactly one of host and workload is named."""
        plane = self._plane
        if (request.host is None) == (request.workload is None):
            raise BadInput(
                "token.subject",
                "a token is for one host or for the sidecar of one workload",
                hint="give --host NAME or --sidecar WORKLOAD",
            )
        with plane.store.write() as tx:
            if request.host is not None:
                grant = plane.registry.grant_host(
                    tx, host_name(request.host), replace=request.replace, now=plane.now, ttl=request.ttl
                )
            else:
                assert request.workload is not None
                workload_path(request.workload)
                grant = plane.registry.grant_sidecar(
                    tx, request.workload, asked_by=None, now=plane.now, ttl=request.ttl
                )
            made = JoinToken(b64(os.urandom(9)), os.urandom(SECRET_LEN), plane.authority.root_fingerprint)
            plane.registry.add_token(made.id, b64(made.public_key), grant, tx, plane.now, actor)
        return Token(token=made.format(), endpoint=grant.endpoint, kind=grant.kind, expires=grant.expires)

    def sidecar_token(self, caller: EndpointRow, workload: str) -> SidecarTokenReply:
        """A token for the sidecar of a workload that is placed on the calling host."""
        plane = self._plane
        workload_path(workload)
        if caller.kind != "host":
            raise Refused("sidecar.caller", "only a host agent asks for sidecar tokens")
        with plane.store.write() as tx:
            grant: Grant = plane.registry.grant_sidecar(
                tx, workload, asked_by=caller.name, now=plane.now, ttl=SIDECAR_TOKEN_S
            )
            made = JoinToken(b64(os.urandom(9)), os.urandom(SECRET_LEN), plane.authority.root_fingerprint)
            plane.registry.add_token(made.id, b64(made.public_key), grant, tx, plane.now, caller.name)
        return SidecarTokenReply(token=made.format(), endpoint=grant.endpoint, expires_in=SIDECAR_TOKEN_S)

    def challenge(self, token_id: str, server_leaf: bytes, source: str = "") -> Challenge:
        """A nonce; the same answer whether or not the token exists."""
        plane = self._plane
        return plane.challenges.issue(token_id, server_leaf, plane.clock(), source).to_wire(plane.clock())

    def enroll(self, request: EnrollRequest) -> EnrollReply:
        """Decide, claim, issue, publish. Raises what `ca.enroll.admit` and `Registry.claim` raise."""
        plane = self._plane
        try:
            admitted = self._admit(request)
            row = self._claim(admitted)
        except RetinueError as e:
            plane.refused("enroll", ascii(request.token_id)[:80], e)
            raise
        with plane.issuing(row.name):
            chain = plane.authority.issue_endpoint(request.csr, SpiffeId.parse(row.spiffe_id), plane.clock())
        row = plane.registry.finish(row.name, certs.not_after(certs.parse_chain(chain)[0]), plane.now, row.name)
        assert row.record is not None
        return EnrollReply(
            trust_domain=str(plane.trust_domain), endpoint=row.name, kind=row.kind, workload=row.workload, chain=chain,
            bundle=plane.bundle, record=row.record, authority=plane.policies.authority_chain(),
        )  # fmt: skip

    def _admit(self, request: EnrollRequest) -> Admitted:
        plane = self._plane
        challenge = plane.challenges.take(request.nonce, plane.clock())
        return admit(request, challenge, attestor_for(plane, request), plane.clock())

    def evidence(self, token: TokenRow | None) -> TokenEvidence | None:
        plane = self._plane
        if token is None:
            return None
        claimant = plane.registry.claimant(token)
        return TokenEvidence(
            token.id, unb64(token.public_key), token.endpoint, token.kind, token.expires, token.workload, token.used_at,
            unb64(claimant.enroll_key) if claimant else None, unb64(claimant.tunnel_key) if claimant else None,
        )  # fmt: skip

    def _claim(self, admitted: Admitted) -> EndpointRow:
        plane = self._plane
        assert admitted.token_id is not None
        applicant = Applicant(
            b64(admitted.tunnel_key), b64(admitted.enroll_key), admitted.underlay, admitted.ciphers
        )
        return plane.registry.claim(admitted.token_id, applicant, plane.now)
