"""Machines that enrol with a device certificate, and those that try."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from ca.plane import Plane
from identity import certs
from identity.device import ATTESTOR, prove_device
from identity.enrollment import JoinToken, Offer, prove
from identity.errors import BadInput, NotVerified, RetinueError
from identity.keys import b64, ed25519_public, unb64, x25519_public
from identity.wire.enroll import EnrollReply, EnrollRequest

T0 = 1_800_000_000
LEAF = b"the server's certificate"
RULES = {"roots": "device-ca.pem", "rules": [
    {"field": "common-name", "pattern": "node-([a-z0-9]+)", "host": r"dev-\1"}, {"field": "dns", "pattern": "([a-z]+)\\.lan", "host": r"\1"},
]}  # fmt: skip


def made(subject: str | None, key: Any, issuer: tuple[x509.Name, Any] | None = None, *, ca: bool = False, days: int = 30,
         sans: list[x509.GeneralName] | None = None, more: list[str] | None = None) -> x509.Certificate:  # fmt: skip
    names = [x509.NameAttribute(x509.NameOID.COMMON_NAME, n) for n in ([subject] if subject else []) + (more or [])]
    name, at = x509.Name(names), dt.datetime.fromtimestamp(T0, dt.UTC)
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(issuer[0] if issuer else name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(at - dt.timedelta(days=1))
        .not_valid_after(at + dt.timedelta(days=days)).add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )  # fmt: skip
    signer = issuer[1] if issuer else key
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    if ca:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=not names)
    return builder.sign(signer, None if isinstance(signer, Ed25519PrivateKey) else hashes.SHA256())


class Maker:
    """A maker of devices with its authority."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.cert = made("Maker", self.key, ca=True, days=900)

    def device(self, subject: str | None, key: Any = None, **more: Any) -> Device:
        key = key or ec.generate_private_key(ec.SECP256R1())
        return Device([made(subject, key, (self.cert.subject, self.key), **more)], key)


class Device:
    def __init__(self, chain: list[x509.Certificate], key: Any) -> None:
        self.chain, self.key = chain, key
        self.tunnel, self.enroll = X25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.tls = ec.generate_private_key(ec.SECP256R1())

    def request(self, plane: Plane, **changed: Any) -> EnrollRequest:
        challenge = plane.challenge(ATTESTOR, LEAF)
        offer = Offer(ATTESTOR, unb64(challenge.nonce), LEAF, unb64(challenge.server_key), certs.make_csr(self.tls),
                      x25519_public(self.tunnel), ed25519_public(self.enroll), (), ("chacha20poly1305",))  # fmt: skip
        proofs = prove(offer, JoinToken(ATTESTOR, bytes(32), "0" * 64), self.tunnel, self.enroll)
        fields = {
            "token_id": ATTESTOR, "nonce": challenge.nonce, "csr": offer.csr, "tunnel_key": b64(offer.tunnel_key),
            "enroll_key": b64(offer.enroll_key), "token_proof": b64(proofs.token), "tunnel_proof": b64(proofs.tunnel),
            "enroll_proof": b64(proofs.enroll), "underlay": [], "ciphers": ["chacha20poly1305"], "attestor": ATTESTOR,
            "device_chain": [c.public_bytes(Encoding.PEM).decode() for c in self.chain],
            "device_proof": b64(prove_device(offer, self.chain[0], self.key)),
        }  # fmt: skip
        return EnrollRequest.model_validate(fields | changed)

    def enrol(self, plane: Plane, **changed: Any) -> EnrollReply:
        return plane.enroll(self.request(plane, **changed))


@pytest.fixture
def maker(plane: Plane) -> Maker:
    found = Maker()
    (plane.directory / "device-ca.pem").write_bytes(found.cert.public_bytes(Encoding.PEM))
    rules(plane)
    return found


def rules(plane: Plane, **changed: Any) -> None:
    (plane.directory / "x509pop.json").write_text(json.dumps(RULES | changed))


def refused(device: Device, plane: Plane, **changed: Any) -> str:
    with pytest.raises(RetinueError) as e:
        device.enrol(plane, **changed)
    return e.value.code


@pytest.mark.parametrize("key", ["p256", "p384", "ed25519", "rsa"])
def test_a_device_becomes_the_host_that_a_rule_names(plane: Plane, maker: Maker, key: str) -> None:
    keys = {"p256": lambda: ec.generate_private_key(ec.SECP256R1()), "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
            "ed25519": Ed25519PrivateKey.generate, "rsa": lambda: rsa.generate_private_key(65537, 2048)}  # fmt: skip
    reply = maker.device("node-a7", keys[key]()).enrol(plane)
    assert (reply.endpoint, reply.kind) == ("dev-a7", "host")
    named = maker.device(None, sans=[x509.DNSName("web.lan")]).enrol(plane)
    assert named.endpoint == "web"


