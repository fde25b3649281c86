"""Properties of the evaluator over random programs, held against a slow model written from the documentation."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from policy.classes import Classes, reach
from policy.evaluate import evaluate, matches, permitted
from policy.explain import explain, flips
from policy.nets import V6_ALL, covers, ranges_of
from policy.ports import ANYTHING, PORTED, PortMap, parse_ports
from policy.program import (
    BOTH,
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

KEYS, VALUES = ("app", "role", "env"), ("a", "b", "c")
NAMES = ("shop/web", "shop/api", "pay/db", "solo")
CIDRS = ("10.0.0.0/8", "10.1.0.0/16", "192.168.0.1-192.168.0.9", "2001:db8::/32", "0.0.0.0/0")
FLOWS = [(6, p) for p in (1, 22, 80, 81, 443, 8000, 65535)] + [(17, 53), (17, 80), (132, 80), (1, None), (58, None), (47, None)]
PORT_WORDS = ("tcp/80", "tcp/80-443", "tcp", "udp/53", "udp", "icmp", "47", "sctp/80", "tcp/8000-65535", "any")

leaves = st.one_of(
    st.builds(In, st.sampled_from(KEYS), st.frozensets(st.sampled_from(VALUES), max_size=2)),
    st.builds(Exists, st.sampled_from(KEYS)),
    st.builds(Named, st.frozensets(st.sampled_from(NAMES), max_size=2)),
    st.builds(Under, st.sampled_from(("shop", "pay", "sh"))),
    st.builds(Nets, st.lists(st.sampled_from(CIDRS), min_size=1, max_size=2).map(tuple), st.sampled_from(((), ("10.1.2.0/24",)))),
    st.just(Everything()),
    st.just(Nothing()),
)
selectors = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(AllOf, st.lists(inner, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, max_size=3).map(tuple)),
    ),
    max_leaves=4,
)
port_maps = st.sampled_from(PORT_WORDS).map(parse_ports)
rules = st.builds(
    Rule,
    id=st.just("r"),
    action=st.sampled_from(Action),
    src=selectors,
    dst=selectors,
    ports=port_maps,
    directions=st.sampled_from((BOTH, ("egress",), ("ingress",))),
    concerns=st.none() | selectors,
)
tiers = st.builds(
    Tier,
    name=st.just("t"),
    rules=st.lists(rules, max_size=4).map(tuple),
    order=st.sampled_from(("first-match", "deny-wins")),
    isolates=st.dictionaries(st.sampled_from(BOTH), selectors, max_size=2),
    otherwise=st.sampled_from((Action.PASS, Action.PASS, Action.DENY, Action.ALLOW)),
)


def _numbered(parts: list[Tier], default: Action) -> Program:
    out = []
    for n, tier in enumerate(parts):
        named = tuple(replace(rule, id=f"r{n}.{i}") for i, rule in enumerate(tier.rules))
        out.append(replace(tier, name=f"t{n}", rules=named))
    return Program(tuple(out), default)


programs = st.builds(_numbered, st.lists(tiers, max_size=3), st.sampled_from((Action.DENY, Action.DENY, Action.ALLOW)))
inside = st.builds(Subject, st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES)))
outside = st.builds(
    Subject, st.sampled_from(("office", "router")), st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=1),
    nets=st.lists(st.sampled_from(("10.1.2.3", "10.1.0.0/16", "10.0.0.0/7", "192.168.0.5", "2001:db8::1", "8.8.8.8", "*")), min_size=1, max_size=2).map(tuple),
)
subjects = st.one_of(inside, inside, outside)


# ---- the model: one port at a time, one address at a time


def model_matches(selector: object, subject: Subject) -> bool:
    match selector:
        case Everything():
            return subject.nets == ()
        case Nothing():
            return False
        case Named(names):
            return any(n == subject.name for n in names)
        case Under(prefix):
            return subject.name.split("/")[: len(prefix.split("/"))] == prefix.split("/")
        case In(key, values):
            return any(k == key and v in values for k, v in subject.labels.items())
        case Exists(key):
            return any(k == key for k in subject.labels)
        case Not(term):
            return not model_matches(term, subject)
        case AllOf(terms):
            return not any(not model_matches(t, subject) for t in terms)
        case AnyOf(terms):
            return any(model_matches(t, subject) for t in terms)
        case Nets(cidrs, excluding):
            if not subject.nets:
                return False
            (low, _), *_ = ranges_of(subject.nets)
            return any(a <= low <= b for a, b in ranges_of(cidrs)) and not any(a <= low <= b for a, b in ranges_of(excluding))
    raise AssertionError(selector)


def model_direction(program: Program, way: str, src: Subject, dst: Subject, proto: int, port: int | None) -> bool:
    for tier in program.tiers:
        hit = []
        for rule in tier.rules:
            about = rule.concerns is None or model_matches(rule.concerns, src) or model_matches(rule.concerns, dst)
            if way in rule.directions and about and model_matches(rule.src, src) and model_matches(rule.dst, dst) and rule.ports.allows(proto, port):
                hit.append(rule.action)
        if tier.order == "deny-wins":
            hit = [a for a in (Action.DENY, Action.PASS, Action.ALLOW) if a in hit]
        if hit:
            if hit[0] is Action.PASS:
                continue
            return hit[0] is Action.ALLOW
        who = src if way == "egress" else dst
        if way in tier.isolates and model_matches(tier.isolates[way], who):
            return False
        if tier.otherwise is not Action.PASS:
            return tier.otherwise is Action.ALLOW
    return program.default is Action.ALLOW


def addresses(program: Program, subject: Subject) -> list[Subject]:
    """Single addresses of an outside subject at and beside every border, so that none is missed."""
    if not subject.nets:
        return [subject]
    spans = ranges_of(subject.nets)
    borders = {edge for low, high in spans for edge in (low, high)}
    for cidr in (*CIDRS, "10.1.2.0/24"):
        for low, high in ranges_of((cidr,)):
            borders |= {low - 1, low, high, high + 1}
    inner = [b for b in borders if covers(spans, ((b, b),))]
    return [replace(subject, nets=(_address(b),)) for b in inner]


def _address(position: int) -> str:
    import ipaddress

    return str(ipaddress.IPv6Address(position - V6_ALL[0])) if position >= V6_ALL[0] else str(ipaddress.IPv4Address(position))


def model(program: Program, src: Subject, dst: Subject, proto: int, port: int | None) -> bool:
    return all(
        model_direction(program, way, one, other, 1 if proto == 58 else proto, port)
        for one in addresses(program, src)
        for other in addresses(program, dst)
        for way in BOTH
    )


# ---- properties


@given(programs, subjects, subjects)
@settings(max_examples=150, deadline=None)
def test_evaluate_agrees_with_the_model(program, src, dst):
    for proto, port in FLOWS:
        assert evaluate(program, src, dst, proto, port).allowed == model(program, src, dst, proto, port), (proto, port)


@given(programs, subjects, subjects)
@settings(max_examples=150, deadline=None)
def test_permitted_agrees_with_evaluate_port_by_port(program, src, dst):
    held = permitted(program, src, dst)
    for proto, port in FLOWS:
        decision = evaluate(program, src, dst, proto, port)
        assert decision.allowed == held.allows(1 if proto == 58 else proto, port)
        assert decision.reason
        assert decision.verdict == ("allow" if decision.allowed else "deny")
    for proto in PORTED:
        assert evaluate(program, src, dst, proto).allowed == held.allows(proto, None)


@given(programs, st.lists(inside | outside, max_size=6), st.data())
@settings(max_examples=120, deadline=None)
def test_classes_agree_with_permitted_also_after_changes(program, found, data):
    by_name = {s.name: s for s in found}
    classes = Classes(program, by_name.values())
    for one in data.draw(st.lists(inside, max_size=3)):
        classes.put(one)
        by_name[one.name] = one
    if by_name and data.draw(st.booleans()):
        gone = min(by_name)
        classes.remove(gone)
        classes.remove(gone)
        del by_name[gone]
    assert {s.name for s in classes.subjects()} == set(by_name)
    for src in by_name.values():
        targets = {n for c in classes.targets(classes.class_of(src.name)) for n in classes.members[c]}
        sources = {n for c in classes.sources(classes.class_of(src.name)) for n in classes.members[c]}
        for dst in by_name.values():
            assert classes.permitted(src.name, dst.name) == permitted(program, src, dst)
            assert (dst.name in targets) == bool(permitted(program, src, dst))
            assert (dst.name in sources) == bool(permitted(program, dst, src))


@given(programs, st.lists(inside, max_size=5))
@settings(max_examples=100, deadline=None)
def test_reach_is_the_transitive_closure(program, found):
    by_name = {s.name: s for s in found}
    for start in by_name:
        expected, edge = {start}, {start}
        depth_one = None
        while edge:
            edge = {n for n in by_name if n not in expected and any(permitted(program, by_name[m], by_name[n]) for m in expected)}
            expected |= edge
            depth_one = set(edge) if depth_one is None else depth_one
        found_chains = reach(Classes(program, by_name.values()), start)
        assert set(found_chains) == expected - {start}
        assert set(reach(Classes(program, by_name.values()), start, 1)) == depth_one
        for name, chain in found_chains.items():
            assert chain[0] == start
            assert chain[-1] == name
            assert all(permitted(program, by_name[a], by_name[b]) for a, b in zip(chain, chain[1:], strict=False))


@given(programs, subjects, subjects)
@settings(max_examples=120, deadline=None)
def test_every_change_that_explain_offers_flips_the_verdict(program, src, dst):
    for proto, port in ((6, 80), (17, None), (58, None)):
        found = explain(program, src, dst, proto, port)
        assert found.decision == evaluate(program, src, dst, proto, port)
        for change in found.changes:
            assert flips(change, program, src, dst, proto, port), change
        if src.name != dst.name and not src.nets and not dst.nets:
            assert found.smallest_change is not None


@given(programs, inside, inside, rules, st.randoms(use_true_random=False))
@settings(max_examples=120, deadline=None)
def test_in_a_deny_wins_tier_order_does_not_matter_and_a_deny_never_widens(program, src, dst, extra, rng):
    chosen = Tier("t", tuple(r for tier in program.tiers for r in tier.rules), "deny-wins")
    shuffled = list(chosen.rules)
    rng.shuffle(shuffled)
    held = permitted(Program((chosen,)), src, dst)
    assert permitted(Program((replace(chosen, rules=tuple(shuffled)),)), src, dst) == held
    denied = replace(chosen, rules=(*chosen.rules, replace(extra, id="extra", action=Action.DENY)))
    assert not permitted(Program((denied,)), src, dst) - held
    allowed = replace(chosen, rules=(*chosen.rules, replace(extra, id="extra", action=Action.ALLOW)))
    assert not held - permitted(Program((allowed,)), src, dst)


@given(selectors, subjects)
@settings(max_examples=150, deadline=None)
def test_matches_agrees_with_the_model_for_single_addresses(selector, subject):
    for one in addresses(Program(()), subject):
        assert matches(selector, one) == model_matches(selector, one)


def test_an_empty_program_permits_nothing():
    rng = random.Random(1)
    for _ in range(50):
        src, dst = (Subject(rng.choice(NAMES), {rng.choice(KEYS): rng.choice(VALUES)}) for _ in range(2))
        assert permitted(Program(()), src, dst) == PortMap()
        assert not any(evaluate(Program(()), src, dst, proto, port).allowed for proto, port in FLOWS)
    assert permitted(Program((), Action.ALLOW), src, dst) == ANYTHING
