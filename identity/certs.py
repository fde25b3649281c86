"""X.509 SVIDs: the profile, requests, parsing, the linter and the verification of a chain.

The profile is SPIFFE X509-SVID sections 2-5 with our choices of algorithms and lifetimes. Verification is the library's
path building plus what it does not do: exactly one URI SAN, extended key usage present, a leaf inside its issuer's
lifetime, no path in a CA's name, no name constraints, one trust domain a store. `now` is seconds since the epoch.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from identity.errors import BadInput, Bug, NotVerified
from identity.names import SpiffeId, TrustDomain

PublicKey = ec.EllipticCurvePublicKey | Ed25519PublicKey
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Our choices: seconds.
DAY: Final = 86400
ROOT_LIFETIME: Final = 3652 * DAY
INTERMEDIATE_LIFETIME: Final = 90 * DAY
ENDPOINT_LIFETIME: Final = DAY
WORKLOAD_LIFETIME: Final = 4 * 3600
ADMIN_LIFETIME: Final = 8 * 3600
SERVER_LIFETIME: Final = DAY
SIGNER_LIFETIME: Final = 30 * DAY
BACKDATE: Final = 330  # a receiver whose clock is five minutes behind takes what is new, too

# Our limits on what a peer may send.
MAX_CHAIN: Final = 4
MAX_CERTIFICATE: Final = 8 * 1024  # bytes of PEM
MAX_CSR: Final = 8 * 1024

SERVER_NAME: Final = ("cp", "ca")  # path of the control plane's own SVID
SIGNER_ROLES: Final = ("records", "policy")


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of certificate. lifetime in seconds; path_length is None on leaves; tls: extended key usage present."""

    name: str
    lifetime: int
    path_length: int | None = None
    tls: bool = True
    kinds: tuple[str, ...] = ()  # first path segments that may be named

    @property
    def ca(self) -> bool:
        return self.path_length is not None


ROOT: Final = Profile("root", ROOT_LIFETIME, path_length=1, tls=False)
INTERMEDIATE: Final = Profile("intermediate", INTERMEDIATE_LIFETIME, path_length=0, tls=False)
ENDPOINT: Final = Profile("endpoint", ENDPOINT_LIFETIME, kinds=("host", "sidecar"))
WORKLOAD: Final = Profile("workload", WORKLOAD_LIFETIME, kinds=("wl",))
SERVER: Final = Profile("server", SERVER_LIFETIME, kinds=("cp",))
SIGNER: Final = Profile("signer", SIGNER_LIFETIME, tls=False, kinds=("cp",))
ADMIN: Final = Profile("admin", ADMIN_LIFETIME, kinds=("admin",))
# A leaf of another trust domain: of any layout, with the two more key usages that X509-SVID section 4.3 leaves to it.
FOREIGN: Final = Profile("foreign", WORKLOAD_LIFETIME)
# One root's word on another (RFC 4210 section 4.4, new with old and old with new). It says that both are roots of one
# trust domain and is no step of any path: its path length lets it issue no authority.
LINK: Final = Profile("link", ROOT_LIFETIME, path_length=0, tls=False)

# What the library raises for a certificate or request that cannot be read; fields are parsed when asked for.
_UNREADABLE: Final = (
    ValueError, TypeError, OverflowError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion,
    x509.DuplicateExtension, x509.UnsupportedGeneralNameType, CryptographyDeprecationWarning,
)  # fmt: skip

