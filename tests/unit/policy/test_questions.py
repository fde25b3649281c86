from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.compile import compile_policy
from policy.evaluate import permitted
from policy.language import load
from policy.ports import ANYTHING, parse_ports
from policy.program import Action, Everything, In, Nets, Program, Rule, Subject, Tier
from policy.questions import Row, blast_radius, difference, matrix, rows_json, what_if, who_can_reach

TEXT = """\
meshpolicy: 1
segments:
  - name: s
    allow:
      - {id: web-api, from: {role: web}, to: {role: api}, on: [tcp/80, udp]}
      - {id: api-db, from: {role: api}, to: {role: db}, on: tcp/5432}
"""
PROGRAM = compile_policy(load([("p", TEXT)]))
WEB, API, DB = (Subject(f"shop/{r}", {"role": r}) for r in ("web", "api", "db"))
ALL = (WEB, API, DB)


def test_matrix():
    assert matrix(PROGRAM, ALL) == [
        Row("shop/api", "shop/db", parse_ports("tcp/5432")),
        Row("shop/web", "shop/api", parse_ports("tcp/80") | parse_ports("udp")),
    ]
    assert rows_json(matrix(PROGRAM, ALL)) == {
        "allow": [
            {"src": "shop/api", "dst": "shop/db", "proto": "tcp", "ports": "5432"},
            {"src": "shop/web", "dst": "shop/api", "proto": "tcp", "ports": "80"},
            {"src": "shop/web", "dst": "shop/api", "proto": "udp"},
        ]
    }
    assert matrix(Program(()), ALL) == []


def test_matrix_of_whole_maps():
    (row,) = rows_json([Row("a", "b", ANYTHING)])["allow"]
    assert row == {"src": "a", "dst": "b", "proto": "any"}
    rows = rows_json([Row("a", "b", ANYTHING - parse_ports("tcp/22"))])["allow"]
    assert len(rows) == 255  # every protocol by number but 58, which is icmp here
    assert {"src": "a", "dst": "b", "proto": "tcp", "ports": "1-21,23-65535"} in rows
    assert {"src": "a", "dst": "b", "proto": "icmp"} in rows
    assert rows_json([Row("a", "b", ANYTHING - parse_ports("tcp"))])["allow"][0]["proto"] == "0"


def test_matrix_with_addresses_outside():
    rule = Rule("r", Action.ALLOW, Nets(("10.0.0.0/8",)), Everything(), parse_ports("tcp/80"))
    back = Rule("b", Action.ALLOW, In("role", frozenset({"web"})), Nets(("10.1.0.0/16",)), parse_ports("tcp/81"))
    far = Rule("f", Action.ALLOW, Nets(("10.0.0.0/8",)), Nets(("192.168.0.0/16",)), parse_ports("tcp/82"))
    program = Program((Tier("t", (rule, back, far)),))
    outside = Subject("external", nets=("0.0.0.0/0",))
    behind = Subject("gate (subnets)", {"via": "gate"}, nets=("192.168.0.0/24",))
    rows = {(r.src, r.src_net, r.dst, r.dst_net): str(r.ports) for r in matrix(program, (WEB, outside, behind))}
    assert rows == {  # the parts of 10.0.0.0/8 have one answer, so they are one row
        ("external", "10.0.0.0/8", "shop/web", ""): "tcp/80",
        ("shop/web", "", "external", "10.1.0.0/16"): "tcp/81",
        ("external", "10.0.0.0/8", "gate", "192.168.0.0/24"): "tcp/82",
    }
    own = Program((Tier("t", (Rule("r", Action.ALLOW, Everything(), Nets(("::/0", "0.0.0.0/0"))),)),), Action.ALLOW)
    both = Subject("external", nets=("10.0.0.0/8", "2001:db8::/32"))
    rows = {(r.src, r.src_net, r.dst, r.dst_net) for r in matrix(own, (Subject("gate"), behind, both))}
    assert ("gate", "", "gate", "192.168.0.0/24") not in rows  # a gateway and what is behind it are one identity
    assert ("external", "10.0.0.0/8", "gate", "192.168.0.0/24") in rows
    assert ("external", "2001:db8::/32", "gate", "192.168.0.0/24") not in rows  # no traffic between the families
    found = rows_json(matrix(program, (WEB, outside)))["allow"]
    assert {"src": "shop/web", "dst": "external", "proto": "tcp", "ports": "81", "dst_net": "10.1.0.0/16"} in found
    assert {"src": "external", "dst": "shop/web", "proto": "tcp", "ports": "80", "src_net": "10.0.0.0/8"} in found


