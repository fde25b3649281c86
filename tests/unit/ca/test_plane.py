from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select, text

from ca import audit
from ca import schema as tables
from ca.plane import MAX_REFUSALS, Plane
from identity.errors import BadInput, BadState, Conflict, NotVerified, Refused, RetinueError, Unreachable
from identity.names import TrustDomain
from identity.records import BundleRecord, Heartbeat
from identity.wire.admin import TokenCreate
from identity.wire.enroll import RenewRequest, SvidRequest

TD = TrustDomain("reg.test")


def reopen(plane: Plane) -> Plane:
    plane.store.close()
    return Plane.open(plane.directory, plane.clock)


def audited(plane: Plane) -> list[tuple[str, str, str]]:
    with plane.store.read() as tx:
        return [(e.action, e.subject, e.outcome) for e in audit.entries(tx)]


# ---- making and opening


def test_making_twice_is_refused(plane: Plane) -> None:
    with pytest.raises(Conflict) as e:
        Plane.create(plane.directory, TD, 1)
    assert e.value.code == "ca.exists"


def test_a_used_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    mode = tmp_path.stat().st_mode
    with pytest.raises(Conflict) as e:
        Plane.create(tmp_path, TD, 1)
    assert e.value.code == "ca.dir_used"
    assert tmp_path.stat().st_mode == mode


@pytest.mark.parametrize("plane", ["sqlite"], indirect=True)
def test_parts_of_one_are_told(plane: Plane, tmp_path: Path) -> None:
    plane.store.close()
    (plane.directory / "ca.db").rename(tmp_path / "away")
    with pytest.raises(BadState) as e:
        Plane.create(plane.directory, TD, 1)
    assert e.value.code == "ca.partial"
    with pytest.raises(BadState) as e:
        Plane.open(plane.directory, plane.clock)
    assert e.value.code == "store.missing"
    with pytest.raises(BadState) as e:
        Plane.open(tmp_path / "nowhere", plane.clock)
    assert e.value.code == "ca.missing"


def test_a_database_of_another_domain(plane: Plane) -> None:
    with plane.store.write() as tx:
        tx.execute(text("update meta set value = 'other.test' where key = 'trust_domain'"))
    with pytest.raises(BadState) as e:
        reopen(plane)
    assert e.value.code == "ca.foreign"


def test_a_restart_keeps_the_bundle_and_takes_moves_back(plane: Plane, enrol) -> None:
    enrol(plane, "a")
    enrol(plane, "b")
    plane.placements.add(workload("web", "a"), plane.now, "t")
    plane.placements.prepare("web", 0, "b", plane.now, "t")
    bundle = plane.bundle
    again = reopen(plane)
    assert again.bundle == bundle
    assert again.store.timeline == plane.store.timeline
    assert again.placements.get("web", 0).state == "active"
    again.store.close()


def test_an_altered_bundle_is_made_anew_with_a_higher_sequence(plane: Plane) -> None:
    trust = plane.authority.trust_bundle(0, plane.clock())
    before = trust.verify(BundleRecord, plane.bundle).sequence
    with plane.store.write() as tx:
        plane.store.put(tx, "bundle", plane.bundle[:-4] + "AAAA")
    again = reopen(plane)
    assert trust.verify(BundleRecord, again.bundle).sequence == before + 1
    again.store.close()


def test_renewed_signers_are_published(plane: Plane, clock) -> None:
    before = plane.bundle
    clock.now += 20 * 86400
    plane.maintain()
    assert plane.bundle != before
    plane.publish()
    assert plane.mirror.world.bundle == plane.bundle
    plane.maintain()


def test_a_missing_bundle_is_damage(plane: Plane) -> None:
    with plane.store.write() as tx:
        tx.execute(text("delete from meta where key = 'bundle'"))
    with pytest.raises(BadState):
        _ = plane.bundle


# ---- enrolment


def workload(name: str, host: str | None = None, **labels: str):
    from identity.wire.admin import WorkloadAdd

    return WorkloadAdd(name=name, host=host, labels=labels)


def test_an_enrolment_in_full(plane: Plane, enrol) -> None:
    joined = enrol(plane, "a")
    caller, expires = plane.caller(joined.der)
    assert (caller.name, caller.state) == ("a", "enrolled")
    assert expires == caller.svid_expires
    with plane.store.read() as tx:
        kept = tx.execute(select(tables.serials).where(tables.serials.c.endpoint == "a")).mappings().all()
    assert [(s["profile"], s["spiffe_id"]) for s in kept] == [("endpoint", "spiffe://reg.test/host/a")]
    assert ("enroll.finish", "a", "ok") in audited(plane)


