from __future__ import annotations

import json
import re

from policy.document import Node, parse
from policy.schema import schema

SAMPLE = """\
meshpolicy: 1
scope: a/b
labels: {keys: [app]}
groups: {web: {app: web}}
services: {pg: tcp/5432, api: [tcp/1, tcp/2]}
guardrails: [{deny: {id: x, from: web, to: "*"}}, {pass: {id: y, from: web, to: [web], on: any}}]
segments: [{name: s, members: web, mode: draft, allow: [{id: r, from: web, to: web, on: pg, when: {cron: "0 1 * * *", for: 2h}}]}]
grants: [{id: g, from: web, to: web, on: pg, not_after: 2031-01-01}]
tests: [{from: web, to: "web:pg", expect: deny}, {reach: web, depth: any, never: web}]
"""


def _fits(node: Node, rule: dict, root: dict) -> bool:
    """A validator of the part of JSON Schema that the schema uses."""
    if "$ref" in rule:
        return _fits(node, root["$defs"][rule["$ref"].rpartition("/")[2]], root)
    for word, count in (("anyOf", any), ("oneOf", lambda found: sum(found) == 1)):
        if word in rule:
            return count([_fits(node, one, root) for one in rule[word]])
    if "enum" in rule:
        return node.text in rule["enum"]
    if "const" in rule:
        return node.text == str(rule["const"])
    kind = {"object": "map", "array": "list"}.get(rule.get("type", ""), "scalar")
    if node.kind != kind:
        return False
    if kind == "list":
        return len(node.items) >= rule.get("minItems", 0) and all(_fits(n, rule["items"], root) for n in node.items)
    if kind == "scalar":
        return re.search(rule.get("pattern", ""), node.text) is not None and (rule["type"] != "integer" or node.text.isdigit())
    more = rule.get("additionalProperties", True)
    for key, _, value in node.pairs():
        names = rule.get("propertyNames", {}).get("pattern", "")
        if not re.search(names, key):
            return False
        if key in rule.get("properties", {}):
            if not _fits(value, rule["properties"][key], root):
                return False
        elif more is False or (isinstance(more, dict) and not _fits(value, more, root)):
            return False
    return all(key in node.entries for key in rule.get("required", ()))


def test_the_schema_accepts_a_policy_and_refuses_misspelt_keys():
    root = schema()
    assert json.loads(json.dumps(root)) == root
    assert _fits(parse("p", SAMPLE), root, root)
    for good, bad in (("segments:", "segment:"), ("expect: deny", "expect: no"), ("meshpolicy: 1", "meshpolicy: 2"), ("for: 2h", "for: 2"), ("web: {app", "Web: {app")):
        assert not _fits(parse("p", SAMPLE.replace(good, bad)), root, root), bad
