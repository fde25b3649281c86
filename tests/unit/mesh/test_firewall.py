"""mesh.firewall: the sets of a plan, the transactions between plans, the guard over the table."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadInput, NoPrivilege, TimedOut
from mesh import nft, nft_counts
from mesh.compile import compile_plan
from mesh.firewall import Firewall, fingerprint
from mesh.firewall_names import accepted_mark, slot, table_name
from mesh.firewall_rules import NO_PLAN, Shape, replacement, skeleton
from mesh.firewall_sets import (
    LIMITS,
    Delta,
    Sets,
    all_sets,
    intervals,
    pair_sets,
    sets_delta,
    statements,
    topology_sets,
)
from mesh.nft_counts import Element
from mesh.plan import Plan
from policy.evaluate import Bound, evaluate
from policy.ports import ANYTHING, NOTHING
from policy.program import Process, Program
from tests.unit.mesh.plans import TD, allow, endpoint, facts, placement, ports, program, snapshot
from tests.unit.mesh.test_compile import WORKLOADS, programs, subject, worlds
from tests.unit.mesh.test_nft_touches import OURS, Quiet, commit

WORLD = [placement("web", "h0", 1), placement("batch", "h0", 2), placement("api", "h1", 3)]
V4 = {n: str(TD.overlay(i)[0]) for i, n in enumerate(("web", "batch", "api"), 1)}
V6 = {n: str(TD.overlay(i)[1]) for i, n in enumerate(("web", "batch", "api"), 1)}


def plan(*rules, world=WORLD, at=None) -> Plan:
    at = at or facts("web/0", "batch/0")
    return compile_plan(snapshot(world, endpoints=[endpoint("h0"), endpoint("h1")]), at, program=program(*rules))


def test_names_and_marks() -> None:
    assert table_name("rtn0") == "retinue"
    assert table_name("rt.n-1") == "retinue_rt_n_1"
    for bad in ("", "a" * 16, 'x"', "a b", "-x", "a/b", "a\n"):
        with pytest.raises(BadInput):
            table_name(bad)
    assert [slot(n) for n in ("rtn0", "rtn3", "rtn6", "mesh")] == [0, 3, 2, 0]
    marks = {accepted_mark(f"rtn{n}") for n in range(4)}
    assert len(marks) == 4
    assert all(m.bit_count() == 1 for m in marks)


def test_elements_of_a_pair_in_both_families() -> None:
    (pair,) = plan(allow("web", "api", "tcp/80", "udp/5000-6000", "icmp")).pairs.values()
    sets = pair_sets(pair)
    assert sets["pair4"] == {f"{V4['web']} . {V4['api']} . 6 . 80"}
    assert sets["pair6"] == {f"{V6['web']} . {V6['api']} . 6 . 80"}
    assert sets["range4"] == {f"{V4['web']} . {V4['api']} . 17 . 5000-6000"}
    assert sets["proto4"] == {f"{V4['web']} . {V4['api']} . 1"}
    assert sets["proto6"] == {f"{V6['web']} . {V6['api']} . 58"}
    assert sets["error4"] == {f"{V4[x]} . {V4['web']} . {V4['api']}" for x in ("web", "api")}


def test_everything_but_something() -> None:
    rules = (allow("web", "api", "any"),)
    (pair,) = plan(*rules).pairs.values()
    assert pair_sets(pair)["rest4"] == {f"{V4['web']} . {V4['api']}"}
    assert "except4" not in pair_sets(pair)
    but = pair_sets(replace(pair, ports=ANYTHING - ports("icmp", "tcp/22")))
    assert but["except4"] == {f"{V4['web']} . {V4['api']} . {p}" for p in (1, 58, 6)}
    assert but["range6"] == {f"{V6['web']} . {V6['api']} . 6 . {r}" for r in ("1-21", "23-65535")}


def test_who_is_where() -> None:
    rules = (allow("web", "api", "tcp/80"),)
    one = plan(*rules)
    sets = topology_sets(one)
    veth = {k: a.veth for k, a in one.attachments.items()}
    assert sets["links"] == {f'"{veth["web/0"]}"', f'"{veth["batch/0"]}"'}
    assert sets["place4"] == {f'"{veth[f"{n}/0"]}" . {V4[n]}' for n in ("web", "batch")}
    assert sets["local6"] == {V6["web"], V6["batch"]}
    assert sets["member4"] == {V4["api"]}
    assert "held4" not in sets
    host = topology_sets(plan(*rules, at=facts(host=["web/0"])))
    assert (host["held4"], host["self4"]) == ({V4["web"]}, {f"{V4['web']} . {V4['web']}"})
    assert "place4" not in host
    waiting = topology_sets(plan(*rules, world=WORLD[1:]))
    assert waiting["links"] == sets["links"]
    assert waiting["local4"] == {V4["batch"]}


def test_statements_are_cut_into_pieces() -> None:
    text = statements("t", "add", {"b": {"2", "1"}, "a": {str(n) for n in range(4001)}})
    assert text.splitlines()[-1] == "add element inet t b { 1, 2 }"
    assert len(text.splitlines()) == 3
    assert statements("t", "add", {}) == ""


def test_the_table_denies_what_is_in_no_set_and_every_jump_has_its_chain() -> None:
    for interface in ("rtn0", "mesh7"):
        text = skeleton(interface)
        chains = set(re.findall(r"^chain (\w+)", text, re.MULTILINE))
        assert set(re.findall(r"(?:goto|jump) (\w+)", text)) <= chains
        assert set(re.findall(r"@(\w+)", text)) <= set(re.findall(r"(?:set|map) (\w+)", text))
        assert "established accept" not in text
        assert f"0x{accepted_mark(interface):08x}" in text
    assert "meta nfproto ipv6 drop" in skeleton("rtn0", close_v6=True)
    assert "meta nfproto ipv6 drop" not in skeleton("rtn0")
    assert replacement("rtn0", {}).startswith("add table inet retinue\ndelete table inet retinue\n")


def test_the_shape_of_a_plan_and_what_it_costs_no_packet() -> None:
    one = plan(allow("web", "api", "tcp/80"))
    shape = Shape.of(one)
    assert shape == Shape(overlay=one.overlay)
    text = skeleton("rtn0", shape=shape)
    assert "@rate4 " not in text
    assert f"ip saddr != {one.overlay.v4} ip daddr != {one.overlay.v4} accept" in text
    assert "!= 100." not in skeleton("rtn0"), "without a plan nobody knows what lies outside"
    asking = skeleton("rtn0", shape=replace(shape, ceilings=True))
    assert asking.count("limit name") == 4
    assert "hook output priority mangle - 1" in text
    assert "hook output priority mangle - 1" not in skeleton("rtn0", shape=Shape(levels=(1,))), "with units all is routed anew"
    assert replace(shape, ceilings=True).serves(shape)
    assert shape.serves(shape)
    assert not shape.serves(replace(shape, ceilings=True))
    assert not NO_PLAN.serves(shape)


def test_the_fingerprint_ignores_counts_and_sees_everything_else() -> None:
    table: list[dict[str, Any]] = [
        {"metainfo": {}},
        {"counter": {"name": "accepted", "packets": 5}},
        {"chain": {"name": "c", "handle": 1, "policy": "accept"}},
        {"rule": {"chain": "c", "handle": 4, "expr": [{"counter": {"packets": 1}}, {"drop": None}]}},
        {"set": {"name": "pair4", "elem": [{"concat": ["a", "b", {"range": [1, 2]}]}]}},
        {"set": {"name": "denied4", "elem": ["x"]}},
        {"set": {"name": "rest4"}},
    ]
    first = fingerprint(table)
    table[1]["counter"]["packets"] = 9
    table[3]["rule"]["expr"][0]["counter"]["packets"] = 9
    table[3]["rule"]["handle"] = 77
    table[5]["set"]["elem"] = []
    assert fingerprint(table) == first
    table[3]["rule"]["expr"][1] = {"accept": None}
    assert fingerprint(table) != first
    table[3]["rule"]["expr"][1] = {"drop": None}
    table[4]["set"]["elem"].append("y")
    assert fingerprint(table) != first


# ---- properties


def whole(snap: Any, attached: set[str], prog: Program) -> Plan:
    return compile_plan(snap, facts(*(f"{n}/{i}" for n in attached for i in (0, 1))), program=prog)


def passes(sets: Sets, src: str, dst: str, proto: int, port: int | None, *, audits: bool = True) -> bool:
    """The verdict chain, as a person would read it, over the element texts."""
    if audits and passes({k[1:]: v for k, v in sets.items() if k[0] == "a"}, src, dst, proto, port, audits=False):
        return True
    family = 6 if ":" in src else 4
    ends = f"{src} . {dst}"
    if f"{ends} . {proto}" in sets.get(f"proto{family}", ()):
        return True
    if f"{ends} . {proto} . {port}" in sets.get(f"pair{family}", ()):
        return True
    for element in sets.get(f"range{family}", ()):
        head, _, span = element.rpartition(" . ")
        low, _, high = span.partition("-")
        if head == f"{ends} . {proto}" and port is not None and int(low) <= port <= int(high):
            return True
    return ends in sets.get(f"rest{family}", ()) and f"{ends} . {proto}" not in sets.get(f"except{family}", ())


@settings(max_examples=100)
@given(programs(), worlds(), st.sets(st.sampled_from(WORKLOADS)))
def test_the_sets_agree_with_the_evaluator(prog: Program, snap: Any, attached: set[str]) -> None:
    one = whole(snap, attached, prog)
    sets = all_sets(one)
    here = {k for k, a in one.attachments.items() if a.state in {"active", "prepared"}}
    owner = {a: k for k, at in one.attachments.items() for a in at.addresses} | dict(one.remotes)
    for src, a in owner.items():
        for dst, b in owner.items():
            if a == b or (":" in src) != (":" in dst) or not {a, b} & here:
                continue
            icmp = 58 if ":" in src else 1
            for proto, port in ((6, 80), (6, 81), (17, 1010), (17, 1021), (132, 5), (icmp, None), (59 - icmp, None), (47, None)):
                want = evaluate(prog, subject(snap, a), subject(snap, b), proto, port).verdict == "allow"
                got = passes(sets, src, dst, proto, port)
                if proto == 59 - icmp:  # the other family's ICMP: only "any protocol" lets it pass
                    assert want or not got
                else:
                    assert got == want, (a, b, proto, port)
                    audited = evaluate(prog, subject(snap, a), subject(snap, b), proto, port).audited
                    assert passes(sets, src, dst, proto, port, audits=False) == (want and not audited)


@given(programs(), programs(), worlds(), worlds(), st.sets(st.sampled_from(WORKLOADS)), st.sets(st.sampled_from(WORKLOADS)))
def test_a_delta_leads_from_one_plan_to_the_other(p, q, s, t, a, b) -> None:
    old, new = whole(s, a, p), whole(t, b, q)
    delta = sets_delta(old, new)
    have, want = all_sets(old), all_sets(new)
    assert all(lines <= have[name] for name, lines in delta.delete.items())
    result = {name: have.get(name, set()) - delta.delete.get(name, set()) for name in have.keys() | delta.add.keys()}
    result = {name: lines | delta.add.get(name, set()) for name, lines in result.items()}
    assert {n: x for n, x in result.items() if x} == {n: x for n, x in want.items() if x}
    assert not sets_delta(new, new)
    assert not Delta({}, {})


# ---- the object, over a kernel that is a dictionary


class Kernel:
    """Enough of nftables for our own transactions: all or nothing, and a generation number."""

    def __init__(self) -> None:
        self.generation = 1
        self.table: Sets | None = None
        self.broken = False
        self.committed: list[Sets | None] = []

    async def run(self, text: str) -> None:
        if self.broken:
            raise NoPrivilege("x", "y")
        table = None if self.table is None else {k: set(v) for k, v in self.table.items()}
        for line in text.splitlines():
            if line.startswith("delete table"):
                table = None
            elif re.match(r"table inet", line):
                table = {}
            elif match := re.fullmatch(r"(add|delete) element inet \S+ (\w+) \{ (.*) \}", line):
                if table is None:
                    raise nft.Rejected("firewall.rejected", "no table")
                lines = table.setdefault(match[2], set())
                wanted = set(match[3].split(", "))
                if match[1] == "add":
                    lines |= wanted
                elif wanted <= lines:
                    lines -= wanted
                else:
                    raise nft.Rejected("firewall.rejected", "no such element")
        self.table = table
        self.generation += 1
        self.committed.append(table)

    async def list_table(self, name: str) -> list[dict[str, Any]] | None:
        if self.table is None:
            return None
        return [{"set": {"name": k, "elem": sorted(v)}} for k, v in self.table.items() if v]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    monkeypatch.setattr(nft, "run", made.run)
    monkeypatch.setattr(nft, "list_table", made.list_table)
    monkeypatch.setattr(nft, "generation", lambda: made.generation)
    return made


def same(table: Sets | None, wanted: Sets) -> bool:
    return table is not None and {k: v for k, v in table.items() if v} == {k: v for k, v in wanted.items() if v}


WIDE = (allow("web", "api", "tcp/80"), allow("batch", "api", "tcp/80", n=1))
OTHER = (allow("batch", "api", "tcp/81"),)


async def test_start_denies_and_leaves_a_table_that_stands(kernel: Kernel) -> None:
    assert await Firewall("rtn0").start() is False
    assert kernel.table == {}
    kernel.table = {"pair4": {"kept"}}
    assert await Firewall("rtn0").start() is True
    assert kernel.table == {"pair4": {"kept"}}


async def test_the_first_plan_replaces_what_was_there(kernel: Kernel) -> None:
    kernel.table = {"pair4": {"from an earlier life"}}
    firewall = Firewall("rtn0")
    await firewall.start()
    await firewall.narrow(plan(*WIDE))
    assert same(kernel.table, all_sets(plan(*WIDE)))
    assert len(kernel.committed) == 1


async def test_narrow_only_takes_and_widen_only_gives(kernel: Kernel) -> None:
    firewall = Firewall("rtn0")
    old, new = plan(*WIDE), plan(*OTHER)
    await firewall.apply(old)
    await firewall.narrow(new)
    between = kernel.table
    assert between is not None
    have, want = all_sets(old), all_sets(new)
    assert all(lines <= have.get(n, set()) & want.get(n, set()) for n, lines in between.items())
    assert await firewall.verify() is False  # half-way there is nothing to compare with
    await firewall.widen(new)
    assert same(kernel.table, want)
    commits = len(kernel.committed)
    await firewall.apply(new)
    await firewall.widen(new)
    assert len(kernel.committed) == commits


async def test_a_plan_that_was_given_up_half_way_leaves_no_trace(kernel: Kernel) -> None:
    firewall = Firewall("rtn0")
    await firewall.apply(plan(*WIDE))
    await firewall.narrow(plan(*OTHER))
    third = plan(allow("web", "api", "tcp/9"))
    await firewall.narrow(third)
    await firewall.widen(third)
    assert same(kernel.table, all_sets(third))
    fourth = plan(*WIDE)
    await firewall.widen(fourth)  # never narrowed towards it: put in place whole
    assert same(kernel.table, all_sets(fourth))


async def test_a_table_that_is_not_as_we_left_it_is_put_in_place_whole(kernel: Kernel) -> None:
    firewall = Firewall("rtn0")
    for wreck in (None, {}):
        await firewall.apply(plan(*WIDE))
        kernel.table = wreck
        await firewall.apply(plan(*OTHER))
        assert same(kernel.table, all_sets(plan(*OTHER)))
    await firewall.apply(plan(*OTHER[:0]))
    kernel.table = None
    await firewall.apply(plan(*OTHER))  # only additions
    assert same(kernel.table, all_sets(plan(*OTHER)))


async def test_an_error_leaves_the_table_and_is_told(kernel: Kernel) -> None:
    firewall = Firewall("rtn0")
    await firewall.apply(plan(*WIDE))
    before = kernel.table
    kernel.broken = True
    with pytest.raises(NoPrivilege):
        await firewall.apply(plan(*OTHER))
    assert kernel.table == before
    kernel.broken = False
    await firewall.apply(plan(*OTHER))
    assert same(kernel.table, all_sets(plan(*OTHER)))


async def test_verify_puts_right_what_others_did(kernel: Kernel) -> None:
    firewall = Firewall("rtn0")
    assert await firewall.verify() is False
    wanted = plan(*WIDE)
    await firewall.apply(wanted)
    assert await firewall.verify() is False
    commits = len(kernel.committed)
    kernel.generation += 3  # foreign commits that are none of our business
    assert await firewall.verify() is False
    assert len(kernel.committed) == commits
    for wreck in (None, {}, {**(kernel.table or {}), "pair4": {"an extra one"}}):
        kernel.table = wreck
        kernel.generation += 1
        assert await firewall.verify() is True
        assert same(kernel.table, all_sets(wanted))
        assert await firewall.verify() is False
    # somebody else between our commit and our first look: no comparison is possible, so it is put back
    await firewall.apply(plan(*OTHER))
    kernel.generation += 1
    assert await firewall.verify() is True
    await firewall.remove()
    assert kernel.table is None
    assert await firewall.verify() is False


@pytest.mark.parametrize("limit", [20_000, 1])
async def test_a_change_of_our_own_does_not_hide_what_others_did_just_before(kernel: Kernel, monkeypatch, limit: int) -> None:
    from mesh import firewall as module

    monkeypatch.setattr(module, "_COMPARE_LIMIT", limit)
    firewall = Firewall("rtn0")
    await firewall.apply(plan(*WIDE))
    for wanted in (plan(*OTHER), plan(*WIDE)):
        assert kernel.table is not None
        kernel.table = {**kernel.table, "proto4": {"an extra one"}}
        kernel.generation += 1
        await firewall.apply(wanted)  # changes elements only
        assert await firewall.verify() is True
        assert same(kernel.table, all_sets(wanted))
        assert await firewall.verify() is False


async def test_a_transaction_of_unknown_end_is_looked_after(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    firewall = Firewall("rtn0")
    await firewall.apply(plan(*WIDE))

    async def slow(text: str) -> None:
        await kernel.run(text)
        raise TimedOut("firewall.slow", "in force, and nobody was told")

    with monkeypatch.context() as patched:
        patched.setattr(nft, "run", slow)
        with pytest.raises(TimedOut):
            await firewall.narrow(plan(*OTHER))
    assert await firewall.verify() is True
    assert same(kernel.table, all_sets(plan(*WIDE)))


async def test_commits_that_the_kernel_tells_of_late(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In force, looked at more than once, and only then told of."""
    firewall = Firewall("rtn0")
    firewall.touches = touches = Quiet(kernel.generation)
    clock, told = 100.0, kernel.generation
    monkeypatch.setattr(time, "monotonic", lambda: clock)

    def tell(table: str) -> None:
        nonlocal told
        told += 1
        touches.waiting += commit(told, table)

    async def ours(wanted: Plan) -> None:
        before = kernel.generation
        await firewall.apply(wanted)
        for _ in range(kernel.generation - before):
            tell(OURS)

    await ours(plan(*WIDE))
    assert await firewall.verify() is False
    kernel.generation += 1
    for _ in range(3):
        assert await firewall.verify() is False
    tell("filter")
    assert await firewall.verify() is False
    kernel.generation += 1  # right before ours, and told of after it
    await firewall.apply(plan(*OTHER))
    committed = len(kernel.committed)
    for table in ("filter", OURS, OURS):
        tell(table)
    assert told == kernel.generation
    assert await firewall.verify() is False
    assert len(kernel.committed) == committed
    kernel.generation += 1  # told of late again and again, and then never
    for wait in (0.0, 0.5, 0.4):
        clock += wait
        kernel.generation += 1
        assert await firewall.verify() is False
        tell("filter")
    clock += 0.2
    assert await firewall.verify() is True
    assert same(kernel.table, all_sets(plan(*OTHER)))


