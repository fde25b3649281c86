from __future__ import annotations

import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from ca.signer import FileSigner, _assemble, _tlv, sign_certificate
from identity import certs
from identity.errors import BadState, Bug
from identity.keys import private_pem, write_secret
from identity.names import SpiffeId, TrustDomain

NOW = 1_800_000_000
TD = TrustDomain("prod.example")
KEYS = [ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()]


def root(signer: FileSigner, **change) -> x509.Certificate:
    key = {"key": signer.public_key, **change}
    builder = certs.build(
        certs.ROOT, trust_domain=TD, spiffe_id=None, issuer=None, serial=1 << 158, now=NOW, **key
    )
    return sign_certificate(builder, signer, certs.ROOT, issuer=None, trust_domain=TD, announce=lambda _: None)


@pytest.mark.parametrize("key", KEYS, ids=["p384", "p256", "ed25519"])
def test_a_key_file_signs_and_never_shows(tmp_path, key):
    made = FileSigner.create(tmp_path / "k", key)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    again = FileSigner.load(tmp_path / "k")
    assert certs.spki(again.public_key) == certs.spki(made.public_key)
    signature = again.sign(b"data")
    if isinstance(key, Ed25519PrivateKey):
        key.public_key().verify(signature, b"data")
    else:
        digest = hashes.SHA384() if key.curve.name == "secp384r1" else hashes.SHA256()
        key.public_key().verify(signature, b"data", ec.ECDSA(digest))
    assert "PRIVATE" not in repr(made)
    assert len(repr(made)) < 60


def test_a_tunnel_key_does_not_sign(tmp_path):
    write_secret(tmp_path / "k", private_pem(X25519PrivateKey.generate()))
    with pytest.raises(BadState) as e:
        FileSigner.load(tmp_path / "k")
    assert e.value.code == "state.key"


def test_a_certificate_is_what_was_linted(tmp_path):
    signer = FileSigner(KEYS[0])
    drafts: list[x509.Certificate] = []
    builder = certs.build(
        certs.ROOT, key=signer.public_key, trust_domain=TD, spiffe_id=None, issuer=None, serial=1 << 158, now=NOW
    )
    cert = sign_certificate(builder, signer, certs.ROOT, issuer=None, trust_domain=TD, announce=drafts.append)
    assert [d.tbs_certificate_bytes for d in drafts] == [cert.tbs_certificate_bytes]
    assert drafts[0].signature != cert.signature
    certs.check_root(cert, TD, NOW)


class Spy:
    """A signer that counts, and can lie."""

    def __init__(self, key, lie: bytes | None = None) -> None:
        self.inner, self.lie, self.signed = FileSigner(key), lie, 0

    @property
    def public_key(self):
        return self.inner.public_key

    def sign(self, data: bytes, /) -> bytes:
        self.signed += 1
        return self.inner.sign(data if self.lie is None else self.lie)


def test_a_broken_profile_is_never_signed():
    spy = Spy(KEYS[0])
    builder = certs.build(
        certs.ROOT, key=spy.public_key, trust_domain=TD, spiffe_id=None, issuer=None, serial=5, now=NOW
    )
    with pytest.raises(Bug) as e:
        sign_certificate(builder, spy, certs.ROOT, issuer=None, trust_domain=TD, announce=lambda _: None)
    assert (e.value.code, spy.signed) == ("cert.lint", 0)


def test_without_a_stored_serial_nothing_is_signed():
    spy = Spy(KEYS[0])

    def full(_: x509.Certificate) -> None:
        raise OSError("disk full")

    builder = certs.build(
        certs.ROOT, key=spy.public_key, trust_domain=TD, spiffe_id=None, issuer=None, serial=1 << 158, now=NOW
    )
    with pytest.raises(OSError, match="disk full"):
        sign_certificate(builder, spy, certs.ROOT, issuer=None, trust_domain=TD, announce=full)
    assert spy.signed == 0


def test_a_signature_that_does_not_hold_is_not_issued():
    with pytest.raises(Bug) as e:
        root(Spy(KEYS[0], lie=b"something else"))
    assert e.value.code == "cert.signature"
    with pytest.raises(Bug) as e:  # the signer's key is not the key in the root
        root(FileSigner(KEYS[0]), key=ec.generate_private_key(ec.SECP384R1()).public_key())
    assert e.value.code == "cert.signature"


def test_records_keys_do_not_sign_certificates():
    with pytest.raises(Bug) as e:
        root(FileSigner(KEYS[2]), key=KEYS[0].public_key())
    assert e.value.code == "cert.signer"


@pytest.mark.parametrize("size", [0, 127, 128, 255, 256, 70_000])
def test_lengths_are_der(size):
    encoded = _tlv(4, b"x" * size)
    asn1 = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), encoded)
    assert asn1.value.endswith(b"x" * size)
    length = encoded[1]
    if length & 0x80:
        count = length & 0x7F
        assert encoded[2] != 0, "no leading zero"
        assert int.from_bytes(encoded[2 : 2 + count], "big") == size
    else:
        assert length == size < 128


def test_assembling_gives_back_the_same_certificate():
    for key in KEYS[:2]:
        cert = root(FileSigner(key))
        der = cert.public_bytes(Encoding.DER)
        assert _assemble(cert.tbs_certificate_bytes, der, cert.signature) == der


def test_leaves_of_a_p256_issuer():
    anchor = FileSigner(KEYS[0])
    top = root(anchor)
    online = FileSigner(KEYS[1])
    builder = certs.build(
        certs.INTERMEDIATE, key=online.public_key, trust_domain=TD, spiffe_id=None, issuer=top, serial=(1 << 158) + 1, now=NOW
    )
    mid = sign_certificate(builder, anchor, certs.INTERMEDIATE, issuer=top, trust_domain=TD, announce=lambda _: None)
    leaf = certs.build(
        certs.ENDPOINT, key=KEYS[2].public_key(), trust_domain=TD, spiffe_id=SpiffeId.endpoint(TD, "a"), issuer=mid,
        serial=(1 << 158) + 2, now=NOW,
    )  # fmt: skip
    cert = sign_certificate(leaf, online, certs.ENDPOINT, issuer=mid, trust_domain=TD, announce=lambda _: None)
    assert certs.verify_chain([cert, mid], [top], TD, NOW).spiffe_id.name == "a"
