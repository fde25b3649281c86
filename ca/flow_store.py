"""What endpoints report of the flows they carried, one row a flow without its source port, and what they refused.

A report is believed about the reporter's own ends only: a summary with neither end placed on the reporter is dropped and
counted. Bounded: at most MAX_EDGES flows are kept (those seen longest ago go first), at most MAX_DENIALS refused flows
of one endpoint in one rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select, update

from ca.schema import flow_denials, flow_edges, instances
from identity.wire.flows import FlowSummary
from policy.flows import Edge, Seen
from policy.ports import PORTED
from policy.replay import Recording

MAX_EDGES: Final = 200_000
MAX_DENIALS: Final = 500
MAX_SKEW: Final = 300  # seconds that a reporter's clock may be ahead of ours
SOURCE: Final = 1
DESTINATION: Final = 2
_Row = tuple[str, str, int, int]


@dataclass(frozen=True, slots=True)
class Noted:
    """What became of a report: summaries taken, and dropped because they were about others' ends or impossible."""

    taken: int
    foreign: int


@dataclass(frozen=True, slots=True)
class Denial:
    """One refused flow of a rollout. `endpoints` reported it; `seen` is what was recorded before, with the ends that did."""

    edge: Edge
    endpoints: tuple[str, ...]
    count: int
    last: int
    seen: Seen | None
    ends: int


def note(tx: Connection, endpoint: str, flows: Sequence[FlowSummary], now: int, rollout: tuple[str, int] | None) -> Noted:
    """Keep what one endpoint reports. `rollout`: the one that is running and since when; refused flows belong to it."""
    if not flows:
        return Noted(0, 0)
    held = set(tx.execute(select(instances.c.name).where(instances.c.endpoint == endpoint).distinct()).scalars())
    taken = foreign = 0
    for one in flows:
        ends = (SOURCE if one.src in held else 0) | (DESTINATION if one.dst in held else 0)
        if not ends or one.first > one.last or one.last > now + MAX_SKEW or (one.proto in PORTED) != (one.port > 0):
            foreign += 1
            continue
        if one.verdict == "deny":
            if rollout is not None and one.last >= rollout[1]:
                _denied(tx, endpoint, one, rollout[0])
        else:
            _seen(tx, one, ends)
        taken += 1
    _prune(tx)
    return Noted(taken, foreign)


def _key(one: FlowSummary) -> _Row:
    return (one.src, one.dst, one.proto, one.port)


def _seen(tx: Connection, one: FlowSummary, ends: int) -> None:
    c = flow_edges.c
    here = (c.src == one.src) & (c.dst == one.dst) & (c.proto == one.proto) & (c.port == one.port)
    old = tx.execute(select(c.first, c.last, c.times, c.ends).where(here)).first()
    if old is None:
        values = dict(zip(("src", "dst", "proto", "port"), _key(one), strict=True))
        tx.execute(insert(flow_edges).values(**values, first=one.first, last=one.last, times=one.count, ends=ends))
        return
    tx.execute(
        update(flow_edges).where(here).values(
            first=min(old.first, one.first), last=max(old.last, one.last), times=min(old.times + one.count, 1 << 60),
            ends=old.ends | ends,
        )
    )  # fmt: skip


def _denied(tx: Connection, endpoint: str, one: FlowSummary, rollout: str) -> None:
    c = flow_denials.c
    mine = (c.rollout == rollout) & (c.endpoint == endpoint)
    here = mine & (c.src == one.src) & (c.dst == one.dst) & (c.proto == one.proto) & (c.port == one.port)
    old = tx.execute(select(c.first, c.last, c.times).where(here)).first()
    if old is not None:
        tx.execute(update(flow_denials).where(here).values(last=max(old.last, one.last), times=min(old.times + one.count, 1 << 60)))
        return
    if tx.execute(select(func.count()).select_from(flow_denials).where(mine)).scalar_one() >= MAX_DENIALS:
        return
    values = dict(zip(("src", "dst", "proto", "port"), _key(one), strict=True))
    tx.execute(
        insert(flow_denials).values(rollout=rollout, endpoint=endpoint, **values, first=one.first, last=one.last, times=one.count)
    )


def _prune(tx: Connection) -> None:
    over = tx.execute(select(func.count()).select_from(flow_edges)).scalar_one() - MAX_EDGES
    if over > 0:
        at = tx.execute(select(flow_edges.c.last).order_by(flow_edges.c.last).offset(over).limit(1)).scalar_one()
        tx.execute(delete(flow_edges).where(flow_edges.c.last < at))


def recording(tx: Connection, now: int, since: int = 0) -> Recording:
    """All that was reported as forwarded and last seen at or after `since`."""
    c = flow_edges.c
    rows = tx.execute(select(c.src, c.dst, c.proto, c.port, c.first, c.last, c.times).where(c.last >= since))
    return Recording(
        {(r.src, r.dst, r.proto, r.port or None): Seen(count=r.times, first=r.first, last=r.last) for r in rows}, now
    )


def denials(tx: Connection, rollout: str, started: int) -> list[Denial]:
    """The refused flows of a rollout, each with what had been seen of it before it started."""
    c = flow_denials.c
    found: dict[_Row, list[tuple[str, int, int]]] = {}
    for r in tx.execute(select(c.src, c.dst, c.proto, c.port, c.endpoint, c.last, c.times).where(c.rollout == rollout)):
        found.setdefault((r.src, r.dst, r.proto, r.port), []).append((r.endpoint, r.last, r.times))
    e = flow_edges.c
    out = []
    for (src, dst, proto, port), reports in sorted(found.items()):
        here = (e.src == src) & (e.dst == dst) & (e.proto == proto) & (e.port == port) & (e.first < started)
        before = tx.execute(select(e.first, e.last, e.times, e.ends).where(here)).first()
        out.append(
            Denial(
                (src, dst, proto, port or None), tuple(sorted(name for name, _, _ in reports)),
                sum(count for *_, count in reports), max(last for _, last, _ in reports),
                Seen(count=before.times, first=before.first, last=before.last) if before is not None else None,
                before.ends if before is not None else 0,
            )
        )  # fmt: skip
    return out
