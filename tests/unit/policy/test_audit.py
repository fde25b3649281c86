"""Audit, ceilings and processes: the evaluator beside a slow model, and what a policy file makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadPolicy
from policy.classes import Classes
from policy.compile import compile_policy, next_change
from policy.evaluate import bounds, enforced, evaluate, in_force, permitted, strict
from policy.explain import explain
from policy.language import load
from policy.model import Policy
from policy.ports import PORTED, PortMap, parse_ports
from policy.program import Action, Audit, Nothing, Process, Program, Rule, Subject, Tier
from policy.windows import parse_instant
from tests.unit.policy.test_random_programs import (
    FLOWS,
    inside,
    model,
    model_matches,
    port_maps,
    programs,
    selectors,
    subjects,
)

audits = st.builds(Audit, st.just("seg"), selectors, st.just(1 << 31), st.none() | selectors, st.none(), st.none() | selectors)


def _audited(program: Program, recorded: set[int], found: list[Audit], held: Any) -> Program:
    number, tiers = 0, []
    for tier in program.tiers:
        rules = []
        for rule in tier.rules:
            number += 1
            rules.append(replace(rule, audit=rule.action is Action.DENY and number in recorded))
        tiers.append(replace(tier, rules=tuple(rules)))
    return replace(program, tiers=tuple(tiers), audits=tuple(found), held=held)


audited_programs = st.builds(
    _audited, programs, st.sets(st.integers(1, 8)), st.lists(audits, max_size=2), st.one_of(st.just(Nothing()), selectors)
)


def _firm(program: Program) -> Program:
    return replace(program, tiers=tuple(replace(t, rules=tuple(r for r in t.rules if not r.audit)) for t in program.tiers))


def model_covered(program: Program, src: Subject, dst: Subject) -> bool:
    ends = (src, dst)
    if any(s.nets for s in ends) or any(model_matches(program.held, s) for s in ends):
        return False
    firm = _firm(program)
    known = any(model(firm, a, b, p, q) for a, b in (ends, ends[::-1]) for p in (0, 1, 6, 17, 132, 47)
                for q in ((1, 22, 53, 80, 81, 443, 8000, 9000, 65535) if p in PORTED else (None,)))  # fmt: skip
    for audit in program.audits:
        members = [model_matches(audit.members, s) for s in ends]
        if audit.within is not None and not all(model_matches(audit.within, s) for s in ends):
            continue
        if audit.concerns is not None and not any(model_matches(audit.concerns, s) for s in ends):
            continue
        if all(members) or (any(members) and known):
            return True
    return False


def model_audit(program: Program, src: Subject, dst: Subject, proto: int, port: int | None) -> tuple[bool, bool]:
    """(forwarded, enforced)"""
    firm = _firm(program)
    stern = model(replace(program, audits=()), src, dst, proto, port)
    if stern or model(firm, src, dst, proto, port):
        return True, stern
    return model(replace(firm, default=Action.ALLOW), src, dst, proto, port) and model_covered(program, src, dst), False


@given(audited_programs, subjects, subjects)
@settings(max_examples=200, deadline=None)
def test_evaluate_and_permitted_agree_with_the_model(program: Program, src: Subject, dst: Subject) -> None:
    held, sure = permitted(program, src, dst), enforced(program, src, dst)
    for proto, port in FLOWS:
        decision = evaluate(program, src, dst, proto, port)
        forwarded, stern = model_audit(program, src, dst, proto, port)
        assert decision.allowed == forwarded == held.allows(1 if proto == 58 else proto, port), (proto, port)
        assert decision.audited == (forwarded and not stern)
        assert sure.allows(1 if proto == 58 else proto, port) == stern
        assert evaluate(strict(program), src, dst, proto, port).allowed == stern
        if decision.would is not None:
            assert decision.would == evaluate(strict(program), src, dst, proto, port) or decision.would.verdict == "deny"
            assert "would be denied" in decision.reason
    for proto in PORTED:
        assert evaluate(program, src, dst, proto).allowed == held.allows(proto, None)


@given(audited_programs, st.lists(subjects, max_size=6), inside)
@settings(max_examples=200, deadline=None)
def test_classes_agree_with_permitted(program: Program, found: list[Subject], late: Subject) -> None:
    by_name = {s.name: s for s in found}
    classes = Classes(program, by_name.values())
    classes.put(late)
    by_name[late.name] = late
    for src in by_name.values():
        targets = {n for c in classes.targets(classes.class_of(src.name)) for n in classes.members[c]}
        sources = {n for c in classes.sources(classes.class_of(src.name)) for n in classes.members[c]}
        for dst in by_name.values():
            assert classes.permitted(src.name, dst.name) == permitted(program, src, dst)
            assert (dst.name in targets) == bool(permitted(program, src, dst))
            assert (dst.name in sources) == bool(permitted(program, dst, src))


@given(audited_programs, subjects, subjects)
@settings(max_examples=60, deadline=None)
def test_an_audit_never_narrows_and_its_end_is_the_program_without_it(program: Program, src: Subject, dst: Subject) -> None:
    assert not enforced(program, src, dst) - permitted(program, src, dst)
    assert permitted(strict(program), src, dst) == enforced(program, src, dst)
    assert not any(r.audit for t in in_force(program).tiers for r in t.rules)
    for proto, port in ((6, 80), (1, None)):
        found = explain(program, src, dst, proto, port)
        assert found.decision == evaluate(program, src, dst, proto, port)


# ---- bounds


def _rules(*rules: tuple[str, int | None, tuple[str, ...]]) -> Program:
    made = tuple(
        Rule(f"r{n}", Action.ALLOW, _everyone(), _everyone(), parse_ports(ports), max_rate=rate,
             processes=tuple(Process("uid", uid) for uid in uids))
        for n, (ports, rate, uids) in enumerate(rules)
    )  # fmt: skip
    return Program((Tier("t", made),))


def _everyone() -> Any:
    from policy.program import Everything

    return Everything()


@given(st.lists(st.tuples(port_maps, st.none() | st.integers(1000, 1003), st.sets(st.sampled_from(("1", "2", "3")), max_size=2), st.none() | st.integers(1, 3)), max_size=4))
@settings(max_examples=150, deadline=None)
def test_bounds_agree_with_a_port_by_port_reading(rules: list[tuple[PortMap, int | None, set[str], int | None]]) -> None:
    made = tuple(
        Rule(f"r{n}", Action.ALLOW, _everyone(), _everyone(), ports, max_rate=rate, processes=tuple(Process("uid", u) for u in sorted(uids)),
             idle_timeout=idle)
        for n, (ports, rate, uids, idle) in enumerate(rules)
    )
    web, api = Subject("web"), Subject("api")
    found = bounds(Program((Tier("t", made),)), web, api)
    for proto, port in FLOWS:
        hits = [r for r in made if r.ports.allows(1 if proto == 58 else proto, port)]
        here = [b for b in found if b.ports.allows(1 if proto == 58 else proto, port)]
        idles = [b.idle_timeout for b in here if b.idle_timeout is not None]
        held = [r.idle_timeout for r in hits if r.idle_timeout is not None and proto in {6, 17}]
        assert idles == ([min(held)] if held else [])
        rates = [b.max_rate for b in here if b.max_rate is not None]
        assert rates == ([min(r.max_rate for r in hits if r.max_rate is not None)] if any(r.max_rate for r in hits) else [])
        wanted = [set().union(*(r.processes for r in hits))] if hits and all(r.processes for r in hits) else []
        assert [set(b.processes) for b in here if b.processes] == wanted


# ---- from a file

FILE = """meshpolicy: 1
guardrails:
  - deny: {id: SEC-1, from: "*", to: {role: db}, on: tcp/22}
