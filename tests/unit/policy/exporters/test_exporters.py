"""Exports: the truth table survives the way out and back, and what cannot be said is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadInput, RetinueError
from policy.compile import compile_policy
from policy.evaluate import permitted, split
from policy.exporters import KINDS, NotExpressible, compare, export
from policy.exporters.table import Table
from policy.importers import run
from policy.language import load
from policy.ports import ANYTHING, NOTHING, PORTED, PortMap, parse_ports
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
    Program,
    Rule,
    Subject,
    Tier,
    Under,
)

WEB = Subject("shop/web", {"app": "shop", "role": "web"})
WEB2 = Subject("shop/web-2", {"app": "shop", "role": "web"})
API = Subject("shop/api", {"app": "shop", "role": "api"})
DB = Subject("pay/db", {"app": "pay", "role": "db", "zone": "eu/1"})
BARE = Subject("solo")
OFFICE = Subject("office", nets=("10.1.0.0/16", "2001:db8::/48"))
EVERYWHERE = [WEB, WEB2, API, DB, BARE]
TEXT = """\
meshpolicy: 1
guardrails:
  - {deny: {from: {role: batch}, to: {app: pay}, why: no-batch}}
segments:
  - name: shop
    allow:
      - {id: web-api, from: {role: web}, to: {role: api}, on: [tcp/80, tcp/8000-8010]}
      - {id: shop-db, from: {app: shop}, to: {role: db}, on: tcp/5432}
      - {id: twins, from: {role: web}, to: {role: web}, on: udp}
      - {id: all, from: {workload: solo}, to: {role: api}, on: any}
    deny:
      - {id: web-never-db, from: {role: web}, to: {role: db}, on: any}
"""


def program(text: str = TEXT) -> Program:
    return compile_policy(load([("p.yaml", text)]))


def one_rule(ports: str, src: Any = None, dst: Any = None) -> Program:
    rule = Rule("it", Action.ALLOW, src or Everything(), dst or Everything(), parse_ports(ports))
    return Program((Tier("t", (rule,)),))


# ---- properties

KEYS, VALUES = ("app", "role", "port:http/tcp", "ns:team"), ("a", "b", "c/d", "")
NAMES = ("shop/web", "shop/api", "shop-eu/web", "shop/eu/web", "Solo", "ns/x[Pod]")
SUBJECTS = st.builds(Subject, st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=3))
OUTSIDES = st.builds(
    Subject, st.sampled_from(("office", "depot")), st.dictionaries(st.sampled_from(("app", "via")), st.sampled_from(("a", "shop/web")), max_size=1),
    nets=st.lists(st.sampled_from(("10.1.0.0/16", "10.9.0.1-10.9.0.6", "2001:db8::/48", "8.8.8.8")), min_size=1, max_size=2).map(tuple),
)
LEAVES = st.one_of(
    st.builds(In, st.sampled_from(KEYS), st.frozensets(st.sampled_from(VALUES), max_size=2)),
    st.builds(Exists, st.sampled_from(KEYS)),
    st.builds(Named, st.frozensets(st.sampled_from((*NAMES, "office")), max_size=2)),
    st.builds(Under, st.sampled_from(("shop", "ns"))),
    st.builds(Nets, st.just(("10.1.2.0/24", "2001:db8::1"))),
    st.builds(Nets, st.just(("0.0.0.0/0",)), st.just(("10.1.0.0/17",))),
    st.just(Everything()),
)
SELECTORS = st.recursive(
    LEAVES,
    lambda s: st.one_of(
        st.builds(Not, s), st.builds(AllOf, st.lists(s, max_size=2).map(tuple)), st.builds(AnyOf, st.lists(s, max_size=2).map(tuple))
    ),
    max_leaves=3,
)
WORDS = ("tcp/80", "tcp/80-443", "tcp", "udp/53", "udp", "any", "sctp")


def programs(words: tuple[str, ...]) -> st.SearchStrategy[Program]:
    rules = st.builds(
        Rule, id=st.just("r"), action=st.sampled_from(Action), src=SELECTORS, dst=SELECTORS,
        ports=st.sampled_from(words).map(parse_ports), directions=st.sampled_from((BOTH, BOTH, ("egress",), ("ingress",))),
        concerns=st.none() | SELECTORS,
    )  # fmt: skip
    tiers = st.builds(
        Tier, name=st.just("t"), rules=st.lists(rules, max_size=4).map(tuple), order=st.sampled_from(("first-match", "deny-wins")),
        isolates=st.dictionaries(st.sampled_from(BOTH), SELECTORS, max_size=2), otherwise=st.sampled_from((Action.PASS, Action.DENY)),
    )  # fmt: skip
    return st.builds(Program, st.lists(tiers, min_size=1, max_size=2).map(tuple), st.sampled_from((Action.DENY, Action.DENY, Action.ALLOW)))


def bits(ports: PortMap) -> list[int]:
    """Protocol by protocol; 58 is ICMP by another number."""
    return [ports.bits(number) for number in range(256) if number != 58]


def agrees(kind: str, program: Program, found: list[Subject]) -> None:
    """Without the exporter's own comparison: the importer and the evaluator, pair by pair."""
    exported = export(kind, program, found)
    again = run(kind, exported.files)
    theirs = {s.name: s for s in again.inventory}
    inner = [s for s in found if not s.nets]
    for src in inner:
        for dst in inner:
            if src is not dst:
                there = permitted(again.policy.program, theirs[exported.names[src.name]], theirs[exported.names[dst.name]])
                assert bits(there) == bits(permitted(program, src, dst)), (src, dst)
        for outer in (s for s in found if s.nets):
            for part in split(program, outer):
                plain = replace(part, labels={}, name="elsewhere")
                them = theirs[exported.names[src.name]]
                assert bits(permitted(again.policy.program, them, plain)) == bits(permitted(program, src, part))
                assert bits(permitted(again.policy.program, plain, them)) == bits(permitted(program, part, src))


