from __future__ import annotations

import itertools

from policy.compile import compile_policy, inactive, next_change
from policy.evaluate import evaluate, permitted
from policy.language import load
from policy.ports import NOTHING, TCP, parse_ports
from policy.program import Subject
from policy.windows import parse_instant

HEAD = "meshpolicy: 1\n"
WEB = Subject("shop/web", {"app": "shop", "role": "web", "env": "prod"})
API = Subject("shop/api", {"app": "shop", "role": "api", "env": "prod"})
DEV = Subject("shop/dev", {"app": "shop", "role": "web", "env": "dev"})
DB = Subject("pay/db", {"app": "pay", "role": "db", "env": "prod"})
EVERYBODY = (WEB, API, DEV, DB)
OFFICE = Subject("office", {}, nets=("10.0.0.0/8",))


def _policy(*texts: str):
    return load([(f"{n}.yaml", HEAD + text) for n, text in enumerate(texts)])


def _program(*texts: str, now: int | None = None):
    return compile_policy(_policy(*texts), now)


def _segment(rules: str, head: str = "name: s") -> str:
    return f"segments:\n  - {head.replace('; ', chr(10) + '    ')}\n{rules}"


ALLOW = "    allow:\n      - {id: r, from: {role: web}, to: {role: api}, on: tcp/80}\n"


def test_empty_policies_permit_nothing():
    for text in ("", "segments:\n", "segments: []\n", "segments: [{name: s}]\n", "segments: [{name: s, allow: []}]\n", "segments: [{name: s, allow: }]\n"):
        program = _program(text)
        assert not any(permitted(program, a, b) for a, b in itertools.permutations(EVERYBODY, 2))


def test_allow_is_directed_and_by_port():
    program = _program(_segment(ALLOW))
    assert permitted(program, WEB, API) == parse_ports("tcp/80")
    assert permitted(program, API, WEB) == NOTHING
    assert permitted(program, WEB, OFFICE) == NOTHING


def test_a_negation_does_not_reach_outside():
    program = _program(_segment("    allow:\n      - {id: r, from: {not: {role: db}}, to: {role: api}, on: any}\n"))
    assert permitted(program, WEB, API)
    assert not permitted(program, OFFICE, API)


def test_deny_beats_allow_whatever_the_order():
    deny = "    deny:\n      - {id: d, from: {env: dev}, to: '*', on: any}\n"
    for rules in (ALLOW + deny, deny + ALLOW):
        program = _program(_segment(rules))
        assert evaluate(program, DEV, API, TCP, 80).rule.id == "d"
        assert evaluate(program, WEB, API, TCP, 80).rule.id == "r"


def test_members_narrow_a_segment_to_flows_with_one_end_inside():
    assert permitted(_program(_segment(ALLOW, "name: s; members: {env: dev}")), WEB, API) == NOTHING
    assert permitted(_program(_segment(ALLOW, "name: s; members: {env: dev}")), DEV, API)
    assert permitted(_program(_segment(ALLOW, "name: s; members: '*'")), WEB, API)


def test_drafts_send_nothing_and_say_so():
    assert permitted(_program(_segment(ALLOW, "name: s; mode: draft")), WEB, API) == NOTHING
    assert permitted(_program(_segment(ALLOW.replace("id: r", "id: r, mode: draft"))), WEB, API) == NOTHING
    reasons = [i.reason for i in inactive(_policy(_segment(ALLOW, "name: s; mode: draft")))]
    assert reasons == ["segment s is a draft"]
    assert [i.reason for i in inactive(_policy(_segment(ALLOW.replace("id: r", "id: r, mode: draft"))))] == ["the rule is a draft"]
    rail = "guardrails: [{deny: {id: g, from: '*', to: '*', mode: draft}}]\n"
    assert permitted(_program(rail + _segment(ALLOW)), WEB, API)
    assert [(i.reason, i.guardrail) for i in inactive(_policy(rail))] == [("the rule is a draft", True)]


def test_guardrails_come_first_and_ancestors_before_descendants():
    rule = _segment(ALLOW)
    program = _program("guardrails: [{deny: {id: g, from: {env: dev}, to: {env: prod}}}]\n" + rule)
    assert evaluate(program, DEV, API, TCP, 80).rule.id == "guardrail:g"
    child = "scope: shop\nguardrails: [{deny: {id: c, from: '*', to: {role: api}}}]\n"
    assert evaluate(_program(rule, child), WEB, API, TCP, 80).rule.id == "guardrail:c"
    root_pass = "guardrails: [{pass: {id: p, from: {role: web}, to: '*', on: tcp/80}}]\n"
    assert evaluate(_program(rule, child, root_pass), WEB, API, TCP, 80).rule.id == "r"
    child_pass = "scope: shop\nguardrails: [{pass: {id: q, from: '*', to: '*', on: any}}]\n"
    root_deny = "guardrails: [{deny: {id: d, from: {role: web}, to: '*'}}]\n"
    assert evaluate(_program(rule, child_pass, root_deny), WEB, API, TCP, 80).rule.id == "guardrail:d"
    both = "guardrails: [{pass: {id: a, from: '*', to: '*', on: any}}, {deny: {id: b, from: '*', to: '*'}}]\n"
    assert evaluate(_program(rule, both), WEB, API, TCP, 80).rule.id == "guardrail:b"
    elsewhere = "scope: pay\nguardrails: [{deny: {id: e, from: '*', to: '*'}}]\n"
    assert permitted(_program(rule, elsewhere), WEB, API)
    assert not permitted(_program(_segment(ALLOW.replace("role: api", "role: db")), elsewhere), WEB, DB)


