"""Recorded flows: JSON lines, one flow (or one period of a flow) a line, with names for its ends.

    {"time": 1928534400, "src": "shop/web", "dst": "shop/api", "proto": "tcp", "port": 8443,
     "packets": 12, "bytes": 9000, "verdict": "allow"}

time is in seconds since the epoch (or an instant such as 2031-02-11T18:00Z); proto is a name or a number; port is left
out for protocols without ports; packets and bytes may be left out. Keys that this version does not know are passed over.

verdict is allow, deny, or audit: forwarded, but denied once its audit ends. What an agent records says more:
    first                        the first time it was seen in this record; `time` is the last
    count                        connections (or refused attempts) this record stands for
    by                           the rule that allowed, denied or would deny it; "default"; left out when not known;
                                 "idle:RULE" with deny: a permitted flow that had been silent for that rule's idle timeout
    src_instance, dst_instance   which instance; left out where the end is an address that no known workload has
    host                         the endpoint that recorded it
    src_process, dst_process     who used the socket at an end on that host: {"executable", "unit", "uid"}; what could
                                 not be found out is "unknown"
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from identity.errors import BadInput
from policy.ports import MAX_PORT, PORTED, proto_name, proto_number
from policy.windows import parse_instant

MAX_LINE: Final = 64 * 1024  # characters
MAX_NAME: Final = 512
MAX_COUNT: Final = 1 << 63
MAX_TIME: Final = 253_402_300_799  # the end of the year 9999
_HINT: Final = "a line holds time, src, dst, proto, port, packets, bytes and verdict"

Verdict = Literal["allow", "deny", "audit"]
VERDICTS: Final[tuple[Verdict, ...]] = ("allow", "deny", "audit")
UNKNOWN: Final = "unknown"
IDLE: Final = "idle:"  # how `by` begins for a flow that was ended because it had fallen silent


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """Who used a socket. `executable` is a path and `unit` a systemd unit or control group; each may be "unknown"."""

    executable: str = UNKNOWN
    unit: str = UNKNOWN
    uid: int | None = None


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """One recorded flow. `port` is the destination's, None for protocols without ports; `time` in seconds (the last
    time it was seen; `first` is None where only one instant is known).
    """

    time: int
    src: str
    dst: str
    proto: int
    port: int | None
    packets: int = 0
    bytes: int = 0
    verdict: Verdict = "allow"
    first: int | None = None
    count: int = 1
    by: str = ""
    src_instance: int | None = None
    dst_instance: int | None = None
    host: str = ""
    src_process: ProcessInfo | None = None  # None: this end is not on the recording host
    dst_process: ProcessInfo | None = None

    @property
    def started(self) -> int:
        """The first time it was seen."""
        return self.time if self.first is None else self.first


@dataclass(frozen=True, slots=True)
class FlowSummary:
    """What many records of one kind say together: one row of an upload. Instances, processes and hosts are left out.

    first, last: seconds since the epoch; count: connections or refused attempts; `by` as in FlowRecord.
    """

    src: str
    dst: str
    proto: int
    port: int | None
    verdict: Verdict
    by: str = ""
    count: int = 0
    packets: int = 0
    bytes: int = 0
    first: int = 0
    last: int = 0


def summarize(records: Iterable[FlowRecord]) -> list[FlowSummary]:
    """One row per (source, destination, protocol, port, verdict, by), the most frequent first."""
    rows: dict[tuple[object, ...], FlowSummary] = {}
    for one in records:
        key = (one.src, one.dst, one.proto, one.port, one.verdict, one.by)
        old = rows.get(key)
        if old is None:
            old = FlowSummary(one.src, one.dst, one.proto, one.port, one.verdict, one.by, first=one.started)
        rows[key] = replace(
            old, count=old.count + one.count, packets=old.packets + one.packets, bytes=old.bytes + one.bytes,
            first=min(old.first, one.started), last=max(old.last, one.time),
        )  # fmt: skip
    return sorted(rows.values(), key=lambda r: (-r.count, r.src, r.dst, r.proto, r.port or 0, r.verdict, r.by))


def read_flows(file: str, lines: Iterable[str]) -> list[FlowRecord]:
    """The records of a file; empty lines are passed over. Raises BadInput with file and line; then none may be used."""
    return [_record(f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _record(where: str, line: str) -> FlowRecord:
    if len(line) > MAX_LINE:
        raise _bad(where, f"the line is longer than {MAX_LINE} characters")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise _bad(where, "not a line of JSON") from None
    if not isinstance(row, dict):
        raise _bad(where, "a flow is a map")
    for key in ("time", "src", "dst", "proto", "verdict"):
        if key not in row:
            raise _bad(where, f"the flow has no {key}")
    for key in ("src", "dst"):
        if not isinstance(row[key], str) or not 0 < len(row[key]) <= MAX_NAME:
            raise _bad(where, f"{key} is not a name: {ascii(row[key])[:60]}")
    if row["verdict"] not in VERDICTS:
        raise _bad(where, f"verdict is allow, deny or audit, not {ascii(row['verdict'])[:40]}")
    try:
        time = parse_instant(row["time"]) if isinstance(row["time"], str) else _count(where, row, "time")
        proto = proto_number(row["proto"] if isinstance(row["proto"], str | int) else "")
    except BadInput as error:
        raise error if error.code == "flows.line" else _bad(where, error.message) from None
    if time > MAX_TIME:
        raise _bad(where, f"time is beyond the year 9999: {time}")
    first = _count(where, row, "first") if "first" in row else None
    return FlowRecord(
        time, row["src"], row["dst"], proto, _port(where, row, proto), _count(where, row, "packets"),
        _count(where, row, "bytes"), row["verdict"], first, _count(where, row, "count") if "count" in row else 1,
        _text(where, row, "by"), _instance(where, row, "src_instance"), _instance(where, row, "dst_instance"),
        _text(where, row, "host"), _process(where, row, "src_process"), _process(where, row, "dst_process"),
    )  # fmt: skip


def _text(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise _bad(where, f"{key} is not a short text: {ascii(value)[:60]}")
    return value


def _instance(where: str, row: dict[str, Any], key: str) -> int | None:
    return None if row.get(key) is None else _count(where, row, key)


def _process(where: str, row: dict[str, Any], key: str) -> ProcessInfo | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _bad(where, f"{key} is not a map")
    uid = None if value.get("uid") in (None, UNKNOWN) else _count(where, value, "uid")
    texts = [_text(where, {name: UNKNOWN, **value}, name) or UNKNOWN for name in ("executable", "unit")]
    return ProcessInfo(texts[0], texts[1], uid)


def _port(where: str, row: dict[str, Any], proto: int) -> int | None:
    port = row.get("port")
    if proto not in PORTED:
        if port is not None:
            raise _bad(where, f"{proto_name(proto)} has no ports")
        return None
    if type(port) is not int or not 1 <= port <= MAX_PORT:
        raise _bad(where, f"{proto_name(proto)} needs a port from 1 to {MAX_PORT}, not {ascii(port)[:40]}")
    return port


def _count(where: str, row: dict[str, Any], key: str) -> int:
    value = row.get(key, 0)
    whole = int(value) if isinstance(value, float) and 0 <= value < MAX_COUNT else value
    if type(whole) is not int or not 0 <= whole < MAX_COUNT:
        raise _bad(where, f"{key} is not a whole number: {ascii(value)[:40]}")
    return whole


def _bad(where: str, message: str) -> BadInput:
    return BadInput("flows.line", f"{where}: {message}", hint=_HINT)


def dump_flows(records: Iterable[FlowRecord]) -> str:
    """Lines that `read_flows` reads back to equal records."""
    out = []
    for one in records:
        row: dict[str, Any] = {
            "time": one.time,
            "src": one.src,
            "dst": one.dst,
            "proto": proto_name(one.proto),
        }
        if one.port is not None:
            row["port"] = one.port
        row |= {"packets": one.packets, "bytes": one.bytes, "verdict": one.verdict}
        out.append(json.dumps(row | _more(one)) + "\n")
    return "".join(out)


def _more(one: FlowRecord) -> dict[str, Any]:
    """What an agent records beyond the plain flow; only what says something."""
    given = {"first": one.first, "by": one.by or None, "src_instance": one.src_instance, "dst_instance": one.dst_instance,
             "host": one.host or None}  # fmt: skip
    row: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if one.count != 1:
        row["count"] = one.count
    for key, process in (("src_process", one.src_process), ("dst_process", one.dst_process)):
        if process is not None:
            uid = UNKNOWN if process.uid is None else process.uid
            row[key] = {"executable": process.executable, "unit": process.unit, "uid": uid}
    return row


@dataclass(slots=True)
class Seen:
    """How often something was recorded, and when."""

    count: int = 0
    packets: int = 0
    bytes: int = 0
    first: int = 0
    last: int = 0

    def add(self, one: FlowRecord) -> None:
        """Count one record."""
        self.first = one.time if not self.count else min(self.first, one.time)
        self.last = one.time if not self.count else max(self.last, one.time)
        self.count, self.packets, self.bytes = (
            self.count + 1, self.packets + one.packets, self.bytes + one.bytes
        )  # fmt: skip

    def merge(self, other: Seen) -> None:
        """Count all that another counted."""
        if other.count:
            self.first = other.first if not self.count else min(self.first, other.first)
            self.last = other.last if not self.count else max(self.last, other.last)
        self.count, self.packets, self.bytes = (
            self.count + other.count, self.packets + other.packets, self.bytes + other.bytes
        )  # fmt: skip


Edge = tuple[str, str, int, int | None]  # src, dst, protocol, port


def edges(records: Iterable[FlowRecord]) -> dict[Edge, Seen]:
    """Distinct flows with their counts, in a fixed order."""
    out: dict[Edge, Seen] = {}
    for one in records:
        out.setdefault((one.src, one.dst, one.proto, one.port), Seen()).add(one)
    return dict(sorted(out.items(), key=lambda item: (*item[0][:3], item[0][3] or 0)))
