"""Label classes: subjects that a program cannot tell apart are one class, and verdicts are kept per pair of classes.

Rules are bits of one integer. A class knows the rules that select it as source, as destination, and as one of the ends
they are about; what may apply to a pair is the AND of those, and equal results share one port map. Broad rules stay one
bit: nothing grows with the number of pairs. A change of one subject costs one look at the rules that name its labels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from policy.evaluate import TierMatch, matches, permitted, ports_of
from policy.ports import PortMap
from policy.program import (
    Action,
    AllOf,
    AnyOf,
    Direction,
    Exists,
    In,
    Named,
    Nets,
    Not,
    Program,
    Rule,
    Selector,
    Subject,
    Under,
)  # fmt: skip

Key = tuple[object, ...]
_Leaf = tuple[str, str]


def bits(number: int) -> Iterator[int]:
    """Positions of the set bits, ascending."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


class _Reads:
    """What a program reads of a subject: the key of its class."""

    def __init__(self, selectors: Iterable[Selector]) -> None:
        self.labels: dict[str, set[str]] = defaultdict(set)  # key -> values that matter
        self.present: set[str] = set()
        self.names: set[str] = set()
        self.prefixes: set[str] = set()
        self.nets = False
        for selector in selectors:
            self._walk(selector)
        self._keys = sorted(set(self.labels) | self.present)

    def _walk(self, selector: Selector) -> None:
        if isinstance(selector, In):
            self.labels[selector.key] |= selector.values
        elif isinstance(selector, Exists):
            self.present.add(selector.key)
        elif isinstance(selector, Named):
            self.names |= selector.names
        elif isinstance(selector, Under):
            self.prefixes.add(selector.prefix)
        elif isinstance(selector, Nets):
            self.nets = True
        elif isinstance(selector, Not):
            self._walk(selector.term)
        elif isinstance(selector, AllOf | AnyOf):
            for term in selector.terms:
                self._walk(term)

    def key(self, subject: Subject) -> Key:
        labels = []
        for key in self._keys:
            value = subject.labels.get(key)
            if value is not None and (value in self.labels.get(key, ()) or key in self.present):
                labels.append((key, value if value in self.labels.get(key, ()) else None))
        name = subject.name if subject.foreign or subject.name in self.names else ""
        under: tuple[str, ...] = ()
        if self.prefixes:
            parts = subject.name.split("/")
            paths = ("/".join(parts[: n + 1]) for n in range(len(parts)))
            under = tuple(path for path in paths if path in self.prefixes)
        return (tuple(labels), name, under, subject.nets)


