from __future__ import annotations

import ipaddress
import shutil
import ssl
import stat
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ca import authority as module
from ca.authority import Authority, Issuing
from identity import certs
from identity.errors import BadInput, BadState, Bug, Conflict, NotVerified
from identity.keys import private_pem, write_secret
from identity.names import SpiffeId, TrustDomain
from identity.records import Heartbeat, PolicyRecord

NOW = 1_800_000_000
DAY = 86400
TD = TrustDomain("prod.example")


def csr() -> str:
    return certs.make_csr(ec.generate_private_key(ec.SECP256R1()))


HOST = SpiffeId.endpoint(TD, "web-1")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca"), TD, NOW)


@pytest.fixture
def copy(made, tmp_path):
    """A directory of its own to damage."""
    shutil.copytree(made.directory, tmp_path / "ca")
    return tmp_path / "ca"


def test_a_new_authority_has_its_files_and_modes(made):
    names = {p.name for p in made.directory.iterdir()}
    keys = {"root.key", "intermediate.key", "records.key", "policy.key"}
    assert names == keys | {"root.pem", "intermediate.pem", "records.pem", "policy.pem", "authority.json", "authority.lock"}
    for name in keys | {"authority.json"}:
        assert stat.S_IMODE((made.directory / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(made.directory.stat().st_mode) == 0o700
    assert made.root_fingerprint == certs.fingerprint(made.root)
    assert "PRIVATE" not in repr(made)


def test_an_authority_is_not_made_twice(copy):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    with pytest.raises(Conflict) as e:
        Authority.create(copy, TD, NOW)
    assert e.value.code == "ca.exists"
    (copy / "authority.json").unlink()
    with pytest.raises(BadState) as e:
        Authority.create(copy, TD, NOW)
    assert e.value.code == "ca.partial"
    assert all((copy / name).read_bytes() == data for name, data in before.items() if name != "authority.json")


def test_a_failed_creation_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_file", broken)
    with pytest.raises(OSError, match="disk full"):
        Authority.create(tmp_path / "ca", TD, NOW)
    assert list((tmp_path / "ca").iterdir()) == []


def test_loading_gives_the_same_authority(made):
    again = Authority.load(made.directory, NOW + 5)
    assert again.root_fingerprint == made.root_fingerprint
    assert again.trust_domain == TD
    assert again.roots == made.roots
    chain = again.issue_endpoint(csr(), HOST, NOW + 5)
    assert made.trust_bundle(1, NOW).verify_svid(chain, NOW + 5, expect=HOST)


def test_the_root_key_may_be_taken_away(copy):
    (copy / "root.key").unlink()
    authority = Authority.load(copy, NOW)
    assert authority.issue_endpoint(csr(), HOST, NOW)


def test_certificates_by_profile(made):
    bundle = made.trust_bundle(1, NOW)
    host = bundle.verify_svid(made.issue_endpoint(csr(), HOST, NOW), NOW)
    assert (host.spiffe_id, host.not_after) == (HOST, NOW + DAY)
    name = SpiffeId.workload(TD, "shop/api")
    addresses = [ipaddress.ip_address("100.64.0.1"), ipaddress.ip_address("fd00::1")]
    service = bundle.verify_svid(made.issue_workload(csr(), name, addresses, NOW), NOW)
    assert (service.spiffe_id, service.not_after) == (name, NOW + 4 * 3600)


def test_a_name_of_another_profile_or_domain_is_a_bug_of_ours(made):
    for name in (SpiffeId.workload(TD, "a"), SpiffeId(TD, ("cp", "ca")), SpiffeId.endpoint(TrustDomain("b.example"), "a")):
        with pytest.raises(Bug):
            made.issue_endpoint(csr(), name, NOW)


def test_bad_requests_are_refused(made):
    with pytest.raises(BadInput) as e:
        made.issue_endpoint("junk", HOST, NOW)
    assert e.value.code == "csr.syntax"


def test_the_serial_is_stored_before_it_is_signed(copy):
    seen: list[Issuing] = []
    authority = Authority.load(copy, NOW, record_serial=seen.append)
    leaf = certs.parse_chain(authority.issue_endpoint(csr(), HOST, NOW))[0]
    named = certs.revocation_id(leaf)
    assert seen == [
        Issuing(named.serial, named.issuer, str(HOST), "endpoint", named.spki, certs.not_before(leaf), certs.not_after(leaf))
    ]

    def refuse(_: Issuing) -> None:
        raise RuntimeError("no store")

    authority.record_serial = refuse
    with pytest.raises(RuntimeError, match="no store"):
        authority.issue_endpoint(csr(), HOST, NOW)


def test_serials_do_not_repeat_and_have_the_same_length(made):
    serials = [certs.parse_chain(made.issue_endpoint(csr(), HOST, NOW))[0].serial_number for _ in range(50)]
    assert len(set(serials)) == 50
    assert {s.bit_length() for s in serials} == {159}


def test_records_are_signed_by_the_key_of_their_role(made):
    bundle = made.trust_bundle(3, NOW)
    assert bundle.sequence == 3
    beat = Heartbeat(trust_domain=TD.name, timeline="t", revision=1, time=NOW)
    policy = PolicyRecord(trust_domain=TD.name, revision=1, digest="d", files=[], author="", issued=NOW)
    assert bundle.verify(Heartbeat, made.sign_record(beat)) == beat
    assert bundle.verify(PolicyRecord, made.sign_record(policy)) == policy
    assert bundle.keys["records"] != bundle.keys["policy"]
    with pytest.raises(Bug):
        made.sign_record(beat.model_copy(update={"trust_domain": "other.example"}))


# -- the server's own identity ----------------------------------------------------------------------------------------


def test_the_server_identity_is_kept_until_half_of_its_life(copy):
    authority = Authority.load(copy, NOW)
    first = authority.server_chain(NOW)
    assert authority.server_chain(NOW + DAY // 2 - 100).leaf_der == first.leaf_der
    second = authority.server_chain(NOW + DAY // 2 + 100)
    assert second.leaf_der != first.leaf_der
    chain = certs.parse_chain(second.certificate.read_text())
    assert [certs.fingerprint(c) for c in chain[2:]] == [authority.root_fingerprint], "the root is sent along"
    svid = authority.trust_bundle(1, NOW).verify_svid(chain, NOW + DAY // 2 + 100)
    assert svid.spiffe_id == SpiffeId(TD, certs.SERVER_NAME)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(second.certificate, second.key)


def test_a_server_identity_of_another_authority_or_time_is_made_anew(copy, tmp_path):
    authority = Authority.load(copy, NOW)
    later = authority.server_chain(NOW + 3600)
    now = authority.server_chain(NOW)
    assert now.leaf_der != later.leaf_der
    other = Authority.create(tmp_path / "other", TD, NOW)
    for source, name in ((other.server_chain(NOW).certificate, "server.pem"), (other.server_chain(NOW).key, "server.key")):
        write_secret(copy / name, source.read_bytes())
    again = certs.parse_chain(authority.server_chain(NOW).certificate.read_text())
    assert again[-1] == authority.root


@pytest.mark.parametrize("name", ["server.pem", "server.key"])
def test_a_torn_server_identity_is_made_anew(copy, name):
    authority = Authority.load(copy, NOW)
    first = authority.server_chain(NOW)
    if name == "server.key":
        write_secret(first.key, private_pem(ec.generate_private_key(ec.SECP256R1())))
    else:
        first.certificate.write_text("torn")
    second = authority.server_chain(NOW)
    assert second.leaf_der != first.leaf_der
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(second.certificate, second.key)


# -- upkeep -----------------------------------------------------------------------------------------------------------


def test_record_certificates_are_renewed_at_half_life_over_the_same_key(copy):
    authority = Authority.load(copy, NOW)
    before = authority.trust_bundle(1, NOW)
    assert authority.maintain(NOW + 14 * DAY) is False
    assert authority.maintain(NOW + 15 * DAY) is True
    assert authority.maintain(NOW + 15 * DAY) is False
    after = before.accept_next(authority.bundle(2, NOW + 15 * DAY), NOW + 15 * DAY)
    beat = Heartbeat(trust_domain=TD.name, timeline="t", revision=1, time=NOW)
    assert after.verify(Heartbeat, authority.sign_record(beat)) == before.verify(Heartbeat, authority.sign_record(beat))
    assert Authority.load(copy, NOW + 16 * DAY).trust_bundle(1, NOW + 40 * DAY)


def test_without_the_root_key_the_intermediate_runs_out_and_says_so(copy):
    (copy / "root.key").unlink()
    authority = Authority.load(copy, NOW)
    authority.maintain(NOW + 46 * DAY)
    last = authority.issue_endpoint(csr(), HOST, NOW + 90 * DAY - 60)
    assert certs.not_after(certs.parse_chain(last)[0]) == certs.not_after(authority.intermediate)
    with pytest.raises(BadState) as e:
        authority.issue_endpoint(csr(), HOST, NOW + 90 * DAY)
    assert e.value.code == "ca.intermediate_expired"
    assert "root.key" in e.value.hint
    with pytest.raises(BadState):
        Authority.load(copy, NOW + 91 * DAY)


def test_a_clock_set_back_stops_issuing(made):
    with pytest.raises(BadState) as e:
        made.issue_endpoint(csr(), HOST, NOW - 2 * DAY)
    assert e.value.code == "ca.clock"


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("authority.json", None, "ca.missing"), ("authority.json", b"{", "ca.state"), ("authority.json", b"[]", "ca.version"),
        ("authority.json", b'{"version":3}', "ca.version"), ("authority.json", b'{"version":1}', "ca.state"),
        ("authority.json", b'{"version":1,"trust_domain":"BAD"}', "ca.state"),
        ("authority.json", b'{"version":1,"trust_domain":"other.example"}', "ca.root"),
        ("root.pem", None, "ca.certificate"), ("root.pem", b"x", "ca.certificate"), ("root.pem", b"\xff", "ca.certificate"),
        ("root.pem", "intermediate.pem", "ca.root"), ("root.pem", "records.pem", "ca.certificate"),
        ("intermediate.pem", None, "ca.certificate"), ("intermediate.pem", "root.pem", "ca.key"),
        ("intermediate.key", None, "state.key"), ("intermediate.key", b"x", "state.key"), ("intermediate.key", "root.key", "ca.key"),
        ("records.key", "policy.key", "ca.key"), ("policy.pem", "records.pem", "ca.key"), ("records.pem", b"", "ca.certificate"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(copy, name, content, code):
    if content is None:
        (copy / name).unlink()
    else:
        write_secret(copy / name, (copy / content).read_bytes() if isinstance(content, str) else content)
    with pytest.raises(BadState) as e:
        Authority.load(copy, NOW)
    assert e.value.code == code
    assert e.value.exit == 78


def test_files_of_another_authority_are_refused(copy, tmp_path):
    other = Authority.create(tmp_path / "other", TD, NOW)
    shutil.copy(other.directory / "root.pem", copy / "root.pem")
    with pytest.raises(BadState) as e:
        Authority.load(copy, NOW)
    assert e.value.code == "ca.key"
    (copy / "root.key").unlink()
    with pytest.raises(BadState) as e:
        Authority.load(copy, NOW)
    assert e.value.code == "ca.chain"


def test_a_key_readable_by_others_is_refused(copy):
    (copy / "intermediate.key").chmod(0o644)
    with pytest.raises(BadState) as e:
        Authority.load(copy, NOW)
    assert e.value.code == "state.key_mode"


def test_a_certificate_for_a_foreign_kind_of_key_is_refused(copy):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([])
    cert = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(certs._at(NOW)).not_valid_after(certs._at(NOW + 9)).sign(key, hashes.SHA256())
    )  # fmt: skip
    write_secret(copy / "intermediate.pem", certs.pem(cert).encode())
    with pytest.raises(BadState) as e:
        Authority.load(copy, NOW)
    assert e.value.code == "ca.key"


def test_ed25519_requests_are_served(made):
    chain = made.issue_endpoint(certs.make_csr(Ed25519PrivateKey.generate()), HOST, NOW)
    assert made.trust_bundle(1, NOW).verify_svid(chain, NOW)


def test_the_chain_of_a_foreign_authority_does_not_verify(made, tmp_path):
    other = Authority.create(tmp_path / "o", TD, NOW)
    with pytest.raises(NotVerified):
        made.trust_bundle(1, NOW).verify_svid(other.issue_endpoint(csr(), HOST, NOW), NOW)


def test_openssl_verifies_what_is_issued(made, tmp_path):
    openssl = shutil.which("openssl")
    assert openssl, "the openssl program is needed for the comparison"
    leaf, middle = made.issue_endpoint(csr(), HOST, NOW)
    (tmp_path / "leaf").write_text(leaf)
    (tmp_path / "middle").write_text(middle)
    for purpose in ("sslserver", "sslclient"):
        done = subprocess.run(
            [openssl, "verify", "-x509_strict", "-attime", str(NOW), "-purpose", purpose, "-CAfile", made.directory / "root.pem",
             "-untrusted", tmp_path / "middle", tmp_path / "leaf"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
