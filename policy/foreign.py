"""Identities of other trust domains in a policy: ``spiffe://other.example/shop/web`` and ``spiffe://other.example/shop/*``.

A foreign subject is called by its SPIFFE ID and carries no label: what another authority says of it is nobody's word here.
No selector that is written for our own workloads selects it, "*" least of all; it enters only by being named, as a source.
The names of our own workloads have no colon, so the two kinds cannot be taken for each other.
"""

from __future__ import annotations

from typing import Final

from identity.errors import BadInput
from identity.names import SpiffeId, TrustDomain
from policy.program import FOREIGN, AllOf, AnyOf, Named, Not, Selector, Subject, Under

BELOW: Final = "/*"
EVERY: Final = Under(FOREIGN.removesuffix("//") + "/")  # every foreign subject, and no other


def is_foreign(text: str) -> bool:
    """Is this the name of a foreign subject, or a selector of some?"""
    return text.startswith(FOREIGN)


def subject(text: str) -> Subject:
    """The subject of a foreign SPIFFE ID. Raises BadInput."""
    name = str(SpiffeId.parse(text))
    return Subject(name, {}, name)


def subject_beside(text: str, own: str) -> Subject | None:
    """The same, seen from the trust domain `own`: None for an ID of that. Raises BadInput."""
    return None if SpiffeId.parse(text).trust_domain.name == own else subject(text)


def selector(text: str) -> Selector:
    """One identity, or with ``/*`` all that lie below a path (not what stands at it). Raises BadInput."""
    if not text.endswith(BELOW):
        return Named(frozenset((str(SpiffeId.parse(text)),)))
    head = text.removesuffix(BELOW)
    domain, slash, path = head.removeprefix(FOREIGN).partition("/")
    if not slash:
        return Under(f"{FOREIGN}{TrustDomain(domain)}")
    if not path:
        raise BadInput("name.spiffe_id", f"not a SPIFFE ID: {ascii(text)[:80]}")
    at = str(SpiffeId.parse(head))
    return AllOf((Under(at), Not(Named(frozenset((at,))))))


def trust_domains(one: Selector) -> frozenset[str]:
    """The trust domains of the foreign identities that a selector names."""
    if isinstance(one, Named):
        found = {name for name in one.names if is_foreign(name)}
    elif isinstance(one, Under):
        found = {one.prefix} if is_foreign(one.prefix) else set()
    elif isinstance(one, Not):
        return trust_domains(one.term)
    elif isinstance(one, AllOf | AnyOf):
        return frozenset().union(*(trust_domains(term) for term in one.terms))
    else:
        return frozenset()
    return frozenset(name.removeprefix(FOREIGN).partition("/")[0] for name in found)
