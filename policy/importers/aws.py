"""AWS security groups: the JSON of `describe-security-groups` with that of `describe-instances` or `describe-network-interfaces`.

Groups only allow, are stateful, and hold for each interface in both directions; an interface with several groups may do
what any of them allows. A subject is an instance (its Name tag or id) or else an interface; each group it is in is a label.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from identity.errors import BadInput
from policy import nets
from policy.imported import ImportedPolicy
from policy.importers.model import Files, Imported, SourceRefused, Untranslated
from policy.ports import ANYTHING, ICMP, PORTED, PortMap, mask, proto_number, whole
from policy.program import (
    Action,
    AnyOf,
    Direction,
    Everything,
    Exists,
    Named,
    Nets,
    Program,
    Rule,
    Selector,
    Subject,
    Tier,
)

YES: Final = "yes"
EXTERNAL: Final = Subject("external", nets=("0.0.0.0/0", "::/0"))
SIDES: Final[tuple[tuple[Direction, str], ...]] = (
    ("ingress", "IpPermissions"),
    ("egress", "IpPermissionsEgress"),
)


@dataclass(slots=True)
class _Machine:
    name: str
    groups: set[str] = field(default_factory=set)
    addresses: list[int] = field(default_factory=list)


def import_aws(files: Files) -> Imported:
    """`files` are JSON outputs of the command line tool. Raises SourceRefused."""
    documents = [(file, _parse(file, text)) for file, text in files.items()]
    groups = [g for file, d in documents for g in _rows(d, "SecurityGroups", file)]
    if not groups:
        raise SourceRefused(
            "groups", "there is no SecurityGroups list in these files", where=", ".join(files)
        )
    reader = _Reader({_text(g, "GroupId"): g for g in groups})
    for file, document in documents:
        reader.read(document, file)
    return reader.result()


def _parse(file: str, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceRefused("syntax", f"not valid JSON: {error}", where=file) from None
    if not isinstance(document, dict):
        raise SourceRefused("syntax", "a map is wanted", where=file)
    return document


def _rows(value: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = value.get(key) or []
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise SourceRefused("type", f"{key} must be a list of maps", where=where)
    return found


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found:
        raise SourceRefused("type", f'{key} must be a text, not "{found}"')
    return found


class _Reader:
    def __init__(self, groups: Mapping[str, dict[str, Any]]) -> None:
        self.groups = groups
        self.machines: dict[str, _Machine] = {}  # by instance or interface id
        self.untranslated: list[Untranslated] = []
        self.ids: dict[str, str] = {}
        self.count = 0

    # ---- who

    def read(self, document: Mapping[str, Any], file: str) -> None:
        for reservation in _rows(document, "Reservations", file):
            for one in _rows(reservation, "Instances", file):
                tags = {str(t.get("Key")): t.get("Value") for t in _rows(one, "Tags", file)}
                machine = self.machine(_text(one, "InstanceId"), str(tags.get("Name") or ""))
                for interface in _rows(one, "NetworkInterfaces", file) or [one]:
                    self.interface(machine, interface, file)
                machine.groups |= {_text(g, "GroupId") for g in _rows(one, "SecurityGroups", file)}
        for one in _rows(document, "NetworkInterfaces", file):
            attached = one.get("Attachment")
            instance = attached.get("InstanceId") if isinstance(attached, dict) else None
            owner = instance or _text(one, "NetworkInterfaceId")
            self.interface(self.machine(str(owner), ""), one, file)

    def machine(self, identity: str, name: str) -> _Machine:
        if identity not in self.machines:
            taken = {m.name for m in self.machines.values()}
            own = identity if not name else f"{name} ({identity})" if name in taken else name
            if name and own != name:
                self.ids[own] = name
            self.machines[identity] = _Machine(own)
        return self.machines[identity]

    def interface(self, machine: _Machine, one: Mapping[str, Any], file: str) -> None:
        machine.groups |= {_text(g, "GroupId") for g in _rows(one, "Groups", file)}
        found = [a.get("PrivateIpAddress") for a in _rows(one, "PrivateIpAddresses", file)]
        found += [a.get("Ipv6Address") for a in _rows(one, "Ipv6Addresses", file)] + [
            one.get("PrivateIpAddress")
        ]
        try:
            machine.addresses += [nets.address(str(a)) for a in found if a]
        except BadInput as error:
            raise SourceRefused("address", error.message, where=f"{file}: {machine.name}") from None

    # ---- what

    def result(self) -> Imported:
        for machine in self.machines.values():
            for group in machine.groups - set(self.groups):
                self.untranslated.append(
                    Untranslated(
                        machine.name, f"security group {group} is not in these files: it allows nothing here"
                    )
                )
        rules = [
            r
            for name, group in self.groups.items()
            for d, key in SIDES
            for r in self.rules(name, group, d, key)
        ]
        tier = Tier(
            "security groups", tuple(rules), isolates={"ingress": Everything(), "egress": Everything()}
        )
        subjects = [
            Subject(m.name, {f"sg:{g}": YES for g in sorted(m.groups)}) for m in self.machines.values()
        ]
        policy = ImportedPolicy(Program((tier,), Action.ALLOW), "aws")
        return Imported(policy, (*subjects, EXTERNAL), self.untranslated, ids=self.ids, rules=self.count)

    def rules(self, name: str, group: Mapping[str, Any], direction: Direction, key: str) -> Iterator[Rule]:
        mine = Exists(f"sg:{name}")
        for index, entry in enumerate(_rows(group, key, name)):
            self.count += 1
            where = f"{name} {key}[{index}]"
            other = self.peers(entry, where)
            ports = self.ports(entry, where, other)
            if other is None or not ports:
                continue
            src, dst = (other, mine) if direction == "ingress" else (mine, other)
            why = str(group.get("GroupName") or "")
            yield Rule(where, Action.ALLOW, src, dst, ports, why=why, directions=(direction,))

    def peers(self, entry: Mapping[str, Any], where: str) -> Selector | None:
        terms: list[Selector] = []
        cidrs = [str(r.get("CidrIp")) for r in _rows(entry, "IpRanges", where)]
        cidrs += [str(r.get("CidrIpv6")) for r in _rows(entry, "Ipv6Ranges", where)]
        try:
            spans = nets.merge(r for c in cidrs for r in nets.parse_range(c))
        except BadInput as error:
            raise SourceRefused("cidr", error.message, where=where) from None
        inside = [
            m.name for m in self.machines.values() if any(a <= x <= b for x in m.addresses for a, b in spans)
        ]
        if inside:
            terms.append(Named(frozenset(inside)))
        if cidrs:
            terms.append(Nets(tuple(cidrs)))
        for pair in _rows(entry, "UserIdGroupPairs", where):
            other = _text(pair, "GroupId")
            if other not in self.groups:
                self.untranslated.append(
                    Untranslated(where, f"security group {other} is not in these files: nobody is in it")
                )
            terms.append(Exists(f"sg:{other}"))
        for prefixes in _rows(entry, "PrefixListIds", where):
            self.untranslated.append(
                Untranslated(
                    where,
                    f"the addresses of prefix list {prefixes.get('PrefixListId')} are not in these files",
                )
            )
        if not terms:
            return None
        return terms[0] if len(terms) == 1 else AnyOf(tuple(terms))

    def ports(self, entry: Mapping[str, Any], where: str, other: Selector | None) -> PortMap:
        protocol, first, last = str(entry.get("IpProtocol")), entry.get("FromPort"), entry.get("ToPort")
        if protocol == "-1":
            return ANYTHING
        try:
            number = proto_number(protocol)
            if number in PORTED and isinstance(first, int) and isinstance(last, int) and first >= 0:
                return PortMap({number: mask(max(first, 1), last)}) if last else PortMap()
        except BadInput as error:
            raise SourceRefused("port", error.message, where=where) from None
        if number == ICMP and first not in {None, -1}:
            self.untranslated.append(Untranslated(where, f"ICMP type {first} alone: left out"))
            return PortMap()
        if protocol.lower() in {"icmpv6", "58"} and not (
            isinstance(other, Nets) and all(":" in c for c in other.cidrs)
        ):
            self.untranslated.append(
                Untranslated(where, "ICMPv6 without ICMP between inside subjects: left out")
            )
            return PortMap()
        return whole(number)
