"""mesh.compile: nothing without policy, nothing without a placement, one owner per address, reasons everywhere."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadPolicy
from mesh.compile import Compiler, LocalAttachment, compile_plan, veth_name
from mesh.plan import AES, CHACHA, Plan, elements_of
from mesh.snapshot import InstanceKey, Snapshot
from mesh.verdicts import Classes
from policy.evaluate import evaluate
from policy.ports import PORTED
from policy.program import Action, Audit, Named, Nothing, Process, Program, Rule, Subject, Tier
from tests.unit.mesh.plans import (
    ANYBODY,
    ME,
    TD,
    allow,
    endpoint,
    facts,
    labelled,
    placement,
    policy_record,
    ports,
    program,
    snapshot,
    tunnel_key,
)

ENDPOINTS = [endpoint(n) for n in ("h0", "h1", "h2")]


def build(placements, *rules, prepares=(), endpoints=ENDPOINTS, at=None, prog=None) -> Plan:
    return compile_plan(snapshot(placements, prepares, endpoints), at or facts("web/0"), program=prog or program(*rules))


def codes(plan: Plan) -> set[str]:
    return {note.code for note in plan.notes}


WEB, API = placement("web", "h0", 1), placement("api", "h1", 2)
RULE = allow("web", "api", "tcp/80")


def test_a_permitted_pair_gives_a_peer_a_pair_and_addresses() -> None:
    plan = build([WEB, API], RULE)
    peer = plan.peers[tunnel_key("h1")]
    assert peer.allowed_ips == tuple(sorted([f"{API.addresses[0]}/32", f"{API.addresses[1]}/128"]))
    assert (peer.endpoint, peer.underlay, peer.cipher, peer.warm) == ("h1", "192.0.2.1:51820", CHACHA, False)
    assert peer.why == "policy permits api/0"
    (pair,) = plan.pairs.values()
    assert (pair.src, pair.dst, pair.ports) == ("web/0", "api/0", ports("tcp/80"))
    assert pair.why == "web/0 may reach api/0: tcp/80"
    attachment = plan.attachments[InstanceKey("web/0")]
    assert (attachment.state, attachment.epoch, attachment.addresses) == ("active", 1, tuple(WEB.addresses))
    assert plan.remotes == dict.fromkeys(API.addresses, "api/0")
    assert (plan.timeline, plan.revision, plan.notes) == ("t", 7, ())


def test_without_policy_there_is_nothing() -> None:
    plan = compile_plan(snapshot([WEB, API], endpoints=ENDPOINTS), facts("web/0"))
    assert (plan.peers, plan.pairs, plan.remotes, plan.policy_digest) == ({}, {}, {}, "")
    assert plan.attachments[InstanceKey("web/0")].active  # it is here; it may just talk to nobody
    assert build([WEB, API], allow("web", "other", "tcp/80")).peers == {}


def test_a_peer_needs_only_one_direction_and_pairs_have_their_own() -> None:
    plan = build([WEB, API], allow("api", "web", "udp/53"))
    assert plan.pairs.keys() == {("api/0", "web/0")}
    assert plan.peers[tunnel_key("h1")].allowed_ips


def test_an_instance_that_is_placed_but_not_attached_has_a_tunnel_and_no_elements() -> None:
    plan = build([WEB, API], RULE, at=facts())
    assert plan.peers
    assert plan.pairs == {}
    assert plan.attachments == {}


def test_local_pairs_are_elements_like_any_other() -> None:
    batch = placement("batch", "h0", 3)
    plan = build([WEB, batch], allow("web", "batch", "tcp/1"), at=facts("web/0", "batch/0"))
    assert plan.pairs.keys() == {("web/0", "batch/0")}
    assert plan.peers == {}
    assert build([WEB, batch], allow("web", "batch", "tcp/1")).pairs == {}  # batch is not attached


def test_instances_of_one_workload_are_a_pair_of_their_own() -> None:
    other = placement("web", "h0", 3, instance=1)
    plan = build([WEB, other], allow("web", "web", "tcp/1"), at=facts("web/0", "web/1"))
    assert plan.pairs.keys() == {("web/0", "web/1"), ("web/1", "web/0")}


def test_a_move_that_is_made_ready() -> None:
    coming = placement("api", "h2", 2, epoch=2, state="prepare")
    plan = build([WEB, API], RULE, prepares=[coming])
    assert plan.peers[tunnel_key("h2")].allowed_ips == ()
    assert plan.peers[tunnel_key("h2")].why == "warm for a move that is being made ready"
    assert plan.peers[tunnel_key("h1")].allowed_ips
    after = build([WEB, placement("api", "h2", 2, epoch=2)], RULE)
    assert after.peers.keys() == {tunnel_key("h2")}
    assert after.pairs == plan.pairs
    # on the new holder: its address and its elements are ready, but it is not active
    here = build([placement("web", "h1", 1), API], RULE, prepares=[placement("api", "h0", 2, epoch=2, state="prepare")],
                 at=facts("api/0"))  # fmt: skip
    attachment = here.attachments[InstanceKey("api/0")]
    assert (attachment.state, attachment.epoch, attachment.addresses) == ("prepared", 2, tuple(API.addresses))
    assert here.pairs.keys() == {("web/0", "api/0")}
    assert list(here.active) == []
    assert here.peers[tunnel_key("h1")].allowed_ips
    # an endpoint whose record is not here cannot be warmed
    assert build([WEB, API], RULE, prepares=[placement("api", "h9", 2, epoch=2, state="prepare")]).peers.keys() == {tunnel_key("h1")}


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_lower_or_equal_epoch_never_wins(epoch: int) -> None:
    current = placement("api", "h1", 2, epoch=2)
    stale = placement("api", "h2", 2, epoch=epoch, state="prepare")
    assert build([WEB, current], RULE, prepares=[stale]).peers.keys() == {tunnel_key("h1")}
    mine = placement("api", ME, 2, epoch=epoch, state="prepare")
    assert build([WEB, current], RULE, prepares=[mine], at=facts("api/0")).attachments[InstanceKey("api/0")].state == "waiting"


def test_states_of_an_attachment_and_their_reasons() -> None:
    key = InstanceKey("web/0")

    def state(*placements, **kw):
        one = build(placements, RULE, at=facts("web/0", **kw)).attachments[key]
        assert (one.addresses == ()) == (one.state in {"waiting", "fenced"})
        return one.state, one.why

    assert state() == ("waiting", "no placement is known")
    assert state(placement("web", "h1", 1)) == ("waiting", "placed on h1 at epoch 1")
    assert state(placement("web", "h1", 1), held=frozenset({key}))[0] == "fenced"
    assert state(placement("web", "h0", 1, state="revoked", epoch=4), held=frozenset({key})) == ("fenced", "revoked at epoch 4")
    assert state(fenced=frozenset({key}))[1] == "the newest sign of life of the control plane is too old"
    assert state(placement("web", "h0", 1, tunnel_key=tunnel_key("old"))) == ("waiting", "its placement is not usable")
    assert state(WEB)[0] == "active"


def test_revoked_and_unknown_endpoints_get_nothing() -> None:
    assert build([WEB, placement("api", "h1", 2, state="revoked")], RULE).peers == {}
    plan = build([WEB, placement("api", "h9", 2)], RULE)
    assert plan.peers == {}
    assert plan.pairs == {}
    assert codes(plan) == {"plan.no_endpoint"}


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (placement("api", "h1", 2, tunnel_key=tunnel_key("h2")), "plan.stale_key"),
        (placement("api", "h1", 2, addresses=["8.8.8.8", API.addresses[1]]), "plan.address"),
        (placement("api", "h1", 2, addresses=[API.addresses[0], "fd00::1"]), "plan.address"),
        (placement("api", "h1", 2, addresses=["100.64.0.0/10", API.addresses[1]]), "plan.address"),
        (placement("api", "h1", 2, addresses=list(reversed(API.addresses))), "plan.address"),
        (placement("api", "h1", 2, addresses=[API.addresses[0], API.addresses[1].upper()]), "plan.address"),
        (placement("api", "h1", 1), "plan.address_shared"),
    ],
)
def test_a_placement_that_is_not_sound_is_not_served(record: object, code: str) -> None:
    plan = build([WEB, record], RULE)
    assert plan.peers == {}
    assert plan.pairs == {}
    assert codes(plan) == {code}


def test_a_placement_under_a_wrong_key_is_not_served() -> None:
    snap = snapshot([WEB], endpoints=ENDPOINTS)
    plan = compile_plan(replace(snap, placements={**snap.placements, InstanceKey("web/9"): API}), facts("web/0"), program=program(RULE))
    assert plan.peers == {}
    assert codes(plan) == {"plan.key"}


def test_two_endpoints_with_one_tunnel_key_get_no_tunnel() -> None:
    twins = [endpoint("h0"), endpoint("h1"), endpoint("h2", tunnel_key=tunnel_key("h1"))]
    plan = build([WEB, API], RULE, endpoints=twins)
    assert plan.peers == {}
    assert "plan.key_shared" in codes(plan)
    mine = build([WEB, placement("api", "h1", 2, tunnel_key=tunnel_key(ME))], RULE,
                 endpoints=[endpoint("h1", tunnel_key=tunnel_key(ME))])  # fmt: skip
    assert mine.peers == {}


def test_underlay_hints() -> None:
    def underlay(*hints: str) -> str | None:
        return build([WEB, API], RULE, endpoints=[endpoint("h1", underlay=hints)]).peers[tunnel_key("h1")].underlay

    assert underlay() is None
    assert underlay("host.example:1", "192.0.2.9:7") == "192.0.2.9:7"
    assert underlay("[2001:db8::1]:7") == "[2001:db8::1]:7"
    overlay = TD.overlay(9)[1]
    for bad in ("2001:db8::1:7", "[192.0.2.1]:7", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1", f"[{overlay}]:7", ""):
        assert underlay(bad) is None
    assert codes(build([WEB, API], RULE, endpoints=[endpoint("h1", underlay=["x"])])) == {"plan.underlay"}


def test_aes_needs_the_signed_offer_of_both() -> None:
    def cipher(mine: list[str] | None, theirs: list[str], key: str = tunnel_key(ME)) -> str:
        own = [] if mine is None else [endpoint(ME, ciphers=mine, tunnel_key=key)]
        plan = build([WEB, API], RULE, endpoints=[*own, endpoint("h1", ciphers=theirs)])
        return plan.peers[tunnel_key("h1")].cipher

    both = [CHACHA, AES]
    assert cipher(both, both) == AES
    assert cipher(None, both) == cipher([CHACHA], both) == cipher(both, [CHACHA]) == CHACHA
    assert cipher(both, both, tunnel_key("before")) == CHACHA


def test_many_instances_on_one_endpoint_are_one_peer() -> None:
    many = [placement("api", "h1", n + 2, instance=n) for n in range(5)]
    plan = build([WEB, *many], RULE)
    (peer,) = plan.peers.values()
    assert len(peer.allowed_ips) == 10
    assert peer.why == "policy permits api/0, api/1, api/2 and 2 more"


def test_a_host_identity_has_no_link() -> None:
    plan = build([WEB, API], RULE, at=facts(host=["web/0"]))
    attachment = plan.attachments[InstanceKey("web/0")]
    assert (attachment.kind, attachment.veth) == ("host", None)
    assert plan.host_addresses == tuple(WEB.addresses)


def test_link_names() -> None:
    one, two = LocalAttachment("netns", "x", 7), LocalAttachment("netns", "/proc/1/ns/net", 7)
    assert veth_name("rtn0", one) == veth_name("rtn0", two)
    assert len({veth_name("rtn0", one), veth_name("rtn1", one), veth_name("rtn0", LocalAttachment("netns", "x"))}) == 3
    assert len(veth_name("rtn0", one)) == 14


POLICY = "version: 1\nsegments:\n  - name: s\n    members: {name: [web, api]}\n"


ONE = """meshpolicy: 1
segments:
  - name: %s
    allow: [{id: r, from: {workload: web}, to: {workload: api}, on: tcp/80}]