_TLS_USAGES: Final = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})
_LEAF_USAGE: Final = frozenset({"digital_signature"})
_FOREIGN_USAGE: Final = frozenset({"key_encipherment", "key_agreement"})
_CA_USAGE: Final = frozenset({"key_cert_sign"})
_USAGE_BITS: Final = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign",
)  # fmt: skip
_PROFILE_EXTENSIONS: Final = frozenset({
    ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME, ExtensionOID.SUBJECT_KEY_IDENTIFIER, ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RevocationId:
    """What a block list names: issuer key and serial, and the key itself. Never a digest of the whole certificate:
    an ECDSA signature has two valid forms, so one certificate has two such digests.
    """

    issuer: str  # authority key identifier, hex
    serial: int
    spki: str  # SHA-256 of the SubjectPublicKeyInfo, hex


@dataclass(frozen=True, slots=True)
class Svid:
    """A verified leaf. `not_before` and `not_after` are seconds since the epoch; `chain` is leaf first, root last."""

    spiffe_id: SpiffeId
    leaf: x509.Certificate
    not_before: int
    not_after: int
    public_key: PublicKey
    chain: tuple[x509.Certificate, ...]

    @property
    def revocation_id(self) -> RevocationId:
        return revocation_id(self.leaf)

    @property
    def serial(self) -> int:
        return self.leaf.serial_number


# -- small readers ----------------------------------------------------------------------------------------------------


def pem(cert: x509.Certificate) -> str:
    """PEM text of one certificate."""
    return cert.public_bytes(Encoding.PEM).decode()


def fingerprint(cert: x509.Certificate) -> str:
    """Lower-case hex SHA-256 of the DER. Good for pinning a root; no good for revocation (see RevocationId)."""
    return cert.fingerprint(hashes.SHA256()).hex()


def spki(key: PublicKey) -> bytes:
    """DER SubjectPublicKeyInfo."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_id(key: PublicKey) -> bytes:
    """Subject key identifier: 20 bytes of SHA-256 over the SubjectPublicKeyInfo (RFC 7093 section 2, method 4)."""
    return hashlib.sha256(spki(key)).digest()[:20]


def not_before(cert: x509.Certificate) -> int:
    return int(cert.not_valid_before_utc.timestamp())


def not_after(cert: x509.Certificate) -> int:
    return int(cert.not_valid_after_utc.timestamp())


def revocation_id(cert: x509.Certificate) -> RevocationId:
    """Issuer key identifier, serial and key digest of a certificate."""
    try:
        issuer = cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        issuer = None
    public = cert.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    # A certificate without the identifier is never ours; its issuer's name still keeps the pair apart.
    named = issuer if issuer is not None else hashlib.sha256(cert.issuer.public_bytes()).digest()
    return RevocationId(named.hex(), cert.serial_number, hashlib.sha256(public).hexdigest())


def leaf_key_allowed(key: object) -> bool:
    """P-256 and Ed25519 are the keys of leaves (our choice)."""
    return isinstance(key, Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    )


def ca_key_allowed(key: object) -> bool:
    """P-256 and P-384 are the keys of authorities: the library's verifier refuses Ed25519 there."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)


# -- requests ---------------------------------------------------------------------------------------------------------


def make_csr(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> str:
    """A PEM request with an empty subject and nothing in it but the key."""
    digest = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, digest)
    return request.public_bytes(Encoding.PEM).decode()


def csr_key(text: str) -> PublicKey:
    """The public key of a PEM request whose signature holds; everything else in it is ignored. Raises BadInput."""
    if not isinstance(text, str) or len(text) > MAX_CSR:
        raise BadInput("csr.large", f"a certificate request is at most {MAX_CSR} bytes of PEM")
    if text.count("-----BEGIN") > 1:
        raise BadInput("csr.syntax", "one certificate request at a time")
    try:
        request = x509.load_pem_x509_csr(text.encode())
        valid = request.is_signature_valid
        key = request.public_key()
    except _UNREADABLE:
        raise BadInput("csr.syntax", "the certificate request cannot be read") from None
    if not (isinstance(key, Ed25519PublicKey | ec.EllipticCurvePublicKey) and leaf_key_allowed(key)):
        raise BadInput("csr.key", "a certificate request must hold a P-256 or Ed25519 key")
    if not valid:
        raise BadInput("csr.signature", "the certificate request is not signed by the key in it")
    return key


# -- building ---------------------------------------------------------------------------------------------------------


def build(
    profile: Profile, *, key: PublicKey, trust_domain: TrustDomain, spiffe_id: SpiffeId | None,
    issuer: x509.Certificate | None, serial: int, now: float, addresses: Iterable[IPAddress] = (), earliest: int = 0,
) -> x509.CertificateBuilder:  # fmt: skip
    """What is to be signed. `issuer` is None for a root (its own issuer); `spiffe_id` is None for authorities.

    The lifetime starts BACKDATE seconds ago, but not before `earliest` (what the name was given before then is revoked),
    and never leaves that of the issuer. Raises Bug when the name does not belong to the profile.
    """
    if profile.ca != (spiffe_id is None):
        raise Bug("cert.profile", f"a {profile.name} certificate {'has no' if profile.ca else 'needs a'} SPIFFE ID")
    if spiffe_id is not None and (spiffe_id.kind not in profile.kinds or spiffe_id.trust_domain != trust_domain):
        raise Bug("cert.profile", f"{spiffe_id} is not a name for a {profile.name} certificate of {trust_domain}")
    start, end = max(int(now) - backdate(profile), min(earliest, int(now))), int(now) + profile.lifetime
    if issuer is not None:
        start, end = max(start, not_before(issuer)), min(end, not_after(issuer))
    identifier = key_id(key)
    kind = ROOT.name if profile.name == LINK.name else profile.name
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"retinue {kind} {identifier[:8].hex()}")] if profile.ca else []
    )
    uri = f"spiffe://{trust_domain}" if spiffe_id is None else str(spiffe_id)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri), *(x509.IPAddress(a) for a in addresses)]
    usage = _CA_USAGE if profile.ca else _LEAF_USAGE
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_at(start))
        .not_valid_after(_at(end))
        .add_extension(x509.BasicConstraints(ca=profile.ca, path_length=profile.path_length), critical=True)
        .add_extension(_key_usage(usage), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=not profile.ca)
        .add_extension(x509.SubjectKeyIdentifier(identifier), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier(identifier if issuer is None else _ski(issuer), None, None), critical=False)
    )
    if profile.tls:
        builder = builder.add_extension(x509.ExtendedKeyUsage(sorted(_TLS_USAGES, key=str)), critical=False)
    return builder


