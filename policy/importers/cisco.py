"""Cisco IOS extended access lists (IPv4), named and numbered, with network object groups.

Each list filters new traffic from its outside to its inside: two outside subjects a list, ``NAME sources`` and
``NAME destinations``. First match decides; what nothing matches is denied.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from identity.errors import BadInput
from policy import nets
from policy.imported import ImportedPolicy
from policy.importers.model import Files, Imported, SourceRefused, Untranslated
from policy.ports import ALL_PORTS, ANYTHING, MAX_PORT, PORTED, PortMap, mask, proto_number, whole
from policy.program import Action, AllOf, In, Nets, Program, Rule, Subject, Tier, Where

PROTOCOLS: Final = {
    "ip": None,
    "gre": 47,
    "esp": 50,
    "ahp": 51,
    "ospf": 89,
    "eigrp": 88,
    "igmp": 2,
    "ipinip": 4,
    "pim": 103,
    "nos": 94,
}
PORTS: Final = {
    "ftp-data": 20, "ftp": 21, "telnet": 23, "smtp": 25, "tacacs": 49, "domain": 53, "bootps": 67, "bootpc": 68, "tftp": 69,
    "www": 80, "http": 80, "pop3": 110, "sunrpc": 111, "ident": 113, "nntp": 119, "ntp": 123, "netbios-ns": 137, "netbios-dgm": 138,
    "netbios-ss": 139, "snmp": 161, "snmptrap": 162, "bgp": 179, "https": 443, "isakmp": 500, "syslog": 514, "rip": 520,
    "exec": 512, "login": 513, "cmd": 514, "lpd": 515, "ssh": 22, "non500-isakmp": 4500,
}  # fmt: skip
LISTS: Final = re.compile(r"ip access-list extended (\S+)")
NUMBERED: Final = re.compile(r"access-list (1[0-9]{2}|2[0-6][0-9]{2}) (.*)")
GROUP: Final = re.compile(r"object-group network (\S+)")
MAX_WILD: Final = 12  # bits of a wildcard that are not at its end


@dataclass(slots=True)
class _List:
    name: str
    rules: list[tuple[int, Rule]] = field(default_factory=list)  # by sequence number


def import_cisco(files: Files) -> Imported:
    """Raises SourceRefused for a line that IOS would not take."""
    reader = _Reader()
    for file, text in files.items():
        reader.read(file, text)
    if not reader.lists:
        raise SourceRefused(
            "lists", "there is no extended access list in these files", where=", ".join(files)
        )
    tiers, subjects = [], []
    for one in reader.lists.values():
        tiers.append(
            Tier(
                f"access list {one.name}",
                tuple(r for _, r in sorted(one.rules, key=lambda x: x[0])),
                "first-match",
            )
        )
        for side in ("sources", "destinations"):
            subjects.append(
                Subject(f"{one.name} {side}", {"list": one.name, "side": side}, nets=("0.0.0.0/0",))
            )
    policy = ImportedPolicy(Program(tuple(tiers)), "cisco-ios")
    return Imported(
        policy,
        tuple(subjects),
        reader.untranslated,
        rules=sum(len(x.rules) for x in reader.lists.values()),
        notes=reader.notes,
    )


class _Reader:
    def __init__(self) -> None:
        self.lists: dict[str, _List] = {}
        self.groups: dict[str, list[str]] = {}
        self.untranslated: list[Untranslated] = []
        self.notes: list[str] = []

    def read(self, file: str, text: str) -> None:
        here: _List | None = None
        group: list[str] | None = None
        for number, raw in enumerate(text.splitlines(), 1):
            line, where = raw.strip(), Where(file, number, len(raw) - len(raw.lstrip()) + 1)
            if not line or line.startswith("!"):
                continue
            indented = raw[0].isspace()
            if found := LISTS.fullmatch(line):
                here, group = self.lists.setdefault(found[1], _List(found[1])), None
            elif found := GROUP.fullmatch(line):
                here, group = None, self.groups.setdefault(found[1], [])
            elif found := NUMBERED.fullmatch(line):
                here, group = None, None
                self.entry(self.lists.setdefault(found[1], _List(found[1])), found[2], where)
            elif here is not None and (
                indented or re.match(r"[0-9]+ (permit|deny|remark)|permit|deny|remark", line)
            ):
                self.entry(here, line, where)
            elif group is not None and indented:
                self.member(group, line, where)
            else:
                here = group = None

    def member(self, group: list[str], line: str, where: Where) -> None:
        words = line.split()
        if words[0] == "description":
            return
        if words[0] == "group-object" and len(words) == 2 and words[1] in self.groups:
            group += self.groups[words[1]]
        elif words[0] == "host" and len(words) == 2:
            group.append(words[1])
        elif words[0] == "range" and len(words) == 3:
            group.append(f"{words[1]}-{words[2]}")
        elif len(words) == 2:
            group.append("/".join(words))
        else:
            raise SourceRefused("group", f'not a member of a network group: "{line}"', where=where)
        try:
            nets.ranges_of(tuple(group))
        except BadInput as error:
            raise SourceRefused("group", error.message, where=where) from None

    def entry(self, one: _List, line: str, where: Where) -> None:
        words = line.split()
        sequence = int(words.pop(0)) if words[0].isdigit() else (one.rules[-1][0] if one.rules else 0) + 10
        if words[:1] == ["remark"]:
            return
        if len(words) < 2 or words[0] not in {"permit", "deny"}:
            raise SourceRefused("entry", f'not an entry of an access list: "{line}"', where=where)
        try:
            self.rule(one, sequence, words, where)
        except BadInput as error:
            raise SourceRefused("entry", error.message, where=where) from None

    def rule(self, one: _List, sequence: int, words: list[str], where: Where) -> None:
        action = Action.ALLOW if words.pop(0) == "permit" else Action.DENY
        protocol = _protocol(words.pop(0))
        partial: list[str] = []
        src = self.network(words, where)
        if _operator(words):
            _bits(words)
            partial.append("source ports")
        dst = self.network(words, where)
        bits = _bits(words) if _operator(words) else ALL_PORTS
        established = "established" in words
        rest = [w for w in words if w not in {"log", "log-input", "established"}]
        if rest:
            partial.append(" ".join(rest))
        if bits != ALL_PORTS and protocol not in PORTED:
            raise BadInput("port", "ports need tcp or udp")
        if established:
            self.notes.append(f"{where}: established traffic opens nothing; replies are implicit here")
            return
        if partial:
            kept = "left out" if action is Action.ALLOW else "denied as a whole"
            self.untranslated.append(Untranslated(str(where), f"{', '.join(partial)}: {kept}"))
            if action is Action.ALLOW:
                return
        ports = (
            ANYTHING
            if protocol is None
            else PortMap({protocol: bits})
            if protocol in PORTED
            else whole(protocol)
        )
        if not ports:
            return
        sources, destinations = (
            AllOf((In("list", frozenset({one.name})), In("side", frozenset({side})), Nets(tuple(cidrs))))
            for side, cidrs in (("sources", src), ("destinations", dst))
        )
        one.rules.append(
            (sequence, Rule(f"{one.name} {sequence}", action, sources, destinations, ports, where))
        )

    def network(self, words: list[str], where: Where) -> list[str]:
        first = words.pop(0) if words else ""
        if first == "any":
            return ["0.0.0.0/0"]
        if first == "host" and words:
            nets.address(words[0])
            return [words.pop(0)]
        if first == "object-group" and words:
            name = words.pop(0)
            if name not in self.groups:
                raise SourceRefused("group", f'there is no object group "{name}"', where=where)
            members = self.groups[name]
            if not members:
                raise SourceRefused("group", f'the object group "{name}" is empty', where=where)
            return members
        if not words:
            raise BadInput("entry", f"an address needs its wildcard: {ascii(first)[:40]}")
        return list(_wildcard(first, words.pop(0)))


def _protocol(word: str) -> int | None:
    return PROTOCOLS[word] if word in PROTOCOLS else proto_number(word)


def _operator(words: list[str]) -> bool:
    return words[:1] != [] and words[0] in {"eq", "neq", "lt", "gt", "range"}


def _port(word: str) -> int:
    if word in PORTS:
        return PORTS[word]
    if not word.isdigit() or int(word) > MAX_PORT:
        raise BadInput("port", f"not a port: {ascii(word)[:40]}")
    return int(word)


def _bits(words: list[str]) -> int:
    """Take an operator and its ports off the front."""
    operator = words.pop(0)
    if not words:
        raise BadInput("port", f"{operator} needs a port")
    if operator == "range":
        if len(words) < 2:
            raise BadInput("port", "range needs two ports")
        return mask(max(1, _port(words.pop(0))), _port(words.pop(0)))
    listed = [_port(words.pop(0))]
    while operator in {"eq", "neq"} and words and (words[0].isdigit() or words[0] in PORTS):
        listed.append(_port(words.pop(0)))
    if operator == "gt":
        return mask(listed[0] + 1, MAX_PORT) if listed[0] < MAX_PORT else 0
    if operator == "lt":
        return mask(1, listed[0] - 1) if listed[0] > 1 else 0
    bits = 0
    for one in listed:
        bits |= mask(one, one) if one else 0
    return ALL_PORTS & ~bits if operator == "neq" else bits


def _wildcard(address: str, wildcard: str) -> Iterator[str]:
    """The networks of an address and its wildcard (bits that do not matter); scattered bits are spelled out."""
    try:
        base, wild = int(ipaddress.IPv4Address(address)), int(ipaddress.IPv4Address(wildcard))
    except ValueError:
        raise BadInput(
            "net.form", f"not an address and wildcard: {ascii(f'{address} {wildcard}')[:60]}"
        ) from None
    tail = (~wild & (wild + 1)).bit_length() - 1  # ones at the end
    scattered = [bit for bit in range(tail, 32) if wild >> bit & 1]
    if len(scattered) > MAX_WILD:
        raise BadInput(
            "net.wildcard", f"the wildcard {wildcard} stands for more than {1 << MAX_WILD} networks"
        )
    base &= ~wild & 0xFFFFFFFF
    for number in range(1 << len(scattered)):
        extra = sum(1 << bit for i, bit in enumerate(scattered) if number >> i & 1)
        yield f"{ipaddress.IPv4Address(base | extra)}/{32 - tail}"
