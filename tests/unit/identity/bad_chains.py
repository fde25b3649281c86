"""Chains that must not pass, each with the code it must be refused with, and those that must.

Every case departs from the profile in one point; the signatures hold unless they are the point. `openssl` tells what
OpenSSL says of the same chain: "agrees" where the rule is one of RFC 5280 that both enforce, "laxer" where the rule is
SPIFFE's or our own, which OpenSSL does not know; "stricter" where it refuses for a reason that is not RFC 5280's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ObjectIdentifier

from identity import certs
from tests.unit.identity.conftest import NOW, Forge, Pair, lifetime, replace

Verdict = Literal["agrees", "laxer", "stricter"]
HOST = "spiffe://prod.example/host/web-1"


@dataclass
class Case:
    """`chain` is leaf first; `code` None for one that must pass."""

    name: str
    chain: list[x509.Certificate]
    code: str | None
    openssl: Verdict
    roots: list[x509.Certificate] | None = None
    now: float = NOW


def usage(**bits: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{n: bits.get(n, False) for n in names})


def uris(*names: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(n) for n in names])


def reading(der: bytes) -> x509.Certificate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns of what these cases are about
        return x509.load_der_x509_certificate(der)


# ---- DER by hand, for what the library would not write


def tlv(data: bytes, at: int) -> tuple[int, int, int]:
    """(tag, start of the value, end) of the element at `at`."""
    size, start = data[at + 1], at + 2
    if size & 0x80:
        count = size & 0x7F
        size, start = int.from_bytes(data[start : start + count], "big"), start + count
    return data[at], start, start + size


def wrap(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 128:
        return bytes([tag, size]) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + value


def items(value: bytes) -> list[bytes]:
    out, at = [], 0
    while at < len(value):
        _, _, end = tlv(value, at)
        out.append(value[at:end])
        at = end
    return out


def inside(element: bytes) -> bytes:
    _, start, end = tlv(element, 0)
    return element[start:end]


def resigned(forge: Forge, cert: x509.Certificate, change: Callable[[list[bytes]], list[bytes]], issuer: Pair | None = None) -> bytes:
    """The certificate with its TBS elements changed, signed again (P-256 or P-384 with its own digest)."""
    issuer = issuer or forge.intermediate
    tbs = wrap(0x30, b"".join(change(items(inside(cert.tbs_certificate_bytes)))))
    algorithm = items(inside(cert.public_bytes(Encoding.DER)))[1]
    assert isinstance(issuer.key, ec.EllipticCurvePrivateKey)
    digest: hashes.HashAlgorithm = hashes.SHA384() if isinstance(issuer.key.curve, ec.SECP384R1) else hashes.SHA256()
    return wrap(0x30, tbs + algorithm + wrap(3, b"\0" + issuer.key.sign(tbs, ec.ECDSA(digest))))


def set_item(number: int, value: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda parts: [*parts[:number], value, *parts[number + 1 :]]


def extensions(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[list[bytes]], list[bytes]]:
    def run(parts: list[bytes]) -> list[bytes]:
        listed = items(inside(inside(parts[-1])))
        return [*parts[:-1], wrap(0xA3, wrap(0x30, b"".join(change(listed))))]

    return run


def twin(cert: x509.Certificate) -> x509.Certificate:
    """The same certificate with the other valid form of its ECDSA signature: (r, n - s)."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    r, s = decode_dss_signature(cert.signature)
    parts = items(inside(cert.public_bytes(Encoding.DER)))
    return reading(wrap(0x30, parts[0] + parts[1] + wrap(3, b"\0" + encode_dss_signature(r, order - s))))


# ---- the cases


def cases(forge: Forge) -> Iterator[Case]:
    yield from good(forge)
    yield from leaves(forge)
    yield from authorities(forge)
    yield from times(forge)
    yield from paths(forge)
    yield from encodings(forge)


