"""A draft as a policy file: the language of policy/language.py, with the evidence in comments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from policy.document import quote
from policy.draft import Draft, DraftRule, End, Proposal, Side, count_ports
from policy.ports import PortMap
from policy.windows import show_instant

_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]*")
_NULLS: Final = frozenset({"null", "Null", "NULL"})
LISTED: Final = 10  # shared connections of a group that are listed


def draft_text(draft: Draft) -> str:
    """The text of the file; the same draft gives the same text."""
    lines = [*_head(draft), "", "meshpolicy: 1"]
    if draft.keys:
        lines.append(f"labels: {{keys: [{', '.join(draft.keys)}]}}")
    groups = {side.group: side for rule in draft.rules for side in (rule.src, rule.dst) if side.group}
    proposals = {p.id: p for p in draft.proposals if p.kind == "group"}
    if groups:
        lines.append("groups:")
    for group_id in sorted(groups):
        lines += [*(f"  # {line}" for line in _group_evidence(proposals[group_id])),
                  f"  {group_id}: {_selector(groups[group_id])}"]  # fmt: skip
    lines += ["segments:", "  - name: draft", "    allow:" if draft.rules else "    allow: []"]
    for rule in draft.rules:
        lines += [f"      # {_rule_evidence(rule)}", f"      - {_rule(rule)}"]
    return "\n".join(lines) + "\n"


def _head(draft: Draft) -> Iterator[str]:
    span = draft.span
    if not span.count:
        yield "# Drafted from no record at all: it permits nothing."
    else:
        yield f"# Drafted from {_records(span.count)}, {show_instant(span.first)} to {show_instant(span.last)}."
    yield (
        f"# Seen: {draft.observed} different flows. Permitted: {draft.permitted} "
        f"({draft.over_permission:.1%} of that was never seen)."
    )
    if draft.widened:
        yield f"# {draft.widened} different flows that were denied in the recording are permitted here."
    for reason, count in sorted(draft.left_out.items()):
        yield f"# Left out: {_records(count)} ({reason})."
    for one in draft.proposals:
        if one.kind == "group" and one.state == "proposed":
            yield f"# Proposed: {one.id}, of {len(one.ends)} kinds of workloads:"
            yield from (f"#   {line}" for line in _group_evidence(one))
        elif one.state == "rejected":
            yield f"# Rejected: {one.id}"


def _group_evidence(one: Proposal) -> Iterator[str]:
    evidence = one.evidence
    yield from (f"{_safe(end)}" for end in one.ends)
    yield f"similarity {evidence['similarity']}, {evidence['more_permitted']} more flows permitted than without the group"
    for word, key in (("all:", "shared"), ("not all:", "not_shared")):
        found = evidence[key]
        assert isinstance(found, list)
        yield from (f"{word} {_safe(text)}" for text in found[:LISTED])
        if len(found) > LISTED:
            yield f"{word} and {len(found) - LISTED} more"


def _rule_evidence(rule: DraftRule) -> str:
    seen = rule.seen
    state = "accepted; " if rule.state == "accepted" else ""
    return (
        f"{state}{_records(seen.count)}, {seen.packets} packets, {seen.bytes} bytes, {show_instant(seen.first)} to "
        f"{show_instant(seen.last)}; {rule.pairs} of {rule.all_pairs} pairs, {rule.flows} of {rule.permitted} flows seen"
    )


def _rule(rule: DraftRule) -> str:
    why = f"{_records(rule.seen.count)}, last {show_instant(rule.seen.last)}"
    return f"{{id: {rule.id}, from: {_side(rule.src)}, to: {_side(rule.dst)}, on: {_ports(rule.ports)}, why: {quote(why)}}}"


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def _safe(text: str) -> str:
    """Text of others, for a comment: one line, no control characters."""
    return ascii(text)[1:-1]


def _side(side: Side) -> str:
    return side.group or _end(side.ends[0])


def _selector(side: Side) -> str:
    """A group's members; as one set of labels where they differ in the value of one label only."""
    first = side.ends[0]
    if all(
        end.labels
        and [k for k, _ in end.labels] == [k for k, _ in first.labels]
        and (end.without, end.without_names) == (first.without, first.without_names)
        for end in side.ends
    ):
        values = {key: sorted({dict(end.labels)[key] for end in side.ends}) for key, _ in first.labels}
        if sum(len(held) > 1 for held in values.values()) == 1:
            return _map({k: v[0] if len(v) == 1 else v for k, v in values.items()}, first)
    return f"{{any: [{', '.join(_end(end) for end in side.ends)}]}}"


def _end(end: End) -> str:
    if not end.labels:
        return f"{{workload: {_word(end.members[0])}}}"
    return _map(dict(end.labels), end)


def _map(labels: dict[str, str] | dict[str, str | list[str]], end: End) -> str:
    fields = []
    for key, value in labels.items():
        words = [_word(v) for v in ([value] if isinstance(value, str) else value)]
        fields.append(f"{key}: {words[0] if isinstance(value, str) else '[' + ', '.join(words) + ']'}")
    if end.without:
        absent = [f'{{{key}: "*"}}' for key in end.without]
        fields.append(f"not: [{', '.join(absent)}]")
    elif end.without_names:
        names = [_word(name) for name in end.without_names]
        fields.append(f"not: {{workload: [{', '.join(names)}]}}")
    return "{" + ", ".join(fields) + "}"


def _word(text: str) -> str:
    return text if _PLAIN.fullmatch(text) and text not in _NULLS else quote(text)


def _ports(ports: PortMap) -> str:
    assert not ports.rest
    assert count_ports(ports)
    return f"[{', '.join(quote(word) for word in ports.words())}]"
