from __future__ import annotations

from dataclasses import replace

import pytest

from policy.language import load
from policy.lint import Flow, lint
from policy.program import Subject
from policy.windows import DAY, parse_instant

NOW = parse_instant("2031-01-01")
WEB, API, DB = (Subject(f"shop/{r}", {"app": "shop", "role": r}) for r in ("web", "api", "db"))
ALL = (WEB, API, DB)
KEYS = "labels: {keys: [app, role]}\n"


def _lint(text: str, subjects=(), now=NOW, flows=None, label_keys=None):
    return lint(load([("p.yaml", "meshpolicy: 1\n" + KEYS + text)]), subjects, now, flows, label_keys)


def _codes(text: str, *args, **more):
    return [(f.code, f.where.line if f.where else None) for f in _lint(text, *args, **more)]


def _rules(*rules: str, head: str = "name: s", kind: str = "allow") -> str:
    return f"segments:\n  - {head}\n    {kind}:\n" + "".join(f"      - {{{r}}}\n" for r in rules)


WEB_API = "id: a, from: {role: web}, to: {role: api}, on: tcp/80"
CASES = [
    ("clean", _rules(WEB_API), []),
    ("L01 by a deny", _rules(WEB_API) + "    deny:\n      - {id: d, from: {app: '*'}, to: '*', on: any}\n", []),
    ("L01 by a wider deny", _rules(WEB_API) + "    deny:\n      - {id: d, from: '*', to: {role: [api, db]}, on: tcp}\n", [("L01", 6)]),
    ("L01 by a guardrail", "guardrails: [{deny: {id: g, from: {role: web}, to: '*'}}]\n" + _rules(WEB_API), [("L01", 7)]),
    ("not L01: another port", _rules(WEB_API) + "    deny:\n      - {id: d, from: '*', to: '*', on: tcp/81}\n", []),
    ("L02 twice the same", _rules(WEB_API, WEB_API.replace("id: a", "id: b")), [("L02", 7)]),
    ("L02 narrower", _rules(WEB_API.replace("tcp/80", "tcp"), WEB_API.replace("id: a", "id: b")), [("L02", 7)]),
    ("not L02: a shorter idle timeout", _rules(WEB_API.replace("tcp/80", "tcp"), WEB_API.replace("id: a", "idle_timeout: 5m, id: b")), []),
    ("L02 a longer idle timeout", _rules(WEB_API.replace("tcp/80", "tcp, idle_timeout: 1m"), WEB_API.replace("id: a", "idle_timeout: 5m, id: b")), [("L02", 7)]),
    ("not L02: a lower ceiling", _rules(WEB_API.replace("tcp/80", "tcp"), WEB_API.replace("id: a", "max_rate: 1Mbit, id: b")), []),
    ("not L02: a process less", _rules(WEB_API.replace("{role: web}", "{role: web, process: 'uid:5'}"), WEB_API.replace("id: a", "id: b")), [("L02", 6)]),
    ("not L02: other members", _rules(WEB_API) + "  - name: t\n    members: {app: x}\n    allow: [{id: b, from: {role: web}, to: {role: api}, on: tcp}]\n", []),
    ("L02 members implied", _rules(WEB_API.replace("{role: web}", "{role: web, app: x}")) + "  - name: t\n    members: {app: x}\n    allow: [{id: b, from: {role: web}, to: {role: api}, on: tcp}]\n", [("L02", 6)]),
    ("L03 contradiction", "groups: {g: {all: [{role: a}, {role: b}]}}\n" + _rules(WEB_API), [("L03", 3)]),
    ("L08 any to any", _rules("id: a, from: '*', to: '*', on: tcp/1"), [("L08", 6)]),
    ("L08 with members", _rules("id: a, from: '*', to: '*', on: tcp/1", head="name: s\n    members: {app: x}"), [("L08", 7)]),
    ("L08 all ports", _rules("id: a, from: '*', to: {role: api}, on: any"), [("L08", 6)]),
    ("L08 all of tcp", _rules("id: a, from: {role: web}, to: '*', on: tcp"), [("L08", 6)]),
    ("L09 over", "grants: [{id: g, from: {app: a}, to: {app: b}, on: tcp/1, not_after: 2030-01-01}]\n", [("L09", 3)]),
    ("L09 endless", "grants: [{id: g, from: {app: a}, to: {app: b}, on: tcp/1, not_after: 2099-01-01}]\n", [("L09", 3)]),
    ("not L09", "grants: [{id: g, from: {app: a}, to: {app: b}, on: tcp/1, not_after: 2031-02-01}]\n", []),
    ("L10 offer", "scope: shop\noffers: [{to: pay, on: tcp/1}]\n", [("L10", 4)]),
    ("L10 accept", "scope: shop\naccepts: [{from: pay, on: tcp/1}]\n", [("L10", 4)]),
    ("L14", _rules(WEB_API, WEB_API.replace("id: a", "id: b").replace("80", "81"), head="name: s\n    budget: {rules: 1}"), [("L14", 4)]),
    ("L07 the same", "groups:\n  a: {role: web}\n  b: {role: [web]}\n", [("L07", 5)]),
]