def good(forge: Forge) -> Iterator[Case]:
    inter = forge.intermediate.cert
    plain = forge.leaf()
    yield Case("a host", [plain.cert, inter], None, "agrees")
    yield Case("a host with its root", [plain.cert, inter, forge.root.cert], None, "agrees")
    yield Case("an Ed25519 leaf", [forge.leaf(key=Ed25519PrivateKey.generate()).cert, inter], None, "agrees")
    yield Case("a workload", [forge.leaf("spiffe://prod.example/wl/shop/api", profile=certs.WORKLOAD).cert, inter], None, "agrees")
    named = forge.leaf(change=lambda b: replace(b, x509.SubjectAlternativeName([
        x509.UniformResourceIdentifier(HOST), x509.DNSName("web-1.example")
    ]), x509.SubjectAlternativeName))  # fmt: skip
    yield Case("a DNS name beside the URI", [named.cert, inter], None, "agrees")
    yield Case("the twin of a signature", [twin(plain.cert), inter], None, "agrees")
    at_end = forge.leaf(now=NOW - certs.ENDPOINT_LIFETIME)
    yield Case("the last second", [at_end.cert, inter], None, "stricter")
    more = forge.authority(certs.INTERMEDIATE, ec.generate_private_key(ec.SECP256R1()), forge.root)
    yield Case("an authority of no use beside", [plain.cert, more.cert, inter], None, "agrees")


