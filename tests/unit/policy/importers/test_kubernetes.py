from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from policy.evaluate import permitted
from policy.importers.kubernetes import import_kubernetes
from policy.importers.model import Imported, SourceRefused

Table = Callable[[Imported], dict[tuple[str, str], str]]
Parts = Callable[[Imported, str, str], dict[str, str]]

CLUSTER = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: shop}}
---
kind: Namespace
apiVersion: v1
metadata: {name: ops}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
        - ports: [{name: http, containerPort: 8080}, {name: dns, containerPort: 53, protocol: UDP}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec: {template: {metadata: {labels: {app: db, tier: back}}, spec: {containers: [{ports: [{name: http, containerPort: 9090}]}]}}}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: backup, namespace: ops}
spec: {jobTemplate: {spec: {template: {metadata: {labels: {app: backup}}}}}}
"""
WEB, DB, JOB = "shop/web[Deployment]", "shop/db[StatefulSet]", "ops/backup[CronJob]"


def load(*documents: Any, cluster: str = CLUSTER) -> Imported:
    files = {"cluster.yaml": cluster}
    for number, one in enumerate(documents):
        files[f"policy{number}.yaml"] = json.dumps(one)
    return import_kubernetes(files)


def netpol(spec: dict[str, Any], name: str = "p", namespace: str = "shop") -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def admin(spec: dict[str, Any], name: str = "p", priority: int = 5) -> dict[str, Any]:
    return {"apiVersion": "policy.networking.k8s.io/v1alpha1", "kind": "AdminNetworkPolicy", "metadata": {"name": name},
            "spec": {"priority": priority, "subject": {"namespaces": {}}, **spec}}  # fmt: skip


def baseline(spec: dict[str, Any], name: str = "default") -> dict[str, Any]:
    return {"apiVersion": "policy.networking.k8s.io/v1alpha1", "kind": "BaselineAdminNetworkPolicy", "metadata": {"name": name},
            "spec": {"subject": {"namespaces": {}}, **spec}}  # fmt: skip


def app(name: str) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": {"app": name}}}


def to(imported: Imported, table: Table, dst: str) -> dict[str, str]:
    return {a: p for (a, b), p in table(imported).items() if b == dst}


def test_without_policies_all_is_open(table: Table, parts: Parts) -> None:
    imported = load()
    assert table(imported) == {(a, b): "any" for a in (WEB, DB, JOB) for b in (WEB, DB, JOB) if a != b}
    assert parts(imported, "external", DB) == {"0.0.0.0/0": "any", "::/0": "any"}
    assert parts(imported, DB, "external") == {"0.0.0.0/0": "any", "::/0": "any"}


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({"podSelector": {}}, {}),  # isolated
        ({**app("db")}, {}),
        ({**app("db"), "ingress": []}, {}),
        ({**app("db"), "ingress": [{}]}, {WEB: "any", JOB: "any"}),
        ({**app("db"), "policyTypes": ["Egress"]}, {WEB: "any", JOB: "any"}),
        ({**app("db"), "ingress": [{"from": [app("web")]}]}, {WEB: "any"}),
        ({**app("db"), "ingress": [{"from": [app("backup")]}]}, {}),  # another namespace
        ({**app("db"), "ingress": [{"from": [{"namespaceSelector": {}}], "ports": [{"port": 5432}]}]}, {WEB: "tcp/5432", JOB: "tcp/5432"}),
        ({**app("db"), "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "shop"}}}]}]}, {WEB: "any"}),
        ({**app("db"), "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ops"}}, **app("backup")}]}]}, {JOB: "any"}),
        ({**app("db"), "ingress": [{"from": [{"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}}]}]}, {JOB: "any"}),
        ({**app("db"), "ingress": [{"from": [{"podSelector": {"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["back"]}]}}]}]}, {WEB: "any"}),
        ({**app("db"), "ingress": [{"from": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "x"]}]}}]}]}, {WEB: "any"}),
        ({"podSelector": {"matchExpressions": [{"key": "tier", "operator": "Exists"}]}}, {}),
        ({**app("db"), "ingress": [{"ports": [{"port": 80, "endPort": 90}, {"port": 53, "protocol": "UDP"}, {"protocol": "SCTP"}]}]},
         {WEB: "tcp/80-90 udp/53 sctp", JOB: "tcp/80-90 udp/53 sctp"}),
        ({**app("db"), "ingress": [{"ports": [{"port": "http"}, {"port": "nope"}, {"port": 22}]}]}, {WEB: "tcp/22,9090", JOB: "tcp/22,9090"}),
        ({**app("db"), "ingress": [{"ports": [{"port": "http", "protocol": "UDP"}]}]}, {}),
        ({**app("db"), "ingress": [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]}, {}),  # a pod is no address
    ],
)  # fmt: skip
def test_ingress_to_one_pod(table: Table, spec: dict[str, Any], wanted: dict[str, str]) -> None:
    assert to(load(netpol(spec)), table, DB) == wanted


def test_egress_and_ingress_must_both_allow(table: Table) -> None:
    out = netpol(
        {
            **app("web"),
            "policyTypes": ["Egress"],
            "egress": [{"to": [app("db")], "ports": [{"port": "http"}, {"port": 80}]}],
        },
        "out",
    )
    back = netpol({**app("db"), "ingress": [{"ports": [{"port": 9090}]}]}, "in")
    found = table(load(out, back))
    assert found[WEB, DB] == "tcp/9090"
    assert (WEB, JOB) not in found
    assert found[JOB, DB] == "tcp/9090"
    assert found[DB, JOB] == "any"


def test_policy_types_follow_the_rules_that_are_written(table: Table) -> None:
    found = table(
        load(netpol({"podSelector": None, "egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]}))
    )
    assert found == {(WEB, JOB): "udp/53", (DB, JOB): "udp/53"}  # and nothing gets in


def test_ip_blocks(parts: Parts) -> None:
    block = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}
    imported = load(netpol({**app("web"), "policyTypes": ["Egress", "Ingress"], "egress": [{"to": [block, {"ipBlock": {"cidr": "fd00::/8"}}], "ports": [{"port": 443}]}],
                            "ingress": [{"from": [block]}]}))  # fmt: skip
    assert parts(imported, WEB, "external") == {
        "10.0.0.0/16": "tcp/443",
        "10.2.0.0-10.255.255.255": "tcp/443",
        "fd00::/8": "tcp/443",
    }
    assert parts(imported, "external", WEB) == {"10.0.0.0/16": "any", "10.2.0.0-10.255.255.255": "any"}
    open_rule = load(netpol({**app("web"), "ingress": [{"ports": [{"port": 80}]}]}))
    assert set(parts(open_rule, "external", WEB).values()) == {"tcp/80"}


def test_admin_rules_by_priority_with_pass_then_network_policies_then_baseline(table: Table) -> None:
    everyone = [{"namespaces": {}}]
    first = admin({"subject": {"pods": {"namespaceSelector": {"matchLabels": {"team": "shop"}}, **app("db")}},
                   "ingress": [{"name": "out of here", "action": "Pass", "from": [{"pods": app("web")}], "ports": [{"portRange": {"start": 80, "end": 90}}]},
                               {"action": "Deny", "from": everyone, "ports": [{"portNumber": {"port": 443}}, {"namedPort": "http"}]}]}, "first", 1)  # fmt: skip
    second = admin(
        {
            "ingress": [
                {
                    "action": "Allow",
                    "from": everyone,
                    "ports": [{"portNumber": {"protocol": "UDP", "port": 53}}, {"portNumber": {"port": 443}}],
                }
            ]
        },
        "second",
        2,
    )
    np = netpol({**app("db"), "ingress": [{"from": [app("web")], "ports": [{"port": 85}]}]})
    low = baseline({"ingress": [{"action": "Deny", "from": [{"pods": app("backup")}]}]})
    found = table(load(second, first, np, low))
    assert found[WEB, DB] == "tcp/85 udp/53"
    assert found[JOB, DB] == "udp/53"
    assert found[JOB, WEB] == "tcp/443 udp/53"
    assert found[DB, WEB] == "any"
    reasons = [r.why for t in load(first).policy.program.tiers for r in t.rules]
    assert "out of here" in reasons


def test_admin_egress_to_networks(parts: Parts) -> None:
    imported = load(
        admin({"egress": [{"action": "Allow", "to": [{"networks": ["10.1.0.0/16", "fd00::/8"]}]}]}),
        baseline(
            {
                "egress": [
                    {
                        "action": "Deny",
                        "to": [{"networks": ["0.0.0.0/0"]}, {"nodes": {}}, {"domainNames": ["a.example"]}],
                    }
                ]
            }
        ),
    )
    assert parts(imported, WEB, "external") == {
        "10.1.0.0/16": "any",
        "fd00::/8": "any",
        **{k: v for k, v in parts(imported, WEB, "external").items() if ":" in k},
    }
    assert "10.0.0.0/16" not in parts(imported, WEB, "external")
    assert [u.why.split()[0] for u in imported.untranslated] == ["nodes", "domainNames"]


def test_pods_of_one_owner_are_one_workload_and_its_kinds_of_pods_are_told_apart(table: Table) -> None:
    def pod(own: str, labels: dict[str, str], **owner: str) -> dict[str, Any]:
        meta: dict[str, Any] = {"name": own, "labels": labels}
        if owner:
            meta["ownerReferences"] = [owner]
        return {"metadata": meta, "spec": {"hostNetwork": own == "n"}}

    items = [pod("a-1", {"app": "a"}, name="a", kind="ReplicaSet"), pod("a-2", {"app": "a"}, name="a", kind="ReplicaSet"),
             pod("a-3", {"app": "a", "canary": "1"}, name="a", kind="ReplicaSet"), pod("n", {}, name="node1", kind="Node"), pod("o", {}, name="own")]  # fmt: skip
    imported = load({"apiVersion": "v1", "kind": "PodList", "items": items}, cluster="")
    names = [s.name for s in imported.inventory]
    assert names == [
        "default/a[ReplicaSet]",
        "default/a[ReplicaSet] (2)",
        "default/n[Pod]",
        "default/own[Pod]",
        "external",
    ]
    assert imported.ids == {"default/a[ReplicaSet] (2)": "default/a[ReplicaSet]"}
    assert any("host's network" in n for n in imported.notes)
    assert len(table(imported)) == 12


def test_json_lists_notes_and_unknown_fields() -> None:
    files = {
        "all.json": json.dumps(
            {
                "kind": "List",
                "apiVersion": "v1",
                "items": [netpol({"podSelector": {}, "policyType": ["Egress"], "ingress": [{"form": []}]})],
            }
        ),
        "more.yaml": "---\n---\n- a list\n---\nkind: Pod\n",
        "net.yaml": "apiVersion: k8s.ovn.org/v1\nkind: UserDefinedNetwork\nmetadata: {name: n, created: 2020-01-01}\n",
    }
    imported = import_kubernetes(files)
    assert [n.partition(": ")[2] for n in imported.notes if "unknown field" in n] == [
        "NetworkPolicy shop/p: unknown field spec.policyType is dropped, as the API server does",
        "NetworkPolicy shop/p: unknown field spec.ingress[0].form is dropped, as the API server does",
    ]
    assert sum("no Kubernetes object" in n for n in imported.notes) == 2
    assert "more than one network" in imported.untranslated[0].why


def test_container_ports_that_are_none_and_sidecars(table: Table) -> None:
    cluster = """
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers: [{ports: [{name: odd, containerPort: 0}, {containerPort: 1}]}]
  initContainers: [{restartPolicy: Always, ports: [{name: side, containerPort: 15}]}, {ports: [{name: gone, containerPort: 16}]}]
