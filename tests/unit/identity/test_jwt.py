"""JWT-SVIDs: our reader against a second one, and every way a token can be wrong."""

from __future__ import annotations

import hashlib
import json

import jwt as second
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from identity import jwt
from identity.errors import BadInput, NotVerified
from identity.keys import b64, unb64
from identity.names import SpiffeId, TrustDomain
from identity.records import JwtAuthority

NOW = 2_000_000_000
TD = TrustDomain("a.example")
WEB = SpiffeId.workload(TD, "web")
KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
KEYS = (jwt.authority(KEY.public_key(), "k1"), jwt.authority(OTHER.public_key(), "k2"))


def signer(key=KEY):
    return lambda data: key.sign(data, ec.ECDSA(hashes.SHA256()))


def made(**options):
    return jwt.sign(WEB, ["db"], **{"kid": "k1", "signature": signer(), "now": NOW, "expires": NOW + 300, **options})


def forge(claims=None, head=None, key=KEY, drop=()):
    said = {"sub": str(WEB), "aud": ["db"], "exp": NOW + 60, "iat": NOW} | (claims or {})
    headers = {"kid": "k1", "typ": "JWT"} | (head or {})
    text = {k: v for k, v in said.items() if k not in drop}
    headers = {k: v for k, v in headers.items() if k not in drop}
    parts = [b64(json.dumps({"alg": "ES256", **headers}).encode()), b64(json.dumps(text).encode())]
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    r, s = decode_dss_signature(signer(key)(".".join(parts).encode()))
    return ".".join([*parts, b64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))])


def check(token, audience="db", now=NOW, bundles=None, own="a.example"):
    return jwt.verify(token, audience, bundles or {"a.example": KEYS}, now, own=own)


def test_what_is_signed_verifies_here_and_elsewhere():
    token = made()
    found = check(token)
    assert (found.spiffe_id, found.audience, found.expires) == (WEB, ("db",), NOW + 300)
    key = second.PyJWK(json.loads(jwt.jwks(KEYS))["keys"][0])
    claims = second.decode(token, key, ["ES256"], audience="db", options={"verify_exp": False, "verify_iat": False})
    assert claims == dict(found.claims)


def test_what_the_second_library_signs_verifies_here():
    token = second.encode({"sub": str(WEB), "aud": "db", "exp": NOW + 60}, KEY, "ES256", {"kid": "k1"})
    assert check(token).spiffe_id == WEB


def test_a_token_never_lives_longer_than_five_minutes():
    assert check(made(expires=NOW + 9999)).expires == NOW + 300
    assert check(made(expires=NOW + 5)).expires == NOW + 5


def test_a_key_set_has_no_private_part():
    said = json.loads(jwt.jwks(KEYS, 7))
    assert said["spiffe_sequence"] == 7
    assert all(key.keys() == {"kty", "use", "kid", "crv", "x", "y"} for key in said["keys"])


@pytest.mark.parametrize("audience", [[], [""], ["a\nb"], ["x" * 1025], [str(n) for n in range(17)]])
def test_audiences_that_are_refused(audience):
    with pytest.raises(BadInput) as caught:
        jwt.sign(WEB, audience, kid="k1", signature=signer(), now=NOW, expires=NOW + 60)
    assert caught.value.code == "jwt.audience"


@pytest.mark.parametrize(
    ("token", "code"),
    [
        (lambda: second.encode({"sub": str(WEB), "aud": "db", "exp": NOW + 60}, None, "none", {"kid": "k1"}), "jwt.alg"),
        (lambda: second.encode({"sub": str(WEB), "aud": "db", "exp": NOW + 60}, "s" * 64, "HS256", {"kid": "k1"}), "jwt.alg"),
        (lambda: forge(head={"alg": "ES384"}), "jwt.alg"), (lambda: forge(head={"typ": "at+jwt"}), "jwt.typ"), (lambda: forge(head={"typ": ["JWT"]}), "jwt.typ"),
        (lambda: forge(head={"jwk": {}}), "jwt.header"), (lambda: forge(head={"crit": ["exp"]}), "jwt.header"),
        (lambda: forge(head={"jku": "https://evil"}), "jwt.header"), (lambda: forge(head={"x5c": []}), "jwt.header"),
        (lambda: forge(drop=("kid",)), "jwt.kid"), (lambda: forge(head={"kid": 7}), "jwt.kid"), (lambda: forge(head={"kid": ""}), "jwt.kid"), (lambda: forge(head={"kid": "k9"}), "jwt.kid"),
        (lambda: forge(key=OTHER), "jwt.signature"), (lambda: forge(head={"kid": "k2"}), "jwt.signature"),
        (lambda: forge({"sub": "spiffe://b.example/wl/web"}), "jwt.trust_domain"), (lambda: forge(drop=("sub",)), "jwt.sub"), (lambda: forge({"sub": "web"}), "jwt.sub"),
        (lambda: forge({"sub": "spiffe://a.example"}), "jwt.sub"), (lambda: forge({"sub": ["spiffe://a.example/wl/web"]}), "jwt.sub"),
        (lambda: forge({"aud": "cache"}), "jwt.audience"), (lambda: forge({"aud": []}), "jwt.audience"), (lambda: forge(drop=("aud",)), "jwt.audience"),
        (lambda: forge({"aud": {"db": 1}}), "jwt.audience"), (lambda: forge({"aud": "xdbx"}), "jwt.audience"),
        (lambda: forge(drop=("exp",)), "jwt.exp"), (lambda: forge({"exp": "soon"}), "jwt.exp"), (lambda: forge({"exp": True}), "jwt.exp"), (lambda: forge({"exp": NOW}), "jwt.expired"),
        (lambda: forge({"exp": -1}), "jwt.exp"), (lambda: forge({"nbf": NOW + 61}), "jwt.not_yet"), (lambda: forge({"iat": NOW + 61}), "jwt.not_yet"), (lambda: forge({"iat": "x"}), "jwt.iat"),
        (lambda: forge({"exp": NOW + 361}), "jwt.lifetime"), (lambda: made() + ".x", "jwt.form"), (lambda: "", "jwt.form"), (lambda: "a.b.c", "jwt.form"),
        (lambda: "é.b.c", "jwt.form"), (lambda: "x" * 20000, "jwt.form"), (lambda: made().rpartition(".")[0] + ".", "jwt.signature"),
        (lambda: ".".join((b64(b"[]"), b64(b"{}"), "x")), "jwt.form"), (lambda: ".".join((b64(b'{"alg":"ES256","alg":"none"}'), b64(b"{}"), "x")), "jwt.form"),
        (lambda: ".".join((b64(b'{"alg":"ES256","kid":NaN}'), b64(b"{}"), "x")), "jwt.form"), (lambda: ".".join((b64(b"[" * 9000), b64(b"{}"), "x")), "jwt.form"),
    ],
)  # fmt: skip
def test_tokens_that_are_refused(token, code):
    with pytest.raises(NotVerified) as caught:
        check(token())
    assert caught.value.code == code