def test_a_lost_reply_is_repeated_and_a_second_enrolment_is_not(plane: Plane, maker: Maker, clock: Any) -> None:
    device = maker.device("node-a7")
    assert device.enrol(plane).endpoint == device.enrol(plane).endpoint == "dev-a7"
    again = Device(device.chain, device.key)  # the same device with new keys
    assert refused(again, plane) == "host.exists"
    clock.now += 301
    assert refused(device, plane) == "token.used"
    rules(plane, reenroll=True)
    assert again.enrol(plane).endpoint == "dev-a7"


def test_devices_of_nobody_or_of_no_rule(plane: Plane, maker: Maker, clock: Any) -> None:
    assert refused(Maker().device("node-a7"), plane) == "device.untrusted"
    for subject in ("printer-1", "node-", "node-A", "xnode-a", "node-a\nb"):
        assert refused(maker.device(subject), plane) == "device.rule", subject
    assert refused(maker.device("node-a", more=["node-b"]), plane) == "device.rule"  # two names: it may not choose
    assert refused(maker.device(None, sans=[x509.DNSName("web.lan"), x509.DNSName("db.lan")]), plane) == "device.rule"
    ended = maker.device("node-a", days=0)
    clock.now += 60
    assert refused(ended, plane) == "device.untrusted"
    selfish = ec.generate_private_key(ec.SECP256R1())
    assert refused(Device([made("node-a", selfish)], selfish), plane) == "device.untrusted"
    assert plane.registry.all() == []


def test_the_caps(plane: Plane, maker: Maker) -> None:
    small = rsa.generate_private_key(65537, 1024)
    assert refused(maker.device("node-a", small), plane) == "device.key"
    assert refused(maker.device("node-a", ec.generate_private_key(ec.SECP521R1())), plane) == "device.key"
    device = maker.device("node-a")
    text = device.chain[0].public_bytes(Encoding.PEM).decode()
    for chain in ([], ["junk"], [text * 6], [text] * 5 + [text], ["x" * 40_000]):
        with pytest.raises((RetinueError, ValueError)):
            device.enrol(plane, device_chain=chain)
    assert plane.registry.all() == []


def test_a_chain_over_four_intermediates(plane: Plane, maker: Maker) -> None:
    issuer, chain = (maker.cert.subject, maker.key), []
    for depth in range(4):
        key = ec.generate_private_key(ec.SECP256R1())
        chain.insert(0, made(f"Step {depth}", key, issuer, ca=True))
        issuer = (chain[0].subject, key)
    key = ec.generate_private_key(ec.SECP256R1())
    device = Device([made("node-deep", key, issuer), *chain], key)
    assert device.enrol(plane).endpoint == "dev-deep"


def test_proofs_are_of_one_device_one_offer_and_one_nonce(plane: Plane, maker: Maker) -> None:
    device, other = maker.device("node-a"), maker.device("node-b")
    stolen = other.request(plane)
    for changed in (
        {"device_proof": stolen.device_proof}, {"device_chain": stolen.device_chain}, {"device_proof": ""}, {"device_proof": "!"},
        {"csr": stolen.csr}, {"tunnel_key": stolen.tunnel_key}, {"enroll_key": stolen.enroll_key}, {"nonce": stolen.nonce},
    ):  # fmt: skip
        assert refused(device, plane, **changed).partition(".")[0] in {"device", "enroll"}, changed
    good = device.request(plane)
    plane.enroll(good)
    with pytest.raises(NotVerified) as e:
        plane.enroll(good)
    assert e.value.code == "enroll.nonce"
    wrong = Device(device.chain, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(BadInput):
        wrong.request(plane)


def test_the_token_behind_it_is_nobodys(plane: Plane, maker: Maker) -> None:
    """Its public key is random: no text claims it, and the evidence of one kind is none of the other."""
    device = maker.device("node-a")
    assert refused(device, plane, attestor="token") == "token.refused"
    assert refused(device, plane, attestor="tpm") == "attestor.unknown"


def test_without_rules_no_device_comes(plane: Plane, maker: Maker) -> None:
    path: Path = plane.directory / "x509pop.json"
    for text, code in (("{", "device.rules"), (json.dumps(RULES | {"rules": []}), "device.rules"),
                       (json.dumps(RULES | {"roots": "none.pem"}), "attestor.unknown"),
                       (json.dumps(RULES | {"rules": [{"field": "dns", "pattern": "(", "host": "a"}]}), "device.rules")):  # fmt: skip
        path.write_text(text)
        assert refused(maker.device("node-a"), plane) == code
    path.unlink()
    assert refused(maker.device("node-a"), plane) == "attestor.unknown"