def test_a_lost_reply_is_given_again(plane: Plane, join) -> None:
    attempt = join(plane, "a")
    first = plane.enroll(attempt.request(plane))
    second = plane.enroll(attempt.request(plane))
    assert second.endpoint == first.endpoint
    assert plane.caller(attempt.der(second))[0].name == "a"
    stranger = join(plane, None, token=attempt.token)
    with pytest.raises(Conflict) as e:
        plane.enroll(stranger.request(plane))
    assert e.value.code == "token.used"
    assert ("enroll", ascii(attempt.token.id), "token.used") in audited(plane)


def test_a_crash_between_claim_and_record_burns_nothing(
    plane: Plane, join, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = join(plane, "a")

    def crash(*_: object, **__: object) -> None:
        raise Unreachable("store.busy", "injected")

    for where in (
        (plane.authority, "issue_endpoint"),
        (plane.registry, "finish"),
        (plane.registry, "record_serial"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*where, crash)
            with pytest.raises(Unreachable):
                plane.enroll(attempt.request(plane))
        assert plane.registry.all() == []
    assert plane.enroll(attempt.request(plane)).endpoint == "a"


def test_nothing_is_signed_before_its_serial_is_stored(
    plane: Plane, join, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = join(plane, "a")
    stored: list[str] = []
    real = plane.registry.record_serial

    def note(**about: object) -> None:
        real(**about)  # type: ignore[arg-type]
        with plane.store.read() as tx:
            stored.extend(tx.execute(select(tables.serials.c.serial)).scalars())

    monkeypatch.setattr(plane.registry, "record_serial", note)
    signer = plane.authority.signer("intermediate")
    signed_after: list[int] = []

    class Watch:
        public_key = signer.public_key

        def sign(self, data: bytes, /) -> bytes:
            signed_after.append(len(stored))
            return signer.sign(data)

    plane.authority._signers["intermediate"] = Watch()
    plane.enroll(attempt.request(plane))
    assert signed_after
    assert min(signed_after) >= 1


def test_refusals_are_audited_so_many_a_minute(plane: Plane, join, clock) -> None:
    stranger = join(plane, None)

    def refuse(times: int) -> int:
        for _ in range(times):
            with pytest.raises(NotVerified):
                plane.enroll(stranger.request(plane))
        return sum(
            1 for action, _, outcome in audited(plane) if action == "enroll" and outcome == "token.refused"
        )

    assert refuse(MAX_REFUSALS + 20) == MAX_REFUSALS
    clock.now += 61
    assert refuse(1) == MAX_REFUSALS + 1


def test_tokens_are_for_one_thing(plane: Plane) -> None:
    for request in (TokenCreate(), TokenCreate(host="a", workload="b")):
        with pytest.raises(BadInput) as e:
            plane.token(request, "t")
        assert e.value.code == "token.subject"
    with pytest.raises(BadInput):
        plane.token(TokenCreate(host="../a"), "t")


def test_the_secret_of_a_token_is_nowhere(plane: Plane) -> None:
    made = plane.token(TokenCreate(host="a"), "t")
    secret = made.token.split(".")[2]
    plane.store.close()
    for file in plane.directory.iterdir():
        assert secret.encode() not in file.read_bytes()


# ---- members


def test_a_workload_certificate_is_for_its_holder(plane: Plane, enrol, csr) -> None:
    a, b = enrol(plane, "a"), enrol(plane, "b")
    plane.placements.add(workload("web", "a"), plane.now, "t")
    request = SvidRequest(workload="web", instance=0, csr=csr())
    holder, other = plane.caller(a.der)[0], plane.caller(b.der)[0]
    assert plane.svid(holder, request).spiffe_id == "spiffe://reg.test/wl/web"
    with pytest.raises(Refused) as e:
        plane.svid(other, request)
    assert e.value.code == "svid.not_here"
    plane.placements.prepare("web", 0, "b", plane.now, "t")
    assert plane.svid(other, request).chain
    with pytest.raises(RetinueError):
        plane.svid(holder, SvidRequest(workload="web", instance=7, csr=csr()))


def test_a_workload_certificate_is_no_endpoint(plane: Plane, enrol, csr) -> None:
    a = enrol(plane, "a")
    plane.placements.add(workload("web", "a"), plane.now, "t")
    chain = plane.svid(plane.caller(a.der)[0], SvidRequest(workload="web", instance=0, csr=csr())).chain
    with pytest.raises(Refused) as e:
        plane.caller(a.der_of(chain))
    assert e.value.code == "caller.kind"


def test_an_expired_or_foreign_certificate_is_no_caller(plane: Plane, enrol, clock, tmp_path: Path) -> None:
    a = enrol(plane, "a")
    Plane.create(tmp_path / "other", TD, clock())
    other = Plane.open(tmp_path / "other", clock)
    with pytest.raises(NotVerified):
        other.caller(a.der)
    other.store.close()
    clock.now += 2 * 86400
    with pytest.raises(NotVerified):
        plane.caller(a.der)


def test_renewal_keeps_the_older_certificate_good(plane: Plane, enrol, csr) -> None:
    a = enrol(plane, "a")
    done = plane.renew(
        plane.caller(a.der)[0], RenewRequest(csr=csr(), underlay=[], ciphers=["chacha20poly1305"])
    )
    assert plane.caller(a.der_of(done.chain))[0].generation == 2
    assert plane.caller(a.der)[0].name == "a"
    plane.registry.revoke("a", plane.now, "t")
    for chain in (a.der, a.der_of(done.chain)):
        with pytest.raises(Refused):
            plane.caller(chain)


def test_sidecar_tokens_go_to_hosts(plane: Plane, enrol) -> None:
    a = enrol(plane, "a")
    plane.placements.add(workload("web", "a"), plane.now, "t")
    made = plane.sidecar_token(plane.caller(a.der)[0], "web")
    side = enrol(plane, None, token=made.token)
    assert side.reply.workload == "web"
    with pytest.raises(Refused) as e:
        plane.sidecar_token(plane.caller(side.der)[0], "web")
    assert e.value.code == "sidecar.caller"


def test_members_ask_about_their_own(plane: Plane, enrol) -> None:
    a, b = enrol(plane, "a"), enrol(plane, "b")
    for name, host in (("web", "a"), ("api", "a"), ("db", "b")):
        plane.placements.add(workload(name, host), plane.now, "t")
    assert plane.explain_for(plane.caller(a.der)[0], "web", "db", "tcp", 1).verdict == "deny"
    with pytest.raises(Refused) as e:
        plane.explain_for(plane.caller(b.der)[0], "web", "api", "tcp", 1)
    assert e.value.code == "explain.not_here"


# ---- publishing


def test_a_revoked_endpoint_is_closed(plane: Plane, enrol) -> None:
    enrol(plane, "a")
    plane.publish()
    plane.feed.connect("a", None, None, plane.now)
    plane.registry.revoke("a", plane.now, "t")
    published = plane.publish()
    assert published.closed == {"a"}
    assert plane.feed.connected == set()


def test_an_error_while_publishing_tells_nobody_anything(
    plane: Plane, enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(plane, "a")
    plane.publish()
    plane.feed.connect("a", None, None, plane.now)
    plane.placements.add(workload("web", "a"), plane.now, "t")
    for error in (Unreachable("store.busy", "x"), RuntimeError("x")):
        with monkeypatch.context() as patch:

            def fail(*_: object, error: Exception = error) -> None:
                raise error

            patch.setattr(plane.store, "changes_after", fail)
            assert plane.publish().frames == {}
    assert set(plane.publish().frames) == {"a"}


def test_heartbeats_are_signed_for_the_position(plane: Plane, enrol) -> None:
    enrol(plane, "a")
    plane.publish()
    plane.feed.connect("a", None, None, plane.now)
    parts, _ = plane.feed.beat(plane.now)
    line = b"".join(parts)
    import json

    beat = plane.authority.trust_bundle(0, plane.clock()).verify(Heartbeat, json.loads(line)["heartbeat"])
    assert (beat.timeline, beat.revision, beat.time) == (
        plane.store.timeline,
        plane.mirror.revision,
        plane.now,
    )


def test_a_window_of_time_moves_the_position_once(plane: Plane, enrol, clock) -> None:
    enrol(plane, "a")
    plane.tick()
    plane.placements.add(workload("web", "a", role="web"), plane.now, "t")
    until = "2031-02-11T18:00Z"
    plane.policies.apply(
        [("p", f"meshpolicy: 1\nlabels: {{keys: [role]}}\ngrants:\n  - {{id: g, from: {{role: web}}, to: {{role: web}}, on: tcp/1, not_after: {until}}}\n")],
        "", plane.now, "t",
    )  # fmt: skip
    plane.publish()
    plane.tick()
    start = plane.mirror.revision
    clock.now = float(plane.mirror.in_force.until)
    for _ in range(3):
        plane.tick()
        plane.publish()
    assert plane.mirror.revision == start + 1


def test_a_grant_that_came_and_went_between_two_heartbeats_is_told(plane: Plane, enrol) -> None:
    enrol(plane, "a")
    plane.placements.add(workload("web", "a", role="web"), plane.now, "t")
    plane.placements.add(workload("job", "a", role="job"), plane.now, "t")
    plane.publish()
    plane.policies.apply(
        [("p", "meshpolicy: 1\nlabels: {keys: [role]}\ngrants:\n  - {id: g, from: {role: web}, to: {role: web}, on: tcp/1, until: {workload_ends: job}}\n")],
        "", plane.now, "t",
    )  # fmt: skip
    plane.publish()
    plane.placements.revoke("job", 0, plane.now, "t")
    plane.publish()
    plane.seal()
    with plane.store.read() as tx:
        (told,) = [e for e in audit.entries(tx) if e.action == "grant.expired"]
    assert told.subject == "g"
