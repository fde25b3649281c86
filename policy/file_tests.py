"""The section `tests` of a policy file: what has to be allowed or denied, what may never be reached, what a replay may lose."""

from __future__ import annotations

from typing import Literal

from identity.errors import BadInput
from policy.document import Node
from policy.fields import one_of, read_instant
from policy.model import FlowTest, ReachTest, ReplayTest
from policy.selectors import Names, node_text, where
from policy.windows import parse_duration


def read_test(names: Names, scope: str, node: Node) -> FlowTest | ReachTest | ReplayTest:
    """One test of a file of this scope. Raises BadPolicy."""
    if "replay" in node.mapping("a test"):
        return _replay(node)
    if "reach" in node.mapping("a test"):
        fields = node.mapping("a reach test", {"reach", "depth", "never", "why"}, {"reach", "never"})
        depth = fields.get("depth")
        limit = None if depth is None or depth.text == "any" else depth.integer("depth", 1, 1_000_000)
        return ReachTest(
            names.selector(fields["reach"], scope, "reach"), names.selector(fields["never"], scope, "never"), limit, where(node),
            (node_text(fields["reach"]), node_text(fields["never"])), scope,
        )  # fmt: skip
    fields = node.mapping(
        "a test", {"from", "to", "on", "expect", "by", "at", "why"}, {"from", "to", "expect"}
    )
    expect: Literal["allow", "deny"] = (
        "allow" if one_of(fields["expect"], "expect", {"allow", "deny"}) == "allow" else "deny"
    )
    to = fields["to"]
    on = fields.get("on")
    if on is None:
        # The short form: to: "api:tcp/80"
        target, colon, rest = to.text.partition(":") if to.kind == "scalar" else ("", "", "")
        if not colon or not rest:
            raise node.bad(
                "policy.missing_key",
                "a test needs ports",
                hint='write to: "api:tcp/80", or add on: tcp/80',
            )
        word = rest.strip()
        to = Node("scalar", to.file, to.line, to.column, target.strip(), plain=False)
        on = Node("scalar", to.file, to.line, to.column + len(target) + 1, word)
    return FlowTest(
        names.selector(fields["from"], scope, "from", foreign_too=True), names.selector(to, scope, "to"),
        names.ports(on, scope, "on"), expect, where(node), fields["by"].scalar("by") if "by" in fields else "",
        read_instant(fields["at"]) if "at" in fields else None, (node_text(fields["from"]), node_text(to), node_text(on)),
        scope,
    )  # fmt: skip


def _replay(node: Node) -> ReplayTest:
    fields = node.mapping("a replay test", {"replay", "max_new_denied", "why"}, {"replay"})
    word = fields["replay"].scalar("replay")
    if not word.startswith("last-"):
        raise fields["replay"].bad("policy.value", f"replay cannot be {ascii(word)[:40]}", hint="write replay: last-30d")
    try:
        seconds = parse_duration(word.removeprefix("last-"))
    except BadInput as error:
        raise fields["replay"].bad(error.code, error.message, hint="write replay: last-30d") from None
    limit = fields["max_new_denied"].integer("max_new_denied", 0, 1_000_000_000) if "max_new_denied" in fields else 0
    return ReplayTest(seconds, limit, where(node), word)
