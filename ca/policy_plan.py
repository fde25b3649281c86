"""`plan`: one report of what a policy would do, before anybody signs or publishes it: tests, lints, difference, replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ca import flow_store, policy_authority, rows
from ca.policies import NO_POLICY, Files, difference_of, newest, subjects
from identity.errors import BadPolicy, NotVerified
from identity.wire.policy import PlanReply
from policy.compile import compile_policy
from policy.evaluate import show_flow
from policy.language import load
from policy.lint import Flow, lint
from policy.replay import Replayed, replay
from policy.signing import verify_bundle
from policy.test import run_tests
from policy.windows import DAY

if TYPE_CHECKING:
    from ca.plane import Plane

REPLAY: Final = 30 * DAY
SHOWN: Final = 50


def make_plan(plane: Plane, files: Files, parts: Sequence[str], budget: int, now: int) -> PlanReply:
    """Judge a policy against the workloads there are and the flows of the last 30 days. Raises BadPolicy."""
    policy = load(files)
    with plane.store.read() as tx:
        authority = policy_authority.load(tx, str(plane.trust_domain))
        current = newest(tx)
        known = subjects(rows.instances(tx))
        recorded = flow_store.recording(tx, now, now - REPLAY)
    signed = ""
    if authority is not None:
        try:
            verify_bundle(authority, files, parts, plane.policies.marks(authority, current))
        except (NotVerified, BadPolicy) as error:
            signed = error.message
    everybody = list(known.values())
    program = compile_policy(policy, now, known)
    before = compile_policy(current.staged().base, now, known) if current is not None else NO_POLICY
    tests = run_tests(policy, program, everybody, known, recorded)
    flows = [Flow(src, dst, proto, port, seen.last) for (src, dst, proto, port), seen in recorded.edges.items()]
    lints = lint(policy, everybody, now, flows or None)
    gained, lost = difference_of(before, program, everybody)
    found = replay(compile_policy(policy, now, known, audit=False), recorded.edges, everybody, before if current else None)
    good = all(t.passed for t in tests) and not any(f.severity == "error" for f in lints) and len(found.broken) <= budget
    return PlanReply(
        good=good, digest=policy.digest, signed=signed,
        tests=[{"where": str(t.where), "passed": t.passed, "message": t.message, "covers": t.covers} for t in tests],
        lints=[{"code": f.code, "severity": f.severity, "where": str(f.where or ""), "message": f.message, "fix": f.fix} for f in lints],
        gained=gained, lost=lost, replayed=replayed_json(found, budget),
    )  # fmt: skip


def replayed_json(found: Replayed, budget: int) -> dict[str, Any]:
    """A replay as data; at most SHOWN flows are named."""
    return {
        "flows": found.flows, "unknown": found.unknown, "broken": len(found.broken), "budget": budget, "first": found.first,
        "last": found.last,
        "denied": [
            {
                "src": b.edge[0], "dst": b.edge[1], "flow": show_flow(b.edge[2], b.edge[3]), "count": b.seen.count,
                "last": b.seen.last, "by": b.decision.by, "reason": b.decision.reason,
            }
            for b in found.broken[:SHOWN]
        ],
    }  # fmt: skip