def leaves(forge: Forge) -> Iterator[Case]:
    inter = forge.intermediate.cert

    def leaf(name: str, code: str, openssl: Verdict, kind: type[x509.ExtensionType], value: Any, critical: bool = True) -> Case:
        made = forge.leaf(change=lambda b: replace(b, value, kind, critical))
        return Case(name, [made.cert, inter], code, openssl)

    ku, eku, san, bc = x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName, x509.BasicConstraints
    yield leaf("no key usage", "cert.key_usage", "laxer", ku, None)
    yield leaf("key usage not critical", "cert.key_usage", "laxer", ku, usage(digital_signature=True), False)
    yield leaf("no digitalSignature", "cert.key_usage", "laxer", ku, usage(key_agreement=True))
    yield leaf("keyCertSign on a leaf", "cert.key_usage", "laxer", ku, usage(digital_signature=True, key_cert_sign=True))
    yield leaf("cRLSign on a leaf", "cert.key_usage", "laxer", ku, usage(digital_signature=True, crl_sign=True))
    yield leaf("keyEncipherment on a leaf", "cert.key_usage", "laxer", ku, usage(digital_signature=True, key_encipherment=True))
    yield leaf("no extended key usage", "cert.extended_key_usage", "laxer", eku, None)
    yield leaf("serverAuth only", "cert.extended_key_usage", "laxer", eku, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    yield leaf("clientAuth only", "cert.extended_key_usage", "laxer", eku, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
    yield leaf("codeSigning only", "cert.extended_key_usage", "laxer", eku, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
    yield leaf("any usage", "cert.extended_key_usage", "laxer", eku, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), False)
    yield leaf("an authority as leaf", "cert.leaf_is_ca", "laxer", bc, x509.BasicConstraints(True, None))
    yield leaf("no SAN", "cert.san", "laxer", san, None)
    yield leaf("SAN not critical without subject", "cert.san", "laxer", san, uris(HOST), False)
    yield leaf("DNS names only", "cert.san", "laxer", san, x509.SubjectAlternativeName([x509.DNSName("a.example")]))
    yield leaf("two URIs", "cert.san", "laxer", san, uris(HOST, "spiffe://prod.example/host/web-2"))
    yield leaf("the same URI twice", "cert.san", "laxer", san, uris(HOST, HOST))
    yield leaf("a web page beside", "cert.san", "laxer", san, uris(HOST, "https://prod.example/"))
    for what, uri in (
        ("https", "https://prod.example/host/web-1"), ("no path", "spiffe://prod.example"), ("root path", "spiffe://prod.example/"),
        ("trailing slash", HOST + "/"), ("empty segment", "spiffe://prod.example//host/web-1"), ("dot", "spiffe://prod.example/./web-1"),
        ("dot dot", "spiffe://prod.example/host/../admin"), ("percent", "spiffe://prod.example/host/%77eb-1"),
        ("port", "spiffe://prod.example:443/host/web-1"), ("user", "spiffe://u@prod.example/host/web-1"), ("query", HOST + "?a"),
        ("fragment", HOST + "#a"), ("upper case domain", "spiffe://PROD.example/host/web-1"), ("no domain", "spiffe:///host/web-1"),
        ("not a URI", "host/web-1"), ("empty", ""), ("long", "spiffe://prod.example/" + "a" * 2048), ("space", HOST + " "),
        ("scheme in capitals", "SPIFFE://prod.example/host/web-1"),
    ):  # fmt: skip
        code = "cert.spiffe_id"
        yield leaf(f"URI: {what}", code, "laxer", san, uris(uri))
    yield leaf("another trust domain", "cert.trust_domain", "laxer", san, uris("spiffe://other.example/host/web-1"))
    yield leaf("a longer trust domain", "cert.trust_domain", "laxer", san, uris("spiffe://prod.example.evil/host/web-1"))
    own = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
    made = forge.leaf(change=lambda b: b.add_extension(own, critical=True))
    yield Case("an unknown critical extension", [made.cert, inter], "cert.critical", "agrees")
    made = forge.leaf(change=lambda b: replace(b, None, x509.AuthorityKeyIdentifier))
    yield Case("no authority key identifier", [made.cert, inter], "cert.key_identifier", "laxer")
    serial = x509.AuthorityKeyIdentifier(None, [x509.DNSName("a")], 5)
    made = forge.leaf(change=lambda b: replace(b, serial, x509.AuthorityKeyIdentifier, False))
    yield Case("an issuer named by its serial number", [made.cert, inter], "cert.key_identifier", "stricter")
    # Known to the library, so never "unknown" to it, and processed by nobody.
    access = x509.AuthorityInformationAccess([x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.DNSName("a"))])
    for name, ignored, verdict in (("authority information access", access, "agrees"), ("precertificate poison", x509.PrecertPoison(), "agrees"),
                                   ("policies", x509.CertificatePolicies([x509.PolicyInformation(ObjectIdentifier("1.2.3"), None)]), "laxer")):  # fmt: skip
        made = forge.leaf(change=lambda b, ignored=ignored: b.add_extension(ignored, critical=True))
        yield Case(f"critical {name}", [made.cert, inter], "cert.critical", verdict)
    made = forge.leaf(change=lambda b: b.add_extension(x509.NameConstraints([x509.DNSName("a")], None), critical=True))
    yield Case("name constraints on a leaf", [made.cert, inter], "cert.name_constraints", "laxer")
    for name, key in (
        ("P-384", ec.generate_private_key(ec.SECP384R1())), ("P-521", ec.generate_private_key(ec.SECP521R1())),
        ("secp256k1", ec.generate_private_key(ec.SECP256K1())), ("RSA 2048", rsa.generate_private_key(65537, 2048)),
        ("RSA 1024", rsa.generate_private_key(65537, 1024)),
    ):  # fmt: skip
        changed = forge.leaf(change=lambda b, key=key: rekeyed(b, key))
        yield Case(f"a leaf key of {name}", [changed.cert, inter], "cert.key", "laxer")


def rekeyed(builder: x509.CertificateBuilder, key: Any) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        builder._issuer_name, builder._subject_name, key.public_key(), builder._serial_number, builder._not_valid_before,
        builder._not_valid_after, builder._extensions,
    )  # fmt: skip


