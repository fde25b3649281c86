"""One flow, step by step, as this host sees it: names, policy, placement, tunnel, firewall, what was recorded.

Each host knows its own half. `join` puts the halves of both together; what is missing is said to be missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from identity.errors import BadInput, RetinueError
from identity.records import PlacementRecord
from policy.evaluate import evaluate
from policy.explain import conditions
from policy.ports import ICMP, ICMPV6, PORTED, proto_name, proto_number
from policy.program import Subject

if TYPE_CHECKING:
    from mesh.endpoint import Agent

OK, BAD, UNKNOWN = "ok", "no", "unknown"
SOURCE: Final = "source"
DESTINATION: Final = "destination"


def _step(name: str, result: str, text: str) -> dict[str, str]:
    return {"step": name, "result": result, "text": text}


def _placed(agent: Agent, name: str) -> PlacementRecord | None:
    placements = agent.in_force.view.snapshot.placements if agent.in_force else {}
    found = [r for key, r in sorted(placements.items()) if r.state == "active" and name in {r.name, key}]
    own = [r for r in found if r.endpoint == agent.enrollment.endpoint]
    return next(iter(own or found), None)


async def trace(agent: Agent, src: str, dst: str, proto: str, port: int | None) -> dict[str, Any]:
    """The half of this host. Raises BadInput for a protocol or port that does not exist."""
    number = proto_number(proto)
    if number in PORTED and port is not None and not 1 <= port <= 65535:
        raise BadInput("port.range", f"port out of range: {port}", hint="ports are 1 to 65535")
    me, now = agent.enrollment.endpoint, agent.in_force
    one, other = _placed(agent, src), _placed(agent, dst)
    steps = [_name(SOURCE, src, one), _name(DESTINATION, dst, other)]
    roles = [role for role, end in ((SOURCE, one), (DESTINATION, other)) if end is not None and end.endpoint == me]
    if now is None:
        steps.append(_step("state", BAD, "this agent has applied nothing yet"))
    else:
        revision = now.view.snapshot.policy.revision if now.view.snapshot.policy else None
        stale = agent.machine.age(_boottime())
        steps.append(_step("state", OK, f"revision {now.plan.revision} applied, policy revision {revision}, heartbeat "
                                        + ("never" if stale is None else f"{stale:.0f} s ago")))  # fmt: skip
    if one is not None and other is not None and now is not None:
        steps.append(_policy(agent, one, other, number, port))
        for role, end in ((SOURCE, one), (DESTINATION, other)):
            if end.endpoint == me:
                steps.append(_place(agent, role, end))
        far = [end.endpoint for end in (one, other) if end.endpoint != me]
        if roles and far:
            steps.append(await _tunnel(agent, far[0]))
        elif roles:
            steps.append(_step("tunnel", OK, "both ends are on this host: no tunnel"))
        if roles:
            steps.append(await _firewall(agent, one, other, number, port))
    steps.append(await _recorded(agent, one.name if one else src, other.name if other else dst, number, port))
    return {
        "host": me, "roles": roles, "src": src, "dst": dst, "proto": proto_name(number), "port": port, "steps": steps,
        "hosts": sorted({end.endpoint for end in (one, other) if end is not None}),
    }  # fmt: skip


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _name(role: str, name: str, found: PlacementRecord | None) -> dict[str, str]:
    if found is None:
        return _step(f"{role} name", UNKNOWN, f"{name} is not known here: policy lets nobody here talk with it, or it is not placed")
    text = f"{found.name}/{found.instance} has {' '.join(found.addresses)} on {found.endpoint}, epoch {found.epoch}"
    return _step(f"{role} name", OK, text)


def _policy(agent: Agent, one: PlacementRecord, other: PlacementRecord, proto: int, port: int | None) -> dict[str, str]:
    from mesh.compile import running

    assert agent.in_force is not None
    snapshot = agent.in_force.view.snapshot
    if snapshot.policy is None:
        return _step("policy", BAD, "no policy was published: nothing is permitted")
    program = agent.compiler.classes(snapshot.policy, int(time.time()), running(snapshot.placements)).program
    src, dst = (Subject(r.name, dict(r.labels), r.spiffe_id) for r in (one, other))
    decision = evaluate(program, src, dst, proto, port)
    ends = "".join(f"; {one}" for one in conditions(program, src, dst, proto, port))
    return _step("policy", OK if decision.allowed else BAD, f"{decision.verdict}: {decision.reason}{ends} (digest {decision.digest[:12]})")


def _place(agent: Agent, role: str, end: PlacementRecord) -> dict[str, str]:
    assert agent.in_force is not None
    key = f"{end.name}/{end.instance}"
    found = next((a for k, a in agent.in_force.plan.attachments.items() if k == key), None)
    if found is None:
        return _step(f"{role} place", BAD, f"{key} is placed here but not attached: retinue attach {end.name} ...")
    failed = found.key in agent.in_force.failed
    where = found.where
    good = found.active and not failed and (found.unit is None or found.unit.ident is not None)
    return _step(f"{role} place", OK if good else BAD, f"{key} is {found.state} in {where}: {'it could not be set up' if failed else found.why}")


async def _tunnel(agent: Agent, endpoint: str) -> dict[str, str]:
    assert agent.in_force is not None
    peer = next((p for p in agent.in_force.plan.peers.values() if p.endpoint == endpoint), None)
    if peer is None:
        return _step("tunnel", BAD, f"no tunnel to {endpoint}: nothing here may talk with it")
    try:
        counters = await agent.plane.counters()
    except RetinueError as e:
        return _step("tunnel", UNKNOWN, f"the device does not answer: {e.message}")
    state = counters.peers.get(peer.tunnel_key)
    if state is None:
        return _step("tunnel", BAD, f"the device does not have the peer {endpoint}")
    if not state.latest_handshake:
        return _step("tunnel", BAD, f"no handshake with {endpoint} yet, sending to {state.underlay or 'nowhere: it has to begin'}")
    old = time.time() - state.latest_handshake
    text = f"direct to {endpoint} at {state.underlay}, {state.cipher}, handshake {old:.0f} s ago, {state.rx_bytes} B in, {state.tx_bytes} B out"
    return _step("tunnel", OK if old < 180 else UNKNOWN, text + ("" if old < 180 else " (idle, or cut off since)"))


async def _firewall(agent: Agent, one: PlacementRecord, other: PlacementRecord, proto: int, port: int | None) -> dict[str, str]:
    found = {}
    for family, src, dst in zip((4, 6), one.addresses, other.addresses, strict=True):
        number = ICMPV6 if proto == ICMP and family == 6 else proto
        try:
            found[f"IPv{family}"] = await agent.plane.firewall.holds(src, dst, number, port)
        except RetinueError as e:
            return _step("firewall", UNKNOWN, e.message)
    text = ", ".join(f"{name}: {'set ' + where if where else 'no element'}" for name, where in found.items())
    return _step("firewall", OK if all(found.values()) else BAD, text)


async def _recorded(agent: Agent, src: str, dst: str, proto: int, port: int | None) -> dict[str, str]:
    records = [r for r in await agent.recorder.history(limit=100_000)
               if (r.src, r.dst, r.proto) == (src, dst, proto) and port in {r.port, None}]  # fmt: skip
    if not records:
        return _step("records", UNKNOWN, "this host has recorded no such flow")
    parts = []
    for verdict in ("allow", "audit", "deny"):
        mine = [r for r in records if r.verdict == verdict]
        if mine:
            last = max(mine, key=lambda r: r.time)
            parts.append(f"{verdict} by {last.by or 'unknown'} {sum(r.count for r in mine)} times, {sum(r.bytes for r in mine)} B, "
                         f"last {time.time() - last.time:.0f} s ago")  # fmt: skip
    return _step("records", OK, "; ".join(parts))


def join(halves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Both hosts' halves as one: the source's first, and what nobody has told."""
    ordered = sorted(halves, key=lambda h: (SOURCE not in h.get("roles", ()), str(h.get("host", ""))))
    told = {role for h in ordered for role in h.get("roles", ())}
    hosts = sorted({host for h in ordered for host in h.get("hosts", ())})
    missing = [
        f"the {role}'s host has not been asked: run `retinue trace` there, with -o json, and give the file with --far"
        for role in (SOURCE, DESTINATION)
        if role not in told
    ]
    steps = [s for h in ordered for s in h.get("steps", ())]
    result = BAD if any(s["result"] == BAD for s in steps) else UNKNOWN if missing or not steps else OK
    return {"result": result, "hosts": hosts, "halves": [dict(h) for h in ordered], "missing": missing}
