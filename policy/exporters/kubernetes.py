"""Kubernetes NetworkPolicy: everybody is isolated, then each kind of pod gets what it may send and be sent.

A kind of pod is a namespace and the labels that the policy reads; labels that it reads and the pod has not must be
missing. Workloads that the policy tells apart by name, or by what no pod label can hold, carry the label `retinue-workload`.
A workload's namespace is the path before the last slash of its name (``shop/eu/web``: pod ``web`` in ``shop-eu``), or
the one that a Kubernetes import noted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from policy.exporters.model import Exported
from policy.exporters.table import NotExpressible, Opening, Table, cidrs
from policy.importers.kubernetes.selectors import NAMESPACE, NAMESPACE_NAME, check_key, check_value
from policy.importers.model import SourceRefused
from policy.ports import ALL_PORTS, ANYTHING, PORTED, PortMap, proto_name, ranges
from policy.program import AllOf, AnyOf, Direction, Exists, In, Named, Not, Program, Selector, Subject

IDENTITY: Final = "retinue-workload"
MAX_LABEL: Final = 63
_HEAD: Final = (
    "# The labels and namespaces that policies.yaml was checked against. To be read, not applied.\n"
)
_KIND: Final = re.compile(r"\[[A-Za-z]+\]( \([0-9]+\))?$")  # what an import adds to a name
SIDES: Final[tuple[tuple[Direction, str], ...]] = (("ingress", "from"), ("egress", "to"))


@dataclass(frozen=True, slots=True)
class _Unit:
    """Pods of one class in one namespace that one label selector selects."""

    namespace: str
    selector: tuple[tuple[str, str | None], ...]  # key -> value, None: the label must be missing
    number: int
    name: str


def export_kubernetes(table: Table) -> Exported:
    """Files policies.yaml and workloads.yaml. Raises NotExpressible."""
    pods = _Pods(table)
    units = pods.units()
    policies = [_isolation(namespace) for namespace in sorted({u.namespace for u in units})]
    policies += [_policy(table, unit, units) for unit in units]
    notes = []
    if pods.identified:
        notes.append(
            f"{len(pods.identified)} workloads are selected by the label {IDENTITY}: put it on their pods"
        )
    notes.append("pods in namespaces that the inventory does not name are not touched")
    texts = {
        "policies.yaml": _text(policies),
        "workloads.yaml": _HEAD + _text([pods.body(s) for s in table.inner]),
    }
    return Exported(texts, {s.name: pods.foreign(s) for s in table.inner}, len(policies), notes=notes)


def _text(objects: list[dict[str, Any]]) -> str:
    return str(yaml.safe_dump_all(objects, sort_keys=False, explicit_start=True))


def _isolation(namespace: str) -> dict[str, Any]:
    spec = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    return _object("NetworkPolicy", namespace, "retinue-isolate", "networking.k8s.io/v1") | {"spec": spec}


def _object(kind: str, namespace: str, name: str, version: str = "v1") -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}}


# ---- pods


class _Pods:
    """Where each workload runs, what it is called there and which labels its pods carry."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.places: dict[str, tuple[str, str]] = {}
        names, keys = _reads(table.program)
        self.keys = sorted(k for k in keys if _writable(k, ""))
        foreign = {k for k in keys if not _writable(k, "") and not k.startswith(NAMESPACE)}
        taken: set[tuple[str, str]] = set()
        for one in table.inner:
            if IDENTITY in one.labels:
                raise NotExpressible("label", f"{one.name} has a label {IDENTITY}, which the export needs for itself",
                                     hint="rename the label")  # fmt: skip
            self.places[one.name] = _free(*_place(one), taken)
        self.identified: dict[str, str] = {}
        values: set[str] = set()
        kinds: dict[object, set[int]] = {}
        for one in table.inner:
            kinds.setdefault(self._kind(one), set()).add(table.classes.class_of(one.name))
        for one in table.inner:
            unwritable = foreign & set(one.labels) or any(
                k in one.labels and not _writable(k, one.labels[k]) for k in self.keys
            )
            if one.name in names or unwritable or len(kinds[self._kind(one)]) > 1:
                value = _label_value(one.name, values)
                values.add(value)
                self.identified[one.name] = value

    def _kind(self, one: Subject) -> tuple[str, tuple[tuple[str, str], ...]]:
        held = tuple((k, one.labels[k]) for k in self.keys if k in one.labels and _writable(k, one.labels[k]))
        return self.places[one.name][0], held

    def units(self) -> list[_Unit]:
        out: dict[object, _Unit] = {}
        for one in self.table.inner:
            namespace, name = self.places[one.name]
            held = dict(self._kind(one)[1])
            terms: list[tuple[str, str | None]] = [(k, held.get(k)) for k in self.keys]
            if self.identified:
                terms.append((IDENTITY, self.identified.get(one.name)))
            unit = _Unit(namespace, tuple(terms), self.table.classes.class_of(one.name), name)
            out.setdefault((unit.namespace, unit.selector), unit)
        return list(out.values())

    def body(self, one: Subject) -> dict[str, Any]:
        """The workload as an object that the importer reads."""
        out = _object("Pod", *self.places[one.name])
        held = {k: v for k, v in sorted(one.labels.items()) if _writable(k, v)}
        if one.name in self.identified:
            held[IDENTITY] = self.identified[one.name]
        out["metadata"]["labels"] = held
        return out

    def foreign(self, one: Subject) -> str:
        namespace, name = self.places[one.name]
        return f"{namespace}/{name}[Pod]"