class Classes:
    """The classes of a program's subjects. Subjects come and go by `put` and `remove`."""

    def __init__(self, program: Program, subjects: Iterable[Subject] = ()) -> None:
        self.program = program
        self.rules: list[Rule] = []
        self._tier_of: list[int] = []
        self._way: dict[Direction, int] = {"egress": 0, "ingress": 0}
        for number, tier in enumerate(program.tiers):
            for rule in tier.rules:
                for way in rule.directions:
                    self._way[way] |= 1 << len(self.rules)
                self.rules.append(rule)
                self._tier_of.append(number)
        self._recorded = sum(1 << bit for bit, rule in enumerate(self.rules) if rule.audit)
        self._index()
        self._numbers: dict[Key, int] = {}
        self._example: list[Subject] = []
        self.members: list[dict[str, Subject]] = []
        self._of: dict[str, int] = {}
        self._src: list[int] = []
        self._dst: list[int] = []
        self._about: list[int] = []
        self._isolated: list[dict[Direction, int]] = []
        # bits of the audits it is a member of, of those it lies within, and of those it makes about a pair
        self._audited: list[tuple[int, int, int]] = []
        self._parts: set[int] = set()  # classes of outside subjects that the program does not cut
        self._ports: dict[tuple[int, int, int, Action], PortMap] = {}
        self._pairs: dict[tuple[int, int], PortMap] = {}
        self._selected: dict[Selector, int] = defaultdict(int)  # selector -> bits of the classes it selects
        for subject in subjects:
            self.put(subject)

    def _index(self) -> None:
        """Rules by selector, and selectors by one label that they cannot do without."""
        program = self.program
        self._as_src: dict[Selector, int] = defaultdict(int)
        self._as_dst: dict[Selector, int] = defaultdict(int)
        self._as_about: dict[Selector, int] = defaultdict(int)
        self._unbound = 0
        for bit, rule in enumerate(self.rules):
            self._as_src[rule.src] |= 1 << bit
            self._as_dst[rule.dst] |= 1 << bit
            if rule.concerns is None:
                self._unbound |= 1 << bit
            else:
                self._as_about[rule.concerns] |= 1 << bit
        selectors = list(dict.fromkeys((*self._as_src, *self._as_dst, *self._as_about)))
        isolating = [s for tier in program.tiers for s in tier.isolates.values()]
        audits = [s for a in program.audits for s in (a.members, a.within, a.concerns) if s is not None]
        self._reads = _Reads((*selectors, *isolating, *audits, program.held))
        count = Counter(leaf for s in selectors for leaves in _needs(s) for leaf in leaves)
        self._by_leaf: dict[_Leaf, list[Selector]] = defaultdict(list)
        self._always: list[Selector] = []
        for selector in selectors:
            needs = _needs(selector)
            if not needs:
                self._always.append(selector)
                continue
            for leaf in min(needs, key=lambda leaves: sum(count[leaf] for leaf in leaves)):
                self._by_leaf[leaf].append(selector)
        # A program that allows only by rule has nothing for pairs that no rule selects.
        self._only_by_rule = program.default is Action.DENY and all(
            t.otherwise is not Action.ALLOW for t in program.tiers
        )

    # ---- subjects

    def put(self, subject: Subject) -> int:
        """Add or replace a subject by name; its class."""
        number = self._class(subject)
        old = self._of.get(subject.name)
        if old is not None and old != number:
            del self.members[old][subject.name]
        self.members[number][subject.name] = subject
        self._of[subject.name] = number
        return number

    def remove(self, name: str) -> None:
        """Forget a subject; an unknown name is no error."""
        number = self._of.pop(name, None)
        if number is not None:
            del self.members[number][name]

    def part(self, subject: Subject) -> int:
        """The class of one part of an outside subject (from evaluate.split), which is not kept by name."""
        number = self._class(subject)
        self._parts.add(number)
        return number

    def class_of(self, name: str) -> int:
        """The class of a subject by name. Raises KeyError."""
        return self._of[name]

    def subject(self, name: str) -> Subject:
        """A subject by name. Raises KeyError."""
        return self.members[self._of[name]][name]

    def subjects(self) -> Iterator[Subject]:
        """All subjects."""
        for members in self.members:
            yield from members.values()

    def __len__(self) -> int:
        return len(self._example)

    def _class(self, subject: Subject) -> int:
        key = self._reads.key(subject)
        number = self._numbers.get(key)
        if number is not None:
            return number
        number = len(self._example)
        src = dst = about = 0
        for selector in self._candidates(subject):
            if matches(selector, subject):
                src |= self._as_src.get(selector, 0)
                dst |= self._as_dst.get(selector, 0)
                about |= self._as_about.get(selector, 0)
                self._selected[selector] |= 1 << number
        isolated: dict[Direction, int] = {"egress": 0, "ingress": 0}
        for bit, tier in enumerate(self.program.tiers):
            for way, selector in tier.isolates.items():
                if matches(selector, subject):
                    isolated[way] |= 1 << bit
        self._numbers[key] = number
        self._example.append(subject)
        self.members.append({})
        self._src.append(src)
        self._dst.append(dst)
        self._about.append(about | self._unbound)
        self._isolated.append(isolated)
        self._audited.append(self._audits_of(subject))
        return number

    def _audits_of(self, subject: Subject) -> tuple[int, int, int]:
        if subject.nets or subject.foreign or not self.program.audits or matches(self.program.held, subject):
            return 0, 0, 0
        members = within = about = 0
        for bit, audit in enumerate(self.program.audits):
            if audit.within is None or matches(audit.within, subject):
                within |= 1 << bit
                members |= (1 << bit) if matches(audit.members, subject) else 0
            about |= (1 << bit) if audit.concerns is None or matches(audit.concerns, subject) else 0
        return members, within, about

    def _candidates(self, subject: Subject) -> Iterator[Selector]:
        yield from self._always
        for leaf in subject.labels.items():
            yield from self._by_leaf.get(leaf, ())

    # ---- verdicts

    def between(self, one: int, other: int) -> PortMap:
        """What class `one` may send to class `other`."""
        pair = (one, other)
        known = self._pairs.get(pair)
        if known is None:
            known = self._pairs[pair] = self._between(one, other)
        return known

    def _between(self, one: int, other: int) -> PortMap:
        if any(self._example[end].nets and end not in self._parts for end in (one, other)):
            return permitted(self.program, self._example[one], self._example[other])
        found = self._decided(one, other, self.program.default)
        members, within, about = self._audited[one]
        others, around, also = self._audited[other]
        members, others = members & (about | also), others & (about | also)
        # As policy.evaluate.covered has it: one audit of both, or of one end where the two know each other.
        if members & others or (
            (members & around or others & within) and (found or self._decided(other, one, self.program.default))
        ):
            found = found | self._decided(one, other, Action.ALLOW)
        return found

    def _decided(self, one: int, other: int, default: Action) -> PortMap:
        hits = self._src[one] & self._dst[other] & (self._about[one] | self._about[other]) & ~self._recorded
        leave, enter = self._isolated[one]["egress"], self._isolated[other]["ingress"]
        key = (hits, leave, enter, default)
        if key not in self._ports:
            rules: list[list[Rule]] = [[] for _ in self.program.tiers]
            for bit in bits(hits):
                rules[self._tier_of[bit]].append(self.rules[bit])
            out = None
            for way, isolated in (("egress", leave), ("ingress", enter)):
                found = (
                    TierMatch(
                        tier, tuple(r for r in rules[n] if way in r.directions), bool(isolated >> n & 1)
                    )
                    for n, tier in enumerate(self.program.tiers)
                )
                ports = ports_of(found, default)
                out = ports if out is None else out & ports
            assert out is not None
            self._ports[key] = out
        return self._ports[key]

    def permitted(self, src: str, dst: str) -> PortMap:
        """What one subject may send to another, by name. Raises KeyError."""
        return self.between(self._of[src], self._of[dst])

    def targets(self, number: int) -> Iterator[int]:
        """Classes with members that a class may send something to."""
        for other in bits(self._reachable(self._src[number], "dst") | self._acquainted(number, "src")):
            if self.members[other] and self.between(number, other):
                yield other

    def sources(self, number: int) -> Iterator[int]:
        """Classes with members that may send something to a class."""
        for other in bits(self._reachable(self._dst[number], "src") | self._acquainted(number, "dst")):
            if self.members[other] and self.between(other, number):
                yield other

    def touched(self, number: int, rules: int, *, either: bool) -> int:
        """Bits of the classes to which one of `rules` (bits) may apply from a class, or with `either` from or to it."""
        out = 0
        for bit in bits(self._src[number] & rules):
            out |= self._selected[self.rules[bit].dst]
        for bit in bits(self._dst[number] & rules if either else 0):
            out |= self._selected[self.rules[bit].src]
        return out

    def _reachable(self, rules: int, end: str) -> int:
        """Bits of the classes at the other end of the allow rules among `rules`; all, where no rule is needed."""
        everybody = (1 << len(self._example)) - 1
        if not self._only_by_rule:
            return everybody
        out = 0
        for bit in bits(rules):
            rule = self.rules[bit]
            if rule.action is Action.ALLOW:
                out |= self._selected[rule.dst if end == "dst" else rule.src]
                if out == everybody:
                    break
        return out | self._outside()

    def _acquainted(self, number: int, end: str) -> int:
        """Bits of the classes that an audit may hold open towards a class, from whose side nothing is allowed."""
        members, within, _ = self._audited[number]
        if not within:
            return 0
        back = self._reachable(self._dst[number], "src") if end == "src" else self._reachable(self._src[number], "dst")
        return back | sum(1 << n for n, (theirs, _, _) in enumerate(self._audited) if theirs & members)

    def _outside(self) -> int:
        return sum(1 << n for n, s in enumerate(self._example) if s.nets) if self._reads.nets else 0


