"""Builders of small verified worlds for the tests of compile, firewall, layout and devices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from identity.keys import b64
from identity.names import TrustDomain
from identity.records import EndpointRecord, PlacementRecord, PolicyFile, PolicyRecord
from mesh.compile import LocalAttachment, LocalFacts
from mesh.plan import UnitPlan
from mesh.snapshot import InstanceKey, Snapshot
from policy.ports import PortMap, parse_ports, union
from policy.program import Action, Everything, In, Named, Program, Rule, Selector, Tier

TD = TrustDomain("unit.test")
ME = "h0"


def tunnel_key(endpoint: str) -> str:
    return b64(hashlib.sha256(endpoint.encode()).digest())


def endpoint(name: str, *, underlay: Iterable[str] = ("192.0.2.1:51820",), ciphers: Iterable[str] = (), **kw: Any) -> EndpointRecord:
    fields: dict[str, Any] = {
        "trust_domain": TD.name, "endpoint": name, "kind": "host", "tunnel_key": tunnel_key(name),
        "underlay": list(underlay), "ciphers": list(ciphers), "generation": 1, "issued": 1, "expires": 2,
    }  # fmt: skip
    return EndpointRecord(**(fields | kw))


def placement(name: str, at: str, number: int, *, instance: int = 0, epoch: int = 1, state: str = "active", **kw: Any) -> PlacementRecord:
    v4, v6 = TD.overlay(number)
    fields: dict[str, Any] = {
        "trust_domain": TD.name, "spiffe_id": f"spiffe://{TD}/wl/{name}", "name": name, "instance": instance,
        "endpoint": at, "tunnel_key": tunnel_key(at), "epoch": epoch, "state": state,
        "addresses": [str(v4), str(v6)], "labels": {}, "issued": 1,
    }  # fmt: skip
    return PlacementRecord(**(fields | kw))


def keyed(records: Iterable[PlacementRecord]) -> dict[InstanceKey, PlacementRecord]:
    return {InstanceKey(f"{r.name}/{r.instance}"): r for r in records}


def snapshot(
    placements: Iterable[PlacementRecord] = (), prepares: Iterable[PlacementRecord] = (),
    endpoints: Iterable[EndpointRecord] = (), policy: PolicyRecord | None = None,
) -> Snapshot:  # fmt: skip
    return Snapshot(TD.name, "t", 7, policy, keyed(placements), keyed(prepares), {e.endpoint: e for e in endpoints}, "h")


def facts(*attached: str, host: Iterable[str] = (), units: Mapping[str, UnitPlan] | None = None, **kw: Any) -> LocalFacts:
    places = {InstanceKey(k): LocalAttachment("netns", f"ns-{k.partition('/')[0]}") for k in attached}
    places |= {InstanceKey(k): LocalAttachment("host") for k in host}
    places |= {InstanceKey(k): LocalAttachment("unit", unit=u) for k, u in (units or {}).items()}
    return LocalFacts(ME, tunnel_key(ME), attachments=places, **kw)


def ports(*words: str) -> PortMap:
    return union(parse_ports(w) for w in words)


def allow(src: str | Selector, dst: str | Selector, *words: str, n: int = 0) -> Rule:
    def one(who: str | Selector) -> Selector:
        return Named(frozenset({who})) if isinstance(who, str) else who

    return Rule(f"r{n}", Action.ALLOW, one(src), one(dst), ports(*words))


def program(*rules: Rule) -> Program:
    return Program((Tier("t", rules),), digest="d")


def labelled(key: str, *values: str) -> Selector:
    return In(key, frozenset(values))


ANYBODY = Everything()


def policy_record(text: str, revision: int = 3) -> PolicyRecord:
    return PolicyRecord(
        trust_domain=TD.name, revision=revision, digest="d", files=[PolicyFile(name="p.yaml", text=text)], author="a", issued=1
    )


def names(mapping: Mapping[InstanceKey, Any]) -> set[str]:
    return {str(k) for k in mapping}
