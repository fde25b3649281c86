"""mesh.idle_rules: the chains of idle timeouts, whose flows are watched, and when they may be taken over in the middle."""

from __future__ import annotations

import re
from dataclasses import replace

from mesh import idle_rules
from mesh.compile import LocalFacts
from mesh.firewall import fingerprint
from mesh.firewall_rules import Shape, replacement, skeleton
from mesh.firewall_sets import Sets, all_sets, sets_delta
from mesh.plan import Plan
from policy.program import Rule
from tests.unit.mesh.plans import allow, facts, placement
from tests.unit.mesh.test_firewall import V4, V6, plan


def idle(src: str, dst: str, *words: str, after: int, n: int = 0) -> Rule:
    return replace(allow(src, dst, *words, n=n), idle_timeout=after)


def test_elements_of_a_pair_in_both_families() -> None:
    one = plan(idle("web", "api", "tcp/80", "udp/5000-6000", "icmp", after=600), idle("web", "api", "tcp/81", after=5, n=1))
    sets = all_sets(one)
    for family, names in ((4, V4), (6, V6)):
        ends = f"{names['web']} . {names['api']}"
        assert sets[f"idle{family}"] == {
            f"{ends} . 6 . 80-80 : jump idle600_{family}", f"{ends} . 17 . 5000-6000 : jump idle600_{family}",
            f"{ends} . 6 . 81-81 : jump idle5_{family}",
        }  # fmt: skip
        assert sets[f"grace{family}"] == {f"{ends} timeout 600s"}
    assert idle_rules.seconds(one) == (5, 600)


def test_the_shortest_of_two_rules_holds_and_icmp_has_none() -> None:
    one = plan(idle("web", "api", "any", after=60), idle("web", "api", "tcp/80", after=5, n=1))
    (bound, wide) = next(iter(one.pairs.values())).bounds
    assert (bound.idle_timeout, str(bound.ports), wide.idle_timeout) == (5, "tcp/80", 60)
    assert {p for p in wide.ports.ports if wide.ports.bits(p)} == {6, 17}
    assert not wide.ports.rest
    assert not wide.ports.allows(6, 80)


def test_the_table_without_idle_timeouts_has_nothing_of_it() -> None:
    assert "idle" not in skeleton("rtn0")
    assert not {n for n in all_sets(plan(allow("web", "api", "tcp/80"))) if n.startswith(("idle", "grace"))}


def test_every_jump_has_its_chain_and_every_set_its_declaration() -> None:
    sets = all_sets(plan(idle("web", "api", "tcp/80", after=600), idle("web", "batch", "udp/1", after=5, n=1)))
    text = replacement("rtn0", sets, shape=Shape(idle=(5, 600)))
    chains = re.findall(r"^chain (\w+)", text, re.MULTILINE)
    assert len(chains) == len(set(chains))
    assert set(re.findall(r"(?:goto|jump) (\w+)", text)) <= set(chains)
    assert set(re.findall(r"@(\w+)", text)) <= set(re.findall(r"(?:set|map) (\w+)", text))
    assert set(re.findall(r"counter name (\w+)", text)) <= set(re.findall(r"^counter (\w+)", text, re.MULTILINE))
    for family in (4, 6):
        assert text.count(f"vmap @idle{family}") == 2
    assert f"timeout {idle_rules.CLOSING}s" in text  # no longer than connection tracking keeps what is being closed
    assert "timeout 5s" in text


def moved(*rules: Rule, prepared: bool) -> Plan:
    """web comes to this host: prepared, then active."""
    from mesh.compile import compile_plan
    from tests.unit.mesh.plans import endpoint, program, snapshot

    api = placement("api", "h1", 3)
    old = placement("web", "h1", 1)
    new = placement("web", "h0", 1, epoch=2, state="prepare") if prepared else placement("web", "h0", 1, epoch=2)
    at: LocalFacts = facts("web/0")
    snap = snapshot([old, api] if prepared else [new, api], endpoints=[endpoint("h0"), endpoint("h1")], prepares=[new] if prepared else [])
    return compile_plan(snap, at, program=program(*rules))


def test_flows_are_taken_over_where_a_pair_its_bound_or_its_place_is_new() -> None:
    none, one, longer = (plan(*rules) for rules in (
        (allow("web", "api", "tcp/80"),), (idle("web", "api", "tcp/80", after=60),), (idle("web", "api", "tcp/80", after=90),),
    ))  # fmt: skip
    ends = {4: f"{V4['web']} . {V4['api']}", 6: f"{V6['web']} . {V6['api']}"}

    def renewed(old: Plan, new: Plan) -> Sets:
        return dict(sets_delta(old, new).grace)

    assert renewed(none, one) == {f"grace{f}": {f"{ends[f]} timeout 60s"} for f in (4, 6)}
    assert renewed(one, longer)["grace4"] == {f"{ends[4]} timeout 90s"}
    assert renewed(one, one) == {} == renewed(one, none)
    other = plan(idle("web", "api", "tcp/80", after=60), allow("batch", "api", "tcp/80", n=1))
    assert renewed(one, other) == {}  # somebody else's pair
    rule = idle("web", "api", "tcp/80", after=60)
    before, after = moved(rule, prepared=True), moved(rule, prepared=False)
    assert before.pairs.keys() == after.pairs.keys()
    assert renewed(before, after)["grace6"] == {f"{ends[6]} timeout 60s"}


def test_a_grace_begins_anew_whether_it_is_there_or_not() -> None:
    assert idle_rules.renewal("t", {}) == ""
    assert idle_rules.renewal("t", {"grace4": {"a . b timeout 5s"}}).splitlines() == [
        "add element inet t grace4 { a . b timeout 5s }",
        "delete element inet t grace4 { a . b }",
        "add element inet t grace4 { a . b timeout 5s }",
    ]


def test_what_the_kernel_writes_by_itself_is_no_difference() -> None:
    def table(live: list[str], rules: list[str]) -> list[dict[str, object]]:
        return [{"set": {"name": n, "elem": live}} for n in ("live4", "closing6", "grace4", "idled4", "idled_by6")] + [
            {"map": {"name": "idle4", "elem": rules}}
        ]

    assert fingerprint(table(["x"], ["y"])) == fingerprint(table([], ["y"]))
    assert fingerprint(table([], ["y"])) != fingerprint(table([], []))
