from __future__ import annotations

import os
import stat
from contextlib import suppress

import nacl.bindings
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput, BadState
from identity.keys import (
    b64,
    canonical_x25519,
    ed25519_public,
    load_private,
    private_pem,
    unb64,
    write_file,
    write_secret,
    x25519_public,
)

P = 2**255 - 19


@given(st.binary(max_size=100))
def test_base64_round_trip(data):
    text = b64(data)
    assert unb64(text) == data == unb64(text, length=len(data))
    assert not set(text) & set("+/=")
    with pytest.raises(BadInput):
        unb64(text, length=len(data) + 1)


@given(st.text(max_size=40))
def test_base64_has_one_text_for_each_value(text):
    with suppress(BadInput):
        assert b64(unb64(text)) == text


@pytest.mark.parametrize("text", ["A", "AA=", "AB", "A+==", "AA\n", "A A", "é", "AAAA=", None, b"AA"])
def test_other_base64_is_refused(text):
    with pytest.raises(BadInput):
        unb64(text)


# -- tunnel keys ------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_a_tunnel_key_has_one_canonical_form(seed):
    public = x25519_public(X25519PrivateKey.from_private_bytes(seed))
    assert public == nacl.bindings.crypto_scalarmult_base(seed)
    twin = bytearray(public)
    twin[31] ^= 0x80
    assert canonical_x25519(public) == canonical_x25519(bytes(twin)) == public


@given(st.integers(2, 18))
def test_values_above_the_field_are_reduced(small):
    high = (P + small).to_bytes(32, "little")
    low = small.to_bytes(32, "little")
    assert canonical_x25519(high) == canonical_x25519(low) == low
    scalar = os.urandom(32)
    assert nacl.bindings.crypto_scalarmult(scalar, high) == nacl.bindings.crypto_scalarmult(scalar, low)


# RFC 7748 section 6.1 and the list at cr.yp.to/ecdh.html: points of order 1, 2, 4 and 8.
SMALL_ORDER = [
    0, 1, 325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823, P - 1, P, P + 1,
]  # fmt: skip


@pytest.mark.parametrize("value", SMALL_ORDER)
@pytest.mark.parametrize("top", [0, 1 << 255])
def test_small_order_points_are_refused(value, top):
    with pytest.raises(BadInput) as e:
        canonical_x25519((value | top).to_bytes(32, "little"))
    assert e.value.code == "key.tunnel"


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_tunnel_key_has_32_bytes(size):
    with pytest.raises(BadInput):
        canonical_x25519(b"\x09" * size)


# -- key files --------------------------------------------------------------------------------------------------------

KEYS = [X25519PrivateKey.generate(), Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())]


@pytest.mark.parametrize("key", KEYS, ids=["x25519", "ed25519", "p256"])
def test_keys_are_stored_for_their_owner_only(tmp_path, key):
    path = tmp_path / "k"
    write_secret(path, private_pem(key))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert private_pem(load_private(path)) == private_pem(key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k"]


def test_bad_key_files_are_refused(tmp_path):
    path = tmp_path / "k"

    def code() -> str:
        with pytest.raises(BadState) as e:
            load_private(path)
        assert "PRIVATE" not in str(e.value)
        return e.value.code

    assert code() == "state.key"  # missing
    write_secret(path, b"")
    assert code() == "state.key"
    write_secret(path, private_pem(KEYS[0])[:60])
    assert code() == "state.key"
    write_secret(path, KEYS[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    assert code() == "state.key"
    odd = rsa.generate_private_key(65537, 2048)
    write_secret(path, odd.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert code() == "state.key"
    write_secret(path, private_pem(KEYS[0]))
    path.chmod(0o640)
    assert code() == "state.key_mode"
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    path = tmp_path / "link"
    assert code() == "state.key"


def test_public_halves():
    key = KEYS[1]
    assert ed25519_public(key) == ed25519_public(key.public_key())
    assert len(ed25519_public(key)) == len(x25519_public(KEYS[0])) == 32


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_file(path, b"old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_mode_is_exact_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_file(tmp_path / "f", b"", 0o644)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644