def backdate(profile: Profile) -> int:
    """Seconds by which a certificate starts before it is made: BACKDATE, or a tenth of a shorter life."""
    return min(BACKDATE, profile.lifetime // 10)


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)


def _key_usage(usage: frozenset[str]) -> x509.KeyUsage:
    bits = {name: name in usage for name in _USAGE_BITS}
    return x509.KeyUsage(encipher_only=False, decipher_only=False, **bits)


def _ski(cert: x509.Certificate) -> bytes:
    return cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


# -- linting ----------------------------------------------------------------------------------------------------------


def lint(cert: x509.Certificate, profile: Profile, *, issuer: x509.Certificate | None, trust_domain: TrustDomain) -> None:
    """Check every rule of the profile on a finished or throw-away-signed certificate. Raises Bug ``cert.lint``.

    Run before every signature: an authority that would break its own profile must stop, not issue.
    """
    findings = list(_findings(cert, profile, issuer, trust_domain))
    if findings:
        raise Bug("cert.lint", f"a {profile.name} certificate broke the profile: {'; '.join(findings)}")


def _findings(
    cert: x509.Certificate, profile: Profile, issuer: x509.Certificate | None, trust_domain: TrustDomain
) -> Iterable[str]:
    try:
        _check_readable(cert)
        if profile.ca:
            _check_ca(cert, trust_domain)
        else:
            spiffe_id = _check_leaf(cert, trust_domain, profile)
            if spiffe_id.kind not in profile.kinds:
                yield f"{spiffe_id} is no name for it"
    except NotVerified as e:
        yield f"{e.code}: {e.message}"
        return
    present = {e.oid for e in cert.extensions}
    wanted = _PROFILE_EXTENSIONS - (frozenset() if profile.tls else {ExtensionOID.EXTENDED_KEY_USAGE})
    if present != wanted:
        yield f"extensions differ from the profile: {sorted(o.dotted_string for o in present ^ wanted)}"
        return
    key = cert.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey) and _ski(cert) != key_id(key):
        yield "the subject key identifier is not of this key"
    if not 1 << 120 <= cert.serial_number < 1 << 159:
        yield "the serial number is not of 121 to 159 bits"
    basic = cert.extensions.get_extension_for_class(x509.BasicConstraints).value
    if basic.path_length != profile.path_length:
        yield f"path length {basic.path_length}"
    if bool(list(cert.subject)) != profile.ca:
        yield "an authority has a subject name, a leaf none"
    if not profile.ca and not cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical:
        yield "the SAN of an empty subject must be critical"
    authority = cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    if authority != _ski(cert if issuer is None else issuer):
        yield "the authority key identifier is not of the issuer"
    if not_after(cert) - not_before(cert) > profile.lifetime + BACKDATE:
        yield "it lives longer than the profile allows"
    if not_after(cert) <= not_before(cert):
        yield "it has no lifetime left: its issuer is at its end"
    if issuer is not None:
        if cert.issuer != issuer.subject:
            yield "the issuer name is not of the issuer"
        if not_after(cert) > not_after(issuer) or not_before(cert) < not_before(issuer):
            yield "it leaves the lifetime of its issuer"