def test_a_scope_speaks_for_itself_only():
    both_ways = "    allow:\n      - {id: r, from: '*', to: '*', on: tcp/80}\n"
    program = _program("scope: shop\n" + _segment(both_ways))
    assert permitted(program, WEB, API)
    assert not permitted(program, WEB, DB)
    assert not permitted(program, DB, WEB)
    deny = _program(_segment(both_ways), "scope: pay\nsegments: [{name: t, deny: [{id: d, from: '*', to: '*', on: any}]}]\n")
    assert permitted(deny, WEB, API)
    assert not permitted(deny, WEB, DB)
    assert not permitted(_program("scope: shop\n" + _segment(both_ways)), Subject("shopping/x"), Subject("shopping/y"))


def test_two_scopes_need_both_consents():
    offer = "scope: shop\noffers: [{from: {role: web}, to: pay/db, on: [tcp/5432, tcp/80]}]\n"
    accept = "scope: pay\naccepts: [{from: shop, to: {role: db}, on: tcp/5432}]\n"
    assert not permitted(_program(offer), WEB, DB)
    assert not permitted(_program(accept), WEB, DB)
    program = _program(offer, accept)
    assert permitted(program, WEB, DB) == parse_ports("tcp/5432")
    assert not permitted(program, API, DB)
    assert not permitted(program, DB, WEB)
    assert "accepted by pay" in evaluate(program, WEB, DB, TCP, 5432).rule.why
    assert not permitted(_program(offer, accept.replace("from: shop", "from: mail")), WEB, DB)
    assert not permitted(_program(offer, accept.replace("tcp/5432", "udp/1")), WEB, DB)
    assert not permitted(_program(offer.replace("pay/db", "mail"), accept), WEB, DB)


GRANT = "grants:\n  - {id: g, from: {role: web}, to: {role: db}, on: tcp/22, not_before: 2031-02-01, not_after: 2031-02-11T18:00Z}\n"


def test_grants_hold_between_their_instants_only():
    start, end = parse_instant("2031-02-01"), parse_instant("2031-02-11T18:00Z")
    held = {now: bool(permitted(_program(GRANT, now=now), WEB, DB)) for now in (start - 1, start, end - 1, end)}
    assert held == {start - 1: False, start: True, end - 1: True, end: False}
    assert not permitted(_program(GRANT), WEB, DB)  # no time given: nothing temporary allows
    policy = _policy(GRANT)
    assert [inactive(policy, now)[0].reason for now in (None, start - 1, end)] == [
        "it is limited in time and no time was given",
        "it begins at 2031-02-01T00:00:00Z",
        "it ended at 2031-02-11T18:00:00Z",
    ]
    assert inactive(policy, start) == ()
    assert [next_change(policy, now) for now in (start - 5, start, end)] == [start, end, None]
    assert evaluate(_program(GRANT, now=start), WEB, DB, TCP, 22).rule.id == "grant:g"


def test_grants_that_end_with_a_workload():
    from dataclasses import replace

    policy = _policy(GRANT)
    ending = replace(policy, grants=tuple(replace(g, not_before=None, not_after=None, ends_with="shop/job") for g in policy.grants))
    assert not permitted(compile_policy(ending), WEB, DB)
    assert not permitted(compile_policy(ending, 0, ["other"]), WEB, DB)
    assert permitted(compile_policy(ending, 0, ["shop/job"]), WEB, DB)
    assert [i.reason for i in inactive(ending, 0)] == ["workload shop/job has ended"]


def test_windows_open_and_close():
    text = _segment(ALLOW.replace("id: r", 'id: r, when: {cron: "0 1 * * *", for: 2h}'))
    one, three = parse_instant("2031-01-01T01:00Z"), parse_instant("2031-01-01T03:00Z")
    held = {now: bool(permitted(_program(text, now=now), WEB, API)) for now in (one - 1, one, three - 1, three)}
    assert held == {one - 1: False, one: True, three - 1: True, three: False}
    policy = _policy(text)
    assert next_change(policy, one - 1) == one
    assert next_change(policy, one) == three
    assert not permitted(compile_policy(policy), WEB, API)
    assert [i.reason for i in inactive(policy, three)] == ["its time window is closed at 2031-01-01T03:00:00Z"]
    assert [i.reason for i in inactive(policy)] == ["it has a time window and no time was given"]


def test_a_deny_with_a_window_holds_when_no_time_is_given():
    deny = '    deny:\n      - {id: d, from: "*", to: "*", on: any, when: {cron: "0 1 * * *", for: 2h}}\n'
    assert not permitted(_program(_segment(ALLOW + deny)), WEB, API)
    assert permitted(_program(_segment(ALLOW + deny), now=0), WEB, API)
    rail = 'guardrails: [{deny: {id: g, from: "*", to: "*", when: {cron: "0 1 * * *", for: 2h}}}]\n'
    assert not permitted(_program(rail + _segment(ALLOW)), WEB, API)
    assert permitted(_program(rail + _segment(ALLOW), now=0), WEB, API)


def test_the_program_carries_the_digest_to_the_decision():
    policy = _policy(_segment(ALLOW))
    decision = evaluate(compile_policy(policy), WEB, API, TCP, 80)
    assert decision.digest == policy.digest
    assert decision.reason == "allowed by rule r (0.yaml:5)"
