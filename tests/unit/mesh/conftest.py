"""A real authority, and frames signed by it: what a CA could send an endpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from grpclib.client import Channel

from ca.authority import Authority
from identity import certs
from identity.bundle import TrustBundle
from identity.errors import RetinueError
from identity.keys import b64, x25519_public
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
from mesh.dataplane import Applied, Counters, PlaneConfig
from mesh.devices import Device, PeerState
from mesh.endpoint import Agent, AgentConfig
from mesh.enroll import Enrollment
from mesh.plan import Plan, diff
from mesh.snapshot import InstanceKey
from mesh.state import StateDir
from mesh.svid import WorkloadSvids
from mesh.sync import SyncMachine
from mesh.workload_api import WorkloadApi
from policy.language import digest
from tests.unit.mesh import workload_rig

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
    now: int = int(NOW)
    objects: dict[str, str] = field(default_factory=dict)

    def copy(self) -> FakeFeed:
        return replace(self, objects=dict(self.objects))

    def sign(self, payload: Payload) -> str:
        return self.authority.sign_record(payload)

    def endpoint(self, name: str, key: bytes | None = None, **changes: object) -> str:
        values = {
            "trust_domain": DOMAIN.name, "endpoint": name, "kind": "host", "tunnel_key": tunnel_key(name, key),
            "underlay": ["192.0.2.1:51820"], "ciphers": ["chacha20poly1305"], "generation": 1, "issued": self.now,
            "expires": self.now + 86400,
        } | changes  # fmt: skip
        return self.sign(EndpointRecord.model_validate(values))

    def placement(self, name: str, endpoint: str, epoch: int = 1, index: int = 1, **changes: object) -> str:
        v4, v6 = DOMAIN.overlay(index)
        values = {
            "trust_domain": DOMAIN.name, "spiffe_id": str(SpiffeId.workload(DOMAIN, name)), "name": name, "instance": 0,
            "endpoint": endpoint, "tunnel_key": tunnel_key(endpoint), "epoch": epoch, "state": "active",
            "addresses": [str(v4), str(v6)], "labels": {"role": name.replace("/", "-")}, "issued": self.now,
        } | changes  # fmt: skip
        return self.sign(PlacementRecord.model_validate(values))

    def policy(self, revision: int = 1, text: str = "version: 1\n") -> str:
        return self.sign(
            PolicyRecord(
                trust_domain=DOMAIN.name, revision=revision, digest=digest([("p.yaml", text)]),
                files=[PolicyFile(name="p.yaml", text=text)], author="", issued=self.now,
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


# ---- a live endpoint: real time, real state directory, real records; no data plane and no network

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, shop-api, batch]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: shop-api}, on: tcp/8080}
"""


@pytest.fixture(scope="session")
def live_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("live") / "ca", DOMAIN, time.time())


@pytest.fixture
def live(live_authority: Authority) -> FakeFeed:
    """A feed as of now, with two instances on host-a, one on host-b, and a policy between them."""
    now = int(time.time())
    made = FakeFeed(live_authority, live_authority.trust_bundle(0, now), time=now, now=now)
    made.objects = {
        "bundle": made.trust.envelope,
        "policy": made.policy(1, POLICY),
        "endpoint/host-a": made.endpoint("host-a"),
        "endpoint/host-b": made.endpoint("host-b"),
        "placement/web/0": made.placement("web", "host-a"),
        "placement/batch/0": made.placement("batch", "host-a", index=3),
        "placement/shop/api/0": made.placement("shop/api", "host-b", index=2),
    }
    return made


@pytest.fixture
def enrollment(live: FakeFeed, private_dir: Path) -> Enrollment:
    """An enrolment of host-a whose tunnel key is the one in its record."""
    return make_enrollment(live, private_dir)


