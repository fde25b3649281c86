"""NetworkPolicy: one tier of allow rules that isolates the pods which policies select, direction by direction."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from identity.errors import BadInput
from policy import nets
from policy.importers.kubernetes.manifests import Object
from policy.importers.kubernetes.selectors import (
    ANYBODY,
    NAMESPACE,
    any_of,
    fields_of,
    given,
    in_namespace,
    selector,
    workloads,
)
from policy.importers.kubernetes.workloads import PORT, Cluster
from policy.importers.model import Source, SourceRefused
from policy.ports import ANYTHING, MAX_PORT, NAMES, PORTED, PortMap, mask, proto_name, union, whole
from policy.program import Action, AllOf, Direction, In, Nets, Rule, Selector, Tier

PROTOCOLS: Final = {n.upper(): p for n, p in NAMES.items() if p in PORTED}
_PORT_NAME: Final = re.compile(r"(?=[0-9-]*[a-z])[a-z0-9](?:-?[a-z0-9])*")
SIDES: Final[tuple[tuple[Direction, str, str], ...]] = (
    ("ingress", "ingress", "from"),
    ("egress", "egress", "to"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a rule's ports: `only` narrows the destination to those that give a named port these numbers."""

    ports: PortMap
    only: Selector | None = None


def network_policies(objects: Sequence[Object], source: Source, cluster: Cluster) -> Tier:
    """Raises SourceRefused for what the API server would not accept."""
    selected: dict[Direction, list[Selector]] = {"ingress": [], "egress": []}
    rules: list[Rule] = []
    names: set[tuple[str, str]] = set()
    for one in objects:
        check_name(one)
        if (one.namespace, one.name) in names:
            raise SourceRefused(
                "duplicate",
                f'there are two NetworkPolicies named "{one.namespace}/{one.name}"',
                where=one.file,
            )
        names.add((one.namespace, one.name))
        spec = fields_of(one.body.get("spec"), str(one))
        pods = workloads(
            in_namespace(one.namespace), *selector(spec.get("podSelector"), f"{one} spec.podSelector")
        )
        types = _types(spec, str(one))
        for direction, key, peers in SIDES:
            found = list(_rules(one, direction, key, peers, spec, pods, source, cluster))
            if direction in types:
                selected[direction].append(pods)
                rules += found
    isolates = {d: any_of(s) for d, s in selected.items() if s}
    return Tier("network policies", tuple(rules), isolates=isolates)


def _types(spec: Mapping[str, Any], where: str) -> set[str]:
    types = spec.get("policyTypes")
    if not types:
        return {"ingress", *(["egress"] if spec.get("egress") else [])}
    if not isinstance(types, list) or any(t not in ("Ingress", "Egress") for t in types):
        raise SourceRefused(
            "policy_type", f'policyTypes: invalid value "{types}"', where=where, hint="Ingress and Egress"
        )
    return {t.lower() for t in types}


def _rules(
    one: Object, direction: Direction, key: str, peers: str, spec: Mapping[str, Any], pods: Selector,
    source: Source, cluster: Cluster,
) -> Iterator[Rule]:  # fmt: skip
    entries = spec.get(key) or []
    if not isinstance(entries, list):
        raise SourceRefused("type", f"{key} must be a list", where=str(one))
    for index, entry in enumerate(entries):
        where = f"{one} {key}[{index}]"
        fields = fields_of(entry, where)
        other = _peers(fields.get(peers), one.namespace, where)
        parts = port_parts(fields.get("ports"), where, cluster, _port)
        for number, part in enumerate(parts):
            src, dst = (other, pods) if direction == "ingress" else (pods, other)
            yield Rule(
                f"NetworkPolicy {one.namespace}/{one.name} {key}[{index}]" + (f".{number + 1}" if len(parts) > 1 else ""),
                Action.ALLOW, src, dst if part.only is None else AllOf((dst, part.only)), part.ports,
                source.where(entry), directions=(direction,),
            )  # fmt: skip


def _peers(value: Any, namespace: str, where: str) -> Selector:
    if not value:
        return ANYBODY
    if not isinstance(value, list):
        raise SourceRefused("type", "peers must be a list", where=where)
    return any_of([_peer(p, namespace, where) for p in value])


def _peer(value: Any, namespace: str, where: str) -> Selector:
    fields = fields_of(value, where)
    present = set(given(fields, "podSelector", "namespaceSelector", "ipBlock"))
    if not present:
        raise SourceRefused("peer", "a peer must name podSelector, namespaceSelector or ipBlock", where=where)
    if "ipBlock" in present:
        if len(present) > 1:
            raise SourceRefused(
                "peer", "ipBlock must not be combined with podSelector or namespaceSelector", where=where
            )
        return _block(fields["ipBlock"], where)
    pods = selector(fields.get("podSelector"), where)
    if "namespaceSelector" in present:
        return workloads(*selector(fields["namespaceSelector"], where, NAMESPACE), *pods)
    return workloads(in_namespace(namespace), *pods)


