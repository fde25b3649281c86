from __future__ import annotations

import ipaddress
import shutil
import subprocess
import warnings

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from identity import certs
from identity.errors import BadInput, Bug, NotVerified
from identity.names import SpiffeId, TrustDomain

DAY = 86400
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
URI = x509.UniformResourceIdentifier


def p256():
    return ec.generate_private_key(ec.SECP256R1())


def san(*uris: str, critical: bool = True):
    return x509.SubjectAlternativeName([URI(u) for u in uris])


def usage(*bits: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{
        name: name in bits
        for name in (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        )
    })  # fmt: skip


# -- the profile ------------------------------------------------------------------------------------------------------


def test_a_leaf_by_the_profile_verifies(forge):
    pair = forge.leaf()
    svid = forge.verify(pair.cert)
    assert str(svid.spiffe_id) == "spiffe://prod.example/host/web-1"
    assert svid.leaf == pair.cert
    assert svid.serial == pair.cert.serial_number
    assert certs.spki(svid.public_key) == certs.spki(pair.key.public_key())
    assert (svid.not_before, svid.not_after) == (forge.now - certs.BACKDATE, forge.now + certs.ENDPOINT_LIFETIME)
    assert svid.chain == (pair.cert, forge.intermediate.cert, forge.root.cert)


def test_the_profile_is_what_the_reference_says(forge):
    root, intermediate, leaf = forge.root.cert, forge.intermediate.cert, forge.leaf().cert
    assert isinstance(root.public_key().curve, ec.SECP384R1)
    assert isinstance(intermediate.public_key().curve, ec.SECP256R1)
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 1
    assert intermediate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert not list(leaf.subject)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert len(list(names.value)) == 1
    used = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert used.critical
    assert used.value.digital_signature
    assert not used.value.key_cert_sign
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        Usage.SERVER_AUTH, Usage.CLIENT_AUTH
    }  # fmt: skip
    assert [e.oid for e in leaf.extensions if e.oid.dotted_string in {"2.5.29.31", "1.3.6.1.5.5.7.1.1"}] == []


def test_a_workload_carries_its_addresses_and_every_profile_lints(forge):
    key = p256()
    addresses = [ipaddress.ip_address("100.64.0.7"), ipaddress.ip_address("fd00::7")]
    builder = certs.build(
        certs.WORKLOAD, key=key.public_key(), trust_domain=forge.trust_domain,
        spiffe_id=SpiffeId.workload(forge.trust_domain, "shop/api"), issuer=forge.intermediate.cert,
        serial=forge.serial(), now=forge.now, addresses=addresses,
    )  # fmt: skip
    cert = forge.sign(builder, forge.intermediate.key)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == addresses
    certs.lint(cert, certs.WORKLOAD, issuer=forge.intermediate.cert, trust_domain=forge.trust_domain)
    certs.lint(forge.root.cert, certs.ROOT, issuer=None, trust_domain=forge.trust_domain)
    certs.lint(forge.intermediate.cert, certs.INTERMEDIATE, issuer=forge.root.cert, trust_domain=forge.trust_domain)
    signer = forge.leaf("spiffe://prod.example/cp/records", profile=certs.SIGNER, key=Ed25519PrivateKey.generate())
    certs.lint(signer.cert, certs.SIGNER, issuer=forge.intermediate.cert, trust_domain=forge.trust_domain)
    assert forge.verify(signer.cert, profile=certs.SIGNER).spiffe_id.name == "records"


def test_a_leaf_never_leaves_the_lifetime_of_its_issuer(forge):
    late = certs.not_after(forge.intermediate.cert) - 60
    pair = forge.leaf(now=late)
    assert certs.not_after(pair.cert) == certs.not_after(forge.intermediate.cert)
    early = forge.leaf(now=forge.now - 30)
    assert certs.not_before(early.cert) == certs.not_before(forge.intermediate.cert)