def authorities(forge: Forge) -> Iterator[Case]:
    def under(name: str, code: str, openssl: Verdict, change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder]) -> Case:
        key = ec.generate_private_key(ec.SECP256R1())
        made = Pair(forge.sign(change(forge.builder(certs.INTERMEDIATE, key, forge.root)), forge.root.key), key)
        return Case(name, [forge.leaf(issuer=made).cert, made.cert], code, openssl)

    ku, san, bc = x509.KeyUsage, x509.SubjectAlternativeName, x509.BasicConstraints
    sign = usage(key_cert_sign=True)
    yield under("an issuer that is no authority", "cert.not_ca", "agrees", lambda b: replace(b, x509.BasicConstraints(False, None), bc))
    yield under("no basic constraints", "cert.not_ca", "agrees", lambda b: replace(b, None, bc))
    yield under("basic constraints not critical", "cert.untrusted", "laxer", lambda b: replace(b, x509.BasicConstraints(True, 0), bc, False))
    yield under("no keyCertSign", "cert.ca_key_usage", "agrees", lambda b: replace(b, usage(crl_sign=True), ku))
    key = ec.generate_private_key(ec.SECP256R1())
    draft = forge.builder(certs.INTERMEDIATE, key, forge.root)
    nameless = forge.sign(replace(draft, None, x509.SubjectKeyIdentifier), forge.root.key)
    whole = Pair(forge.sign(draft, forge.root.key), key)
    yield Case("an issuer without key identifier", [forge.leaf(issuer=whole).cert, nameless], "cert.key_identifier", "laxer")
    yield under("an issuer that names no issuer", "cert.key_identifier", "laxer", lambda b: replace(b, None, x509.AuthorityKeyIdentifier))
    yield under("an issuer without key usage", "cert.key_usage", "laxer", lambda b: replace(b, None, ku))
    yield under("an issuer's key usage not critical", "cert.key_usage", "laxer", lambda b: replace(b, sign, ku, False))
    yield under("an issuer for encipherment", "cert.ca_key_usage", "laxer", lambda b: replace(b, usage(key_cert_sign=True, key_encipherment=True), ku))
    yield under("a path in an authority's name", "cert.ca_name", "laxer", lambda b: replace(b, uris("spiffe://prod.example/ca"), san, False))
    yield under("an authority of another domain", "cert.ca_name", "laxer", lambda b: replace(b, uris("spiffe://other.example"), san, False))
    yield under("two names of an authority", "cert.ca_name", "laxer", lambda b: replace(b, uris("spiffe://prod.example", "spiffe://prod.example"), san, False))
    allowed = x509.NameConstraints([x509.UniformResourceIdentifier("prod.example")], None)
    yield under("URI name constraints that would hold", "cert.name_constraints", "laxer", lambda b: b.add_extension(allowed, critical=True))
    other = x509.NameConstraints([x509.UniformResourceIdentifier("other.example")], None)
    yield under("URI name constraints that do not", "cert.name_constraints", "agrees", lambda b: b.add_extension(other, critical=True))
    unknown = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.2"), b"\x05\x00")
    yield under("an issuer's unknown critical extension", "cert.critical", "agrees", lambda b: b.add_extension(unknown, critical=True))
    for name, key in (
        ("Ed25519", Ed25519PrivateKey.generate()), ("P-521", ec.generate_private_key(ec.SECP521R1())),
        ("secp256k1", ec.generate_private_key(ec.SECP256K1())), ("RSA 2048", rsa.generate_private_key(65537, 2048)),
    ):  # fmt: skip
        base = forge.builder(certs.INTERMEDIATE, ec.generate_private_key(ec.SECP256R1()), forge.root)
        made = Pair(forge.sign(rekeyed(base, key), forge.root.key), key)  # type: ignore[arg-type]  # RSA too
        built = forge.builder(certs.ENDPOINT, ec.generate_private_key(ec.SECP256R1()), made, HOST)
        digest = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
        yield Case(f"an issuer key of {name}", [built.sign(key, digest), made.cert], "cert.ca_key", "laxer")


