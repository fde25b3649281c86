"""gateway.callers: certificates and tokens to configured callers."""

from __future__ import annotations

import datetime as dt
import hashlib
import time
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from gateway.callers import by_certificate, by_token, identify, spki_sha256
from gateway.config import Caller
from identity.names import SpiffeId, TrustDomain

TOKEN = "s3cret-token"
ACME = Caller(workload="partner/acme", token_sha256=[hashlib.sha256(TOKEN.encode()).hexdigest()])


def foreign(uri: str = "spiffe://edge.example/wl/partner/acme") -> x509.Certificate:
    """A self-signed certificate that claims a SPIFFE ID of ours."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def svid(world: Any, name: str) -> list[bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    spiffe_id = SpiffeId.workload(TrustDomain("edge.example"), name)
    chain = world.authority.issue_workload(csr.public_bytes(Encoding.PEM).decode(), spiffe_id, [], time.time())
    return [der(x509.load_pem_x509_certificate(pem.encode())) for pem in chain]


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN} ", f"BEARER  {TOKEN}"])
def test_the_token_finds_its_caller(header: str) -> None:
    assert by_token([ACME], header) is ACME


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer " + "x" * 5000])
def test_anything_else_does_not(header: str | None) -> None:
    assert by_token([ACME], header) is None


@given(st.text(max_size=40))
def test_random_tokens_never_match(text: str) -> None:
    assert by_token([ACME], f"Bearer {text}") is None or text.strip() == TOKEN


def test_a_pinned_key_decides() -> None:
    certificate = foreign()
    pinned = Caller(workload="partner/pin", spki_sha256=[spki_sha256(certificate)])
    assert by_certificate([ACME, pinned], [der(certificate)], None, time.time()) == (pinned, "spki", None)
    assert by_certificate([pinned], [der(foreign())], None, time.time()) is None
    assert by_certificate([pinned], [], None, time.time()) is None
    assert by_certificate([pinned], [b"junk"], None, time.time()) is None


def test_only_our_own_authority_can_name_a_spiffe_id(world: Any) -> None:
    trust = world.view().trust
    named = Caller(workload="partner/acme", spiffe_id=["spiffe://edge.example/wl/partner/acme"])
    chain = svid(world, "partner/acme")
    assert by_certificate([named], chain, trust, time.time()) == (named, "spiffe-id", None)
    assert by_certificate([named], [*chain, der(trust.roots[0])], trust, time.time()) == (named, "spiffe-id", None)
    assert by_certificate([named], svid(world, "other"), trust, time.time()) is None
    assert by_certificate([named], [der(foreign())], trust, time.time()) is None, "a foreign CA wrote our name"
    assert by_certificate([named], [der(foreign()), *chain[1:]], trust, time.time()) is None
    assert by_certificate([named], chain, None, time.time()) is None
    assert by_certificate([named], chain, trust, time.time() + 10 * 86400) is None, "expired"
    assert by_certificate([ACME], chain, trust, time.time()) is None


def test_certificate_before_token_and_our_token_never_travels_on() -> None:
    certificate = foreign()
    pinned = Caller(workload="partner/pin", spki_sha256=[spki_sha256(certificate)])
    both = [ACME, pinned]
    proven = identify(both, [der(certificate)], f"Bearer {TOKEN}", None, time.time())
    assert proven is not None
    assert (proven.caller, proven.by, proven.consumed) == (pinned, "spki", True)
    foreign_token = identify(both, [der(certificate)], "Bearer for-the-app", None, time.time())
    assert foreign_token is not None
    assert not foreign_token.consumed
    by_secret = identify(both, [], f"Bearer {TOKEN}", None, time.time())
    assert by_secret is not None
    assert (by_secret.caller, by_secret.by, by_secret.consumed) == (ACME, "token", True)
    assert identify(both, [], "Bearer nope", None, time.time()) is None
