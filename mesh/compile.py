"""Verified state and local facts -> the plan of the data plane. Pure: no clock, no sockets, the same input the same plan.

Who may talk is decided by policy.evaluate alone, once for each pair of classes of subjects (mesh/verdicts.py), so the cost
does not grow with pairs of instances.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

from identity.records import EndpointRecord, PlacementRecord, PolicyRecord
from mesh.plan import (
    AES,
    CHACHA,
    AttachmentKind,
    AttachmentPlan,
    AttachmentState,
    Changes,
    Cipher,
    Note,
    Overlay,
    PairPlan,
    PeerPlan,
    Plan,
    UnitPlan,
    diff,
)
from mesh.snapshot import InstanceKey, Snapshot, instance_key
from mesh.verdicts import NO_VERDICT, Classes, Verdict
from policy.evaluate import Bound
from policy.ports import PortMap
from policy.program import Process, Program

if TYPE_CHECKING:
    from policy.rollout import Staged

__all__ = ["Changes", "Compiler", "LocalAttachment", "LocalFacts", "Plan", "compile_plan", "diff", "running", "veth_name"]

DEFAULT_MTU: Final = 1420  # 1500 less the outer IPv6 and WireGuard headers
KEEPALIVE: Final = 25  # seconds; below the usual NAT binding of 30 s
_PROGRAMS: Final = 4  # compiled policies kept


@dataclass(frozen=True, slots=True)
class LocalAttachment:
    """A place on this machine that was given to an instance.

    netns: a named namespace or a path, for kind netns. inode: its identity (mesh.netns.identify), so that two names of
    one namespace share one link; without it the name is the identity. device: the link of kind tap. unit: the control
    group of kind unit. groups: control groups of this machine by path, for rules that name one (kinds host and unit);
    a text says why that one is not believed.
    """

    kind: AttachmentKind
    netns: str | None = None
    inode: int | None = None
    device: str | None = None
    unit: UnitPlan | None = None
    groups: Mapping[str, UnitPlan | str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """What the endpoint knows about itself.

    held:   instances whose addresses were active here before; elsewhere now, they are `fenced`, not `waiting`
    fenced: instances withheld from the snapshot because it is too old to trust (mesh.sync.View)
    ended:  instances withheld because their end has come
    """

    endpoint: str
    tunnel_key: str
    interface: str = "rtn0"
    mtu: int = DEFAULT_MTU
    attachments: Mapping[InstanceKey, LocalAttachment] = field(default_factory=dict)
    held: frozenset[InstanceKey] = frozenset()
    fenced: frozenset[InstanceKey] = frozenset()
    ended: frozenset[InstanceKey] = frozenset()
    keepalive: int = KEEPALIVE


def veth_name(interface: str, place: LocalAttachment) -> str:
    """Name of the host side of the pair of a namespace: ``rt`` and 12 hex digits, the same after every restart."""
    identity = str(place.inode) if place.inode is not None else f"netns {place.netns}"
    return "rt" + hashlib.sha256(f"{interface}\0{identity}".encode()).hexdigest()[:12]


def _load(record: PolicyRecord) -> Staged:
    from policy.language import load
    from policy.rollout import Canary, Staged

    base, trial = load([(file.name, file.text) for file in record.files]), record.trial
    if trial is None:
        return Staged(base)
    canary = Canary.of(trial.names, trial.labels, everybody=trial.everybody)
    return Staged(base, load([(file.name, file.text) for file in trial.files]), canary)


@dataclass(slots=True)
class _Kept:
    """A loaded policy, its classes at one time, and the instant they change by themselves."""

    policy: Staged
    classes: Classes
    since: int | None
    until: int | None
    ends: frozenset[str]  # workloads with which grants end
    running: frozenset[str]  # those of them that ran

    def serves(self, now: int | None, running: Collection[str]) -> bool:
        if self.ends and self.running != self.ends.intersection(running):
            return False
        if now is None or self.since is None:
            return now is self.since
        return self.since <= now and (self.until is None or now < self.until)


class Compiler:
    """`compile_plan` with the compiled policies kept from call to call; the results are the same."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], _Kept] = OrderedDict()

    def classes(self, record: PolicyRecord, now: int | None = None, running: Collection[str] = ()) -> Classes:
        """The policy, compiled for `now` and the workloads that run. Raises BadPolicy."""
        return self._keep(record, now, running).classes

    def changes_at(self, record: PolicyRecord, now: int, running: Collection[str] = ()) -> int | None:
        """When a time window or an end in this policy next changes what it says; None for never. Raises BadPolicy."""
        return self._keep(record, now, running).until

    def _keep(self, record: PolicyRecord, now: int | None, running: Collection[str]) -> _Kept:
        trial = None if record.trial is None else record.trial.model_dump_json()
        key = (tuple((file.name, file.text) for file in record.files), trial)
        kept = self._kept.get(key)
        if kept is None or not kept.serves(now, running):
            policy = _load(record) if kept is None else kept.policy
            until = None if now is None else policy.next_change(now)
            ends = policy.ends
            there = ends.intersection(running)
            kept = self._kept[key] = _Kept(policy, Classes(policy.program(now, there)), now, until, ends, there)
            while len(self._kept) > _PROGRAMS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return kept

    def plan(self, snapshot: Snapshot, facts: LocalFacts, now: int | None = None) -> Plan:
        """The plan of this state at `now`. Raises BadPolicy for a policy that does not compile: the old plan stays."""
        classes = None if snapshot.policy is None else self.classes(snapshot.policy, now, running(snapshot.placements))
        return _Compilation(snapshot, facts, classes).run()


