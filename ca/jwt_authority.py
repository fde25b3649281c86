"""The keys that sign JWT-SVIDs: one in use, its successor published well before, its predecessor until its last token ended.

Files in the CA's directory: jwt.json (kid, when made, when retired) and jwt-KID.key. `now` is seconds since the epoch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from ca.signer import FileSigner
from identity import jwt
from identity.errors import BadState
from identity.keys import write_secret
from identity.names import SpiffeId
from identity.records import JwtAuthority as PublicAuthority

DAY: Final = 86400
LIFE: Final = 30 * DAY  # of a key in use
AHEAD: Final = 7 * DAY  # how long before its first use a key is published
AFTER: Final = 2 * (jwt.LIFETIME + jwt.LEEWAY)  # how long a key stays published after its last use
STATE: Final = "jwt.json"


@dataclass(frozen=True, slots=True)
class _Key:
    kid: str
    since: int  # in use from then on
    signer: FileSigner


class JwtAuthority:
    """Signs tokens and says which keys are to be published."""

    def __init__(self, directory: Path, keys: list[_Key]) -> None:
        self._directory = directory
        self._keys = keys

    @classmethod
    def load(cls, directory: Path, now: float) -> JwtAuthority:
        """Open, make the first key when there is none, and do what is due. Raises BadState ``ca.jwt``, ``state.*``."""
        path = directory / STATE
        keys: list[_Key] = []
        if path.exists():
            try:
                said = json.loads(path.read_text())
                keys = [_Key(str(k["kid"]), int(k["since"]), FileSigner.load(directory / f"jwt-{k['kid']}.key")) for k in said["keys"]]
            except (OSError, ValueError, KeyError, TypeError):
                raise BadState("ca.jwt", f"{path} cannot be read", hint="restore it from a backup, or move it away: new keys are made") from None
        self = cls(directory, keys)
        self.maintain(now)
        return self

    def published(self) -> list[PublicAuthority]:
        """Every key a verifier has to know, in the order of their use."""
        return [jwt.authority(_public(k), k.kid) for k in self._keys]

    def maintain(self, now: float) -> bool:
        """Make the next key when it is time and drop what is over. True when what is published has changed."""
        before = [k.kid for k in self._keys]
        if not self._keys:
            self._make(int(now))
        elif now >= self._keys[-1].since + LIFE - AHEAD:
            self._make(max(self._keys[-1].since + LIFE, int(now) + DAY))
        for old, following in zip(list(self._keys), self._keys[1:], strict=False):
            if now >= following.since + AFTER:
                self._keys.remove(old)
        if [k.kid for k in self._keys] == before:
            return False
        self._save()
        for path in self._directory.glob("jwt-*.key"):
            if path.name not in {f"jwt-{k.kid}.key" for k in self._keys}:
                path.unlink(missing_ok=True)
        return True

    def _make(self, since: int) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        kid = os.urandom(8).hex()
        self._keys.append(_Key(kid, since, FileSigner.create(self._directory / f"jwt-{kid}.key", key)))

    def _save(self) -> None:
        state = {"keys": [{"kid": k.kid, "since": k.since} for k in self._keys]}
        write_secret(self._directory / STATE, json.dumps(state).encode())

    def sign(self, spiffe_id: SpiffeId, audience: Sequence[str], now: float, ends: int | None = None) -> tuple[str, int]:
        """A token and its end. `ends` is when the identity is over. Raises BadInput ``jwt.audience``."""
        key = [k for k in self._keys if k.since <= now][-1:] or self._keys[:1]
        expires = int(now) + jwt.LIFETIME if ends is None else min(int(now) + jwt.LIFETIME, ends)
        token = jwt.sign(spiffe_id, audience, kid=key[0].kid, signature=key[0].signer.sign, now=now, expires=expires)
        return token, expires


def _public(key: _Key) -> ec.EllipticCurvePublicKey:
    public = key.signer.public_key
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise BadState("ca.jwt", f"jwt-{key.kid}.key is not a P-256 key")
    return public
