from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from policy.importers.model import Imported, SourceRefused
from policy.importers.nsx import import_nsx

Table = Callable[[Imported], dict[tuple[str, str], str]]
Parts = Callable[[Imported, str, str], dict[str, str]]

VMS = [
    {
        "display_name": "web",
        "external_id": "vm-1",
        "tags": [{"scope": "role", "tag": "web"}, {"tag": "prod"}],
        "guest_info": {"os_name": "Debian"},
    },
    {"display_name": "db", "external_id": "vm-2", "tags": [{"scope": "role", "tag": "db"}]},
    {"display_name": "job", "external_id": "vm-3"},
]
SEGMENTS = [
    {"path": "/infra/segments/a", "subnets": [{"network": "10.1.0.0/24"}], "tags": [{"scope": "zone", "tag": "dmz"}],
     "segment_ports": [{"attachment": {"id": "port-1"}}, {"attachment": {"id": "port-3"}, "path": "/infra/segments/a/ports/3"}]},
    {"path": "/infra/segments/b", "subnets": [{"network": "10.2.0.0/24"}], "segment_ports": [{"attachment": {"id": "port-2"}}]},
]  # fmt: skip
CARDS = [
    {
        "owner_vm_id": "vm-1",
        "lport_attachment_id": "port-1",
        "ip_address_info": [{"ip_addresses": ["10.1.0.5", "fe80::5"]}],
    },
    {
        "owner_vm_id": "vm-2",
        "lport_attachment_id": "port-2",
        "ip_address_info": [{"ip_addresses": ["10.2.0.5"]}],
    },
    {"owner_vm_id": "vm-3", "lport_attachment_id": "port-3"},
]
SERVICES = [
    {
        "path": "/infra/services/PG",
        "service_entries": [
            {"resource_type": "L4PortSetServiceEntry", "l4_protocol": "TCP", "destination_ports": ["5432"]}
        ],
    },
    {
        "path": "/infra/services/NEST",
        "service_entries": [
            {"resource_type": "NestedServiceServiceEntry", "nested_service_path": "/infra/services/PG"}
        ],
    },
    {
        "path": "/infra/services/LOOP",
        "service_entries": [
            {"resource_type": "NestedServiceServiceEntry", "nested_service_path": "/infra/services/LOOP"}
        ],
    },
]
DENY = {
    "action": "DROP",
    "source_groups": ["ANY"],
    "destination_groups": ["ANY"],
    "services": ["ANY"],
    "direction": "IN_OUT",
    "rule_id": 2,
    "scope": ["ANY"],
}


def rule(src: list[str], dst: list[str], action: str = "ALLOW", **more: Any) -> dict[str, Any]:
    return {
        "action": action,
        "source_groups": src,
        "destination_groups": dst,
        "services": ["ANY"],
        "direction": "IN_OUT",
        **more,
    }


def policy(*rules: dict[str, Any], category: str = "Application", **more: Any) -> dict[str, Any]:
    return {
        "category": category,
        "display_name": f"{category} policy",
        "rules": list(rules),
        "scope": ["ANY"],
        **more,
    }


def load(*policies: dict[str, Any], groups: list[dict[str, Any]] | None = None, **more: Any) -> Imported:
    groups = groups or [
        {"path": "web", "vm_members": [{"id": "vm-1", "display_name": "web"}]},
        {"path": "db", "vm_members": [{"display_name": "db"}]},
    ]
    config: dict[str, Any] = {
        "virtual_machines": VMS, "segments": SEGMENTS, "virtual_network_interface": CARDS, "services": SERVICES,
        "domains": [{"resources": {"groups": groups, "security_policies": list(policies)}}],
    }  # fmt: skip
    return import_nsx({"nsx.json": json.dumps({**config, **more})})


def test_nothing_matched_is_allowed(table: Table, parts: Parts) -> None:
    imported = load()
    assert len(table(imported)) == 6
    assert set(table(imported).values()) == {"any"}
    outside = {"0.0.0.0-10.0.255.255", "10.1.1.0-10.1.255.255", "10.2.1.0-255.255.255.255", "::/0"}
    assert parts(imported, "external", "web") == dict.fromkeys(outside, "any")


def test_first_match_within_a_category_and_drop_ends(table: Table) -> None:
    found = table(
        load(
            policy(
                rule(["web"], ["db"], services=["/infra/services/PG"]),
                rule(["web"], ["db"], "REJECT"),
                rule(["web"], ["db"]),
                DENY,
            )
        )
    )
    assert found == {("web", "db"): "tcp/5432"}


