"""mesh.plan: elements of a port map, differences of plans."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.compile import compile_plan
from mesh.plan import EXPAND_RANGE, Changes, Overlay, PeerPlan, diff, elements_of
from policy.ports import ALL_PORTS, ANYTHING, NOTHING, PORTED, PortMap
from tests.unit.mesh.plans import allow, endpoint, facts, placement, ports, program, snapshot

PROTOS = (1, 2, 6, 17, 47, 132)


@st.composite
def port_maps(draw: st.DrawFn) -> PortMap:
    out = draw(st.sampled_from([NOTHING, NOTHING, ANYTHING]))
    for _ in range(draw(st.integers(0, 4))):
        proto = draw(st.sampled_from(PROTOS))
        if proto in PORTED:
            first = draw(st.integers(1, 65535))
            last = min(65535, first + draw(st.sampled_from([0, 1, 14, 15, 16, 17, 1000, 65535])))
            piece = PortMap({proto: (1 << (last + 1)) - (1 << first)})
        else:
            piece = PortMap({proto: 1})
        out = out - piece if draw(st.booleans()) else out | piece
    return out


@given(port_maps(), st.data())
def test_the_elements_allow_exactly_what_the_map_allows(ports: PortMap, data: st.DataObject) -> None:
    elements = elements_of(ports)
    edges = {1, 65535}
    for bits in ports.ports.values():
        for n in (0, 1):
            low = (bits & -bits).bit_length() - 1
            edges |= {max(1, low - n), min(65535, bits.bit_length() - 1 + n)}
    for proto in (*PROTOS, 58, 6, 17):
        if proto in PORTED:
            for port in (*(e for e in edges if e >= 1), data.draw(st.integers(1, 65535))):
                assert elements.allows(proto, port) == ports.allows(proto, port), (proto, port)
        else:
            assert elements.allows(proto, None) == ports.allows(1 if proto == 58 else proto, None), proto
    assert all(last - first >= EXPAND_RANGE for _, first, last in elements.ranges)
    assert bool(elements.exact or elements.ranges or elements.protocols or elements.rest) == bool(ports)


def test_forms_of_elements() -> None:
    assert elements_of(ports("tcp/80,443")).exact == ((6, 80), (6, 443))
    assert elements_of(ports("tcp/100-115")).ranges == ()
    assert elements_of(ports("tcp/100-116")).ranges == ((6, 100, 116),)
    assert elements_of(ports("udp", "icmp")).protocols == (1, 17)
    anything = elements_of(ANYTHING)
    assert (anything.rest, anything.except_, len(anything)) == (True, (), 1)
    but = elements_of(ANYTHING - ports("tcp/22", "icmp"))
    assert set(but.except_) == {1, 6}
    assert len(but) == 1 + 2 + len(but.exact) + len(but.ranges)
    assert not but.allows(6, None)
    assert elements_of(PortMap({6: ALL_PORTS})).protocols == (6,)


def world(*rules, where="h1"):
    placements = [placement("web", "h0", 1), placement("api", where, 2)]
    return compile_plan(
        snapshot(placements, endpoints=[endpoint("h0"), endpoint("h1"), endpoint("h2")]), facts("web/0"),
        program=program(*(rules or (allow("web", "api", "tcp/80"),))),
    )  # fmt: skip


def test_differences() -> None:
    plan = world()
    assert diff(plan, plan) == Changes()
    assert not diff(plan, plan)
    assert diff(plan, plan).summary() == "nothing"
    first = diff(None, plan)
    assert first.summary() == "+1 peer, +1 attachment, +1 pair"
    changed = diff(plan, world(allow("web", "api", "tcp/81")))
    assert changed.summary() == "~1 pair"
    assert changed.pairs_changed[0][0].ports == ports("tcp/80")
    moved = diff(plan, world(where="h2"))
    assert moved.summary() == "+1 peer, -1 peer"
    assert len(diff(plan, replace(plan, peers={}, pairs={}, attachments={})).attachments_gone) == 1
    two = world(allow("web", "api", "tcp/80"), allow("api", "web", "tcp/80"))
    assert diff(None, two).summary() == "+1 peer, +1 attachment, +2 pairs"


def test_views_of_a_plan() -> None:
    plan = world()
    assert [a.key for a in plan.active] == ["web/0"]
    assert plan.host_addresses == ()
    assert plan.element_count == 2
    assert str(Overlay.of("unit.test").v4) == "100.64.0.0/10"
    assert PeerPlan("e", "k", None, (), 0, "chacha20poly1305", "").warm
