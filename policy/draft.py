"""From recorded flows to a draft: the least policy that permits what was seen, and groups that it could be told with.

Workloads with equal labels are one end; each pair of ends that was seen talking gets one rule with the ports that were
seen. So everything seen is permitted, and nothing that no workload of those labels was seen doing; how much more than
the flows themselves that is, stands in numbers. Ends with similar connections are proposed as groups. Each rule and each
group has an id of its own that depends on what it says only, so that decisions hold over reruns: a rejected rule is left
out, an accepted group takes the place of its members.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from identity.errors import BadInput, NotFound
from identity.labels import KEY, VALUE
from identity.names import workload_path
from policy.document import nearest
from policy.flows import Edge, FlowRecord, Seen, edges
from policy.ports import PortMap, single, union
from policy.program import Subject
from policy.selectors import WORDS

NOBODY: Final = "nobody"  # a name for `not` where what is kept away has none that can be written
SIMILAR: Final = 0.6  # the least similarity of any two members of a proposed group
State = Literal["proposed", "accepted", "rejected"]
Feature = tuple[str, str, int, int | None]  # "to" or "from", the other end's key, protocol, port


@dataclass(frozen=True, slots=True)
class End:
    """Workloads with equal labels, or one workload by name. `without`: labels that others have on top of these."""

    members: tuple[str, ...]
    labels: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()
    without_names: tuple[str, ...] = ()  # outside subjects that would be selected too

    @property
    def key(self) -> str:
        """What the end is, whoever is in it."""
        return ",".join(f"{k}={v}" for k, v in self.labels) or f"workload {self.members[0]}"

    @property
    def words(self) -> str:
        """A short name for ids: label values, or the workload."""
        return _slug("-".join(v for _, v in self.labels) or self.members[0])


@dataclass(frozen=True, slots=True)
class Proposal:
    """A rule or a group that was drafted.

    id:       stable: it depends on what is proposed, not on what was decided about others
    ends:     a rule's source and destination; a group's members
    evidence: JSON-ready
    """

    id: str
    kind: Literal["rule", "group"]
    state: State
    ends: tuple[str, ...]
    evidence: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class DraftRule:
    """One allow rule between two sides; a side is an end or an accepted group."""

    id: str
    src: Side
    dst: Side
    ports: PortMap
    seen: Seen
    pairs: int  # (workload, workload) pairs that were seen
    flows: int  # distinct (workload, workload, protocol, port)
    state: State

    @property
    def permitted(self) -> int:
        """Distinct (workload, workload, protocol, port) that the rule permits."""
        return self.all_pairs * count_ports(self.ports)

    @property
    def all_pairs(self) -> int:
        """Pairs of different workloads that the rule permits."""
        src, dst = self.src.members, self.dst.members
        return len(src) * len(dst) - len(src & dst)


@dataclass(frozen=True, slots=True)
class Side:
    """One end, or the ends of an accepted group (then `group` is its id and name)."""

    ends: tuple[End, ...]
    group: str = ""

    @property
    def members(self) -> frozenset[str]:
        return frozenset(name for end in self.ends for name in end.members)

    @property
    def key(self) -> str:
        return " | ".join(end.key for end in self.ends)


@dataclass(frozen=True, slots=True)
class Draft:
    """The result. `left_out` counts the records that no rule was drafted for, by reason.

    observed:  distinct flows that the rules stand for; permitted: distinct flows that the rules permit
    widened:   distinct flows that the recording denied and the draft permits
    """

    rules: tuple[DraftRule, ...]
    proposals: tuple[Proposal, ...]
    keys: tuple[str, ...]
    span: Seen
    observed: int
    permitted: int
    widened: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()

    @property
    def over_permission(self) -> float:
        """The share of what is permitted that was never seen, 0 to 1."""
        return 1 - self.observed / self.permitted if self.permitted else 0.0


def draft(
    records: Iterable[FlowRecord], subjects: Sequence[Subject], *, by: Sequence[str] = (), similarity: float = SIMILAR,
    accept: Collection[str] = (), reject: Collection[str] = (), decided: Mapping[str, State] | None = None,
) -> Draft:  # fmt: skip
    """The least policy for the allowed flows of a recording, over an inventory.

    by:             the label keys to tell workloads apart by (none given: all that can be written)
    accept, reject: ids of proposals; decided: earlier decisions, of which those that fit nothing any more are `stale`
    Raises BadInput (an id both ways, an unknown label key, a similarity out of range), NotFound (an unknown id).
    """
    if not 0 < similarity <= 1:
        raise BadInput("draft.similarity", f"a similarity is above 0 and at most 1, not {similarity}")
    if both_ways := sorted(set(accept) & set(reject)):
        raise BadInput("draft.both", f"{both_ways[0]} is accepted and rejected at once")
    states: dict[str, State] = {
        **(decided or {}),
        **dict.fromkeys(accept, "accepted"),
        **dict.fromkeys(reject, "rejected"),
    }
    keys = _keys(subjects, by)
    ends = {name: end for end in _ends(subjects, keys) for name in end.members}
    found = _Recording(records, ends)
    groups = list(_groups(found, similarity, states))
    sides = {end: Side((end,)) for end in ends.values()}
    for group, members in groups:
        if group.state == "accepted":
            sides |= dict.fromkeys(members, Side(members, group.id))
    rules = list(_rules(found.allowed, found.ends, sides, states))
    kept = [rule for rule in rules if rule.state != "rejected"]
    proposals = (*(_proposal(r) for r in rules), *(g for g, _ in groups))
    known = {p.id for p in proposals} | _plain_ids(found)
    for one in (*accept, *reject):
        if one not in known:
            raise NotFound(
                "draft.unknown", f"there is no proposal {ascii(one)[:80]}", hint=nearest(one, known)
            )
    return Draft(
        tuple(kept), proposals, keys, found.span,
        observed=sum(r.flows for r in kept),
        permitted=sum(r.permitted for r in kept),
        widened=sum(_permits(kept, ends, edge) for edge in found.denied),
        left_out=found.left_out,
        strangers=tuple(sorted(found.strangers)),
        stale=tuple(sorted(set(states) - known)),
    )  # fmt: skip


def count_ports(ports: PortMap) -> int:
    """How many (protocol, port) a map of named protocols holds; a protocol without ports counts once."""
    return sum(bits.bit_count() for bits in ports.ports.values())


# ---- ends


def _keys(subjects: Sequence[Subject], by: Sequence[str]) -> tuple[str, ...]:
    carried = {key for s in subjects for key in s.labels}
    for key in by:
        if key not in carried:
            raise BadInput(
                "draft.label", f"no workload carries the label {ascii(key)[:60]}", hint=nearest(key, carried)
            )
    writable = {key for key in carried if KEY.fullmatch(key) and key not in WORDS}
    for key in by:
        if key not in writable:
            raise BadInput("draft.label", f"a policy cannot name the label {ascii(key)[:60]}")
    return tuple(sorted(set(by) or writable))


def _ends(subjects: Sequence[Subject], keys: Sequence[str]) -> list[End]:
    """A partition of the subjects that can be written. Outside subjects and those without labels go by name."""
    held = {one.name: tuple((k, one.labels[k]) for k in keys if k in one.labels) for one in subjects}
    carried: dict[tuple[tuple[tuple[str, str], ...], bool], list[str]] = {}
    by_labels: dict[tuple[tuple[str, str], ...], list[str]] = {}
    alone = []
    for one in subjects:
        carried.setdefault((held[one.name], bool(one.nets)), []).append(one.name)
        if held[one.name] and not one.nets and all(VALUE.fullmatch(v) for _, v in held[one.name]):
            by_labels.setdefault(held[one.name], []).append(one.name)
        elif _nameable(one.name):
            alone.append(End((one.name,)))
    sets = [(dict(labels), labels, outside, names) for (labels, outside), names in carried.items()]
    out = []
    for labels, members in by_labels.items():
        alike = [row for row in sets if all(row[0].get(k) == v for k, v in labels)]
        more = {k for _, theirs, outside, _ in alike if not outside for k, _ in theirs} - {
            k for k, _ in labels
        }
        strange = {
            name if _nameable(name) else NOBODY for *_, outside, names in alike if outside for name in names
        }
        # What follows `not` is about the inside only, so one such term keeps every outside subject away.
        out.append(
            End(tuple(sorted(members)), labels, tuple(sorted(more)), () if more else tuple(sorted(strange)))
        )
    return sorted((*out, *alone), key=lambda e: e.key)


def _nameable(name: str) -> bool:
    try:
        workload_path(name)
    except BadInput:
        return False
    return True


# ---- what was seen


class _Recording:
    """The allowed flows between ends, and what was left out of them."""

    def __init__(self, records: Iterable[FlowRecord], ends: Mapping[str, End]) -> None:
        self.span = Seen()
        self.left_out: dict[str, int] = {}
        self.strangers: set[str] = set()
        allowed, refused = [], []
        for one in records:
            self.span.add(one)
            missing = [name for name in (one.src, one.dst) if name not in ends]
            self.strangers.update(missing)
            if (
                reason := "an end is not in the inventory"
                if missing
                else "to itself"
                if one.src == one.dst
                else ""
            ):
                self.left_out[reason] = self.left_out.get(reason, 0) + 1
            elif one.verdict == "deny":
                self.left_out["denied"] = self.left_out.get("denied", 0) + 1
                refused.append(one)
            else:
                allowed.append(one)
        self.ends = ends
        self.allowed = edges(allowed)
        self.denied = [edge for edge in edges(refused) if edge not in self.allowed]

    def features(self) -> dict[End, set[Feature]]:
        """What each end was seen doing, with the other end as a whole."""
        out: dict[End, set[Feature]] = {}
        for src, dst, proto, port in self.allowed:
            one, other = self.ends[src], self.ends[dst]
            out.setdefault(one, set()).add(("to", other.key, proto, port))
            out.setdefault(other, set()).add(("from", one.key, proto, port))
        return out


def _permits(rules: Iterable[DraftRule], ends: Mapping[str, End], edge: Edge) -> bool:
    src, dst, proto, port = edge
    return any(
        ends[src] in r.src.ends and ends[dst] in r.dst.ends and r.ports.allows(proto, port) for r in rules
    )


def _rules(
    edges_seen: Mapping[Edge, Seen], ends: Mapping[str, End], sides: Mapping[End, Side], states: Mapping[str, State]
) -> Iterator[DraftRule]:  # fmt: skip
    """One rule a pair of sides. A group does not bring back a rule that was rejected: that pair stays as its members."""
    by_ends: dict[tuple[End, End], list[tuple[Edge, Seen]]] = {}
    for edge, seen in edges_seen.items():
        by_ends.setdefault((ends[edge[0]], ends[edge[1]]), []).append((edge, seen))
    plain = {(one, other): (Side((one,)), Side((other,))) for one, other in by_ends}
    apart = {
        (sides[one], sides[other])
        for (one, other), alone in plain.items()
        if states.get(_rule_id(*alone)) == "rejected"
    }
    by_sides: dict[tuple[Side, Side], list[tuple[Edge, Seen]]] = {}
    for (one, other), rows in by_ends.items():
        ways = (sides[one], sides[other])
        by_sides.setdefault(plain[one, other] if ways in apart else ways, []).extend(rows)
    for (src, dst), rows in sorted(by_sides.items(), key=lambda item: (item[0][0].key, item[0][1].key)):
        total = Seen()
        for _, seen in rows:
            total.merge(seen)
        ports = union(single(proto, port) for proto, port in {edge[2:] for edge, _ in rows})
        rule_id = _rule_id(src, dst)
        pairs = len({edge[:2] for edge, _ in rows})
        yield DraftRule(rule_id, src, dst, ports, total, pairs, len(rows), states.get(rule_id, "proposed"))


def _rule_id(src: Side, dst: Side) -> str:
    names = [side.group or side.ends[0].words for side in (src, dst)]
    return f"{names[0][:40]}-to-{names[1][:40]}-{_digest(src.key, dst.key)}"


def _plain_ids(found: _Recording) -> set[str]:
    """Ids of the rules as they are without any group: a decision about one stays known when a group takes it in."""
    pairs = {(found.ends[src], found.ends[dst]) for src, dst, _, _ in found.allowed}
    return {_rule_id(Side((one,)), Side((other,))) for one, other in pairs}


def _proposal(rule: DraftRule) -> Proposal:
    evidence: dict[str, object] = {
        "ports": str(rule.ports), "count": rule.seen.count, "packets": rule.seen.packets, "bytes": rule.seen.bytes,
        "first_seen": rule.seen.first, "last_seen": rule.seen.last, "pairs_seen": rule.pairs, "pairs": rule.all_pairs,
        "observed": rule.flows, "permitted": rule.permitted,
    }  # fmt: skip
    return Proposal(rule.id, "rule", rule.state, (rule.src.key, rule.dst.key), evidence)


# ---- groups


def _groups(
    found: _Recording, similarity: float, states: Mapping[str, State]
) -> Iterator[tuple[Proposal, tuple[End, ...]]]:
    """Ends with similar connections: every two members of a group are at least so similar (complete linkage)."""
    does = {end: what for end, what in found.features().items() if end.labels}
    ends = sorted(does, key=lambda e: e.key)
    alike: dict[tuple[End, End], float] = {}
    for index, one in enumerate(ends):
        for other in ends[:index]:
            if (score := jaccard(does[one], does[other])) >= similarity:
                alike[other, one] = score
    home: dict[End, tuple[End, ...]] = {end: (end,) for end in ends}
    for one, other in sorted(alike, key=lambda pair: (-alike[pair], pair[0].key, pair[1].key)):
        first, second = home[one], home[other]
        if first is not second and all((a, b) in alike or (b, a) in alike for a in first for b in second):
            merged = tuple(sorted((*first, *second), key=lambda e: e.key))
            home |= dict.fromkeys(merged, merged)
    for members in sorted({m for m in home.values() if len(m) > 1}, key=lambda m: m[0].key):
        group_id = f"group-{_digest(*(end.key for end in members))}"
        inner = [alike.get((a, b), 0.0) for i, b in enumerate(members) for a in members[:i]]
        shared = set.intersection(*(does[end] for end in members))
        every = set.union(*(does[end] for end in members))
        evidence = {
            "similarity": round(min(inner), 3),
            "shared": [_feature(f) for f in sorted(shared, key=_feature)],
            "not_shared": [_feature(f) for f in sorted(every - shared, key=_feature)],
            "workloads": sum(len(end.members) for end in members),
            "more_permitted": _cost(found, members),
        }
        state = states.get(group_id, "proposed")
        yield Proposal(group_id, "group", state, tuple(end.key for end in members), evidence), members


def jaccard(one: Collection[object], other: Collection[object]) -> float:
    """The share of what two sets have together that both have, 0 to 1; two empty sets have nothing in common."""
    together = set(one) | set(other)
    return len(set(one) & set(other)) / len(together) if together else 0.0


def _cost(found: _Recording, members: tuple[End, ...]) -> int:
    """How many more distinct flows the rules permit when this group alone is accepted."""
    inside = set(members)
    touched = {e: s for e, s in found.allowed.items() if inside & {found.ends[e[0]], found.ends[e[1]]}}
    plain = {end: Side((end,)) for end in found.ends.values()}
    group = Side(members, "group")
    grouped = {**plain, **dict.fromkeys(members, group)}
    before, after = (sum(r.permitted for r in _rules(touched, found.ends, s, {})) for s in (plain, grouped))
    return after - before


def _feature(one: Feature) -> str:
    way, other, proto, port = one
    return f"{way} {other} on {single(proto, port)}"


def _digest(*parts: str) -> str:
    """Six hex digits of what is said, whatever else there is."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:6]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "x"
