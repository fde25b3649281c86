"""The policy language: YAML files in, one checked Policy out, or BadPolicy with file:line:column, a code and a hint.

Several files form one policy and their order never matters. Everything is resolved here (groups, services, scopes), so
that nothing later can fail on what a person wrote. What is part of the language but not enforced by any data plane
is checked like the rest and then refused with ``policy.not_enforced``: never silently accepted.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Literal

from identity.errors import BadPolicy
from identity.labels import KEY, VALUE
from identity.names import workload_path
from policy.document import Node, parse
from policy.fields import (
    is_id,
    one_of,
    read_alert,
    read_boolean,
    read_budget,
    read_duration,
    read_idle_timeout,
    read_instant,
    read_mode,
    read_rate,
    read_window,
)
from policy.file_tests import read_test
from policy.foreign import trust_domains
from policy.model import (
    Consent,
    FlowTest,
    Grant,
    Guardrail,
    Idle,
    Policy,
    PolicyRule,
    ReachTest,
    ReplayTest,
    Review,
    Segment,
    Service,
)
from policy.ports import ANYTHING, FLOWING, NAMES, union
from policy.processes import parse_process
from policy.program import Action, Everything, Process, Selector
from policy.selectors import (
    NAME,
    WORDS,
    Names,
    node_text,
    positioned,
    provably_outside,
    read_ports,
    where,
)

VERSION: Final = 1
MAX_FILES: Final = 1_000
TOP: Final = frozenset({
    "meshpolicy", "scope", "owners", "review", "labels", "groups", "services", "guardrails", "segments", "grants",
    "offers", "accepts", "idle", "tests",
})  # fmt: skip
RULE_KEYS: Final = frozenset({"id", "from", "to", "on", "why", "when", "mode", "max_rate", "idle_timeout"})


def digest(files: Sequence[tuple[str, str]]) -> str:
    """Hex SHA-256 over the names and texts, whatever their order."""
    out = hashlib.sha256(b"meshpolicy files\0")
    for name, text in sorted(files):
        for part in (name, text):
            raw = part.encode("utf-8", "surrogatepass")
            out.update(len(raw).to_bytes(8, "big") + raw)
    return out.hexdigest()


def load(files: Sequence[tuple[str, str]]) -> Policy:
    """Files as (name, text) -> Policy. Raises BadPolicy; then nothing of it may be used."""
    if not files:
        raise BadPolicy("policy.empty", "a policy needs at least one file")
    if len(files) > MAX_FILES:
        raise BadPolicy("policy.too_large", f"{len(files)} files; at most {MAX_FILES}")
    names = [name for name, _ in files]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadPolicy("policy.duplicate_file", "the same file is given twice", file=twice)
    with _no_collections():
        return _Loader().load(sorted(files))


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """What is read stays, so looking for garbage in it would take half of the time. Bounded by the limits on files."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Loader:
    """One load: collects the files' sections, then resolves them."""

    def __init__(self) -> None:
        self.names = Names()
        self.ids: dict[str, Node] = {}
        self.segment_names: dict[str, Node] = {}
        self.guardrails: list[Guardrail] = []
        self.segments: list[Segment] = []
        self.grants: list[Grant] = []
        self.consents: list[Consent] = []
        self.tests: list[FlowTest | ReachTest | ReplayTest] = []
        self.owners: dict[str, tuple[str, ...]] = {}
        self.reviews: list[Review] = []
        self.idle: list[Idle] = []

    def load(self, files: Sequence[tuple[str, str]]) -> Policy:
        tops = [self._top(name, text) for name, text in files]
        for scope, top in tops:
            self._declarations(scope, top)
        for key, (name_node, body) in self.names.service_nodes.items():
            # Words only: a service that names services would need an order.
            words = [
                read_ports(n, n.scalar(f"service {key[1]}")) for n in body.one_or_more(f"service {key[1]}")
            ]
            self.names.services[key] = Service(key[1], key[0], union(words), where(name_node))
        for key, (name_node, _) in self.names.group_nodes.items():
            self.names.resolve(key, name_node)
        for scope, top in tops:
            self._sections(scope, top)
        if self.names.later:
            raise min(self.names.later, key=lambda e: (e.file, e.line, e.column))
        return Policy(
            digest=digest(files),
            files=tuple(name for name, _ in files),
            owners=dict(sorted(self.owners.items())),
            label_keys=dict(sorted(self.names.labels.items())),
            groups=tuple(self.names.groups[k] for k in sorted(self.names.groups)),
            services=tuple(self.names.services[k] for k in sorted(self.names.services)),
            guardrails=tuple(sorted(self.guardrails, key=lambda g: (g.scope, g.rule.id))),
            segments=tuple(sorted(self.segments, key=lambda s: s.name)),
            grants=tuple(sorted(self.grants, key=lambda g: g.rule.id)),
            consents=tuple(sorted(self.consents, key=lambda c: (c.scope, str(c.where)))),
            tests=tuple(self.tests),
            reviews=tuple(sorted(self.reviews, key=lambda r: (r.scope, str(r.where)))),
            idle=tuple(sorted(self.idle, key=lambda i: (i.scope, str(i.where)))),
        )

    def _top(self, name: str, text: str) -> tuple[str, dict[str, Node]]:
        root = parse(name, text)
        if root.kind != "map":
            raise root.bad(
                "policy.type", "a policy file is a map of key: value", hint="begin with meshpolicy: 1"
            )
        if "meshpolicy" not in root.entries:
            raise root.bad(
                "policy.version", "the file does not say which version it is", hint="begin with meshpolicy: 1"
            )
        top = root.mapping("the policy", TOP)
        if top["meshpolicy"].text != str(VERSION):
            raise top["meshpolicy"].bad(
                "policy.version", f"this reads policy version {VERSION}", hint="write meshpolicy: 1"
            )
        scope = ""
        if "scope" in top:
            positioned(top["scope"], workload_path, top["scope"].scalar("scope"))
            scope = top["scope"].text
        return scope, {key: node for key, node in top.items() if not node.null}

    # ---- names: labels, groups, services

    def _declarations(self, scope: str, top: dict[str, Node]) -> None:
        if "labels" in top:
            self._labels(scope, top["labels"].mapping("labels", {"keys"}, {"keys"})["keys"])
        for section, table in (("groups", self.names.group_nodes), ("services", self.names.service_nodes)):
            if section not in top:
                continue
            top[section].mapping(section)
            for key, key_node, value in top[section].pairs():
                what = section[:-1]
                if not NAME.fullmatch(key):
                    raise key_node.bad("policy.name", f"not a {what} name: {ascii(key)[:60]}",
                                       hint="a lower-case letter, then letters, digits, - and _")  # fmt: skip
                if section == "services" and (key in NAMES or key == "any"):
                    raise key_node.bad("policy.name", f"{key} is a protocol already")
                if (scope, key) in table:
                    first = table[scope, key][0]
                    raise key_node.bad(
                        "policy.duplicate",
                        f"{what} {key} is defined twice (first at {first.file}:{first.line})",
                    )
                if value.null:
                    raise key_node.bad(
                        f"policy.empty_{what}",
                        f"{what} {key} is empty",
                        hint="an empty one never means all; remove it or fill it",
                    )
                table[scope, key] = (key_node, value)

    def _labels(self, scope: str, node: Node) -> None:
        found: dict[str, frozenset[str]] = {}
        if node.kind == "map":
            for key, key_node, value in node.pairs():
                self._label_key(key, key_node, found)
                nodes = value.one_or_more(f"label {key}")
                if [n.text for n in nodes] == ["*"]:
                    found[key] = frozenset()
                    continue
                for one in nodes:
                    if not VALUE.fullmatch(one.scalar(f"a value of label {key}")):
                        raise one.bad("label.value", f"not a label value for {key}: {ascii(one.text)[:60]}")
                found[key] = frozenset(one.text for one in nodes)
        else:
            for one in node.sequence("labels.keys"):
                self._label_key(one.scalar("a label key"), one, found)
        if not found:
            raise node.bad("policy.empty", "labels.keys is empty")
        for key, values in found.items():
            mine = self.names.labels.setdefault(scope, {})
            if key in mine and mine[key] != values:
                raise node.bad("policy.duplicate", f"label key {key} is declared twice, differently")
            mine[key] = values

    def _label_key(self, key: str, node: Node, found: dict[str, frozenset[str]]) -> None:
        if not KEY.fullmatch(key):
            raise node.bad("label.key", f"not a label key: {ascii(key)[:60]}")
        if key in WORDS:
            raise node.bad("label.key", f"{key} is a word of the language and cannot be a label key")
        if key in found:
            raise node.bad("policy.duplicate", f"label key {key} is declared twice")
        found[key] = frozenset()

    # ---- sections

    def _sections(self, scope: str, top: dict[str, Node]) -> None:
        if "owners" in top:
            words = [n.scalar("an owner") for n in top["owners"].one_or_more("owners")]
            self.owners[scope] = tuple(sorted({*self.owners.get(scope, ()), *words}))
        if "review" in top:
            fields = top["review"].mapping("review", {"approvals", "paths"}, {"approvals"})
            approvals = fields["approvals"].integer("approvals", 1, 20)
            paths = [one.scalar("a path") for one in (fields["paths"].sequence("paths") if "paths" in fields else ())]
            self.reviews.append(Review(scope, approvals, tuple(paths), where(top["review"])))
        if "idle" in top:
            fields = top["idle"].mapping("idle", {"keep_membership", "on_return"})
            keep = read_duration(fields["keep_membership"]) if "keep_membership" in fields else None
            back = "reattest_then_current_policy"  # the only one: nobody comes back with an old policy
            if "on_return" in fields:
                back = one_of(fields["on_return"], "on_return", {back})
            self.idle.append(Idle(scope, keep, back, where(top["idle"])))
        each: tuple[tuple[str, Callable[[str, Node], None]], ...] = (
            ("guardrails", self._guardrail), ("segments", self._segment), ("grants", self._grant),
            ("offers", self._consent("offer")), ("accepts", self._consent("accept")), ("tests", self._test),
        )  # fmt: skip
        for section, read in each:
            for node in top[section].sequence(section) if section in top else ():
                read(scope, node)

    def _guardrail(self, scope: str, node: Node) -> None:
        outer = node.mapping("a guardrail", {"deny", "pass"})
        if len(outer) != 1:
            raise node.bad(
                "policy.guardrail",
                "a guardrail is one deny or one pass",
                hint="write - deny: {id: ..., from: ..., to: ...}",
            )
        kind, body = next(iter(outer.items()))
        fields = body.mapping(f"a guardrail {kind}", RULE_KEYS, {"from", "to"})
        label = fields.get("id") or fields.get("why")
        if label is None or not is_id(label):
            raise (label or body).bad(
                "policy.missing_key",
                "a guardrail needs an id",
                hint="add id: SEC-12, or a why that is one word",
            )
        action = Action.DENY if kind == "deny" else Action.PASS
        self.guardrails.append(Guardrail(scope, self._rule(scope, body, fields, action, label, "guardrail:")))

    def _segment(self, scope: str, node: Node) -> None:
        known = {"name", "members", "mode", "budget", "allow", "deny", "alert", "sensitive", "why", "idle_timeout"}
        fields = node.mapping("a segment", known, {"name"})
        name = fields["name"].scalar("name")
        if not NAME.fullmatch(name):
            raise fields["name"].bad("policy.name", f"not a segment name: {ascii(name)[:60]}")
        if name in self.segment_names:
            first = self.segment_names[name]
            raise fields["name"].bad(
                "policy.duplicate", f"segment {name} is defined twice (first at {first.file}:{first.line})"
            )
        self.segment_names[name] = fields["name"]
        members = (
            self.names.selector(fields["members"], scope, f"members of {name}")
            if "members" in fields
            else None
        )
        mode, until = read_mode(fields["mode"]) if "mode" in fields else ("enforce", None)
        if mode == "audit" and members is None:
            raise node.bad(
                "policy.audit_members",
                f"the segment {name} audits but names no members",
                hint='add members: an audit forwards what they send and get, so it never means everybody by silence; '
                     'write members: "*" for that',
            )  # fmt: skip
        rules = []
        idle = read_idle_timeout(fields["idle_timeout"], Action.ALLOW, ANYTHING) if "idle_timeout" in fields else None
        for kind in ("allow", "deny"):
            nodes = fields[kind].sequence(kind) if kind in fields and not fields[kind].null else []
            for one in nodes:
                body = one.mapping(f"a rule of {name}", RULE_KEYS, {"id", "from", "to", "on"})
                rule = self._rule(scope, one, body, Action(kind), body["id"])
                rules.append(rule if idle is None else self._silenced(rule, idle, fields["idle_timeout"]))
        alert = read_alert(fields["alert"]) if "alert" in fields else None
        self.segments.append(
            Segment(
                name, scope, members, mode, tuple(sorted(rules, key=lambda r: r.id)), where(fields["name"]), until,
                read_budget(fields.get("budget")), "sensitive" in fields and read_boolean(fields["sensitive"]), alert,
            )
        )  # fmt: skip

    @staticmethod
    def _silenced(rule: PolicyRule, seconds: int, node: Node) -> PolicyRule:
        """A rule under the idle timeout of its segment; its own holds before that."""
        if rule.action is not Action.ALLOW or rule.idle_timeout is not None or not rule.ports & FLOWING:
            return rule
        if trust_domains(rule.src):
            raise node.bad("policy.not_enforced", f"no host sees the foreign identity of {rule.id}, so its silence ends nothing",
                           hint="write idle_timeout into the other rules of the segment")  # fmt: skip
        return replace(rule, idle_timeout=seconds)




    def _grant(self, scope: str, node: Node) -> None:
        known = (RULE_KEYS - {"when", "mode"}) | {"not_before", "not_after", "until", "approved_by"}
        fields = node.mapping("a grant", known, {"id", "from", "to", "on"})
        if "not_after" not in fields and "until" not in fields:
            raise node.bad(
                "policy.grant_end", "a grant needs an end", hint="add not_after: 2031-02-11T18:00Z"
            )
        before = read_instant(fields["not_before"]) if "not_before" in fields else None
        after = read_instant(fields["not_after"]) if "not_after" in fields else None
        if before is not None and after is not None and before >= after:
            raise fields["not_after"].bad("policy.grant_end", "not_after is not later than not_before")
        ends = None
        if "until" in fields:
            value = fields["until"].mapping("until", {"workload_ends"}, {"workload_ends"})["workload_ends"]
            ends = value.scalar("workload_ends")
            positioned(value, workload_path, ends)
        approvers: tuple[str, ...] = ()
        if "approved_by" in fields:
            nodes = fields["approved_by"].one_or_more("approved_by")
            approvers = tuple(one.scalar("an approver") for one in nodes)
        rule = self._rule(scope, node, fields, Action.ALLOW, fields["id"], "grant:")
        self.grants.append(Grant(scope, rule, before, after, ends, approvers))

    def _consent(self, kind: Literal["offer", "accept"]) -> Callable[[str, Node], None]:
        own, peer = ("from", "to") if kind == "offer" else ("to", "from")

        def read(scope: str, node: Node) -> None:
            fields = node.mapping(f"an {kind}", {"from", "to", "on", "why"}, {peer, "on"})
            if not scope:
                raise node.bad(
                    "policy.consent",
                    f"an {kind} needs a scope",
                    hint="add scope: to the file; a file of the whole mesh uses rules",
                )
            other = fields[peer].scalar(peer)
            positioned(fields[peer], workload_path, other)
            if not provably_outside_path(other, scope):
                raise fields[peer].bad(
                    "policy.consent",
                    f"{other} is not outside the scope {scope}",
                    hint="inside one scope, write a rule",
                )
            mine: Selector | None = self.names.selector(fields[own], scope, own) if own in fields else None
            self._inside(scope, fields.get(own), mine)
            ports = self.names.ports(fields["on"], scope, "on")
            self.consents.append(Consent(kind, scope, mine or Everything(), other, ports, where(node)))

        return read

    def _rule(
        self, scope: str, node: Node, fields: dict[str, Node], action: Action, name: Node, prefix: str = ""
    ) -> PolicyRule:
        rule_id = name.scalar("id")
        if not is_id(name):
            raise name.bad(
                "policy.name",
                f"not a rule id: {ascii(rule_id)[:60]}",
                hint="letters, digits, . _ and -, for example web-to-api",
            )
        if rule_id in self.ids:
            first = self.ids[rule_id]
            raise name.bad(
                "policy.duplicate", f"the id {rule_id} is used twice (first at {first.file}:{first.line})"
            )
        self.ids[rule_id] = name
        from_node, processes = self._processes(fields["from"], action)
        src = self.names.selector(from_node, scope, "from", foreign_too=True)
        dst = self.names.selector(fields["to"], scope, "to")
        foreign = bool(trust_domains(src))
        if foreign and (processes or fields.keys() & {"max_rate", "idle_timeout"}):
            raise node.bad("policy.not_enforced", "no host sees a foreign identity, so its processes, rate and silence are not held to anything",
                           hint="write the ceiling into the rule of the workload that stands in for it at the gateway")  # fmt: skip
        if action is Action.ALLOW:
            if not foreign:
                self._inside(scope, fields["from"], src)
            self._inside(scope, fields["to"], dst)
        elif scope and provably_outside(src, scope) and provably_outside(dst, scope):
            raise fields["to"].bad(
                "policy.outside_scope", f"neither end of {rule_id} is inside the scope {scope}"
            )
        if "on" not in fields and action is not Action.DENY:
            raise node.bad(
                "policy.missing_key", "this needs the key on", hint="write on: tcp/443, a service, or on: any"
            )
        ports = self.names.ports(fields["on"], scope, "on") if "on" in fields else ANYTHING
        why = fields["why"].scalar("why") if "why" in fields else ""
        mode, until = read_mode(fields["mode"]) if "mode" in fields else ("enforce", None)
        rate = None
        if "max_rate" in fields:
            rate = read_rate(fields["max_rate"])
            if action is not Action.ALLOW:
                raise fields["max_rate"].bad("policy.rate", f"a {action} has no rate", hint="a ceiling belongs to an allow")
        idle = read_idle_timeout(fields["idle_timeout"], action, ports) if "idle_timeout" in fields else None
        window = read_window(fields["when"]) if "when" in fields else None
        words = (
            node_text(fields["from"]),
            node_text(fields["to"]),
            node_text(fields["on"]) if "on" in fields else "any",
        )
        return PolicyRule(
            prefix + rule_id, action, src, dst, ports, where(node), why[:400], window, mode, words, until, rate, processes, idle
        )

    def _processes(self, node: Node, action: Action) -> tuple[Node, tuple[Process, ...]]:
        """`from` without its process constraint, and the constraint."""
        if node.kind != "map" or "process" not in node.entries:
            return node, ()
        key_node, value = node.entries["process"]
        if action is not Action.ALLOW:
            raise key_node.bad("policy.process", f"a {action} cannot depend on the process",
                               hint="a process can be left out by allowing only the others")  # fmt: skip
        rest = {key: pair for key, pair in node.entries.items() if key != "process"}
        if not rest:
            raise node.bad("policy.empty_selector", "from names a process but no workload", hint="add a group or labels")
        found = tuple(sorted({parse_process(one) for one in value.one_or_more("process")}))
        return replace(node, entries=rest), found

    def _inside(self, scope: str, node: Node | None, selector: Selector | None) -> None:
        if node is not None and selector is not None and scope and provably_outside(selector, scope):
            raise node.bad("policy.outside_scope", f"this lies outside the scope {scope}",
                           hint="a flow between scopes needs offers: on one side and accepts: on the other")  # fmt: skip


    def _test(self, scope: str, node: Node) -> None:
        self.tests.append(read_test(self.names, scope, node))


def provably_outside_path(path: str, scope: str) -> bool:
    """Neither below the scope nor above it."""
    return not (path == scope or path.startswith(scope + "/") or scope.startswith(path + "/"))














