"""Certificate requests that ask for more than they get: only a key is ever taken, and the profile is all that is given."""

from __future__ import annotations

import base64
import ipaddress
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ca.authority import Authority
from ca.enroll import JoinTokenAttestor, admit
from identity import certs
from identity.errors import BadInput, RetinueError
from identity.names import SpiffeId, TrustDomain
from tests.unit.ca.test_enroll import CHALLENGE, ROW
from tests.unit.ca.test_enroll import NOW as ENROL_NOW
from tests.unit.ca.test_enroll import request as enrol_request

NOW = 1_800_000_000
TD = TrustDomain("prod.example")
HOST = SpiffeId.endpoint(TD, "web-1")
SHOP = SpiffeId.workload(TD, "shop/api")
ADDRESS = ipaddress.ip_address("100.64.0.7")

GOOD: dict[str, Any] = {"P-256": ec.generate_private_key(ec.SECP256R1()), "Ed25519": ed25519.Ed25519PrivateKey.generate()}
KEYS: dict[str, Any] = GOOD | {
    "P-384": ec.generate_private_key(ec.SECP384R1()), "P-521": ec.generate_private_key(ec.SECP521R1()),
    "secp256k1": ec.generate_private_key(ec.SECP256K1()), "brainpool": ec.generate_private_key(ec.BrainpoolP256R1()),
    "RSA": rsa.generate_private_key(65537, 2048), "DSA": dsa.generate_private_key(1024), "Ed448": ed448.Ed448PrivateKey.generate(),
}  # fmt: skip


def usage(**bits: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
             "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{n: bits.get(n, False) for n in names})


def names(*uris: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([*(x509.UniformResourceIdentifier(u) for u in uris), x509.DNSName("a.example")])


WISHES: list[x509.ExtensionType] = [
    x509.BasicConstraints(True, None), x509.BasicConstraints(True, 9), usage(key_cert_sign=True, crl_sign=True),
    usage(key_agreement=True, decipher_only=True), names("spiffe://prod.example/cp/ca"), names("spiffe://prod.example/admin/root", str(SHOP)),
    names("spiffe://other.example/x"), x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("100.64.0.1"))]),
    x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
    x509.NameConstraints([x509.DNSName("a")], None), x509.SubjectKeyIdentifier(b"1" * 20), x509.OCSPNoCheck(), x509.PrecertPoison(),
    x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.7"), b"\x05\x00"),
    x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.19"), b"garbage"),
]  # fmt: skip


@st.composite
def requests(draw: st.DrawFn, keys: list[str]) -> tuple[Any, bytes]:
    """(private key, DER): signed by its key, with any wishes in it."""
    key = KEYS[draw(st.sampled_from(keys))]
    common = draw(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), max_size=21))  # 64 bytes at most (RFC 5280, A.1)
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    for wish in draw(st.lists(st.sampled_from(WISHES), max_size=5, unique_by=lambda w: w.oid)):
        builder = builder.add_extension(wish, critical=draw(st.booleans()))
    if draw(st.booleans()):
        builder = builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, draw(st.text(st.characters(codec="ascii"), min_size=1, max_size=30)).encode())
    edwards = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    digest = None if edwards else draw(st.sampled_from([hashes.SHA256(), hashes.SHA384(), hashes.SHA512()]))
    return key, builder.sign(key, digest).public_bytes(Encoding.DER)


def pem(der: bytes, kind: str = "CERTIFICATE REQUEST") -> str:
    return f"-----BEGIN {kind}-----\n{base64.encodebytes(der).decode()}-----END {kind}-----\n"


def spki(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "dir", TD, NOW)


def described(cert: x509.Certificate) -> dict[str, Any]:
    """All that a certificate says, but for its key, its serial number and its signature."""
    own = {x509.SubjectKeyIdentifier.oid}
    return {
        "subject": cert.subject, "issuer": cert.issuer, "from": cert.not_valid_before_utc, "until": cert.not_valid_after_utc,
        "version": cert.version, "extensions": [(e.oid, e.critical, e.value) for e in cert.extensions if e.oid not in own],
    }  # fmt: skip


def issued(authority: Authority, text: str, spiffe_id: SpiffeId) -> x509.Certificate:
    if spiffe_id.kind == "host":
        return certs.parse_chain(authority.issue_endpoint(text, spiffe_id, NOW))[0]
    if spiffe_id.kind == "admin":
        return certs.parse_chain(authority.issue_admin(text, spiffe_id, NOW))[0]
    return certs.parse_chain(authority.issue_workload(text, spiffe_id, [ADDRESS], NOW))[0]


WHO = [(HOST, certs.ENDPOINT), (SHOP, certs.WORKLOAD), (SpiffeId(TD, ("admin", "alice")), certs.ADMIN)]


@settings(max_examples=120, deadline=None)
@given(made=requests(list(GOOD)), who=st.sampled_from(WHO))
def test_the_certificate_is_the_profile_whatever_is_wished(authority: Authority, made: tuple[Any, bytes], who: Any) -> None:
    key, der = made
    spiffe_id, profile = who
    leaf = issued(authority, pem(der), spiffe_id)
    assert certs.spki(leaf.public_key()) == spki(key)  # type: ignore[arg-type]  # of a leaf's kinds
    plain = issued(authority, certs.make_csr(GOOD["P-256"]), spiffe_id)
    assert described(leaf) == described(plain)
    certs.lint(leaf, profile, issuer=authority.intermediate, trust_domain=TD)
    assert certs.verify_chain([leaf, authority.intermediate], authority.roots, TD, NOW).spiffe_id == spiffe_id


