from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from policy.importers.aws import import_aws
from policy.importers.model import Imported, SourceRefused

Table = Callable[[Imported], dict[tuple[str, str], str]]
Parts = Callable[[Imported, str, str], dict[str, str]]


def group(
    name: str, ingress: list[dict[str, Any]], egress: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return {
        "GroupId": name,
        "GroupName": f"{name} group",
        "IpPermissions": ingress,
        "IpPermissionsEgress": [perm("-1", cidrs=["0.0.0.0/0", "::/0"])] if egress is None else egress,
    }


def perm(
    protocol: str,
    first: int | None = None,
    last: int | None = None,
    *,
    cidrs: tuple[str, ...] | list[str] = (),
    groups: tuple[str, ...] = (),
) -> dict[str, Any]:
    return {"IpProtocol": protocol, "FromPort": first, "ToPort": last,
            "IpRanges": [{"CidrIp": c} for c in cidrs if ":" not in c], "Ipv6Ranges": [{"CidrIpv6": c} for c in cidrs if ":" in c],
            "UserIdGroupPairs": [{"GroupId": g} for g in groups]}  # fmt: skip


def instance(number: int, groups: list[str], name: str = "") -> dict[str, Any]:
    tags = [{"Key": "Name", "Value": name}] if name else []
    return {
        "InstanceId": f"i-{number}",
        "Tags": tags,
        "PrivateIpAddress": f"10.0.0.{number}",
        "SecurityGroups": [{"GroupId": g} for g in groups],
    }


MACHINES = {
    "Reservations": [
        {
            "Instances": [
                instance(1, ["sg-web"], "web"),
                instance(2, ["sg-db"], "db"),
                instance(3, ["sg-web", "sg-db"]),
            ]
        }
    ]
}


def load(*groups: dict[str, Any], machines: dict[str, Any] = MACHINES) -> Imported:
    return import_aws(
        {"groups.json": json.dumps({"SecurityGroups": list(groups)}), "machines.json": json.dumps(machines)}
    )


def test_members_of_groups(table: Table, parts: Parts) -> None:
    imported = load(
        group("sg-web", [perm("tcp", 443, 443, cidrs=["0.0.0.0/0"])]),
        group("sg-db", [perm("tcp", 5432, 5433, groups=("sg-web",))]),
    )
    assert table(imported) == {
        ("web", "db"): "tcp/5432-5433", ("i-3", "db"): "tcp/5432-5433", ("web", "i-3"): "tcp/443,5432-5433",
        ("db", "web"): "tcp/443", ("db", "i-3"): "tcp/443", ("i-3", "web"): "tcp/443",
    }  # fmt: skip
    assert parts(imported, "external", "web") == {"0.0.0.0/0": "tcp/443"}
    assert parts(imported, "external", "db") == {}
    assert set(parts(imported, "db", "external").values()) == {"any"}


def test_egress_is_judged_too(table: Table) -> None:
    everything = [perm("-1", cidrs=["0.0.0.0/0"])]
    imported = load(
        group("sg-web", everything, [perm("udp", 53, 53, cidrs=["10.0.0.2/32"])]),
        group("sg-db", everything, []),
    )
    assert table(imported) == {("web", "db"): "udp/53", ("i-3", "db"): "udp/53"}


@pytest.mark.parametrize(
    ("entry", "wanted", "gaps"),
    [
        (perm("icmp", -1, -1, groups=("sg-web",)), "icmp", 0),
        (perm("icmp", 8, -1, groups=("sg-web",)), None, 1),
        (perm("icmpv6", -1, -1, groups=("sg-web",)), None, 1),
        (perm("icmpv6", -1, -1, cidrs=["::/0"]), None, 0),
        (perm("47", groups=("sg-web",)), "47", 0),
        (perm("tcp", 0, 65535, groups=("sg-web",)), "tcp", 0),
        (perm("tcp", 0, 0, groups=("sg-web",)), None, 0),
        (perm("tcp", 1, 2, groups=("sg-other",)), None, 1),
        (perm("tcp", 1, 2), None, 0),
        ({**perm("tcp", 1, 2), "PrefixListIds": [{"PrefixListId": "pl-1"}]}, None, 1),
    ],
)
def test_entries(table: Table, entry: dict[str, Any], wanted: str | None, gaps: int) -> None:
    imported = load(group("sg-web", []), group("sg-db", [entry]))
    assert table(imported).get(("web", "db")) == wanted
    assert len(imported.untranslated) == gaps


def test_interfaces_names_and_missing_groups(table: Table) -> None:
    interfaces = {"NetworkInterfaces": [
        {"NetworkInterfaceId": "eni-1", "Attachment": {"InstanceId": "i-1"}, "Groups": [{"GroupId": "sg-a"}], "PrivateIpAddresses": [{"PrivateIpAddress": "10.0.0.1"}]},
        {"NetworkInterfaceId": "eni-2", "Groups": [{"GroupId": "sg-gone"}], "Ipv6Addresses": [{"Ipv6Address": "fd00::2"}]},
    ]}  # fmt: skip
    imported = load(group("sg-a", [perm("-1", groups=("sg-a",))]), machines=interfaces)
    assert [s.name for s in imported.inventory] == ["i-1", "eni-2", "external"]
    assert "sg-gone" in imported.untranslated[0].why
    twins = {"Reservations": [{"Instances": [instance(1, ["sg-a"], "a"), instance(2, ["sg-a"], "a")]}]}
    twin = load(group("sg-a", [perm("-1", groups=("sg-a",))]), machines=twins)
    assert twin.ids == {"a (i-2)": "a"}
    assert table(twin) == {("a", "a (i-2)"): "any", ("a (i-2)", "a"): "any"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "{"}, "not valid JSON"),
        ({"a": "[]"}, "a map is wanted"),
        ({"a": "{}"}, "no SecurityGroups"),
        ({"a": '{"SecurityGroups": {"x": 1}}'}, "list of maps"),
        ({"a": '{"SecurityGroups": [{"GroupId": 1}]}'}, "GroupId must be a text"),
        (
            {"a": json.dumps({"SecurityGroups": [group("g", [perm("tcp", 9, 1, cidrs=["0.0.0.0/0"])])]})},
            "reversed",
        ),
        ({"a": json.dumps({"SecurityGroups": [group("g", [perm("tpc", cidrs=["0.0.0.0/0"])])]})}, "tpc"),
        (
            {"a": json.dumps({"SecurityGroups": [group("g", [perm("tcp", cidrs=["0.0.0.0/99"])])]})},
            "0.0.0.0/99",
        ),
    ],
)
def test_refusals(files: dict[str, str], words: str) -> None:
    with pytest.raises(SourceRefused, match=words):
        import_aws(files)