grants: [{id: g, from: "*", to: "*", on: udp, not_after: "1970-01-01T00:01:40Z"}]
"""


def test_policies_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import policy.language

    real, loaded = policy.language.load, []
    monkeypatch.setattr(policy.language, "load", lambda files: loaded.append(files[0][1].split()[5]) or real(files))
    compiler = Compiler()
    snap = snapshot([WEB, API], endpoints=ENDPOINTS, policy=policy_record(ONE % "one"))
    plan = compiler.plan(snap, facts("web/0"))
    assert plan == compiler.plan(snap, facts("web/0")) == compile_plan(snap, facts("web/0"))
    assert plan.policy_digest == "d"
    assert next(iter(plan.pairs.values())).why == "web/0 may reach api/0: tcp/80 (policy revision 3)"
    assert loaded == ["one", "one"]  # the second is compile_plan, which keeps nothing
    at = [compiler.classes(policy_record(ONE % "one"), now) for now in (10, 99, 100, 10_000)]
    assert at[0] is at[1]
    assert at[1] is not at[2]
    assert at[2] is at[3]
    assert compiler.changes_at(policy_record(ONE % "one"), 10) == 100
    for n in range(5):
        compiler.classes(policy_record(ONE % f"more{n}"))
    compiler.classes(policy_record(ONE % "one"))
    assert loaded.count("one") == 3  # it had been pushed out


UNTIL = """meshpolicy: 1
grants: [{id: g, from: {workload: web}, to: {workload: api}, on: tcp/80, until: {workload_ends: job}}]
"""


def test_a_grant_ends_with_its_workload() -> None:
    compiler = Compiler()
    job = placement("job", "h2", 9)
    for there, wanted in (([job], True), ([], False), ([job], True), ([job.model_copy(update={"state": "revoked", "epoch": 2})], False)):
        snap = snapshot([WEB, API, *there], endpoints=ENDPOINTS, policy=policy_record(UNTIL))
        plan = compiler.plan(snap, facts("web/0"), 1000)
        assert bool(plan.pairs) == wanted == bool(plan.peers)


AUDITED = """meshpolicy: 1
segments:
  - name: s
    members: {workload: [web, api]}
    mode: {audit_until: 2031-01-01}
    allow: [{id: r, from: {workload: web}, to: {workload: api}, on: tcp/80}]