segments:
  - name: shop
    members: {app: shop}
    mode: {audit_until: 2031-01-01}
    alert: {on_deny: page}
    allow:
      - {id: web-api, from: {role: web}, to: {role: api}, on: tcp/80}
      - {id: ops-web, from: {role: ops}, to: {role: web}, on: tcp/22}
    deny:
      - {id: no-9, from: "*", to: {role: api}, on: tcp/9}
  - name: vault
    members: {app: vault}
    allow:
      - {id: api-vault, from: {role: api}, to: {app: vault}, on: tcp/443, max_rate: 8Mbit}
      - {id: job, from: {role: ops, process: ["uid:8", "uid:7"]}, to: {app: vault}, on: tcp/444}
"""
BEFORE, END = 1_900_000_000, 1_924_992_000
WHO = {
    name: Subject(name, labels)
    for name, labels in {
        "web": {"app": "shop", "role": "web"}, "api": {"app": "shop", "role": "api"}, "db": {"app": "shop", "role": "db"},
        "ops": {"role": "ops"}, "stranger": {"role": "x"}, "vault": {"app": "vault"},
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load([("p.yaml", FILE)])


@pytest.mark.parametrize(
    ("src", "dst", "port", "verdict", "by"),
    [
        ("web", "api", 80, "allow", "web-api"),
        ("web", "api", 81, "audit", "default"),  # members of one auditing segment
        ("db", "web", 5, "audit", "default"),
        ("web", "api", 9, "audit", "no-9"),  # its explicit deny is recorded
        ("web", "db", 22, "deny", "guardrail:SEC-1"),  # a guardrail enforces all the same
        ("ops", "web", 22, "allow", "ops-web"),
        ("ops", "web", 80, "audit", "default"),  # acquainted with a member
        ("web", "ops", 80, "audit", "default"),  # in both directions
        ("ops", "api", 80, "deny", "default"),  # not acquainted with this member
        ("stranger", "web", 80, "deny", "default"),
        ("api", "vault", 443, "allow", "api-vault"),
        ("api", "vault", 80, "deny", "default"),  # a member of an enforcing segment
        ("vault", "api", 80, "deny", "default"),
    ],
)
def test_whom_an_audit_opens(policy: Policy, src: str, dst: str, port: int, verdict: str, by: str) -> None:
    decision = evaluate(compile_policy(policy, BEFORE), WHO[src], WHO[dst], 6, port)
    assert ("audit" if decision.audited else decision.verdict, decision.by) == (verdict, by)
    after = evaluate(compile_policy(policy, END), WHO[src], WHO[dst], 6, port)
    assert (after.verdict, after.audited, after.by) == ("allow" if verdict == "allow" else "deny", False, by)
    assert evaluate(compile_policy(policy), WHO[src], WHO[dst], 6, port).allowed == after.allowed
    judged = evaluate(compile_policy(policy, BEFORE, audit=False), WHO[src], WHO[dst], 6, port)
    assert (judged.verdict, judged.by) == (after.verdict, after.by)


def test_the_end_of_an_audit_is_a_change(policy: Policy) -> None:
    assert next_change(policy, BEFORE) == END
    assert next_change(policy, END) is None
    far = load([("p.yaml", FILE.replace("2031-01-01", "9999-12-31"))])
    assert next_change(far, BEFORE) == 253_402_214_400


def test_a_rule_may_audit_alone() -> None:
    text = FILE.replace("    mode: {audit_until: 2031-01-01}\n", "").replace("on: tcp/9}", "on: tcp/9, mode: {audit_until: 2031-01-01}}")
    text = text.replace("on: tcp/80}", "on: [tcp/80, tcp/9]}").replace("on: tcp/22}\nseg", "on: tcp/22, mode: {audit_until: 2031-01-01}}\nseg")
    one = load([("p.yaml", text)])
    before, after = compile_policy(one, BEFORE), compile_policy(one, END)
    found = evaluate(before, WHO["web"], WHO["api"], 6, 9)
    assert (found.allowed, found.audited, found.by) == (True, True, "no-9")
    assert not evaluate(after, WHO["web"], WHO["api"], 6, 9).allowed
    assert not evaluate(before, WHO["web"], WHO["api"], 6, 10).allowed  # nothing else is held open
    assert evaluate(before, WHO["web"], WHO["db"], 6, 22).by == "default"  # the guardrail is only recorded, the default is not
    assert not evaluate(before, WHO["web"], WHO["db"], 6, 22).allowed
    assert next_change(one, BEFORE) == END


def test_a_draft_sends_nothing_and_holds_nothing(policy: Policy) -> None:
    text = FILE.replace("  - name: vault\n", "  - name: vault\n    mode: draft\n")
    program = compile_policy(load([("p.yaml", text)]), BEFORE)
    assert not evaluate(program, WHO["api"], WHO["vault"], 6, 443).allowed
    assert isinstance(program.held, Nothing)
    assert [a.sink for a in program.alerts] == ["page"]


def test_a_scope_audits_inside_itself_only() -> None:
    text = 'meshpolicy: 1\nscope: a\nsegments:\n  - {name: s, members: "*", mode: {audit_until: 2031-01-01}}\n'
    program = compile_policy(load([("p.yaml", text)]), BEFORE)
    one, two, three = Subject("a/one"), Subject("a/two"), Subject("b/three")
    assert evaluate(program, one, two, 6, 80).audited
    assert not evaluate(program, one, three, 6, 80).allowed
    assert not evaluate(program, three, one, 6, 80).allowed


def test_ceilings_and_processes_reach_the_program(policy: Policy) -> None:
    program = compile_policy(policy, BEFORE)
    (rate,) = bounds(program, WHO["api"], WHO["vault"])
    assert (rate.rule, rate.max_rate, str(rate.ports)) == ("api-vault", 1_000_000, "tcp/443")
    (who,) = bounds(program, WHO["ops"], WHO["vault"])
    assert who.processes == (Process("uid", "7"), Process("uid", "8"))
    assert [str(p) for p in who.processes] == ["uid 7", "uid 8"]
    assert bounds(program, WHO["web"], WHO["api"]) == ()


def test_an_audit_holds_nothing_back() -> None:
    text = FILE.replace("on: tcp/80}", "on: tcp/80, max_rate: 1Mbit}").replace("from: {role: web}", "from: {role: web, process: 'uid:5'}")
    one = load([("p.yaml", text)])
    assert bounds(compile_policy(one, BEFORE), WHO["web"], WHO["api"]) == ()
    assert [(b.max_rate, b.processes) for b in bounds(compile_policy(one, END), WHO["web"], WHO["api"])] == [
        (125_000, ()), (None, (Process("uid", "5"),))
    ]  # fmt: skip


def test_an_idle_timeout_is_a_rules_own_or_its_segments() -> None:
    text = """meshpolicy: 1
