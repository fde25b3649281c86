"""A chain that was verified counts for its own bytes, under its own bundle, in its own time, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from cryptography import x509

from ca.callers import Callers
from ca.plane import Plane
from identity import certs
from identity.bundle import TrustBundle
from identity.errors import NotVerified, RetinueError
from identity.names import SpiffeId
from identity.revocation import BlockList
from tests.unit.ca.conftest import Clock, Joined

Enrol = Callable[..., Joined]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which a chain was really verified."""
    real, times = TrustBundle.verify_svid, []

    def counted(self: TrustBundle, chain: Sequence[x509.Certificate], now: float, expect: SpiffeId | None = None) -> certs.Svid:
        times.append(now)
        return real(self, chain, now, expect)

    monkeypatch.setattr(TrustBundle, "verify_svid", counted)
    return times


def test_the_same_bytes_are_verified_once(plane: Plane, enrol: Enrol, clock: Clock, count: list[float]) -> None:
    a, b, known, trust = enrol(plane, "a"), enrol(plane, "b"), Callers(), plane.trust
    count.clear()
    first = known.verify(a.der, trust, clock())
    assert known.verify(a.der, trust, clock() + 60) is first
    assert known.verify(b.der, trust, clock()).spiffe_id.name == "b"
    assert len(count) == 2


def test_cut_swapped_and_changed_chains_are_verified_anew(plane: Plane, enrol: Enrol, clock: Clock) -> None:
    a, b, known, trust = enrol(plane, "a"), enrol(plane, "b"), Callers(), plane.trust
    known.verify(a.der, trust, clock())
    known.verify(b.der, trust, clock())
    spoilt = a.der[0][:-1] + bytes([a.der[0][-1] ^ 1])
    joined = [a.der[0] + a.der[1]]  # the same bytes without their border
    for chain in ([], a.der[:1], a.der[::-1], [spoilt, *a.der[1:]], joined, [b.der[0]]):
        with pytest.raises(NotVerified):
            known.verify(chain, trust, clock())


def test_time_and_other_roots_end_it(plane: Plane, enrol: Enrol, clock: Clock, count: list[float]) -> None:
    a, known, trust = enrol(plane, "a"), Callers(), plane.trust
    caller = known.verify(a.der, trust, clock())
    count.clear()
    for now in (caller.not_after + 1, caller.not_before - 3600):
        with pytest.raises(NotVerified):
            known.verify(a.der, trust, now)
    assert len(count) == 2
    with pytest.raises(NotVerified):
        known.verify(a.der, replace(trust, roots=()), clock())
    assert len(count) == 3


@pytest.mark.parametrize("what", ["key", "serial", "issuer", "identity"])
def test_what_is_revoked_is_out_without_verifying_anew(plane: Plane, enrol: Enrol, clock: Clock, count: list[float], what: str) -> None:
    a, b, known, trust = enrol(plane, "a"), enrol(plane, "b"), Callers(), plane.trust
    caller = known.verify(a.der, trust, clock())
    known.verify(b.der, trust, clock())
    leaf, issuer = map(certs.revocation_id, certs.parse_der_chain(a.der)[:2])
    blocked = {
        "key": BlockList(keys=frozenset({leaf.spki})), "issuer": BlockList(keys=frozenset({issuer.spki})),
        "serial": BlockList(serials=frozenset({(leaf.issuer, leaf.serial)})),
        "identity": BlockList(identities={str(caller.spiffe_id): caller.not_before + 1}),
    }[what]  # fmt: skip
    count.clear()
    later = replace(trust, blocked=blocked)
    with pytest.raises(NotVerified) as e:
        known.verify(a.der, later, clock())
    assert e.value.code == "cert.revoked"
    with pytest.raises(NotVerified):
        later.verify_svid(certs.parse_der_chain(a.der), clock())  # what it stands for says the same
    if what != "issuer":
        assert known.verify(b.der, later, clock()).spiffe_id.name == "b"
    assert len(count) == 1


def test_a_revoked_host_is_out_at_once(plane: Plane, enrol: Enrol) -> None:
    a = enrol(plane, "a")
    assert plane.caller(a.der)[0].name == "a"
    assert plane.believes(a.der)
    plane.registry.revoke("a", plane.now, "test")
    with pytest.raises(RetinueError, match="revoked"):
        plane.caller(a.der)