"""


def test_an_audit_opens_its_members_and_marks_what_is_only_recorded() -> None:
    other = placement("batch", "h2", 5)
    snap = snapshot([WEB, API, other], endpoints=[*ENDPOINTS, endpoint("h2")], policy=policy_record(AUDITED))
    plan = compile_plan_at(snap, 1_900_000_000)
    assert {(str(a), str(b)) for a, b in plan.pairs} == {("web/0", "api/0"), ("api/0", "web/0")}
    there, back = plan.pairs[WEB_KEY, API_KEY], plan.pairs[API_KEY, WEB_KEY]
    assert (str(there.ports), str(there.enforced)) == ("any", "tcp/80")
    assert (str(back.ports), str(back.enforced)) == ("any", "nothing")
    assert {p.endpoint for p in plan.peers.values()} == {"h1"}  # and no tunnel to anybody else
    after = compile_plan_at(snap, 1_924_992_000)
    assert [(str(p.ports), p.enforced) for p in after.pairs.values()] == [("tcp/80", None)]


BOUND = """meshpolicy: 1
segments:
  - name: s
    allow:
      - {id: r, from: {workload: web, process: "uid:7"}, to: {workload: api}, on: tcp/80}
      - {id: u, from: {workload: web, process: ["uid:8", "uid:9"]}, to: {workload: api}, on: tcp/81}
      - {id: f, from: {workload: web}, to: {workload: api}, on: tcp/82, max_rate: 8Mbit}
