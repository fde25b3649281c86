"""What the gateway believes and decides: the agent's signed state, verified here again, and the one evaluator over it.

Pure: no socket, no clock. A reply that does not verify changes nothing; the view before stays in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.config import Caller, Route
from identity.bundle import TrustBundle, open_bundle
from identity.errors import NotVerified
from identity.names import TrustDomain
from identity.records import EndpointRecord, ForeignBundle, PlacementRecord, PolicyRecord
from identity.wire.local import SnapshotReply
from mesh.compile import Compiler, running
from mesh.snapshot import InstanceKey, instance_key
from policy import foreign
from policy.evaluate import Decision, evaluate
from policy.ports import TCP
from policy.program import Subject
from policy.trust import PolicyTrust


@dataclass(frozen=True, slots=True)
class Pin:
    """What trust begins with: the domain and the SHA-256 of its root certificate (lower-case hex)."""

    trust_domain: TrustDomain
    root_fingerprint: str


@dataclass(frozen=True, slots=True)
class View:
    """Verified state at one position. `placements` are the active ones only; `foreign` are the bundles of the trust
    domains that ours federates with, by name, and `sequences` the highest of each that was ever seen.
    """

    endpoint: str
    trust: TrustBundle
    timeline: str = ""
    revision: int = 0
    tunnel_key: str = ""
    policy: PolicyRecord | None = None
    compiler: Compiler = field(default_factory=Compiler, repr=False, compare=False)
    placements: Mapping[InstanceKey, PlacementRecord] = field(default_factory=dict)
    epochs: Mapping[InstanceKey, int] = field(default_factory=dict)
    policy_trust: PolicyTrust | None = field(default=None, repr=False, compare=False)
    foreign: Mapping[str, ForeignBundle] = field(default_factory=dict)
    sequences: Mapping[str, int] = field(default_factory=dict)

    def changes_at(self, now: float) -> int | None:
        """When a time window next changes what the policy says, seconds since the epoch; None for never."""
        return None if self.policy is None else self.compiler.changes_at(self.policy, int(now), running(self.placements))

    def instances(self, workload: str) -> list[PlacementRecord]:
        """Active placements of a workload, by instance."""
        return sorted((p for p in self.placements.values() if p.name == workload), key=lambda p: p.instance)


def verify_reply(reply: SnapshotReply, endpoint: str, pin: Pin, before: View | None, now: float) -> View:
    """Check every envelope of a local reply down to the pinned root. Raises NotVerified or BadPolicy.

    Epochs never go back from one view to the next, whatever the agent says.
    """
    if reply.trust_domain != pin.trust_domain.name:
        raise NotVerified("gateway.trust_domain", f"the agent belongs to {ascii(reply.trust_domain)[:80]}, not to {pin.trust_domain}")
    if "bundle" not in reply.objects:
        raise NotVerified("gateway.no_bundle", "the agent holds no trust bundle yet")
    envelope = reply.objects["bundle"]
    if before is None:
        trust = open_bundle(envelope, pin.root_fingerprint, pin.trust_domain, now)
    else:
        trust = before.trust if envelope == before.trust.envelope else before.trust.accept_next(envelope, now)
    policy = trust.verify(PolicyRecord, reply.objects["policy"]) if "policy" in reply.objects else None
    known = before.policy_trust if before is not None and before.policy_trust is not None else PolicyTrust(pin.trust_domain.name)
    if policy is not None:
        known.check(policy)  # the operators' signatures, where there is a policy authority: as the agent did
    elif known.authority is not None:
        raise NotVerified("policy.missing", "the agent shows no policy any more, and an authority is known")
    epochs = dict(before.epochs) if before is not None else {}
    placements: dict[InstanceKey, PlacementRecord] = {}
    bundles: dict[str, ForeignBundle] = {}
    sequences = dict(before.sequences) if before is not None else {}
    for key, text in reply.objects.items():
        if key.startswith("federation/"):
            one = _foreign_bundle(trust, key, text, sequences)
            bundles[one.foreign], sequences[one.foreign] = one, one.sequence
            continue
        if not key.startswith("placement/"):
            continue
        record = trust.verify(PlacementRecord, text)
        instance = instance_key(record.name, record.instance)
        if key != f"placement/{instance}":
            raise NotVerified("record.key", "a placement stands under another object's key")
        if record.epoch < epochs.get(instance, 0):
            raise NotVerified("placement.epoch", f"epoch {record.epoch} of {instance} is behind {epochs[instance]}")
        epochs[instance] = record.epoch
        if record.state == "active":
            placements[instance] = record
    own = reply.objects.get(f"endpoint/{endpoint}")
    tunnel_key = trust.verify(EndpointRecord, own).tunnel_key if own is not None else ""
    compiler = before.compiler if before is not None else Compiler()
    if policy is not None:
        compiler.classes(policy, int(now), running(placements))
        known.note(policy)
    return View(
        endpoint, trust, reply.timeline or "", reply.revision or 0, tunnel_key, policy, compiler, placements, epochs, known,
        bundles, sequences,
    )  # fmt: skip


def _foreign_bundle(trust: TrustBundle, key: str, text: str, sequences: Mapping[str, int]) -> ForeignBundle:
    one = trust.verify(ForeignBundle, text)
    if key != f"federation/{one.foreign}":
        raise NotVerified("record.key", "a foreign bundle stands under another object's key")
    if TrustDomain(one.foreign) == trust.trust_domain:
        raise NotVerified("federation.own", "a foreign bundle of our own trust domain")
    if one.sequence < sequences.get(one.foreign, 0):
        raise NotVerified("federation.sequence", f"sequence {one.sequence} of {one.foreign} is behind {sequences[one.foreign]}")
    return one


@dataclass(frozen=True, slots=True)
class Ruling:
    """May this caller use this route now?

    code:    ``ok``; ``policy`` (the evaluator said no); ``unplaced`` (the caller is not placed on this endpoint);
             ``unknown`` (the destination is not in this endpoint's scope, so no rule permits it)
    source:  the caller's placement; its addresses are what we speak from
    targets: placements of the destination that may be used, in order
    asked:   of whom the decision speaks: the caller, or the foreign identity that it stands in for
    """

    code: Literal["ok", "policy", "unplaced", "unknown"]
    reason: str
    decision: Decision | None = None
    source: PlacementRecord | None = None
    targets: tuple[PlacementRecord, ...] = ()
    asked: str = ""

    @property
    def allowed(self) -> bool:
        return self.code == "ok"

    @property
    def rule(self) -> str | None:
        """Id of the deciding rule."""
        return self.decision.rule.id if self.decision is not None and self.decision.rule is not None else None

    @property
    def where(self) -> str | None:
        """``file:line`` of the deciding rule."""
        rule = self.decision.rule if self.decision is not None else None
        return str(rule.where) if rule is not None and rule.where is not None else None


def subject(record: PlacementRecord) -> Subject:
    """The policy subject of a placement: its certified name and labels, nothing the caller said."""
    return Subject(record.name, dict(record.labels), record.spiffe_id)


def rule_on(view: View, caller: Caller, route: Route, now: float, spiffe_id: str | None = None) -> Ruling:
    """Decide at `now` (seconds since the epoch). An outside caller is the registered workload placed on this endpoint, and nothing else.

    spiffe_id: of a foreign identity, for which that workload only stands in: policy must permit both of them.
    """
    source = view.placements.get(instance_key(caller.workload, caller.instance))
    if source is None or source.endpoint != view.endpoint or (view.tunnel_key and source.tunnel_key != view.tunnel_key):
        where = "not placed anywhere that this gateway knows of" if source is None else f"placed on {source.endpoint}"
        return Ruling("unplaced", f"{caller.workload} is {where}, so this gateway cannot speak for it")
    targets = view.instances(route.workload)
    if not targets or view.policy is None:
        who = spiffe_id or caller.workload
        return Ruling("unknown", f"no rule permits {who} -> {route.workload} tcp/{route.port}", source=source, asked=who)
    program = view.compiler.classes(view.policy, int(now), running(view.placements)).program
    asking = [subject(source)] if spiffe_id is None else [foreign.subject(spiffe_id), subject(source)]
    first: tuple[Decision, Subject] | None = None
    allowed: list[PlacementRecord] = []
    for target in targets:
        decisions = [(evaluate(program, one, subject(target), TCP, route.port), one) for one in asking]
        denied = next((d for d in decisions if not d[0].allowed), None)
        if denied is None:
            allowed.append(target)
            first = decisions[0] if len(allowed) == 1 else first
        elif first is None:
            first = denied
    assert first is not None
    return Ruling("ok" if allowed else "policy", first[0].reason, first[0], source, tuple(allowed), first[1].name)


def refusal(
    ruling: Ruling, route: Route, view: View, *, full: bool, explained: Mapping[str, Any] | None = None, spiffe_id: str | None = None
) -> dict[str, Any]:
    """The body of a 403, for people and programs. `explained`: the agent's answer to ``explain``, when it gave one;
    `spiffe_id`: of a foreign caller.
    """
    code = "gateway.unplaced" if ruling.code == "unplaced" else "gateway.denied"
    if not full:
        return {"error": {"code": code, "message": "policy does not permit this request"}, "verdict": "deny"}
    said = dict(explained or {})
    reason = str(said.get("reason") or ruling.reason)
    body: dict[str, Any] = {
        "error": {"code": code, "message": reason},
        "verdict": "deny",
        "caller": spiffe_id or (ruling.source.spiffe_id if ruling.source is not None else None),
        "destination": route.workload,
        "port": f"tcp/{route.port}",
        "rule": ruling.rule if ruling.rule is not None else said.get("rule"),
        "where": ruling.where if ruling.where is not None else said.get("where"),
        "reason": reason,
        "smallest_change": said.get("smallest_change"),
        "policy_digest": view.policy.digest if view.policy is not None else None,
    }
    if ruling.code == "unplaced":
        body["error"]["hint"] = f"retinue-ca workload move NAME --to {view.endpoint}"
    return body


def refusal_text(body: Mapping[str, Any]) -> str:
    """The same for a person: lines of ``name: value``."""
    lines = [f"denied: {body['error']['message']}"]
    lines += [f"{name}: {body[name]}" for name in ("caller", "destination", "port", "rule", "where") if body.get(name)]
    if body.get("verdict") == "deny" and "rule" in body and not body["rule"] and body["error"]["code"] == "gateway.denied":
        lines.append("rule: none (default deny)")
    if body.get("smallest_change"):
        lines.append(f"smallest change: {body['smallest_change']}")
    return "\n".join(lines) + "\n"