def running(placements: Mapping[InstanceKey, PlacementRecord]) -> frozenset[str]:
    """Workloads of which an instance is placed: those that have not ended."""
    return frozenset(record.name for record in placements.values() if record.state == "active")


def compile_plan(snapshot: Snapshot, facts: LocalFacts, *, program: Program | None = None) -> Plan:
    """The plan of this state; `program` instead of the snapshot's own policy. Raises BadPolicy."""
    if program is not None:
        return _Compilation(snapshot, facts, Classes(program)).run()
    return Compiler().plan(snapshot, facts)


class _Compilation:
    """One run: read the placements, pair ours with the others, collect peers, attachments and pairs."""

    def __init__(self, snapshot: Snapshot, facts: LocalFacts, classes: Classes | None) -> None:
        self.snapshot, self.facts, self.classes = snapshot, facts, classes
        self.overlay = Overlay.of(snapshot.trust_domain)
        self.notes: dict[Note, None] = {}
        self.endpoints = self._endpoints()
        self.active: dict[InstanceKey, PlacementRecord] = {}  # ours and others', refusable ones left out
        self.prepares: dict[InstanceKey, PlacementRecord] = {}
        self._sort_placements()

    def _note(self, code: str, text: str) -> None:
        self.notes[Note(code, text)] = None

    def _endpoints(self) -> dict[str, EndpointRecord]:
        """Endpoints a tunnel may lead to. One key is one endpoint; two that claim the same get none."""
        owners: dict[str, list[str]] = {}
        for name, record in self.snapshot.endpoints.items():
            owners.setdefault(record.tunnel_key, []).append(name)
        usable: dict[str, EndpointRecord] = {}
        for name, record in self.snapshot.endpoints.items():
            if name == self.facts.endpoint:
                continue
            if len(owners[record.tunnel_key]) > 1 or record.tunnel_key == self.facts.tunnel_key:
                self._note("plan.key_shared", f"the tunnel key of {name} belongs to another endpoint too; no tunnel")
                continue
            usable[name] = record
        return usable

    def _sort_placements(self) -> None:
        for key, record in self.snapshot.placements.items():
            if record.state == "active" and self._sound(key, record):
                self.active[key] = record
        for key, record in self.snapshot.prepares.items():
            current = self.snapshot.placements.get(key)
            if record.state != "prepare" or (current is not None and record.epoch <= current.epoch):
                continue  # a move that is over: the placement in force has overtaken it
            if self._sound(key, record):
                self.prepares[key] = record
        owners: dict[str, set[InstanceKey]] = {}
        for key, record in (*self.active.items(), *self.prepares.items()):
            for address in record.addresses:
                owners.setdefault(address, set()).add(key)
        for address, keys in owners.items():
            if len(keys) > 1:
                names = " and ".join(sorted(keys))
                self._note("plan.address_shared", f"{names} claim the address {address}; neither is served")
                for key in keys:
                    self.active.pop(key, None)
                    self.prepares.pop(key, None)

    def _sound(self, key: InstanceKey, record: PlacementRecord) -> bool:
        """Is the placement what its key says, inside the overlay, and does its endpoint have that tunnel key?"""
        if key != instance_key(record.name, record.instance):
            self._note("plan.key", f"the placement of {record.name} stands under {key}; ignored")
            return False
        if not in_overlay(tuple(record.addresses), self.overlay):
            self._note("plan.address", f"the addresses of {key} are not overlay addresses; ignored")
            return False
        if record.endpoint == self.facts.endpoint:
            if record.tunnel_key != self.facts.tunnel_key:
                self._note("plan.own_key", f"{key} is placed on an earlier tunnel key of this endpoint; not served yet")
                return False
            return True
        endpoint = self.endpoints.get(record.endpoint)
        if endpoint is not None and endpoint.tunnel_key != record.tunnel_key:
            self._note("plan.stale_key", f"{key} is placed on another tunnel key than {record.endpoint} has; not served")
            return False
        return True

    # ---- the run

    def run(self) -> Plan:
        me = self.facts.endpoint
        ours = {k: r for k, r in self.prepares.items() if r.endpoint == me}
        ours |= {k: r for k, r in self.active.items() if r.endpoint == me}
        others = {k: r for k, r in self.active.items() if r.endpoint != me}
        warming = {k: r for k, r in self.prepares.items() if r.endpoint != me}
        attachments = {key: self._attachment(key, place) for key, place in sorted(self.facts.attachments.items())}
        attached = {k for k, a in attachments.items() if a.state in {"prepared", "active"}}
        for at in attachments.values():
            if at.unit is not None and at.unit.ident is None and at.state != "waiting":
                self._note("plan.unit", f"the control group /{at.unit.path} of {at.key} is not there: is its unit running?")

        pairs: dict[tuple[InstanceKey, InstanceKey], PairPlan] = {}
        allowed: dict[str, set[InstanceKey]] = {}
        warm: set[str] = set()
        for key, record in ours.items():
            for other_key, other in others.items():
                if other_key == key:
                    continue
                there, back = self._verdict(record, other), self._verdict(other, record)
                if (not there and not back) or not self._usable(other, other_key):
                    continue
                allowed.setdefault(other.endpoint, set()).add(other_key)
                if key in attached:
                    self._pair(pairs, key, record, other_key, other, there)
                    self._pair(pairs, other_key, other, key, record, back)
            for other_key, other in warming.items():
                talks = other_key != key and (self._verdict(record, other) or self._verdict(other, record))
                if talks and other.endpoint in self.endpoints:
                    warm.add(other.endpoint)
            if key in attached:
                for other_key in attached:
                    if other_key != key:
                        self._pair(pairs, key, record, other_key, ours[other_key], self._verdict(record, ours[other_key]))
        peers = [self._peer(name, allowed.get(name, set()), others) for name in sorted(allowed.keys() | warm)]
        return Plan(
            overlay=self.overlay,
            interface=self.facts.interface,
            mtu=self.facts.mtu,
            peers={peer.tunnel_key: peer for peer in peers},
            attachments=attachments,
            pairs=pairs,
            remotes={a: k for keys in allowed.values() for k in sorted(keys) for a in others[k].addresses},
            notes=tuple(self.notes),
            timeline=self.snapshot.timeline,
            revision=self.snapshot.revision,
            policy_digest=self.snapshot.policy.digest if self.snapshot.policy is not None else "",
        )

    def _usable(self, other: PlacementRecord, key: InstanceKey) -> bool:
        if other.endpoint in self.endpoints:
            return True
        self._note("plan.no_endpoint", f"{key} is on {other.endpoint}, whose endpoint record is not here; no tunnel")
        return False

    def _verdict(self, src: PlacementRecord, dst: PlacementRecord) -> Verdict:
        return NO_VERDICT if self.classes is None else self.classes.verdict(src, dst)

    def _pair(
        self, pairs: dict[tuple[InstanceKey, InstanceKey], PairPlan], src_key: InstanceKey, src: PlacementRecord,
        dst_key: InstanceKey, dst: PlacementRecord, verdict: Verdict,
    ) -> None:  # fmt: skip
        ports, sure, limits = self._bounded(src_key, src, verdict)
        known = self._groups(src_key, limits) if limits else ()
        if ports:
            policy = self.snapshot.policy
            revision = f" (policy revision {policy.revision})" if policy is not None else ""
            pairs[src_key, dst_key] = PairPlan(
                src_key, dst_key, _both(src), _both(dst), ports, f"{src_key} may reach {dst_key}: {ports}{revision}",
                sure if sure != ports else None, limits, known,
            )  # fmt: skip

    def _bounded(
        self, key: InstanceKey, src: PlacementRecord, verdict: Verdict
    ) -> tuple[PortMap, PortMap, tuple[Bound, ...]]:
        """Forwarded, enforced, bounds. A process is checked where it runs, and there only if it can be."""
        ports, sure, kept = verdict.ports, verdict.enforced, []
        for bound in verdict.bounds:
            if bound.processes and src.endpoint != self.facts.endpoint:
                continue
            limit = replace(bound, ports=bound.ports & sure)
            if bound.processes:
                limit = replace(limit, processes=self._checkable(key, limit))
                if not limit.processes:
                    ports, sure = ports - limit.ports, sure - limit.ports
                    continue
            if limit.ports:
                kept.append(limit)
        return ports, sure, tuple(kept)

    def _checkable(self, key: InstanceKey, bound: Bound) -> tuple[Process, ...]:
        """Those of its processes that this host can tell from others, running or not."""
        place = self.facts.attachments.get(key)
        if place is None or place.kind not in {"host", "unit"}:
            self._note("plan.process", f"{key} cannot use {bound.ports} of rule {bound.rule}, which names a process: it is not in the host's own namespace")
            return ()
        kept = []
        for process in bound.processes:
            group = None if process.kind == "uid" else place.groups.get(process.value, "control groups are not known here")
            if isinstance(group, str):
                why = group
            elif group is not None and group.ident is None:
                why = "it is not there; is its unit running?"
            else:
                why = ""
            if why:
                self._note("plan.process", f"nobody in /{process.value} uses {bound.ports} of rule {bound.rule} as {key}: {why}")
            if not isinstance(group, str):
                kept.append(process)
        return tuple(kept)

    def _groups(self, key: InstanceKey, bounds: Iterable[Bound]) -> tuple[UnitPlan, ...]:
        """The control groups that bounds name, each once."""
        paths = sorted({p.value for bound in bounds for p in bound.processes if p.kind == "cgroup"})
        found = (self.facts.attachments[key].groups.get(path) for path in paths)
        return tuple(group for group in found if isinstance(group, UnitPlan))

    def _peer(self, name: str, instances: set[InstanceKey], others: Mapping[InstanceKey, PlacementRecord]) -> PeerPlan:
        record = self.endpoints[name]
        addresses = sorted(a for key in instances for a in others[key].addresses)
        shown = ", ".join(sorted(instances)[:3]) + (f" and {len(instances) - 3} more" if len(instances) > 3 else "")
        return PeerPlan(
            endpoint=name,
            tunnel_key=record.tunnel_key,
            underlay=self._underlay(record),
            allowed_ips=tuple(f"{a}/{128 if ':' in a else 32}" for a in addresses),
            keepalive=self.facts.keepalive,
            cipher=self._cipher(record),
            why=f"policy permits {shown}" if instances else "warm for a move that is being made ready",
        )

    def _underlay(self, record: EndpointRecord) -> str | None:
        for hint in record.underlay:
            address, _, port = hint.rpartition(":")
            try:
                parsed = ip_address(address.removeprefix("[").removesuffix("]"))
            except ValueError:
                parsed = None
            bracketed = address.startswith("[") and address.endswith("]")
            sound = parsed is not None and bracketed == isinstance(parsed, IPv6Address)
            sound = sound and not (isinstance(parsed, IPv6Address) and parsed in self.overlay.v6)
            if sound and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535:
                return hint
            self._note("plan.underlay", f"{record.endpoint} has an unusable underlay hint {ascii(hint)[:60]}")
        return None

    def _cipher(self, record: EndpointRecord) -> Cipher:
        """AES only when both *signed* records offer it: both ends decide from the same two records."""
        own = self.snapshot.endpoints.get(self.facts.endpoint)
        if own is not None and own.tunnel_key == self.facts.tunnel_key and AES in own.ciphers and AES in record.ciphers:
            return AES
        return CHACHA

    def _attachment(self, key: InstanceKey, place: LocalAttachment) -> AttachmentPlan:
        record = self.active.get(key)
        coming = self.prepares.get(key)
        state: AttachmentState
        if record is not None and record.endpoint == self.facts.endpoint:
            state, why = "active", f"placed here at epoch {record.epoch}"
        elif coming is not None and coming.endpoint == self.facts.endpoint:
            record, state, why = coming, "prepared", f"a move to here is being made ready, epoch {coming.epoch}"
        else:
            gone = self.snapshot.placements.get(key)
            state = "fenced" if key in self.facts.held | self.facts.fenced | self.facts.ended else "waiting"
            if key in self.facts.ended:
                why = "its end has come"
            elif key in self.facts.fenced:
                why = "the newest sign of life of the control plane is too old"
            elif gone is None:
                why = "no placement is known"
            elif gone.state == "revoked":
                why = f"revoked at epoch {gone.epoch}"
            elif gone.endpoint != self.facts.endpoint:
                why = f"placed on {gone.endpoint} at epoch {gone.epoch}"
            else:
                why = "its placement is not usable"
            record = None
        return AttachmentPlan(
            key=key,
            kind=place.kind,
            netns=place.netns,
            veth=veth_name(self.facts.interface, place) if place.kind == "netns" else place.device,
            state=state,
            epoch=None if record is None else record.epoch,
            addresses=() if record is None else _both(record),
            why=why,
            unit=place.unit,
        )


@lru_cache(maxsize=65_536)
def in_overlay(addresses: tuple[str, ...], overlay: Overlay) -> bool:
    """One IPv4 and one IPv6 overlay address, in this order and in canonical form."""
    try:
        v4, v6 = (ip_address(a) for a in addresses)
    except ValueError:
        return False
    inside = isinstance(v4, IPv4Address) and v4 in overlay.v4
    inside = inside and isinstance(v6, IPv6Address) and v6 in overlay.v6
    return inside and (str(v4), str(v6)) == addresses


def _both(record: PlacementRecord) -> tuple[str, str]:
    return record.addresses[0], record.addresses[1]