def test_who_can_reach():
    assert [r.src for r in who_can_reach(PROGRAM, ALL, API)] == ["shop/web"]
    assert who_can_reach(PROGRAM, ALL, API, 6, 81) == []
    assert who_can_reach(PROGRAM, ALL, API, 17) == [Row("shop/web", "shop/api", parse_ports("udp"))]
    assert who_can_reach(PROGRAM, ALL, API, 6, 80) == [Row("shop/web", "shop/api", parse_ports("tcp/80"))]


def test_blast_radius():
    found = blast_radius(PROGRAM, ALL, "shop/web")
    assert [(r.name, r.hops, r.chain) for r in found] == [
        ("shop/api", 1, ("shop/web", "shop/api")),
        ("shop/db", 2, ("shop/web", "shop/api", "shop/db")),
    ]
    assert [r.name for r in blast_radius(PROGRAM, ALL, "shop/web", 1)] == ["shop/api"]
    assert blast_radius(PROGRAM, ALL, "shop/db") == []
    with pytest.raises(KeyError):
        blast_radius(PROGRAM, ALL, "nobody")


def test_what_if_and_difference():
    gained = what_if(PROGRAM, ALL, "shop/db", {"role": "web"})
    assert [(d.kind, d.src, d.dst, str(d.ports)) for d in gained] == [
        ("loses", "shop/api", "shop/db", "tcp/5432"),
        ("gains", "shop/db", "shop/api", "tcp/80 udp"),
    ]
    assert [d.kind for d in what_if(PROGRAM, ALL, "shop/api", {"role": None})] == ["loses", "loses"]
    assert [(d.kind, d.src) for d in what_if(PROGRAM, ALL, "shop/new", {"role": "web"})] == [("gains", "shop/new")]
    assert difference(PROGRAM, PROGRAM, ALL) == []
    outside = Subject("external", nets=("10.0.0.0/8",))
    open_door = Program((Tier("t", (Rule("r", Action.ALLOW, Nets(("10.0.0.0/9",)), Everything()),)),))
    assert [(d.kind, d.src) for d in difference(PROGRAM, open_door, (DB, outside))] == [("gains", "external[10.0.0.0/9]")]


@given(st.lists(st.sampled_from(("web", "api", "db", "x")), max_size=6), st.lists(st.sampled_from(("web", "api", "db", "x")), max_size=6))
@settings(deadline=None)
def test_a_difference_added_to_before_gives_after(one, two):
    before = [Subject(f"w{n}", {"role": r}) for n, r in enumerate(one)]
    after = [Subject(f"w{n}", {"role": r}) for n, r in enumerate(two)]
    held = {(r.src, r.dst): r.ports for r in matrix(PROGRAM, before)}
    for d in difference(PROGRAM, PROGRAM, before, after):
        old = held.get((d.src, d.dst), parse_ports("tcp/1") - parse_ports("tcp/1"))
        held[d.src, d.dst] = old | d.ports if d.kind == "gains" else old - d.ports
    assert {k: v for k, v in held.items() if v} == {(r.src, r.dst): r.ports for r in matrix(PROGRAM, after)}


def test_who_can_reach_is_the_column_of_the_matrix() -> None:
    """Classes decide for the workloads of the inventory, the evaluator for anybody else: they never differ."""
    text = "meshpolicy: 1\nsegments:\n  - name: s\n    allow:\n" + "".join(
        f"      - {{id: r{n}, from: {{role: r{n % 3}}}, to: {{role: r{(n * 7 + 1) % 3}, zone: z{n % 2}}}, on: tcp/{80 + n}}}\n" for n in range(12)
    ) + "    deny:\n      - {id: d, from: {zone: z1}, to: {zone: z0}, on: tcp/82-84}\n"
    program = compile_policy(load([("p.yaml", text)]), 0)
    known = [Subject(f"w{n}", {"role": f"r{n % 3}", "zone": f"z{n % 2}"}) for n in range(12)]
    rows = matrix(program, known)
    assert rows
    for dst in known:
        column = [row for row in rows if row.dst == dst.name]
        assert who_can_reach(program, known, dst) == column
        stranger = Subject("elsewhere", dict(dst.labels))
        assert {r.src: r.ports for r in who_can_reach(program, known, stranger)} == {
            one.name: held for one in known if (held := permitted(program, one, stranger))
        }
