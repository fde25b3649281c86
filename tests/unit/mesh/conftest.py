"""A real authority, and frames signed by it: what a CA could send an endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ca.authority import Authority
from identity.bundle import TrustBundle
from identity.keys import b64
from identity.names import SpiffeId, TrustDomain
from identity.records import (
    EndpointRecord,
    Heartbeat,
    Payload,
    PlacementRecord,
    PolicyFile,
    PolicyRecord,
    state_hash,
)
from identity.wire import feed
from mesh.sync import SyncMachine

DOMAIN = TrustDomain("test.example")
NOW = 2_000_000_000.0


@dataclass
class FakeFeed:
    """The sending end of a feed, made by hand: it signs what a test asks for and keeps the set it sent."""

    authority: Authority
    trust: TrustBundle
    timeline: str = "t1"
    revision: int = 1
    time: int = int(NOW)
    objects: dict[str, str] = field(default_factory=dict)

    def copy(self) -> FakeFeed:
        return replace(self, objects=dict(self.objects))

    def sign(self, payload: Payload) -> str:
        return self.authority.sign_record(payload)

    def endpoint(self, name: str, key: bytes | None = None, **changes: object) -> str:
        values = {
            "trust_domain": DOMAIN.name, "endpoint": name, "kind": "host", "tunnel_key": tunnel_key(name, key),
            "underlay": ["192.0.2.1:51820"], "ciphers": ["chacha20poly1305"], "generation": 1, "issued": int(NOW),
            "expires": int(NOW) + 86400,
        } | changes  # fmt: skip
        return self.sign(EndpointRecord.model_validate(values))

    def placement(self, name: str, endpoint: str, epoch: int = 1, index: int = 1, **changes: object) -> str:
        v4, v6 = DOMAIN.overlay(index)
        values = {
            "trust_domain": DOMAIN.name, "spiffe_id": str(SpiffeId.workload(DOMAIN, name)), "name": name, "instance": 0,
            "endpoint": endpoint, "tunnel_key": tunnel_key(endpoint), "epoch": epoch, "state": "active",
            "addresses": [str(v4), str(v6)], "labels": {"role": name.replace("/", "-")}, "issued": int(NOW),
        } | changes  # fmt: skip
        return self.sign(PlacementRecord.model_validate(values))

    def policy(self, revision: int = 1, text: str = "version: 1\n") -> str:
        return self.sign(
            PolicyRecord(
                trust_domain=DOMAIN.name, revision=revision, digest=f"{hash(text) & 0xFFFF:064x}",
                files=[PolicyFile(name="p.yaml", text=text)], author="", issued=int(NOW),
            )
        )  # fmt: skip

    def heartbeat(
        self, revision: int | None = None, time: int | None = None, timeline: str | None = None
    ) -> str:
        return self.sign(
            Heartbeat(
                trust_domain=DOMAIN.name, timeline=timeline or self.timeline,
                revision=self.revision if revision is None else revision, time=self.time if time is None else time,
            )
        )  # fmt: skip

    def beat(self, **changes: int | str) -> bytes:
        return feed.Beat(heartbeat=self.heartbeat(**changes)).model_dump_json().encode()

    def snapshot(self, **changes: object) -> bytes:
        values = {
            "timeline": self.timeline, "revision": self.revision, "objects": dict(self.objects),
            "hash": state_hash(self.objects), "heartbeat": self.heartbeat(),
        } | changes  # fmt: skip
        return feed.Snapshot.model_validate(values).model_dump_json().encode()

    def delta(
        self, upserts: dict[str, str] | None = None, removes: list[str] | None = None, **changes: object
    ) -> bytes:
        """The next change; the set held here moves with it."""
        before = self.revision
        self.revision += 1
        self.time += 1
        for key in removes or []:
            self.objects.pop(key, None)
        self.objects |= upserts or {}
        values = {
            "timeline": self.timeline, "from_revision": before, "revision": self.revision, "upserts": upserts or {},
            "removes": removes or [], "hash": state_hash(self.objects), "heartbeat": self.heartbeat(),
        } | changes  # fmt: skip
        return feed.Delta.model_validate(values).model_dump_json().encode()

    def machine(self, **options: object) -> SyncMachine:
        return SyncMachine(self.trust, "host-a", **options)  # type: ignore[arg-type]  # options vary by test


def tunnel_key(name: str, key: bytes | None = None) -> str:
    return b64(key or name.encode().ljust(32, b"k")[:32])


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority") / "ca", DOMAIN, NOW)


@pytest.fixture(scope="session")
def trust(authority: Authority) -> TrustBundle:
    return authority.trust_bundle(0, NOW)


@pytest.fixture
def ca(authority: Authority, trust: TrustBundle) -> FakeFeed:
    made = FakeFeed(authority, trust)
    made.objects = {
        "bundle": trust.envelope,
        "policy": made.policy(),
        "endpoint/host-a": made.endpoint("host-a"),
        "endpoint/host-b": made.endpoint("host-b"),
        "placement/web/0": made.placement("web", "host-a"),
        "placement/shop/api/0": made.placement("shop/api", "host-b", index=2),
    }
    return made


@pytest.fixture
def private_dir(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    return path
