from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from policy.flows import FlowRecord, ProcessInfo, Seen, dump_flows, edges, read_flows, summarize

ROW: dict[str, Any] = {"time": 1928534400, "src": "shop/web", "dst": "shop/api", "proto": "tcp", "port": 8443,
                       "packets": 12, "bytes": 9000, "verdict": "allow"}  # fmt: skip
numbers = st.integers(0, (1 << 63) - 1)
times = st.integers(0, 253_402_300_799)
names = st.text(min_size=1, max_size=20)
records = st.one_of(
    st.builds(FlowRecord, times, names, names, st.sampled_from((6, 17, 132)), st.integers(1, 65535), numbers, numbers, st.sampled_from(("allow", "deny"))),
    st.builds(FlowRecord, times, names, names, st.sampled_from((1, 47, 0)), st.none(), numbers, numbers, st.sampled_from(("allow", "deny"))),
)


@given(st.lists(records))
def test_what_is_written_reads_back(found: list[FlowRecord]) -> None:
    text = dump_flows(found)
    assert read_flows("f", text.split("\n")) == found
    assert dump_flows(read_flows("f", text.split("\n"))) == text


def test_the_documented_line() -> None:
    assert read_flows("f", [json.dumps(ROW), "", "  \n"]) == [
        FlowRecord(1928534400, "shop/web", "shop/api", 6, 8443, 12, 9000, "allow")
    ]
    short = {"time": "2031-02-11T18:00Z", "src": "a", "dst": "b", "proto": 58, "verdict": "deny", "later": [1]}
    assert read_flows("f", [json.dumps(short)]) == [FlowRecord(1928599200, "a", "b", 1, None, 0, 0, "deny")]
    assert read_flows("f", [json.dumps({**ROW, "time": 12.75})])[0].time == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"time": None}, "time is not a whole number"),
        ({"time": -1}, "time is not a whole number"),
        ({"time": 1e300}, "time is not a whole number"),
        ({"time": 253_402_300_800}, "beyond the year 9999"),
        ({"time": True}, "time is not a whole number"),
        ({"time": "soon"}, "not an instant"),
        ({"src": ""}, "src is not a name"),
        ({"dst": "x" * 513}, "dst is not a name"),
        ({"dst": 7}, "dst is not a name"),
        ({"proto": "carrier-pigeon"}, "not a protocol"),
        ({"proto": 256}, "not a protocol"),
        ({"proto": None}, "not a protocol"),
        ({"port": 0}, "tcp needs a port from 1 to 65535, not 0"),
        ({"port": 65536}, "tcp needs a port"),
        ({"port": None}, "tcp needs a port"),
        ({"port": True}, "tcp needs a port"),
        ({"port": "80"}, "tcp needs a port"),
        ({"proto": "icmp"}, "icmp has no ports"),
        ({"bytes": "many"}, "bytes is not a whole number"),
        ({"packets": 1 << 63}, "packets is not a whole number"),
        ({"verdict": "maybe"}, "verdict is allow, deny or audit, not 'maybe'"),
        ({"verdict": []}, "verdict is allow, deny or audit"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as error:
        read_flows("flows.jsonl", [json.dumps(ROW), json.dumps({**ROW, **change})])
    assert error.value.code == "flows.line"
    assert error.value.message.startswith("flows.jsonl:2: ")
    assert words in error.value.message


@pytest.mark.parametrize("line", ["{", "[1]", "x" * 70_000, "[" * 5000, "{}", '{"time": 1, "src": "a", "dst": "b", "proto": "tcp"}'])
def test_lines_that_are_no_flow(line: str) -> None:
    with pytest.raises(BadInput, match="f:1: ") as error:
        read_flows("f", [line])
    assert error.value.hint


def test_edges_count_and_date() -> None:
    found = edges([FlowRecord(9, "b", "a", 6, 1, 1, 10), FlowRecord(5, "a", "b", 1, None), FlowRecord(3, "b", "a", 6, 1, 2, 20)])
    assert list(found) == [("a", "b", 1, None), ("b", "a", 6, 1)]
    assert found["b", "a", 6, 1] == Seen(2, 3, 30, 3, 9)


@given(st.lists(records), st.lists(records))
def test_merging_counts_is_counting_all(one: list[FlowRecord], other: list[FlowRecord]) -> None:
    def count(found: list[FlowRecord]) -> Seen:
        seen = Seen()
        for record in found:
            seen.add(record)
        return seen

    merged = count(one)
    merged.merge(count(other))
    assert merged == count([*one, *other])


FULL = FlowRecord(200, "a", "b", 6, 80, 3, 900, "audit", 100, 4, "default", 0, 1, "h1", ProcessInfo("/bin/x", "x.service", 5), ProcessInfo())


def test_what_an_agent_records_reads_back() -> None:
    assert read_flows("f", dump_flows([FULL]).splitlines()) == [FULL]
    row = json.loads(dump_flows([FULL]))
    assert row["dst_process"] == {"executable": "unknown", "unit": "unknown", "uid": "unknown"}
    assert (FULL.started, FlowRecord(7, "a", "b", 1, None).started) == (100, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"by": 7}, "by is not"), ({"host": "x" * 513}, "host is not"), ({"count": -1}, "count is not"), ({"first": "x"}, "first is not"),
     ({"src_process": []}, "src_process is not a map"), ({"src_process": {"uid": -1}}, "uid is not"),
     ({"dst_process": {"unit": 4}}, "unit is not"), ({"src_instance": 1.5e300}, "src_instance is not")],
)  # fmt: skip
def test_what_an_agent_records_is_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read_flows("f", [json.dumps({**ROW, **change})])


def test_a_summary_adds_up() -> None:
    other = replace(FULL, time=300, first=None, src_instance=5, host="h2", count=1)
    rows = summarize([FULL, other, replace(FULL, verdict="deny"), replace(FULL, by="r1", count=9)])
    assert [(r.verdict, r.by, r.count) for r in rows] == [("audit", "r1", 9), ("audit", "default", 5), ("deny", "default", 4)]
    assert (rows[1].first, rows[1].last, rows[1].packets, rows[1].bytes) == (100, 300, 6, 1800)
