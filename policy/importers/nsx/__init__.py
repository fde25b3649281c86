"""NSX distributed firewall: security policies of an exported configuration (one JSON file)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from policy.imported import ImportedPolicy
from policy.importers.model import Files, Imported, SourceRefused, Untranslated
from policy.importers.nsx.groups import ANY, Groups, all_of
from policy.importers.nsx.machines import Estate, part, rows, words
from policy.importers.nsx.services import Services
from policy.ports import PortMap
from policy.program import Action, AllOf, Direction, Everything, Not, Program, Rule, Selector, Tier

CATEGORIES: Final = ("Ethernet", "Emergency", "Infrastructure", "Environment", "Application")
ACTIONS: Final = {
    "ALLOW": Action.ALLOW,
    "DROP": Action.DENY,
    "REJECT": Action.DENY,
    "JUMP_TO_APPLICATION": Action.PASS,
}
DIRECTIONS: Final[Mapping[str, tuple[Direction, ...]]] = {
    "IN": ("ingress",),
    "OUT": ("egress",),
    "IN_OUT": ("egress", "ingress"),
}


def import_nsx(files: Files) -> Imported:
    """`files` is one JSON file. Raises SourceRefused."""
    (file, text), *others = files.items()
    if others:
        raise SourceRefused("files", "one file is wanted")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceRefused("syntax", f"not valid JSON: {error}", where=file) from None
    if not isinstance(config, dict) or "domains" not in config:
        raise SourceRefused("type", 'an export with "domains" is wanted', where=file)
    return _Importer(config).run()


class _Importer:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.untranslated: list[Untranslated] = []
        self.notes: list[str] = []
        self.config = config
        self.estate = Estate(config)
        self.groups = Groups(config, self.estate, self.untranslated)
        self.services = Services(config)
        self.ids: set[str] = set()
        self.count = 0

    def run(self) -> Imported:
        tiers: dict[str, list[Rule]] = {c: [] for c in CATEGORIES}
        for domain in rows(self.config, "domains"):
            resources = part(domain, "resources")
            for policy in in_order(
                rows(resources, "security_policies"), "internal_sequence_number", "sequence_number"
            ):
                category = str(policy.get("category"))
                if category not in tiers:
                    raise SourceRefused("category", f'unknown category "{category}"', where=f'policy "{policy.get("display_name")}"',
                                        hint=", ".join(CATEGORIES))  # fmt: skip
                tiers[category] += self.policy(policy)
            for key in ("gateway_policies", "redirection_policies"):
                for policy in rows(resources, key):
                    if rows(policy, "rules"):
                        self.untranslated.append(
                            Untranslated(
                                f'{key} "{policy.get("display_name")}"',
                                "only the distributed firewall is imported",
                            )
                        )
        program = Program(
            tuple(Tier(c, tuple(r), "first-match") for c, r in tiers.items() if r), Action.ALLOW
        )
        return Imported(
            ImportedPolicy(program, "nsx", dict(self.groups.named)), self.estate.inventory(), self.untranslated,
            ids=self.estate.ids, rules=self.count, notes=self.notes,
        )  # fmt: skip

    def policy(self, policy: Mapping[str, Any]) -> Iterator[Rule]:
        name = str(policy.get("display_name") or policy.get("id") or "")
        scope = words(policy, "scope")
        for rule in in_order(rows(policy, "rules"), "sequence_number"):
            yield from self.rule(name, scope, rule)
        default = policy.get("default_rule")
        if isinstance(default, dict) and default.get("action"):
            rule = {
                "display_name": "default rule",
                "rule_id": default.get("id"),
                "action": default["action"],
                "direction": default.get("direction"),
            }
            yield from self.rule(name, scope, rule)

    def rule(self, policy: str, scope: Any, rule: Mapping[str, Any]) -> Iterator[Rule]:
        self.count += 1
        title = str(rule.get("display_name") or rule.get("rule_id") or self.count)
        where = f'policy "{policy}" rule "{title}"'
        if rule.get("disabled") is True:
            self.notes.append(f"{where} is disabled")
            return
        action = ACTIONS.get(str(rule.get("action")))
        directions = DIRECTIONS.get(str(rule.get("direction") or "IN_OUT"))
        if action is None or directions is None:
            raise SourceRefused(
                "rule",
                f'unknown action "{rule.get("action")}" or direction "{rule.get("direction")}"',
                where=where,
            )
        ports = self.traffic(rule, action, where)
        if not ports:
            return
        src = self.side(rule, "source_groups", "sources_excluded", where)
        dst = self.side(rule, "destination_groups", "destinations_excluded", where)
        applied = words(rule, "scope")
        if not applied or ANY in applied:
            applied = scope
        on = (
            Everything()
            if not applied or ANY in applied
            else AllOf((Everything(), self.groups.ends(list(applied), where)))
        )
        name = self.unique(f"{rule.get('rule_id') or self.count} {title}")
        if on == Everything() and len(directions) == 2 and not _outside(src) and not _outside(dst):
            yield Rule(name, action, src, dst, ports, why=policy)
            return
        for direction in directions:
            ends = (_narrow(src, on), dst) if direction == "egress" else (src, _narrow(dst, on))
            yield Rule(
                f"{name} ({direction})" if len(directions) > 1 else name,
                action,
                *ends,
                ports,
                why=policy,
                directions=(direction,),
            )

    def traffic(self, rule: Mapping[str, Any], action: Action, where: str) -> PortMap:
        """What the rule is about. An allow takes what is surely meant, a deny all that may be; both are reported."""
        traffic = self.services.of_rule(rule, where)
        reasons = list(traffic.why)
        exact, around = traffic.exact, traffic.around
        profiles = [p for p in words(rule, "profiles") if p != ANY]
        if profiles:
            reasons.append(f"context profiles {', '.join(profiles)}")
            exact = PortMap()
        if reasons:
            kept = "left out" if action is not Action.DENY else "denied as a whole"
            self.untranslated.append(Untranslated(where, f"{'; '.join(reasons)}: {kept}"))
        return around if action is Action.DENY else exact

    def side(self, rule: Mapping[str, Any], key: str, excluded: str, where: str) -> Selector:
        names = list(words(rule, key))
        ends = self.groups.ends(names, where)
        return (
            AllOf((self.groups.ends([], where), Not(ends)))
            if rule.get(excluded) is True and names and ANY not in names
            else ends
        )

    def unique(self, name: str) -> str:
        number, out = 1, name
        while out in self.ids:
            number += 1
            out = f"{name} #{number}"
        self.ids.add(out)
        return out


def in_order(policies: list[Mapping[str, Any]], *keys: str) -> list[Mapping[str, Any]]:
    """As listed, or by the first of the keys that all of them have as a number."""
    for key in keys:
        if policies and all(isinstance(p.get(key), int) for p in policies):
            return sorted(policies, key=lambda p: int(p[key]))
    return policies


def _outside(selector: Selector) -> bool:
    """May the selector select addresses outside?"""
    from policy.nets import nets_in

    return any(True for _ in nets_in(selector)) or isinstance(selector, AllOf | Not)


def _narrow(selector: Selector, on: Selector) -> Selector:
    """The side on which the firewall stands: a machine in the rule's scope, never an address outside."""
    terms = on.terms if isinstance(on, AllOf) else (on,)
    if isinstance(selector, Everything):
        return on
    return all_of([*terms, selector])