def times(forge: Forge) -> Iterator[Case]:
    inter = forge.intermediate.cert
    leaf = forge.leaf().cert
    end = NOW + certs.ENDPOINT_LIFETIME
    yield Case("a second too late", [leaf, inter], "cert.expired", "agrees", now=end + 1)
    yield Case("a second too early", [leaf, inter], "cert.not_yet_valid", "agrees", now=NOW - certs.BACKDATE - 1)
    backwards = forge.leaf(change=lambda b: lifetime(b, NOW - 60, NOW - 1)).cert
    yield Case("over", [backwards, inter], "cert.expired", "agrees")
    far = forge.leaf(change=lambda b: lifetime(b, NOW + 3600, NOW + 7200)).cert
    yield Case("of the future", [far, inter], "cert.not_yet_valid", "agrees")
    outlives = forge.leaf(change=lambda b: lifetime(b, NOW - 60, certs.not_after(inter) + 1)).cert
    yield Case("it outlives its issuer", [outlives, inter], "cert.outlives_issuer", "laxer")
    predates = forge.leaf(change=lambda b: lifetime(b, certs.not_before(inter) - 1, NOW + 60)).cert
    yield Case("it is older than its issuer", [predates, inter], "cert.predates_issuer", "laxer")
    key = ec.generate_private_key(ec.SECP256R1())
    dead = Pair(forge.sign(lifetime(forge.builder(certs.INTERMEDIATE, key, forge.root), NOW - 900, NOW - 1), forge.root.key), key)
    under = forge.leaf(issuer=dead, change=lambda b: lifetime(b, NOW - 900, NOW + 60)).cert
    yield Case("its issuer is over", [under, dead.cert], "cert.expired", "agrees")
    root_key = ec.generate_private_key(ec.SECP384R1())
    old_root = Pair(forge.sign(lifetime(forge.builder(certs.ROOT, root_key, None), NOW - 900, NOW - 1), root_key), root_key)
    mid_key = ec.generate_private_key(ec.SECP256R1())
    mid = Pair(forge.sign(lifetime(forge.builder(certs.INTERMEDIATE, mid_key, old_root), NOW - 900, NOW + 60), root_key), mid_key)
    below = forge.leaf(issuer=mid, change=lambda b: lifetime(b, NOW - 900, NOW + 60)).cert
    yield Case("the root is over", [below, mid.cert], "cert.untrusted", "agrees", roots=[old_root.cert])


def paths(forge: Forge) -> Iterator[Case]:
    inter, leaf = forge.intermediate.cert, forge.leaf().cert
    other = Forge()
    yield Case("another root", [leaf, inter], "cert.untrusted", "agrees", roots=[other.root.cert])
    yield Case("a rogue authority of the same name", [other.leaf().cert, other.intermediate.cert, other.root.cert], "cert.untrusted", "agrees")
    yield Case("no intermediate", [leaf], "cert.untrusted", "agrees")
    yield Case("somebody's intermediate", [leaf, other.intermediate.cert], "cert.untrusted", "agrees")
    yield Case("no root known", [leaf, inter], "chain.no_root", "agrees", roots=[])
    yield Case("nothing", [], "chain.empty", "agrees")
    yield Case("too many", [leaf, inter, inter, inter, inter], "chain.long", "laxer")
    yield Case("a leaf issued by a leaf", [forge.leaf(issuer=Pair(leaf, forge.intermediate.key)).cert, leaf, inter], "cert.not_ca", "agrees")
    deep_key = ec.generate_private_key(ec.SECP256R1())
    deep = forge.authority(certs.INTERMEDIATE, deep_key, forge.intermediate)
    yield Case("below an authority of path length 0", [forge.leaf(issuer=deep).cert, deep.cert, inter], "cert.untrusted", "agrees")
    direct = forge.leaf(issuer=forge.root).cert
    yield Case("a leaf as its own root", [direct], "cert.not_ca", "agrees", roots=[direct])
    stolen = Pair(inter, ec.generate_private_key(ec.SECP256R1()))
    yield Case("signed by another key", [forge.leaf(issuer=stolen).cert, inter], "cert.untrusted", "agrees")
    yield Case("the links are the wrong way round", [inter, leaf], "cert.leaf_is_ca", "laxer")
    alone_key = ec.generate_private_key(ec.SECP256R1())
    selfish = forge.leaf(key=alone_key, issuer=Pair(inter, alone_key)).cert
    yield Case("self-signed", [selfish, inter], "cert.untrusted", "agrees")