def _needs(selector: Selector) -> list[tuple[_Leaf, ...]]:
    """Sets of label values of which a subject must have one for the selector to match."""
    if isinstance(selector, In):
        return [tuple((selector.key, value) for value in sorted(selector.values))]
    if isinstance(selector, AllOf):
        return [needs for term in selector.terms for needs in _needs(term)]
    if isinstance(selector, AnyOf) and selector.terms:
        each = [_needs(term) for term in selector.terms]
        if all(each):
            return [tuple(dict.fromkeys(leaf for needs in each for leaf in needs[0]))]
    return []


def reach(classes: Classes, start: str, depth: int | None = None) -> dict[str, tuple[str, ...]]:
    """Everything a subject can reach by chains of permitted flows: name -> the chain of names from `start`. Raises KeyError.

    depth: the most steps of a chain; None: any number.
    """
    chains: dict[str, tuple[str, ...]] = {start: (start,)}
    open_classes: dict[int, str] = {classes.class_of(start): start}
    done: set[int] = set()
    steps = 0
    while open_classes and (depth is None or steps < depth):
        steps += 1
        reached: dict[int, str] = {}
        for number, via in open_classes.items():
            done.add(number)
            for other in classes.targets(number):
                for name in classes.members[other]:
                    if name not in chains:
                        chains[name] = (*chains[via], name)
                        if other not in done:
                            reached.setdefault(other, name)
        open_classes = {n: name for n, name in reached.items() if n not in done}
    del chains[start]
    return chains
