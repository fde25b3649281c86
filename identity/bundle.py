"""The trust bundle: what an endpoint believes. Opened from a root pin, then only replaced by what it already trusts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from identity import certs, records
from identity.errors import BadInput, NotVerified
from identity.names import SpiffeId, TrustDomain
from identity.records import BundleRecord, JwtAuthority, Payload, SignerChain, Taint
from identity.revocation import BlockList, spki_hash

P = TypeVar("P", bound=Payload)


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """Verified roots and record keys of one trust domain. `keys` maps a role to the keys that may sign for it.

    blocked: certificates and keys that are out; tainted: authorities whose certificates are to be renewed.
    """

    trust_domain: TrustDomain
    sequence: int
    issued: int
    roots: tuple[x509.Certificate, ...]
    keys: Mapping[str, tuple[Ed25519PublicKey, ...]]
    envelope: str
    blocked: BlockList = field(default_factory=BlockList)
    tainted: tuple[Taint, ...] = ()
    jwt_authorities: tuple[JwtAuthority, ...] = ()

    def verify(self, kind: type[P], envelope: str) -> P:
        """The payload of a record signed by a key of the kind's role. Raises NotVerified ``record.*``."""
        return records.verify(kind, envelope, self.keys.get(kind.role, ()), trust_domain=self.trust_domain.name)

    def verify_svid(
        self, chain: str | Sequence[str] | Sequence[x509.Certificate], now: float, expect: SpiffeId | None = None
    ) -> certs.Svid:
        """A verified TLS leaf; `chain` is PEM or parsed, leaf first. Raises NotVerified ``chain.*``, ``cert.*`` (one that
        is blocked: ``cert.revoked``), ``svid.name`` when it is not `expect`.
        """
        svid = certs.verify_chain(_certificates(chain), self.roots, self.trust_domain, now)
        self.blocked.check(svid.chain, svid.spiffe_id)
        if expect is not None and svid.spiffe_id != expect:
            raise NotVerified("svid.name", f"the certificate is of {svid.spiffe_id}, not of {expect}")
        return svid

    def accept_next(self, envelope: str, now: float) -> TrustBundle:
        """The newer bundle, when its records signer chains to a root trusted here, or to one that such a root vouches
        for, and its sequence is not lower. Who was blocked here signs no bundle any more.

        Raises NotVerified; this bundle then stays in force.
        """
        newer = open_bundle(envelope, self.roots, self.trust_domain, now, blocked=self.blocked)
        if newer.sequence < self.sequence:
            raise NotVerified("bundle.rollback", f"a bundle with sequence {newer.sequence} after {self.sequence}")
        return newer

    def taint_of(self, chain: Sequence[x509.Certificate]) -> Taint | None:
        """The taint that a chain (leaf first, issuers at least) hangs from; None when it is sound."""
        if not self.tainted:
            return None
        keys = {spki_hash(cert) for cert in chain}
        return min((t for t in self.tainted if t.key in keys), key=lambda t: t.until, default=None)

    def fingerprints(self) -> frozenset[str]:
        """Fingerprints of the roots, lower-case hex SHA-256."""
        return frozenset(map(certs.fingerprint, self.roots))

    def roots_pem(self) -> str:
        """The roots as one PEM text."""
        return "".join(map(certs.pem, self.roots))