# -- parsing ----------------------------------------------------------------------------------------------------------


def parse_chain(chain: str | Sequence[str]) -> tuple[x509.Certificate, ...]:
    """Certificates of a PEM text or of several, in the order given. Raises NotVerified ``chain.*``."""
    text = chain if isinstance(chain, str) else "\n".join(chain)
    if len(text) > MAX_CHAIN * MAX_CERTIFICATE:
        raise NotVerified("chain.large", f"a chain of {len(text)} bytes; at most {MAX_CHAIN * MAX_CERTIFICATE}")
    if text.count("-----BEGIN") > MAX_CHAIN:
        raise NotVerified("chain.long", f"a chain has at most {MAX_CHAIN} certificates")
    try:
        certs = tuple(x509.load_pem_x509_certificates(text.encode("ascii")))
    except _UNREADABLE:
        raise NotVerified("chain.syntax", "the certificate chain cannot be read") from None
    return certs


def parse_der_chain(chain: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    """The same for DER certificates, as a TLS stack hands them over. Raises NotVerified ``chain.*``."""
    if not chain:
        raise NotVerified("chain.empty", "no certificate was presented")
    if len(chain) > MAX_CHAIN:
        raise NotVerified("chain.long", f"a chain has at most {MAX_CHAIN} certificates")
    if sum(map(len, chain)) > MAX_CHAIN * MAX_CERTIFICATE:
        raise NotVerified("chain.large", "the certificate chain is too large")
    try:
        return tuple(x509.load_der_x509_certificate(der) for der in chain)
    except _UNREADABLE:
        raise NotVerified("chain.syntax", "the certificate chain cannot be read") from None


# -- verification -----------------------------------------------------------------------------------------------------


def verify_chain(
    chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], trust_domain: TrustDomain, now: float,
    *, profile: Profile = ENDPOINT,
) -> Svid:  # fmt: skip
    """Verify a chain (leaf first, root optional) against the roots of one trust domain.

    `profile` only tells TLS leaves (ENDPOINT, WORKLOAD, SERVER are the same here) from those of another trust domain
    (FOREIGN) and from record signers (SIGNER).
    Raises NotVerified with one code a reason: ``chain.*`` for the shape of the input, ``cert.*`` for a rule broken,
    ``cert.untrusted`` when no path of valid signatures leads to a root.
    """
    if not chain:
        raise NotVerified("chain.empty", "no certificate was presented")
    if len(chain) > MAX_CHAIN:
        raise NotVerified("chain.long", f"a chain has at most {MAX_CHAIN} certificates")
    if not roots:
        raise NotVerified("chain.no_root", f"no root of {trust_domain} is known")
    leaf, others = chain[0], chain[1:]
    for cert in (*chain, *roots):
        _check_readable(cert)
    spiffe_id = _check_leaf(leaf, trust_domain, profile)
    for cert in (*others, *roots):
        _check_ca(cert, trust_domain)
    for cert in chain:
        _check_key_ids(cert, leaf=cert is leaf)
    for cert in chain:
        _check_time(cert, now)
    path = _find_path(leaf, others, roots, now)
    for cert, issuer in zip(path, path[1:], strict=False):
        if not_after(cert) > not_after(issuer):
            raise NotVerified("cert.outlives_issuer", "a certificate is valid for longer than its issuer")
        if not_before(cert) < not_before(issuer):
            raise NotVerified("cert.predates_issuer", "a certificate is older than its issuer")
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey)
    return Svid(spiffe_id, leaf, not_before(leaf), not_after(leaf), key, path)