def test_categories_in_their_order_and_jump(table: Table) -> None:
    found = table(load(
        policy(rule(["db"], ["web"], services=["/infra/services/NEST"]), DENY),
        policy(rule(["db"], ["web"], "JUMP_TO_APPLICATION"), rule(["web"], ["db"], "ALLOW"), rule(["ANY"], ["ANY"], "DROP"), category="Environment"),
        policy(rule(["web"], ["db"], "DROP", service_entries=[{"resource_type": "ICMPTypeServiceEntry", "protocol": "ICMPv4"}], services=[]), category="Emergency"),
    ))  # fmt: skip
    assert found == {("web", "db"): "any but icmp", ("db", "web"): "tcp/5432"}


def test_directions_are_evaluated_apart(table: Table) -> None:
    only_in = table(load(policy(rule(["web"], ["db"], direction="IN"), DENY)))
    assert only_in == {}
    both = table(
        load(policy(rule(["web"], ["db"], direction="IN"), rule(["web"], ["db"], direction="OUT"), DENY))
    )
    assert both == {("web", "db"): "any"}


def test_scope_holds_for_the_side_that_is_evaluated(table: Table) -> None:
    ingress_open = table(load(policy(rule(["web"], ["db"]), {**DENY, "scope": ["db"]})))
    assert ("web", "db") in ingress_open
    assert ("job", "db") not in ingress_open
    assert ("db", "job") not in ingress_open
    assert ingress_open["job", "web"] == "any"
    of_policy = table(load(policy(rule(["ANY"], ["ANY"], "DROP"), scope=["db"])))
    assert {p for p in of_policy if "db" in p} == set()
    assert of_policy["job", "web"] == "any"
    narrow = table(load(policy(rule(["web"], ["db"], "ALLOW", scope=["web"]), DENY)))
    assert narrow == {}  # allowed on web's side only


def test_excluded_sides(table: Table, parts: Parts) -> None:
    imported = load(
        policy(
            rule(["web"], ["db"], sources_excluded=True),
            rule(["db"], ["web"], destinations_excluded=True),
            DENY,
        )
    )
    assert table(imported) == {("job", "db"): "any", ("db", "job"): "any"}
    assert (
        set(parts(imported, "external", "db").values())
        == {"any"}
        == set(parts(imported, "db", "external").values())
    )
    assert parts(imported, "external", "web") == {}
    assert table(load(policy(rule(["ANY"], ["db"], sources_excluded=True), DENY))) == {
        ("web", "db"): "any",
        ("job", "db"): "any",
    }


def test_addresses(table: Table, parts: Parts) -> None:
    imported = load(policy(rule(["10.1.0.0-10.1.0.255", "8.8.8.0/24"], ["db"]), DENY))
    assert table(imported) == {("web", "db"): "any", ("job", "db"): "any"}  # job counts as its whole segment
    assert parts(imported, "external", "db") == {"8.8.8.0/24": "any"}
    half = load(policy(rule(["10.1.0.0/25"], ["db"]), DENY))
    assert table(half) == {("web", "db"): "any"}
    out = load(policy(rule(["db"], ["1.1.1.1"]), DENY))
    assert parts(out, "db", "external") == {"1.1.1.1": "any"}


def cond(
    value: str, operator: str = "EQUALS", key: str = "Tag", member: str = "VirtualMachine"
) -> dict[str, Any]:
    return {
        "resource_type": "Condition",
        "key": key,
        "member_type": member,
        "operator": operator,
        "value": value,
    }


def op(word: str) -> dict[str, Any]:
    return {"resource_type": "ConjunctionOperator", "conjunction_operator": word}


@pytest.mark.parametrize(
    ("expression", "members"),
    [
        ([cond("web")], {"web"}),
        ([cond("role|db")], {"db"}),
        ([cond("|prod")], {"web"}),
        ([cond("zone|db")], set()),
        ([cond("role|db", "NOTEQUALS")], {"web", "job"}),
        ([cond("prod"), op("AND"), cond("role|db")], set()),
        ([cond("prod"), op("AND"), cond("role|web"), op("OR"), cond("db")], {"web", "db"}),
        ([{"resource_type": "NestedExpression", "expressions": [cond("prod"), op("AND"), cond("web")]}, op("OR"), cond("j", "STARTSWITH", "Name")], {"web", "job"}),
        ([cond("E", "CONTAINS", "Name")], {"web"}),
        ([cond("eb", "ENDSWITH", "Name")], {"web"}),
        ([cond("web", "NOTEQUALS", "Name")], {"db", "job"}),
        ([cond("debian", "EQUALS", "OSName")], {"web"}),
        ([cond("pro", "STARTSWITH")], {"web"}),
        ([cond("zone|dmz", "EQUALS", "Tag", "Segment")], {"web", "job"}),
        ([{"resource_type": "IPAddressExpression", "ip_addresses": ["10.2.0.5", "9.9.9.9"]}], {"db"}),
        ([{"resource_type": "ExternalIDExpression", "external_ids": ["vm-1", "vm-3"]}], {"web", "job"}),
        ([{"resource_type": "PathExpression", "paths": ["/infra/segments/a"]}], {"web", "job"}),
        ([{"resource_type": "PathExpression", "paths": ["inner", "/x/vm-3"]}], {"db", "job"}),
    ],
)  # fmt: skip
def test_expressions(table: Table, expression: list[dict[str, Any]], members: set[str]) -> None:
    groups = [{"path": "g", "expression": expression}, {"path": "inner", "vm_members": [{"id": "vm-2"}]}]
    found = table(load(policy(rule(["g"], ["ANY"]), DENY), groups=groups))
    assert {a for a, _ in found} == members