def open_bundle(
    envelope: str, trusted: str | Sequence[x509.Certificate], trust_domain: TrustDomain, now: float,
    *, blocked: BlockList | None = None,
) -> TrustBundle:  # fmt: skip
    """Open a bundle on the strength of a root fingerprint (hex SHA-256) or of roots trusted already.

    The record names its own signers, so it is read once without belief: every root must be trusted already or be vouched
    for, over any number of links, by one that is; a records signer must chain to such a root; then the envelope must
    hold under that signer's key. Only a root's key makes another root: a records key that leaked cannot.
    Raises NotVerified ``bundle.*``, ``record.*``, ``chain.*`` or ``cert.*``.
    """
    claimed = records.unverified(BundleRecord, envelope, trust_domain=trust_domain.name)
    claimed_roots = tuple(map(_root, claimed.roots))
    if isinstance(trusted, str):
        anchors = tuple(root for root in claimed_roots if certs.fingerprint(root) == trusted)
        if not anchors:
            raise NotVerified(
                "bundle.root", "the bundle does not hold the pinned root",
                hint="the CA is not the one the fingerprint was taken from",
            )  # fmt: skip
    else:
        anchors = tuple(trusted)
    try:
        barred = BlockList.parse(claimed.revoked)
    except BadInput as e:
        raise NotVerified("bundle.revoked", e.message) from None
    barred = barred if blocked is None else barred.union(blocked)
    anchors = _linked(claimed, claimed_roots, anchors, trust_domain, now, blocked or BlockList())
    keys = _anchored_keys(claimed, anchors, trust_domain, now, barred)
    record = records.verify(BundleRecord, envelope, keys, trust_domain=trust_domain.name)
    for root in claimed_roots:
        certs.check_root(root, trust_domain, now)
        if root not in anchors:
            raise NotVerified("bundle.root_link", "a new root of the bundle is vouched for by no root that is known")
    by_role: dict[str, tuple[Ed25519PublicKey, ...]] = dict.fromkeys(certs.SIGNER_ROLES, ())
    for signer in record.signers:
        by_role[signer.role] += (_signer_key(signer, claimed_roots, trust_domain, now, barred),)
    return TrustBundle(
        trust_domain, record.sequence, record.issued, claimed_roots, by_role, envelope, BlockList.parse(record.revoked),
        tuple(record.tainted), tuple(record.jwt_authorities),
    )  # fmt: skip


def _linked(
    claimed: BundleRecord, roots: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate],
    trust_domain: TrustDomain, now: float, blocked: BlockList,
) -> tuple[x509.Certificate, ...]:  # fmt: skip
    """The anchors and every root of the record that they vouch for, over any number of links.

    The receiver's own block list counts: a root that it was told to refuse vouches for nobody.
    """
    known = list(anchors)
    waiting = [_root(text) for text in claimed.links]
    found = True
    while found:
        found = False
        for link in waiting:
            if any(_vouches(k, link, trust_domain, now) for k in known if spki_hash(k) not in blocked.keys):
                known.append(link)
                waiting.remove(link)
                found = True
                break
    vouched = {(cert.subject, spki_hash(cert)) for cert in known[len(anchors) :]}
    return (*anchors, *(root for root in roots if root not in anchors and (root.subject, spki_hash(root)) in vouched))


def _vouches(known: x509.Certificate, link: x509.Certificate, trust_domain: TrustDomain, now: float) -> bool:
    if link.issuer != known.subject:
        return False
    try:
        certs.check_link(link, known, trust_domain, now)
    except NotVerified:
        return False
    return True


def _anchored_keys(
    claimed: BundleRecord, anchors: Sequence[x509.Certificate], trust_domain: TrustDomain, now: float, blocked: BlockList
) -> list[Ed25519PublicKey]:
    keys, why = [], NotVerified("bundle.no_signer", "the bundle names no key that signs records")
    for signer in claimed.signers:
        if signer.role == BundleRecord.role:
            try:
                keys.append(_signer_key(signer, anchors, trust_domain, now, blocked))
            except NotVerified as e:
                why = e
    if not keys:
        raise why
    return keys


def _signer_key(
    signer: SignerChain, roots: Sequence[x509.Certificate], trust_domain: TrustDomain, now: float, blocked: BlockList
) -> Ed25519PublicKey:
    svid = certs.verify_chain(certs.parse_chain(signer.chain), roots, trust_domain, now, profile=certs.SIGNER)
    blocked.check(svid.chain, svid.spiffe_id)
    if svid.spiffe_id.segments != ("cp", signer.role):
        raise NotVerified("bundle.signer_name", f"{svid.spiffe_id} may not sign as {signer.role}")
    assert isinstance(svid.public_key, Ed25519PublicKey)
    return svid.public_key


def _root(text: str) -> x509.Certificate:
    parsed = certs.parse_chain(text)
    if len(parsed) != 1:
        raise NotVerified("bundle.roots", "each root of a bundle is one certificate")
    return parsed[0]


def _certificates(chain: str | Sequence[str] | Sequence[x509.Certificate]) -> Sequence[x509.Certificate]:
    if isinstance(chain, str):
        return certs.parse_chain(chain)
    parsed = [c for c in chain if isinstance(c, x509.Certificate)]
    texts = [c for c in chain if isinstance(c, str)]
    return parsed if parsed and not texts else certs.parse_chain(texts)
