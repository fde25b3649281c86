"""Workloads of a cluster as subjects: ``namespace/name[Kind]``, with pod and namespace labels and their named ports.

Pods with one owner are one workload. Where its pods differ in labels or named ports, each kind of pod is a subject of its
own (``... (2)``), which the report maps to the workload's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from policy.importers.kubernetes.manifests import Object
from policy.importers.kubernetes.selectors import NAMESPACE, NAMESPACE_NAME, labels
from policy.importers.model import SourceRefused, Untranslated
from policy.ports import MAX_PORT, NAMES, PORTED
from policy.program import Subject

# Where each kind keeps its pod template.
TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "Deployment": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "VirtualMachine": ("spec", "template"),  # kubevirt.io: the pod of a machine has its labels
}
PORT: Final = "port:"  # label prefix of a named port: ``port:http/tcp: 8080``
EXTERNAL: Final = Subject("external", nets=("0.0.0.0/0", "::/0"))


@dataclass(slots=True)
class Cluster:
    """The subjects of a cluster and, for each named port and protocol, the numbers that workloads give it."""

    subjects: list[Subject] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    named_ports: dict[str, dict[int, set[str]]] = field(
        default_factory=dict
    )  # name -> protocol -> label values


def read_cluster(objects: Sequence[Object], notes: list[str], untranslated: list[Untranslated]) -> Cluster:
    """Raises SourceRefused for labels or ports that the API server would not accept."""
    namespaces: dict[str, Mapping[str, str]] = {}
    for o in objects:
        if o.kind == "Namespace":
            found = labels(o.body["metadata"].get("labels"), str(o), NAMESPACE)
            if namespaces.setdefault(o.name, found) != found:
                raise SourceRefused("duplicate", f'there are two Namespaces named "{o.name}", with other labels', where=o.file)
    kinds: dict[str, list[Subject]] = {}
    cluster = Cluster()
    for one in objects:
        for identity, template in _pods(one):
            metadata, spec = _map(template, "metadata", one), _map(template, "spec", one)
            found = {**namespaces.get(one.namespace, {}), NAMESPACE + NAMESPACE_NAME: one.namespace}
            found |= labels(metadata.get("labels"), str(one))
            ports = _named_ports(spec, one, notes)
            for (name, proto), numbers in ports.items():
                value = ",".join(map(str, sorted(numbers)))
                found[f"{PORT}{name}/{_proto(proto)}"] = value
                cluster.named_ports.setdefault(name, {}).setdefault(proto, set()).add(value)
            if spec.get("hostNetwork") is True:
                notes.append(
                    f"{identity} uses the host's network; most clusters do not enforce policies on it"
                )
            kin = kinds.setdefault(identity, [])
            if not any(found == s.labels for s in kin):
                name = identity if not kin else f"{identity} ({len(kin) + 1})"
                kin.append(Subject(name, found))
                if name != identity:
                    cluster.ids[name] = identity
        if one.kind in {"UserDefinedNetwork", "ClusterUserDefinedNetwork", "NetworkAttachmentDefinition"}:
            untranslated.append(
                Untranslated(
                    str(one), "more than one network: only the cluster's default network is imported"
                )
            )
    cluster.subjects = [s for kin in kinds.values() for s in kin]
    return cluster


def _pods(one: Object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(identity, pod template) of a workload object; nothing for other kinds."""
    if one.kind in {"Pod", "VirtualMachineInstance"}:
        name, kind = one.name, one.kind
        owners = one.body["metadata"].get("ownerReferences") or []
        owner = owners[0] if isinstance(owners, list) and owners and isinstance(owners[0], dict) else {}
        if owner.get("name") and owner.get("kind") != "Node":
            name, kind = str(owner["name"]), str(owner.get("kind") or one.kind)
        if kind == "VirtualMachineInstance":
            kind = "VirtualMachine"  # an instance has the name of its machine, and so has its pod's owner
        yield f"{one.namespace}/{name}[{kind}]", one.body
    elif one.kind in TEMPLATES:
        template: Any = one.body
        for key in TEMPLATES[one.kind]:
            template = template.get(key) if isinstance(template, dict) else None
        yield f"{one.namespace}/{one.name}[{one.kind}]", template if isinstance(template, dict) else {}


def _map(value: Mapping[str, Any], key: str, one: Object) -> Mapping[str, Any]:
    found = value.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SourceRefused("type", f"{key} must be a map", where=str(one))
    return found


def _list(value: Mapping[str, Any], key: str, one: Object) -> list[dict[str, Any]]:
    found = value.get(key) or []
    if not isinstance(found, list) or not all(isinstance(v, dict) for v in found):
        raise SourceRefused("type", f"{key} must be a list of maps", where=str(one))
    return found


def _named_ports(spec: Mapping[str, Any], one: Object, notes: list[str]) -> dict[tuple[str, int], set[int]]:
    out: dict[tuple[str, int], set[int]] = {}
    for key in ("containers", "initContainers"):
        for container in _list(spec, key, one):
            if key == "initContainers" and container.get("restartPolicy") != "Always":  # only sidecars stay
                continue
            for port in _list(container, "ports", one):
                number, name = port.get("containerPort"), port.get("name")
                proto = NAMES.get(str(port.get("protocol") or "TCP").lower(), 0)
                if type(number) is not int or not 1 <= number <= MAX_PORT or proto not in PORTED:
                    notes.append(f"{one}: a container port without a proper number or protocol is left out")
                elif name:
                    out.setdefault((str(name), proto), set()).add(number)
    return out


def _proto(number: int) -> str:
    return next(n for n, p in NAMES.items() if p == number)
