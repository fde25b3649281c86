"""nftables rule sets as JSON (`nft -j list ruleset`): filter chains of the families ip, ip6 and inet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from identity.errors import BadInput
from policy import nets
from policy.importers.model import Files, Imported, SourceRefused, Untranslated
from policy.importers.netfilter.chains import EVERYWHERE, Chain, Hook, Interface, Match, Step, translate
from policy.ports import (
    ALL_PORTS,
    ANYTHING,
    ICMP,
    PORTED,
    TCP,
    UDP,
    PortMap,
    mask,
    proto_number,
    union,
    whole,
)
from policy.program import Where

FAMILIES: Final = {"ip": (nets.V4_ALL,), "ip6": (nets.V6_ALL,), "inet": EVERYWHERE}
HOOKS: Final[Mapping[str, Hook]] = {"input": "input", "output": "output", "forward": "forward"}
# Statements that do not decide.
PASSING: Final = frozenset({"counter", "log", "mangle", "notrack", "meter", "set", "quota"})


def import_nft(files: Files) -> Imported:
    """`files` is one JSON file. Raises SourceRefused."""
    (file, text), *others = files.items()
    if others:
        raise SourceRefused("files", "one file is wanted")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceRefused("syntax", f"not valid JSON: {error}", where=file, hint="list the rules with: nft -j list ruleset") from None
    items = document.get("nftables") if isinstance(document, dict) else None
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        raise SourceRefused("syntax", 'a map with a list under "nftables" is wanted', where=file)
    try:
        return _Ruleset(file, items).result()
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # a machine wrote it: no value is worth a message
        raise SourceRefused("syntax", f"not what nft prints: {error}", where=file) from None


class _Ruleset:
    def __init__(self, file: str, items: list[dict[str, Any]]) -> None:
        self.file = file
        self.untranslated: list[Untranslated] = []
        self.tables: dict[tuple[str, str], dict[str, Chain]] = {}
        self.sets: dict[tuple[str, str, str], Any] = {}
        self.count = 0
        for item in items:
            for kind, body in item.items():
                if kind == "chain":
                    self.chain(body)
                elif kind in {"set", "map"}:
                    self.sets[body["family"], body["table"], body["name"]] = body.get("elem") or []
        for item in items:
            if "rule" in item:
                self.rule(item["rule"])

    def result(self) -> Imported:
        chains = [c for table in self.tables.values() for c in table.values()]
        if not any(c.hook for c in chains):
            raise SourceRefused("table", "there is no filter chain in this rule set", where=self.file)
        tables = {c.name: table for table in self.tables.values() for c in table.values()}
        return translate("nftables", chains, tables, self.count, self.untranslated)

    def chain(self, body: Mapping[str, Any]) -> None:
        family, table, name = str(body.get("family")), str(body.get("table")), str(body.get("name"))
        if family not in FAMILIES:
            self.untranslated.append(
                Untranslated(f"table {family} {table}", f"chains of the family {family} are not imported")
            )
            return
        chain = Chain(f"{family} {table} {name}", span=FAMILIES[family])
        if body.get("type") == "filter" and body.get("hook") in HOOKS:
            chain.hook = HOOKS[body["hook"]]
            chain.policy = "drop" if body.get("policy") == "drop" else "accept"
            chain.priority = int(body.get("prio") or 0)
        elif body.get("hook"):
            self.untranslated.append(
                Untranslated(chain.name, f"{body.get('type')} chains at {body.get('hook')} are not imported")
            )
        self.tables.setdefault((family, table), {})[name] = chain

    def rule(self, body: Mapping[str, Any]) -> None:
        key = (str(body.get("family")), str(body.get("table")))
        chain = self.tables.get(key, {}).get(str(body.get("chain")))
        if chain is None:
            return
        self.count += 1
        where = Where(f"{self.file} {chain.name} handle {body.get('handle')}", 0)
        match, why = Match(), str(body.get("comment") or "")
        for statement in body.get("expr") or []:
            for name, value in statement.items():
                if name == "match":
                    match = match & self.match(value, key, where)
                elif name in {"accept", "drop", "return"}:
                    chain.steps.append(Step(match, name, "", where, why))
                elif name == "reject":
                    chain.steps.append(Step(match, "drop", "", where, why))
                elif name in {"jump", "goto"}:
                    chain.steps.append(Step(match, name, str(value.get("target")), where, why))
                elif name == "vmap":
                    chain.steps += self.vmap(match, value, key, where, why)
                elif name not in PASSING:
                    match = match & Match(partial=(name,))

    def vmap(
        self, match: Match, value: Mapping[str, Any], key: tuple[str, str], where: Where, why: str
    ) -> Iterator[Step]:
        data = value.get("data")
        if isinstance(data, str):
            data = {"set": self.sets.get((*key, data.removeprefix("@")), [])}
        for element in (data or {}).get("set") or []:
            left, verdict = element
            one = match & self.match({"op": "==", "left": value.get("key"), "right": left}, key, where)
            ((name, target),) = verdict.items()
            if name in {"accept", "drop", "return"}:
                yield Step(one, name, "", where, why)
            elif name in {"jump", "goto"}:
                yield Step(one, name, str(target.get("target")), where, why)

    # ---- matches

    def match(self, value: Mapping[str, Any], key: tuple[str, str], where: Where) -> Match:
        left, right, op = value.get("left"), value.get("right"), value.get("op")
        if op not in {"==", "!=", "in"}:
            return Match(partial=(f"op {op}",))
        try:
            values = list(self.values(right, key))
            return (
                self.test(left, values, op == "!=") if isinstance(left, dict) else Match(partial=("match",))
            )
        except (BadInput, ValueError, TypeError, KeyError) as error:
            raise SourceRefused("rule", f"a match that cannot be read: {error}", where=where) from None

    def values(self, right: Any, key: tuple[str, str]) -> Iterator[Any]:
        if isinstance(right, str) and right.startswith("@"):
            name = (*key, right[1:])
            if name not in self.sets:
                raise ValueError(f"no set {right}")
            for element in self.sets[name]:
                yield from self.values(element, key)
        elif isinstance(right, list):
            for one in right:
                yield from self.values(one, key)
        elif isinstance(right, dict) and "set" in right:
            yield from self.values(right["set"], key)
        elif isinstance(right, dict) and "elem" in right:
            yield from self.values(right["elem"]["val"], key)
        else:
            yield right

    def test(self, left: Mapping[str, Any], values: list[Any], but: bool) -> Match:
        if "payload" in left:
            payload = left["payload"]
            return self.payload(str(payload.get("protocol")), str(payload.get("field")), values, but)
        if "meta" in left:
            name = left["meta"].get("key")
            if name in {"iifname", "iif", "oifname", "oif"}:
                face = (Interface(frozenset(str(v) for v in values), but),)
                own = Match(never=not but and set(values) == {"lo"})
                return own & (Match(came=face) if name.startswith("i") else Match(goes=face))
            if name in {"l4proto", "protocol", "nfproto"}:
                return self.protocol(str(name), values, but)
        if "ct" in left and left["ct"].get("key") == "state":
            return Match(never=("new" in values) is but)
        return Match(partial=(json.dumps(left, sort_keys=True),))

    def payload(self, protocol: str, name: str, values: list[Any], but: bool) -> Match:
        if protocol in {"ip", "ip6"} and name in {"saddr", "daddr"}:
            family = FAMILIES[protocol]
            found = nets.merge(r for v in values for r in _range(v))
            spans = nets.subtract(family, found) if but else found
            return Match(src=spans, dst=family) if name == "saddr" else Match(src=family, dst=spans)
        if protocol in {"tcp", "udp", "sctp", "th"} and name == "dport":
            bits = 0
            for v in values:
                first, last = v["range"] if isinstance(v, dict) else (v, v)
                bits |= mask(max(1, int(first)), int(last)) if int(last) else 0
            bits = ALL_PORTS & ~bits if but else bits
            protocols = (TCP, UDP, 132) if protocol == "th" else (proto_number(protocol),)
            return Match(ports=PortMap(dict.fromkeys(protocols, bits)))
        if (protocol, name) in {("ip", "protocol"), ("ip6", "nexthdr")}:
            return Match(src=FAMILIES[protocol], dst=FAMILIES[protocol]) & self.protocol(
                "l4proto", values, but
            )
        number = {"icmp": ICMP, "icmpv6": ICMP}.get(protocol)
        if number is None and protocol in {"tcp", "udp", "sctp"}:
            number = proto_number(protocol)
        narrowed = Match(ports=whole(number)) if number in {ICMP, *PORTED} and number is not None else Match()
        return narrowed & Match(partial=(f"{protocol} {name}",))

    def protocol(self, name: str, values: list[Any], but: bool) -> Match:
        if name == "l4proto":
            ports = union(whole(proto_number("icmp" if v == "ipv6-icmp" else v)) for v in values)
            return Match(ports=ANYTHING - ports if but else ports)
        v6 = {str(v) in {"ip6", "ipv6"} for v in values}
        family = EVERYWHERE if len(v6) > 1 else FAMILIES["ip6" if v6.pop() is not but else "ip"]
        return Match(src=family, dst=family)


def _range(value: Any) -> tuple[nets.Range, ...]:
    if isinstance(value, dict) and "prefix" in value:
        return nets.parse_range(f"{value['prefix']['addr']}/{value['prefix']['len']}")
    if isinstance(value, dict) and "range" in value:
        return nets.parse_range("-".join(str(v) for v in value["range"]))
    return nets.parse_range(str(value))
