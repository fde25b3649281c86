from __future__ import annotations

from identity.wire import flows as wire
from mesh import summaries
from mesh.summaries import Summaries
from policy.flows import FlowSummary


def row(port: int, verdict: str = "allow", count: int = 1, **more) -> FlowSummary:
    return FlowSummary("shop/web", "shop/api", 6, port, verdict, "r1", count, first=5, last=9, **more)


def test_batches_denials_first_and_back_again() -> None:
    kept = Summaries()
    kept.collect([row(n) for n in range(1, wire.MAX + 51)])
    kept.collect([row(9, "deny", 3), row(9, "deny", 2)])
    batch = kept.take()
    assert len(batch) == wire.MAX
    assert (batch[0].verdict, batch[0].count, batch[0].rule) == ("deny", 5, "r1")
    assert len(kept) == 51
    kept.give_back(batch)
    kept.collect([row(1)])
    again = kept.take() + kept.take()
    assert len(again) == wire.MAX + 51
    assert next(one.count for one in again if one.port == 1) == 2
    assert not len(kept)


def test_what_cannot_be_told_stays_out(monkeypatch) -> None:
    kept = Summaries()
    kept.collect([row(1, count=0), FlowSummary("x" * 300, "y", 6, 1, "allow", count=1), FlowSummary("x", "y", 300, 1, "allow", count=1)])
    assert len(kept) == 0
    kept.collect([FlowSummary("x", "y", 1, None, "audit", count=1, first=9, last=3)])
    (one,) = kept.take()
    assert (one.port, one.first, one.last) == (0, 9, 9)
    monkeypatch.setattr(summaries, "MAX_KEPT", 2)
    kept.collect([row(1), row(2), row(3, count=7), row(1)])
    assert (len(kept), kept.dropped) == (2, 7)