def test_a_life_begins_before_its_making_but_not_before_a_revocation(forge):
    for earliest, start in ((0, forge.now - certs.BACKDATE), (forge.now - 5, forge.now - 5), (forge.now + 5, forge.now)):
        name = SpiffeId.endpoint(forge.trust_domain, "web-1")
        made = certs.build(
            certs.ENDPOINT, key=ec.generate_private_key(ec.SECP256R1()).public_key(), trust_domain=forge.trust_domain, spiffe_id=name,
            issuer=None, serial=1 << 158, now=forge.now, earliest=earliest,
        ).sign(forge.root.key, hashes.SHA256())  # fmt: skip
        assert certs.not_before(made) == start


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        (certs.ENDPOINT, None),
        (certs.ROOT, "spiffe://prod.example/host/a"),
        (certs.ENDPOINT, "spiffe://prod.example/wl/a"),
        (certs.WORKLOAD, "spiffe://prod.example/host/a"),
        (certs.ENDPOINT, "spiffe://other.example/host/a"),
    ],
)
def test_a_name_must_belong_to_the_profile(forge, profile, name):
    with pytest.raises(Bug) as e:
        forge.builder(profile, p256(), forge.intermediate, name)
    assert e.value.code == "cert.profile"


def test_ed25519_leaves_are_accepted(forge):
    assert forge.verify(forge.leaf(key=Ed25519PrivateKey.generate()).cert)


def test_renewal_is_due_around_half_of_the_life(forge):
    svid = forge.verify(forge.leaf().cert)
    life = svid.not_after - svid.not_before
    assert certs.renew_at(svid, 0) == svid.not_before + life // 2
    assert certs.renew_at(svid, -1) == svid.not_before + int(life * 0.4)
    assert certs.renew_at(svid, 7) == svid.not_before + int(life * 0.6)


# -- bad certificates: each with its reason ---------------------------------------------------------------------------

