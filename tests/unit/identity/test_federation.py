"""SPIFFE bundles as JSON: what must be read, what must be passed over, what must be refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from identity.federation import DEFAULT_HINT, MAX_HINT, make_bundle, parse_bundle
from identity.records import JwtAuthority
from tests.unit.identity.conftest import Forge

FORGE, OTHER = Forge(), Forge()


def x5c(forge: Forge = FORGE) -> list[str]:
    return [base64.b64encode(forge.root.cert.public_bytes(Encoding.DER)).decode()]


def jwk(**changed: Any) -> dict[str, Any]:
    found = {"kty": "EC", "use": "x509-svid", "x5c": x5c(), **changed}
    return {k: v for k, v in found.items() if v is not None}


def document(*keys: Any, **more: Any) -> str:
    return json.dumps({"keys": list(keys), **more})


def test_our_own_bundle_is_read_again() -> None:
    tokens = [JwtAuthority(kid="k1", x="A" * 43, y="A" * 43)]
    text = make_bundle([FORGE.root.cert, OTHER.root.cert], 7, 120, tokens)
    read = parse_bundle(text)
    assert read.roots == (FORGE.root.cert, OTHER.root.cert)
    assert (read.sequence, read.hint, read.jwt_authorities) == (7, 120, tuple(tokens))
    first = json.loads(text)["keys"][0]
    assert (first["kty"], first["use"], first["crv"], "kid" in first) == ("EC", "x509-svid", "P-384", False)


def test_no_keys_mean_that_everything_is_revoked() -> None:
    assert parse_bundle('{"keys": []}').roots == ()
    assert parse_bundle(make_bundle([], 3)).roots == ()


def test_unknown_kinds_and_uses_are_passed_over() -> None:
    odd = [jwk(kty="PQC", x5c=None), jwk(use="wit-svid", x5c=None), jwk(use=None, x5c=None), {"kty": 7}, {}, jwk(use=["x509-svid"])]
    assert parse_bundle(document(*odd, jwk())).roots == (FORGE.root.cert,)
    rsa = {"kty": "RSA", "use": "jwt-svid", "kid": "r", "n": "AQAB", "e": "AQAB"}
    assert parse_bundle(document(rsa)).jwt_authorities == ()


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", '{"keys": null}', '{"keys": {}}', '{"keys": [1]}', "junk", "[" * 50_000, '{"keys": [], "keys": []}',
        document(jwk(x5c=None)), document(jwk(x5c=[])), document(jwk(x5c=x5c() + x5c(OTHER))), document(jwk(x5c="x")), document(jwk(x5c=[1])),
        document(jwk(x5c=["!!"])), document(jwk(x5c=["AAAA"])), document(jwk(), jwk()), document(*[jwk()] * 17),
        document(spiffe_sequence=-1), document(spiffe_sequence="1"), document(spiffe_sequence=1.5), document(spiffe_sequence=True),
        document(spiffe_refresh_hint=[]), document({"kty": "EC", "use": "jwt-svid"}), document({"kty": "EC", "use": "jwt-svid", "kid": ""}),
        document({"kty": "EC", "use": "jwt-svid", "kid": "k", "crv": "P-256", "x": "!", "y": "A"}), '{"keys": [], "spiffe_sequence": NaN}',
        '{"keys": [{"kty": "EC", "kty": "EC"}]}', '{"keys": []}' + " " * 300_000,
    ],
)  # fmt: skip
def test_what_is_no_bundle_is_refused(text: str) -> None:
    with pytest.raises(BadInput) as e:
        parse_bundle(text)
    assert e.value.code == "federation.bundle"


@pytest.mark.parametrize(("hint", "expected"), [(None, DEFAULT_HINT), (0, DEFAULT_HINT), (60, 60), (1 << 40, MAX_HINT)])
def test_hints(hint: int | None, expected: int) -> None:
    assert parse_bundle(document(**({} if hint is None else {"spiffe_refresh_hint": hint}))).hint == expected


@given(st.text(max_size=300))
def test_junk_is_refused_in_one_way(text: str) -> None:
    codes = set()
    try:
        parse_bundle(text)
    except BadInput as e:
        codes.add(e.code)
    assert codes <= {"federation.bundle"}


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.data())
def test_a_changed_bundle_is_refused_or_says_the_same_or_something_else_that_is_whole(data: st.DataObject) -> None:
    text = make_bundle([FORGE.root.cert], 3)
    at = data.draw(st.integers(0, len(text) - 1))
    char = data.draw(st.characters(codec="ascii"))
    try:
        read = parse_bundle(text[:at] + char + text[at + 1 :])
    except BadInput:
        return
    for root in read.roots:
        assert root.public_bytes(Encoding.DER)
