"""The evaluator against packets through the real firewall: random policies, random flows, no difference.

RETINUE_FLOWS says how many flows (default 10 000; `make differential` runs 100 000); RETINUE_SEED which policies.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from mesh.plan import EXPAND_RANGE, Plan, elements_of
from mesh.snapshot import InstanceKey
from policy.ports import PORTED, SCTP, TCP, UDP, PortMap, single, whole
from tests.netns.flow_differential import OPEN, TRIES, Differential, FlowRig, Score, coverage
from tests.netns.flow_packets import Probe
from tests.netns.flow_policies import NAMES

pytestmark = pytest.mark.netns

FLOWS = int(os.environ.get("RETINUE_FLOWS", "10000"))
SEED = os.environ.get("RETINUE_SEED", "retinue")
A_ROUND = 2000  # flows under one policy, at most
REFUSALS = ("denied", "invalid")
ELSEWHERE = ("strangers", "spoofed", "outside")


@pytest.fixture(scope="module")
def differential(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Differential]:
    with FlowRig(tmp_path_factory.mktemp("flows")) as rig:
        yield Differential(rig, SEED)


@pytest.fixture
def diff(differential: Differential) -> Differential:
    """The same hosts, a new score."""
    differential.score, differential.tries = Score(), TRIES
    return differential


@pytest.mark.timeout(120 + FLOWS // 100)
def test_packets_do_what_the_evaluator_says(diff: Differential) -> None:
    """Every second round one host allows everything, in turn, so that the other end has to refuse alone."""
    passed: Sequence[Probe] = ()
    number = 0
    while diff.score.flows < FLOWS or number < 8:
        lenient = (None, "a", None, "b")[number % 4]
        diff.publish(number, open_host=lenient)
        before, refused = diff.refusals(), diff.score.refused
        diff.again(passed)
        passed = diff.flows(min(A_ROUND, max(FLOWS // 8, 400)))
        diff.settle()
        assert diff.score.differences == [], "\n".join(map(str, diff.score.differences[:20]))
        if lenient is None:  # each packet that did not arrive was refused by a rule: none was lost
            counted = {name: diff.refusals()[name] - before[name] for name in (*REFUSALS, *ELSEWHERE)}
            assert sum(counted[name] for name in REFUSALS) == diff.score.refused - refused, counted
            assert not any(counted[name] for name in ELSEWHERE), counted
        number += 1
    assert coverage(diff.score) == []
    outcomes = Counter[bool]()
    for case, packets in diff.score.seen.items():
        outcomes[case[-1]] += packets
    print(f"{diff.score.flows} flows, {diff.score.packets} packets ({outcomes[True]} to pass, {outcomes[False]} to be refused), "
          f"{number} policies, {diff.score.repeats} repeated, {len(diff.score.differences)} differences")  # fmt: skip


def test_no_policy_permits_port_zero(diff: Differential) -> None:
    diff.put(dict.fromkeys(diff.rig.hosts, OPEN), {name: {} for name in NAMES}, "any to any")
    probes = [
        diff.fresh(src, dst, family, proto, port)
        for src, dst in (("shop/web", "shop/api"), ("shop/web", "shop/db"))  # another host, the same host
        for family in (4, 6)
        for proto in sorted(PORTED)
        for port in (0, 1, 65535)
    ]
    passed = diff.run(probes)
    diff.settle()
    assert {p.number for p in passed} == {p.number for p in probes if p.dport}
    assert diff.score.differences == []


def _flips(plans: dict[str, Plan], kind: str, remote: bool) -> Iterator[tuple[InstanceKey, InstanceKey, int, int, PortMap]]:
    """Pairs, one protocol and port whose verdict changes, and the ports that the pair gets instead."""
    ours = {key for key, at in plans["a"].attachments.items() if at.active}
    for (src, dst), pair in plans["a"].pairs.items():
        if {src, dst} <= ours == remote:
            continue
        elements = elements_of(pair.ports)
        for proto in (TCP, UDP, SCTP):
            bits = pair.ports.bits(proto)
            if kind == "a port more" and not bits >> 7777 & 1:
                yield src, dst, proto, 7777, pair.ports | single(proto, 7777)
            if kind == "a protocol more" and not bits:
                yield src, dst, proto, 7777, pair.ports | whole(proto)
            if kind == "a port less":
                for held, port in elements.exact:
                    if held == proto:
                        yield src, dst, proto, port, pair.ports - single(proto, port)
            if kind == "a hole in a range":
                for held, first, last in elements.ranges:
                    if held == proto and last - first > 4 * EXPAND_RANGE:
                        yield src, dst, proto, first + 30, pair.ports - single(proto, first + 30)
            if kind == "a protocol less" and proto in elements.protocols:
                yield src, dst, proto, 7777, pair.ports - whole(proto)


@pytest.mark.parametrize("remote", [True, False], ids=["remote", "same host"])
@pytest.mark.parametrize(
    ("kind", "what"),
    [("a port more", "leak"), ("a protocol more", "leak"), ("a port less", "blocked"), ("a hole in a range", "blocked"),
     ("a protocol less", "blocked")],
)  # fmt: skip
def test_one_flipped_element_is_noticed(diff: Differential, kind: str, what: str, remote: bool) -> None:
    """The positive control: with one entry of the plan other than the evaluator says, differences are found, there only."""
    number = 1000
    flips: list[tuple[InstanceKey, InstanceKey, int, int, PortMap]] = []
    while not flips:
        plans = diff.publish(number)
        flips = list(_flips(plans, kind, remote))
        number += 1
    src, dst, proto, port, ports = flips[diff.rng.randrange(len(flips))]
    names = src.removesuffix("/0"), dst.removesuffix("/0")

    def aimed() -> list[Probe]:
        return [diff.fresh(*names, family, proto, port) for family in (4, 6) for _ in range(2)]

    diff.enforce({
        host: replace(plan, pairs={**plan.pairs, (src, dst): replace(plan.pairs[src, dst], ports=ports)})
        if (src, dst) in plan.pairs else plan
        for host, plan in plans.items()
    })  # fmt: skip
    probes, diff.tries = aimed(), 3
    diff.flows(150, among=probes)
    diff.settle()
    found = {(d.what, d.probe.number) for d in diff.score.differences}
    assert {(what, p.number) for p in probes} <= found
    elsewhere = [d for d in diff.score.differences if {d.probe.src, d.probe.dst} != set(names)]
    assert elsewhere == [], "\n".join(map(str, elsewhere[:20]))
    diff.enforce(plans)
    diff.score, diff.tries = Score(), TRIES
    diff.flows(150, among=aimed())
    diff.settle()
    assert diff.score.differences == []