@settings(max_examples=60, deadline=None)
@given(made=requests([k for k in KEYS if k not in GOOD]))
def test_other_kinds_of_key_are_refused(authority: Authority, made: tuple[Any, bytes]) -> None:
    with pytest.raises(BadInput) as refused:
        issued(authority, pem(made[1]), HOST)
    assert refused.value.code in {"csr.key", "csr.large"}


def element(der: bytes, at: int) -> tuple[int, int]:
    """(start, end) of the value of the DER element at `at`."""
    size, start = der[at + 1], at + 2
    if size & 0x80:
        count = size & 0x7F
        size, start = int.from_bytes(der[start : start + count], "big"), start + count
    return start, start + size


def split(der: bytes) -> tuple[bytes, bytes, bytes]:
    """The three parts of a request: what is signed, the algorithm, the signature."""
    at, parts = element(der, 0)[0], []
    for _ in range(3):
        end = element(der, at)[1]
        parts.append(der[at:end])
        at = end
    return parts[0], parts[1], parts[2]


def joined(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return b"\x30\x82" + len(body).to_bytes(2, "big") + body


@settings(max_examples=60, deadline=None)
@given(one=requests(["P-256"]), other=requests(list(KEYS)))
def test_the_signature_of_another_request_is_none(one: tuple[Any, bytes], other: tuple[Any, bytes]) -> None:
    asked, signed = split(one[1]), split(other[1])
    if asked[0] == signed[0]:
        return
    for algorithm in (asked[1], signed[1]):
        with pytest.raises(BadInput) as refused:
            certs.csr_key(pem(joined(asked[0], algorithm, signed[2])))
        assert refused.value.code in {"csr.signature", "csr.syntax"}


@st.composite
def mutations(draw: st.DrawFn) -> tuple[Any, bytes, bytes]:
    """(key, DER, the same with bytes changed, cut, doubled, put in, or lengths made huge)."""
    key, der = draw(requests(list(GOOD)))
    bad = bytearray(der)
    for _ in range(draw(st.integers(1, 4))):
        at = len(bad) * draw(st.integers(0, 9_999)) // 10_000  # an ECDSA signature is not always as long
        kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "length", "tail", "end"]))
        if kind == "flip" and bad:
            bad[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del bad[at : at + draw(st.integers(1, 40))]
        elif kind == "double":
            bad[at:at] = bad[at : at + draw(st.integers(1, 60))]
        elif kind == "insert":
            bad[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif kind == "length":
            bad[at : at + 1] = b"\x84\xff\xff\xff\xff"
        elif kind == "tail":
            bad += draw(st.binary(min_size=1, max_size=20))
        else:
            del bad[at:]
    return key, der, bytes(bad)


@settings(max_examples=400, deadline=None)
@given(made=mutations())
def test_a_mutated_request_is_refused_or_gives_the_same_key(made: tuple[Any, bytes, bytes]) -> None:
    key, der, bad = made
    if bad == der:
        assert certs.spki(certs.csr_key(pem(bad))) == spki(key)
        return
    with pytest.raises(BadInput) as refused:
        certs.csr_key(pem(bad))
    assert refused.value.code in {"csr.syntax", "csr.key", "csr.signature", "csr.large"}


def test_every_byte_of_a_request_counts() -> None:
    der = split(x509.load_pem_x509_csr(certs.make_csr(GOOD["P-256"]).encode()).public_bytes(Encoding.DER))
    signature = bytearray(der[2])
    while signature[-1] & 1:
        der = split(x509.load_pem_x509_csr(certs.make_csr(GOOD["P-256"]).encode()).public_bytes(Encoding.DER))
        signature = bytearray(der[2])
    signature[2] = 1  # "its last bit is not used", which the library does not mind
    with pytest.raises(BadInput):
        certs.csr_key(pem(joined(der[0], der[1], bytes(signature))))


@given(text=st.one_of(st.text(max_size=300), st.binary(max_size=300).map(pem), st.binary(max_size=60).map(lambda b: pem(b, "CERTIFICATE")),
                      st.binary(min_size=7000, max_size=9000).map(pem)))  # fmt: skip
@example(text=pem(b"\x30" * 6000))
@example(text=pem(b"\x30\x80" * 2000))
@example(text="-----BEGIN CERTIFICATE REQUEST-----\n" * 100)
@example(text=certs.make_csr(GOOD["P-256"]) * 20)
def test_junk_is_refused(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        certs.csr_key(text)
    assert refused.value.code.startswith("csr.")


@settings(max_examples=80, deadline=None)
@given(made=mutations(), change=st.booleans())
def test_enrolment_takes_a_key_or_refuses(made: tuple[Any, bytes, bytes], change: bool) -> None:
    """The proofs are honest and bind the request, so that it is the request alone that is judged."""
    key, der, bad = made
    asked = enrol_request(CHALLENGE, csr=pem(bad if change else der))
    if change and bad != der:
        with pytest.raises(RetinueError) as refused:
            admit(asked, CHALLENGE, JoinTokenAttestor(ROW), ENROL_NOW)
        assert refused.value.code.startswith("csr.")
        return
    admitted = admit(asked, CHALLENGE, JoinTokenAttestor(ROW), ENROL_NOW)
    assert certs.spki(admitted.public_key) == spki(key)
    assert (admitted.endpoint, admitted.kind, admitted.workload) == ("web-1", "host", None)
