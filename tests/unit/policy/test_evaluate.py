"""Reasons and corners of the evaluator; its verdicts are held to a model in test_random_programs.py."""

from __future__ import annotations

import pytest

from policy.evaluate import evaluate, matches, permitted, split
from policy.ports import ANYTHING, NOTHING, TCP, parse_ports
from policy.program import (
    Action,
    AllOf,
    AnyOf,
    Everything,
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
    Where,
)

WEB, API = Subject("web", {"app": "web"}), Subject("api", {"app": "api"})
ALL = Everything()
IN_WEB, IN_API = In("app", frozenset({"web"})), In("app", frozenset({"api"}))


def _rule(rule_id, action, src=ALL, dst=ALL, ports="any", **more):
    return Rule(rule_id, Action(action), src, dst, parse_ports(ports), **more)


def test_every_kind_of_reason():
    here = Where("p.yaml", 7, 3)
    tier = Tier("seg", (_rule("a", "allow", IN_WEB, IN_API, "tcp/80", where=here, why="orders"), _rule("d", "deny", ALL, ALL, "tcp/22")))
    program = Program((tier,), digest="d1")
    told = evaluate(program, WEB, API, TCP, 80)
    assert (told.verdict, told.rule.id, told.reason, told.tier, told.digest) == ("allow", "a", "allowed by rule a (p.yaml:7): orders", "seg", "d1")
    assert evaluate(program, WEB, API, TCP, 22).reason == "denied by rule d (egress)"
    assert evaluate(program, API, WEB, TCP, 80).reason == "default deny: no rule allows api -> web tcp/80"
    assert evaluate(program, API, WEB, 1).reason == "default deny: no rule allows api -> web icmp"
    isolating = Program((Tier("iso", (), isolates={"ingress": IN_API}),), Action.ALLOW)
    told = evaluate(isolating, WEB, API, TCP, 80)
    assert told.reason == "isolated by tier iso: it selects the destination for ingress and no rule there allows web -> api tcp/80"
    assert told.direction == "ingress"
    assert evaluate(isolating, API, WEB, TCP, 80).reason == "allowed by the program's default"
    leaving = Program((Tier("iso", (), isolates={"egress": IN_API}),), Action.ALLOW)
    assert "selects the source for egress" in evaluate(leaving, API, WEB, TCP, 80).reason
    ended = Program((Tier("end", (), otherwise=Action.DENY),), Action.ALLOW)
    assert evaluate(ended, WEB, API, TCP, 80).reason == "denied by tier end: no rule there allows web -> api tcp/80"
    opened = Program((Tier("end", (), otherwise=Action.ALLOW),))
    assert evaluate(opened, WEB, API, TCP, 80).reason == "allowed by the end of tier end"
    halves = (_rule("out", "allow", directions=("egress",)), _rule("in", "allow", directions=("ingress",)))
    assert evaluate(Program((Tier("t", halves),)), WEB, API, TCP, 80).reason == "egress allowed by rule out, ingress by rule in"
    assert evaluate(Program((Tier("t", halves[1:]),), Action.ALLOW), WEB, API, TCP, 80).rule.id == "in"


@pytest.mark.parametrize(("proto", "port"), [(6, 0), (6, 65536), (6, -1), (17, 70000), (-1, None), (256, 1)])
def test_flows_that_cannot_exist_are_denied(proto, port):
    program = Program((), Action.ALLOW)
    assert evaluate(program, WEB, API, proto, port).reason.startswith("no such protocol or port")
    assert not evaluate(program, WEB, API, proto, port).allowed


def test_without_a_port_any_one_port_is_enough():
    program = Program((Tier("t", (_rule("a", "allow", ports="tcp/8000-8010"), _rule("d", "deny", ports="tcp/8000-8009"))),))
    assert evaluate(program, WEB, API, TCP).allowed
    assert permitted(program, WEB, API) == parse_ports("tcp/8010")
    blocked = Program((Tier("t", (_rule("d", "deny", ports="tcp/1-65535"),)),))
    assert evaluate(blocked, WEB, API, TCP).rule.id == "d"
    assert evaluate(Program(()), WEB, API, TCP).rule is None
    assert evaluate(program, WEB, API, 1, 8).verdict == "deny"  # icmp has no ports; the 8 is not one


def test_pass_leaves_the_tier_and_order_decides_where_it_counts():
    first = Tier("first", (_rule("p", "pass", ports="tcp/80"), _rule("d", "deny", ports="tcp")), "first-match")
    second = Tier("second", (_rule("a", "allow"),))
    assert permitted(Program((first, second)), WEB, API) == (ANYTHING - parse_ports("tcp")) | parse_ports("tcp/80")
    turned = Tier("first", tuple(reversed(first.rules)), "first-match")
    assert not evaluate(Program((turned, second)), WEB, API, TCP, 80).allowed


def test_concerns_needs_one_end():
    rule = _rule("a", "allow", concerns=IN_WEB)
    program = Program((Tier("t", (rule,)),))
    assert permitted(program, WEB, API) == permitted(program, API, WEB) == ANYTHING
    assert permitted(program, API, Subject("other")) == NOTHING


def test_outside_subjects_are_judged_part_by_part():
    rule = _rule("a", "allow", Nets(("10.0.0.0/8",), ("10.9.0.0/16",)), ALL, "tcp/80")
    program = Program((Tier("t", (rule,)),))
    assert permitted(program, Subject("x", nets=("10.1.0.0/16",)), WEB) == parse_ports("tcp/80")
    for nets in (("10.0.0.0/7",), ("10.9.0.0/24",), ("10.0.0.0/8",), ("::/0",)):
        assert permitted(program, Subject("x", nets=nets), WEB) == NOTHING
    told = evaluate(program, Subject("x", nets=("10.8.0.0/15",)), WEB, TCP, 80)
    assert told.reason == "default deny: no rule allows x -> web tcp/80"
    assert [s.nets for s in split(program, Subject("x", nets=("10.8.0.0/15",)))] == [("10.8.0.0/16",), ("10.9.0.0/16",)]
    assert split(program, WEB) == [WEB]
    assert not evaluate(program, WEB, Subject("x", nets=("10.1.0.0/16",)), TCP, 80).allowed


def test_who_matches():
    office = Subject("office", {"site": "x"}, nets=("10.0.0.0/8",))
    assert matches(Everything(), WEB)
    assert not matches(Everything(), office)
    assert not matches(Nets(("0.0.0.0/0",)), WEB)
    assert matches(In("site", frozenset({"x"})), office)
    assert matches(Named(frozenset({"office"})), office)
    assert matches(Not(Nothing()), office)
    assert matches(AllOf(()), office)
    assert not matches(AnyOf(()), office)
    assert matches(Under("a/b"), Subject("a/b/c"))
    assert not matches(Under("a/b"), Subject("a/bc"))
