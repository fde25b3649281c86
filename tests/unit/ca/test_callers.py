"""A chain that was verified counts for its own bytes, under its own bundle, in its own time, and for nothing else."""

from __future__ import annotations

import pytest

from ca.callers import Callers
from ca.plane import Plane
from identity.bundle import TrustBundle
from identity.errors import NotVerified


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which a chain was really verified."""
    real, times = TrustBundle.verify_svid, []

    def counted(self: TrustBundle, chain, now, expect=None):
        times.append(now)
        return real(self, chain, now, expect)

    monkeypatch.setattr(TrustBundle, "verify_svid", counted)
    return times


def test_the_same_bytes_are_verified_once(plane: Plane, enrol, clock, count) -> None:
    a, b, known, trust = enrol(plane, "a"), enrol(plane, "b"), Callers(), plane.trust
    count.clear()
    first = known.verify(a.der, trust, clock())
    assert known.verify(a.der, trust, clock() + 60) is first
    assert known.verify(b.der, trust, clock()).spiffe_id.name == "b"
    assert len(count) == 2


def test_cut_swapped_and_changed_chains_are_verified_anew(plane: Plane, enrol, clock) -> None:
    a, b, known, trust = enrol(plane, "a"), enrol(plane, "b"), Callers(), plane.trust
    known.verify(a.der, trust, clock())
    known.verify(b.der, trust, clock())
    spoilt = a.der[0][:-1] + bytes([a.der[0][-1] ^ 1])
    joined = [a.der[0] + a.der[1]]  # the same bytes without their border
    for chain in ([], a.der[:1], a.der[::-1], [spoilt, *a.der[1:]], joined, [b.der[0]]):
        with pytest.raises(NotVerified):
            known.verify(chain, trust, clock())


def test_time_and_another_bundle_end_it(plane: Plane, enrol, clock, count) -> None:
    a, known, trust = enrol(plane, "a"), Callers(), plane.trust
    svid = known.verify(a.der, trust, clock())
    count.clear()
    for now in (svid.not_after + 1, svid.not_before - 3600):
        with pytest.raises(NotVerified):
            known.verify(a.der, trust, now)
    assert len(count) == 2
    plane._trust = None
    assert plane.trust is not trust
    known.verify(a.der, plane.trust, clock())
    assert len(count) == 3


def test_a_revoked_host_is_out_at_once(plane: Plane, enrol) -> None:
    a = enrol(plane, "a")
    assert plane.caller(a.der)[0].name == "a"
    assert plane.believes(a.der)
    plane.registry.revoke("a", plane.now, "test")
    with pytest.raises(Exception, match="revoked"):
        plane.caller(a.der)