async def test_a_commit_that_the_kernel_tells_of_while_we_look(kernel: Kernel) -> None:
    """Not yet when the first question is asked, but when the second is."""

    class Late(Quiet):
        late: ClassVar[list[bytes | None]] = []

        def drain(self) -> bool:
            super().drain()
            self.waiting, self.late = self.late, []
            return True

    firewall = Firewall("rtn0")
    firewall.touches = touches = Late(kernel.generation)
    await firewall.apply(plan(*WIDE))
    touches.waiting = commit(kernel.generation, OURS)
    assert await firewall.verify() is False
    commits = len(kernel.committed)
    kernel.generation += 1
    touches.late = commit(kernel.generation, "filter")
    for _ in range(3):
        assert await firewall.verify() is False
    assert len(kernel.committed) == commits


async def test_a_large_table_is_not_read_after_each_change(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh import firewall as module

    monkeypatch.setattr(module, "_COMPARE_LIMIT", 1)
    firewall = Firewall("rtn0")
    await firewall.apply(plan(*WIDE))
    monkeypatch.setattr(nft, "list_table", None)
    assert await firewall.verify() is False


async def test_counters_and_denied_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"denied4": [Element("100.64.0.2", "100.64.0.1", 6, 80, 3)], "denied6": [Element("fd00::2", "fd00::1", 58, 0, 1)]}
    monkeypatch.setattr(nft_counts, "counters", lambda table: {"denied": 4} if table == table_name("rtn0") else {})
    monkeypatch.setattr(nft_counts, "elements", lambda table, name: found.get(name, []))
    verdicts, flows = await Firewall("rtn0").counters()
    assert verdicts == {"denied": 4}
    assert [(f.src, f.dst, f.proto, f.port, f.packets) for f in flows] == [
        ("100.64.0.2", "100.64.0.1", "tcp", 80, 3), ("fd00::2", "fd00::1", "icmp", 0, 1),
    ]  # fmt: skip


