"""A desk with a real signing key for the registry's tests, and a whole control plane on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from ca.desk import Desk
from ca.placements import Placements
from ca.plane import Plane
from ca.registry import Applicant, Registry
from ca.rows import EndpointRow
from ca.store import Store
from identity import certs, records
from identity.enrollment import JoinToken, Offer, prove
from identity.keys import b64, ed25519_public, unb64, x25519_public
from identity.names import TrustDomain
from identity.records import EndpointRecord, P, PlacementRecord
from identity.wire.admin import TokenCreate, WorkloadAdd
from identity.wire.enroll import Challenge, EnrollReply, EnrollRequest
from tests.postgres_server import Server, server

TD = TrustDomain("reg.test")
T0 = 1_800_000_000


def new_applicant() -> Applicant:
    tunnel = b64(x25519_public(X25519PrivateKey.generate()))
    return Applicant(
        tunnel, b64(ed25519_public(Ed25519PrivateKey.generate())), ["192.0.2.1:51820"], ["chacha20poly1305"]
    )


@dataclass
class Bench:
    """Registry and placements over a real database, with a record key of the test's own."""

    store: Store
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    now: int = T0

    def __post_init__(self) -> None:
        self.desk = Desk(self.store, TD, lambda payload: records.sign(payload, self.key), self.open)
        self.placements = Placements(self.desk)
        self.registry = Registry(self.desk, self.placements)
        self._tokens = 0

    applicant = staticmethod(new_applicant)

    def open(self, kind: type[P], envelope: str) -> P:
        return records.verify(kind, envelope, [self.key.public_key()], trust_domain=str(TD))

    def token(self, host: str | None = None, *, workload: str | None = None, asked_by: str | None = None,
              replace: bool = False, ttl: int = 600) -> str:  # fmt: skip
        """Store a token and return its id."""
        self._tokens += 1
        token_id = f"t{self._tokens}"
        with self.store.write() as tx:
            if host is not None:
                grant = self.registry.grant_host(tx, host, replace=replace, now=self.now, ttl=ttl)
            else:
                grant = self.registry.grant_sidecar(
                    tx, workload or "", asked_by=asked_by, now=self.now, ttl=ttl
                )
            self.registry.add_token(token_id, b64(ed25519_public(self.key)), grant, tx, self.now, "test")
        return token_id

    def enrol(self, host: str, *, replace: bool = False) -> EndpointRow:
        token = self.token(host, replace=replace)
        return self.use(token)

    def use(self, token: str, applicant: Applicant | None = None) -> EndpointRow:
        row = self.registry.claim(token, applicant or self.applicant(), self.now)
        return self.registry.finish(row.name, self.now + 86400, self.now, "test")

    def add(self, name: str, host: str | None = None, **more: object) -> object:
        return self.placements.add(
            WorkloadAdd.model_validate({"name": name, "host": host, **more}), self.now, "test"
        )

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


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One server for all tests; every test has a database of its own."""
    with server() as made:
        yield made


ENGINES = ("sqlite", "postgresql")


@pytest.fixture(params=ENGINES)
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, make_bench: Callable[[Path], Bench]
) -> Iterator[Bench]:
    """The same tests on both engines."""
    if request.param == "sqlite":
        yield make_bench(tmp_path / "ca.db")
        return
    store = Store.create_shared(request.getfixturevalue("postgres").database(), str(TD))
    yield Bench(store)
    store.close()


@dataclass
class Clock:
    """Seconds since the epoch, moved by hand."""

    now: float = float(T0)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=ENGINES)
def plane(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Plane]:
    directory = tmp_path / "ca"
    shared = request.param == "postgresql"
    address = request.getfixturevalue("postgres").database() if shared else None
    Plane.create(directory, TD, clock(), address=address)
    opened = Plane.open(directory, clock)
    yield opened
    opened.store.close()


@pytest.fixture
def make_desk() -> type[Bench]:
    """Bench over a store that the caller made and closes."""
    return Bench


# ---- joining a plane without sockets


def make_csr() -> str:
    return certs.make_csr(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def csr() -> Callable[[], str]:
    return make_csr


def der_of(chain: list[str]) -> list[bytes]:
    return [c.public_bytes(Encoding.DER) for c in certs.parse_chain(chain)]


@dataclass
class Attempt:
    """One machine that joins: its keys stay the same over repeated requests."""

    token: JoinToken
    tunnel: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def request(self, plane: Plane) -> EnrollRequest:
        leaf = b"the server's certificate"
        return self.answer(plane.challenge(self.token.id, leaf), leaf)

    def answer(self, challenge: Challenge, leaf: bytes) -> EnrollRequest:
        offer = Offer(
            self.token.id, unb64(challenge.nonce), leaf, unb64(challenge.server_key), make_csr(),
            x25519_public(self.tunnel), ed25519_public(self.key), (), ("chacha20poly1305",),
        )  # fmt: skip
        proofs = prove(offer, self.token, self.tunnel, self.key)
        return EnrollRequest(
            token_id=self.token.id, nonce=challenge.nonce, csr=offer.csr, tunnel_key=b64(offer.tunnel_key),
            enroll_key=b64(offer.enroll_key), token_proof=b64(proofs.token), tunnel_proof=b64(proofs.tunnel),
            enroll_proof=b64(proofs.enroll), underlay=[], ciphers=["chacha20poly1305"],
        )  # fmt: skip

    @staticmethod
    def der(reply: EnrollReply) -> list[bytes]:
        return der_of(reply.chain)


@dataclass
class Joined:
    reply: EnrollReply
    der_of = staticmethod(der_of)

    @property
    def der(self) -> list[bytes]:
        return der_of(self.reply.chain)


def make_attempt(plane: Plane, host: str | None, *, token: JoinToken | str | None = None) -> Attempt:
    """`host` None without a token: a machine with a token that was never made."""
    if isinstance(token, str):
        token = JoinToken.parse(token)
    if token is None and host is not None:
        token = JoinToken.parse(plane.token(TokenCreate(host=host), "test").token)
    return Attempt(token or JoinToken("nobody", bytes(32), "0" * 64))


@pytest.fixture
def join() -> Callable[..., Attempt]:
    return make_attempt


@pytest.fixture
def enrol() -> Callable[..., Joined]:
    return lambda plane, host, token=None: Joined(
        plane.enroll(make_attempt(plane, host, token=token).request(plane))
    )
