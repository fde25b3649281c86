"""Support bundles: secrets go by their form; a known one that would remain stops everything."""

from __future__ import annotations

import base64
import io
import tarfile

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st

from identity.enrollment import JoinToken
from identity.errors import BadState
from identity.keys import private_pem
from identity.support import GONE, Redactor, pack, secrets_in

SECRET = bytes(range(100, 132))


@pytest.fixture
def keys() -> dict[str, bytes]:
    """File name -> PEM."""
    return {
        "tls.key": private_pem(ec.generate_private_key(ec.SECP256R1())), "tunnel.key": private_pem(X25519PrivateKey.generate()),
        "sub/enroll.key": private_pem(Ed25519PrivateKey.generate()),
    }  # fmt: skip


def members(data: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: (archive.extractfile(m) or io.BytesIO()).read().decode() for m in archive.getmembers()}


@pytest.mark.parametrize(
    ("said", "gone"),
    [
        (private_pem(X25519PrivateKey.generate()).decode() + "after", "MC4C"),
        ("-----BEGIN PRIVATE KEY-----\nMC4CAQ cut off", "MC4C"),
        (JoinToken("id-1", SECRET, "a" * 64).format(), base64.urlsafe_b64encode(SECRET).decode().rstrip("=")),
        ("GET /x Authorization: Bearer abcdefgh", "abcdefgh"),
        ("postgresql://ca:hunter2@db/x", "hunter2"),
        ("private_key=" + SECRET.hex(), SECRET.hex()),
        ('{"preshared_key": "' + SECRET.hex() + '", "other": 1}', SECRET.hex()),
        ("PrivateKey = " + base64.b64encode(SECRET).decode(), base64.b64encode(SECRET).decode()),
        ("RETINUE_TOKEN=swordfish HOME=/root", "swordfish"),
        ("db_password: 'open sesame'", "sesame"),
        ("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl", "c2lnbmF0dXJl"),
    ],
)
def test_what_is_secret_by_its_form_goes(said: str, gone: str) -> None:
    out = Redactor().text(f"before {said} after")
    assert gone not in out
    assert GONE in out
    assert out.startswith("before ")


@given(st.text(alphabet=st.characters(blacklist_characters="=:@"), max_size=60))
def test_what_is_no_secret_stays(said: str) -> None:
    if not any(word in said.lower() for word in ("rt1.", "eyj", "-----")):
        assert Redactor().text(said) == said


@given(before=st.binary(max_size=7), after=st.binary(max_size=7))
def test_a_known_secret_is_found_in_every_notation(before: bytes, after: bytes) -> None:
    redactor, whole = Redactor([SECRET]), before + SECRET + after
    for shown in (whole, whole.hex().encode(), whole.hex().upper().encode(), base64.b64encode(whole), base64.urlsafe_b64encode(whole)):
        assert redactor.holds(b"text " + shown + b" text")
    assert not redactor.holds(base64.b64encode(whole[: len(before) + 20]))
    assert not Redactor([b"short"]).holds(b"short")


def test_key_files_are_known(keys: dict[str, bytes]) -> None:
    redactor = Redactor(secret for data in keys.values() for secret in secrets_in(data))
    for data in keys.values():
        assert redactor.holds(data)
        assert redactor.holds(data.splitlines()[1])
        key = load_pem_private_key(data, None).public_key()
        assert not redactor.holds(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert not redactor.holds(b"root:x:0:0:root:/root:/bin/bash")


def test_a_secret_that_remains_stops_it(keys: dict[str, bytes]) -> None:
    redactor = Redactor(secret for data in keys.values() for secret in secrets_in(data))
    fine = members(pack({"a.txt": keys["tls.key"].decode(), "b.txt": "x"}, redactor, now=5))
    assert fine == {"retinue-support/a.txt": f"{GONE}\n", "retinue-support/b.txt": "x"}
    bare = keys["tunnel.key"].splitlines()[1].decode()  # a form that no pattern knows
    for bad in ({"a": f"shown as {bare}"}, {bare: "in the name"}):
        with pytest.raises(BadState) as e:
            pack(bad, redactor, now=5)
        assert e.value.code == "support.secret"
        assert bare not in str(e.value) + e.value.message + e.value.hint
