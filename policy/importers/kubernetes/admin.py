"""AdminNetworkPolicy and BaselineAdminNetworkPolicy (policy.networking.k8s.io/v1alpha1): ordered tiers around the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from policy.importers.kubernetes.manifests import Object
from policy.importers.kubernetes.netpol import (
    SIDES,
    check_name,
    check_port_name,
    cidr,
    port_parts,
    port_range,
    protocol,
)
from policy.importers.kubernetes.selectors import NAMESPACE, any_of, fields_of, given, selector, workloads
from policy.importers.kubernetes.workloads import Cluster
from policy.importers.model import Source, SourceRefused, Untranslated
from policy.ports import PortMap
from policy.program import Action, AllOf, Direction, Nets, Nothing, Rule, Selector, Tier

ADMIN_ACTIONS: Final = {"Allow": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS}
BASELINE_ACTIONS: Final = {"Allow": Action.ALLOW, "Deny": Action.DENY}
MAX_PRIORITY: Final = 1000
MAX_RULES: Final = 100
BASELINE_NAME: Final = "default"


class AdminPolicies:
    """Reads the policies of both kinds; what is not carried over goes to `untranslated`."""

    def __init__(self, source: Source, cluster: Cluster, untranslated: list[Untranslated]) -> None:
        self.source, self.cluster, self.untranslated = source, cluster, untranslated

    def admin(self, objects: Sequence[Object]) -> Tier:
        """The tier above network policies: all rules by priority, then by place. Raises SourceRefused."""
        ordered: dict[int, Object] = {}
        names: set[str] = set()
        for one in objects:
            check_name(one)
            if one.name in names:
                raise SourceRefused(
                    "duplicate", f'there are two AdminNetworkPolicies named "{one.name}"', where=one.file
                )
            names.add(one.name)
            priority = self.spec(one).get("priority")
            if (
                not isinstance(priority, int)
                or isinstance(priority, bool)
                or not 0 <= priority <= MAX_PRIORITY
            ):
                raise SourceRefused("priority", f'AdminNetworkPolicy "{one.name}": invalid priority "{priority}"', where=one.file,
                                    hint=f"a number from 0 to {MAX_PRIORITY}")  # fmt: skip
            if priority in ordered:
                raise SourceRefused(
                    "priority", f'AdminNetworkPolicies "{ordered[priority].name}" and "{one.name}" have the same priority {priority}',
                    where=one.file,
                )  # fmt: skip
            ordered[priority] = one
        rules = [r for _, one in sorted(ordered.items()) for r in self.rules(one, ADMIN_ACTIONS)]
        return Tier("admin network policies", tuple(rules), "first-match")

    def baseline(self, objects: Sequence[Object]) -> Tier:
        """The tier below network policies. Raises SourceRefused."""
        if len(objects) > 1:
            raise SourceRefused(
                "duplicate",
                f'only one BaselineAdminNetworkPolicy may exist; there is also "{objects[1].name}"',
                where=objects[1].file,
            )
        for one in objects:
            if one.name != BASELINE_NAME:
                raise SourceRefused(
                    "name",
                    f'a BaselineAdminNetworkPolicy must be named "default", not "{one.name}"',
                    where=one.file,
                )
        rules = [r for one in objects for r in self.rules(one, BASELINE_ACTIONS)]
        return Tier("baseline admin network policy", tuple(rules), "first-match")

    def spec(self, one: Object) -> Mapping[str, Any]:
        return fields_of(one.body.get("spec"), str(one))

    def rules(self, one: Object, actions: Mapping[str, Action]) -> Iterator[Rule]:
        spec = self.spec(one)
        subject = self.subject(spec.get("subject"), f"{one} subject")
        for direction, key, peers in SIDES:
            entries = spec.get(key) or []
            if not isinstance(entries, list) or len(entries) > MAX_RULES:
                raise SourceRefused(
                    "type", f"{key} must be a list of at most {MAX_RULES} rules", where=str(one)
                )
            for index, entry in enumerate(entries):
                yield from self.rule(one, direction, key, peers, index, entry, subject, actions)

    def rule(
        self, one: Object, direction: Direction, key: str, peers: str, index: int, entry: Any, subject: Selector,
        actions: Mapping[str, Action],
    ) -> Iterator[Rule]:  # fmt: skip
        where = f"{one} {key}[{index}]"
        fields = fields_of(entry, where)
        action = actions.get(str(fields.get("action")))
        if action is None:
            raise SourceRefused(
                "action",
                f'unrecognized action "{fields.get("action")}"',
                where=where,
                hint=", ".join(actions),
            )
        words = fields.get(peers)
        if not words or not isinstance(words, list):
            raise SourceRefused("peer", f'"{peers}" must list at least one peer', where=where)
        other = any_of([self.peer(p, direction, where) for p in words])
        parts = port_parts(fields.get("ports"), where, self.cluster, _port)
        for number, part in enumerate(parts):
            src, dst = (other, subject) if direction == "ingress" else (subject, other)
            yield Rule(
                f"{one.kind} {one.name} {key}[{index}]" + (f".{number + 1}" if len(parts) > 1 else ""),
                action, src, dst if part.only is None else AllOf((dst, part.only)), part.ports,
                self.source.where(entry), str(fields.get("name") or ""),
                (direction,),
            )  # fmt: skip

    def subject(self, value: Any, where: str) -> Selector:
        fields = fields_of(value, where)
        return self.one_of(fields, where, "subject", "namespaces", "pods")

    def one_of(self, fields: Mapping[str, Any], where: str, what: str, *keys: str) -> Selector:
        present = list(given(fields, *keys))
        if len(present) != 1:
            raise SourceRefused(
                "peer",
                f"a {what} must have exactly one of {', '.join(keys)}, not {len(present)}",
                where=where,
            )
        value = fields[present[0]]
        if present[0] == "namespaces":
            return workloads(*selector(value, where, NAMESPACE))
        if present[0] == "pods":
            pods = fields_of(value, where)
            return workloads(
                *selector(pods.get("namespaceSelector"), where, NAMESPACE),
                *selector(pods.get("podSelector"), where),
            )
        if present[0] == "networks":
            if not isinstance(value, list) or not value:
                raise SourceRefused("peer", "networks must be a list of CIDRs", where=where)
            return Nets(tuple(cidr(c, where) for c in value))
        if present[0] == "nodes":
            selector(value, where)
        self.untranslated.append(
            Untranslated(where, f"{present[0]} are not in the inventory: this peer selects nobody")
        )
        return Nothing()

    def peer(self, value: Any, direction: Direction, where: str) -> Selector:
        keys = (
            "namespaces",
            "pods",
            *(("networks", "nodes", "domainNames") if direction == "egress" else ()),
        )
        return self.one_of(fields_of(value, where), where, "peer", *keys)


def _port(entry: Any, where: str) -> PortMap | tuple[str, int | None]:
    fields = fields_of(entry, where)
    present = list(given(fields, "portNumber", "portRange", "namedPort"))
    if len(present) != 1:
        raise SourceRefused(
            "port",
            f"a port must have exactly one of portNumber, portRange, namedPort, not {len(present)}",
            where=where,
        )
    value = fields[present[0]]
    if present[0] == "namedPort":
        if not isinstance(value, str):
            raise SourceRefused("port", f'invalid port name "{value}"', where=where)
        return check_port_name(value, where), None
    if present[0] == "portNumber":
        number = fields_of(value, where)
        return PortMap(
            {
                protocol(number.get("protocol"), where): port_range(
                    number.get("port"), number.get("port"), where
                )
            }
        )
    span = fields_of(value, where)
    return PortMap(
        {protocol(span.get("protocol"), where): port_range(span.get("start"), span.get("end"), where)}
    )
