"""mesh.layout and mesh.netns: what a plan asks of links, routes and rules; names of namespaces."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from identity.errors import BadInput, NotFound, Refused
from mesh import netns
from mesh.compile import LocalAttachment, LocalFacts, compile_plan
from mesh.devices import TUNNEL
from mesh.firewall_names import accepted_mark
from mesh.layout import FAST_RULE, LOCAL_RULE, TABLE_LOCAL, Layout, Route, Rule, layout, rules, tables
from mesh.snapshot import InstanceKey
from tests.unit.mesh.plans import ME, TD, allow, endpoint, facts, placement, program, snapshot, tunnel_key

WEB, API, BATCH = placement("web", "h0", 1), placement("api", "h1", 2), placement("batch", "h0", 3)
RULES = (allow("web", "api", "tcp/80"), allow("web", "batch", "tcp/80", n=1))


def lay(*placements, at: LocalFacts | None = None, prepares=()) -> Layout:
    snap = snapshot(placements or (WEB, API, BATCH), prepares, [endpoint("h0"), endpoint("h1")])
    return layout(compile_plan(snap, at or facts("web/0", "batch/0"), program=program(*RULES)))


def test_every_link_is_gated_before_the_local_table() -> None:
    one = lay()
    mark = accepted_mark("rtn0")
    for family in (4, 6):
        ladder = sorted((r for r in one.rules if r.family == family), key=lambda r: r.priority)
        assert ladder[0] == Rule(family, FAST_RULE, tables("rtn0")[0], mark=(mark, mark))
        gates = [r for r in ladder[1:] if r.priority < LOCAL_RULE]
        assert {r.iif for r in gates} == {"rtn0", *one.pairs}
        assert all((r.table, r.mark) == (0, (0, mark)) for r in gates)
        local = [r for r in ladder if r.table == TABLE_LOCAL]
        assert [r.priority for r in local] == [LOCAL_RULE]
        marked = [r for r in ladder if r.mark == (mark, mark)]
        assert [r.table for r in marked] == [tables("rtn0")[0]] * 2 + [0]  # places, then a blackhole
    assert not any(r.mark == (TUNNEL, TUNNEL) or r.no_default for r in one.rules)


def test_a_host_identity_adds_the_way_out_and_keeps_the_underlay_out_of_it() -> None:
    one = lay(at=facts("batch/0", host=["web/0"]))
    assert one.host_addresses == tuple(WEB.addresses)
    without = frozenset(rules("rtn0", one.pairs, one.overlay, holds=False))
    assert {r.priority for r in without - one.rules} == {FAST_RULE}  # a marked packet may be for the host itself
    extra = one.rules - without
    for family in (4, 6):
        ladder = sorted((r for r in extra if r.family == family), key=lambda r: r.priority)
        assert ladder[0].mark == (TUNNEL, TUNNEL)
        assert ladder[1].no_default
        assert (ladder[2].table, ladder[2].iif) == (tables("rtn0")[2], "lo")
    sources = {r.src for r in one.routes if r.family == 4}
    assert sources == {WEB.addresses[0]}
    assert all(r.src is None for r in lay().routes)


def test_local_instances_are_reachable_only_with_the_mark() -> None:
    one = lay()
    places, exact, wide = tables("rtn0")
    veth = {key: pair.name for pair in one.pairs.values() for key in pair.instances}
    address = WEB.addresses[0] + "/32"
    assert {r.dev for r in one.routes if (r.dst, r.table) == (address, places)} == {veth[InstanceKey("web/0")]}
    assert {r.dev for r in one.routes if (r.dst, r.table) == (address, exact)} == {"rtn0"}
    assert Route(4, exact, API.addresses[0] + "/32", "rtn0") in one.routes
    assert Route(6, places, str(TD.overlay_v6()), "rtn0") in one.routes
    assert not [r for r in one.routes if r.table == wide]


def test_a_prepared_instance_has_its_address_but_no_route() -> None:
    coming = placement("api", ME, 2, epoch=2, state="prepare")
    one = lay(WEB, API, prepares=[coming], at=facts("web/0", "api/0"))
    pair = next(p for p in one.pairs.values() if p.instances == ("api/0",))
    assert (pair.addresses, pair.reachable) == (tuple(API.addresses), ())
    assert not [r for r in one.routes if r.dev == pair.name]


def test_instances_of_one_namespace_share_a_link() -> None:
    place = LocalAttachment("netns", "ns", 5)
    at = LocalFacts(ME, tunnel_key(ME), attachments={InstanceKey("web/0"): place, InstanceKey("batch/0"): place})
    (pair,) = lay(at=at).pairs.values()
    assert pair.instances == ("batch/0", "web/0")
    assert pair.addresses == (*BATCH.addresses, *WEB.addresses)
    assert pair.host_mac != pair.inside_mac
    assert int(pair.host_mac[:2], 16) & 3 == 2  # locally administered, not multicast


def test_agents_of_one_namespace_use_different_tables_and_priorities() -> None:
    assert not set(tables("rtn0")) & set(tables("rtn1"))
    one, two = (set(rules(i, (), {4: "a", 6: "b"}, holds=True)) for i in ("rtn0", "rtn1"))
    assert {r.priority for r in one & two} == {LOCAL_RULE, 101}


# ---- namespaces


def test_paths() -> None:
    assert netns.path_of("web-1") == Path("/run/netns/web-1")
    assert netns.path_of("/proc/1/ns/net") == Path("/proc/1/ns/net")
    for bad in ("", "a/b", "..", "-x", "a\0b", "/x\0", "/" + "x" * 5000):
        with pytest.raises(BadInput):
            netns.path_of(bad)


def test_what_is_no_namespace_is_refused() -> None:
    with pytest.raises(NotFound):
        netns.identify("there-is-none")
    with pytest.raises(BadInput):
        netns.identify("/etc/passwd")
    with pytest.raises(BadInput):
        netns.identify("/proc/self/ns/uts")
    assert netns.identify("/proc/self/ns/net") == netns.own()
    with pytest.raises(Refused):
        netns.foreign("/proc/self/ns/net")


@pytest.mark.skipif(os.geteuid() != 0, reason="entering a namespace needs root")
def test_work_inside_raises_here_and_leaves_this_thread_alone() -> None:
    before = netns.own()
    assert netns.inside("/proc/self/ns/net", threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        netns.inside("/proc/self/ns/net", lambda: 1 // 0)
    with pytest.raises(NotFound) as replaced:
        netns.inside("/proc/self/ns/net", lambda: 1, inode=1)
    assert replaced.value.code == "netns.replaced"
    assert netns.own() == before


def test_settings_of_the_kernel() -> None:
    assert netns.sysctl("ipv4/conf/lo/there-is-none", "1") is None
    value = netns.sysctl("ipv4/conf/lo/forwarding")
    assert value in {"0", "1"}
    assert netns.sysctl("ipv4/conf/lo/forwarding", value) == value  # nothing is written
