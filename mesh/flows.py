"""Flows as this host sees them: names for addresses, the verdict with its rule, and a bounded table of records. Pure.

    Directory   address -> instance, and what the policy in force says of a flow; made anew at every applied change
    FlowTable   records by (source, destination, protocol, port, verdict); the oldest make room, and are counted
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from mesh.netfilter import Conversation
from mesh.plan import Plan
from mesh.snapshot import InstanceKey, Snapshot
from policy.evaluate import bounds, evaluate, matches
from policy.flows import IDLE, UNKNOWN, FlowRecord, FlowSummary, ProcessInfo, Verdict, summarize
from policy.ports import ICMP, ICMPV6, PORTED
from policy.program import Alert, Program, Subject

RECORDS: Final = 4096  # of one verdict
PER_SOURCE: Final = 1500  # refused flows that one source may fill the table with
SUMMARIES: Final = 4096
_VERDICTS: Final = 20_000  # remembered answers of the evaluator


@dataclass(frozen=True, slots=True)
class End:
    """One end of a flow. An address that no known workload has is its own name."""

    name: str
    instance: int | None = None
    subject: Subject | None = None
    local: InstanceKey | None = None  # where it is attached here

    @property
    def known(self) -> bool:
        return self.subject is not None


class Directory:
    """What this host knows at one applied state."""

    def __init__(self, host: str, plan: Plan, snapshot: Snapshot, program: Program | None) -> None:
        self.host, self.program = host, program
        self._plan, self._snapshot = plan, snapshot
        self._verdicts: dict[tuple[str, str, int, int | None], tuple[Verdict, str]] = {}

    @cached_property
    def _ends(self) -> dict[str, End]:
        found: dict[str, End] = {}
        local = {a: key for key, at in self._plan.attachments.items() for a in at.addresses}
        for record in self._snapshot.placements.values():
            if record.state != "active":
                continue
            subject = Subject(record.name, dict(record.labels), record.spiffe_id)
            for address in record.addresses:
                found[address] = End(record.name, record.instance, subject, local.get(address))
        for address, key in local.items():  # prepared ones
            name, _, number = key.rpartition("/")
            found.setdefault(address, End(name, int(number), None, key))
        return found

    def end(self, address: str) -> End:
        """Who has an address; an unknown one is named by itself."""
        return self._ends.get(address) or End(address)

    def knows(self, flow: Conversation) -> bool:
        """Is an end of the flow ours to record?"""
        return flow.src in self._ends or flow.dst in self._ends

    def verdict(self, flow: Conversation) -> tuple[Verdict, str]:
        """What the policy in force says of the flow, and by what. An unknown end is permitted nothing."""
        port = flow.dport if flow.proto in PORTED else None
        key = (flow.src, flow.dst, flow.proto, port)
        if (known := self._verdicts.get(key)) is not None:
            return known
        one, other = self.end(flow.src).subject, self.end(flow.dst).subject
        found: tuple[Verdict, str] = ("deny", "default")
        if one is not None and other is not None and self.program is not None:
            decision = evaluate(self.program, one, other, flow.proto, port)
            found = ("audit" if decision.audited else decision.verdict, decision.by)
        if len(self._verdicts) >= _VERDICTS:
            self._verdicts.clear()
        self._verdicts[key] = found
        return found

    def idle(self, flow: Conversation) -> str:
        """``idle:`` and the rule whose idle timeout ends the flow; empty when none does."""
        one, other = self.end(flow.src).subject, self.end(flow.dst).subject
        if one is None or other is None or self.program is None:
            return ""
        found = (b.rule for b in bounds(self.program, one, other) if b.idle_timeout is not None and b.ports.allows(flow.proto, flow.dport))
        return next((IDLE + rule for rule in found), "")

    def alerts(self, record: FlowRecord, flow: Conversation) -> Iterator[Alert]:
        """Whom a refused flow is told to: one alert a sink, of the first segment by name that asks for it."""
        told = set()
        subjects = [s for a in (flow.src, flow.dst) if (s := self.end(a).subject) is not None]
        for alert in self.program.alerts if self.program is not None and record.verdict == "deny" else ():
            if alert.sink not in told and any(matches(alert.concerns, s) for s in subjects):
                told.add(alert.sink)
                yield alert


@dataclass(slots=True)
class _Entry:
    record: FlowRecord
    told: FlowRecord | None = None  # as last taken
    looks: int = 0  # searches for the processes at its ends
    look_at: int = 0  # Unix seconds: no search before


_Key = tuple[str, int | None, str, int | None, int, int | None, Verdict, str]


def _key(record: FlowRecord) -> _Key:
    return (record.src, record.src_instance, record.dst, record.dst_instance, record.proto, record.port, record.verdict, record.by)


def unnamed(record: FlowRecord) -> tuple[bool, bool]:
    """(source, destination): is that end here, with a process that is not known yet?"""
    one, other = record.src_process, record.dst_process
    return one is not None and one.executable == UNKNOWN, other is not None and other.executable == UNKNOWN


class FlowTable:
    """Records of what was seen since the start; `evicted` counts those that had to make room."""

    def __init__(self, *, size: int = RECORDS) -> None:
        self.size = size
        self.evicted = 0
        self._tables: dict[Verdict, OrderedDict[_Key, _Entry]] = {v: OrderedDict() for v in ("allow", "deny", "audit")}
        self._of_source: dict[str, int] = {}  # refused ones
        self._pending: list[FlowRecord] = []  # evicted before they were taken
        self._summaries: dict[tuple[object, ...], FlowSummary] = {}

    def add(
        self, now: int, directory: Directory, flow: Conversation, verdict: Verdict, by: str, *,
        count: int = 0, packets: int = 0, size: int = 0,
    ) -> tuple[FlowRecord, bool]:  # fmt: skip
        """Count something of a flow; returns its record, and whether that is new. Port 0 stays out of the record."""
        one, other = directory.end(flow.src), directory.end(flow.dst)
        proto = ICMP if flow.proto == ICMPV6 else flow.proto
        port = flow.dport if flow.proto in PORTED and flow.dport else None
        if flow.proto in PORTED and port is None:
            proto, port = 255, None  # nobody may use port 0, and no record can say it
        key = (one.name, one.instance, other.name, other.instance, proto, port, verdict, by)
        table = self._tables[verdict]
        entry = table.get(key)
        fresh = entry is None
        if entry is None:
            self._make_room(table, verdict, one.name)
            record = FlowRecord(
                now, one.name, other.name, proto, port, verdict=verdict, first=now, count=0, by=by,
                src_instance=one.instance, dst_instance=other.instance, host=directory.host,
                src_process=ProcessInfo() if one.local else None, dst_process=ProcessInfo() if other.local else None,
            )  # fmt: skip
            entry = table[key] = _Entry(record)
            if verdict == "deny":
                self._of_source[one.name] = self._of_source.get(one.name, 0) + 1
        old = entry.record
        entry.record = replace(
            old, time=max(old.time, now), count=old.count + count, packets=old.packets + packets, bytes=old.bytes + size
        )
        table.move_to_end(key)
        return entry.record, fresh

    def _make_room(self, table: OrderedDict[_Key, _Entry], verdict: Verdict, source: str) -> None:
        if verdict == "deny" and self._of_source.get(source, 0) >= PER_SOURCE:
            # A flood pushes out its own records, not those of others.
            self._drop(table, next(key for key in table if key[0] == source))
        elif len(table) >= self.size:
            self._drop(table, next(iter(table)))

    def _drop(self, table: OrderedDict[_Key, _Entry], key: _Key) -> None:
        entry = table.pop(key)
        if key[6] == "deny":
            self._of_source[key[0]] -= 1
            if not self._of_source[key[0]]:
                del self._of_source[key[0]]
        self.evicted += 1
        rest = _since(entry)
        if rest is not None and len(self._pending) < self.size:
            self._pending.append(rest)

    def look(self, record: FlowRecord, now: int) -> bool:
        """Is it time to search for a process at an end of the record? A yes counts: each next one comes twice as late.

        One search is not enough: the socket may be closed, or the machine too busy, before anybody looks.
        """
        entry = self._tables[record.verdict].get(_key(record))
        if entry is None or now < entry.look_at or not any(unnamed(entry.record)):
            return False
        entry.looks += 1
        entry.look_at = now + (1 << min(entry.looks, 12))
        return True

    def name_process(self, record: FlowRecord, *, source: bool, found: ProcessInfo) -> None:
        """Who used the socket at an end of a record."""
        entry = self._tables[record.verdict].get(_key(record))
        if entry is not None:
            entry.record = replace(entry.record, src_process=found) if source else replace(entry.record, dst_process=found)

    def records(self) -> list[FlowRecord]:
        """All records, the newest last."""
        return sorted((e.record for t in self._tables.values() for e in t.values()), key=lambda r: r.time)

    def take(self) -> list[FlowRecord]:
        """What was counted since the last call, as records that add up; oldest first."""
        out, self._pending = self._pending, []
        for table in self._tables.values():
            for entry in table.values():
                rest = _since(entry)
                if rest is not None:
                    out.append(rest)
                    entry.told = entry.record
        for row in summarize(out):
            self._summarize(row)
        return sorted(out, key=lambda r: r.time)

    def _summarize(self, row: FlowSummary) -> None:
        key = (row.src, row.dst, row.proto, row.port, row.verdict, row.by)
        old = self._summaries.get(key)
        if old is not None:
            row = replace(row, count=old.count + row.count, packets=old.packets + row.packets, bytes=old.bytes + row.bytes,
                          first=min(old.first, row.first), last=max(old.last, row.last))  # fmt: skip
        elif len(self._summaries) >= SUMMARIES:
            self.evicted += 1
            return
        self._summaries[key] = row

    def take_summary(self, limit: int = SUMMARIES) -> list[FlowSummary]:
        """Summaries since the last call, the most frequent first; what exceeds `limit` stays for the next."""
        rows = sorted(self._summaries.values(), key=lambda r: (-r.count, r.src, r.dst, r.proto, r.port or 0, r.verdict, r.by))
        kept = rows[:limit]
        for row in kept:
            del self._summaries[row.src, row.dst, row.proto, row.port, row.verdict, row.by]
        return kept

    def give_back(self, rows: Iterable[FlowSummary]) -> None:
        """Summaries that could not be delivered."""
        for row in rows:
            self._summarize(row)


def _since(entry: _Entry) -> FlowRecord | None:
    """What came since the entry was last taken."""
    now, old = entry.record, entry.told
    if old is None:
        return now
    if now == old:
        return None
    return replace(now, first=min(now.time, old.time + 1), count=now.count - old.count, packets=now.packets - old.packets,
                   bytes=now.bytes - old.bytes)  # fmt: skip


class Accounts:
    """The kernel's own counts of noted flows, turned into what is new since they were last read."""

    def __init__(self) -> None:
        self._known: dict[Conversation, int] | None = None  # None: nothing was read yet

    def logged(self, flow: Conversation) -> None:
        """A packet of the flow was counted already."""
        if self._known is None:
            self._known = {}
        flow = replace(flow, sport=0)
        self._known[flow] = self._known.get(flow, 0) + 1

    def news(self, counts: Iterable[tuple[Conversation, int]]) -> Iterator[tuple[Conversation, int]]:
        """(flow, packets that were not counted yet). The first reading of a table from before counts nothing."""
        first, old = self._known is None, self._known or {}
        fresh: dict[Conversation, int] = {}
        for flow, packets in counts:
            fresh[flow] = packets
            before = old.get(flow, 0)
            # Fewer than before: the kernel had forgotten the flow and begun again.
            new = packets - before if packets >= before else packets
            if new and not first:
                yield flow, new
        self._known = fresh
