"""mesh.process_rules, and what plans with rules that name control groups ask of the firewall."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.compile import LocalAttachment, compile_plan
from mesh.firewall_rules import Shape, skeleton
from mesh.firewall_sets import all_sets, narrowing, pair_sets, sets_delta
from mesh.plan import Plan, UnitPlan
from mesh.process_rules import levels
from mesh.snapshot import InstanceKey
from policy.program import Process
from tests.unit.mesh.plans import allow, endpoint, facts, placement, program, snapshot

WEB, API = placement("web", "h0", 1), placement("api", "h1", 2)
NGINX = UnitPlan("system.slice/nginx.service", "unified/system.slice/nginx.service", 70)
BATCH = UnitPlan("batch.service", "unified/batch.service", 71)
UNITS = (Process("cgroup", NGINX.path), Process("cgroup", BATCH.path), Process("uid", "7"))
END = (WEB.addresses[0], API.addresses[0])


def plan(groups: dict[str, UnitPlan | str], *processes: Process, kind: str = "host", port: str = "tcp/80") -> Plan:
    at = facts()
    place = LocalAttachment(kind, unit=BATCH if kind == "unit" else None, groups=groups)  # type: ignore[arg-type]  # values of the literal
    at = replace(at, attachments={InstanceKey("web/0"): place})
    rules = (replace(allow("web", "api", port), processes=processes), allow("web", "api", "tcp/81", n=1))
    return compile_plan(snapshot([WEB, API], endpoints=[endpoint("h0"), endpoint("h1")]), at, program=program(*rules))


def known(*groups: UnitPlan) -> dict[str, UnitPlan | str]:
    return {group.path: group for group in groups}


@pytest.mark.parametrize("kind", ["host", "unit"])
def test_a_group_is_compared_by_its_id(kind: str) -> None:
    one = plan(known(NGINX, BATCH), *UNITS, kind=kind)
    assert one.notes == ()
    sets = all_sets(one)
    flow = f"{END[0]} . {END[1]} . 6 . 80-80"
    assert sets["bound4"] == {flow}
    assert sets["uid4"] == {f"7 . {flow}"}
    assert sets["groupflow2_4"] == {f'"{NGINX.place}" . {flow} comment "group 70"'}
    assert sets["groupflow1_4"] == {f'"{BATCH.place}" . {flow} comment "group 71"'}
    assert sets["pair4"] == {f"{END[0]} . {END[1]} . 6 . 81"}
    assert levels(one) == (1, 2)


def test_in_a_group_that_is_not_there_is_nobody() -> None:
    one = plan(known(replace(NGINX, ident=None)), UNITS[0])
    assert [(n.code, n.text) for n in one.notes] == [
        ("plan.process", "nobody in /system.slice/nginx.service uses tcp/80 of rule r0 as web/0: it is not there; is its unit running?")
    ]
    sets = all_sets(one)
    assert not [name for name in sets if name.startswith(("groupflow", "uid"))]
    assert f"{END[0]} . {END[1]} . 6 . 80" not in sets["pair4"]
    assert levels(one) == (2,), "the chains ask for it all the same"


@pytest.mark.parametrize(("groups", "why"), [
    ({NGINX.path: "/system.slice does not belong to root alone"}, "/system.slice does not belong to root alone"), ({}, "control groups are not known here"),
])  # fmt: skip
def test_a_group_that_proves_nothing_permits_nothing(groups: dict[str, UnitPlan | str], why: str) -> None:
    alone = plan(groups, UNITS[0])
    assert [str(p.ports) for p in alone.pairs.values()] == ["tcp/81"]
    assert [why in n.text for n in alone.notes] == [True]
    beside = plan(groups, UNITS[0], UNITS[2])
    assert [str(p.ports) for p in beside.pairs.values()] == ["tcp/80-81"]
    assert [b.processes for p in beside.pairs.values() for b in p.bounds] == [(UNITS[2],)]


def test_a_namespace_has_no_groups_to_compare() -> None:
    one = plan(known(NGINX), UNITS[0], kind="netns")
    assert [str(p.ports) for p in one.pairs.values()] == ["tcp/81"]
    assert ["own namespace" in n.text for n in one.notes] == [True]


def test_a_group_made_anew_is_another_element() -> None:
    """It cannot be deleted by its name: the set is emptied and filled in one transaction."""
    old, new = plan(known(NGINX, BATCH), *UNITS), plan(known(replace(NGINX, ident=99), BATCH), *UNITS)
    delta = sets_delta(old, new)
    text = narrowing("retinue", delta)
    assert "flush set inet retinue groupflow2_4" in text
    assert "delete element" not in text
    assert "batch" not in text
    assert {line.rpartition("comment ")[2] for line in delta.add["groupflow2_4"]} == {'"group 99"'}
    gone = sets_delta(old, plan(known(replace(NGINX, ident=None), BATCH), *UNITS))
    assert "groupflow2_4" in gone.delete
    assert not gone.add


def test_wide_ranges_and_protocols_without_ports() -> None:
    (pair,) = plan(known(NGINX), UNITS[0], port="any").pairs.values()
    sets = pair_sets(pair)
    assert sets["groupflow2_4"] == {f'"{NGINX.place}" . {flow} comment "group 70"' for flow in sets["bound4"]}
    assert f"{END[0]} . {END[1]} . 0-5 . 0-65535" in sets["bound4"], "all but TCP, which the other rule opens to everybody"


def test_the_kernel_is_asked_for_groups_only_when_there_are_any() -> None:
    assert "cgroup" not in skeleton("rtn0")
    text = skeleton("rtn0", shape=Shape(named=(2, 3)))
    for family, ip in ((4, "ip"), (6, "ip6")):
        chain = text.partition(f"chain original{family} {{")[2].partition("\n}")[0]
        lookups = [
            f"meta skuid . {ip} saddr . {ip} daddr . meta l4proto . th dport @uid{family} goto pass",
            *(f"socket cgroupv2 level {n} . {ip} saddr . {ip} daddr . meta l4proto . th dport @groupflow{n}_{family} goto pass" for n in (2, 3)),
            f"{ip} saddr . {ip} daddr . meta l4proto . th dport @bound{family} jump unowned", f"@apair{family} goto watch",
        ]  # fmt: skip
        places = [chain.index(one) for one in lookups]
        assert places == sorted(places)
        assert "cgroup" not in text.partition(f"chain reply{family} {{")[2].partition("\n}")[0]
    chain = text.partition("chain unowned {")[2].partition("}")[0].strip().splitlines()
    assert [line.strip() for line in chain] == [
        "meta skuid >= 0 return", "meta l4proto != 6 return", "tcp flags & (syn|rst) != 0 return", "ct state established goto pass",
    ]  # fmt: skip
    assert text.count("{") == text.count("}")
