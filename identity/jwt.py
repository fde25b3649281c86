"""JWT-SVIDs (SPIFFE JWT-SVID, RFC 7519, RFC 7515): ES256 only, made for one subject and named audiences, for minutes.

A key is trusted by its `kid` in the bundle of the trust domain that `sub` names, and for nothing else. The header is
compared with what we accept; it never chooses the algorithm or the key material.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from identity.errors import BadInput, NotVerified
from identity.keys import b64, unb64
from identity.names import SpiffeId, TrustDomain
from identity.records import JwtAuthority

LIFETIME: Final = 300  # seconds, ours and the most we accept of our own trust domain
LEEWAY: Final = 60  # seconds of skew for what lies in the future
MAX_TOKEN: Final = 16 * 1024
MAX_AUDIENCES: Final = 16
MAX_AUDIENCE: Final = 1024
_NUMBER: Final = 32  # bytes of r and of s in ES256 (RFC 7518 section 3.4)
_PARAMETERS: Final = frozenset({"alg", "kid", "typ"})


@dataclass(frozen=True, slots=True)
class JwtSvid:
    """A token that verified. Times are seconds since the epoch."""

    spiffe_id: SpiffeId
    audience: tuple[str, ...]
    expires: int
    claims: Mapping[str, Any]


def authority(key: ec.EllipticCurvePublicKey, kid: str) -> JwtAuthority:
    """The public form of a P-256 signing key."""
    n = key.public_numbers()
    return JwtAuthority(kid=kid, x=b64(n.x.to_bytes(_NUMBER, "big")), y=b64(n.y.to_bytes(_NUMBER, "big")))


def public_key(one: JwtAuthority) -> ec.EllipticCurvePublicKey:
    """Raises NotVerified ``jwt.key`` for coordinates that are no point of the curve."""
    try:
        x, y = (int.from_bytes(unb64(text, length=_NUMBER), "big") for text in (one.x, one.y))
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except (BadInput, ValueError):
        raise NotVerified("jwt.key", "a JWT key of the bundle is no P-256 key") from None


def jwks(authorities: Sequence[JwtAuthority], sequence: int | None = None) -> bytes:
    """The JWK Set of a trust domain's JWT keys (RFC 7517; SPIFFE Trust Domain and Bundle, section 4)."""
    keys = [{"kty": "EC", "use": "jwt-svid", "kid": a.kid, "crv": "P-256", "x": a.x, "y": a.y} for a in authorities]
    extra = {} if sequence is None else {"spiffe_sequence": sequence}
    return json.dumps({"keys": keys, **extra}, separators=(",", ":")).encode()


def check_audience(audience: Sequence[str]) -> tuple[str, ...]:
    """At least one, none empty, without repeats. Raises BadInput ``jwt.audience``."""
    found = tuple(dict.fromkeys(audience))
    if not found or len(found) > MAX_AUDIENCES or not all(a and len(a) <= MAX_AUDIENCE and a.isprintable() for a in found):
        raise BadInput("jwt.audience", f"a JWT-SVID needs 1 to {MAX_AUDIENCES} audiences of printable text")
    return found


def sign(
    spiffe_id: SpiffeId, audience: Sequence[str], *, kid: str, signature: Callable[[bytes], bytes], now: float, expires: int
) -> str:
    """A token. `signature` makes an ECDSA signature (DER, P-256, SHA-256). Raises BadInput ``jwt.audience``."""
    claims = {"sub": str(spiffe_id), "aud": list(check_audience(audience)), "iat": int(now), "exp": min(expires, int(now) + LIFETIME)}
    head = {"alg": "ES256", "kid": kid, "typ": "JWT"}
    text = ".".join(b64(json.dumps(part, separators=(",", ":")).encode()) for part in (head, claims))
    r, s = decode_dss_signature(signature(text.encode()))
    return f"{text}.{b64(r.to_bytes(_NUMBER, 'big') + s.to_bytes(_NUMBER, 'big'))}"


def about(token: str) -> dict[str, Any]:
    """What a token says of itself, for a record that it was issued; times are seconds since the epoch. Nothing is verified.

    sha256 (lower hex) is of the JWS signing input (RFC 7515 section 2), header and claims: whoever has a token can turn an
    ECDSA signature into another valid one, and the token would have a hash that nobody knows. Raises NotVerified ``jwt.*``
    for what is no token by our profile.
    """
    parts = token.split(".") if isinstance(token, str) and len(token) <= MAX_TOKEN and token.isascii() else []
    if len(parts) != 3:
        raise NotVerified("jwt.form", "not a JWT-SVID")
    head, claims = _json(parts[0]), _json(parts[1])
    signed = f"{parts[0]}.{parts[1]}".encode()
    kid, issued, expires = head.get("kid"), claims.get("iat"), claims.get("exp")
    if not isinstance(kid, str) or type(issued) is not int or type(expires) is not int:
        raise NotVerified("jwt.header", "the token does not name its key, its beginning and its end")
    return {
        "kid": kid, "spiffe_id": str(_subject(claims)), "audience": list(_audience(claims)), "issued": issued,
        "expires": expires, "sha256": hashlib.sha256(signed).hexdigest(),
    }  # fmt: skip