ID = "spiffe://prod.example/host/web-1"
LEAVES = {
    "two URIs": ("cert.san", lambda b, swap, live: swap(b, san(ID, "spiffe://prod.example/host/b"), x509.SubjectAlternativeName)),
    "no URI": ("cert.san", lambda b, swap, live: swap(b, x509.SubjectAlternativeName([x509.DNSName("a")]), x509.SubjectAlternativeName)),
    "no SAN": ("cert.san", lambda b, swap, live: swap(b, None, x509.SubjectAlternativeName)),
    "SAN not critical": ("cert.san", lambda b, swap, live: swap(b, san(ID), x509.SubjectAlternativeName, False)),
    "no EKU": ("cert.extended_key_usage", lambda b, swap, live: swap(b, None, x509.ExtendedKeyUsage)),
    "server only": ("cert.extended_key_usage", lambda b, swap, live: swap(b, x509.ExtendedKeyUsage([Usage.SERVER_AUTH]), x509.ExtendedKeyUsage, False)),
    "any EKU": ("cert.extended_key_usage", lambda b, swap, live: swap(b, x509.ExtendedKeyUsage([Usage.ANY_EXTENDED_KEY_USAGE]), x509.ExtendedKeyUsage, False)),
    "CA:TRUE": ("cert.leaf_is_ca", lambda b, swap, live: swap(b, x509.BasicConstraints(True, None), x509.BasicConstraints)),
    "keyCertSign": ("cert.key_usage", lambda b, swap, live: swap(b, usage("digital_signature", "key_cert_sign"), x509.KeyUsage)),
    "cRLSign": ("cert.key_usage", lambda b, swap, live: swap(b, usage("digital_signature", "crl_sign"), x509.KeyUsage)),
    "no digitalSignature": ("cert.key_usage", lambda b, swap, live: swap(b, usage("key_agreement"), x509.KeyUsage)),
    "no KU": ("cert.key_usage", lambda b, swap, live: swap(b, None, x509.KeyUsage)),
    "KU not critical": ("cert.key_usage", lambda b, swap, live: swap(b, usage("digital_signature"), x509.KeyUsage, False)),
    "expired": ("cert.expired", lambda b, swap, live: live(b, 1_800_000_000 - 50, 1_800_000_000 - 1)),
    "not yet valid": ("cert.not_yet_valid", lambda b, swap, live: live(b, 1_800_000_000 + 61, 1_800_000_000 + 90)),
    "outlives its issuer": ("cert.outlives_issuer", lambda b, swap, live: live(b, 1_800_000_000, 1_800_000_000 + 91 * DAY)),
    "predates its issuer": ("cert.predates_issuer", lambda b, swap, live: live(b, 1_800_000_000 - 3600, 1_800_000_000 + 60)),
    "name constraints": ("cert.name_constraints", lambda b, swap, live: swap(b, x509.NameConstraints([URI("prod.example")], None), x509.NameConstraints)),
    "unknown critical": ("cert.critical", lambda b, swap, live: swap(b, x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.7"), b"\5\0"), x509.UnrecognizedExtension)),
}  # fmt: skip


@pytest.mark.parametrize("case", LEAVES)
def test_a_bad_leaf_is_refused_with_its_reason(forge, swap, live, case):
    code, change = LEAVES[case]
    cert = forge.leaf(change=lambda b: change(b, swap, live)).cert
    with pytest.raises(NotVerified) as e:
        forge.verify(cert)
    assert e.value.code == code


@pytest.mark.parametrize("case", sorted(LEAVES.keys() - {"expired", "not yet valid"}))  # those are the clock's matter
def test_the_linter_stops_what_the_verifier_would_refuse(forge, swap, live, case):
    cert = forge.leaf(change=lambda b: LEAVES[case][1](b, swap, live)).cert
    with pytest.raises(Bug) as e:
        certs.lint(cert, certs.ENDPOINT, issuer=forge.intermediate.cert, trust_domain=forge.trust_domain)
    assert e.value.code == "cert.lint"


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("spiffe://prod.example/host/%41", "cert.spiffe_id"),
        ("spiffe://prod.example/host/../x", "cert.spiffe_id"),
        ("spiffe://prod.example/./host", "cert.spiffe_id"),
        ("spiffe://Prod.example/host/a", "cert.spiffe_id"),
        ("SPIFFE://prod.example/host/a", "cert.spiffe_id"),
        ("spiffe://prod.example/host/a/", "cert.spiffe_id"),
        ("spiffe://prod.example//host", "cert.spiffe_id"),
        ("spiffe://prod.example", "cert.spiffe_id"),
        ("spiffe://prod.example/", "cert.spiffe_id"),
        ("spiffe://prod.example:8/host", "cert.spiffe_id"),
        ("spiffe://u@prod.example/host", "cert.spiffe_id"),
        ("spiffe://prod.example/host?q", "cert.spiffe_id"),
        ("spiffe://prod.example/host#f", "cert.spiffe_id"),
        ("https://prod.example/host/a", "cert.spiffe_id"),
        ("spiffe://prod.example/" + "a" * 2048, "cert.spiffe_id"),
        ("spiffe://" + "a" * 256 + "/host", "cert.spiffe_id"),
        ("spiffe://other.example/host/web-1", "cert.trust_domain"),
        ("spiffe://prod.example.evil/host/web-1", "cert.trust_domain"),
    ],
)
def test_a_bad_name_is_refused(forge, swap, uri, code):
    cert = forge.leaf(change=lambda b: swap(b, san(uri), x509.SubjectAlternativeName)).cert
    with pytest.raises(NotVerified) as e:
        forge.verify(cert)
    assert e.value.code == code
    with pytest.raises(NotVerified if code == "cert.spiffe_id" else AssertionError):
        certs.claimed_id(cert)
        raise AssertionError


def test_claimed_id_wants_one_name(forge, swap):
    cert = forge.leaf(change=lambda b: swap(b, san(ID, ID + "x"), x509.SubjectAlternativeName)).cert
    with pytest.raises(NotVerified, match="exactly one"):
        certs.claimed_id(cert)


AUTHORITIES = {
    "path in the name": ("cert.ca_name", lambda b, swap: swap(b, san("spiffe://prod.example/ca"), x509.SubjectAlternativeName, False)),
    "other trust domain": ("cert.ca_name", lambda b, swap: swap(b, san("spiffe://other.example"), x509.SubjectAlternativeName, False)),
    "two names": ("cert.ca_name", lambda b, swap: swap(b, san("spiffe://prod.example", "spiffe://b.example"), x509.SubjectAlternativeName, False)),
    "not an authority": ("cert.not_ca", lambda b, swap: swap(b, x509.BasicConstraints(False, None), x509.BasicConstraints)),
    "no basic constraints": ("cert.not_ca", lambda b, swap: swap(b, None, x509.BasicConstraints)),
    "no keyCertSign": ("cert.ca_key_usage", lambda b, swap: swap(b, usage("crl_sign"), x509.KeyUsage)),
    "more key usage": ("cert.ca_key_usage", lambda b, swap: swap(b, usage("key_cert_sign", "key_agreement"), x509.KeyUsage)),
    "name constraints": ("cert.name_constraints", lambda b, swap: swap(b, x509.NameConstraints([URI("prod.example")], None), x509.NameConstraints)),
}  # fmt: skip