# ---- ceilings and processes


def test_bounds_stand_in_sets_of_their_own() -> None:
    (pair,) = plan(allow("web", "api", "tcp/80-90", "icmp")).pairs.values()
    user = Bound("u", ports("tcp/80-82"), None, (Process("uid", "7"), Process("uid", "8")))
    rate = Bound("r", ports("tcp/80", "icmp"), 1000)
    sets = pair_sets(replace(pair, bounds=(user, rate)))
    ends = f"{V4['web']} . {V4['api']}"
    assert sets["pair4"] == {f"{ends} . 6 . {p}" for p in range(83, 91)}
    assert sets["uid4"] == {f"{u} . {ends} . 6 . {p}-{p}" for u in (7, 8) for p in (80, 81, 82)}
    assert sets["bound4"] == {f"{ends} . 6 . {p}-{p}" for p in (80, 81, 82)}
    rated, back = sorted(sets[LIMITS])[1].split()[0], min(sets[LIMITS]).split()[0]
    assert sets["rate4"] == {f'{ends} . 6 . 80-80 : "{rated}"', f'{ends} . 1 . 0-65535 : "{rated}"'}
    assert f'{V6["web"]} . {V6["api"]} . 58 . 0-65535 : "{back}"' in sets["back6"]
    text = statements("retinue", "add", sets)
    assert text.index(f"add limit inet retinue {rated}") < text.index("add element inet retinue rate4")
    gone = statements("retinue", "delete", sets)
    assert gone.index("delete element inet retinue rate4") < gone.index(f"delete limit inet retinue {rated}")