def unsigned(text: str, *, kid: str, trust_domain: TrustDomain, now: float) -> SpiffeId:
    """The subject of what is about to be signed, if it is a token by our profile: for a workload of the trust domain, by this
    key, from now on and for no longer than LIFETIME. Raises NotVerified ``jwt.*``.
    """
    parts = text.split(".") if isinstance(text, str) and len(text) <= MAX_TOKEN and text.isascii() else []
    if len(parts) != 2:
        raise NotVerified("jwt.form", "not the header and claims of a token")
    head, claims = _json(parts[0]), _json(parts[1])
    if head != {"alg": "ES256", "kid": kid, "typ": "JWT"} or claims.keys() != {"sub", "aud", "iat", "exp"}:
        raise NotVerified("jwt.header", "the token has other parameters or claims than the profile's")
    spiffe_id = _subject(claims)
    if spiffe_id.trust_domain != trust_domain or spiffe_id.kind != "wl":
        raise NotVerified("jwt.sub", f"{spiffe_id} is no workload of {trust_domain}")
    try:
        check_audience(_audience(claims))
    except BadInput as e:
        raise NotVerified("jwt.audience", e.message) from None
    expires = _times(claims, now)
    began = claims["iat"]
    if not isinstance(began, int) or abs(began - now) > LEEWAY or not 0 < expires - began <= LIFETIME:
        raise NotVerified("jwt.lifetime", f"the token is not of now, or for longer than {LIFETIME} s")
    return spiffe_id


def verify(
    token: str, audience: str, bundles: Mapping[str, Sequence[JwtAuthority]], now: float, *, own: str | None = None
) -> JwtSvid:
    """Check a token for one audience. bundles: trust domain -> its JWT keys; own: the trust domain that never signs for
    longer than LIFETIME. Raises NotVerified ``jwt.*``; the signature is checked before a claim is believed.
    """
    if not isinstance(token, str) or len(token) > MAX_TOKEN or not token.isascii():
        raise NotVerified("jwt.form", "the token is too long or not a token")
    parts = token.split(".")
    if len(parts) != 3:
        raise NotVerified("jwt.form", "a JWT-SVID is one signed token in three parts")
    head, claims = _json(parts[0]), _json(parts[1])
    if head.get("alg") != "ES256":
        raise NotVerified("jwt.alg", "the token is not signed with ES256")
    if head.get("typ", "JWT") not in ("JWT", "JOSE"):
        raise NotVerified("jwt.typ", "the token is of another type")
    if not head.keys() <= _PARAMETERS:
        raise NotVerified("jwt.header", "the token's header has parameters that are not taken")
    spiffe_id = _subject(claims)
    key = _key(head, bundles.get(spiffe_id.trust_domain.name), spiffe_id)
    try:
        raw = unb64(parts[2], length=2 * _NUMBER)
        r, s = int.from_bytes(raw[:_NUMBER], "big"), int.from_bytes(raw[_NUMBER:], "big")
        key.verify(encode_dss_signature(r, s), f"{parts[0]}.{parts[1]}".encode(), ec.ECDSA(hashes.SHA256()))
    except (BadInput, InvalidSignature):
        raise NotVerified("jwt.signature", "the signature of the token does not hold") from None
    audiences = _audience(claims)
    if audience not in audiences:
        raise NotVerified("jwt.audience", "the token is for another audience")
    expires = _times(claims, now)
    if spiffe_id.trust_domain.name == own and expires > now + LIFETIME + LEEWAY:
        raise NotVerified("jwt.lifetime", "the token is valid for longer than any that this trust domain signs")
    return JwtSvid(spiffe_id, audiences, expires, claims)


def _key(head: Mapping[str, Any], known: Sequence[JwtAuthority] | None, spiffe_id: SpiffeId) -> ec.EllipticCurvePublicKey:
    kid = head.get("kid")
    if not isinstance(kid, str) or not kid:
        raise NotVerified("jwt.kid", "the token does not name its key")
    if known is None:
        raise NotVerified("jwt.trust_domain", f"the keys of {spiffe_id.trust_domain} are not known here")
    found = [a for a in known if a.kid == kid]
    if len(found) != 1:
        raise NotVerified("jwt.kid", f"{spiffe_id.trust_domain} has no such key")
    return public_key(found[0])


def _subject(claims: Mapping[str, Any]) -> SpiffeId:
    sub = claims.get("sub")
    try:
        return SpiffeId.parse(sub)  # type: ignore[arg-type]  # it refuses what is no text
    except BadInput:
        raise NotVerified("jwt.sub", "the token's subject is no SPIFFE ID") from None


def _audience(claims: Mapping[str, Any]) -> tuple[str, ...]:
    aud = claims.get("aud")
    found = [aud] if isinstance(aud, str) else aud
    if not isinstance(found, list) or not found or not all(isinstance(a, str) and a for a in found):
        raise NotVerified("jwt.audience", "the token names no audience")
    return tuple(found)


def _times(claims: Mapping[str, Any], now: float) -> int:
    for name in ("exp", "iat", "nbf"):
        value = claims.get(name)
        if value is None and name != "exp":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1 << 40:
            raise NotVerified(f"jwt.{name}", f"the token's {name} is not a time")
    if now >= claims["exp"]:
        raise NotVerified("jwt.expired", "the token has expired")
    if max(claims.get("iat") or 0, claims.get("nbf") or 0) > now + LEEWAY:
        raise NotVerified("jwt.not_yet", "the token is not valid yet", hint="compare the clocks of both machines")
    return int(claims["exp"])


def _json(part: str) -> dict[str, Any]:
    try:
        data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
        if b64(data) != part:
            raise ValueError
        value = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, binascii.Error, RecursionError):
        raise NotVerified("jwt.form", "the token cannot be read") from None
    if not isinstance(value, dict):
        raise NotVerified("jwt.form", "the token cannot be read")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers of one token must not see two values under one name (RFC 8725 section 2.4)."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def _no_constant(_: str) -> None:
    raise ValueError("NaN and Infinity are not JSON")