---
{apiVersion: v1, kind: Pod, metadata: {name: q}}
"""
    imported = load(
        netpol(
            {
                "podSelector": {},
                "ingress": [{"ports": [{"port": "side"}, {"port": "gone"}, {"port": "odd"}]}],
            },
            namespace="default",
        ),
        cluster=cluster,
    )
    assert table(imported) == {("default/q[Pod]", "default/p[Pod]"): "tcp/15"}
    assert any("container port" in n for n in imported.notes)


SEL = {"podSelector": {}}


@pytest.mark.parametrize(
    ("documents", "culprit"),
    [
        ([netpol({**SEL, "ingress": [{"from": [{}]}]})], "a peer must name"),
        ([netpol({**SEL, "ingress": [{"from": [{**SEL, "ipBlock": {"cidr": "10.0.0.0/8"}}]}]})], "ipBlock must not be combined"),
        ([netpol({**SEL, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/40"}}]}]})], "10.0.0.0/40"),
        ([netpol({**SEL, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.1"}}]}]})], 'invalid CIDR "10.0.0.1"'),
        ([netpol({**SEL, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}}]}]})], "strict subset"),
        ([netpol({**SEL, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}]}]})], "strict subset"),
        ([netpol({**SEL, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": "x"}}]}]})], "except must be a list"),
        ([netpol({"podSelector": {"matchLabels": {"a@b": "x"}}})], 'invalid label key "a@b"'),
        ([netpol({"podSelector": {"matchLabels": {"UP/b": "x"}}})], "UP/b"),
        ([netpol({"podSelector": {"matchLabels": {"a": "x y"}}})], 'invalid label value "x y"'),
        ([netpol({"podSelector": {"matchLabels": {"a": 1}}})], 'invalid label value "1"'),
        ([netpol({"podSelector": {"matchLabels": ["a"]}})], "labels must be a map"),
        ([netpol({"podSelector": {"matchExpressions": {}, "matchLabels": {}}, "ingress": [1]})], "a map is wanted"),
        ([netpol({"podSelector": {"matchExpressions": {"a": 1}}})], "matchExpressions must be a list"),
        ([netpol({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}})], 'invalid operator "Is"'),
        ([netpol({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}})], "needs values"),
        ([netpol({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}})], "takes no values"),
        ([netpol({**SEL, "policyTypes": ["In"]})], "policyTypes"),
        ([netpol({**SEL, "ingress": {"from": []}})], "ingress must be a list"),
        ([netpol({**SEL, "ingress": [{"from": {"podSelector": {}}}]})], "peers must be a list"),
        ([netpol({**SEL, "ingress": [{"ports": {"port": 1}}]})], "ports must be a list"),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": 0}]}]})], 'invalid port "0"'),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": True}]}]})], "invalid port"),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": 70000}]}]})], "70000"),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": 9, "endPort": 8}]}]})], "is empty"),
        ([netpol({**SEL, "ingress": [{"ports": [{"endPort": 8}]}]})], "endPort needs port"),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": "http", "endPort": 8}]}]})], "endPort cannot follow"),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": "HTTP"}]}]})], 'invalid port name "HTTP"'),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": "a-name-that-is-too-long"}]}]})], "invalid port name"),
        ([netpol({**SEL, "ingress": [{"ports": [{"port": 1, "protocol": "ICMP"}]}]})], 'unsupported protocol "ICMP"'),
        ([netpol(SEL), netpol(SEL)], 'two NetworkPolicies named "shop/p"'),
        ([netpol(SEL, name="")], "has no name"),
        ([{**netpol(SEL), "metadata": {"name": 5}}], "must be a string"),
        ([admin({}), admin({}, "q")], "have the same priority 5"),
        ([admin({}), admin({}, "p", 6)], 'two AdminNetworkPolicies named "p"'),
        ([admin({}, priority=1001)], 'invalid priority "1001"'),
        ([admin({"priority": None})], "invalid priority"),
        ([admin({"subject": None})], "exactly one of namespaces, pods"),
        ([admin({"subject": {"namespaces": {}, "pods": {}}})], "exactly one of namespaces, pods"),
        ([admin({"ingress": [{"action": "Allow"}]})], '"from" must list at least one peer'),
        ([admin({"ingress": [{"action": "Allow", "from": []}]})], '"from" must list'),
        ([admin({"egress": [{"action": "Allow", "to": [{"namespaces": {}, "pods": {}}]}]})], "exactly one of"),
        ([admin({"ingress": [{"action": "Allow", "from": [{"networks": ["10.0.0.0/8"]}]}]})], "exactly one of"),
        ([admin({"egress": [{"action": "Allow", "to": [{"networks": []}]}]})], "networks must be a list"),
        ([admin({"egress": [{"action": "Allow", "to": [{"networks": ["x"]}]}]})], 'invalid CIDR "x"'),
        ([admin({"egress": [{"action": "Ok", "to": [{"namespaces": {}}]}]})], 'unrecognized action "Ok"'),
        ([admin({"egress": [{"action": "Allow", "to": [{"namespaces": {}}], "ports": [{"portNumber": {"port": 1}, "namedPort": "x"}]}]})], "exactly one of portNumber"),
        ([admin({"egress": [{"action": "Allow", "to": [{"namespaces": {}}], "ports": [{"portRange": {"start": 10, "end": 1}}]}]})], '"10-1" is empty'),
        ([admin({"egress": [{"action": "Allow", "to": [{"namespaces": {}}], "ports": [{"namedPort": 1}]}]})], "invalid port name"),
        ([admin({"egress": {}, "ingress": {"a": 1}})], "must be a list of at most 100"),
        ([baseline({}), baseline({}, "other")], "only one BaselineAdminNetworkPolicy"),
        ([baseline({}, "other")], 'must be named "default"'),
        ([baseline({"egress": [{"action": "Pass", "to": [{"namespaces": {}}]}]})], 'unrecognized action "Pass"'),
        ([{"kind": "Pod", "metadata": {"name": "p", "labels": {"a": 1}}}], "invalid label value"),
        ([{"kind": "Pod", "metadata": {"name": "p"}, "spec": []}], "spec must be a map"),
        ([{"kind": "Namespace", "metadata": {"name": "n", "labels": {"a": "1"}}}, {"kind": "Namespace", "metadata": {"name": "n"}}], 'two Namespaces named "n"'),
    ],
)  # fmt: skip
def test_what_the_api_server_refuses_is_refused(documents: list[dict[str, Any]], culprit: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        load(*documents)
    assert culprit in caught.value.message
    assert caught.value.exit == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "a: [", r"a\.yaml:2:1: not valid YAML"),
        (
            "a.yaml",
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"b{i}: &{c} [{', '.join(['*' + p] * 10)}]\n"
                for i, (p, c) in enumerate(zip("abcdefg", "bcdefgh", strict=True))
            ),
            "too much",
        ),
        ("a.yaml", "a: &x [*x]\nb: *y", "not valid YAML"),
        ("a.yaml", "[" * 5000, "not valid YAML"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "", "no Kubernetes object"),
    ],
)
def test_text_that_is_no_manifest(name: str, text: str, words: str) -> None:
    with pytest.raises(SourceRefused, match=words):
        import_kubernetes({name: text})


def test_rules_know_their_place() -> None:
    text = CLUSTER + "---\n" + json.dumps(netpol({**SEL, "ingress": [{}]}), indent=1)
    rule = import_kubernetes({"x.yaml": text}).policy.program.tiers[0].rules[0]
    assert rule.where is not None
    assert rule.where.file == "x.yaml"
    assert rule.where.line > 30
    assert rule.id == "NetworkPolicy shop/p ingress[0]"


def test_virtual_machines_are_workloads() -> None:
    machine = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "vm", "namespace": "shop"},
               "spec": {"template": {"metadata": {"labels": {"app": "vm"}}, "spec": {"domain": {}}}}}  # fmt: skip
    instance = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": "vm", "namespace": "shop", "labels": {"app": "vm"}}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "virt-launcher-vm", "namespace": "shop", "labels": {"app": "vm"},
           "ownerReferences": [{"kind": "VirtualMachineInstance", "name": "vm"}]}, "spec": {"containers": []}}  # fmt: skip
    found = load(machine, instance, pod, netpol({"podSelector": {"matchLabels": {"app": "vm"}}, "ingress": [{"from": [app("web")]}]}))
    names = [s.name for s in found.inventory if not s.nets]
    assert names.count("shop/vm[VirtualMachine]") == 1
    by_name = {s.name: s for s in found.inventory}
    assert permitted(found.policy.program, by_name[WEB], by_name["shop/vm[VirtualMachine]"])
    assert not permitted(found.policy.program, by_name[DB], by_name["shop/vm[VirtualMachine]"])
