"""The report of an import: what was carried over, what was not, and what the result shows at first sight."""

from __future__ import annotations

from typing import Any

from policy.evaluate import matches
from policy.importers.model import Imported
from policy.ports import PortMap, union
from policy.program import BOTH, Action, Nothing, Rule, Tier


def report(imported: Imported) -> dict[str, Any]:
    """JSON-ready: untranslated, tests, ids, and counts of rules with the shadowed and inactive ones by id."""
    tiers = imported.policy.program.tiers
    rules = [rule for tier in tiers for rule in tier.rules]
    return {
        "source": imported.policy.source,
        "rules": {
            "in": imported.rules,
            "out": len(rules),
            "shadowed": [row for tier in tiers for row in shadowed(tier)],
            "inactive": [rule.id for rule in rules if inactive(rule, imported)],
        },
        "subjects": len(imported.inventory),
        "untranslated": [{"where": u.where, "why": u.why} for u in imported.untranslated],
        "tests": imported.tests,
        "ids": imported.ids,
        "notes": imported.notes,
    }


def inactive(rule: Rule, imported: Imported) -> bool:
    """Does a rule select nobody of the inventory on one of its sides?"""
    return not all(any(matches(side, s) for s in imported.inventory) for side in (rule.src, rule.dst))


def shadowed(tier: Tier) -> list[dict[str, str]]:
    """Rules of a tier whose every flow an earlier rule (or, where order does not count, an equal one) decides."""
    out = []
    for index, rule in enumerate(tier.rules):
        before = [r for r in tier.rules[:index] if covers(r, rule, ordered=tier.order == "first-match")]
        if before and not rule.ports - union(r.ports for r in before):
            out.append({"rule": rule.id, "by": ", ".join(r.id for r in before)})
    return out


def covers(one: Rule, other: Rule, *, ordered: bool) -> bool:
    """Does `one` select (ports aside) at least what `other` selects? Only what is plain to see counts."""
    if not ordered and one.action is not other.action and one.action is not Action.DENY:
        return False
    if one.concerns is not None and one.concerns != other.concerns:
        return False
    if isinstance(other.src, Nothing) or isinstance(other.dst, Nothing):
        return False
    ends = all(a == b for a, b in ((one.src, other.src), (one.dst, other.dst)))
    ways = all(d in one.directions for d in BOTH if d in other.directions)
    return ends and ways and bool(_common(one.ports, other.ports))


def _common(one: PortMap, other: PortMap) -> PortMap:
    return one & other