def test_what_only_an_audit_allows_never_stands_with_the_rest() -> None:
    (pair,) = plan(allow("web", "api", "any")).pairs.values()
    sets = pair_sets(replace(pair, enforced=ports("tcp/80")))
    ends = f"{V4['web']} . {V4['api']}"
    assert (sets["pair4"], sets["arest4"]) == ({f"{ends} . 6 . 80"}, {ends})
    assert "rest4" not in sets
    bound = Bound("u", ports("tcp/80"), None, (Process("uid", "7"),))
    sets = pair_sets(replace(pair, enforced=ports("tcp/80"), bounds=(bound,)))
    assert "pair4" not in sets
    assert sets["aexcept4"] == {f"{ends} . 6"}  # an audit is no way round a process constraint
    assert not passes(sets, V4["web"], V4["api"], 6, 80)
    assert passes(sets, V4["web"], V4["api"], 6, 81)


@given(st.sampled_from(["any", "tcp", "tcp/1-70", "icmp", "47", "udp/9"]), st.sampled_from(["", "tcp/80", "icmp", "47", "0", "255"]), st.sampled_from([4, 6]))
def test_intervals_say_what_the_port_map_says(word: str, less: str, family: int) -> None:
    one = ports(word) - (ports(less) if less else NOTHING)
    found = [[[int(n) for n in (part.split("-") * 2)[:2]] if "-" not in part else [int(n) for n in part.split("-")]
              for part in line.split(" . ")] for line in intervals(one, family)]  # fmt: skip
    icmp = 1 if family == 4 else 58
    for proto, port in ((6, 70), (6, 71), (6, 80), (17, 9), (icmp, 0), (47, 0), (0, 0), (255, 0), (50, 0)):
        hits = [p for p, q in found if p[0] <= proto <= p[1] and q[0] <= port <= q[1]]
        assert len(hits) == one.allows(1 if proto == icmp else proto, port if proto in (6, 17) else None)
