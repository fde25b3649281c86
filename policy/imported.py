"""Imported policies: a Program as a file that people can read and `retinue policy` can evaluate.

    importedpolicy: 1
    source: tailscale
    default: deny
    groups:
      "group:ops": {label: user, in: [ann@example.com]}
    tiers:
      - name: access rules
        order: deny-wins
        otherwise: pass
        rules:
          - id: acls[0]
            action: allow
            src: {group: "group:ops"}
            dst: {all: [{has: "tag:db"}, {not: {name: [db3]}}]}
            ports: [tcp/5432]
            where: policy.hujson:12:5

A selector is one of: everybody, nobody, {group}, {name: [...]}, {under}, {label, in: [...]}, {has}, {not}, {all: [...]},
{any: [...]}, {nets: [...], except: [...]}. `ports` is a list of words as in ``tcp/80,443``, or {any_but: [...]}.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from identity.errors import BadInput
from policy.document import Node, parse, quote
from policy.nets import parse_range
from policy.ports import ANYTHING, PortMap, parse_ports, union
from policy.program import (
    BOTH,
    Action,
    AllOf,
    AnyOf,
    Direction,
    Everything,
    Exists,
    In,
    Named,
    Nets,
    Not,
    Nothing,
    Program,
    Rule,
    Selector,
    Tier,
    Under,
    Where,
)  # fmt: skip

VERSION: Final = 1
KEY: Final = "importedpolicy"
_WIDTH: Final = 110


@dataclass(frozen=True, slots=True)
class ImportedPolicy:
    """A program, where it came from, and names for the selectors that recur in it."""

    program: Program
    source: str
    groups: Mapping[str, Selector] = field(default_factory=dict)


# ---- writing


def dump_imported(policy: ImportedPolicy) -> str:
    """The text of an imported policy; `load_imported` reads back an equal program.

    Strings are quoted where YAML could misread them.
    """
    lines = [f"{KEY}: {VERSION}", f"source: {_word(policy.source)}", f"default: {policy.program.default}"]
    known: dict[int, str] = {}  # by identity: equal selectors may mean different things to a reader
    if policy.groups:
        lines.append("groups:")
    for name, selector in policy.groups.items():
        lines.append(f"  {_word(name)}: {_flow(_selector(selector, known))}")
        known[id(selector)] = name
    lines.append("tiers:" if policy.program.tiers else "tiers: []")
    for tier in policy.program.tiers:
        lines += [
            f"  - name: {_word(tier.name)}",
            f"    order: {tier.order}",
            f"    otherwise: {tier.otherwise}",
        ]
        if tier.isolates:
            lines.append("    isolates:")
            lines += _block("      ", {d: _selector(s, known) for d, s in tier.isolates.items()})
        lines.append("    rules:" if tier.rules else "    rules: []")
        for rule in tier.rules:
            fields = _block("        ", _rule(rule, known))
            lines += ["      - " + fields[0][8:], *fields[1:]]
    return "\n".join(lines) + "\n"


def _rule(rule: Rule, known: Mapping[int, str]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": rule.id, "action": str(rule.action), "src": _selector(rule.src, known), "dst": _selector(rule.dst, known)
    }  # fmt: skip
    if rule.concerns is not None:
        out["concerns"] = _selector(rule.concerns, known)
    if rule.ports != ANYTHING:
        out["ports"] = {"any_but": (ANYTHING - rule.ports).words()} if rule.ports.rest else rule.ports.words()
    if rule.directions != BOTH:
        out["directions"] = list(rule.directions)
    if rule.where is not None:
        out["where"] = f"{rule.where.file}:{rule.where.line}:{rule.where.column}"
    if rule.why:
        out["why"] = rule.why
    return out


def _selector(selector: Selector, known: Mapping[int, str]) -> Any:
    if id(selector) in known:
        return {"group": known[id(selector)]}
    match selector:
        case Everything():
            return "everybody"
        case Nothing():
            return "nobody"
        case Named(names):
            return {"name": sorted(names)}
        case Under(prefix):
            return {"under": prefix}
        case In(key, values):
            return {"label": key, "in": sorted(values)}
        case Exists(key):
            return {"has": key}
        case Not(term):
            return {"not": _selector(term, known)}
        case AllOf(terms):
            return {"all": [_selector(t, known) for t in terms]}
        case AnyOf(terms):
            return {"any": [_selector(t, known) for t in terms]}
        case Nets(cidrs, excluding):
            return {"nets": list(cidrs), "except": list(excluding)} if excluding else {"nets": list(cidrs)}


_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_./@*()-]*([ ][A-Za-z0-9_./@*()\[\]-]+)*")
_MISREAD: Final = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def _word(text: str) -> str:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _MISREAD
    return text if plain else quote(text)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_word(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    text = _word(value)
    return quote(value) if text == value and "[" in value else text


def _block(indent: str, fields: Mapping[str, Any]) -> list[str]:
    """`fields` as lines; what does not fit a line is broken at its lists."""
    out = []
    for key, value in fields.items():
        head = f"{indent}{_word(key)}: "
        text = _word(value) if isinstance(value, str) else _flow(value)
        if len(head) + len(text) <= _WIDTH or isinstance(value, str):
            out.append(head + text)
        elif isinstance(value, dict):
            out.append(head.rstrip())
            out += _block(indent + "  ", value)
        else:
            out.append(head.rstrip())
            out += _items(indent + "  ", value)
    return out


def _items(indent: str, values: list[Any]) -> list[str]:
    out: list[str] = []
    line = ""
    if all(isinstance(v, str) for v in values):  # long lists of names: several on a line, in flow style
        parts = [_flow(v) for v in values]
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            if line and len(line) + len(part) + 2 > _WIDTH:
                out.append(line.rstrip())
                line = indent + " "
            line = (line or indent + "[") + part + ("]" if last else ", ")
        return [*out, line]
    for value in values:
        text = _flow(value)
        if len(indent) + len(text) + 2 <= _WIDTH or not isinstance(value, dict):
            out.append(f"{indent}- {text}")
        else:
            lines = _block(indent + "  ", value)
            out += [f"{indent}- " + lines[0][len(indent) + 2 :], *lines[1:]]
    return out


# ---- reading


def load_imported(file: str, text: str) -> ImportedPolicy:
    """Read an imported policy. Raises BadPolicy with a position."""
    top = parse(file, text).mapping(
        "an imported policy",
        {KEY, "source", "default", "groups", "tiers"},
        {KEY, "source", "default", "tiers"},
    )
    if top[KEY].text != str(VERSION):
        raise top[KEY].bad(
            "policy.version", f"this reads {KEY} version {VERSION}", hint=f"write {KEY}: {VERSION}"
        )
    reader = _Reader()
    if "groups" in top:
        top["groups"].mapping("groups")
        for name, _, value in top["groups"].pairs():
            reader.groups[name] = reader.selector(value)
    ids: set[str] = set()
    tiers = tuple(reader.tier(node, ids) for node in top["tiers"].sequence("tiers"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    program = Program(tiers, _choice(top["default"], "default", (Action.ALLOW, Action.DENY)), digest)
    return ImportedPolicy(program, top["source"].scalar("source"), reader.groups)


def _choice(node: Node, what: str, allowed: tuple[Action, ...]) -> Action:
    word = node.scalar(what)
    if word not in allowed:
        raise node.bad("policy.value", f"{what} is {' or '.join(allowed)}, not {ascii(word)[:40]}")
    return Action(word)


class _Reader:
    def __init__(self) -> None:
        self.groups: dict[str, Selector] = {}

    def tier(self, node: Node, ids: set[str]) -> Tier:
        fields = node.mapping(
            "a tier", {"name", "order", "otherwise", "isolates", "rules"}, {"name", "order", "rules"}
        )
        order = fields["order"].scalar("order")
        if order not in {"first-match", "deny-wins"}:
            raise fields["order"].bad(
                "policy.value", f"order is first-match or deny-wins, not {ascii(order)[:40]}"
            )
        isolates: dict[Direction, Selector] = {}
        if "isolates" in fields:
            fields["isolates"].mapping("isolates", BOTH)
            for key, _, value in fields["isolates"].pairs():
                isolates[cast("Direction", key)] = self.selector(value)
        otherwise = Action.PASS
        if "otherwise" in fields:
            otherwise = _choice(fields["otherwise"], "otherwise", tuple(Action))
        rules = tuple(self.rule(one, ids) for one in fields["rules"].sequence("rules"))
        return Tier(fields["name"].scalar("name"), rules, cast("Literal['first-match', 'deny-wins']", order),
                    isolates, otherwise)  # fmt: skip

    def rule(self, node: Node, ids: set[str]) -> Rule:
        fields = node.mapping(
            "a rule", {"id", "action", "src", "dst", "concerns", "ports", "directions", "where", "why"},
            {"id", "action", "src", "dst"},
        )  # fmt: skip
        name = fields["id"].scalar("id")
        if name in ids:
            raise fields["id"].bad("policy.duplicate_id", f"the rule id {ascii(name)[:60]} is given twice")
        ids.add(name)
        directions = BOTH
        if "directions" in fields:
            words = [(n, n.scalar("a direction")) for n in fields["directions"].one_or_more("directions")]
            for one, word in words:
                if word not in BOTH:
                    raise one.bad("policy.value", f"a direction is egress or ingress, not {ascii(word)[:40]}")
            directions = cast("tuple[Direction, Direction]", tuple(word for _, word in words))
        return Rule(
            id=name,
            action=_choice(fields["action"], "action", tuple(Action)),
            src=self.selector(fields["src"]),
            dst=self.selector(fields["dst"]),
            ports=self.ports(fields["ports"]) if "ports" in fields else ANYTHING,
            where=_where(fields["where"]) if "where" in fields else None,
            why=fields["why"].scalar("why") if "why" in fields else "",
            directions=directions,
            concerns=self.selector(fields["concerns"]) if "concerns" in fields else None,
        )

    def ports(self, node: Node) -> PortMap:
        if node.kind == "map":
            return ANYTHING - _words(node.mapping("ports", {"any_but"}, {"any_but"})["any_but"])
        return _words(node)

    def selector(self, node: Node) -> Selector:
        if node.kind == "scalar":
            word = node.scalar("a selector")
            if word not in {"everybody", "nobody"}:
                raise node.bad(
                    "policy.selector",
                    f"not a selector: {ascii(word)[:40]}",
                    hint="everybody, nobody or a map",
                )
            return Everything() if word == "everybody" else Nothing()
        fields = node.mapping(
            "a selector",
            {"group", "name", "under", "label", "in", "has", "not", "all", "any", "nets", "except"},
        )
        match sorted(fields):
            case ["group"]:
                name = fields["group"].scalar("group")
                if name not in self.groups:
                    raise fields["group"].bad(
                        "policy.unknown_group", f"no group {ascii(name)[:60]} above this line",
                        hint="groups are defined before they are used",
                    )  # fmt: skip
                return self.groups[name]
            case ["name"]:
                return Named(frozenset(_texts(fields["name"], "name")))
            case ["under"]:
                return Under(fields["under"].scalar("under"))
            case ["in", "label"]:
                return In(fields["label"].scalar("label"), frozenset(_texts(fields["in"], "in", empty=True)))
            case ["has"]:
                return Exists(fields["has"].scalar("has"))
            case ["not"]:
                return Not(self.selector(fields["not"]))
            case ["all"]:
                return AllOf(tuple(self.selector(n) for n in fields["all"].sequence("all")))
            case ["any"]:
                return AnyOf(tuple(self.selector(n) for n in fields["any"].sequence("any")))
            case ["nets"] | ["except", "nets"]:
                return Nets(*(tuple(_nets(fields[k])) for k in ("nets", "except") if k in fields))
        raise node.bad(
            "policy.selector",
            "a selector has exactly one of group, name, under, label+in, has, not, all, any, nets",
        )


def _words(node: Node) -> PortMap:
    maps = []
    for one in node.one_or_more("ports"):
        try:
            maps.append(parse_ports(one.scalar("a port word")))
        except BadInput as error:
            raise one.bad(error.code, error.message, hint=error.hint) from None
    return union(maps)


def _texts(node: Node, what: str, *, empty: bool = False) -> Iterator[str]:
    nodes = node.sequence(what) if empty else node.one_or_more(what)
    for one in nodes:
        if one.kind != "scalar":
            raise one.bad("policy.type", f"{what} must be one value, not a {one.kind}")
        yield one.text


def _nets(node: Node) -> Iterator[str]:
    for one in node.one_or_more("nets"):
        word = one.scalar("a network")
        try:
            parse_range(word)
        except BadInput as error:
            raise one.bad(error.code, error.message, hint=error.hint) from None
        yield word


def _where(node: Node) -> Where:
    match = re.fullmatch(r"(.*):([0-9]{1,9}):([0-9]{1,9})", node.scalar("where"), re.DOTALL)
    if match is None:
        raise node.bad("policy.where", "where is FILE:LINE:COLUMN")
    return Where(match[1], int(match[2]), int(match[3]))
