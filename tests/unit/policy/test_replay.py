"""Recorded flows against a policy, alone and as a test of the policy file."""

from __future__ import annotations

import pytest

from identity.errors import BadPolicy
from policy.compile import compile_policy
from policy.flows import FlowRecord
from policy.language import load
from policy.program import Subject
from policy.replay import Recording, replay
from policy.test import run_tests

NOW, DAY = 1_900_000_000, 86_400
WEB, API, DB = (Subject(f"shop/{r}", {"role": r}) for r in ("web", "api", "db"))
ALL = (WEB, API, DB)


def policy(tests: str = "", mode: str = "enforce", allow: str = "{id: a, from: {role: web}, to: {role: api}, on: tcp/80}"):
    text = f"meshpolicy: 1\nlabels: {{keys: [role]}}\nsegments:\n  - name: s\n    members: {{role: [api, db]}}\n    mode: {mode}\n    allow: [{allow}]\n"
    return load([("p.yaml", text + (f"tests: [{tests}]\n" if tests else ""))])


def flow(src: str, dst: str, port: int, days: int = 1, verdict: str = "allow") -> FlowRecord:
    return FlowRecord(NOW - days * DAY, f"shop/{src}", f"shop/{dst}", 6, port, 3, 300, verdict)


RECORDS = [flow("web", "api", 80), flow("web", "api", 81), flow("api", "db", 5432, 40), flow("db", "web", 9, verdict="deny"), flow("web", "gone", 1)]


def test_what_was_forwarded_and_would_be_denied() -> None:
    recording = Recording.of(RECORDS, NOW)
    found = replay(compile_policy(policy(), NOW), recording.edges, ALL)
    assert [(*b.edge[:2], b.edge[3]) for b in found.broken] == [("shop/api", "shop/db", 5432), ("shop/web", "shop/api", 81)]
    assert (found.flows, found.unknown) == (3, 1)
    assert "default deny" in str(found.broken[0])
    assert (found.first, found.last) == (NOW - 40 * DAY, NOW - DAY)


def test_what_the_policy_in_force_denies_as_well_is_not_new() -> None:
    before = compile_policy(policy(allow="{id: b, from: {role: web}, to: {role: api}, on: tcp/81}"), NOW)
    found = replay(compile_policy(policy(), NOW), Recording.of(RECORDS, NOW).edges, ALL, before)
    assert [b.edge[3] for b in found.broken] == [81]


def test_an_audit_is_judged_as_if_it_had_ended() -> None:
    program = compile_policy(policy(mode="{audit_until: 2031-03-01}"), NOW)
    assert len(replay(program, Recording.of(RECORDS, NOW).edges, ALL).broken) == 2


@pytest.mark.parametrize(
    ("test", "passed", "covers"),
    [("{replay: last-30d}", False, 2), ("{replay: last-30d, max_new_denied: 1}", True, 2), ("{replay: last-52w, max_new_denied: 1}", False, 3)],
)
def test_in_the_policy_file(test, passed, covers) -> None:
    one = policy(test)
    (result,) = run_tests(one, compile_policy(one, NOW), ALL, None, Recording.of(RECORDS, NOW))
    assert (result.passed, result.covers) == (passed, covers)
    if not passed:
        assert "shop/" in result.message


def test_without_a_recording_it_says_that_it_was_not_run() -> None:
    one = policy("{replay: last-30d}")
    (result,) = run_tests(one, compile_policy(one, NOW), ALL)
    assert result.passed
    assert result.covers == 0
    assert "not run" in result.message


@pytest.mark.parametrize("word", ["30d", "last-", "last-x", "last-0d", "all"])
def test_a_span_is_a_span(word) -> None:
    with pytest.raises(BadPolicy) as e:
        policy(f"{{replay: {word}}}")
    assert e.value.line
    assert "last-30d" in e.value.hint
