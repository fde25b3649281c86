"""Tests in the policy file: flows that must be allowed or denied, and places that must stay out of reach. Pure.

A test speaks about the subjects of the inventory. Where none matches, a made-up subject that carries exactly what the
selector asks for stands in, so that a test can be run before the first workload exists; the result says so. What must be
allowed then holds when some workload that fits the selectors would be allowed; what must be denied is denied to the
stand-in itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from policy.algebra import witness, witnesses
from policy.classes import Classes, reach
from policy.compile import compile_policy
from policy.evaluate import Decision, evaluate, matches, permitted, show_flow, strict
from policy.model import FlowTest, Policy, ReachTest, ReplayTest
from policy.ports import PORTED, TCP, UDP, PortMap, ranges
from policy.program import Action, AllOf, Program, Selector, Subject, Under, Where
from policy.replay import Recording, replay

_STAND_INS = 8  # made-up subjects for each end of a rule


@dataclass(frozen=True, slots=True)
class TestResult:
    """The outcome of one test. `stand_in`: made-up subjects took part; `covers` is the number of pairs looked at."""

    __test__ = False  # for pytest

    where: Where
    passed: bool
    message: str
    covers: int
    stand_in: bool = False


def run_tests(
    policy: Policy, program: Program, subjects: Sequence[Subject], running: Iterable[str] | None = None,
    recording: Recording | None = None,
) -> list[TestResult]:  # fmt: skip
    """Every test of the policy, in file order. `program` is the policy compiled for now; tests with `at` compile anew.

    What counts is what is enforced once every audit has ended. recording: what replay tests look at; without one they
    cover nothing and say so.
    """
    names, program = None if running is None else frozenset(running), strict(program)
    programs: dict[int | None, Classes] = {None: Classes(program, subjects)}
    out = []
    for test in policy.tests:
        if isinstance(test, ReachTest):
            out.append(_reach(test, program, subjects))
            continue
        if isinstance(test, ReplayTest):
            out.append(_replay(test, program, subjects, recording))
            continue
        if test.at not in programs:
            programs[test.at] = Classes(compile_policy(policy, test.at, names, audit=False), subjects)
        out.append(_flow(test, programs[test.at], subjects))
    return out


def _replay(
    test: ReplayTest, program: Program, subjects: Sequence[Subject], recording: Recording | None
) -> TestResult:
    title = f"replay {test.words}: at most {test.max_new_denied} newly denied"
    if recording is None:
        return TestResult(test.where, True, f"{title}: not run, there is no recording here", 0)
    found = replay(program, recording.since(test.seconds), subjects)
    if len(found.broken) <= test.max_new_denied:
        return TestResult(test.where, True, f"{title}: {len(found.broken)} of {found.flows} recorded flows", found.flows)
    return TestResult(
        test.where, False, f"{title}: {len(found.broken)} of {found.flows} recorded flows, first {found.broken[0]}", found.flows
    )


def _flow(test: FlowTest, classes: Classes, subjects: Sequence[Subject]) -> TestResult:
    sources, made_source = _who(test.src, subjects, "source", test.scope)
    targets, made_target = _who(test.dst, subjects, "destination", test.scope)
    title = f"{test.words[0]} -> {test.words[1]} on {test.words[2]}: {test.expect}"
    stand_in = made_source or made_target
    covers = len(sources) * len(targets) - len({s.name for s in sources} & {s.name for s in targets})
    if not covers:
        return TestResult(
            test.where, False, f"{title}: the test covers nothing (no such pair of subjects)", 0, stand_in
        )
    ones = _alike(classes, sources, made=made_source)
    others = _alike(classes, targets, made=made_target)
    for src, dst in itertools.product(ones, others):
        if src.name == dst.name:
            continue
        wrong = _wrong(test, classes.program, src, dst)
        if wrong and not (
            stand_in
            and test.expect == "allow"
            and _could(test, classes.program, src, dst, made_source, made_target)
        ):
            return TestResult(test.where, False, f"{title}: {wrong}", covers, stand_in)
    return TestResult(test.where, True, title, covers, stand_in)


def _alike(classes: Classes, found: Sequence[Subject], *, made: bool) -> list[Subject]:
    """Two subjects of each class stand for all of them (two, since nobody is paired with itself)."""
    if made:
        return list(found)
    by_class: dict[int, list[Subject]] = {}
    for one in found:
        kept = by_class.setdefault(classes.class_of(one.name), [])
        if len(kept) < 2:
            kept.append(one)
    return [one for kept in by_class.values() for one in kept]


def _could(
    test: FlowTest, program: Program, src: Subject, dst: Subject, made_source: bool, made_target: bool
) -> bool:
    """Would some workload that the selectors allow for pass the test, where the made-up one, which carries less, does not?"""
    for tier in program.tiers:
        for rule in tier.rules:
            if rule.action is not Action.ALLOW or not (rule.ports & test.ports):
                continue
            about = [()] if rule.concerns is None else [(rule.concerns,), ()]
            for extra in about:
                one = witness(AllOf((test.src, rule.src, *extra)), src.name) if made_source else src
                for more in about:
                    other = witness(AllOf((test.dst, rule.dst, *more)), dst.name) if made_target else dst
                    if one is not None and other is not None and _wrong(test, program, one, other) is None:
                        return True
    return False


def _wrong(test: FlowTest, program: Program, src: Subject, dst: Subject) -> str | None:
    held = permitted(program, src, dst)
    off = test.ports - held if test.expect == "allow" else test.ports & held
    pair = f"{src.name} -> {dst.name}"
    if off:
        proto, port = next(_samples(off))
        decision = evaluate(program, src, dst, proto, port)
        return f"{pair} {show_flow(proto, port)}: {decision.reason}"
    if test.by:
        for proto, port in _samples(test.ports):
            decision = evaluate(program, src, dst, proto, port)
            if test.by not in decided_by(decision):
                return f"{pair} {show_flow(proto, port)} is decided by {decided_by(decision)[0]}, not by {test.by}"
    return None


def decided_by(decision: Decision) -> tuple[str, ...]:
    """What a test may call the thing that decided: the rule's id with and without its prefix, ``default``, ``tier:NAME``."""
    if decision.rule is not None:
        return (decision.rule.id, decision.rule.id.partition(":")[2] or decision.rule.id)
    return (f"tier:{decision.tier}",) if decision.tier else ("default",)