def test_null_times_are_no_times():
    assert check(forge({"iat": None, "nbf": None})).spiffe_id == WEB


def test_a_key_of_one_trust_domain_proves_nothing_of_another():
    foreign = {"a.example": KEYS[:1], "b.example": KEYS[1:]}
    with pytest.raises(NotVerified) as caught:
        check(forge({"sub": "spiffe://b.example/wl/web"}), bundles=foreign)
    assert caught.value.code == "jwt.kid"
    token = forge({"sub": "spiffe://b.example/wl/web", "exp": NOW + 3000}, {"kid": "k2"}, OTHER)
    assert str(check(token, bundles=foreign).spiffe_id) == "spiffe://b.example/wl/web"  # a longer life is its own choice
    with pytest.raises(NotVerified):
        check(token, bundles={"a.example": KEYS})


def test_a_kid_that_two_keys_have_is_none():
    twice = (KEYS[0], KEYS[1].model_copy(update={"kid": "k1"}))
    with pytest.raises(NotVerified) as caught:
        check(made(), bundles={"a.example": twice})
    assert caught.value.code == "jwt.kid"


def test_a_key_off_the_curve():
    with pytest.raises(NotVerified):
        jwt.public_key(JwtAuthority(kid="x", x=b64(bytes(32)), y=b64(bytes(32))))
    with pytest.raises(NotVerified):
        jwt.public_key(JwtAuthority(kid="x", x="AA", y="AA"))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.sampled_from("Ax0_-."))
def test_no_changed_character_passes(at, letter):
    token = made()
    at %= len(token)
    if token[at] == letter:
        return
    with pytest.raises(NotVerified):
        check(token[:at] + letter + token[at + 1 :])


def test_the_other_form_of_a_signature_says_the_same():
    """ECDSA signatures are malleable: nothing here is keyed by the token's bytes."""
    head, body, signature = made().split(".")
    raw = unb64(signature)
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    flipped = raw[:32] + (order - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
    assert check(f"{head}.{body}.{b64(flipped)}").spiffe_id == WEB
    assert jwt.about(f"{head}.{body}.{b64(flipped)}") == jwt.about(f"{head}.{body}.{signature}")


def test_what_is_kept_of_a_token_has_no_signature():
    token = made(expires=NOW + 20)
    said = jwt.about(token)
    assert said == {
        "kid": "k1", "spiffe_id": str(WEB), "audience": ["db"], "issued": NOW, "expires": NOW + 20,
        "sha256": hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest(),
    }  # fmt: skip
    assert not any(part in json.dumps(said) for part in token.split("."))
    assert jwt.about(made(expires=NOW + 21))["sha256"] != said["sha256"]


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("", "jwt.form"), ("a.b", "jwt.form"), ("a.b.c", "jwt.form"), ("é.b.c", "jwt.form"), (None, "jwt.form"),
        ("x" * (jwt.MAX_TOKEN + 1), "jwt.form"), (forge(drop=("kid",)), "jwt.header"), (forge(drop=("iat",)), "jwt.header"),
        (forge({"exp": True}), "jwt.header"), (forge({"sub": "web"}), "jwt.sub"), (forge(drop=("aud",)), "jwt.audience"),
    ],
)  # fmt: skip
def test_what_is_no_token_of_ours_says_nothing_of_itself(token, code):
    with pytest.raises(NotVerified) as caught:
        jwt.about(token)
    assert caught.value.code == code