def _reads(program: Program) -> tuple[set[str], set[str]]:
    """Names and label keys that a program reads."""
    names: set[str] = set()
    keys: set[str] = set()

    def walk(selector: Selector) -> None:
        if isinstance(selector, Named):
            names.update(selector.names)
        elif isinstance(selector, In | Exists):
            keys.add(selector.key)
        elif isinstance(selector, Not):
            walk(selector.term)
        elif isinstance(selector, AllOf | AnyOf):
            for term in selector.terms:
                walk(term)

    for tier in program.tiers:
        for selector in tier.isolates.values():
            walk(selector)
        for rule in tier.rules:
            for end in (rule.src, rule.dst, rule.concerns):
                if end is not None:
                    walk(end)
    return names, keys


def _writable(key: str, value: str) -> bool:
    """Can a pod have this label?"""
    try:
        check_key(key, "")
        check_value(value, "")
    except SourceRefused:
        return False
    return True


def _place(one: Subject) -> tuple[str, str]:
    path, _, name = _KIND.sub("", one.name).rpartition("/")
    return _dns(one.labels.get(NAMESPACE + NAMESPACE_NAME) or path or "default"), _dns(name)


def _dns(text: str) -> str:
    """A text as the nearest DNS label (RFC 1123)."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].strip("-") or "x"


def _free(namespace: str, name: str, taken: set[tuple[str, str]]) -> tuple[str, str]:
    number, own = 1, name
    while (namespace, own) in taken:
        number += 1
        own = f"{name}-{number}"
    taken.add((namespace, own))
    return namespace, own


def _label_value(name: str, taken: set[str]) -> str:
    value = re.sub(r"[^A-Za-z0-9_.-]+", ".", name).strip("._-")
    if len(value) > MAX_LABEL or not value or value in taken:
        value = f"{value[:40]}.{hashlib.sha256(name.encode()).hexdigest()[:16]}".lstrip(".")
    return value


# ---- policies


def _policy(table: Table, unit: _Unit, units: list[_Unit]) -> dict[str, Any]:
    spec: dict[str, Any] = {"podSelector": _selector(unit), "policyTypes": ["Ingress", "Egress"]}
    for way, word in SIDES:
        rules = []
        for opening in table.openings(unit.number, way):
            ports = _ports(opening.ports)
            if ports is None:
                raise NotExpressible(
                    "protocol",
                    f"{table.blame(unit.number, opening, way)}: a NetworkPolicy names ports of tcp, udp and sctp, or opens everything",
                    hint="narrow the rule to tcp, udp and sctp, or open any",
                )
            rule: dict[str, Any] = {word: list(_peers(opening, units))}
            rules.append(rule | ({"ports": ports} if ports else {}))
        if rules:
            spec[way] = rules
    out = _object("NetworkPolicy", unit.namespace, f"retinue-for-{unit.name}", "networking.k8s.io/v1")
    return out | {"spec": spec}


def _selector(unit: _Unit) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if held := {key: value for key, value in unit.selector if value is not None}:
        out["matchLabels"] = held
    if missing := [key for key, value in unit.selector if value is None]:
        out["matchExpressions"] = [{"key": key, "operator": "DoesNotExist"} for key in missing]
    return out


def _peers(opening: Opening, units: list[_Unit]) -> Iterator[dict[str, Any]]:
    """Never empty: an empty list of peers would mean everybody."""
    alike: dict[tuple[tuple[str, str | None], ...], list[_Unit]] = {}
    for unit in units:
        if unit.number in opening.classes:
            alike.setdefault(unit.selector, []).append(unit)
    for same in alike.values():
        names = sorted(unit.namespace for unit in same)
        where: dict[str, Any] = {"matchLabels": {NAMESPACE_NAME: names[0]}}
        if len(names) > 1:
            where = {"matchExpressions": [{"key": NAMESPACE_NAME, "operator": "In", "values": names}]}
        yield {"namespaceSelector": where, "podSelector": _selector(same[0])}
    for cidr in cidrs(opening.spans):
        yield {"ipBlock": {"cidr": cidr}}


def _ports(ports: PortMap) -> list[dict[str, Any]] | None:
    """Empty for everything; None where there are no words for it."""
    if ports == ANYTHING:
        return []
    if ports.rest or not set(ports.ports) <= PORTED:
        return None
    out: list[dict[str, Any]] = []
    for proto, held in ports.ports.items():
        word = {"protocol": proto_name(proto).upper()}
        if held == ALL_PORTS:
            out.append(word)
            continue
        for first, last in ranges(held):
            out.append({**word, "port": first} | ({"endPort": last} if last != first else {}))
    return out
