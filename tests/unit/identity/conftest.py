"""A forge of certificates: the profile's chain, and any departure from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from identity import certs
from identity.certs import INTERMEDIATE, ROOT, Profile
from identity.names import SpiffeId, TrustDomain

NOW = 1_800_000_000
TD = TrustDomain("prod.example")

AnyKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


@dataclass
class Pair:
    """A certificate and its key."""

    cert: x509.Certificate
    key: AnyKey


@dataclass
class Forge:
    """root -> intermediate, and leaves under the intermediate."""

    trust_domain: TrustDomain = TD
    now: int = NOW
    root: Pair = field(init=False)
    intermediate: Pair = field(init=False)
    serials: int = 1 << 158

    def __post_init__(self) -> None:
        self.root = self.authority(ROOT, ec.generate_private_key(ec.SECP384R1()), None)
        self.intermediate = self.authority(INTERMEDIATE, ec.generate_private_key(ec.SECP256R1()), self.root)

    def serial(self) -> int:
        self.serials += 1
        return self.serials

    def sign(self, builder: x509.CertificateBuilder, key: AnyKey) -> x509.Certificate:
        if isinstance(key, Ed25519PrivateKey):
            return builder.sign(key, None)
        digest = hashes.SHA384() if isinstance(key.curve, ec.SECP384R1) else hashes.SHA256()
        return builder.sign(key, digest)

    def builder(
        self, profile: Profile, key: AnyKey, issuer: Pair | None, spiffe_id: str | None = None, now: float | None = None
    ) -> x509.CertificateBuilder:
        return certs.build(
            profile, key=key.public_key(), trust_domain=self.trust_domain,
            spiffe_id=None if spiffe_id is None else SpiffeId.parse(spiffe_id),
            issuer=None if issuer is None else issuer.cert, serial=self.serial(), now=self.now if now is None else now,
        )  # fmt: skip

    def authority(self, profile: Profile, key: AnyKey, issuer: Pair | None, now: float | None = None) -> Pair:
        builder = self.builder(profile, key, issuer, now=now)
        return Pair(self.sign(builder, key if issuer is None else issuer.key), key)

    def leaf(
        self, spiffe_id: str = "spiffe://prod.example/host/web-1", *, profile: Profile = certs.ENDPOINT,
        key: AnyKey | None = None, issuer: Pair | None = None, now: float | None = None,
        change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder] = lambda b: b,
    ) -> Pair:  # fmt: skip
        """A leaf by the profile, `change`d before it is signed."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        issuer = issuer or self.intermediate
        builder = change(self.builder(profile, key, issuer, spiffe_id, now))
        return Pair(self.sign(builder, issuer.key), key)

    def verify(
        self, *chain: x509.Certificate, now: float | None = None, roots: Sequence[x509.Certificate] | None = None,
        profile: Profile = certs.ENDPOINT,
    ) -> certs.Svid:  # fmt: skip
        given = chain if len(chain) > 1 else (*chain, self.intermediate.cert)
        return certs.verify_chain(
            given, [self.root.cert] if roots is None else roots, self.trust_domain,
            self.now if now is None else now, profile=profile,
        )  # fmt: skip


def replace(
    builder: x509.CertificateBuilder, value: x509.ExtensionType | None, kind: type[x509.ExtensionType], critical: bool = True
) -> x509.CertificateBuilder:
    """The builder with one extension exchanged (None: left out)."""
    kept = [e for e in builder._extensions if not isinstance(e.value, kind)]
    if value is not None:
        kept.append(x509.Extension(value.oid, critical, value))
    return x509.CertificateBuilder(
        builder._issuer_name, builder._subject_name, builder._public_key, builder._serial_number,
        builder._not_valid_before, builder._not_valid_after, kept,
    )  # fmt: skip


def lifetime(builder: x509.CertificateBuilder, start: float, end: float) -> x509.CertificateBuilder:
    """The builder with another lifetime."""
    return x509.CertificateBuilder(
        builder._issuer_name, builder._subject_name, builder._public_key, builder._serial_number, at(start), at(end),
        builder._extensions,
    )  # fmt: skip


@pytest.fixture(scope="session")
def forge() -> Forge:
    return Forge()


@pytest.fixture(scope="session")
def swap() -> Callable[..., x509.CertificateBuilder]:
    return replace


@pytest.fixture(scope="session")
def live() -> Callable[..., x509.CertificateBuilder]:
    return lifetime