def encodings(forge: Forge) -> Iterator[Case]:
    inter, leaf = forge.intermediate.cert, forge.leaf().cert
    while leaf.signature[-1] & 1:  # one case claims that the last bit is not used; then it must be zero
        leaf = forge.leaf().cert

    def changed(name: str, code: str, openssl: Verdict, change: Callable[[list[bytes]], list[bytes]]) -> Case | None:
        try:
            cert = reading(resigned(forge, leaf, change))
        except (ValueError, x509.InvalidVersion):
            return None  # not readable at all: parse_der_chain is tested with the bytes
        return Case(name, [cert, inter], code, openssl)

    made = [
        changed("a negative serial", "cert.serial", "laxer", set_item(1, bytes.fromhex("02 01 80"))),
        changed("serial zero", "cert.serial", "laxer", set_item(1, bytes.fromhex("02 01 00"))),
        changed("a serial of 21 bytes", "cert.serial", "laxer", set_item(1, wrap(2, b"\x01" + b"\x00" * 20))),
        changed("the same extension twice", "cert.syntax", "agrees", extensions(lambda e: [*e, e[0]])),
        changed("a version 1 certificate with extensions", "cert.untrusted", "laxer", lambda p: p[1:]),
        changed("a version 1 certificate", "cert.key_usage", "laxer", lambda p: p[1:-1]),
        changed("version 4", "cert.syntax", "laxer", set_item(0, bytes.fromhex("a0 03 02 01 03"))),
        changed("no extensions", "cert.key_usage", "laxer", lambda p: p[:-1]),
        changed("basic constraints of garbage", "cert.syntax", "agrees", extensions(lambda e: [wrap(0x30, bytes.fromhex("0603551d13") + wrap(4, b"\x01")), *e[1:]])),
    ]  # fmt: skip
    yield from (case for case in made if case is not None)
    parts = items(inside(leaf.public_bytes(Encoding.DER)))
    for name, signature in (("a cut signature", inside(parts[2])[:-2]), ("an empty signature", b"\0"), ("a signature of zeros", bytes(65))):
        yield Case(name, [reading(wrap(0x30, parts[0] + parts[1] + wrap(3, signature))), inter], "cert.untrusted", "agrees")
    flipped = bytearray(parts[2])
    flipped[-1] ^= 1
    yield Case("one bit of the signature", [reading(wrap(0x30, parts[0] + parts[1] + bytes(flipped))), inter], "cert.untrusted", "agrees")
    loose = bytearray(parts[2])
    loose[2] = 1
    yield Case("a signature of broken bytes", [reading(wrap(0x30, parts[0] + parts[1] + bytes(loose))), inter], "cert.syntax", "stricter")
    sha1 = bytes.fromhex("300906072a8648ce3d0401")
    weak = items(inside(leaf.tbs_certificate_bytes))
    tbs = wrap(0x30, b"".join([*weak[:2], sha1, *weak[3:]]))
    assert isinstance(forge.intermediate.key, ec.EllipticCurvePrivateKey)
    signature = forge.intermediate.key.sign(tbs, ec.ECDSA(hashes.SHA1()))
    yield Case("signed over SHA-1", [reading(wrap(0x30, tbs + sha1 + wrap(3, b"\0" + signature))), inter], "cert.untrusted", "laxer")
    mixed = wrap(0x30, leaf.tbs_certificate_bytes + sha1 + wrap(3, b"\0" + leaf.signature))
    yield Case("two signature algorithms", [reading(mixed), inter], "cert.untrusted", "agrees")

