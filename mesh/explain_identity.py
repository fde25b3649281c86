"""Why an instance has its identity on this host, or has not: placement, place, registration entries, certificate, fences.

With a process it is about that process: which entry's selectors hold for it, and which do not.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from identity import certs
from identity.entries import Entry, Facts, describe, holds, judge
from identity.errors import NotFound, RetinueError
from identity.names import SpiffeId
from identity.records import PlacementRecord
from identity.wire.explain import CertificateShown, EntryExplained, IdentityExplained, SelectorFinding, State
from mesh.attestation import Caller, own_namespace
from mesh.identities import attached_at, identities, instance_order, placed_here
from mesh.process_facts import credentials, facts_of
from mesh.snapshot import InstanceKey, instance_key

if TYPE_CHECKING:
    from mesh.endpoint import Agent, InForce


def explain_identity(agent: Agent, name: str, instance: int, pid: int | None = None) -> IdentityExplained:
    """Raises BadInput for a bad name, NotFound ``explain.process`` for a process that is not there, NotAttested."""
    spiffe_id = str(SpiffeId.workload(agent.enrollment.trust_domain, name))
    key, me, now = instance_key(name, instance), agent.enrollment.endpoint, agent.in_force
    if now is None:
        return IdentityExplained(
            name=name, instance=instance, spiffe_id=spiffe_id, asked=me, holds=False, state="unknown",
            reason="the agent has not applied any state yet",
        )  # fmt: skip
    record = agent.machine.placement(key)
    entries = [e for e in now.view.snapshot.entries if e.name == name]
    facts = None if pid is None else process(agent, now, pid)
    shown = [explained(e, record, facts) for e in entries]
    held, state, reason, proof = _decide(agent, now, key, record, entries)
    if held and pid is not None:
        held, reason, proof = _of_process(agent, key, pid, shown)
    return IdentityExplained(
        name=name, instance=instance, spiffe_id=spiffe_id, asked=me, holds=held, reason=reason, proof=proof, state=state,
        holder=None if record is None or record.state == "revoked" else record.endpoint,
        epoch=None if record is None else record.epoch, since=None if record is None else record.issued,
        ends=None if record is None else record.ends, fence=None if record is None else record.fence,
        labels={} if record is None else dict(record.labels), certificate=_certificate(agent, key), entries=shown,
        fences=_fences(agent, now, key),
    )  # fmt: skip


def _decide(
    agent: Agent, now: InForce, key: InstanceKey, record: PlacementRecord | None, entries: list[Entry]
) -> tuple[bool, State, str, list[str]]:
    """(holds, state, reason, proof) of the endpoint."""
    me = agent.enrollment.endpoint
    at = now.plan.attachments.get(key)
    proof = [f"enrolled as {agent.enrollment.spiffe_id}, certificate {agent.enrollment.svid.serial:x}"]
    if record is None:
        return False, "unknown", f"no placement of {key} is known here: it does not exist, or policy lets none of ours talk with it", []
    proof.append(f"placement signed by the CA: {record.state} on {record.endpoint} at epoch {record.epoch}")
    if key in now.view.ended:
        return False, "fenced", "its end has come", proof
    if key in now.view.fenced:
        return False, "fenced", "the newest sign of life of the CA is too old, and it is fenced", proof
    if record.state == "revoked":
        return False, "revoked", f"it was revoked, moved away or has ended, at epoch {record.epoch}", proof
    if record.endpoint != me:
        return False, "active", f"{record.endpoint} holds it, not {me}", proof
    if key not in placed_here(agent, now):
        return False, "waiting", "it is placed on an earlier tunnel key of this endpoint", proof
    if key in now.failed:
        return False, "waiting", "its place could not be set up; see: retinue status", proof
    ways = []
    if at is not None and at.active:
        ways.append(f"attached here: {at.where}")
        proof.append(f"attachment of kind {at.kind}, {at.where}")
    if entries:
        ways.append(f"{len(entries)} registration entries tell its processes")
        proof += [f"entry {e.id}: {describe(e.selectors)}" for e in entries]
    if not ways:
        return False, "waiting", f"it is placed here, and nothing is attached for it: retinue attach {record.name}", proof
    return True, "active", f"placed here at epoch {record.epoch}; {'; '.join(ways)}", proof


def _of_process(agent: Agent, key: InstanceKey, pid: int, shown: list[EntryExplained]) -> tuple[bool, str, list[str]]:
    with_it = caller_of(pid)
    try:
        given = {one.key: one for one in identities(agent, with_it, own_namespace())}
    except RetinueError as e:
        return False, f"process {pid} is given nothing: {e.message}{_keeps_out(agent, key)}", []
    finally:
        with_it.close()
    one = given.get(key)
    if one is None:
        failed = [f"{e.id}: {f.selector}" for e in shown for f in e.findings if not f.ok]
        why = f"no entry holds ({', '.join(failed)})" if shown else "it is not in the network namespace of the instance"
        return False, f"process {pid} is not given it: {why}{_keeps_out(agent, key)}", []
    how = f"entry {one.entry} holds" if one.entry else "it is in the network namespace of the instance"
    return True, f"process {pid} is given it: {how}", [how, f"hint {one.hint}"]


def caller_of(pid: int) -> Caller:
    """A process as if it had connected. Raises NotFound ``explain.process``."""
    try:
        fd = os.pidfd_open(pid)
        uid, gid, _ = credentials(pid)
    except (OSError, RetinueError, OverflowError):
        raise NotFound("explain.process", f"there is no process {pid}") from None
    return Caller(pid, uid, gid, fd)


def process(agent: Agent, now: InForce, pid: int) -> Facts:
    """The facts of a process. Raises NotFound, NotAttested."""
    caller = caller_of(pid)
    try:
        with caller.namespace() as space:
            inside = attached_at(agent, now, caller, space, own_namespace())
            return facts_of(caller, frozenset(instance_order(k)[0] for k in inside), program=True, digest=True)
    finally:
        caller.close()


def explained(entry: Entry, record: PlacementRecord | None, facts: Facts | None) -> EntryExplained:
    """One entry, held against a process when there is one."""
    labels_ok = record is not None and entry.labels.items() <= record.labels.items()
    found = () if facts is None else judge(entry.selectors, facts)
    return EntryExplained(
        id=entry.id, selectors=describe(entry.selectors), labels_ok=labels_ok, ends=entry.ends,
        holds=None if facts is None else labels_ok and holds(entry.selectors, facts),
        findings=[SelectorFinding(selector=f.selector, wanted=f.wanted, found=f.found, ok=f.ok) for f in found],
    )  # fmt: skip


def _certificate(agent: Agent, key: InstanceKey) -> CertificateShown | None:
    held = agent.svids.shown(key)
    if held is None:
        return None
    leaf = held.svid
    return CertificateShown(
        serial=f"{leaf.serial:x}", issuer=certs.revocation_id(leaf.leaf).issuer, not_before=leaf.not_before,
        not_after=leaf.not_after, renew_at=int(held.renew_at),
    )  # fmt: skip


def _ended(agent: Agent, name: str) -> list[Entry]:
    """Entries of a workload that give nothing any more."""
    now = agent.in_force
    return [e for e in agent.machine.entries if e.name == name and now is not None and e not in now.view.snapshot.entries]


def _keeps_out(agent: Agent, key: InstanceKey) -> str:
    ended = ", ".join(e.id for e in _ended(agent, instance_order(key)[0]))
    return f"; entry {ended} has ended, and keeps others out until it is deleted" if ended else ""


def _fences(agent: Agent, now: InForce, key: InstanceKey) -> list[str]:
    """What keeps others, or an earlier holder, from it."""
    out = [
        f"entry {e.id} ended{'' if e.ends is None else f' {_when(e.ends)}'}: it gives nothing, and keeps others out until it is deleted"
        for e in _ended(agent, instance_order(key)[0])
    ]
    mark = agent.machine.marks.get(key)
    if mark is not None:
        out.append(f"epochs below {mark.number} are refused here for ever")
    if key in now.view.fenced:
        out.append("fenced: no sign of life of the CA")
    if key in now.view.ended:
        out.append("fenced: its end has come")
    refused = agent.machine.refused.get(f"placement/{key}")
    if refused is not None:
        out.append(f"a newer placement was refused: {refused.message}")
    return out


def lines(found: IdentityExplained) -> list[str]:
    """For people."""
    out = [f"{'HELD' if found.holds else 'NOT HELD'}  {found.spiffe_id} instance {found.instance}, says {found.asked}", f"  because  {found.reason}"]
    out += [f"  proof    {text}" for text in found.proof]
    if found.holder is not None:
        out.append(f"  holder   {found.holder}")
    if found.epoch is not None:
        since = f" since {_when(found.since)}" if found.since is not None else ""
        out.append(f"  epoch    {found.epoch}{since}, fence {found.fence}")
    ends = " or ".join(t for t in (found.ends and _when(found.ends), found.ends_with and f"with {found.ends_with}") if t)
    out.append(f"  until    {ends or 'it is moved or revoked'}")
    if found.certificate is not None:
        c = found.certificate
        renewal = f", renewed about {_when(c.renew_at)}" if c.renew_at is not None else ""
        out.append(f"  cert     serial {c.serial}, issuer {c.issuer}, until {_when(c.not_after)}{renewal}")
    for e in found.entries:
        verdict = "" if e.holds is None else "  holds" if e.holds else "  does not hold"
        out.append(f"  entry    {e.id}  {e.selectors}{verdict}{'' if e.labels_ok else '  (its labels are not the placement’s)'}")
        out += [f"             {f.selector}: wanted {f.wanted}, found {f.found}" for f in e.findings if not f.ok]
    return out + [f"  fence    {text}" for text in found.fences]


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
