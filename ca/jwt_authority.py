"""The keys that sign JWT-SVIDs: one in use, its successor published well before, its predecessor until its last token ended.

jwt.json in the CA's directory says which (kid, when made, when retired). The keys are where the authority's are, named
jwt-KID: in files, in the signer process or in the token. What an earlier release kept in a file beside a signer or a token
goes on until its successor is known. `now` is seconds since the epoch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from ca.keyring import KEY_TYPES, FileKeys, Keys
from ca.signer import FileSigner, Signer
from identity import jwt
from identity.errors import BadInput, BadState
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
    signer: Signer
    settled: bool = True  # False: in a file, while the other keys are elsewhere


class JwtAuthority:
    """Signs tokens and says which keys are to be published."""

    def __init__(self, directory: Path, keys: list[_Key], place: Keys) -> None:
        self._directory, self._place = directory, place
        self._keys = keys

    @classmethod
    def load(cls, directory: Path, now: float, place: Keys | None = None, *, upkeep: bool = True) -> JwtAuthority:
        """Open, make the first key when there is none, and do what is due. `place`: default files in the directory; `upkeep`:
        False in a further process, which follows the first. Raises BadState ``ca.jwt``, ``state.*``, Unreachable.
        """
        path, at = directory / STATE, place or FileKeys(directory)
        keys: list[_Key] = []
        if path.exists():
            try:
                said = json.loads(path.read_text())
                keys = [_open(directory, at, str(k["kid"]), int(k["since"])) for k in said["keys"]]
            except (OSError, ValueError, KeyError, TypeError, BadInput):
                raise BadState("ca.jwt", f"{path} cannot be read", hint="restore it from a backup, or move it away: new keys are made") from None
        self = cls(directory, keys, at)
        if upkeep:
            self.maintain(now)
        return self

    def published(self) -> list[PublicAuthority]:
        """Every key a verifier has to know, in the order of their use."""
        return [jwt.authority(_public(k), k.kid) for k in self._keys]

    def maintain(self, now: float) -> bool:
        """Make the next key when it is time and drop what is over. True when what is published has changed."""
        before, gone = [k.kid for k in self._keys], list[_Key]()
        if not self._keys:
            self._make(int(now))
        elif now >= self._keys[-1].since + LIFE - AHEAD:
            self._make(max(self._keys[-1].since + LIFE, int(now) + DAY))
        elif not self._keys[-1].settled:
            self._make(int(now) + DAY)
        for old, following in zip(list(self._keys), self._keys[1:], strict=False):
            if now >= following.since + AFTER:
                self._keys.remove(old)
                gone.append(old)
        if [k.kid for k in self._keys] == before:
            return False
        self._save()
        for key in gone:
            if key.settled:
                self._place.destroy(_name(key.kid))
        for path in self._directory.glob("jwt-*.key"):
            if path.name not in {f"jwt-{k.kid}.key" for k in self._keys}:
                path.unlink(missing_ok=True)
        return True

    def _make(self, since: int) -> None:
        kid = os.urandom(8).hex()
        self._keys.append(_Key(kid, since, self._place.make(_name(kid), KEY_TYPES["jwt"])))

    def _save(self) -> None:
        state = {"keys": [{"kid": k.kid, "since": k.since} for k in self._keys]}
        write_secret(self._directory / STATE, json.dumps(state).encode())

    def kid(self, now: float) -> str:
        """Of the key that signs at that time. Raises BadState ``ca.jwt`` when there is none."""
        return self._current(now).kid

    def _current(self, now: float) -> _Key:
        key = [k for k in self._keys if k.since <= now][-1:] or self._keys[:1]
        if not key:
            raise BadState("ca.jwt", "there is no key for tokens here", hint="make this copy again: retinue-ca replica DIR")
        return key[0]

    def sign(self, spiffe_id: SpiffeId, audience: Sequence[str], now: float, ends: int | None = None) -> tuple[str, int]:
        """A token and its end. `ends` is when the identity is over. Raises BadInput ``jwt.audience``, BadState ``ca.jwt``."""
        key = self._current(now)
        expires = int(now) + jwt.LIFETIME if ends is None else min(int(now) + jwt.LIFETIME, ends)
        token = jwt.sign(spiffe_id, audience, kid=key.kid, signature=key.signer.sign, now=now, expires=expires)
        return token, expires


def _name(kid: str) -> str:
    return f"jwt-{kid}"


def _open(directory: Path, place: Keys, kid: str, since: int) -> _Key:
    if place.has(_name(kid)):
        # A token's keys are found beside it as well (ca/pkcs11.py): those are of an earlier release.
        beside = not isinstance(place, FileKeys) and (directory / f"{_name(kid)}.key").exists()
        return _Key(kid, since, place.open(_name(kid)), settled=not beside)
    return _Key(kid, since, FileSigner.load(directory / f"{_name(kid)}.key"), settled=False)


def _public(key: _Key) -> ec.EllipticCurvePublicKey:
    public = key.signer.public_key
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise BadState("ca.jwt", f"jwt-{key.kid}.key is not a P-256 key")
    return public