@given(programs(WORDS), st.lists(SUBJECTS, min_size=1, max_size=5, unique_by=lambda s: s.name), st.lists(OUTSIDES, max_size=1))
@settings(max_examples=150, deadline=None)
def test_kubernetes_keeps_the_truth_table_or_names_a_protocol(program, inner, outer):
    found = [*inner, *outer]
    held = [permitted(program, a, p) for a in inner for b in found for p in split(program, b)]
    held += [permitted(program, p, a) for a in inner for b in found for p in split(program, b)]
    if any(h != ANYTHING and (h.rest or not set(h.ports) <= PORTED) for h in held):
        with pytest.raises(NotExpressible) as error:
            export("kubernetes", program, found)
        assert error.value.code == "export.protocol"
    else:
        agrees("kubernetes", program, found)


@given(programs((*WORDS, "icmp", "47")), st.lists(SUBJECTS, min_size=1, max_size=5, unique_by=lambda s: s.name), st.lists(OUTSIDES, max_size=1))
@settings(max_examples=150, deadline=None)
def test_aws_keeps_every_truth_table(program, inner, outer):
    agrees("aws", program, [*inner, *outer])


# ---- Kubernetes


def policies(found: Any) -> dict[str, Any]:
    return {p["metadata"]["namespace"] + "/" + p["metadata"]["name"]: p["spec"] for p in yaml.safe_load_all(found.files["policies.yaml"])}


def test_a_network_policy_for_each_kind_of_pod() -> None:
    found = export("kubernetes", program(), EVERYWHERE)
    specs = policies(found)
    assert set(specs) == {
        "shop/retinue-isolate", "pay/retinue-isolate", "default/retinue-isolate",
        "shop/retinue-for-web", "shop/retinue-for-api", "pay/retinue-for-db", "default/retinue-for-solo",
    }  # fmt: skip
    assert specs["shop/retinue-isolate"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    db = specs["pay/retinue-for-db"]
    api = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}},
        "podSelector": {
            "matchLabels": {"app": "shop", "role": "api"},
            "matchExpressions": [{"key": "retinue-workload", "operator": "DoesNotExist"}],
        },
    }
    assert db["ingress"] == [{"from": [api], "ports": [{"protocol": "TCP", "port": 5432}]}]  # the deny is compiled away
    assert "egress" not in db
    (ingress,) = [r for r in specs["shop/retinue-for-api"]["ingress"] if "ports" not in r]
    assert ingress["from"][0]["podSelector"]["matchLabels"] == {"retinue-workload": "solo"}
    assert {"protocol": "TCP", "port": 8000, "endPort": 8010} in specs["shop/retinue-for-api"]["ingress"][1]["ports"]
    assert specs["shop/retinue-for-web"]["ingress"][0]["ports"] == [{"protocol": "UDP"}]
    assert found.names["shop/web-2"] == "shop/web-2[Pod]"
    assert found.pairs == 20
    assert any("1 workloads are selected by the label retinue-workload" in n for n in found.notes)


