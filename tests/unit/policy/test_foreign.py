"""policy.foreign: identities of other trust domains in selectors, in the evaluator and in what is explained."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput, BadPolicy
from policy import foreign
from policy.algebra import implies
from policy.classes import Classes
from policy.compile import compile_policy
from policy.evaluate import evaluate, matches, permitted
from policy.explain import explain
from policy.language import load
from policy.lint import lint
from policy.ports import TCP
from policy.program import Everything, Exists, In, Named, Not, Subject, Under
from policy.test import run_tests

WEB = "spiffe://other.example/shop/web"
API = Subject("shop/api", {"app": "api"}, "spiffe://prod.example/wl/shop/api")


def program(rules: str, scope: str = "", extra: str = ""):
    head = f"scope: {scope}\n" if scope else ""
    return compile_policy(load([("p.yaml", f"meshpolicy: 1\n{head}{extra}segments:\n  - name: edge\n{rules}")]), 1_800_000_000)


def allow(source: str, scope: str = "", extra: str = ""):
    return program(f"    allow:\n      - {{id: r, from: {source}, to: {{workload: shop/api}}, on: tcp/443}}\n", scope, extra)


def verdict(made, name: str, port: int = 443) -> bool:
    return evaluate(made, foreign.subject(name), API, TCP, port).allowed


@pytest.mark.parametrize("source", [WEB, f"[{WEB}, {{app: web}}]", "spiffe://other.example/shop/*", "spiffe://other.example/*",
                                    "all-of-them"])  # fmt: skip
@pytest.mark.parametrize("scope", ["", "shop"])
def test_a_named_foreign_identity_may(source, scope):
    made = allow(source, scope, f"groups:\n  all-of-them: ['{WEB}']\n")
    assert verdict(made, WEB)
    assert not verdict(made, WEB, 80)
    assert not verdict(made, "spiffe://third.example/shop/web")


def test_a_subtree_is_what_lies_below():
    made = allow("spiffe://other.example/shop/*")
    assert verdict(made, "spiffe://other.example/shop/a/b")
    for other in ("shop", "shopping/web", "Shop/web", "other/shop/web"):
        assert not verdict(made, f"spiffe://other.example/{other}"), other
    assert not verdict(made, "spiffe://other.example.evil/shop/web")


@pytest.mark.parametrize("source", ['"*"', "{under: shop}", "{workload: shop/web}", "{not: {app: x}}", "{app: '*'}",
                                    "{all: [{app: web}, 'spiffe://other.example/*']}"])  # fmt: skip
def test_nothing_written_for_our_own_selects_a_foreign_identity(source):
    assert not verdict(allow(source), WEB)


@given(st.sampled_from([Everything(), Named(frozenset({"shop/web", "web"})), Under("shop"), Under("other.example"), Exists("app"),
                        In("app", frozenset({"web"}))]))  # fmt: skip
def test_selectors_of_ours_match_no_foreign_subject(selector):
    assert not matches(selector, foreign.subject(WEB))
    assert not matches(Everything(), foreign.subject(WEB))
    assert matches(Not(selector), foreign.subject(WEB)), "which is why the language never lets `not:` stand alone"


@given(st.lists(st.sampled_from(["a", "b", "ab", "a.b", "shop"]), min_size=1, max_size=4),
       st.lists(st.sampled_from(["a", "b", "ab", "a.b", "shop"]), min_size=1, max_size=4))  # fmt: skip
def test_below_is_by_segments(head, path):
    one = foreign.subject("spiffe://other.example/" + "/".join(path))
    below = foreign.selector("spiffe://other.example/" + "/".join(head) + "/*")
    assert matches(below, one) is (len(path) > len(head) and path[: len(head)] == head)


@pytest.mark.parametrize("text", ["spiffe://other.example", "spiffe://", "spiffe:///*", "spiffe://other.example//*", "spiffe://*",
                                  "spiffe://other.example/a/../b", "spiffe://other.example/*/b", "spiffe://Other.example/a",
                                  "spiffe://other.example/a%2fb", "spiffe://other.example/a/", "spiffe://other.example/a//*",
                                  "spiffe://u@other.example/a", "spiffe://other.example:1/a"])  # fmt: skip
def test_what_is_no_identity_is_refused(text):
    with pytest.raises(BadPolicy) as refused:
        allow(f"'{text}'")
    assert refused.value.code == "policy.foreign"
    with pytest.raises(BadInput):
        foreign.selector(text)


@pytest.mark.parametrize("rules", [
    f"    allow:\n      - {{id: r, from: web, to: {WEB}, on: tcp/443}}\n",
    f"    deny:\n      - {{id: r, from: {{not: {WEB}}}, to: web, on: tcp/443}}\n",
    f"    allow:\n      - {{id: r, from: {{any: [{{not: {WEB}}}]}}, to: web, on: tcp/443}}\n",
    f"    members: {WEB}\n    allow: []\n",
])  # fmt: skip
def test_a_foreign_identity_is_a_source_and_nothing_else(rules):
    with pytest.raises(BadPolicy) as refused:
        program(rules, extra="groups: {web: {app: web}}\n")
    assert refused.value.code == "policy.foreign"


@pytest.mark.parametrize("more", ["max_rate: 1MB/s", "idle_timeout: 5m", None])
def test_what_no_host_can_hold_it_to_is_refused(more):
    source = WEB if more else f"{{any: [{WEB}], process: uid:5}}"
    with pytest.raises(BadPolicy) as refused:
        program(f"    allow:\n      - {{id: r, from: {source}, to: {{workload: shop/api}}, on: tcp/443{', ' + more if more else ''}}}\n")
    assert refused.value.code == "policy.not_enforced"


def test_a_deny_and_a_guardrail_come_first():
    extra = 'guardrails:\n  - deny: {from: "spiffe://other.example/bad/*", to: "*", id: G1}\n'
    made = allow("spiffe://other.example/*", extra=extra)
    assert verdict(made, WEB)
    assert not verdict(made, "spiffe://other.example/bad/x")


def test_a_scope_opens_only_its_own_door():
    made = program(f"    allow:\n      - {{id: r, from: {WEB}, to: {{app: api}}, on: tcp/443}}\n", "pay")
    assert not verdict(made, WEB), "shop/api is not in pay"


def test_an_audit_lets_no_foreign_identity_in():
    made = program('    members: "*"\n    mode: {audit_until: 2031-01-01}\n    allow: []\n')
    web = Subject("shop/web", {"app": "web"})
    assert evaluate(made, web, API, TCP, 443).audited
    assert not evaluate(made, foreign.subject(WEB), API, TCP, 443).allowed
    classes = Classes(made)
    for one in (web, API, foreign.subject(WEB)):
        classes.put(one)
    assert not permitted(made, foreign.subject(WEB), API)


def test_everybody_does_not_cover_a_foreign_identity():
    assert implies(Named(frozenset({"shop/web"})), Everything())
    assert not implies(Named(frozenset({WEB})), Everything())
    found = lint(load([("p.yaml", f"""meshpolicy: 1
