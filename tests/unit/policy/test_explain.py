from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.compile import compile_policy, inactive
from policy.evaluate import evaluate
from policy.explain import MAX_NEAR_MISSES, DropRule, SetLabel, apply, conditions, explain, show, to_json
from policy.language import load
from policy.ports import TCP, UDP
from policy.program import (
    Action,
    AllOf,
    AnyOf,
    Everything,
    Exists,
    In,
    Named,
    Nets,
    Not,
    Nothing,
    Program,
    Rule,
    Subject,
    Tier,
    Under,
)

TEXT = """\
meshpolicy: 1
guardrails:
  - deny: {from: {env: dev}, to: {env: prod}, why: SEC-12}
segments:
  - name: shop
    members: {app: shop}
    allow:
      - {id: web-to-api, from: {app: shop, role: web}, to: {app: shop, role: api}, on: tcp/8443}
      - {id: api-to-db, from: {role: api}, to: {role: [db, cache]}, on: [tcp/5432, udp]}
      - {id: no-batch, from: {app: shop, not: {role: batch}}, to: {role: mail}, on: tcp/25}
      - {id: idea, from: {role: web}, to: {role: mail}, on: tcp/26, mode: draft}
    deny:
      - {id: no-canary, from: {role: canary}, to: '*', on: any}
grants:
  - {id: g, from: {role: web}, to: {role: db}, on: tcp/22, not_after: 2001-01-01}
"""
FILES = [("p.yaml", TEXT)]
POLICY = load(FILES)
PROGRAM = compile_policy(POLICY, 1_900_000_000)
ASLEEP = inactive(POLICY, 1_900_000_000)


def _subject(name: str, **labels: str) -> Subject:
    return Subject(name, {"app": "shop", "env": "prod", **labels})


WEB, API, DB, BATCH, MAIL = (_subject(f"shop/{r}", role=r) for r in ("web", "api", "db", "batch", "mail"))
DEV = _subject("shop/dev", role="web", env="dev")


def _explain(src, dst, port, proto=TCP):
    return explain(PROGRAM, src, dst, proto, port, asleep=ASLEEP)


def test_a_missing_label_is_named_and_is_the_smallest_change():
    found = _explain(BATCH, API, 8443)
    assert [(m.rule.id, m.failed) for m in found.near_misses] == [
        ("web-to-api", "the source shop/batch does not match role=web: it has role=batch")
    ]
    assert found.smallest_change.text == "give shop/batch the label role=web, so that rule web-to-api (p.yaml:8) matches"
    assert found.smallest_change.edits == (SetLabel("shop/batch", "role", "web"),)
    bare = explain(PROGRAM, Subject("x", {"app": "shop", "env": "prod"}), API, TCP, 8443)
    assert bare.near_misses[0].failed.endswith("it has no label role")


def test_a_missing_port_is_named():
    found = _explain(WEB, API, 22)
    assert found.near_misses[0].failed == "it is about tcp/8443, not tcp/22"
    assert str(found.smallest_change) == "add tcp/22 to rule web-to-api (p.yaml:8)"
    assert _explain(API, DB, 5432, UDP).decision.allowed


def test_a_label_in_the_way_is_taken_away():
    found = _explain(BATCH, MAIL, 25)
    assert "not (role=batch)" in found.near_misses[0].failed
    assert found.smallest_change.text.startswith("take the label role from shop/batch")


def test_a_segment_that_is_about_others_is_named():
    found = explain(PROGRAM, Subject("a", {"role": "api"}), Subject("b", {"role": "db"}), TCP, 5432)
    assert found.near_misses[0].failed == "neither end is one of the workloads it is about (app=shop)"
    assert isinstance(found.smallest_change.edits[0], SetLabel)


def test_a_deny_is_named_with_the_allow_it_beats():
    found = _explain(DEV, API, 8443)
    assert found.decision.rule.id == "guardrail:SEC-12"
    assert found.near_misses[0].failed == "it matches, but rule guardrail:SEC-12 (p.yaml:3) decides first"
    assert found.smallest_change.edits == (DropRule("guardrail:SEC-12"),)
    twice = explain(PROGRAM, _subject("x", role="canary", env="dev"), MAIL, TCP, 99)
    assert len(twice.smallest_change.edits) == 3  # both denies, then an allow


def test_rules_not_in_force_are_named():
    found = _explain(WEB, DB, 22)
    assert ("grant:g", "it is not in force: it ended at 2001-01-01T00:00:00Z") in [(m.rule.id, m.failed) for m in found.near_misses]
    assert any("put rule grant:g" in c.text for c in found.changes)
    found = _explain(WEB, MAIL, 26)
    assert ("idea", "it is not in force: the rule is a draft") in [(m.rule.id, m.failed) for m in found.near_misses]
    rail = "guardrails:\n  - deny: {id: x, from: '*', to: {role: api}, mode: draft}\n"
    draft_rail = load([*FILES, ("rail.yaml", "meshpolicy: 1\n" + rail)])
    found = explain(compile_policy(draft_rail), WEB, API, TCP, 8443, asleep=inactive(draft_rail))
    assert any("put rule guardrail:x" in c.text for c in found.changes)


