"""Configurations with one value replaced by another of any type: imported or refused, never an accident."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from policy.importers import run
from policy.importers.model import SourceRefused
from policy.importers.report import report

STRANGE: tuple[Any, ...] = (
    None, [], {}, "", 0, -1, True, 1.5, "x", "*", "tag:", ["x"], [None], [[]], [{}], {"a": 1}, {"a": None}, {"kind": "Pod"},
)  # fmt: skip
SELECTOR = {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}
ADMIN_RULE = {
    "name": "r",
    "action": "Allow",
    "ports": [{"portNumber": {"port": 1}}, {"portRange": {"start": 1, "end": 2}}, {"namedPort": "http"}],
}
SOURCES: dict[str, dict[str, Any]] = {
    "tailscale": {
        "policy.hujson": {
            "groups": {"group:a": ["a@b.example"]}, "hosts": {"h": "10.0.0.1"}, "tagOwners": {"tag:a": ["group:a"]},
            "ipsets": {"ipset:a": ["10.0.0.0/8"]}, "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:a"]}, "exitNode": ["tag:a"]},
            "acls": [{"action": "accept", "src": ["group:a", "*"], "dst": ["tag:a:1", "h:*", "ipset:a:2"], "proto": "tcp"}],
            "grants": [{"src": ["tag:a"], "dst": ["10.0.0.0/8"], "ip": ["tcp:1"], "via": ["tag:a"], "app": {"a.example/b": [{}]}}],
            "tests": [{"src": "a@b.example", "accept": ["tag:a:1"]}], "nodeAttrs": [{"target": ["*"], "attr": ["a"]}],
        },
        "devices.json": {"devices": [{"id": "1", "hostname": "a", "tags": ["tag:a"], "addresses": ["100.64.0.1"], "enabledRoutes": ["10.0.0.0/8"]},
                                     {"id": "2", "hostname": "b", "user": "a@b.example", "addresses": ["100.64.0.2"]}]},
    },
    "kubernetes": {
        "a.json": {"kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": {"a": "b"}}},
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"a": "b"}, "ownerReferences": [{"name": "o", "kind": "Job"}]},
             "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 80, "protocol": "TCP"}]}], "initContainers": [{"restartPolicy": "Always"}]}},
            {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "n"}, "spec": {"podSelector": SELECTOR, "policyTypes": ["Ingress"], "ingress": [
                {"from": [{"podSelector": SELECTOR, "namespaceSelector": SELECTOR}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}], "ports": [{"port": 1, "endPort": 2, "protocol": "TCP"}]}]}},
            {"apiVersion": "policy.networking.k8s.io/v1alpha1", "kind": "AdminNetworkPolicy", "metadata": {"name": "a"}, "spec": {"priority": 1, "subject": {"pods": {"podSelector": SELECTOR, "namespaceSelector": SELECTOR}},
                "egress": [{**ADMIN_RULE, "to": [{"networks": ["10.0.0.0/8"]}, {"namespaces": SELECTOR}, {"nodes": SELECTOR}]}]}},
            {"apiVersion": "policy.networking.k8s.io/v1alpha1", "kind": "BaselineAdminNetworkPolicy", "metadata": {"name": "default"}, "spec": {"subject": {"namespaces": {}}, "ingress": [{**ADMIN_RULE, "from": [{"namespaces": {}}]}]}},
        ]},
    },
    "nsx": {
        "n.json": {
            "virtual_machines": [{"display_name": "a", "external_id": "1", "tags": [{"scope": "s", "tag": "t"}], "guest_info": {"os_name": "x"}}],
            "virtual_network_interface": [{"owner_vm_id": "1", "lport_attachment_id": "p", "ip_address_info": [{"ip_addresses": ["10.0.0.1"]}]}],
            "segments": [{"path": "/s", "subnets": [{"network": "10.0.0.0/24"}], "segment_ports": [{"attachment": {"id": "p"}}], "tags": [{"tag": "t"}]}],
            "services": [{"path": "/v", "service_entries": [{"resource_type": "L4PortSetServiceEntry", "l4_protocol": "TCP", "destination_ports": ["1"], "source_ports": []}]}],
            "domains": [{"resources": {
                "groups": [{"path": "g", "vm_members": [{"id": "1"}], "ips_members": ["10.0.0.1"], "expression": [
                    {"resource_type": "Condition", "key": "Tag", "member_type": "VirtualMachine", "operator": "EQUALS", "value": "t"},
                    {"resource_type": "ConjunctionOperator", "conjunction_operator": "OR"},
                    {"resource_type": "NestedExpression", "expressions": [{"resource_type": "PathExpression", "paths": ["/s"]}]}]}],
                "gateway_policies": [{"rules": [{}]}],
                "security_policies": [{"category": "Application", "display_name": "p", "scope": ["g"], "sequence_number": 1, "default_rule": {"id": "1", "action": "DROP"}, "rules": [
                    {"action": "ALLOW", "source_groups": ["g"], "destination_groups": ["ANY"], "services": ["/v"], "service_entries": [{"resource_type": "ICMPTypeServiceEntry"}], "direction": "IN", "scope": ["ANY"]}]}],
            }}],
        },
    },
    "aws": {
        "g.json": {"SecurityGroups": [{"GroupId": "sg", "GroupName": "n", "IpPermissions": [{"IpProtocol": "tcp", "FromPort": 1, "ToPort": 2, "IpRanges": [{"CidrIp": "10.0.0.0/8"}],
                   "Ipv6Ranges": [{"CidrIpv6": "::/0"}], "UserIdGroupPairs": [{"GroupId": "sg"}], "PrefixListIds": [{"PrefixListId": "p"}]}]}],
                   "Reservations": [{"Instances": [{"InstanceId": "i", "Tags": [{"Key": "Name", "Value": "n"}], "PrivateIpAddress": "10.0.0.1", "SecurityGroups": [{"GroupId": "sg"}]}]}],
                   "NetworkInterfaces": [{"NetworkInterfaceId": "e", "Attachment": {"InstanceId": "i"}, "Groups": [{"GroupId": "sg"}], "PrivateIpAddresses": [{"PrivateIpAddress": "10.0.0.1"}]}]},
    },
    "nftables": {
        "n.json": {"nftables": [
            {"chain": {"family": "inet", "table": "t", "name": "c", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}}, {"chain": {"family": "inet", "table": "t", "name": "d"}},
            {"set": {"family": "inet", "table": "t", "name": "s", "elem": ["10.0.0.1", {"prefix": {"addr": "10.1.0.0", "len": 16}}]}},
            {"rule": {"family": "inet", "table": "t", "chain": "c", "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "@s"}}, {"jump": {"target": "d"}}]}},
            {"rule": {"family": "inet", "table": "t", "chain": "d", "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": {"set": [1, {"range": [2, 3]}]}}}, {"accept": None}]}},
            {"rule": {"family": "inet", "table": "t", "chain": "d", "expr": [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["new"]}}, {"match": {"op": "!=", "left": {"meta": {"key": "iifname"}}, "right": "e"}},
                      {"vmap": {"key": {"meta": {"key": "l4proto"}}, "data": {"set": [["tcp", {"drop": None}]]}}}]}},
        ]},
    },
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def changed(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    out = copy.deepcopy(value)
    at = out
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = copy.deepcopy(by)
    return out


@pytest.mark.parametrize("kind", sorted(SOURCES))
def test_one_strange_value_is_imported_or_refused(kind: str) -> None:
    files = SOURCES[kind]
    report(run(kind, {name: json.dumps(value) for name, value in files.items()}))  # the original is accepted
    chosen = random.Random(kind)
    accidents = []
    for path in places(files):
        if len(path) == 1:
            continue
        for strange in chosen.sample(STRANGE, 5):
            wrong = {name: json.dumps(value) for name, value in changed(files, path, strange).items()}
            try:
                report(run(kind, wrong))
            except SourceRefused:
                pass
            except Exception as error:
                accidents.append(f"{path} = {strange!r}: {type(error).__name__}: {error}")
    assert accidents == []