def _block(value: Any, where: str) -> Selector:
    """An ipBlock: addresses outside the cluster (a pod is never meant by its address)."""
    fields = fields_of(value, where)
    block = cidr(fields.get("cidr"), where)
    without = fields.get("except") or []
    if not isinstance(without, list):
        raise SourceRefused("type", "except must be a list", where=where)
    for one in without:
        inner = nets.parse_range(cidr(one, where))
        if not nets.covers(nets.parse_range(block), inner) or inner == nets.parse_range(block):
            raise SourceRefused("cidr", f'except "{one}" must be a strict subset of "{block}"', where=where)
    return Nets((block,), tuple(without))


def cidr(value: Any, where: str) -> str:
    """A network in CIDR form. Raises SourceRefused."""
    try:
        if not isinstance(value, str) or "/" not in value:
            raise BadInput("net.form", "")
        nets.parse_range(value)
    except BadInput:
        raise SourceRefused("cidr", f'invalid CIDR "{value}"', where=where) from None
    return value


def port_parts(value: Any, where: str, cluster: Cluster, read: Any) -> list[Part]:
    """The ports of a rule: all numbers in one part, each resolved named port in its own. Raises SourceRefused.

    `read(entry, where)` gives a PortMap, or (name, protocol or None) of a named port.
    """
    if not value:
        return [Part(ANYTHING)]
    if not isinstance(value, list):
        raise SourceRefused("type", "ports must be a list", where=where)
    plain: list[PortMap] = []
    parts: list[Part] = []
    for entry in value:
        found: PortMap | tuple[str, int | None] = read(entry, where)
        if isinstance(found, PortMap):
            plain.append(found)
        else:
            parts += _resolved(cluster, *found)
    return [*([Part(union(plain))] if plain else []), *dict.fromkeys(parts)]


def _resolved(cluster: Cluster, name: str, protocol: int | None) -> Iterator[Part]:
    for proto, values in sorted(cluster.named_ports.get(name, {}).items()):
        if protocol in {None, proto}:
            for value in sorted(values):
                ports = union(PortMap({proto: mask(int(n), int(n))}) for n in value.split(","))
                yield Part(ports, In(f"{PORT}{name}/{proto_name(proto)}", frozenset({value})))


def _port(entry: Any, where: str) -> PortMap | tuple[str, int | None]:
    fields = fields_of(entry, where)
    proto = protocol(fields.get("protocol"), where)
    first, last = fields.get("port"), fields.get("endPort")
    if first is None:
        if last is not None:
            raise SourceRefused("port", "endPort needs port", where=where)
        return whole(proto)
    if isinstance(first, str):
        if last is not None:
            raise SourceRefused("port", f'endPort cannot follow the named port "{first}"', where=where)
        return check_port_name(first, where), proto
    return PortMap({proto: port_range(first, first if last is None else last, where)})


def protocol(value: Any, where: str) -> int:
    """TCP where none is given. Raises SourceRefused."""
    if value is None:
        return PROTOCOLS["TCP"]
    if not isinstance(value, str) or value not in PROTOCOLS:
        raise SourceRefused(
            "protocol", f'unsupported protocol "{value}"', where=where, hint=", ".join(PROTOCOLS)
        )
    return PROTOCOLS[value]


def port_range(first: Any, last: Any, where: str) -> int:
    """Bits of a range. Raises SourceRefused."""
    for one in (first, last):
        if not isinstance(one, int) or isinstance(one, bool) or not 1 <= one <= MAX_PORT:
            raise SourceRefused("port", f'invalid port "{one}": a number from 1 to {MAX_PORT}', where=where)
    if first > last:
        raise SourceRefused("port", f'the port range "{first}-{last}" is empty', where=where)
    return mask(first, last)


def check_port_name(value: str, where: str) -> str:
    """A service port name (RFC 6335). Raises SourceRefused."""
    if len(value) > 15 or not _PORT_NAME.fullmatch(value):
        raise SourceRefused(
            "port",
            f'invalid port name "{value}"',
            where=where,
            hint="up to 15 of a-z, 0-9 and -, with a letter",
        )
    return value


def check_name(one: Object) -> None:
    """Raises SourceRefused for a policy without a name."""
    if not one.name:
        raise SourceRefused("name", f"a {one.kind} has no name", where=one.file)
