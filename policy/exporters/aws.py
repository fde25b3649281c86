"""AWS security groups: one group for each class of workloads, with what it may send and be sent.

The JSON has the form of `describe-security-groups` and `describe-instances`. Group ids are placeholders until the groups
exist; each workload belongs into exactly its one group, and a new group's own rule that lets everything out has to go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

from policy.exporters.model import Exported
from policy.exporters.table import NotExpressible, Opening, Table, cidrs
from policy.importers.aws import SIDES
from policy.nets import V6
from policy.ports import ALL_PORTS, ANYTHING, ICMP, ICMPV6, MAX_PORT, PORTED, SCTP, TCP, UDP, PortMap, ranges
from policy.program import Direction

RULES: Final = 60  # the default quota of rules per group and direction
_NAMES: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmpv6"}

_Word = tuple[str, int | None, int | None]  # protocol, first port, last port


def export_aws(table: Table) -> Exported:
    """Files security-groups.json and instances.json. Raises NotExpressible."""
    ids = {number: _id("sg", table.example(number).name) for number in table.numbers()}
    groups: list[dict[str, Any]] = []
    notes, total = [], 0
    for number, group_id in ids.items():
        members = sorted(table.classes.members[number])
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        group: dict[str, Any] = {"GroupId": group_id, "GroupName": f"retinue {members[0]}"[:200],
                                 "Description": f"for {members[0]}{more}"[:200]}  # fmt: skip
        for way, key in SIDES:
            group[key] = [
                p for o in table.openings(number, way) for p in _permissions(table, number, o, way, ids)
            ]
            count = sum(len(p[k]) for p in group[key] for k in ("UserIdGroupPairs", "IpRanges", "Ipv6Ranges"))
            total += count
            if count > RULES:
                notes.append(
                    f"group {group['GroupName']}: {count} rules for {way}; the default quota is {RULES}"
                )
        groups.append(group)
    notes.append("a group that is made anew lets everything out: remove that rule")
    instances = [
        {
            "InstanceId": _id("i", one.name),
            "Tags": [{"Key": "Name", "Value": one.name}],
            "SecurityGroups": [{"GroupId": ids[table.classes.class_of(one.name)]}],
        }
        for one in table.inner
    ]
    texts = {
        "security-groups.json": _text({"SecurityGroups": groups}),
        "instances.json": _text({"Reservations": [{"Instances": instances}]}),
    }
    return Exported(texts, {s.name: s.name for s in table.inner}, total, notes=notes)


def _id(kind: str, name: str) -> str:
    return f"{kind}-{hashlib.sha256(name.encode()).hexdigest()[:17]}"


def _text(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _permissions(
    table: Table, number: int, opening: Opening, way: Direction, ids: dict[int, str]
) -> Iterator[dict[str, Any]]:
    if opening.ports.bits(SCTP) not in {0, ALL_PORTS}:
        raise NotExpressible(
            "protocol",
            f"{table.blame(number, opening, way)}: a security group opens sctp on all ports or not at all",
            hint="open sctp whole, or close it",
        )
    pairs = [{"GroupId": ids[other]} for other in opening.classes]
    four = [{"CidrIp": c} for c in cidrs(s for s in opening.spans if s[0] < V6)]
    six = [{"CidrIpv6": c} for c in cidrs(s for s in opening.spans if s[0] >= V6)]
    for protocol, first, last in _words(opening.ports):
        word: dict[str, Any] = {"IpProtocol": protocol}
        if first is not None:
            word |= {"FromPort": first, "ToPort": last}
        ranges_4 = [] if protocol == _NAMES[ICMPV6] else four  # each family has its own ICMP
        ranges_6 = [] if protocol == _NAMES[ICMP] else six
        apart = (
            protocol == _NAMES[ICMPV6] and pairs and ranges_6
        )  # a reader takes it for ICMP by its addresses
        for own_pairs, own_6 in ((pairs, []), ([], ranges_6)) if apart else ((pairs, ranges_6),):
            if own_pairs or ranges_4 or own_6:
                yield {**word, "UserIdGroupPairs": own_pairs, "IpRanges": ranges_4, "Ipv6Ranges": own_6}


def _words(ports: PortMap) -> Iterator[_Word]:
    if ports == ANYTHING:
        yield "-1", None, None
        return
    for proto in range(256) if ports.rest else ports.ports:
        held = ports.bits(ICMP if proto == ICMPV6 else proto)
        if not held or (proto == ICMPV6 and ports.rest):
            continue
        if proto == ICMP:
            yield _NAMES[ICMP], -1, -1
            yield _NAMES[ICMPV6], -1, -1
        elif proto not in PORTED or proto == SCTP:
            yield str(proto), None, None
        elif held == ALL_PORTS:
            yield _NAMES[proto], 0, MAX_PORT
        else:
            yield from ((_NAMES[proto], first, last) for first, last in ranges(held))