def test_an_allowed_flow_says_what_would_stop_it():
    found = _explain(WEB, API, 8443)
    assert found.decision.allowed
    assert {m.rule.id for m in found.near_misses} == {"guardrail:SEC-12", "no-canary"}
    texts = [c.text for c in found.changes]
    assert "remove rule web-to-api (p.yaml:8), or except this pair from it" in texts
    assert any(t.startswith("deny it: add rule shop-web-not-to-shop-api") for t in texts)
    assert "take udp/7 from rule api-to-db (p.yaml:9)" in [c.text for c in _explain(API, DB, 7, UDP).changes]


def test_impossible_flows_have_no_change():
    found = _explain(WEB, API, 70_000)
    assert found.smallest_change is None
    assert found.near_misses == ()
    assert not found.decision.allowed


def test_new_rules_get_a_free_id_and_icmp_means_both():
    taken = Program((Tier("t", (Rule("a-to-b", Action.ALLOW, Nothing(), Nothing()),)),))
    found = explain(taken, Subject("a"), Subject("b"), 58)
    assert "add rule a-to-b-2 from a to b on icmp" in found.smallest_change.text
    assert "on: icmp" in found.smallest_change.snippet
    assert "id: x-to-x" in explain(Program(()), Subject("[]"), Subject("..."), 47).smallest_change.snippet
    assert 'on: "47"' in explain(Program(()), Subject("1"), Subject("b"), 47).smallest_change.snippet
    assert "name: s-1-to-b" in explain(Program(()), Subject("1"), Subject("b"), 47).smallest_change.snippet


def test_near_misses_are_limited():
    rules = tuple(Rule(f"r{n}", Action.ALLOW, In("a", frozenset({str(n)})), Everything()) for n in range(30))
    assert len(explain(Program((Tier("t", rules),)), WEB, API, TCP, 1).near_misses) == MAX_NEAR_MISSES


names = st.sampled_from(("shop/web", "pay/db", "a", "b-2"))
labels = st.fixed_dictionaries({}, optional={"app": st.sampled_from(("shop", "pay")), "role": st.sampled_from(("web", "api", "db", "batch", "canary", "mail")), "env": st.sampled_from(("dev", "prod"))})


@given(st.builds(Subject, names, labels), st.builds(Subject, names, labels), st.sampled_from((8443, 25, 26, 5432, 22)))
@settings(max_examples=150, deadline=None)
def test_changes_are_true_and_snippets_can_be_pasted(src, dst, port):
    found = _explain(src, dst, port)
    if src.name != dst.name:
        assert found.smallest_change is not None
    for change in found.changes:
        program, one, other = apply(change.edits, PROGRAM, src, dst)
        assert evaluate(program, one, other, TCP, port).allowed != found.decision.allowed
        if change.snippet and len(change.edits) == 1:
            pasted = load([*FILES, ("new.yaml", "meshpolicy: 1\n" + change.snippet)])
            assert evaluate(compile_policy(pasted, 1_900_000_000), src, dst, TCP, port).allowed != found.decision.allowed
    json.dumps(to_json(found))


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (In("a", frozenset({"x"})), "a=x"),
        (In("a", frozenset({"y", "x"})), "a in [x, y]"),
        (Exists("a"), "a present"),
        (Not(Exists("a")), "not (a present)"),
        (AllOf((Exists("a"), AnyOf((Exists("b"), Exists("c"))))), "a present and (b present or c present)"),
        (AllOf(()), "everybody"),
        (AnyOf(()), "nobody"),
        (Named(frozenset({"b", "a"})), "workload a, b"),
        (Under("a"), "below a"),
        (Nets(("10.0.0.0/8",), ("10.1.0.0/16",)), "address in 10.0.0.0/8 except 10.1.0.0/16"),
        (Nets(("10.0.0.0/8",)), "address in 10.0.0.0/8"),
        (Everything(), "everybody inside"),
        (Nothing(), "nobody"),
    ],
)
def test_selectors_in_words(selector, text):
    assert show(selector) == text


def test_json_form():
    data = to_json(_explain(BATCH, API, 8443))
    assert data["verdict"] == "deny"
    assert data["rule"] is None
    assert data["near_misses"][0]["where"] == "p.yaml:8"
    assert data["changes"][0]["text"].startswith("give shop/batch")
    assert to_json(_explain(WEB, API, 8443))["where"] == "p.yaml:8"


BOUND = """\
meshpolicy: 1
labels: {keys: [role]}
segments:
  - name: s
    allow:
      - {id: a, from: {role: web, process: [unit:nginx, uid:7]}, to: {role: api}, on: tcp/80-81, max_rate: 1Mbit, idle_timeout: 5m}
      - {id: b, from: {role: web}, to: {role: api}, on: [tcp/81, tcp/82]}
"""


def test_what_an_allowed_flow_depends_on_is_said() -> None:
    program = compile_policy(load([("p.yaml", BOUND)]), 0)
    web, api = Subject("w", {"role": "web"}), Subject("a", {"role": "api"})
    slow, silent = "at most 1000000 bit/s each way by a", "ended after 300 s of silence by a"
    found = explain(program, web, api, 6, 80)
    assert set(found.conditions) == {"only cgroup system.slice/nginx.service or uid 7 at the source by a", slow, silent}
    assert to_json(found)["conditions"] == list(found.conditions)
    assert set(conditions(program, web, api, 6, 81)) == {slow, silent}, "another rule opens it to every process"
    assert conditions(program, web, api, 6, 82) == ()
    assert conditions(program, api, web, 6, 80) == (), "nothing binds what is denied"
    assert conditions(program, web, api, 6, 70_000) == ()
