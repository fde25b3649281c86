"""Renewal from the newest certificate, coming back by the enrolment key, and copies of one identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from ca import audit, recovery, succession
from ca.plane import Plane
from identity import certs
from identity import recovery as proofs
from identity.errors import NotFound, NotVerified, Refused, RetinueError
from identity.keys import b64, ed25519_public, unb64, x25519_public
from identity.recovery import Return
from identity.wire.admin import TokenCreate, WorkloadAdd
from identity.wire.enroll import RenewRequest
from identity.wire.recovery import RecoverRequest

DAY = 86400
LEAF = b"the server's certificate"
GARBLED = b64(b"\x07" * 64)


@dataclass
class Machine:
    """What an enrolled machine keeps."""

    name: str
    tunnel: X25519PrivateKey
    key: Ed25519PrivateKey
    chain: list[str]
    tls: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def serial(self) -> int:
        return certs.parse_chain(self.chain)[0].serial_number

    def shown(self) -> list[bytes]:
        return [c.public_bytes(Encoding.DER) for c in certs.parse_chain(self.chain)]

    def new_key(self) -> None:
        self.tls = ec.generate_private_key(ec.SECP256R1())

    def copy(self) -> Machine:
        return Machine(self.name, self.tunnel, self.key, list(self.chain))

    def renew(self, plane: Plane, *, lose: bool = False) -> None:
        row, _ = plane.caller(self.shown())
        reply = plane.renew(row, RenewRequest(csr=certs.make_csr(self.tls), underlay=[], ciphers=[]), self.serial)
        if not lose:
            self.chain = reply.chain
            self.new_key()

    def request(self, plane: Plane, **changed: Any) -> RecoverRequest:
        challenge = plane.challenge(plane.returns.challenge(self.name), LEAF)
        said = Return(
            endpoint=self.name, serial=f"{self.serial:x}", nonce=unb64(challenge.nonce), server_leaf=LEAF,
            server_key=unb64(challenge.server_key), csr=certs.make_csr(self.tls), tunnel_key=x25519_public(self.tunnel),
            enroll_key=ed25519_public(self.key), underlay=(), ciphers=("chacha20poly1305",),
        )  # fmt: skip
        tunnel, enroll = proofs.prove(said, self.tunnel, self.key)
        fields = {
            "endpoint": said.endpoint, "serial": said.serial, "nonce": challenge.nonce, "csr": said.csr,
            "tunnel_proof": b64(tunnel), "enroll_proof": b64(enroll), "underlay": [], "ciphers": ["chacha20poly1305"],
        }  # fmt: skip
        return RecoverRequest.model_validate(fields | changed)

    def recover(self, plane: Plane, *, lose: bool = False) -> None:
        reply = plane.returns.recover(self.request(plane))
        if not lose:
            self.chain = reply.chain
            self.new_key()


@pytest.fixture
def machine(plane: Plane, join: Callable[..., Any]) -> Machine:
    return enrolled(plane, join, "web-1")


def enrolled(plane: Plane, join: Callable[..., Any], name: str, **more: Any) -> Machine:
    attempt = join(plane, name, token=plane.token(TokenCreate(host=name, **more), "test").token)
    reply = plane.enroll(attempt.request(plane))
    return Machine(name, attempt.tunnel, attempt.key, reply.chain)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RetinueError) as e:
        call()
    return e.value.code


def out(plane: Plane, name: str = "web-1") -> bool:
    plane.publish()
    return plane.mirror.world.endpoints[name].record is None


# ---- renewal


def test_renewals_go_on_from_the_newest(plane: Plane, machine: Machine, clock: Any) -> None:
    for _ in range(4):
        clock.now += DAY // 2
        machine.renew(plane)
    assert recovery.standing(plane.store, "web-1", plane.now).serial == f"{machine.serial:x}"
    assert not out(plane)


def test_a_lost_reply_is_repeated_to_the_same_key(plane: Plane, machine: Machine) -> None:
    for _ in range(3):
        machine.renew(plane, lose=True)
    machine.renew(plane)
    machine.renew(plane)
    assert not out(plane)


def test_a_copy_is_found_when_it_renews_and_only_that_endpoint_is_out(
    plane: Plane, machine: Machine, join: Callable[..., Any]
) -> None:
    other = enrolled(plane, join, "web-2")
    for host, number in (("web-1", 0), ("web-2", 1)):
        plane.placements.add(WorkloadAdd(name="shop/api", host=host, replica=bool(number)), plane.now, "test")
    copy = machine.copy()
    machine.renew(plane)
    assert refused(lambda: copy.renew(plane)) == "caller.quarantined"
    # Both copies are out until somebody has looked: the CA cannot tell which is which.
    assert refused(lambda: machine.renew(plane)) == "caller.quarantined"
    assert refused(lambda: plane.caller(machine.shown())) == "caller.quarantined"
    assert out(plane)
    # The other place of the same workload, and its host, notice nothing.
    other.renew(plane)
    assert not out(plane, "web-2")
    assert [r.state for r in plane.placements.all()] == ["active", "active"]
    with plane.store.read() as tx:
        acts = [(e.action, e.subject) for e in audit.entries(tx) if e.action == "host.quarantine"]
    assert acts == [("host.quarantine", "web-1")]
    # An administrator ends it: the one with the newest certificate goes on, the other is found again.
    recovery.release(plane.store, "web-1", plane.now, "test")
    assert not out(plane)
    machine.renew(plane)
    assert refused(lambda: copy.renew(plane)) == "caller.quarantined"
    assert out(plane)


def test_enrolling_anew_ends_a_quarantine(plane: Plane, machine: Machine, join: Callable[..., Any]) -> None:
    copy = machine.copy()
    machine.renew(plane)
    refused(lambda: copy.renew(plane))
    fresh = enrolled(plane, join, "web-1", replace=True)
    fresh.renew(plane)
    assert not out(plane)
    for old in (machine, copy):
        assert refused(lambda old=old: old.renew(plane)) == "caller.certificate"
    assert not out(plane), "who is out already changes nothing"


def test_a_rolled_back_machine_is_a_copy(plane: Plane, machine: Machine, clock: Any) -> None:
    """A virtual machine put back to a snapshot from before two renewals."""
    snapshot = machine.copy()
    machine.renew(plane)
    machine.renew(plane)
    assert refused(lambda: snapshot.renew(plane)) == "caller.quarantined"
    assert "unquarantine" in recovery.out("web-1").hint


def test_garbage_locks_nobody(plane: Plane, machine: Machine, clock: Any) -> None:
    stale = machine.copy()
    machine.renew(plane)
    stranger = Machine("web-1", X25519PrivateKey.generate(), Ed25519PrivateKey.generate(), stale.chain)
    half = Machine("web-1", X25519PrivateKey.generate(), machine.key, stale.chain)
    other_half = Machine("web-1", machine.tunnel, Ed25519PrivateKey.generate(), stale.chain)
    for liar in (stranger, half, other_half):
        assert refused(lambda liar=liar: liar.recover(plane)) == "recover.refused"
    for changed in ({"serial": "1"}, {"endpoint": "web-9"}, {"csr": certs.make_csr(stale.tls)}, {"enroll_proof": GARBLED},
                    {"underlay": ["192.0.2.1:1"]}, {"ciphers": []}, {"nonce": b64(bytes(32))}):  # fmt: skip
        code = refused(lambda changed=changed: plane.returns.recover(machine.request(plane, **changed)))
        assert code in {"recover.refused", "enroll.nonce"}, changed
    row, _ = plane.caller(machine.shown())
    bad = RenewRequest(csr=certs.make_csr(stale.tls).replace("A", "B", 3), underlay=[], ciphers=[])
    assert refused(lambda: plane.renew(row, bad, stale.serial)).startswith("csr.")
    assert not out(plane)
    machine.renew(plane)


# ---- coming back


def test_a_machine_comes_back_after_its_certificate_ended(plane: Plane, machine: Machine, clock: Any) -> None:
    clock.now += 3 * DAY
    assert refused(lambda: machine.renew(plane)) == "cert.expired"
    machine.recover(plane)
    machine.renew(plane)
    assert not out(plane)
    assert len(recovery.standing(plane.store, "web-1", plane.now).recoveries) == 1


def test_the_budget_is_one_in_thirty_days_and_an_administrator_raises_it(plane: Plane, machine: Machine, clock: Any) -> None:
    for wait, grant, code in ((2, 0, None), (2, 0, "recover.budget"), (0, 1, None), (2, 0, "recover.budget"), (32, 0, None)):
        clock.now += wait * DAY
        if grant:
            recovery.grant(plane.store, "web-1", grant, plane.now, "test")
        if code is None:
            machine.recover(plane)
        else:
            assert refused(lambda: machine.recover(plane)) == code
    assert not out(plane)


def test_a_lost_reply_costs_no_second_recovery(plane: Plane, machine: Machine, clock: Any) -> None:
    clock.now += 2 * DAY
    machine.recover(plane, lose=True)
    machine.recover(plane, lose=True)
    machine.recover(plane)
    machine.renew(plane)
    assert len(recovery.standing(plane.store, "web-1", plane.now).recoveries) == 1


def test_a_replayed_recovery_is_nothing(plane: Plane, machine: Machine, clock: Any) -> None:
    clock.now += 2 * DAY
    request = machine.request(plane)
    plane.returns.recover(request)
    assert refused(lambda: plane.returns.recover(request)) == "enroll.nonce"
    # Against another nonce the proofs do not hold.
    challenge = plane.challenge(plane.returns.challenge("web-1"), LEAF)
    moved = request.model_copy(update={"nonce": challenge.nonce})
    assert refused(lambda: plane.returns.recover(moved)) == "recover.refused"
    # Nor is a nonce for one endpoint, or for enrolling, one for another.
    for name in (plane.returns.challenge("web-2"), "web-1", "t0"):
        foreign = request.model_copy(update={"nonce": plane.challenge(name, LEAF).nonce})
        assert refused(lambda foreign=foreign: plane.returns.recover(foreign)) == "recover.refused"
    assert not out(plane)


def test_a_copy_that_comes_back_is_found(plane: Plane, machine: Machine, clock: Any) -> None:
    copy = machine.copy()
    clock.now += 2 * DAY
    machine.recover(plane)
    assert refused(lambda: copy.recover(plane)) == "caller.quarantined"
    assert refused(lambda: machine.recover(plane)) == "caller.quarantined"
    assert out(plane)


def test_a_revoked_or_unknown_machine_gets_one_answer(plane: Plane, machine: Machine) -> None:
    plane.registry.revoke("web-1", plane.now, "test")
    plane.publish()
    unknown = Machine("web-7", machine.tunnel, machine.key, machine.chain)
    answers = []
    for one in (machine, unknown):
        with pytest.raises(NotVerified) as e:
            one.recover(plane)
        answers.append((e.value.code, e.value.message))
    assert answers[0] == answers[1]


def test_a_machine_comes_back_after_the_intermediate_and_the_root_went(plane: Plane, machine: Machine) -> None:
    for kind in ("intermediate", "root"):
        succession.prepare(plane, kind, "test")
        succession.activate(plane, kind, "test")
        name = {"intermediate": "intermediate", "root": "root"}[kind]
        with pytest.raises(RetinueError) as e:
            succession.revoke(plane, name, "test")
        assert e.value.code == "authority.in_use"
        succession.revoke(plane, name, "test", force=True)
        assert refused(lambda: plane.caller(machine.shown())).startswith("cert.")
        recovery.grant(plane.store, "web-1", 1, plane.now, "test")
        machine.recover(plane)
        plane.caller(machine.shown())


def test_names_that_nobody_has(plane: Plane) -> None:
    for call in (recovery.standing, lambda s, n, t: recovery.grant(s, n, 1, t, "x"), lambda s, n, t: recovery.release(s, n, t, "x")):
        with pytest.raises(NotFound):
            call(plane.store, "nobody", plane.now)


def test_a_restored_ca_takes_a_certificate_it_has_forgotten(plane: Plane, machine: Machine) -> None:
    """The row of the renewal was lost with the database that came after the backup."""
    with plane.store.write() as tx:
        before = recovery.get(tx, "web-1")
        assert before is not None
        assert recovery.current(tx, before, "f" * 40, "0" * 64)
        assert not recovery.current(tx, recovery.Credential("web-1", "ab", "", None, None, None, None, ()), before.serial, "")


@given(st.binary(max_size=80), st.binary(max_size=80), st.text("0123456789abcdef", min_size=1, max_size=40))
def test_no_guess_is_a_proof(tunnel: bytes, enroll: bytes, serial: str) -> None:
    server = X25519PrivateKey.generate()
    said = Return("web-1", serial, bytes(32), LEAF, x25519_public(server), "csr", x25519_public(X25519PrivateKey.generate()),
                  ed25519_public(Ed25519PrivateKey.generate()), (), ())  # fmt: skip
    with pytest.raises(NotVerified) as e:
        proofs.check(said, tunnel, enroll, server)
    assert e.value.code == "recover.refused"


@given(st.data())
def test_every_word_is_in_the_transcript(data: st.DataObject) -> None:
    base = Return("web-1", "ab", b"n", b"l", b"s", "c", b"t", b"e", ("u",), ("x",))
    name = data.draw(st.sampled_from(sorted(Return.__dataclass_fields__)))
    value = getattr(base, name)
    new = {str: st.text(), bytes: st.binary(), tuple: st.lists(st.text(max_size=3), max_size=3).map(tuple)}[type(value)]
    other = data.draw(new.filter(lambda v: v != value))
    changed = Return(**{f: getattr(base, f) for f in Return.__dataclass_fields__} | {name: other})
    assert proofs.transcript(changed) != proofs.transcript(base)


def test_a_low_order_server_key_is_refused() -> None:
    said = Return("a", "1", bytes(32), b"", bytes(32), "", bytes(32), bytes(32), (), ())
    with pytest.raises(NotVerified):
        proofs.prove(said, X25519PrivateKey.generate(), Ed25519PrivateKey.generate())


def test_a_quarantine_says_what_to_do() -> None:
    assert isinstance(recovery.out("a"), Refused)
