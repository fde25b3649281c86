"""JWT-SVIDs of the instances held here: asked of the CA, checked, kept until half of their life is over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from identity import jwt
from identity.bundle import TrustBundle
from identity.errors import NotVerified
from identity.names import SpiffeId
from identity.records import JwtAuthority
from identity.wire.jwt import JwtReply, JwtRequest
from mesh.snapshot import InstanceKey, instance_key

KEPT: Final = 1024  # tokens

Ask = Callable[[JwtRequest], Awaitable[JwtReply]]
Bundles = Mapping[str, Sequence[JwtAuthority]]  # trust domain -> keys


@dataclass(frozen=True, slots=True)
class HeldToken:
    """A token that verified here."""

    token: str = field(repr=False)
    spiffe_id: str
    renew_at: float


class JwtSvids:
    """ask: sends a request to the CA; trust: the bundle in force now; wall: seconds since the epoch."""

    def __init__(self, ask: Ask, trust: Callable[[], TrustBundle], wall: Callable[[], float]) -> None:
        self._ask, self._trust, self._wall = ask, trust, wall
        self._held: OrderedDict[tuple[InstanceKey, tuple[str, ...]], HeldToken] = OrderedDict()

    async def get(self, name: str, instance: int, audience: Sequence[str]) -> HeldToken:
        """A token for these audiences. Raises BadInput ``jwt.audience``, NotVerified, or what the CA answered."""
        wanted = jwt.check_audience(audience)
        key = (instance_key(name, instance), wanted)
        held = self._held.get(key)
        if held is None or self._wall() >= held.renew_at or not self._trusted(held, wanted):
            held = self._check(await self._ask(JwtRequest(workload=name, instance=instance, audience=list(wanted))), name, wanted)
            self._held[key] = held
            while len(self._held) > KEPT:
                self._held.popitem(last=False)
        return held

    def _check(self, reply: JwtReply, name: str, wanted: tuple[str, ...]) -> HeldToken:
        trust, now = self._trust(), self._wall()
        found = verify(trust, reply.token, wanted[0], now)
        if found.spiffe_id != SpiffeId.workload(trust.trust_domain, name) or set(found.audience) != set(wanted):
            raise NotVerified("jwt.foreign", "the CA sent a token that was not asked for")
        return HeldToken(reply.token, str(found.spiffe_id), now + (found.expires - now) / 2)

    def _trusted(self, held: HeldToken, wanted: tuple[str, ...]) -> bool:
        try:
            verify(self._trust(), held.token, wanted[0], self._wall())
        except NotVerified:
            return False
        return True

    def keep_only(self, active: frozenset[InstanceKey]) -> None:
        """Forget the tokens of every other instance."""
        for key in [k for k in self._held if k[0] not in active]:
            del self._held[key]


def verify(trust: TrustBundle, token: str, audience: str, now: float, foreign: Bundles | None = None) -> jwt.JwtSvid:
    """Check a token by the keys of our trust domain and of those we federate with. Raises NotVerified ``jwt.*``."""
    own = trust.trust_domain.name
    return jwt.verify(token, audience, {**(foreign or {}), own: trust.jwt_authorities}, now, own=own)
