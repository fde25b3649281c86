"""How finely a policy segments, in numbers: too many groups on one side, too wide ones on the other. Pure.

Over-segmentation costs upkeep: groups of one member, groups that are the same or have the same effective rights (nothing
that the policy says tells them apart), segments with more rules than their budget. Under-segmentation leaves room to an
intruder: what is permitted and nobody was seen using, and how many other workloads one can reach on average. Each number
has a budget; the segment's own (``budget:``) or the one here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from policy.classes import Classes
from policy.evaluate import matches, strict
from policy.flows import Edge
from policy.model import Policy, Segment
from policy.program import Program, Subject
from policy.selectors import inside

OVER: Final = 0.5  # share of groups that need not be
UNUSED: Final = 0.5  # share of permitted pairs that nobody used
RULES: Final = 200  # rules of one segment


@dataclass(frozen=True, slots=True)
class SegmentNumbers:
    """One segment. `pairs` are permitted ordered pairs of workloads with an end in it, `used` those that were seen.

    unused: 1 - used / pairs; None without a recording or without pairs
    """

    name: str
    members: int
    rules: int
    rules_budget: int
    pairs: int
    used: int
    unused: float | None
    unused_budget: float
    explicit: bool  # are the budgets the segment's own?

    @property
    def over(self) -> bool:
        """More rules than the budget."""
        return self.rules > self.rules_budget

    @property
    def under(self) -> bool:
        """More unused permission than the budget."""
        return self.unused is not None and self.unused > self.unused_budget


@dataclass(frozen=True, slots=True)
class Numbers:
    """The whole policy.

    alone, same: groups with one member; groups with the members or the effective rights of an earlier one
    over:        share of groups that are one of these, 0 to 1
    rights:      how many different effective rights there are among the workloads
    reach:       mean share of the other workloads that one may send to directly, 0 to 1
    """

    workloads: int
    groups: int
    alone: tuple[str, ...]
    same: tuple[tuple[str, str], ...]
    over: float
    rights: int
    reach: float
    segments: tuple[SegmentNumbers, ...]

    @property
    def good(self) -> bool:
        """Is every number within its budget?"""
        return self.over <= OVER and not any(s.over or s.under for s in self.segments)


def numbers(
    policy: Policy, program: Program, subjects: Sequence[Subject], flows: Iterable[Edge] | None = None
) -> Numbers:
    """Measure a policy over an inventory; `flows` are recorded ones, None where there is no recording."""
    inner = [s for s in subjects if not s.nets]
    classes = Classes(strict(program), inner)
    rights = _rights(classes)
    seen = None if flows is None else {(src, dst) for src, dst, *_ in flows}
    alone, same, kinds = [], [], list[tuple[str, frozenset[str], frozenset[int]]]()
    for group in policy.groups:
        members = frozenset(s.name for s in inner if matches(group.selector, s))
        if not members:
            continue  # still to come: L03 tells
        if len(members) == 1:
            alone.append(group.name)
        may = frozenset(rights[classes.class_of(name)] for name in members)
        twin = next((n for n, m, r in kinds if m == members or (len(r) == 1 and r == may)), None)
        if twin is not None:
            same.append((twin, group.name))
        kinds.append((group.name, members, may))
    needless = {*alone, *(name for _, name in same)}
    total = len(inner)
    reached = sum(
        sum(len(classes.members[o]) for o in classes.targets(n)) * len(members) for n, members in enumerate(classes.members) if members
    )
    return Numbers(
        total, len(kinds), tuple(alone), tuple(same), len(needless) / len(kinds) if kinds else 0.0, len(set(rights.values())),
        reached / (total * total) if total else 0.0, tuple(_segment(s, classes, inner, seen) for s in policy.segments),
    )  # fmt: skip


def _rights(classes: Classes) -> dict[int, int]:
    """Class -> a number that is equal for classes with equal rights: the same ports from and to the same classes.

    Twins may do with each other what each may do with its own; so their rows and columns are the same throughout.
    """
    living = frozenset(n for n, members in enumerate(classes.members) if members)
    known: dict[object, int] = {}
    out: dict[int, int] = {}
    for one in sorted(living):
        there = frozenset((n, held) for n in classes.targets(one) if n in living and (held := classes.between(one, n)))
        back = frozenset((n, held) for n in classes.sources(one) if n in living and (held := classes.between(n, one)))
        out[one] = known.setdefault((there, back), len(known))
    return out


def _segment(
    segment: Segment, classes: Classes, subjects: Sequence[Subject], seen: set[tuple[str, str]] | None
) -> SegmentNumbers:
    mine = {
        s.name for s in subjects
        if inside(s.name, segment.scope) and (segment.members is None or matches(segment.members, s))
    }  # fmt: skip
    inside_of, outside_of = Counter[int](), Counter[int]()
    for one in subjects:
        (inside_of if one.name in mine else outside_of)[classes.class_of(one.name)] += 1
    pairs = 0
    living = {*inside_of, *outside_of}
    for number in living:
        for other in classes.targets(number):
            every = (inside_of[number] + outside_of[number]) * (inside_of[other] + outside_of[other])
            pairs += every - outside_of[number] * outside_of[other] - (inside_of[number] if number == other else 0)
    names = {s.name for s in subjects}
    used = sum(
        src != dst and (src in mine or dst in mine) and src in names and dst in names and bool(classes.permitted(src, dst))
        for src, dst in seen or ()
    )
    budget = segment.budget
    return SegmentNumbers(
        segment.name, len(mine), len(segment.rules), budget.rules or RULES, pairs, used,
        1 - used / pairs if pairs and seen is not None else None,
        UNUSED if budget.unused_ratio is None else budget.unused_ratio,
        budget.rules is not None or budget.unused_ratio is not None,
    )  # fmt: skip
