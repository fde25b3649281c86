"""The verified state an endpoint acts on: a value, made only by verification (mesh/sync.py), read by everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import NewType

from identity.entries import Entry
from identity.records import EndpointRecord, ForeignBundle, PlacementRecord, PolicyRecord

InstanceKey = NewType("InstanceKey", str)  # "<workload>/<instance>", e.g. "shop/api/0"


def instance_key(name: str, instance: int) -> InstanceKey:
    """The key of one instance, as used in feed object keys and reports."""
    return InstanceKey(f"{name}/{instance}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything verified at one position of the feed.

    `placements` holds state active or revoked, the highest epoch of each instance; `prepares` the moves that are being
    made ready (nothing is accepted from their endpoint yet). `policy` is None when no policy was ever published: then
    nothing is permitted. `ruled`: workloads with a registration entry here, ended ones included: no namespace gives them.
    """

    trust_domain: str
    timeline: str = ""
    revision: int = 0
    policy: PolicyRecord | None = None
    placements: Mapping[InstanceKey, PlacementRecord] = field(default_factory=dict)
    prepares: Mapping[InstanceKey, PlacementRecord] = field(default_factory=dict)
    endpoints: Mapping[str, EndpointRecord] = field(default_factory=dict)
    state_hash: str = ""
    entries: tuple[Entry, ...] = ()
    ruled: frozenset[str] = frozenset()
    foreign: tuple[ForeignBundle, ...] = ()


def addresses(record: PlacementRecord) -> tuple[IPv4Address, IPv6Address]:
    """Overlay addresses of a placement."""
    return IPv4Address(record.addresses[0]), IPv6Address(record.addresses[1])
