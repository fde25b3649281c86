from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import nacl.bindings
import nacl.signing
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from identity import enrollment
from identity.enrollment import JoinToken, Offer, check_keys, check_token, prove, transcript
from identity.errors import BadInput, NotVerified
from identity.keys import b64, ed25519_public, x25519_public

SECRET = bytes(range(32))
TOKEN = JoinToken("a1b2", SECRET, "ab" * 32)
SERVER = X25519PrivateKey.from_private_bytes(b"\x11" * 32)
TUNNEL = X25519PrivateKey.from_private_bytes(b"\x22" * 32)
ENROLL = Ed25519PrivateKey.from_private_bytes(b"\x33" * 32)
OFFER = Offer(
    token_id="a1b2", nonce=b"\x44" * 32, server_leaf=b"leaf", server_key=x25519_public(SERVER), csr="csr",
    tunnel_key=x25519_public(TUNNEL), enroll_key=ed25519_public(ENROLL), underlay=("192.0.2.1:51820",),
    ciphers=("aes-256-gcm", "chacha20poly1305"),
)  # fmt: skip
PROOFS = prove(OFFER, TOKEN, TUNNEL, ENROLL)


# -- golden vectors: another implementation must get these bytes ------------------------------------------------------

GOLDEN_TOKEN = "rt1.a1b2.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8." + "ab" * 32
GOLDEN_PUBLIC = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"


def framed(*parts: bytes) -> bytes:
    return b"".join(len(p).to_bytes(4, "big") + p for p in parts)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_the_token_text_is_fixed():
    assert TOKEN.format() == GOLDEN_TOKEN
    assert JoinToken.parse(GOLDEN_TOKEN + "\n") == TOKEN
    assert TOKEN.public_key.hex() == GOLDEN_PUBLIC == nacl.signing.SigningKey(SECRET).verify_key.encode().hex()


def test_the_transcript_is_what_its_description_says():
    expected = sha(framed(
        b"retinue enrol v1 transcript", b"a1b2", b"\x44" * 32, sha(b"leaf"), OFFER.server_key, sha(b"csr"),
        OFFER.tunnel_key, OFFER.enroll_key, framed(b"192.0.2.1:51820"), framed(b"aes-256-gcm", b"chacha20poly1305"),
    ))  # fmt: skip
    assert transcript(OFFER) == expected
    assert transcript(OFFER).hex() == GOLDEN_TRANSCRIPT


def test_the_proofs_are_what_a_second_implementation_makes():
    import hmac

    said = bytes.fromhex(GOLDEN_TRANSCRIPT)
    token = nacl.signing.SigningKey(SECRET).sign(b"retinue enrol v1 token\0" + said).signature
    enroll = nacl.signing.SigningKey(b"\x33" * 32).sign(b"retinue enrol v1 enrol key\0" + said).signature
    shared = nacl.bindings.crypto_scalarmult(b"\x22" * 32, OFFER.server_key)
    extracted = hmac.digest(OFFER.nonce, shared, "sha256")  # RFC 5869 section 2.2
    key = hmac.digest(extracted, b"retinue enrol v1 tunnel key\x01", "sha256")  # section 2.3, one block
    assert (PROOFS.token, PROOFS.enroll, PROOFS.tunnel) == (token, enroll, hmac.digest(key, said, "sha256"))
    assert PROOFS.tunnel.hex() == GOLDEN_TUNNEL


GOLDEN_TRANSCRIPT = "ced1510cc1caa833aa0f1e279b86a4ef94c0380efaab61127197ddcbac8dd2d5"
GOLDEN_TUNNEL = "ea6f9abee144e40e2f5757ae8a56d7c433a4555a4f6b04c50e0bc461434b5694"


# -- tokens -----------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.from_regex(enrollment.TOKEN_ID, fullmatch=True))
def test_tokens_round_trip(secret, token_id):
    token = JoinToken(token_id, secret, "0" * 64)
    assert JoinToken.parse(token.format()) == token
    assert b64(secret) not in repr(token)
    assert b64(secret) not in str(token)