@pytest.mark.parametrize("case", AUTHORITIES)
def test_a_bad_intermediate_is_refused_with_its_reason(forge, swap, case):
    code, change = AUTHORITIES[case]
    key = p256()
    builder = change(forge.builder(certs.INTERMEDIATE, key, forge.root), swap)
    bad = type(forge.root)(forge.sign(builder, forge.root.key), key)
    leaf = forge.leaf(issuer=bad).cert
    with pytest.raises(NotVerified) as e:
        forge.verify(leaf, bad.cert)
    assert e.value.code == code


def test_an_authority_without_a_name_is_accepted(forge, swap):
    key = p256()
    builder = swap(forge.builder(certs.INTERMEDIATE, key, forge.root), None, x509.SubjectAlternativeName)
    bare = type(forge.root)(forge.sign(builder, forge.root.key), key)
    assert forge.verify(forge.leaf(issuer=bare).cert, bare.cert)


def test_an_ed25519_root_is_refused(forge):
    root = forge.authority(certs.ROOT, Ed25519PrivateKey.generate(), None)
    leaf = forge.leaf(issuer=root).cert
    with pytest.raises(NotVerified) as e:
        forge.verify(leaf, root.cert, roots=[root.cert])
    assert e.value.code == "cert.ca_key"


def test_a_path_longer_than_allowed_is_refused(forge):
    second = forge.authority(certs.INTERMEDIATE, p256(), forge.intermediate)
    with pytest.raises(NotVerified) as e:
        forge.verify(forge.leaf(issuer=second).cert, second.cert, forge.intermediate.cert)
    assert e.value.code == "cert.untrusted"


def test_a_chain_of_another_root_is_refused_even_with_the_same_names(forge):
    other = type(forge)()
    with pytest.raises(NotVerified) as e:
        other.verify(forge.leaf().cert, forge.intermediate.cert)
    assert e.value.code == "cert.untrusted"


def test_a_root_sent_along_is_not_trusted_for_that(forge):
    other = type(forge)()
    with pytest.raises(NotVerified) as e:
        forge.verify(other.leaf().cert, other.intermediate.cert, other.root.cert)
    assert e.value.code == "cert.untrusted"


def test_another_trust_domains_root_in_the_store_is_refused(forge):
    foreign = type(forge)(trust_domain=TrustDomain("other.example"))
    with pytest.raises(NotVerified) as e:
        forge.verify(forge.leaf().cert, roots=[forge.root.cert, foreign.root.cert])
    assert e.value.code == "cert.ca_name"


def test_rsa_and_other_curves_are_refused(forge):
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        with pytest.raises(NotVerified) as e:
            forge.verify(forge.leaf(key=key).cert)
        assert e.value.code == "cert.key"


def test_record_signers_and_tls_leaves_are_not_interchangeable(forge):
    signer = forge.leaf("spiffe://prod.example/cp/records", profile=certs.SIGNER, key=Ed25519PrivateKey.generate()).cert
    with pytest.raises(NotVerified) as e:
        forge.verify(signer)
    assert e.value.code == "cert.extended_key_usage"
    with pytest.raises(NotVerified) as e:
        forge.verify(forge.leaf().cert, profile=certs.SIGNER)
    assert e.value.code == "cert.extended_key_usage"
    with pytest.raises(NotVerified) as e:
        forge.verify(forge.leaf("spiffe://prod.example/cp/records", profile=certs.SIGNER).cert, profile=certs.SIGNER)
    assert e.value.code == "cert.key"


def test_an_expired_intermediate_or_root_is_refused(forge):
    leaf = forge.leaf()
    after = certs.not_after(forge.intermediate.cert) + 1
    for now in (after, certs.not_before(forge.root.cert) - 1):
        with pytest.raises(NotVerified):
            forge.verify(leaf.cert, now=now)
    with pytest.raises(NotVerified) as e:
        certs.check_root(forge.root.cert, forge.trust_domain, certs.not_after(forge.root.cert) + 1)
    assert e.value.code == "cert.expired"


