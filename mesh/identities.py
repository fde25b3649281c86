"""Which identities a process of this machine is given: by registration entries, and by the namespace it is in.

    a workload with an entry here     the processes that an entry's selectors hold for; the instance has to be placed here.
                                      An entry whose end has come gives nothing and still makes this the rule
    any other workload                what its network namespace is attached for (a sidecar: its own; kind host: root only;
                                      kind unit: the processes of the control group)

The most specific entry comes first and is the default identity; what the namespace gives follows in the order of instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from identity.entries import Entry, Facts, holds, weight
from identity.errors import NotFound, Refused, Unreachable
from identity.records import ForeignBundle, PlacementRecord
from identity.wire.local import InstanceRef, SvidFiles
from mesh.attestation import Caller, NamespaceId
from mesh.process_facts import facts_of
from mesh.snapshot import InstanceKey

if TYPE_CHECKING:
    from mesh.endpoint import Agent, InForce
    from mesh.plan import AttachmentPlan


@dataclass(frozen=True, slots=True)
class Given:
    """One identity of a caller. `entry` is the id of the entry that gave it, None for the namespace."""

    key: InstanceKey
    hint: str
    entry: str | None = None


def instance_order(key: InstanceKey) -> tuple[str, int]:
    """Sort key: by workload, then by number."""
    name, _, number = key.rpartition("/")
    return name, int(number)


def placed_here(agent: Agent, now: InForce) -> dict[InstanceKey, PlacementRecord]:
    """Instances that are placed on this endpoint and its present key, attached or not."""
    mine = (agent.enrollment.endpoint, agent.enrollment.tunnel_public)
    found = now.view.snapshot.placements.items()
    return {key: p for key, p in found if p.state == "active" and (p.endpoint, p.tunnel_key) == mine}


def identities(agent: Agent, caller: Caller, own: NamespaceId) -> tuple[Given, ...]:
    """What the caller has now, the default first, hints unique; `own` is the agent's namespace.

    Raises NotAttested, Unreachable before the agent knows, and Refused ``workload.nobody`` when there is nothing.
    """
    now = agent.in_force
    if now is None:
        raise Unreachable("workload.starting", "the agent has not applied any state yet")
    entries = now.view.snapshot.entries
    with caller.namespace() as space:
        inside = attached_at(agent, now, caller, space, own)
        facts = known_facts(caller, entries, inside) if entries else None
    given = [] if facts is None else by_entries(agent, now, entries, facts)
    ruled = now.view.snapshot.ruled
    given += [Given(key, key) for key in sorted(inside, key=instance_order) if instance_order(key)[0] not in ruled]
    if not given:
        why = "no instance is active in the network namespace of the calling process"
        raise Refused("workload.nobody", f"{why}, and no registration entry holds for it" if ruled else why)
    return unique(given)


def attached_at(agent: Agent, now: InForce, caller: Caller, space: NamespaceId, own: NamespaceId) -> frozenset[InstanceKey]:
    """Active instances whose place is this namespace; those of the host itself are for root, a unit's for its processes."""
    at_home = space == own and (agent.enrollment.kind == "sidecar" or caller.uid == 0)

    def at(place: AttachmentPlan) -> bool:
        if place.kind == "host":
            return at_home
        if place.kind == "unit":
            return space == own and agent.attachments.is_member(place.key, caller)
        return agent.attachments.is_at(place.key, space)

    return frozenset(place.key for place in now.plan.active if place.key not in now.failed and at(place))


def known_facts(caller: Caller, entries: tuple[Entry, ...], inside: frozenset[InstanceKey]) -> Facts:
    """The facts that these entries ask for. Raises NotAttested."""
    return facts_of(
        caller, frozenset(instance_order(key)[0] for key in inside),
        program=any(e.selectors.path is not None for e in entries), digest=any(e.selectors.sha256 is not None for e in entries),
    )  # fmt: skip


def by_entries(agent: Agent, now: InForce, entries: tuple[Entry, ...], facts: Facts) -> list[Given]:
    """What the entries give, the most specific first."""
    here = placed_here(agent, now)
    out: dict[InstanceKey, Given] = {}
    for entry in sorted(entries, key=lambda e: (*(-n for n in weight(e.selectors)), e.name, e.id)):
        if not holds(entry.selectors, facts):
            continue
        for key in sorted(here, key=instance_order):
            record = here[key]
            if record.name == entry.name and key not in now.failed and entry.labels.items() <= record.labels.items():
                out.setdefault(key, Given(key, entry.hint or key, entry.id))
    return list(out.values())


def unique(given: list[Given]) -> tuple[Given, ...]:
    """The same with hints that differ: who comes later is called by its instance."""
    seen: set[str] = set()
    out = []
    for one in given:
        hint = one.hint if one.hint not in seen else str(one.key)
        seen.add(hint)
        out.append(Given(one.key, hint, one.entry))
    return tuple(out)


def check_given(agent: Agent, given: Given) -> None:
    """Is what was given still placed here? Raises Refused ``svid.inactive``."""
    if agent.in_force is None or given.key not in placed_here(agent, agent.in_force):
        raise Refused("svid.inactive", f"{given.key} is not placed here any more")


def foreign_bundles(agent: Agent) -> Sequence[ForeignBundle]:
    """Verified bundles of the trust domains that ours federates with; without those that have revoked everything."""
    return [] if agent.in_force is None else [f for f in agent.in_force.view.snapshot.foreign if f.roots]


async def svid_of_given(agent: Agent, given: Given) -> SvidFiles:
    """Certificate and key of an identity that was given. Raises NotFound, Refused, or what the CA answered."""
    from mesh.local_api import svid_of

    name, number = instance_order(given.key)
    if given.entry is None:
        return await svid_of(agent, InstanceRef(name=name, instance=number))
    check_given(agent, given)
    files = await agent.svids.get(name, number)
    try:
        check_given(agent, given)
    except (NotFound, Refused):
        agent.svids.drop(given.key)
        raise
    return files