segments:
  - name: s
    members: {app: shop}
    %s
    idle_timeout: 5m
    allow:
      - {id: a, from: {role: web}, to: {role: api}, on: [tcp/80, icmp], idle_timeout: 10s}
      - {id: b, from: {role: web}, to: {role: api}, on: tcp/80-81}
      - {id: c, from: {role: web}, to: {role: api}, on: icmp}
    deny:
      - {id: d, from: {role: web}, to: {role: api}, on: tcp/82}
grants:
  - {id: g, from: {role: web}, to: {role: api}, on: udp/53, not_after: 2031-03-01, idle_timeout: 2h}
"""
    one = load([("p.yaml", text % "mode: enforce")])
    assert {r.id: r.idle_timeout for r in one.rules()} == {"a": 10, "b": 300, "c": None, "d": None, "grant:g": 7200}
    web, api = Subject("w", {"app": "shop", "role": "web"}), Subject("a", {"app": "shop", "role": "api"})
    now = parse_instant("2031-01-15")
    found = bounds(compile_policy(one, now), web, api)
    assert [(b.rule, str(b.ports), b.idle_timeout) for b in found] == [("a", "tcp/80", 10), ("b", "tcp/81", 300), ("grant:g", "udp/53", 7200)]
    audit = load([("p.yaml", text % "mode: {audit_until: 2031-02-01}")])
    assert [b.rule for b in bounds(compile_policy(audit, now), web, api)] == ["grant:g"]
    with pytest.raises(BadPolicy) as caught:
        load([("p.yaml", text.replace("b, from: {role: web}", "b, from: spiffe://other.example/x") % "mode: enforce")])
    assert (caught.value.code, caught.value.line) == ("policy.not_enforced", 6)


def test_what_explain_says_of_an_audited_flow(policy: Policy) -> None:
    found = explain(compile_policy(policy, BEFORE), WHO["web"], WHO["api"], 6, 81)
    assert found.decision.reason.startswith("audit of segment shop until 2031-01-01T00:00:00Z: would be denied: default deny")
    assert found.smallest_change is not None
    assert "tcp/81" in str(found.smallest_change)  # what to do before the audit ends


def test_the_rest_of_the_language_is_kept() -> None:
    text = """meshpolicy: 1
review: {approvals: 2, paths: [prod]}
idle: {keep_membership: 90d, on_return: reattest_then_current_policy}
grants:
  - {id: g, from: "*", to: "*", on: tcp/1, until: {workload_ends: job}, approved_by: [a, b], max_rate: 8kbit}
"""
    one = load([("p.yaml", text)])
    assert (one.reviews[0].approvals, one.reviews[0].paths) == (2, ("prod",))
    assert (one.idle[0].keep_membership, one.idle[0].on_return) == (90 * 86400, "reattest_then_current_policy")
    assert (one.grants[0].ends_with, one.grants[0].approved_by) == ("job", ("a", "b"))
    assert evaluate(compile_policy(one, 5, {"job"}), WHO["web"], WHO["api"], 6, 1).allowed
    assert not evaluate(compile_policy(one, 5, set()), WHO["web"], WHO["api"], 6, 1).allowed
    assert not evaluate(compile_policy(one, 5), WHO["web"], WHO["api"], 6, 1).allowed
