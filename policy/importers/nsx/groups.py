"""NSX groups as selectors. The realised members of the export decide; an expression that gives the same is kept instead.

So a group by tag stays a selector by label, which follows the machines, wherever that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from policy import nets
from policy.evaluate import matches
from policy.importers.model import SourceRefused, Untranslated
from policy.importers.nsx.machines import Estate, Machine, part, rows, spans, words
from policy.program import AllOf, AnyOf, Everything, Exists, Named, Nets, Not, Nothing, Selector

ANY: Final = "ANY"
ANYBODY: Final = AnyOf((Everything(), Nets(("0.0.0.0/0", "::/0"))))
MAX_NESTING: Final = 16


def any_of(terms: list[Selector]) -> Selector:
    flat = list(dict.fromkeys(t for t in terms if not isinstance(t, Nothing)))
    return flat[0] if len(flat) == 1 else AnyOf(tuple(flat)) if flat else Nothing()


class Groups:
    """Resolves what rules name as source, destination or scope. Raises SourceRefused for a name that means nothing."""

    def __init__(self, config: Mapping[str, Any], estate: Estate, untranslated: list[Untranslated]) -> None:
        self.estate = estate
        self.untranslated = untranslated
        self.raw: dict[str, Mapping[str, Any]] = {}
        for domain in rows(config, "domains"):
            for group in rows(part(domain, "resources"), "groups"):
                self.raw[str(group.get("path") or group.get("display_name"))] = group
        self.named: dict[str, Selector] = {}

    def ends(self, names: list[str], where: str) -> Selector:
        """The union of names; an empty list or ANY is everybody, outside included."""
        if not names or ANY in names:
            return ANYBODY
        return any_of([self.end(n, where) for n in names])

    def end(self, name: str, where: str) -> Selector:
        if name in self.raw:
            if name not in self.named:
                self.named[name] = self.group(name, ())
            return self.named[name]
        if name in self.estate.segments:
            return Exists(f"segment:{name}")
        if name.startswith("/"):
            raise SourceRefused("group", f'no group or segment "{name}"', where=where)
        return self.addresses([name], where)

    def addresses(self, literals: list[str], where: str) -> Selector:
        """Address literals: the machines that are wholly in them, and the addresses themselves for what is outside."""
        parts = nets.merge(r for text in literals for r in spans(text, where))
        machines = self.estate.inside(parts)
        inside = Named(frozenset(m.subject.name for m in machines)) if machines else Nothing()
        return any_of([inside, Nets(tuple(nets.show(s) for s in parts))]) if parts else Nothing()

    # ---- one group

    def group(self, path: str, above: tuple[str, ...]) -> Selector:
        group, where = self.raw[path], f'group "{path}"'
        if path in above or len(above) > MAX_NESTING:
            raise SourceRefused("group", "the group contains itself", where=where)
        expression = rows(group, "expression")
        by_rule = self.expression(expression, where, (*above, path)) if expression else None
        literals = [*words(group, "ips_members")]
        outside = self.addresses(literals, where) if literals else Nothing()
        realised = any(
            group.get(k) is not None for k in ("vm_members", "vif_members", "segments_members", "ips_members")
        )
        if not realised:
            return by_rule if by_rule is not None else Nothing()
        members = any_of([self.members(group, where), outside])
        if by_rule is not None and self.same(by_rule, members):
            return by_rule
        return members

    def members(self, group: Mapping[str, Any], where: str) -> Selector:
        found: dict[str, None] = {}
        for row in rows(group, "vm_members"):
            found.update(
                dict.fromkeys(self.find(str(row.get("id") or ""), str(row.get("display_name") or ""), where))
            )
        for row in rows(group, "vif_members"):
            found.update(dict.fromkeys(self.find(str(row.get("owner_vm_id") or ""), "", where)))
        for row in rows(group, "segments_members"):
            label = f"segment:{row.get('path') or row.get('display_name')}"
            found.update(dict.fromkeys(m.subject.name for m in self.estate if label in m.subject.labels))
        return Named(frozenset(found)) if found else Nothing()

    def find(self, identity: str, name: str, where: str) -> Iterator[str]:
        """Names of the machine with this id, or of those with this display name."""
        machines = self.estate.machines
        if identity in machines:
            yield machines[identity].subject.name
            return
        same = [m.subject.name for m in self.estate if m.name == name]
        if not same:
            self.untranslated.append(
                Untranslated(where, f'member "{name or identity}" is no machine of this export')
            )
        yield from same

    def same(self, one: Selector, other: Selector) -> bool:
        """Do two selectors select the same machines, and both no address outside?"""
        plain = not any(True for s in (one, other) for _ in nets.nets_in(s))
        return plain and all(matches(one, m.subject) == matches(other, m.subject) for m in self.estate)

    # ---- expressions: terms joined by AND and OR, AND first

    def expression(self, terms: list[Mapping[str, Any]], where: str, above: tuple[str, ...]) -> Selector:
        unions: list[list[Selector]] = [[]]
        for index, term in enumerate(terms):
            if index % 2:
                if term.get("conjunction_operator") == "OR":
                    unions.append([])
                elif term.get("conjunction_operator") != "AND":
                    raise SourceRefused(
                        "expression",
                        f'terms must be joined by AND or OR, not "{term.get("conjunction_operator")}"',
                        where=where,
                    )
            else:
                unions[-1].append(self.term(term, where, above))
        return any_of([all_of(one) for one in unions if one])

    def term(self, term: Mapping[str, Any], where: str, above: tuple[str, ...]) -> Selector:
        match term.get("resource_type"):
            case "Condition":
                return self.condition(term, where)
            case "NestedExpression":
                return self.expression(rows(term, "expressions"), where, above)
            case "IPAddressExpression":
                return self.addresses(list(words(term, "ip_addresses")), where)
            case "ExternalIDExpression":
                names = [n for i in words(term, "external_ids") for n in self.find(i, "", where)]
                return Named(frozenset(names)) if names else Nothing()
            case "PathExpression":
                return any_of([self.path(p, where, above) for p in words(term, "paths")])
        self.untranslated.append(
            Untranslated(where, f"{term.get('resource_type')} cannot be translated: it selects nobody")
        )
        return Nothing()

    def path(self, path: str, where: str, above: tuple[str, ...]) -> Selector:
        if path in self.raw:
            return self.group(path, above)
        if path in self.estate.segments:
            return Exists(f"segment:{path}")
        for name, segment in self.estate.segments.items():
            if any(str(p.get("path") or p.get("unique_id")) == path for p in rows(segment, "segment_ports")):
                self.untranslated.append(
                    Untranslated(where, f'a single port of segment "{name}" cannot be selected')
                )
                return Nothing()
        return any_of([Named(frozenset({n})) for n in self.find(path.rpartition("/")[2], "", where)])

    def condition(self, term: Mapping[str, Any], where: str) -> Selector:
        key, operator, value = (str(term.get(k) or "") for k in ("key", "operator", "value"))
        if term.get("member_type") == "Segment" and key == "Tag":
            tests = [
                Exists(f"segment:{path}")
                for path, s in self.estate.segments.items()
                if any(_compare(operator, t, value) for t in _tags(s))
            ]
            return any_of(list(tests))
        if term.get("member_type") not in (None, "VirtualMachine") or key not in {
            "Tag",
            "Name",
            "OSName",
            "ComputerName",
        }:
            self.untranslated.append(
                Untranslated(
                    where,
                    f"a condition on {key} of {term.get('member_type')} cannot be translated: it selects nobody",
                )
            )
            return Nothing()
        if key == "Tag" and operator in {"EQUALS", "NOTEQUALS"}:
            tag = Exists(f"tag:{value.removeprefix('|')}")
            return tag if operator == "EQUALS" else AllOf((Everything(), Not(tag)))
        names = [
            m.subject.name for m in self.estate if any(_compare(operator, f, value) for f in _facts(m, key))
        ]
        return Named(frozenset(names)) if names else Nothing()


def all_of(terms: list[Selector]) -> Selector:
    return terms[0] if len(terms) == 1 else AllOf(tuple(terms))


def _tags(row: Mapping[str, Any]) -> Iterator[str]:
    for tag in rows(row, "tags"):
        yield str(tag.get("tag"))
        yield f"{tag.get('scope') or ''}|{tag.get('tag')}"


def _facts(machine: Machine, key: str) -> list[str]:
    if key == "Tag":
        return [k.removeprefix("tag:") for k in machine.subject.labels if k.startswith("tag:")]
    return [machine.facts[key]]


def _compare(operator: str, fact: str, value: str) -> bool:
    fact, value = fact.lower(), value.lower()
    match operator:
        case "CONTAINS":
            return value in fact
        case "STARTSWITH":
            return fact.startswith(value)
        case "ENDSWITH":
            return fact.endswith(value)
        case "NOTEQUALS":
            return fact != value
    return fact == value