def test_a_root_must_sign_itself(forge):
    certs.check_root(forge.root.cert, forge.trust_domain, forge.now)
    with pytest.raises(NotVerified) as e:
        certs.check_root(forge.intermediate.cert, forge.trust_domain, forge.now)
    assert e.value.code == "cert.not_root"


def test_a_serial_number_must_be_positive(forge):
    der = bytearray(forge.leaf().cert.public_bytes(Encoding.DER))
    at = der.index(b"\x02\x14") + 2
    der[at] |= 0x80
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed = certs.parse_der_chain([bytes(der)])
        with pytest.raises(NotVerified) as e:
            forge.verify(*parsed)
        assert e.value.code == "cert.serial"
    with pytest.raises(NotVerified) as e:
        certs.parse_der_chain([bytes(der)])
    assert e.value.code == "chain.syntax"


def test_a_field_that_cannot_be_read_is_refused_wherever_it_is(forge):
    der = bytearray(forge.intermediate.cert.public_bytes(Encoding.DER))
    der[der.rindex(b"retinue intermediate")] = 0xFF  # no UTF-8: read only when the subject is asked for
    parsed = certs.parse_der_chain([bytes(der)])
    with pytest.raises(NotVerified) as e:
        forge.verify(forge.leaf().cert, *parsed)
    assert e.value.code == "cert.syntax"


def test_a_signature_of_odd_bits_is_refused(forge):
    refused = 0
    for _ in range(20):  # the last bit must be zero for the library to let it pass
        der = bytearray(forge.leaf().cert.public_bytes(Encoding.DER))
        signature = x509.load_der_x509_certificate(bytes(der)).signature
        if signature[-1] & 1:
            continue
        der[-len(signature) - 1] = 1
        with pytest.raises(NotVerified) as e:
            forge.verify(x509.load_der_x509_certificate(bytes(der)))
        assert e.value.code == "cert.syntax"
        refused += 1
    assert refused


def test_no_chain_no_root_and_long_chains(forge):
    leaf = forge.leaf().cert
    for chain, roots, code in (
        ([], [forge.root.cert], "chain.empty"),
        ([leaf] * 5, [forge.root.cert], "chain.long"),
        ([leaf], [], "chain.no_root"),
    ):
        with pytest.raises(NotVerified) as e:
            certs.verify_chain(chain, roots, forge.trust_domain, forge.now)
        assert e.value.code == code


# -- lint rules the verifier does not have ----------------------------------------------------------------------------


def test_lint_knows_more_than_the_verifier(forge, swap, live):
    def findings(change, profile=certs.ENDPOINT, issuer=None, **leaf) -> str:
        cert = forge.leaf(change=change, **leaf).cert
        with pytest.raises(Bug) as e:
            certs.lint(cert, profile, issuer=issuer or forge.intermediate.cert, trust_domain=forge.trust_domain)
        return e.value.message

    assert "serial number" in findings(lambda b: setattr(b, "_serial_number", 7) or b)
    assert "subject name" in findings(
        lambda b: setattr(b, "_subject_name", x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])) or b
    )
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    assert "SAN of an empty subject" in findings(
        lambda b: setattr(b2 := swap(b, san(ID), x509.SubjectAlternativeName, False), "_subject_name", named) or b2
    )
    assert "extensions differ" in findings(
        lambda b: b.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\5\0"), False)
    )
    assert "subject key identifier" in findings(
        lambda b: swap(b, x509.SubjectKeyIdentifier(b"x" * 20), x509.SubjectKeyIdentifier, False)
    )
    assert "authority key identifier" in findings(
        lambda b: swap(b, x509.AuthorityKeyIdentifier(b"x" * 20, None, None), x509.AuthorityKeyIdentifier, False)
    )
    assert "longer than the profile" in findings(lambda b: live(b, forge.now, forge.now + 2 * DAY))
    assert "is no name" in findings(lambda b: swap(b, san("spiffe://prod.example/wl/x"), x509.SubjectAlternativeName))
    assert "issuer name" in findings(lambda b: b, issuer=forge.root.cert)
    assert "leaves the lifetime" in findings(
        lambda b: live(b, forge.now - 3600, forge.now + 60)
    )