def claimed_id(cert: x509.Certificate) -> SpiffeId:
    """The SPIFFE ID a certificate claims, not verified in any way. Raises NotVerified ``cert.san``, ``cert.spiffe_id``."""
    _check_readable(cert)
    uris = _uris(cert)
    if len(uris) != 1:
        raise NotVerified("cert.san", f"an SVID has exactly one URI name, not {len(uris)}")
    try:
        return SpiffeId.parse(uris[0])
    except BadInput as e:
        raise NotVerified("cert.spiffe_id", e.message) from None


def check_link(link: x509.Certificate, issuer: x509.Certificate, trust_domain: TrustDomain, now: float) -> None:
    """Does the root `issuer` vouch in this certificate for another root? Raises NotVerified ``cert.*``."""
    _check_readable(link)
    _check_ca(link, trust_domain)
    _check_time(link, now)
    try:
        link.verify_directly_issued_by(issuer)
    except _UNREADABLE:
        raise NotVerified("cert.link", "a root is vouched for by no root that is known") from None


def check_foreign_root(cert: x509.Certificate, trust_domain: TrustDomain, now: float) -> None:
    """Is this fit to be a root of another trust domain? Its name, when it has one, must be of that. Raises NotVerified."""
    check_root(cert, trust_domain, now)


def check_root(cert: x509.Certificate, trust_domain: TrustDomain, now: float) -> None:
    """Is this fit to be a root of the trust domain: an authority, self-signed, in its lifetime? Raises NotVerified."""
    _check_readable(cert)
    _check_ca(cert, trust_domain)
    _check_time(cert, now)
    try:
        cert.verify_directly_issued_by(cert)
    except _UNREADABLE:
        raise NotVerified("cert.not_root", "a root certificate must be signed by itself") from None


def _find_path(
    leaf: x509.Certificate, others: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: float
) -> tuple[x509.Certificate, ...]:
    # Extended key usage and SAN are ours to judge: the library has no notion of a record signer or of one URI.
    leaves = ExtensionPolicy.permit_all()
    authorities = ExtensionPolicy.webpki_defaults_ca().may_be_present(
        x509.SubjectAlternativeName, Criticality.AGNOSTIC, None
    )
    verifier = (
        PolicyBuilder()
        .store(Store(list(roots)))
        .time(_at(now))
        .max_chain_depth(MAX_CHAIN)
        .extension_policies(ca_policy=authorities, ee_policy=leaves)
        .build_client_verifier()
    )
    try:
        return tuple(verifier.verify(leaf, list(others)).chain)
    except (VerificationError, *_UNREADABLE):
        raise NotVerified("cert.untrusted", "the certificate chain does not lead to a trusted root") from None


def _check_readable(cert: x509.Certificate) -> None:
    """The library reads fields when they are asked for, so a hostile one would raise anywhere: ask for all here."""
    try:
        extensions = list(cert.extensions)
        _ = (list(cert.subject), list(cert.issuer), cert.not_valid_before_utc, cert.not_valid_after_utc)
        serial = cert.serial_number
    except _UNREADABLE:
        raise NotVerified("cert.syntax", "a field of a certificate cannot be read") from None
    if cert.public_bytes(Encoding.DER)[-len(cert.signature) - 1] != 0:
        # The signature's BIT STRING may not claim unused bits: the library ignores the claim.
        raise NotVerified("cert.syntax", "the signature of a certificate is not of whole bytes")
    if not 0 < serial < 1 << 159:  # RFC 5280 section 4.1.2.2: positive, at most 20 bytes
        raise NotVerified("cert.serial", "the serial number of a certificate is not positive, or is too long")
    for extension in extensions:
        if isinstance(extension.value, x509.NameConstraints):
            raise NotVerified("cert.name_constraints", "name constraints are not supported")
        # RFC 5280 section 4.2: to be refused when it is not processed, and what the library can read is not processed for that.
        if extension.critical and extension.oid not in _PROFILE_EXTENSIONS:
            raise NotVerified("cert.critical", "a certificate has a critical extension that is not known here")


def _check_time(cert: x509.Certificate, now: float) -> None:
    if now < not_before(cert):
        raise NotVerified(
            "cert.not_yet_valid", f"a certificate is not valid before {cert.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
            hint="compare the clocks of both machines",
        )  # fmt: skip
    if now > not_after(cert):
        raise NotVerified("cert.expired", f"a certificate expired at {cert.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")


