"""Packet filter chains flattened to one ordered list: jumps, gotos and returns resolved, for new connections.

A match is a product of source addresses, destination addresses, ports and interfaces, so that the condition of a jump and
that of a rule behind it combine to one match. What a match cannot say makes a rule `partial`: it is left out where it
would accept and taken whole where it would drop, so access only gets less, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from policy import nets
from policy.imported import ImportedPolicy
from policy.importers.model import Imported, SourceRefused, Untranslated
from policy.ports import ANYTHING, PortMap
from policy.program import Action, AllOf, In, Named, Nets, Program, Rule, Selector, Subject, Tier, Where

Hook = Literal["input", "output", "forward"]
EVERYWHERE: Final = (nets.V4_ALL, nets.V6_ALL)
HOST: Final = "host"
ROUTED: Final = "routed"  # what the host forwards to
OTHER: Final = "other"
MAX_RULES: Final = 20_000
MAX_DEPTH: Final = 32


@dataclass(frozen=True, slots=True)
class Interface:
    """Interfaces by name; `but` turns it round. A trailing ``+`` or ``*`` stands for any ending."""

    names: frozenset[str]
    but: bool = False

    def selects(self, name: str) -> bool:
        hit = any(name.startswith(n[:-1]) if n[-1:] in {"+", "*"} else n == name for n in self.names)
        return hit is not self.but


@dataclass(frozen=True, slots=True)
class Match:
    """What a rule is about. `never`: no new connection; `partial`: conditions that are not in here."""

    src: tuple[nets.Range, ...] = EVERYWHERE
    dst: tuple[nets.Range, ...] = EVERYWHERE
    ports: PortMap = ANYTHING
    came: tuple[Interface, ...] = ()
    goes: tuple[Interface, ...] = ()
    partial: tuple[str, ...] = ()
    never: bool = False

    def __and__(self, other: Match) -> Match:
        return Match(
            common(self.src, other.src), common(self.dst, other.dst), self.ports & other.ports,
            tuple(dict.fromkeys((*self.came, *other.came))), tuple(dict.fromkeys((*self.goes, *other.goes))),
            tuple(dict.fromkeys((*self.partial, *other.partial))), self.never or other.never,
        )  # fmt: skip

    def __bool__(self) -> bool:
        """Can it match a new connection at all?"""
        return bool(self.src and self.dst and self.ports) and not self.never


@dataclass(frozen=True, slots=True)
class Step:
    """One rule of a chain: accept, drop, return, or jump or goto `target`."""

    match: Match
    verdict: Literal["accept", "drop", "return", "jump", "goto"]
    target: str = ""
    where: Where | None = None
    why: str = ""


@dataclass(slots=True)
class Chain:
    """`hook` and `policy` (what happens at its end) are set for base chains."""

    name: str
    steps: list[Step] = field(default_factory=list)
    hook: Hook | None = None
    policy: Literal["accept", "drop"] = "accept"
    priority: int = 0
    span: tuple[nets.Range, ...] = EVERYWHERE


def common(one: tuple[nets.Range, ...], other: tuple[nets.Range, ...]) -> tuple[nets.Range, ...]:
    """The intersection of merged ranges."""
    return nets.merge((max(a, c), min(b, d)) for a, b in one for c, d in other if max(a, c) <= min(b, d))


def flatten(chain: Chain, chains: Mapping[str, Chain], untranslated: list[Untranslated]) -> list[Step]:
    """The accepts and drops of a base chain in order, its policy last. Raises SourceRefused for loops and unknown chains."""
    out: list[Step] = []
    end = Step(Match(chain.span, chain.span), chain.policy, why=f"policy of {chain.name}")

    def walk(
        steps: Sequence[Step], rest: Sequence[tuple[Sequence[Step], Match]], context: Match, depth: int
    ) -> None:
        """Emit `steps` under `context`; what falls off the end goes on with the chains in `rest`."""
        if depth > MAX_DEPTH:
            raise SourceRefused(
                "chain", f'the chains below "{chain.name}" form a loop or are nested too deeply'
            )
        for index, step in enumerate(steps):
            match = context & step.match
            if not match:
                continue
            if step.verdict in {"accept", "drop"}:
                emit(replace(step, match=match))
            elif step.verdict == "return":
                if match.partial:  # some of it returns, some goes on: nothing of it is sure to be accepted
                    emit(replace(step, verdict="drop", match=match))
                    continue
                go_on(rest, match, depth)
            else:
                if step.target not in chains:
                    raise SourceRefused("chain", f'there is no chain "{step.target}"', where=step.where)
                inner = chains[step.target].steps
                if (
                    match.partial
                ):  # may or may not be entered: what it drops counts, and then the rules behind it
                    for one in inside(inner, match, depth):
                        emit(one)
                elif step.verdict == "jump":
                    walk(inner, [(steps[index + 1 :], context), *rest], match, depth + 1)
                else:
                    walk(inner, rest, match, depth + 1)
                    go_on(rest, match, depth)

    def go_on(rest: Sequence[tuple[Sequence[Step], Match]], match: Match, depth: int) -> None:
        for number, (steps, context) in enumerate(rest):
            walk(steps, rest[number + 1 :], context & match, depth + 1)
        emit(Step(match, end.verdict, why=end.why))

    def emit(step: Step) -> None:
        match = step.match
        if match.partial:
            kept = "left out" if step.verdict == "accept" else "dropped as a whole"
            untranslated.append(
                Untranslated(str(step.where or chain.name), f"{', '.join(match.partial)}: {kept}")
            )
            if step.verdict == "accept":
                return
            step = replace(step, match=replace(match, partial=()))
        out.append(step)
        if len(out) > MAX_RULES:
            raise SourceRefused("chain", f'"{chain.name}" expands to more than {MAX_RULES} rules')

    def inside(steps: Sequence[Step], context: Match, depth: int) -> Iterator[Step]:
        if depth > MAX_DEPTH:
            raise SourceRefused(
                "chain", f'the chains below "{chain.name}" form a loop or are nested too deeply'
            )
        for step in steps:
            match = context & step.match
            if match and step.verdict in {"accept", "drop"}:
                yield replace(step, match=match)
            elif match and step.target in chains:
                yield from inside(chains[step.target].steps, match, depth + 1)

    walk(chain.steps, [], Match(chain.span, chain.span), 0)
    return [*out, end]


class Inventory:
    """The host, and the outside behind each interface that a rule names (``external`` alone where none is named)."""

    def __init__(self, steps: Sequence[Step], span: tuple[nets.Range, ...]) -> None:
        named = {
            n
            for s in steps
            for i in (*s.match.came, *s.match.goes)
            for n in i.names
            if n[-1:] not in {"+", "*"}
        }
        self.names = (
            [*sorted(named), OTHER] if named or any((*s.match.came, *s.match.goes) for s in steps) else []
        )
        self.span = tuple(nets.show(s) for s in span)

    def subjects(self, *, forwarding: bool) -> Iterator[Subject]:
        yield Subject(HOST)
        for kind in ("external", *([ROUTED] if forwarding else [])):
            for name in self.names or [""]:
                labels = {"kind": kind, **({"interface": name} if name else {})}
                yield Subject(f"{kind} ({name})" if name else kind, labels, nets=self.span)

    def outside(self, kind: str, spans: tuple[nets.Range, ...], interfaces: Sequence[Interface]) -> Selector:
        terms: list[Selector] = [In("kind", frozenset({kind})), Nets(tuple(nets.show(s) for s in spans))]
        if interfaces:
            hits = frozenset(n for n in self.names if all(i.selects(n) for i in interfaces))
            terms.append(In("interface", hits))
        return AllOf(tuple(terms))


def tier_of(chain: Chain, steps: Sequence[Step], inventory: Inventory) -> Tier:
    """A base chain as a tier: what it accepts goes on to the next chain, what it drops is lost."""
    rules = []
    host = Named(frozenset({HOST}))
    for number, step in enumerate(steps):
        match = step.match
        src = inventory.outside("external", match.src, match.came)
        dst = inventory.outside(ROUTED if chain.hook == "forward" else "external", match.dst, match.goes)
        ends = {"input": (src, host), "output": (host, dst), "forward": (src, dst)}[chain.hook or "input"]
        action = Action.PASS if step.verdict == "accept" else Action.DENY
        rules.append(Rule(f"{chain.name} {number + 1}", action, *ends, match.ports, step.where, step.why,
                          ("ingress",) if chain.hook != "output" else ("egress",)))  # fmt: skip
    return Tier(chain.name, tuple(rules), "first-match")


def reachable(*, forwarding: bool) -> Tier:
    """What there is to reach at all: the host and the outside of each other, and what the host forwards to."""
    host, outside = Named(frozenset({HOST})), In("kind", frozenset({"external"}))
    pairs: list[tuple[str, Selector, Selector]] = [
        ("to the host", outside, host),
        ("from the host", host, outside),
    ]
    if forwarding:
        pairs.append(("through the host", outside, In("kind", frozenset({ROUTED}))))
    return Tier("reachable", tuple(Rule(name, Action.ALLOW, src, dst) for name, src, dst in pairs))


def translate(source: str, chains: Sequence[Chain], by_name: Mapping[str, Mapping[str, Chain]], count: int,
              untranslated: list[Untranslated]) -> Imported:  # fmt: skip
    """Base chains in the order they are passed; `by_name` gives, for each, the chains of its table."""
    bases = sorted((c for c in chains if c.hook), key=lambda c: c.priority)
    flat = [(c, flatten(c, by_name[c.name], untranslated)) for c in bases]
    forwarding = any(c.hook == "forward" for c in bases)
    span = nets.merge(r for c in bases for r in c.span)
    inventory = Inventory([s for _, steps in flat for s in steps], span or EVERYWHERE)
    tiers = [tier_of(c, steps, inventory) for c, steps in flat]
    program = Program((*tiers, reachable(forwarding=forwarding)))
    subjects = tuple(inventory.subjects(forwarding=forwarding))
    return Imported(ImportedPolicy(program, source), subjects, untranslated, rules=count)
