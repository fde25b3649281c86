"""How a policy file says who and which ports: selectors, groups and services, resolved where they stand.

web                          the group web (own scope first, then its ancestors)
"*"                          every identity inside
{app: shop, role: [a, b]}    labels, all of them; a list means one of; "*" means the label exists
{not: S} {any: [S, S]} {all: [S, S]}
{workload: shop/api} {under: shop} {group: web}
spiffe://other.example/shop/web      an identity of another trust domain, as a source; spiffe://other.example/shop/* below it
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from identity.errors import BadInput, BadPolicy
from identity.labels import KEY, VALUE
from identity.names import workload_path
from policy import foreign
from policy.document import Node, nearest
from policy.model import Group, Service
from policy.ports import NAMES, PortMap, parse_ports, union
from policy.program import AllOf, AnyOf, Everything, Exists, In, Named, Not, Selector, Under, Where

WORDS: Final = frozenset({"not", "any", "all", "workload", "under", "group", "process"})
NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_ADDRESS: Final = re.compile(r"[0-9]+(\.[0-9]+){1,3}(/[0-9]*)?|[0-9a-fA-F]*:[0-9a-fA-F:.]*(/[0-9]*)?")
# Our limits: what a selector may grow to when its groups are written out.
MAX_TERMS: Final = 5_000
MAX_NESTING: Final = 40


def where(node: Node) -> Where:
    """The position of a node."""
    return Where(node.file, node.line, node.column)


def ancestors(scope: str) -> Iterator[str]:
    """A scope, its parent, and so on to the root (the empty scope)."""
    while scope:
        yield scope
        scope = scope.rpartition("/")[0]
    yield ""


def inside(name: str, scope: str) -> bool:
    """Is `name` the scope itself or below it?"""
    return not scope or name == scope or name.startswith(scope + "/")


def positioned(node: Node, check: Callable[[str], object], text: str) -> None:
    """Run a check of identity/ on a text, giving its refusal the position of `node`. Raises BadPolicy."""
    try:
        check(text)
    except BadInput as error:
        raise node.bad(error.code, error.message, hint=error.hint) from None


def node_text(node: Node) -> str:
    """A node in flow style on one line, as people would write it."""
    if node.kind == "scalar":
        return node.text if re.fullmatch(r"[\w./:-]+", node.text, re.ASCII) else f'"{node.text}"'
    if node.kind == "list":
        return f"[{', '.join(node_text(item) for item in node.items)}]"
    return "{" + ", ".join(f"{key}: {node_text(value)}" for key, _, value in node.pairs()) + "}"


def both(*terms: Selector | None) -> Selector:
    """All of the terms that are given; one alone stays itself. At least one must be given."""
    given = tuple(dict.fromkeys(t for t in terms if t is not None))
    kept = tuple(t for t in given if not isinstance(t, Everything)) or given
    return kept[0] if len(kept) == 1 else AllOf(kept)


def measure(selector: Selector) -> tuple[int, int]:
    """(terms, nesting) when written out."""
    inner: Iterable[Selector] = ()
    if isinstance(selector, Not):
        inner = (selector.term,)
    elif isinstance(selector, AllOf | AnyOf):
        inner = selector.terms
    sizes = [measure(term) for term in inner]
    return 1 + sum(s for s, _ in sizes), 1 + max((d for _, d in sizes), default=0)


def provably_outside(selector: Selector, scope: str) -> bool:
    """True when no subject below `scope` can match, going by names alone."""
    if isinstance(selector, Named):
        return not any(inside(name, scope) for name in selector.names)
    if isinstance(selector, Under):
        return not inside(selector.prefix, scope) and not inside(scope, selector.prefix)
    if isinstance(selector, AllOf):
        return any(provably_outside(term, scope) for term in selector.terms)
    if isinstance(selector, AnyOf):
        return all(provably_outside(term, scope) for term in selector.terms)
    return False


@dataclass(slots=True)
class Names:
    """What the files declare, by (scope, name), and what was refused for later."""

    labels: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict)
    visible: dict[str, dict[str, frozenset[str]] | None] = field(
        default_factory=dict
    )  # scope -> keys, once asked
    group_nodes: dict[tuple[str, str], tuple[Node, Node]] = field(default_factory=dict)
    service_nodes: dict[tuple[str, str], tuple[Node, Node]] = field(default_factory=dict)
    groups: dict[tuple[str, str], Group] = field(default_factory=dict)
    services: dict[tuple[str, str], Service] = field(default_factory=dict)
    open_groups: list[tuple[str, str]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    spent: int = 0  # terms of the groups named by the selector that is being read
    later: list[BadPolicy] = field(default_factory=list)

    def not_enforced(self, node: Node, what: str, hint: str) -> None:
        """Note a feature that is understood but that nothing enforces yet; load refuses it when all else is right."""
        self.later.append(
            node.bad("policy.not_enforced", f"{what} is not enforced yet, so it is not accepted", hint=hint)
        )

    # ---- who

    def selector(self, node: Node, scope: str, what: str, *, foreign_too: bool = False) -> Selector:
        """Read a selector; `foreign_too`: it may name identities of other trust domains. Raises BadPolicy."""
        outer, self.spent = self.spent, 0
        found = self._selector(node, scope, what)
        self.spent = outer
        terms, nesting = measure(found)
        if terms > MAX_TERMS or nesting > MAX_NESTING:
            raise node.bad("policy.too_complex", f"{what} has {terms} terms, nested {nesting} deep, once its groups are written out",
                           hint=f"at most {MAX_TERMS} terms and {MAX_NESTING} levels")  # fmt: skip
        if not foreign_too and (domains := foreign.trust_domains(found)):
            raise node.bad("policy.foreign", f"{what} cannot name identities of another trust domain ({min(domains)})",
                           hint="they are sources only: name them in from of a rule, a grant or a test")  # fmt: skip
        return found

    def _selector(self, node: Node, scope: str, what: str) -> Selector:
        if node.null or (node.kind != "scalar" and not node.items and not node.entries):
            raise node.bad(
                "policy.empty_selector",
                f"{what} selects nobody",
                hint='an empty selector never means everybody; write "*" for that',
            )
        if node.kind == "scalar":
            if foreign.is_foreign(node.text):
                return self._foreign(node)
            return Everything() if node.text == "*" else self.group(node, node.text, scope)
        if node.kind == "list":
            return _any(tuple(self._selector(item, scope, what) for item in node.items))
        return both(*(self._term(key, key_node, value, scope, what) for key, key_node, value in node.pairs()))

    def _term(self, key: str, key_node: Node, value: Node, scope: str, what: str) -> Selector:
        if key == "not":
            # Inside only: a negation must not reach addresses outside the mesh.
            inner = self._selector(value, scope, "not")
            if foreign.trust_domains(inner):
                raise value.bad("policy.foreign", "not: selects among our own workloads, so it cannot leave out foreign identities",
                                hint="name the foreign identities that are meant")  # fmt: skip
            return AllOf((Everything(), Not(inner)))
        if key in {"any", "all"}:
            nodes = value.sequence(key)
            if not nodes:
                raise value.bad("policy.empty_selector", f"{key}: [] in {what} selects nobody")
            terms = tuple(self._selector(item, scope, key) for item in nodes)
            return _any(terms) if key == "any" else both(*terms)
        if key == "group":
            return _any(tuple(self.group(n, n.scalar("a group"), scope) for n in value.one_or_more("group")))
        if key == "workload":
            names = value.one_or_more("workload")
            for one in names:
                positioned(one, workload_path, one.scalar("a workload"))
            return Named(frozenset(one.text for one in names))
        if key == "under":
            positioned(value, workload_path, value.scalar("under"))
            return Under(value.text)
        if key == "process":
            raise key_node.bad(
                "policy.process",
                f"a process cannot be named in {what}",
                hint="only directly in `from` of an allow rule or a grant: where the process runs is where it is checked",
            )
        return self._label(key, key_node, value, scope)

    def _foreign(self, node: Node) -> Selector:
        try:
            return foreign.selector(node.text)
        except BadInput as error:
            raise node.bad("policy.foreign", f"not a foreign identity: {ascii(node.text)[:80]}",
                           hint=error.hint or "write spiffe://other.example/shop/web, or spiffe://other.example/shop/*") from None  # fmt: skip

    def _label(self, key: str, key_node: Node, value: Node, scope: str) -> Selector:
        known = self.known_labels(scope)
        if not KEY.fullmatch(key):
            raise key_node.bad("label.key", f"not a label key: {ascii(key)[:60]}")
        if known is not None and key not in known:
            raise key_node.bad("policy.unknown_label", f"label key {ascii(key)[:60]} is not declared",
                               hint=nearest(key, known) + "; keys are declared under labels: {keys: [...]}")  # fmt: skip
        nodes = value.one_or_more(f"label {key}")
        if value.kind != "list" and value.text == "*":
            return Exists(key)
        allowed = known.get(key) if known is not None else None
        for one in nodes:
            text = one.scalar(f"a value of label {key}")
            if not VALUE.fullmatch(text):
                raise one.bad("label.value", f"not a label value for {key}: {ascii(text)[:60]}")
            if allowed and text not in allowed:
                raise one.bad(
                    "policy.unknown_value",
                    f"label {key} has no value {ascii(text)[:60]}",
                    hint=nearest(text, allowed),
                )
        return In(key, frozenset(one.text for one in nodes))

    def known_labels(self, scope: str) -> Mapping[str, frozenset[str]] | None:
        """The label keys that a scope may use (its own and its ancestors'); None when nobody declared any."""
        if scope not in self.visible:
            found = [self.labels[s] for s in ancestors(scope) if s in self.labels]
            merged = {key: values for one in reversed(found) for key, values in one.items()}
            self.visible[scope] = merged if found else None
        return self.visible[scope]

    def group(self, node: Node, name: str, scope: str) -> Selector:
        """The selector of a group. Raises BadPolicy for unknown names and cycles."""
        key = _find(name, scope, self.group_nodes)
        if key is None:
            known = {n for s, n in self.group_nodes if s in set(ancestors(scope))}
            raise node.bad("policy.unknown_group", f"there is no group {ascii(name)[:60]}",
                           hint=_hint(name, known))  # fmt: skip
        self.used.add(key[1])
        selector = self.resolve(key, node).selector
        if key not in self.sizes:
            self.sizes[key] = measure(selector)[0]
        self.spent += self.sizes[key]
        if self.spent > MAX_TERMS:  # before the product is built, not after
            raise node.bad(
                "policy.too_complex", f"more than {MAX_TERMS} terms once the groups are written out"
            )
        return selector

    def resolve(self, key: tuple[str, str], node: Node) -> Group:
        """The group of a (scope, name), resolving what it names first. Raises BadPolicy."""
        if key in self.groups:
            return self.groups[key]
        if key in self.open_groups:
            chain = " -> ".join(name for _, name in (*self.open_groups[self.open_groups.index(key) :], key))
            raise node.bad("policy.cycle", f"groups name each other in a circle: {chain}")
        if len(self.open_groups) >= MAX_NESTING:
            raise node.bad("policy.too_complex", f"groups are nested deeper than {MAX_NESTING}")
        name_node, body = self.group_nodes[key]
        self.open_groups.append(key)
        outer, self.used = self.used, set()
        selector = self.selector(body, key[0], f"group {key[1]}", foreign_too=True)
        group = Group(key[1], key[0], selector, where(name_node), tuple(sorted(self.used)))
        self.used = outer
        self.open_groups.pop()
        self.groups[key] = group
        return group

    # ---- which ports

    def ports(self, node: Node, scope: str, what: str) -> PortMap:
        """One word or a list of words: services, ``tcp/443``, ``udp``, ``icmp``, ``any``. Raises BadPolicy."""
        return union([self.port_word(one, one.scalar(what), scope) for one in node.one_or_more(what)])

    def port_word(self, node: Node, word: str, scope: str) -> PortMap:
        """A service by name, or protocol and ports. Raises BadPolicy."""
        key = _find(word, scope, self.service_nodes)
        if key is not None:
            return self.services[key].ports
        if NAME.fullmatch(word) and word not in NAMES and word != "any":
            known = {n for s, n in self.service_nodes if s in set(ancestors(scope))} | set(NAMES) | {"any"}
            raise node.bad("policy.unknown_service", f"there is no service {word}", hint=nearest(word, known))
        return read_ports(node, word)


def read_ports(node: Node, word: str) -> PortMap:
    """`policy.ports.parse_ports` with a position. Raises BadPolicy."""
    try:
        return _parse_ports(word)
    except BadInput as error:
        raise node.bad(error.code, error.message, hint=error.hint) from None


_parse_ports = functools.lru_cache(maxsize=4096)(parse_ports)


def _any(terms: tuple[Selector, ...]) -> Selector:
    distinct = tuple(dict.fromkeys(terms))
    return distinct[0] if len(distinct) == 1 else AnyOf(distinct)


def _find(name: str, scope: str, known: Mapping[tuple[str, str], object]) -> tuple[str, str] | None:
    return next(((s, name) for s in ancestors(scope) if (s, name) in known), None)


def _hint(name: str, known: set[str]) -> str:
    if _ADDRESS.fullmatch(name):
        return "addresses are no subjects inside the mesh: name a workload, or select it by labels: {app: shop}"
    return nearest(name, known) or "define it under groups:, or select by labels: {app: shop}"