@pytest.mark.parametrize(
    "term",
    [
        {"resource_type": "MACAddressExpression"},
        cond("x", member="SegmentPort"),
        cond("x", key="NodeType"),
        {"resource_type": "PathExpression", "paths": ["/infra/segments/a/ports/3"]},
        {"resource_type": "ExternalIDExpression", "external_ids": ["vm-9"]},
    ],
)
def test_terms_that_cannot_be_translated_select_nobody_and_say_so(table: Table, term: dict[str, Any]) -> None:
    imported = load(policy(rule(["g"], ["ANY"]), DENY), groups=[{"path": "g", "expression": [term]}])
    assert table(imported) == {}
    assert len(imported.untranslated) == 1


def test_realised_members_decide_over_the_expression() -> None:
    def source(group: dict[str, Any]) -> str:
        return repr(load(policy(rule(["g"], ["ANY"], direction="OUT")), groups=[group]).policy.groups["g"])

    assert (
        source({"path": "g", "expression": [cond("web")], "vm_members": [{"id": "vm-1"}]})
        == "Exists(key='tag:web')"
    )
    assert "vm" not in source({"path": "g", "expression": [cond("web")], "vm_members": [{"id": "vm-3"}]})
    assert "job" in source({"path": "g", "expression": [cond("web")], "vm_members": [{"id": "vm-3"}]})
    assert "web" in source({"path": "g", "vif_members": [{"owner_vm_id": "vm-1"}]})
    assert "job" in source({"path": "g", "segments_members": [{"path": "/infra/segments/a"}]})
    assert source({"path": "g"}) == "Nothing()"


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        (
            {
                "resource_type": "L4PortSetServiceEntry",
                "l4_protocol": "UDP",
                "destination_ports": ["53", "1000-1010"],
            },
            "udp/53,1000-1010",
        ),
        ({"resource_type": "L4PortSetServiceEntry", "l4_protocol": "TCP"}, "tcp"),
        (
            {
                "resource_type": "L4PortSetServiceEntry",
                "l4_protocol": "TCP",
                "destination_ports": ["0-65535"],
            },
            "tcp",
        ),
        ({"resource_type": "IGMPTypeServiceEntry"}, "2"),
        ({"resource_type": "IPProtocolServiceEntry", "protocol_number": 47}, "47"),
        ({"resource_type": "ICMPTypeServiceEntry"}, "icmp"),
    ],
)
def test_service_entries(table: Table, entry: dict[str, Any], wanted: str) -> None:
    imported = load(
        policy(rule(["web"], ["db"], services=["/infra/services/PG"], service_entries=[entry]), DENY)
    )
    assert set(table(imported)["web", "db"].split()) - {"tcp/5432"} == (
        {wanted} if wanted != "tcp/5432" else set()
    )
    assert imported.untranslated == []


@pytest.mark.parametrize(
    ("entry", "denied"),
    [
        ({"resource_type": "ICMPTypeServiceEntry", "protocol": "ICMPv6"}, "any but icmp"),
        ({"resource_type": "ICMPTypeServiceEntry", "protocol": "ICMPv4", "icmp_type": 8}, "any but icmp"),
        (
            {
                "resource_type": "L4PortSetServiceEntry",
                "l4_protocol": "TCP",
                "source_ports": ["1"],
                "destination_ports": ["2"],
            },
            "any but tcp/2",
        ),
        ({"resource_type": "EtherTypeServiceEntry"}, "any"),
    ],
)
def test_what_a_port_map_cannot_say_never_widens_access(
    table: Table, entry: dict[str, Any], denied: str
) -> None:
    allow = load(policy(rule(["web"], ["db"], services=[], service_entries=[entry]), DENY))
    assert table(allow) == {}
    assert len(allow.untranslated) == 1
    deny = load(policy(rule(["web"], ["db"], "DROP", services=[], service_entries=[entry])))
    assert table(deny)["web", "db"] == denied
    assert len(deny.untranslated) == 1


