"""Callers of other trust domains: an SVID, the bundle of its own domain, and the caller of the configuration that it is.

There is one store for each trust domain and never a common one: which bundle counts is told by the SPIFFE ID that is
claimed, and under it the claim then has to hold. So an authority that we federate with speaks for its own names alone.
Pure: no socket, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from gateway.config import Caller
from identity import certs
from identity.bundle import TrustBundle
from identity.errors import NotVerified
from identity.names import TrustDomain
from identity.records import ForeignBundle
from policy import foreign
from policy.evaluate import matches

Bundles = Mapping[str, ForeignBundle]  # by trust domain


def roots_of(bundles: Bundles, trust_domain: str) -> tuple[x509.Certificate, ...]:
    """The roots of another trust domain. Raises NotVerified ``federation.unknown``, ``federation.revoked``."""
    bundle = bundles.get(trust_domain)
    if bundle is None:
        raise NotVerified("federation.unknown", f"there is no federation with {ascii(trust_domain)[:80]}")
    if not bundle.roots:
        raise NotVerified("federation.revoked", f"{trust_domain} has revoked all of its roots")
    return tuple(cert for text in bundle.roots for cert in certs.parse_chain(text))


def roots_pem(bundles: Bundles, trust_domain: str) -> str:
    """The same for a TLS library; empty when there is none."""
    bundle = bundles.get(trust_domain)
    return "".join(bundle.roots) if bundle is not None else ""


def verify(chain: Sequence[x509.Certificate], trust: TrustBundle, bundles: Bundles, now: float) -> certs.Svid:
    """The SVID of another trust domain (leaf first). `trust` is ours: what it has blocked stays out under any roof.

    Raises NotVerified: ``chain.*``, ``cert.*``, ``federation.own`` for an ID of ours, ``federation.unknown``,
    ``federation.revoked``, ``federation.expired`` when no root of the bundle is in its lifetime.
    """
    if not chain:
        raise NotVerified("chain.empty", "no certificate was presented")
    domain = certs.claimed_id(chain[0]).trust_domain
    if domain == trust.trust_domain:
        raise NotVerified("federation.own", "an identity of our own trust domain is no foreign one")
    roots = roots_of(bundles, domain.name)
    if not any(certs.not_before(r) <= now <= certs.not_after(r) for r in roots):
        raise NotVerified("federation.expired", f"no root of {domain} is valid now")
    known = {root.fingerprint(hashes.SHA256()) for root in roots}
    sent = [c for c in chain if c.fingerprint(hashes.SHA256()) not in known]
    svid = certs.verify_chain(sent, roots, TrustDomain(domain.name), now, profile=certs.FOREIGN)
    trust.blocked.check(svid.chain, svid.spiffe_id)
    return svid


def caller_of(callers: Sequence[Caller], svid: certs.Svid) -> Caller:
    """Who it is here: the entry that names it, else the one with the longest path above it. Raises NotVerified
    ``federation.caller``.
    """
    one = foreign.subject(str(svid.spiffe_id))
    found = [(text, c) for c in callers for text in c.federated if matches(foreign.selector(text), one)]
    if not found:
        raise NotVerified("federation.caller", f"{svid.spiffe_id} is no caller of this gateway")
    return max(found, key=lambda f: (not f[0].endswith(foreign.BELOW), len(f[0])))[1]