def test_a_pod_that_the_inventory_does_not_know_gets_nothing() -> None:
    found = export("kubernetes", program(), [WEB, API])
    stranger = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "new", "namespace": "shop", "labels": {"app": "shop", "role": "new"}}}
    again = run("kubernetes", {**found.files, "new.yaml": yaml.safe_dump(stranger)})
    new = next(s for s in again.inventory if s.name == "shop/new[Pod]")
    for other in again.inventory:
        assert permitted(again.policy.program, new, other) == permitted(again.policy.program, other, new) == NOTHING


def test_equal_pods_of_several_namespaces_are_one_peer() -> None:
    twins = [Subject("a/w", {"role": "web"}), Subject("b/w", {"role": "web"}), API]
    specs = policies(export("kubernetes", one_rule("tcp/1", In("role", frozenset({"web"})), In("role", frozenset({"api"}))), twins))
    (rule,) = specs["shop/retinue-for-api"]["ingress"]
    assert rule["from"] == [{
        "namespaceSelector": {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a", "b"]}]},
        "podSelector": {"matchLabels": {"role": "web"}},
    }]  # fmt: skip


def test_names_and_values_that_kubernetes_does_not_take() -> None:
    long = "x/" + "y" * 80
    found = [DB, Subject("pay/DB", {"zone": "eu/2"}), Subject("pay/db.", {"zone": "eu/1"}), Subject(long), Subject("///"), Subject("shop.eu/a"),
             Subject("shop/eu/a"), Subject("x.y", {"ns:kubernetes.io/metadata.name": "pay"})]  # fmt: skip
    rules = (
        Rule("zone", Action.ALLOW, In("zone", frozenset({"eu/1"})), In("zone", frozenset({"eu/2"})), parse_ports("tcp/5")),
        Rule("names", Action.ALLOW, Named(frozenset({long, "///", "shop.eu/a", "shop/eu/a"})), Named(frozenset({"pay/db"})), parse_ports("tcp/6")),
    )
    exported = export("kubernetes", Program((Tier("t", rules),)), found)
    assert exported.names["pay/db"] == "pay/db[Pod]"
    assert exported.names["pay/DB"] == "pay/db-2[Pod]"
    assert exported.names["pay/db."] == "pay/db-3[Pod]"
    assert exported.names["///"] == "default/x[Pod]" or exported.names["///"].endswith("/x[Pod]")
    assert exported.names["x.y"] == "pay/x-y[Pod]"
    pods = list(yaml.safe_load_all(exported.files["workloads.yaml"]))
    values = [p["metadata"]["labels"]["retinue-workload"] for p in pods if "retinue-workload" in p["metadata"]["labels"]]
    assert len(values) == len(set(values)) == 8
    assert all(len(v) <= 63 for v in values)


@pytest.mark.parametrize("word", ["icmp", "47"])
def test_protocols_that_a_network_policy_cannot_name_are_refused_with_the_rule(word: str) -> None:
    with pytest.raises(NotExpressible) as error:
        export("kubernetes", one_rule(word), [WEB, API])
    assert error.value.code == "export.protocol"
    assert f"may send {word}" in error.value.message
    assert "(by rule it)" in error.value.message


def test_everything_but_a_port_is_refused_for_kubernetes_and_written_for_aws() -> None:
    text = TEXT.replace("{id: web-never-db, from: {role: web}, to: {role: db}, on: any}", "{id: no-ssh, from: {workload: solo}, to: {role: api}, on: tcp/22}")
    with pytest.raises(NotExpressible) as error:
        export("kubernetes", program(text), EVERYWHERE)
    assert "any but tcp/22 to shop/api (by rule all (p.yaml:10))" in error.value.message
    found = export("aws", program(text), EVERYWHERE)
    assert any("the default quota is 60" in n for n in found.notes)


def test_a_refusal_names_at_most_three_rules_and_an_outside_end() -> None:
    rules = tuple(Rule(f"r{n}", Action.ALLOW, Everything(), Nets(("10.0.0.0/8",)), parse_ports("icmp")) for n in range(5))
    with pytest.raises(NotExpressible, match=r"to office \(by rule r0, r1, r2 and 2 more\)"):
        export("kubernetes", Program((Tier("t", rules),)), [WEB, replace(OFFICE, nets=("10.1.0.0/16",))])
    passing = Program((Tier("t", (Rule("no", Action.DENY, Everything(), Everything(), parse_ports("tcp/1")),)),), Action.ALLOW)
    with pytest.raises(NotExpressible, match=r"\(by default\)"):
        export("kubernetes", passing, [WEB, API])


def test_a_label_that_the_export_needs_is_refused() -> None:
    with pytest.raises(NotExpressible) as error:
        export("kubernetes", program(), [Subject("a", {"retinue-workload": "b"})])
    assert error.value.code == "export.label"


# ---- AWS


def groups(found: Any) -> dict[str, Any]:
    return {g["GroupName"]: g for g in json.loads(found.files["security-groups.json"])["SecurityGroups"]}


def test_a_security_group_for_each_class() -> None:
    found = export("aws", program(), EVERYWHERE)
    by_name = groups(found)
    assert set(by_name) == {"retinue shop/web", "retinue shop/api", "retinue pay/db", "retinue solo"}
    assert by_name["retinue shop/web"]["Description"] == "for shop/web and 1 more"
    api, db = by_name["retinue shop/api"], by_name["retinue pay/db"]
    assert db["IpPermissions"] == [
        {"IpProtocol": "tcp", "FromPort": 5432, "ToPort": 5432, "UserIdGroupPairs": [{"GroupId": api["GroupId"]}],
         "IpRanges": [], "Ipv6Ranges": []}
    ]  # fmt: skip
    assert db["IpPermissionsEgress"] == []
    assert found.pairs == 20
    assert found.rules == 2 * (2 + 1 + 1 + 1)
    instances = json.loads(found.files["instances.json"])["Reservations"][0]["Instances"]
    assert {i["Tags"][0]["Value"]: i["SecurityGroups"][0]["GroupId"] for i in instances}["shop/web-2"] == by_name["retinue shop/web"]["GroupId"]


def test_icmp_is_written_for_both_families_and_ranges_by_family() -> None:
    rules = (
        Rule("ping", Action.ALLOW, Everything(), AnyOf((Everything(), Nets(("10.0.0.0/8", "2001:db8::/32")))), parse_ports("icmp")),
        Rule("gre", Action.ALLOW, Nets(("10.0.0.0/8",)), Everything(), parse_ports("47")),
        Rule("sctp", Action.ALLOW, Nets(("10.0.0.0/8",)), Everything(), parse_ports("sctp")),
    )
    (group,) = groups(export("aws", Program((Tier("t", rules),)), [WEB, WEB2, OFFICE])).values()
    to_office = [p for p in group["IpPermissionsEgress"] if p["IpRanges"] or p["Ipv6Ranges"]]
    assert [(p["IpProtocol"], p["IpRanges"], p["Ipv6Ranges"]) for p in to_office] == [
        ("icmp", [{"CidrIp": "10.1.0.0/16"}], []),
        ("icmpv6", [], [{"CidrIpv6": "2001:db8::/48"}]),
    ]
    assert {"47", "132"} <= {p["IpProtocol"] for p in group["IpPermissions"]}


def test_sctp_ports_are_refused_for_aws() -> None:
    with pytest.raises(NotExpressible, match="opens sctp on all ports or not at all"):
        export("aws", one_rule("sctp/80"), [WEB, API])


# ---- both


@pytest.mark.parametrize("kind", KINDS)
def test_outside_ranges_leave_out_the_inside(kind: str) -> None:
    out = one_rule("tcp/443", Everything(), Nets(("0.0.0.0/0",)))
    internet = Subject("internet", nets=("0.0.0.0/0",))
    found = export(kind, out, [WEB, internet], inside=["10.0.0.0/8"])
    assert "0.0.0.0/0" not in "".join(found.files.values())
    assert not any("outside ranges" in n for n in found.notes)
    again = run(kind, found.files)
    me = again.inventory[0]
    assert permitted(again.policy.program, me, Subject("x", nets=("10.0.0.1",))) == NOTHING
    assert permitted(again.policy.program, me, Subject("x", nets=("11.0.0.1",))) == parse_ports("tcp/443")
    wide = export(kind, out, [WEB, internet, OFFICE])
    assert "0.0.0.0/0" in "".join(wide.files.values())
    assert any("outside ranges are written as they are" in n for n in wide.notes)
    assert any("between two outside ranges" in n for n in wide.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_overlapping_outsides_that_are_told_apart_by_name_are_refused(kind: str) -> None:
    depot = Subject("depot", nets=("10.1.2.0/24",))
    with pytest.raises(NotExpressible) as error:
        export(kind, one_rule("tcp/1", Named(frozenset({"office"}))), [WEB, OFFICE, depot])
    assert error.value.code == "export.outside_overlap"
    assert "depot and office share addresses" in error.value.message
    export(kind, one_rule("tcp/1", Nets(("10.0.0.0/8",))), [WEB, OFFICE, depot])


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_export_is_caught(kind: str) -> None:
    table = Table(program(), [*EVERYWHERE, OFFICE])
    found = export(kind, program(), [*EVERYWHERE, OFFICE])
    assert compare(kind, found, program(), table) == 30
    wider = replace(found, files={n: t.replace("5432", "5433") for n, t in found.files.items()})
    with pytest.raises(NotExpressible, match=r"reads back differently: shop/api -> pay/db is .*5433, and should be tcp/5432"):
        compare(kind, wider, program(), table)
    renamed = replace(found, names={**found.names, "shop/web": "gone"})
    with pytest.raises(NotExpressible, match="does not name shop/web"):
        compare(kind, renamed, program(), table)
    other = one_rule("tcp/9", Nets(("10.0.0.0/8",)))
    with pytest.raises(NotExpressible, match=r"office \[10\.1\.0\.0/16\] -> pay/db is nothing"):
        compare(kind, found, Program((*program().tiers, *other.tiers)), Table(Program((*program().tiers, *other.tiers)), [*EVERYWHERE, OFFICE]))


@pytest.mark.parametrize("kind", KINDS)
def test_exports_are_the_same_every_time(kind: str) -> None:
    assert export(kind, program(), EVERYWHERE) == export(kind, program(), EVERYWHERE)


def test_unknown_kinds_and_empty_inventories() -> None:
    with pytest.raises(BadInput) as error:
        export("azure", program(), EVERYWHERE)
    assert (error.value.code, error.value.hint) == ("export.kind", "one of kubernetes, aws")
    with pytest.raises(RetinueError) as empty:
        export("aws", program(), [OFFICE])
    assert empty.value.code == "export.empty"


@pytest.mark.parametrize("kind", ["kubernetes", "aws"])
def test_what_the_target_has_no_words_for_is_reported_and_what_would_be_wider_is_refused(kind: str) -> None:
    head = "meshpolicy: 1\nsegments:\n  - name: shop\n    allow:\n"
    partner = "      - {id: partner, from: spiffe://other.example/till, to: {role: api}, on: tcp/80}\n"
    slow = "      - {id: slow, from: {role: web}, to: {role: api}, on: tcp/81, max_rate: 8Mbit}\n"
    idle = "      - {id: idle, from: {role: web}, to: {role: api}, on: tcp/82, idle_timeout: 5m}\n"
    found = export(kind, program(head + partner + slow + idle), [WEB, API])
    assert [(one["where"], one["why"].partition(":")[0]) for one in found.untranslated] == [
        ("idle (p.yaml:7)", "flows are ended after 300 seconds of silence here; the target does not end them"),
        ("partner (p.yaml:5)", "identities of other.example"), ("slow (p.yaml:6)", "the ceiling of 1000000 bytes a second; the target has none"),
    ]  # fmt: skip
    with pytest.raises(NotExpressible, match="only uid 7 may use own") as caught:
        export(kind, program(head + "      - {id: own, from: {role: web, process: 'uid:7'}, to: {role: api}, on: tcp/1}\n"), [WEB, API])
    assert caught.value.code == "export.process"
