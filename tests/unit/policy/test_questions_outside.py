"""The matrix with outside subjects, against the evaluator part by part."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from policy.evaluate import permitted, split
from policy.nets import V6, ranges_of
from policy.ports import ANYTHING, NOTHING, PortMap, mask, union
from policy.program import Action, AnyOf, Everything, Exists, In, Nets, Not, Program, Rule, Subject, Tier
from policy.questions import Row, identity, matrix

SUBJECTS = (
    Subject("a", {"app": "a"}),
    Subject("b", {"app": "b"}),
    Subject("c", {}),
    Subject("gate (subnets)", {"via": "gate"}, nets=("10.0.0.0/8", "fd00::/16")),
    Subject("external", nets=("11.0.0.0/8", "fe00::/16")),
)
selectors = st.sampled_from([
    Everything(), In("app", frozenset({"a"})), Exists("app"), Not(Exists("app")), Exists("via"),
    Nets(("10.1.0.0/16", "fd00::/17")), AnyOf((Everything(), Nets(("0.0.0.0/0",), ("10.1.2.0/24",)))),
    Nets(("11.5.0.0-11.6.0.7",)),
])  # fmt: skip
maps = st.sampled_from([
    ANYTHING, PortMap({6: mask(80, 90)}), PortMap({1: 1, 17: mask(53, 53)}), ANYTHING - PortMap({6: mask(22, 22)}),
])  # fmt: skip
rules = st.builds(
    Rule, id=st.just("r"), action=st.sampled_from(Action), src=selectors, dst=selectors, ports=maps,
    directions=st.sampled_from([("egress",), ("ingress",), ("egress", "ingress")]), concerns=st.none() | selectors,
)  # fmt: skip
tiers = st.builds(
    Tier, name=st.just("t"), rules=st.lists(rules, max_size=4).map(tuple),
    order=st.sampled_from(["first-match", "deny-wins"]), otherwise=st.sampled_from(Action),
    isolates=st.dictionaries(st.sampled_from(["egress", "ingress"]), selectors),
)  # fmt: skip
programs = st.builds(
    Program, st.lists(tiers, max_size=3).map(tuple), st.sampled_from([Action.ALLOW, Action.DENY])
)


@settings(max_examples=60, deadline=None)
@given(programs)
def test_rows_say_what_the_evaluator_permits_part_by_part(program: Program) -> None:
    rows = matrix(program, SUBJECTS)
    for src in SUBJECTS:
        for dst in SUBJECTS:
            for one in split(program, src):
                for other in split(program, dst):
                    wanted = NOTHING if src is dst else permitted(program, one, other)
                    for a in ranges_of(one.nets) or (None,):
                        for b in ranges_of(other.nets) or (None,):
                            crossing = a and b and (a[0] < V6) != (b[0] < V6)
                            found = union(
                                r.ports for r in rows
                                if (r.src, r.dst) == (identity(src), identity(dst)) and within(a, r.src_net) and within(b, r.dst_net)
                            )  # fmt: skip
                            assert found == (NOTHING if crossing else wanted)


def within(span: tuple[int, int] | None, net: str) -> bool:
    if span is None or not net:
        return span is None and not net
    return any(low <= span[0] and span[1] <= high for low, high in ranges_of((net,)))


def test_neighbours_of_equal_answer_are_joined() -> None:
    tier = Tier(
        "t",
        (
            Rule("r", Action.ALLOW, Everything(), Nets(("10.0.0.0/9", "10.128.0.0/9"))),
            Rule("q", Action.ALLOW, Everything(), Nets(("10.64.0.0/10",))),
        ),
    )
    rows = matrix(Program((tier,)), SUBJECTS)
    assert [r for r in rows if r.src == "a"] == [Row("a", "gate", ANYTHING, dst_net="10.0.0.0/8")]
