"""Inventory files: the subjects that offline questions are asked about.

    inventory: 1
    workloads:
      - {name: shop/web, labels: {app: shop, role: web}}
      - {name: office, nets: [10.1.0.0/16]}

`spiffe_id` is optional; `nets` makes the subject an outside one (addresses, CIDRs or ``a-b`` ranges).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from identity.errors import BadInput
from policy.document import Node, parse, quote
from policy.nets import parse_range
from policy.program import Subject

VERSION: Final = 1


def load_inventory(file: str, text: str) -> tuple[Subject, ...]:
    """The subjects of an inventory file, in file order. Raises BadPolicy with a position."""
    top = parse(file, text).mapping("the inventory", {"inventory", "workloads"}, {"inventory", "workloads"})
    if top["inventory"].text != str(VERSION):
        raise top["inventory"].bad(
            "inventory.version", f"this reads inventory version {VERSION}", hint="write inventory: 1"
        )
    seen: dict[str, Node] = {}
    out = []
    nodes = [] if top["workloads"].null else top["workloads"].sequence("workloads")
    for node in nodes:
        fields = node.mapping("a workload", {"name", "labels", "spiffe_id", "nets"}, {"name"})
        name = fields["name"].scalar("name")
        if name in seen:
            raise fields["name"].bad(
                "inventory.duplicate", f"{ascii(name)[:80]} is listed twice (first in line {seen[name].line})"
            )
        seen[name] = fields["name"]
        out.append(
            Subject(
                name=name,
                labels=_labels(fields.get("labels")),
                spiffe_id=fields["spiffe_id"].scalar("spiffe_id") if "spiffe_id" in fields else "",
                nets=_nets(fields["nets"]) if "nets" in fields else (),
            )
        )
    return tuple(out)


def _labels(node: Node | None) -> dict[str, str]:
    if node is None or node.null:
        return {}
    out = {}
    node.mapping("labels")
    for key, _, value in node.pairs():
        if value.kind != "scalar":
            raise value.bad("policy.type", f"label {ascii(key)[:60]} must be one value")
        out[key] = value.text
    return out


def _nets(node: Node) -> tuple[str, ...]:
    words = []
    for item in node.one_or_more("nets"):
        word = item.scalar("a network")
        try:
            parse_range(word)
        except BadInput as error:
            raise item.bad(error.code, error.message, hint=error.hint) from None
        words.append(word)
    return tuple(words)


def dump_inventory(subjects: Sequence[Subject]) -> str:
    """The text of an inventory file that `load_inventory` reads back to equal subjects."""
    lines = [f"inventory: {VERSION}", "workloads:" if subjects else "workloads: []"]
    for one in subjects:
        fields = [f"name: {quote(one.name)}"]
        if one.labels:
            pairs = ", ".join(f"{quote(k)}: {quote(v)}" for k, v in sorted(one.labels.items()))
            fields.append(f"labels: {{{pairs}}}")
        if one.spiffe_id:
            fields.append(f"spiffe_id: {quote(one.spiffe_id)}")
        if one.nets:
            fields.append(f"nets: [{', '.join(quote(n) for n in one.nets)}]")
        lines.append(f"  - {{{', '.join(fields)}}}")
    return "\n".join(lines) + "\n"