def test_lint_checks_the_path_length_of_an_authority_and_its_remaining_life(forge, swap, live):
    builder = swap(
        forge.builder(certs.INTERMEDIATE, p256(), forge.root), x509.BasicConstraints(True, 3), x509.BasicConstraints
    )
    with pytest.raises(Bug, match="path length 3"):
        certs.lint(
            forge.sign(builder, forge.root.key), certs.INTERMEDIATE, issuer=forge.root.cert, trust_domain=forge.trust_domain
        )
    spent = forge.leaf(change=lambda b: live(b, forge.now, forge.now)).cert
    with pytest.raises(Bug, match="no lifetime left"):
        certs.lint(spent, certs.ENDPOINT, issuer=forge.intermediate.cert, trust_domain=forge.trust_domain)


# -- parsing ----------------------------------------------------------------------------------------------------------


def test_parse_chain_round_trip_and_caps(forge):
    chain = (forge.leaf().cert, forge.intermediate.cert)
    texts = [certs.pem(c) for c in chain]
    assert certs.parse_chain(texts) == certs.parse_chain("".join(texts)) == chain
    der = [c.public_bytes(Encoding.DER) for c in chain]
    assert certs.parse_der_chain(der) == chain
    for bad, code in (
        ("", "chain.syntax"),
        ("é", "chain.syntax"),
        (texts[0][:200], "chain.syntax"),
        ("".join(texts * 3), "chain.long"),
        ("x" * (certs.MAX_CHAIN * certs.MAX_CERTIFICATE + 1), "chain.large"),
    ):
        with pytest.raises(NotVerified) as e:
            certs.parse_chain(bad)
        assert e.value.code == code
    for bad_der, code in (
        ([], "chain.empty"), (der * 3, "chain.long"), ([b"\0" * 40000], "chain.large"), ([b"\x30\0"], "chain.syntax"),
    ):  # fmt: skip
        with pytest.raises(NotVerified) as e:
            certs.parse_der_chain(bad_der)
        assert e.value.code == code


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_gives_its_key_and_nothing_else():
    for key in (p256(), Ed25519PrivateKey.generate()):
        assert certs.spki(certs.csr_key(certs.make_csr(key))) == certs.spki(key.public_key())
    loud = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(san("spiffe://prod.example/cp/ca"), True)
        .sign(key := p256(), hashes.SHA256())
    )
    assert certs.spki(certs.csr_key(loud.public_bytes(Encoding.PEM).decode())) == certs.spki(key.public_key())


def test_bad_requests_are_refused():
    def code(text) -> str:
        with pytest.raises(BadInput) as e:
            certs.csr_key(text)
        return e.value.code

    good = certs.make_csr(p256())
    assert code("") == code("nonsense") == code(good[:100]) == code("é") == "csr.syntax"
    assert code(good + "x" * certs.MAX_CSR) == code(None) == "csr.large"
    empty = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        assert code(empty.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()) == "csr.key"


def _repem(der: bytes, kind: str) -> str:
    import base64

    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {kind}-----\n{body}-----END {kind}-----\n"


CSR_DER = x509.load_pem_x509_csr(certs.make_csr(p256()).encode()).public_bytes(Encoding.DER)


@given(st.integers(0, len(CSR_DER) - 1), st.integers(1, 255))
def test_a_mutated_request_never_gives_a_key(position, flip):
    bad = bytearray(CSR_DER)
    bad[position] ^= flip
    with pytest.raises(BadInput):
        certs.csr_key(_repem(bytes(bad), "CERTIFICATE REQUEST"))


# -- mutated chains ---------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(which=st.integers(0, 1), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_mutated_chain_is_refused(forge, which, where, flip):
    good = [forge.leaf(key=_KEY).cert.public_bytes(Encoding.DER), forge.intermediate.cert.public_bytes(Encoding.DER)]
    bad = bytearray(good[which])
    bad[int(where * len(bad))] ^= flip
    with pytest.raises(NotVerified):
        certs.verify_chain(
            certs.parse_der_chain([bytes(bad) if i == which else der for i, der in enumerate(good)]),
            [forge.root.cert], forge.trust_domain, forge.now,
        )  # fmt: skip


_KEY = p256()


