"""What an endpoint of the release before is given: a bundle without what it could not read.

Every agent says its wire level with every request; one that says none is of the first release. Left out is only what
allows something: the keys of JWT-SVIDs. What takes away (blocked keys, taints) or leads to new roots is never left out:
an endpoint that cannot read it keeps the bundle it has, and can neither enrol nor renew before it is upgraded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from identity.bundle import TrustBundle
from identity.errors import Conflict, NotVerified
from identity.records import BundleRecord, Payload
from identity.wire import LEVEL_HEADER
from identity.wire.enroll import EnrollReply, RenewReply, SvidReply

if TYPE_CHECKING:
    from aiohttp import web

R = TypeVar("R", EnrollReply, RenewReply, SvidReply)


def is_older(request: web.Request) -> bool:
    """Is the caller of the first release?"""
    said = request.headers.get(LEVEL_HEADER, "")
    return not (said.isdigit() and len(said) < 6 and int(said) >= 2)


class Plain:
    """Makes the twin of a bundle's envelope and keeps the last one; the envelope itself where there is none."""

    def __init__(self, sign: Callable[[Payload], str], trust: Callable[[], TrustBundle]) -> None:
        self._sign, self._trust = sign, trust
        self._last: tuple[str, str] | None = None

    def __call__(self, envelope: str) -> str:
        if self._last is None or self._last[0] != envelope:
            self._last = envelope, self._make(envelope)
        return self._last[1]

    def _make(self, envelope: str) -> str:
        try:
            # Nothing is signed from what came out of the database unverified.
            record = self._trust().verify(BundleRecord, envelope)
        except NotVerified:
            return envelope
        if record.links or record.tainted or record.revoked or not record.jwt_authorities:
            return envelope
        return self._sign(record.model_copy(update={"jwt_authorities": []}))

    def fitting(self, request: web.Request, reply: R, endpoint: str) -> R:
        """The reply as the caller can read it. Raises Conflict ``endpoint.older`` when it could not."""
        if not is_older(request):
            return reply
        twin = self(reply.bundle)
        if twin == reply.bundle and self._says_more(twin):
            raise Conflict(
                "endpoint.older", f"{endpoint} runs a release that cannot read the trust bundle of now",
                hint="upgrade the agent there first",
            )  # fmt: skip
        return reply.model_copy(update={"bundle": twin})

    def _says_more(self, envelope: str) -> bool:
        try:
            record = self._trust().verify(BundleRecord, envelope)
        except NotVerified:
            return False
        return any(getattr(record, name) for name in BundleRecord.later)
