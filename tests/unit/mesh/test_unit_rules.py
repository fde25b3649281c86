"""mesh.unit_rules and what plans with units ask of the firewall, of routes and of rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.compile import compile_plan
from mesh.firewall_names import accepted_mark
from mesh.firewall_rules import Shape, skeleton
from mesh.firewall_sets import all_sets, narrowing, sets_delta
from mesh.layout import UNIT_RULE, Layout, layout, tables, unit_table, void_name
from mesh.plan import Plan, UnitPlan
from mesh.unit_rules import elements, levels, place_of
from tests.unit.mesh.plans import allow, endpoint, facts, placement, program, snapshot

WEB, API, JOB, FAR = (placement(n, h, i) for i, (n, h) in enumerate((("web", "h0"), ("api", "h0"), ("job", "h0"), ("far", "h1")), 1))
NGINX = UnitPlan("system.slice/nginx.service", "unified/system.slice/nginx.service", 70)
TASK = UnitPlan("batch.service", "unified/batch.service", 71, uid=900)
RULES = (allow("web", "far", "tcp/80"), allow("job", "api", "tcp/80", n=1))


def plan(*, host: tuple[str, ...] = (), world=(WEB, API, JOB, FAR), **units: UnitPlan) -> Plan:
    at = facts(host=host, units={f"{name}/0": unit for name, unit in units.items()})
    return compile_plan(snapshot(world, endpoints=[endpoint("h0"), endpoint("h1")]), at, program=program(*RULES))


def test_a_unit_holds_addresses_and_its_group_alone_uses_them() -> None:
    one = plan(web=NGINX, job=TASK)
    found = elements(one.units)
    assert found["unit4"] == {WEB.addresses[0], JOB.addresses[0]}
    assert found["group2_6"] == {f'"unified/system.slice/nginx.service" . {WEB.addresses[1]} comment "group 70"'}
    assert found["group1_4"] == {f'"unified/batch.service" . {JOB.addresses[0]} comment "group 71"'}
    assert {place_of(e) for n, lines in found.items() if n.startswith("group") for e in lines} == {NGINX.place, TASK.place}
    assert levels(one.units) == (1, 2)
    assert all_sets(one)["held4"] == {WEB.addresses[0], JOB.addresses[0]}


def test_a_group_that_is_not_there_keeps_its_addresses_from_everybody() -> None:
    one = plan(web=replace(NGINX, ident=None))
    found = elements(one.units)
    assert "unit4" in found
    assert not [n for n in found if n.startswith("group")]
    assert [n.code for n in one.notes] == ["plan.unit"]
    assert levels(one.units) == (2,), "the chains ask for it all the same"


def test_a_unit_placed_elsewhere_holds_nothing() -> None:
    one = plan(world=(placement("web", "h1", 1, epoch=2), FAR), web=NGINX)
    assert (one.units, one.host_addresses, elements(one.units)) == ((), (), {})
    assert one.attachments["web/0"].where == "the control group /system.slice/nginx.service"


def test_a_group_made_anew_is_another_element_and_takes_the_others_along_in_one_transaction() -> None:
    """It cannot be deleted by its name: that means the new one by now."""
    other = replace(NGINX, path="system.slice/other.service", place="unified/system.slice/other.service", ident=80)
    old, new = plan(web=NGINX, api=other), plan(web=replace(NGINX, ident=99), api=other)
    delta = sets_delta(old, new)
    text = narrowing("retinue", delta)
    assert "flush set inet retinue group2_4" in text
    assert "nginx" not in text
    assert text.count("other.service") == 2
    assert "delete element" not in text
    assert delta.add["group2_4"] == {f'"{NGINX.place}" . {WEB.addresses[0]} comment "group 99"'}


def test_the_kernel_is_asked_for_groups_only_when_there_are_any() -> None:
    assert "cgroup" not in skeleton("rtn0")
    text = skeleton("rtn0", shape=Shape(levels=(2, 3)))
    for level in (2, 3):
        for family, ip in ((4, "ip"), (6, "ip6")):
            assert f"socket cgroupv2 level {level} . {ip} daddr @group{level}_{family} accept" in text
            assert f"socket cgroupv2 level {level} . {ip} saddr @group{level}_{family} return" in text
    chain = text.partition("chain input {")[2].partition("}")[0]
    assert chain.index("@unit4 goto enter") < chain.index("accept\n    iifname")
    chain = text.partition("chain output {")[2].partition("}")[0]
    assert chain.index("@unit6 jump leave") < chain.index("@local4 goto to_local") < chain.index("@held4 goto here4")
    assert text.count("{") == text.count("}")


def lay(**kw) -> Layout:
    return layout(plan(**kw))


@pytest.mark.parametrize("host", [(), ("api/0",)])
def test_what_the_firewall_has_not_seen_goes_nowhere(host: tuple[str, ...]) -> None:
    one = lay(host=host, web=NGINX)
    places, exact, wide = tables("rtn0")
    assert one.void == void_name("rtn0")
    assert {r.dev for r in one.routes if r.table in {exact, wide}} == {one.void}
    assert {r.dev for r in one.routes if r.table == places} == {"rtn0"}
    sources = {r.src for r in one.routes if r.family == 4}
    assert sources == {(API if host else WEB).addresses[0]}, "the host's own identity comes first"
    assert not [r for r in one.rules if r.uid is not None]
    assert lay(host=("api/0",)).void is None


def test_a_user_has_the_units_address_for_its_own() -> None:
    at = plan(api=NGINX, job=TASK)
    one = layout(at)
    table = unit_table("rtn0", at.attachments["job/0"])
    mark = accepted_mark("rtn0")
    rules = [r for r in one.rules if r.uid is not None]
    assert {(r.family, r.priority, r.table, r.uid, r.mark, r.iif) for r in rules} == {(f, UNIT_RULE, table, 900, (0, mark), "lo") for f in (4, 6)}
    mine = [r for r in one.routes if r.table == table]
    assert {r.src for r in mine} == set(JOB.addresses)
    assert {(r.dst, r.dev) for r in mine if r.local} == {(f"{a}/{128 if ':' in a else 32}", "lo") for a in (*API.addresses, *JOB.addresses)}
    assert {r.src for r in one.routes if r.table != table} == set(API.addresses), "the one without a user is the default"
    assert unit_table("rtn1", at.attachments["job/0"]) != table
    assert UnitPlan("a/b/c", "a/b/c", 1).level == 3