# -- revocation -------------------------------------------------------------------------------------------------------


def negate_s(cert: x509.Certificate) -> x509.Certificate:
    """The same certificate with the other valid ECDSA signature (r, n - s)."""
    r, s = decode_dss_signature(cert.signature)
    other = encode_dss_signature(r, P256_ORDER - s)
    der = cert.public_bytes(Encoding.DER)
    head = der[4 : der.rindex(cert.signature) - 3]  # to-be-signed part and algorithm
    bits = b"\x03" + bytes([len(other) + 1]) + b"\0" + other
    body = head + bits
    return x509.load_der_x509_certificate(b"\x30\x82" + len(body).to_bytes(2, "big") + body)


def test_the_other_signature_of_a_certificate_has_the_same_revocation_id(forge):
    cert = forge.leaf().cert
    twin = negate_s(cert)
    assert forge.verify(twin).spiffe_id == forge.verify(cert).spiffe_id, "both verify"
    assert certs.fingerprint(twin) != certs.fingerprint(cert), "the trap"
    assert certs.revocation_id(twin) == certs.revocation_id(cert) == forge.verify(twin).revocation_id


def test_revocation_ids_tell_issuer_serial_and_key_apart(forge):
    a, b = forge.leaf(key=_KEY), forge.leaf(key=_KEY)
    one, two = certs.revocation_id(a.cert), certs.revocation_id(b.cert)
    assert one.issuer == two.issuer == certs.key_id(forge.intermediate.key.public_key()).hex()
    assert one.serial != two.serial
    assert one.spki == two.spki


def test_a_foreign_certificate_without_an_authority_key_identifier_still_has_an_id(forge, swap):
    cert = forge.leaf(change=lambda b: swap(b, None, x509.AuthorityKeyIdentifier)).cert
    assert len(certs.revocation_id(cert).issuer) == 64


# -- a second opinion -------------------------------------------------------------------------------------------------

def openssl_verify(forge, tmp_path, leaf: x509.Certificate, intermediate: x509.Certificate) -> bool:
    binary = shutil.which("openssl")
    assert binary, "the openssl program is needed for the comparison"
    (tmp_path / "root").write_text(certs.pem(forge.root.cert))
    (tmp_path / "mid").write_text(certs.pem(intermediate))
    (tmp_path / "leaf").write_text(certs.pem(leaf))
    done = subprocess.run(
        [binary, "verify", "-x509_strict", "-attime", str(forge.now), "-purpose", "sslserver", "-no-CApath", "-no-CAstore",
         "-CAfile", tmp_path / "root", "-untrusted", tmp_path / "mid", tmp_path / "leaf"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return done.returncode == 0


def test_openssl_agrees_on_good_chains(forge, tmp_path):
    assert openssl_verify(forge, tmp_path, forge.leaf().cert, forge.intermediate.cert)
    assert openssl_verify(forge, tmp_path, negate_s(forge.leaf().cert), forge.intermediate.cert)


@pytest.mark.parametrize("case", ["expired", "not yet valid", "unknown critical", "keyCertSign", "server only"])
def test_openssl_refuses_where_the_rule_is_not_ours_alone(forge, tmp_path, swap, live, case):
    """`keyCertSign` on a leaf breaks RFC 5280 4.2.1.3; `server only` is refused here and good for OpenSSL as a server."""
    cert = forge.leaf(change=lambda b: LEAVES[case][1](b, swap, live)).cert
    assert openssl_verify(forge, tmp_path, cert, forge.intermediate.cert) is (case == "server only")


@pytest.mark.parametrize("case", ["not an authority", "no basic constraints", "no keyCertSign"])
def test_openssl_refuses_the_same_intermediates(forge, tmp_path, swap, case):
    key = p256()
    builder = AUTHORITIES[case][1](forge.builder(certs.INTERMEDIATE, key, forge.root), swap)
    bad = type(forge.root)(forge.sign(builder, forge.root.key), key)
    assert not openssl_verify(forge, tmp_path, forge.leaf(issuer=bad).cert, bad.cert)


def test_openssl_refuses_a_path_too_long_and_a_foreign_root(forge, tmp_path):
    other = type(forge)()
    assert not openssl_verify(forge, tmp_path, other.leaf().cert, other.intermediate.cert)
