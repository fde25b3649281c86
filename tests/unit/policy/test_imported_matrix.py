from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from policy.evaluate import permitted, split
from policy.imported_matrix import matrix
from policy.nets import V6, ranges_of, show
from policy.ports import ANYTHING, NOTHING, PORTED, PortMap, mask, parse_ports, union
from policy.program import Action, AnyOf, Everything, Exists, In, Nets, Not, Program, Rule, Subject, Tier

SUBJECTS = (
    Subject("a", {"app": "a"}),
    Subject("b", {"app": "b"}),
    Subject("c", {}),
    Subject("gate (subnets)", {"via": "gate"}, nets=("10.0.0.0/8", "fd00::/16")),
    Subject("external", nets=("11.0.0.0/8", "fe00::/16")),
)
selectors = st.sampled_from([
    Everything(), In("app", frozenset({"a"})), Exists("app"), Not(Exists("app")), Exists("via"), Nets(("10.1.0.0/16", "fd00::/17")),
    AnyOf((Everything(), Nets(("0.0.0.0/0",), ("10.1.2.0/24",)))), Nets(("11.5.0.0-11.6.0.7",)),
])  # fmt: skip
maps = st.sampled_from(
    [
        ANYTHING,
        PortMap({6: mask(80, 90)}),
        PortMap({1: 1, 17: mask(53, 53)}),
        ANYTHING - PortMap({6: mask(22, 22)}),
        PortMap({132: mask(1, 65535)}),
    ]
)
rules = st.builds(
    Rule, id=st.just("r"), action=st.sampled_from(Action), src=selectors, dst=selectors, ports=maps,
    directions=st.sampled_from([("egress",), ("ingress",), ("egress", "ingress")]), concerns=st.none() | selectors,
)  # fmt: skip
programs = st.builds(
    Program,
    st.lists(
        st.builds(
            Tier, name=st.just("t"), rules=st.lists(rules, max_size=4).map(tuple), order=st.sampled_from(["first-match", "deny-wins"]),
            isolates=st.dictionaries(st.sampled_from(["egress", "ingress"]), selectors), otherwise=st.sampled_from(Action),
        ), max_size=3,
    ).map(tuple),
    st.sampled_from([Action.ALLOW, Action.DENY]),
)  # fmt: skip


def ports_of(rows: list[dict[str, Any]]) -> PortMap:
    out = NOTHING
    for row in rows:
        if row["proto"] == "any":
            return ANYTHING
        out = out | parse_ports(
            f"{row['proto']}/{row.get('ports', '*')}" if row.get("ports") else row["proto"]
        )
    return out


@settings(max_examples=40, deadline=None)
@given(programs)
def test_rows_say_what_the_evaluator_permits_part_by_part(program: Program) -> None:
    rows = matrix(program, SUBJECTS)
    for src in SUBJECTS:
        for dst in SUBJECTS:
            if src is dst:
                assert not [r for r in rows if r["src"] == name(src) == r["dst"]]
                continue
            for one in split(program, src):
                for other in split(program, dst):
                    spans = [
                        (a, b)
                        for a in ranges_of(one.nets) or (None,)
                        for b in ranges_of(other.nets) or (None,)
                    ]
                    for a, b in spans:
                        found = ports_of(
                            [
                                r
                                for r in rows
                                if r["src"] == name(src)
                                and r["dst"] == name(dst)
                                and within(a, r.get("src_net"))
                                and within(b, r.get("dst_net"))
                            ]
                        )
                        wanted = permitted(program, one, other)
                        if a and b and (a[0] < V6) != (b[0] < V6):
                            wanted = NOTHING
                        assert known(found) == known(wanted)


def name(subject: Subject) -> str:
    return subject.labels.get("via", subject.name)


def within(span: tuple[int, int] | None, net: str | None) -> bool:
    if span is None or net is None:
        return span is None and net is None
    return any(low <= span[0] and span[1] <= high for low, high in ranges_of((net,)))


def known(ports: PortMap) -> list[int]:
    return [ports.bits(p) for p in (1, *sorted(PORTED), 47)]


def test_neighbours_of_equal_answer_are_joined() -> None:
    tier = Tier(
        "t",
        (
            Rule("r", Action.ALLOW, Everything(), Nets(("10.0.0.0/9", "10.128.0.0/9"))),
            Rule("q", Action.ALLOW, Everything(), Nets(("10.64.0.0/10",))),
        ),
    )
    rows = matrix(Program((tier,)), SUBJECTS)
    assert [r for r in rows if r["src"] == "a"] == [
        {"src": "a", "dst": "gate", "dst_net": "10.0.0.0/8", "proto": "any", "ports": "*"}
    ]


def test_words() -> None:
    def rows(ports: PortMap) -> list[dict[str, Any]]:
        tier = Tier(
            "t", (Rule("r", Action.ALLOW, In("app", frozenset({"a"})), In("app", frozenset({"b"})), ports),)
        )
        return [
            {k: v for k, v in r.items() if k in {"proto", "ports"}}
            for r in matrix(Program((tier,)), SUBJECTS)
        ]

    assert rows(union([parse_ports("tcp/80,90-99"), parse_ports("icmp"), parse_ports("47")])) == [
        {"proto": "tcp", "ports": "80,90-99"}, {"proto": "icmp"}, {"proto": "47"},
    ]  # fmt: skip
    most = rows(ANYTHING - parse_ports("tcp"))
    assert {"proto": "udp", "ports": "*"} in most
    assert {"proto": "47"} in most
    assert not [r for r in most if r["proto"] == "tcp"]
    assert show(ranges_of(("10.0.0.0/8",))[0]) == "10.0.0.0/8"