segments:
  - name: a
    allow:
      - {{id: f, from: {WEB}, to: {{workload: shop/api}}, on: tcp/443}}
      - {{id: w, from: "*", to: {{workload: shop/api}}, on: tcp/443}}
""")]), [API])  # fmt: skip
    assert not [f for f in found if f.code in {"L01", "L02", "L03"}]


def test_explained_with_a_change_that_can_be_pasted():
    found = explain(allow("spiffe://other.example/pay/*"), foreign.subject(WEB), API, TCP, 443)
    assert not found.decision.allowed
    assert "default deny" in found.decision.reason
    assert not any("label" in change.text for change in found.changes), "a foreign identity has none to be given"
    snippet = next(c.snippet for c in found.changes if c.snippet)
    assert WEB in snippet
    assert verdict(compile_policy(load([("s.yaml", f"meshpolicy: 1\n{snippet}")])), WEB)
    assert explain(allow(WEB), foreign.subject(WEB), API, TCP, 443).decision.rule.id == "r"


def test_a_policys_own_tests_may_ask_for_it():
    text = f"""meshpolicy: 1
segments:
  - name: edge
    allow:
      - {{id: r, from: spiffe://other.example/shop/*, to: {{workload: shop/api}}, on: tcp/443}}
tests:
  - {{from: {WEB}, to: {{workload: shop/api}}, on: tcp/443, expect: allow}}
  - {{from: spiffe://third.example/*, to: {{workload: shop/api}}, on: tcp/443, expect: deny}}
"""
    policy = load([("p.yaml", text)])
    results = run_tests(policy, compile_policy(policy), [API])
    assert [r.passed for r in results] == [True, True]


def test_an_id_of_ours_is_not_foreign():
    assert foreign.subject_beside("spiffe://prod.example/wl/x", "prod.example") is None
    assert foreign.subject_beside(WEB, "prod.example") == foreign.subject(WEB)
    assert foreign.trust_domains(Not(Named(frozenset({WEB})))) == {"other.example"}