def test_gateways_and_profiles_and_alg_are_reported(table: Table) -> None:
    alg = {"resource_type": "ALGTypeServiceEntry", "alg": "FTP", "destination_ports": ["21"]}
    imported = load(policy(rule(["web"], ["db"], services=[], service_entries=[alg]), DENY))
    assert table(imported) == {("web", "db"): "tcp/21"}
    assert "data connections" in imported.untranslated[0].why
    profile = load(policy(rule(["web"], ["db"], profiles=["/infra/context-profiles/SSL"]), DENY))
    assert table(profile) == {}
    assert "SSL" in profile.untranslated[0].why
    domains = [
        {
            "resources": {
                "gateway_policies": [{"display_name": "north", "rules": [{}]}],
                "redirection_policies": [{"rules": []}],
            }
        }
    ]
    assert "gateway_policies" in load(domains=domains).untranslated[0].where


def test_order_default_rule_and_disabled_rules(table: Table) -> None:
    first = policy(rule(["web"], ["db"]), sequence_number=2)
    second = policy(
        rule(["web"], ["db"], "DROP", sequence_number=2),
        rule(["web"], ["db"], "ALLOW", sequence_number=1, services=["/infra/services/PG"]),
        sequence_number=1,
    )
    assert table(load(first, second))["web", "db"] == "tcp/5432"
    closed = policy(rule(["web"], ["db"], disabled=True), default_rule={"id": "9", "action": "DROP"})
    imported = load(closed)
    assert table(imported) == {}
    assert "is disabled" in imported.notes[0]


def test_machines_with_one_name_are_told_apart(table: Table) -> None:
    vms = [{"display_name": "a", "external_id": "1"}, {"display_name": "a", "external_id": "2"}]
    imported = load(
        virtual_machines=vms, groups=[{"path": "g", "vm_members": [{"display_name": "a", "id": ""}]}]
    )
    assert imported.ids == {"a (2)": "a"}
    assert set(table(imported)) == {("a", "a (2)"), ("a (2)", "a")}


@pytest.mark.parametrize(
    ("policies", "more", "culprit"),
    [
        ([policy(category="Lunch")], {}, 'unknown category "Lunch"'),
        ([policy(rule(["web"], ["db"], "EXPLODE"))], {}, "EXPLODE"),
        ([policy(rule(["web"], ["db"], direction="UP"))], {}, "UP"),
        ([policy(rule(["/no/group"], ["db"]))], {}, 'no group or segment "/no/group"'),
        ([policy(rule(["nonsense"], ["db"]))], {}, '"nonsense" is no address'),
        ([policy(rule(["web"], ["db"], services=["/no"]))], {}, 'no service "/no"'),
        ([policy(rule(["web"], ["db"], services=["/infra/services/LOOP"]))], {}, "contains itself"),
        ([policy(rule(["web"], ["db"], services=[], service_entries=[{"resource_type": "L4PortSetServiceEntry", "l4_protocol": "ICMP"}]))], {}, "ICMP"),
        ([policy(rule(["web"], ["db"], services=[], service_entries=[{"resource_type": "L4PortSetServiceEntry", "l4_protocol": "TCP", "destination_ports": ["9-1"]}]))], {}, '"9-1"'),
        ([policy(rule(["web"], ["db"], services=[], service_entries=[{"resource_type": "L4PortSetServiceEntry", "l4_protocol": "TCP", "destination_ports": "9"}]))], {}, "must be a list"),
        ([policy(rule(["g"], ["ANY"]))], {"groups": [{"path": "g", "expression": [{"resource_type": "PathExpression", "paths": ["g"]}]}]}, "contains itself"),
        ([policy(rule(["g"], ["ANY"]))], {"groups": [{"path": "g", "expression": [cond("a"), op("XOR"), cond("b")]}]}, "AND or OR"),
        ([], {"virtual_machines": [{"external_id": "1"}]}, "display_name"),
        ([], {"virtual_machines": "x"}, '"virtual_machines" must be a list'),
        ([policy({"action": "ALLOW", "source_groups": "web"})], {}, '"source_groups" must be a list'),
        ([], {"segments": [{"path": "s", "subnets": [{"network": "x"}]}]}, '"x" is no address'),
    ],
)  # fmt: skip
def test_configurations_that_do_not_hold_together_are_refused(
    policies: list[dict[str, Any]], more: dict[str, Any], culprit: str
) -> None:
    with pytest.raises(SourceRefused) as caught:
        load(*policies, **more)
    assert culprit in caught.value.message
    assert caught.value.exit == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_text_that_is_no_export(text: str) -> None:
    with pytest.raises(SourceRefused):
        import_nsx({"n.json": text})
    with pytest.raises(SourceRefused, match="one file"):
        import_nsx({"a": "{}", "b": "{}"})