def _usage(cert: x509.Certificate) -> frozenset[str]:
    try:
        usage = cert.extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound:
        raise NotVerified("cert.key_usage", "a certificate has no key usage") from None
    if not usage.critical:
        raise NotVerified("cert.key_usage", "the key usage of a certificate is not critical")
    return frozenset(name for name in _USAGE_BITS if getattr(usage.value, name))


def _uris(cert: x509.Certificate) -> list[str]:
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    if not names.critical and not list(cert.subject):
        raise NotVerified("cert.san", "the SAN of a certificate without a subject must be critical")
    return names.value.get_values_for_type(x509.UniformResourceIdentifier)


def _is_ca(cert: x509.Certificate) -> bool:
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _check_leaf(cert: x509.Certificate, trust_domain: TrustDomain, profile: Profile) -> SpiffeId:
    """X509-SVID section 5.2 and 4.3-4.4 for a leaf."""
    if _is_ca(cert):
        raise NotVerified("cert.leaf_is_ca", "a leaf certificate must not be an authority")
    more = _usage(cert) - _LEAF_USAGE
    if not _usage(cert) >= _LEAF_USAGE or (more and not (profile is FOREIGN and more <= _FOREIGN_USAGE)):
        raise NotVerified("cert.key_usage", "the key usage of a leaf is digitalSignature and nothing else")
    try:
        usages = frozenset(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        usages = frozenset()
    if profile.tls and not usages >= _TLS_USAGES:
        raise NotVerified("cert.extended_key_usage", "a TLS leaf needs the extended key usages serverAuth and clientAuth")
    if not profile.tls and usages:
        raise NotVerified("cert.extended_key_usage", "the certificate of a record key has no extended key usage")
    try:
        key: object = cert.public_key()
    except _UNREADABLE:
        key = None
    if not (leaf_key_allowed(key) if profile.tls else isinstance(key, Ed25519PublicKey)):
        raise NotVerified("cert.key", "a leaf has a kind of key that is not accepted here")
    spiffe_id = claimed_id(cert)
    if spiffe_id.trust_domain != trust_domain:
        raise NotVerified("cert.trust_domain", f"{spiffe_id} is not of the trust domain {trust_domain}")
    return spiffe_id


def _check_key_ids(cert: x509.Certificate, *, leaf: bool) -> None:
    """RFC 5280 sections 4.2.1.1 and 4.2.1.2: an issuer is named by its key (self-signed: need not), an authority names its own."""
    present = {e.oid: e.value for e in cert.extensions}
    issuer = present.get(ExtensionOID.AUTHORITY_KEY_IDENTIFIER)
    if cert.subject != cert.issuer and not (isinstance(issuer, x509.AuthorityKeyIdentifier) and issuer.key_identifier):
        raise NotVerified("cert.key_identifier", "a certificate does not say which key has issued it")
    if not leaf and ExtensionOID.SUBJECT_KEY_IDENTIFIER not in present:
        raise NotVerified("cert.key_identifier", "an authority has no key identifier")


def _check_ca(cert: x509.Certificate, trust_domain: TrustDomain) -> None:
    """X509-SVID section 5.1 and 4.1-4.3 for an authority."""
    if not _is_ca(cert):
        raise NotVerified("cert.not_ca", "an issuer in the chain is not an authority")
    usage = _usage(cert)
    if "key_cert_sign" not in usage or not usage <= _CA_USAGE | {"crl_sign", "digital_signature"}:
        raise NotVerified("cert.ca_key_usage", "the key usage of an authority must be certificate signing")
    try:
        key: object = cert.public_key()
    except _UNREADABLE:
        key = None
    if not ca_key_allowed(key):
        raise NotVerified("cert.ca_key", "an authority has a kind of key that is not accepted here")
    uris = _uris(cert)
    if len(uris) > 1 or (uris and uris[0] != f"spiffe://{trust_domain}"):
        raise NotVerified("cert.ca_name", f"an authority of {trust_domain} is named spiffe://{trust_domain} without a path")


def renew_at(svid: Svid, jitter: float) -> int:
    """When to renew: half of the lifetime, moved by up to a tenth of it. `jitter` is uniform in [-1, 1]."""
    life = timedelta(seconds=svid.not_after - svid.not_before)
    return int(svid.not_before + life.total_seconds() * (0.5 + 0.1 * max(-1.0, min(1.0, jitter))))
