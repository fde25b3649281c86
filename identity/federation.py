"""SPIFFE bundles as JSON (SPIFFE Trust Domain and Bundle, sections 4 and 5): what one trust domain shows another.

A JWK Set with `spiffe_sequence` and `spiffe_refresh_hint`. Of the keys those with use ``x509-svid`` hold one root each in
`x5c`; those with use ``jwt-svid`` check tokens. Keys of a kind or use that is not known are passed over; no key at all
means that everything is revoked. A bundle does not name its trust domain: whoever keeps it has to keep the pair.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from identity import certs
from identity.errors import BadInput
from identity.keys import b64, unb64
from identity.records import JwtAuthority

MAX_BUNDLE: Final = 256 * 1024
MAX_ROOTS: Final = 16
DEFAULT_HINT: Final = 300  # seconds, the specification's advice
MAX_HINT: Final = 7 * 86400

_CURVES: Final = {"secp256r1": "P-256", "secp384r1": "P-384"}


@dataclass(frozen=True, slots=True)
class ForeignRoots:
    """A bundle that was read. `sequence` is None when it does not say one; `hint` in seconds."""

    roots: tuple[x509.Certificate, ...]
    sequence: int | None
    hint: int
    jwt_authorities: tuple[JwtAuthority, ...] = ()


def parse_bundle(text: str | bytes) -> ForeignRoots:
    """Raises BadInput ``federation.bundle``."""
    if len(text) > MAX_BUNDLE:
        raise _bad(f"it is larger than {MAX_BUNDLE} bytes")
    try:
        document = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise _bad(e.args[0] if e.args and str(e.args[0]).startswith("a key") else "it is not JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise _bad("it has no list of keys")
    roots: list[x509.Certificate] = []
    tokens: list[JwtAuthority] = []
    for jwk in document["keys"]:
        if not isinstance(jwk, dict):
            raise _bad("a key of it is not an object")
        if jwk.get("kty") not in {"EC", "RSA", "OKP"}:
            continue  # to be passed over, as one of an unknown use
        if jwk.get("use") == "x509-svid":
            roots.append(_root(jwk))
        elif jwk.get("use") == "jwt-svid" and (found := _token_key(jwk)) is not None:
            tokens.append(found)
    if len(roots) > MAX_ROOTS or len(tokens) > MAX_ROOTS:
        raise _bad(f"it has more than {MAX_ROOTS} roots")
    if len({certs.fingerprint(r) for r in roots}) != len(roots):
        raise _bad("it holds a root twice")
    return ForeignRoots(tuple(roots), _number(document, "spiffe_sequence", None), _hint(document), tuple(tokens))


def make_bundle(
    roots: Sequence[x509.Certificate], sequence: int, hint: int = DEFAULT_HINT, jwt_authorities: Sequence[JwtAuthority] = ()
) -> str:
    """The JSON of our own bundle."""
    keys: list[dict[str, Any]] = [_jwk(root) for root in roots]
    keys += [{"kty": "EC", "use": "jwt-svid", "kid": a.kid, "crv": "P-256", "x": a.x, "y": a.y} for a in jwt_authorities]
    return json.dumps({"keys": keys, "spiffe_sequence": sequence, "spiffe_refresh_hint": hint}, indent=1)


def _jwk(root: x509.Certificate) -> dict[str, Any]:
    key = root.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    numbers, size = key.public_numbers(), (key.curve.key_size + 7) // 8
    return {
        "kty": "EC", "use": "x509-svid", "crv": _CURVES[key.curve.name],
        "x": b64(numbers.x.to_bytes(size, "big")), "y": b64(numbers.y.to_bytes(size, "big")),
        "x5c": [base64.b64encode(root.public_bytes(Encoding.DER)).decode()],
    }  # fmt: skip


def _root(jwk: dict[str, Any]) -> x509.Certificate:
    x5c = jwk.get("x5c")
    if not isinstance(x5c, list) or len(x5c) != 1 or not isinstance(x5c[0], str):
        raise _bad("a key of use x509-svid needs exactly one certificate in x5c")
    try:
        return x509.load_der_x509_certificate(base64.b64decode(x5c[0], validate=True))
    except (ValueError, TypeError, x509.InvalidVersion):
        raise _bad("a certificate in it cannot be read") from None


def _token_key(jwk: dict[str, Any]) -> JwtAuthority | None:
    """P-256 only: tokens under other keys are not accepted here."""
    kid, x, y = jwk.get("kid"), jwk.get("x"), jwk.get("y")
    if not isinstance(kid, str) or not kid:
        raise _bad("a key of use jwt-svid needs a kid")
    if jwk.get("kty") != "EC" or jwk.get("crv") != "P-256":
        return None
    try:
        unb64(str(x), length=32)
        unb64(str(y), length=32)
        return JwtAuthority(kid=kid, x=str(x), y=str(y))
    except (BadInput, ValueError):
        raise _bad("a key of use jwt-svid cannot be read") from None


def _hint(document: dict[str, Any]) -> int:
    found = _number(document, "spiffe_refresh_hint", DEFAULT_HINT)
    return DEFAULT_HINT if found is None or found == 0 else min(found, MAX_HINT)


def _number(document: dict[str, Any], name: str, default: int | None) -> int | None:
    value = document.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise _bad(f"{name} is not a number")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _bad(why: str) -> BadInput:
    return BadInput("federation.bundle", f"that is no SPIFFE bundle: {why}")