def make_enrollment(live: FakeFeed, directory: Path, name: str = "host-a", kind: str = "host") -> Enrollment:
    tls, tunnel = ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate()
    spiffe_id = SpiffeId.endpoint(DOMAIN, name, kind)
    chain = live.authority.issue_endpoint(certs.make_csr(tls), spiffe_id, live.now)
    public = x25519_public(tunnel)
    live.objects[f"endpoint/{name}"] = live.endpoint(name, public, kind=kind)
    for key, envelope in list(live.objects.items()):
        if key.startswith("placement/"):
            record = live.trust.verify(PlacementRecord, envelope)
            if record.endpoint == name:
                again = record.model_copy(update={"tunnel_key": b64(public)})
                live.objects[key] = live.sign(again)
    return Enrollment(
        directory=directory, ca_url="https://127.0.0.1:1", root_fingerprint=live.authority.root_fingerprint,
        trust_domain=DOMAIN, endpoint=name, kind="sidecar" if kind == "sidecar" else "host", workload=None,
        svid=live.trust.verify_svid(chain, live.now), bundle=live.trust,
        record=live.trust.verify(EndpointRecord, live.objects[f"endpoint/{name}"]),
        record_envelope=live.objects[f"endpoint/{name}"], tunnel_key=tunnel, enroll_key=Ed25519PrivateKey.generate(),
        verified_at=live.now,
    )  # fmt: skip


class FakePlane:
    """Takes plans; `fail` makes the next ones fail. The real one is tested in tests/netns."""

    def __init__(self, config: PlaneConfig) -> None:
        self.config = config
        self.plans: list[Plan] = []
        self.fail: RetinueError | None = None
        self.failed: dict[InstanceKey, str] = {}
        self.stopped: bool | None = None
        self.device: Device | None = None

    def describe(self) -> str:
        return "fake: a test"

    async def start(self) -> None:
        return

    async def apply(self, plan: Plan) -> Applied:
        if self.fail is not None:
            raise self.fail
        old = self.plans[-1] if self.plans else None
        self.plans.append(plan)
        return Applied(diff(old, plan), 0.001, {k: v for k, v in self.failed.items() if k in plan.attachments})

    async def counters(self) -> Counters:
        peers = {key: PeerState(underlay="192.0.2.7:1", latest_handshake=5, rx_bytes=10, tx_bytes=20) for key in self.plans[-1].peers}
        return Counters(peers, {}, (), 7)

    def listen(self, handle: object) -> tuple[list[object], list[str]]:
        return [], []

    async def verdicts(self) -> dict[str, int]:
        return {}

    async def noted(self, kind: str) -> list[object]:
        return []

    async def stop(self, *, clean: bool) -> None:
        self.stopped = clean


@pytest.fixture
def make_agent(private_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes an endpoint with the fake data plane, on the private state directory."""
    monkeypatch.setattr("mesh.endpoint.DataPlane", FakePlane)
    states: list[StateDir] = []

    def make(enrollment: Enrollment, **options: object) -> Agent:
        state = StateDir(private_dir)
        for old in states:
            old.close()
        state.open()
        states.append(state)
        (tmp_path / "run").mkdir(exist_ok=True)
        config = AgentConfig(state_dir=private_dir, run_dir=tmp_path / "run", **options)  # type: ignore[arg-type]
        return Agent(config, enrollment, state)

    yield make
    for state in states:
        state.close()


@pytest.fixture
def sidecar_enrollment(live: FakeFeed, private_dir: Path) -> Enrollment:
    """An enrolment of a sidecar that holds `cart`."""
    live.objects["placement/cart/0"] = live.placement("cart", "cart-sidecar-1", index=7, labels={"role": "web"})
    return make_enrollment(live, private_dir, "cart-sidecar-1", "sidecar")


# ---- the Workload API of a sidecar, and a channel to it


@pytest.fixture
def issuer(live):
    return workload_rig.Issuer(live)


@pytest.fixture
async def agent(make_agent, sidecar_enrollment, live, issuer):
    made = make_agent(sidecar_enrollment)
    made.svids = WorkloadSvids(issuer, lambda: made.uplink.trust, time.time)
    made._restore()
    await workload_rig.tell(made, live.snapshot())
    return made


@pytest.fixture
async def api(agent):
    async with WorkloadApi(agent) as made:
        yield made


@pytest.fixture
async def channel(api):
    made = Channel(path=str(api.path), codec=workload_rig.RawCodec())
    yield made
    made.close()