def _samples(ports: PortMap) -> Iterator[tuple[int, int | None]]:
    """A flow of each run of ports; for "any other protocol" tcp and udp and the first number that is in the map."""
    protos = [p for p in ports.ports if ports.bits(p)]
    if ports.rest:
        protos += [p for p in (TCP, UDP, *range(256)) if p not in ports.ports and p != 58][:3]
    for proto in protos:
        if proto in PORTED:
            for first, _ in ranges(ports.bits(proto)):
                yield proto, first
        else:
            yield proto, None


def _reach(test: ReachTest, program: Program, subjects: Sequence[Subject]) -> TestResult:
    sources, made_source = _who(test.src, subjects, "source", test.scope)
    targets, made_target = _who(test.never, subjects, "destination", test.scope)
    title = f"{test.words[0]} never reaches {test.words[1]}"
    stand_in = made_source or made_target
    forbidden = {s.name for s in targets}
    everybody = {s.name: s for s in (*sources, *targets, *subjects)}
    if stand_in:
        everybody = {**_between(program, everybody), **everybody}
    classes = Classes(program, everybody.values())
    starts = [s for s in sources if s.name not in forbidden]
    for start in starts:
        for name, chain in reach(classes, start.name, test.depth).items():
            if name in forbidden:
                return TestResult(test.where, False, f"{title}: {' -> '.join(chain)}", len(starts), stand_in)
    if not starts or not targets:
        return TestResult(test.where, False, f"{title}: the test covers nothing", 0, stand_in)
    return TestResult(test.where, True, title, len(starts), stand_in)


def _between(program: Program, taken: Iterable[str]) -> dict[str, Subject]:
    """Stand-ins for both ends of every rule: what could stand on the way, where the inventory does not say."""
    out = {}
    for tier in program.tiers:
        for rule in tier.rules:
            for end, selector in (("source", rule.src), ("destination", rule.dst)):
                narrow = selector if rule.concerns is None else AllOf((selector, rule.concerns))
                name = f"(any {end} of {rule.id})"
                for number, one in enumerate(itertools.islice(witnesses(narrow, name, taken), _STAND_INS), 1):
                    title = one.name if one.name != name else f"{name} {number}"
                    out[title] = replace(one, name=title)
    return out


def _who(selector: Selector, subjects: Sequence[Subject], end: str, scope: str) -> tuple[list[Subject], bool]:
    """Those whom the selector selects, or one made up for them: inside the scope of the test's file, when that can be."""
    found = [s for s in subjects if matches(selector, s)]
    if found:
        return found, False
    taken = {s.name for s in subjects}
    name = f"{scope}/(any {end})" if scope else f"(any {end})"
    one = witness(AllOf((selector, Under(scope))), name, taken) if scope else None
    if one is not None and matches(selector, replace(one, name=name)):
        one = replace(one, name=name)  # two ends are never one workload
    one = one or witness(selector, f"(any {end})", taken)
    return ([one], True) if one is not None else ([], False)