@pytest.mark.parametrize(
    "text",
    ["", "rt1", "rt1...", GOLDEN_TOKEN.replace("rt1", "rt2"), GOLDEN_TOKEN + ".x", GOLDEN_TOKEN[:-1], GOLDEN_TOKEN.upper(),
     GOLDEN_TOKEN.replace("a1b2", ""), GOLDEN_TOKEN.replace("a1b2", "a b"), GOLDEN_TOKEN.replace("a1b2", "a" * 65),
     GOLDEN_TOKEN.replace("Hh8", "Hh9"), GOLDEN_TOKEN.replace("Hh8", "Hh8="), "x" * 300, None, b"rt1"],
)  # fmt: skip
def test_malformed_tokens_are_refused_without_repeating_them(text):
    with pytest.raises(BadInput) as e:
        JoinToken.parse(text)
    assert e.value.code == "token.malformed"
    assert "AAEC" not in str(e.value)
    assert "AAEC" not in e.value.hint


@given(st.integers(0, len(GOLDEN_TOKEN) - 1), st.characters(codec="ascii"))
def test_a_mutated_token_is_refused_or_another_token(position, char):
    text = GOLDEN_TOKEN[:position] + char + GOLDEN_TOKEN[position + 1 :]
    try:
        parsed = JoinToken.parse(text)
    except BadInput:
        return
    assert (parsed == TOKEN) == (text.strip() == GOLDEN_TOKEN)
    assert parsed.format() == text.strip()


# -- proofs -----------------------------------------------------------------------------------------------------------


def test_good_proofs_hold():
    check_token(OFFER, PROOFS, TOKEN.public_key)
    check_keys(OFFER, PROOFS, SERVER)


OTHER = {
    "token_id": "zz", "nonce": b"\x45" * 32, "server_leaf": b"other leaf", "server_key": b"\x09" + bytes(31), "csr": "csr2",
    "tunnel_key": x25519_public(X25519PrivateKey.from_private_bytes(b"\x55" * 32)),
    "enroll_key": ed25519_public(Ed25519PrivateKey.from_private_bytes(b"\x66" * 32)), "underlay": (),
    "ciphers": ("chacha20poly1305", "aes-256-gcm"),
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(Offer)])
def test_every_field_is_bound_by_every_proof(name):
    changed = replace(OFFER, **{name: OTHER[name]})
    assert transcript(changed) != transcript(OFFER)
    with pytest.raises(NotVerified) as e:
        check_token(changed, PROOFS, TOKEN.public_key)
    assert e.value.code == "token.refused"
    with pytest.raises(NotVerified) as e:
        check_keys(changed, PROOFS, SERVER)
    assert e.value.code == "enroll.tunnel_proof"
    good_mac = replace(PROOFS, tunnel=enrollment._tunnel_mac(SERVER, changed.tunnel_key, changed.nonce, transcript(changed)))
    with pytest.raises(NotVerified) as e:
        check_keys(changed, good_mac, SERVER)
    assert e.value.code == "enroll.key_proof"


def test_fields_cannot_be_shifted_into_each_other():
    assert transcript(replace(OFFER, underlay=("a", "b"))) != transcript(replace(OFFER, underlay=("ab",)))
    assert transcript(replace(OFFER, underlay=("a",), ciphers=())) != transcript(replace(OFFER, underlay=(), ciphers=("a",)))
    assert transcript(replace(OFFER, token_id="a1b2D", nonce=b"D" * 31)) != transcript(OFFER)


@given(st.sampled_from(["token", "tunnel", "enroll"]), st.integers(0, 63), st.integers(1, 255))
def test_a_mutated_proof_is_refused(name, position, flip):
    proof = bytearray(getattr(PROOFS, name))
    proof[position % len(proof)] ^= flip
    bad = replace(PROOFS, **{name: bytes(proof)})
    with pytest.raises(NotVerified):
        check_token(OFFER, bad, TOKEN.public_key)
        check_keys(OFFER, bad, SERVER)


def test_proofs_of_one_kind_are_not_proofs_of_another():
    same = replace(OFFER, enroll_key=TOKEN.public_key)
    proofs = prove(same, TOKEN, TUNNEL, TOKEN.key)
    assert proofs.token != proofs.enroll
    with pytest.raises(NotVerified):
        check_keys(same, replace(proofs, enroll=proofs.token), SERVER)


def test_unusable_keys_are_refused_not_crashed_on():
    with pytest.raises(NotVerified) as e:
        prove(replace(OFFER, server_key=bytes(32)), TOKEN, TUNNEL, ENROLL)
    assert e.value.code == "enroll.tunnel_proof"
    with pytest.raises(NotVerified):
        check_keys(replace(OFFER, tunnel_key=bytes(32)), PROOFS, SERVER)
    with pytest.raises(NotVerified):
        check_token(OFFER, PROOFS, b"short")
    with pytest.raises(NotVerified):
        check_token(OFFER, replace(PROOFS, token=b""), TOKEN.public_key)
