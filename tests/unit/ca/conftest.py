"""A desk with a real signing key for the registry's tests, and a whole control plane on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ca.desk import Desk
from ca.placements import Placements
from ca.plane import Plane
from ca.registry import Applicant, Registry
from ca.rows import EndpointRow
from ca.store import Store
from identity import records
from identity.keys import b64, ed25519_public, x25519_public
from identity.names import TrustDomain
from identity.records import EndpointRecord, PlacementRecord
from identity.wire.admin import WorkloadAdd

TD = TrustDomain("reg.test")
T0 = 1_800_000_000


def new_applicant() -> Applicant:
    tunnel = b64(x25519_public(X25519PrivateKey.generate()))
    return Applicant(tunnel, b64(ed25519_public(Ed25519PrivateKey.generate())), ["192.0.2.1:51820"], ["chacha20poly1305"])


@dataclass
class Bench:
    """Registry and placements over a real database, with a record key of the test's own."""

    store: Store
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    now: int = T0

    def __post_init__(self) -> None:
        self.desk = Desk(self.store, TD, lambda payload: records.sign(payload, self.key))
        self.placements = Placements(self.desk)
        self.registry = Registry(self.desk, self.placements)
        self._tokens = 0

    applicant = staticmethod(new_applicant)

    def token(self, host: str | None = None, *, workload: str | None = None, asked_by: str | None = None,
              replace: bool = False, ttl: int = 600) -> str:  # fmt: skip
        """Store a token and return its id."""
        self._tokens += 1
        token_id = f"t{self._tokens}"
        with self.store.write() as tx:
            if host is not None:
                grant = self.registry.grant_host(tx, host, replace=replace, now=self.now, ttl=ttl)
            else:
                grant = self.registry.grant_sidecar(tx, workload or "", asked_by=asked_by, now=self.now, ttl=ttl)
            self.registry.add_token(token_id, b64(ed25519_public(self.key)), grant, tx, self.now, "test")
        return token_id

    def enrol(self, host: str, *, replace: bool = False) -> EndpointRow:
        token = self.token(host, replace=replace)
        return self.use(token)

    def use(self, token: str, applicant: Applicant | None = None) -> EndpointRow:
        row = self.registry.claim(token, applicant or self.applicant(), self.now)
        return self.registry.finish(row.name, self.now + 86400, self.now, "test")

    def add(self, name: str, host: str | None = None, **more: object) -> object:
        return self.placements.add(WorkloadAdd.model_validate({"name": name, "host": host, **more}), self.now, "test")

    def placement(self, envelope: str | None) -> PlacementRecord:
        assert envelope is not None
        return records.verify(PlacementRecord, envelope, [self.key.public_key()], trust_domain=str(TD))

    def endpoint(self, envelope: str | None) -> EndpointRecord:
        assert envelope is not None
        return records.verify(EndpointRecord, envelope, [self.key.public_key()], trust_domain=str(TD))


@pytest.fixture
def make_bench() -> Iterator[Callable[[Path], Bench]]:
    made: list[Store] = []

    def make(path: Path) -> Bench:
        made.append(Store.create(path, str(TD)))
        return Bench(made[-1])

    yield make
    for store in made:
        store.close()


@pytest.fixture
def bench(tmp_path: Path, make_bench: Callable[[Path], Bench]) -> Bench:
    return make_bench(tmp_path / "ca.db")


@dataclass
class Clock:
    """Seconds since the epoch, moved by hand."""

    now: float = float(T0)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plane(tmp_path: Path, clock: Clock) -> Iterator[Plane]:
    directory = tmp_path / "ca"
    Plane.create(directory, TD, clock())
    opened = Plane.open(directory, clock)
    yield opened
    opened.store.close()


@pytest.fixture
def make_desk() -> type[Bench]:
    """Bench over a store that the caller made and closes."""
    return Bench
