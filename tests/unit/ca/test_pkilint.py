"""A linter that nobody here wrote reads every kind of certificate that is issued."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from pkilint import loader
from pkilint.pkix import certificate, extension, name
from pkilint.validation import ValidationFindingSeverity

from ca import rotation
from ca.authority import Authority
from identity import certs
from identity.names import SpiffeId, TrustDomain

NOW = 1_800_000_000
TD = TrustDomain("prod.example")
# Known to be wrong: its URI syntax wants a host of the schemes it knows, and `spiffe` is not among them.
FALSE_ERRORS = {"pkix.invalid_uri_syntax"}


def validator() -> object:
    return certificate.create_pkix_certificate_validator_container(
        certificate.create_decoding_validators(name.ATTRIBUTE_TYPE_MAPPINGS, extension.EXTENSION_MAPPINGS),
        [
            certificate.create_issuer_validator_container([]), certificate.create_validity_validator_container(),
            certificate.create_subject_validator_container([]), certificate.create_extensions_validator_container([]),
            certificate.create_spki_validator_container([]),
        ],
    )  # fmt: skip


def findings(cert: x509.Certificate) -> set[str]:
    """Codes of warnings and worse."""
    loaded = loader.load_certificate(cert.public_bytes(Encoding.DER), "test")
    results = validator().validate(loaded.root)  # type: ignore[attr-defined]  # untyped
    return {
        f.finding.code for r in results for f in r.finding_descriptions if f.finding.severity <= ValidationFindingSeverity.WARNING
    }


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, x509.Certificate]:
    def csr() -> str:
        return certs.make_csr(ec.generate_private_key(ec.SECP256R1()))

    def first(chain: list[str]) -> x509.Certificate:
        return certs.parse_chain(chain)[0]

    authority = Authority.create(tmp_path_factory.mktemp("pki") / "ca", TD, NOW)
    addresses = [ipaddress.ip_address("100.64.0.1"), ipaddress.ip_address("fd00::1")]
    found = {
        "host": first(authority.issue_endpoint(csr(), SpiffeId.endpoint(TD, "web-1"), NOW)),
        "workload": first(authority.issue_workload(csr(), SpiffeId.workload(TD, "shop/api"), addresses, NOW)),
        "admin": first(authority.issue_admin(csr(), SpiffeId(TD, ("admin", "ann")), NOW)),
        "server": certs.parse_chain(Path(authority.server_chain(NOW).certificate).read_text())[0],
        "records": authority.chain("records")[0], "root": authority.root, "intermediate": authority.intermediate,
    }  # fmt: skip
    rotation.prepare(authority, "root", NOW)
    return found | {"link": authority.links(NOW)[0], "new root": authority.certificate("root-2")}


@pytest.mark.parametrize("kind", ["host", "workload", "admin", "server", "records", "root", "intermediate", "link", "new root"])
def test_what_is_issued_passes_another_linter(issued: dict[str, x509.Certificate], kind: str) -> None:
    assert findings(issued[kind]) - FALSE_ERRORS == set()


def test_the_known_false_error_is_still_one(issued: dict[str, x509.Certificate]) -> None:
    """When this fails the list above can go."""
    assert findings(issued["host"]) == FALSE_ERRORS


def bad() -> Iterator[tuple[str, x509.Certificate]]:
    from tests.unit.identity.bad_chains import cases
    from tests.unit.identity.conftest import Forge

    yield from ((c.name, c.chain[0]) for c in cases(Forge()) if c.name in {"no extended key usage", "a negative serial", "SAN not critical without subject"})


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_it_finds_faults_at_all() -> None:
    """Positive control."""
    found = {what: findings(cert) - FALSE_ERRORS for what, cert in bad()}
    assert found["a negative serial"]
    assert found["SAN not critical without subject"]