@pytest.mark.parametrize(("text", "codes"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_without_an_inventory(text, codes):
    assert _codes(text) == codes


def test_with_an_inventory():
    assert _codes(_rules(WEB_API), ALL) == []
    assert _codes("groups:\n  g: {role: web}\n", ALL) == [("L06", 4)]
    assert _codes("groups:\n  g: {role: mail}\n", ALL) == [("L03", 4)]
    assert _codes("groups:\n  g: {app: shop}\n  h: {role: [web, api, db]}\n", ALL) == [("L07", 5)]
    found = _lint(_rules(WEB_API, head="name: s\n    members: {role: mail}"), ALL)
    assert [(f.code, f.severity) for f in found] == [("L03", "info")]
    test = 'tests:\n  - {from: {role: mail}, to: "web:tcp/1", expect: deny}\n'.replace("web:tcp/1", "'*'\", on: tcp/1, why: \"")
    assert "L12" in [c for c, _ in _codes(test.replace("\"'*'\"", "'*'"), ALL)]
    assert ("L12", 4) in _codes("tests:\n  - {from: {all: [{role: a}, {role: b}]}, to: '*', on: tcp/1, expect: deny}\n", ALL)


def test_two_halves_of_a_consent_are_fine():
    files = [
        ("a", "meshpolicy: 1\nlabels: {keys: [app]}\nscope: shop\noffers: [{to: pay, on: tcp/1}]\n"),
        ("b", "meshpolicy: 1\nlabels: {keys: [app]}\nscope: pay\naccepts: [{from: shop, on: tcp}]\n"),
    ]
    assert lint(load(files)) == []


def test_labels_nobody_can_carry():
    assert [(f.code, f.severity) for f in _lint("", ALL, label_keys=["app"])] == [("L13", "warning")]
    assert [(f.code, f.severity) for f in _lint("", (Subject("x", {"app": "a"}),))] == [("L13", "info")]
    undeclared = load([("p", "meshpolicy: 1\n" + _rules(WEB_API))])
    assert [f.code for f in lint(undeclared)] == ["L13"]
    assert lint(load([("p", "meshpolicy: 1\n")])) == []


def test_audit_past_its_date():
    policy = load([("p", "meshpolicy: 1\nsegments: [{name: s}]\n")])
    late = replace(policy, segments=tuple(replace(s, mode="audit", audit_until=NOW) for s in policy.segments))
    assert [(f.code, f.severity) for f in lint(late, now=NOW)] == [("L11", "error")]
    assert lint(late, now=NOW - 1) == []
    assert lint(late) == []


def test_a_way_round_to_a_sensitive_segment():
    text = (
        "segments:\n  - {name: vault, sensitive: true, members: {role: db}}\n  - name: s\n    allow:\n"
        f"      - {{{WEB_API}}}\n      - {{id: b, from: {{role: api}}, to: {{role: db}}, on: tcp/5432}}\n"
    )
    (found,) = [f for f in _lint(text, ALL) if f.code == "L15"]
    assert "shop/web -> shop/api -> shop/db" in found.message
    assert found.where.line == 4
    assert "L15" not in [f.code for f in _lint(text.replace("sensitive: true", "sensitive: false"), ALL)]


def test_against_observed_flows():
    many = (*ALL, *(Subject(f"shop/w{n}", {"app": "shop", "role": "web"}) for n in range(4)))
    used = [Flow("shop/web", "shop/api", 6, 80, NOW), Flow("gone", "shop/api", 6, 80, NOW)]
    assert _codes(_rules(WEB_API), ALL, flows=used) == []
    assert _codes(_rules(WEB_API), ALL, flows=[]) == [("L04", 6)]
    assert _codes(_rules(WEB_API), ALL, flows=[replace(used[0], last_seen=NOW - 31 * DAY)]) == [("L04", 6)]
    assert _codes(_rules(WEB_API), ALL, now=None, flows=[replace(used[0], last_seen=0)]) == []
    (broad,) = _lint(_rules(WEB_API), many, flows=used)
    assert (broad.code, "80% of the pairs") == ("L05", broad.message[:16])
    assert _codes(_rules(WEB_API.replace("tcp/80", "tcp/1-1000")), ALL, flows=used) == [("L05", 6)]
    assert _codes("guardrails: [{deny: {id: g, from: {role: db}, to: {role: web}}}]\n", ALL, flows=[]) == []