"""


@pytest.mark.parametrize("place", ["host", "netns", "far"])
def test_a_process_is_checked_where_it_runs_or_not_let_through(place: str) -> None:
    where = {"host": facts(host=["web/0"]), "netns": facts("web/0"), "far": facts("api/0")}[place]
    web, api = (placement("web", "h1", 1), placement("api", ME, 2)) if place == "far" else (WEB, API)
    plan = compile_plan(snapshot([web, api], endpoints=ENDPOINTS, policy=policy_record(BOUND)), where)
    pair = plan.pairs[WEB_KEY, API_KEY]
    assert str(pair.ports) == {"host": "tcp/80-82", "netns": "tcp/82", "far": "tcp/80-82"}[place]
    assert [(b.rule, b.max_rate, [str(p) for p in b.processes]) for b in pair.bounds] == [
        ("f", 1_000_000, []), *([("r", None, ["uid 7"]), ("u", None, ["uid 8", "uid 9"])] if place == "host" else [])
    ]  # fmt: skip
    assert len([n for n in plan.notes if n.code == "plan.process"]) == {"host": 0, "netns": 2, "far": 0}[place]


def test_a_group_that_is_not_known_here_gets_nothing() -> None:
    rule = replace(allow("web", "api", "tcp/80"), processes=(Process("cgroup", "system.slice/x.service"),))
    plan = compile_plan(snapshot([WEB, API], endpoints=ENDPOINTS), facts(host=["web/0"]), program=program(rule))
    assert plan.pairs == {}
    assert [n.code for n in plan.notes] == ["plan.process"]


WEB_KEY, API_KEY = InstanceKey("web/0"), InstanceKey("api/0")


def compile_plan_at(snap: Snapshot, now: int) -> Plan:
    return Compiler().plan(snap, facts("web/0"), now)


def test_a_policy_that_does_not_compile_raises_and_makes_no_plan() -> None:
    with pytest.raises(BadPolicy):
        Compiler().plan(snapshot([WEB, API], policy=policy_record("{nonsense")), facts("web/0"))


# ---- properties

WORKLOADS = ("web", "api", "db", "batch")
HOSTS = ("h0", "h1", "h2")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    who = st.one_of(st.sampled_from(WORKLOADS), st.just(ANYBODY), st.sampled_from(["a", "b"]).map(lambda v: labelled("tier", v)))
    words = st.sampled_from(["tcp/80", "tcp/80,443", "udp/1000-1020", "udp", "icmp", "any", "sctp/5", "47"])
    rules = []
    for n in range(draw(st.integers(0, 6))):
        rule = allow(draw(who), draw(who), draw(words), n=n)
        action = draw(st.sampled_from([Action.ALLOW, Action.ALLOW, Action.DENY]))
        rate = draw(st.none() | st.integers(1000, 1002)) if action is Action.ALLOW else None
        rules.append(replace(rule, action=action, audit=action is Action.DENY and draw(st.booleans()), max_rate=rate))
    one = st.one_of(st.sampled_from(WORKLOADS).map(lambda n: Named(frozenset({n}))), st.just(ANYBODY), st.just(labelled("tier", "a")))
    audits = [Audit("s", draw(one), 1 << 31, draw(st.none() | one)) for _ in range(draw(st.sampled_from([0, 0, 1, 2])))]
    return Program((Tier("t", tuple(rules)),), digest="d", audits=tuple(audits), held=draw(st.just(Nothing()) | one))


@st.composite
def worlds(draw: st.DrawFn) -> Snapshot:
    placements, prepares = [], []
    number = 0
    for name in WORKLOADS:
        labels = {"tier": draw(st.sampled_from(["a", "b"]))} if draw(st.booleans()) else {}
        for instance in range(draw(st.integers(0, 2))):
            number += 1
            where, epoch = draw(st.sampled_from(HOSTS)), draw(st.integers(1, 3))
            state = draw(st.sampled_from(["active", "active", "active", "revoked"]))
            address = draw(st.sampled_from([number, number, number, 1]))  # now and then one that is taken
            placements.append(placement(name, where, address, instance=instance, epoch=epoch, state=state, labels=labels))
            if draw(st.booleans()):
                prepares.append(placement(name, draw(st.sampled_from(HOSTS)), address, instance=instance,
                                          epoch=draw(st.integers(1, 4)), state="prepare", labels=labels))  # fmt: skip
    endpoints = [endpoint(h) for h in HOSTS if draw(st.integers(0, 9))]
    return snapshot(placements, prepares, endpoints)


def subject(snap: Snapshot, key: InstanceKey) -> Subject:
    record = snap.placements.get(key) or snap.prepares[key]
    return Subject(record.name, dict(record.labels), record.spiffe_id)


@settings(max_examples=200)
@given(programs(), worlds(), st.sets(st.sampled_from(WORKLOADS)))
def test_plan_and_evaluator_agree(prog: Program, snap: Snapshot, attached: set[str]) -> None:
    at = facts(*(f"{n}/{i}" for n in attached for i in (0, 1)))
    plan = compile_plan(snap, at, program=prog)
    # every element has a permitting rule, and every permission of a pair has its element
    probes = [(6, 80), (6, 443), (6, 81), (17, 1000), (17, 1020), (17, 1021), (132, 5), (132, 6), (1, None), (47, None), (50, None)]
    here = {k for k, a in plan.attachments.items() if a.state in {"active", "prepared"}}
    known = here | set(plan.remotes.values())
    for src in known:
        for dst in known:
            if src == dst or not {src, dst} & here:
                assert (src, dst) not in plan.pairs
                continue
            pair = plan.pairs.get((src, dst))
            for proto, port in probes:
                wanted = evaluate(prog, subject(snap, src), subject(snap, dst), proto, port).verdict == "allow"
                given_ = pair is not None and elements_of(pair.ports).allows(proto, port)
                assert given_ == wanted, (src, dst, proto, port)
                if pair is not None and wanted:
                    audited = evaluate(prog, subject(snap, src), subject(snap, dst), proto, port).audited
                    assert audited == (pair.enforced is not None and not pair.enforced.allows(proto, port))
    assert all({s, d} <= known and {s, d} & here for s, d in plan.pairs)


@settings(max_examples=200)
@given(programs(), worlds())
def test_invariants_of_every_plan(prog: Program, snap: Snapshot) -> None:
    at = facts(*(f"{n}/{i}" for n in WORKLOADS for i in (0, 1)))
    plan = compile_plan(snap, at, program=prog)
    # an address belongs to one peer, and never to a peer while it is ours
    owned = [ip for peer in plan.peers.values() for ip in peer.allowed_ips]
    assert len(owned) == len(set(owned))
    mine = {a for at_ in plan.active for a in at_.addresses}
    assert not mine & {ip.partition("/")[0] for ip in owned}
    assert {ip.partition("/")[0] for ip in owned} == set(plan.remotes)
    # nothing goes to our own key; a peer holds only what is placed there, at the highest epoch known
    assert tunnel_key(ME) not in plan.peers
    for peer in plan.peers.values():
        for ip in peer.allowed_ips:
            key = plan.remotes[ip.partition("/")[0]]
            record = snap.placements[key]
            assert (record.endpoint, record.state) == (peer.endpoint, "active")
            assert ip_address(ip.partition("/")[0]) in (plan.overlay.v4 if "." in ip else plan.overlay.v6)
    # no peer without a permitted pair between the two endpoints
    for peer in plan.peers.values():
        there = [k for k, r in (*snap.placements.items(), *snap.prepares.items()) if r.endpoint == peer.endpoint]
        ours = [k for k, r in (*snap.placements.items(), *snap.prepares.items()) if r.endpoint == ME]
        assert any(
            evaluate(prog, subject(snap, a), subject(snap, b), p, None).verdict == "allow"
            for x in ours for y in there if x != y for a, b in ((x, y), (y, x)) for p in (*PORTED, 1, 47, 50)
        )  # fmt: skip
    # an attachment is active only by the placement in force, prepared only by a newer one
    for key, attachment in plan.attachments.items():
        record = snap.placements.get(key)
        if attachment.state == "active":
            assert record is not None
            assert (record.endpoint, record.state, record.epoch) == (ME, "active", attachment.epoch)
        if attachment.state == "prepared":
            assert record is None or attachment.epoch > record.epoch


@given(programs(), worlds())
def test_classes_change_nothing(prog: Program, snap: Snapshot) -> None:
    from policy.evaluate import permitted

    classes = Classes(prog)
    for a, one in snap.placements.items():
        for b, other in snap.placements.items():
            assert classes.permitted(one, other) == permitted(prog, subject(snap, a), subject(snap, b))
    assert classes.count <= len(WORKLOADS) * 2


def test_a_class_is_made_of_all_selectors_of_the_program() -> None:
    rule = Rule("r", Action.ALLOW, ANYBODY, ANYBODY, ports("tcp/1"), concerns=labelled("tier", "a"))
    prog = Program((Tier("t", (rule,), isolates={"ingress": labelled("tier", "b")}),))
    classes = Classes(prog)
    seen = {classes.class_of(placement("x", "h0", 1, labels=labels)) for labels in ({}, {"tier": "a"}, {"tier": "b"})}
    assert len(seen) == 3
