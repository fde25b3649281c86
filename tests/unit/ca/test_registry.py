from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from ca import schema as tables
from ca.enroll import RECOVERY_SECONDS
from ca.registry import check_underlay
from identity.errors import BadInput, Conflict, NotFound, NotVerified, Refused, RetinueError
from identity.names import SpiffeId


def code(error: pytest.ExceptionInfo[RetinueError]) -> str:
    return error.value.code


# ---- enrolment


def test_an_enrolled_host_has_a_signed_record(bench) -> None:
    row = bench.enrol("a")
    record = bench.endpoint(row.record)
    assert (row.state, row.generation, record.endpoint, record.kind) == ("enrolled", 1, "a", "host")
    assert (record.tunnel_key, record.underlay) == (row.tunnel_key, ["192.0.2.1:51820"])
    assert record.expires == row.svid_expires
    assert [r.name for r in bench.registry.all()] == ["a"]


def test_a_claimed_host_is_not_listed_before_it_is_finished(bench) -> None:
    bench.registry.claim(bench.token("a"), bench.applicant(), bench.now)
    assert bench.registry.all() == []
    with pytest.raises(NotFound):
        bench.registry.get("a")


def test_a_token_is_spent_once(bench) -> None:
    token = bench.token("a")
    bench.use(token)
    with pytest.raises(Conflict) as e:
        bench.use(token)
    assert code(e) == "token.used"


def test_fifty_at_once_spend_a_token_once(bench) -> None:
    token = bench.token("a")
    applicants = [bench.applicant() for _ in range(50)]

    def claim(applicant) -> str:
        try:
            bench.registry.claim(token, applicant, bench.now)
        except RetinueError as e:
            return e.code
        return "won"

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(claim, applicants))
    assert outcomes.count("won") == 1
    assert set(outcomes) == {"won", "token.used"}
    with bench.store.read() as tx:
        assert len(tx.execute(select(tables.endpoints)).all()) == 1


def test_an_expired_token(bench) -> None:
    token = bench.token("a", ttl=10)
    bench.now += 10
    with pytest.raises(Refused) as e:
        bench.use(token)
    assert code(e) == "token.expired"


def test_an_unknown_token_learns_nothing(bench) -> None:
    with pytest.raises(NotVerified) as e:
        bench.use("nonesuch")
    assert code(e) == "token.refused"


def test_a_lost_reply_is_repeated_to_the_same_keys_only(bench) -> None:
    token, applicant = bench.token("a"), bench.applicant()
    first = bench.use(token, applicant)
    bench.now += RECOVERY_SECONDS
    again = bench.use(token, applicant)
    assert (again.name, again.tunnel_key) == (first.name, first.tunnel_key)
    assert again.generation == first.generation + 1
    bench.now += 1
    with pytest.raises(Conflict):
        bench.use(token, applicant)


def test_a_lost_reply_of_a_revoked_host_stays_lost(bench) -> None:
    token, applicant = bench.token("a"), bench.applicant()
    bench.use(token, applicant)
    bench.registry.revoke("a", bench.now, "test")
    with pytest.raises(Conflict):
        bench.use(token, applicant)


def test_a_taken_tunnel_key_burns_no_token(bench) -> None:
    applicant = bench.applicant()
    bench.use(bench.token("a"), applicant)
    token = bench.token("b")
    with pytest.raises(Conflict) as e:
        bench.use(token, applicant)
    assert code(e) == "enroll.tunnel_key"
    assert bench.use(token).name == "b"


def test_a_bad_underlay_burns_no_token(bench) -> None:
    token, applicant = bench.token("a"), bench.applicant()
    bad = type(applicant)(applicant.tunnel_key, applicant.enroll_key, ["nowhere"], applicant.ciphers)
    with pytest.raises(BadInput):
        bench.use(token, bad)
    assert bench.use(token, applicant).name == "a"


def test_an_enrolled_name_needs_replace(bench) -> None:
    early = bench.token("a")
    first = bench.enrol("a")
    with pytest.raises(Conflict) as e:
        bench.token("a")
    assert code(e) == "host.exists"
    with pytest.raises(Conflict) as e:
        bench.use(early)  # made before the name was taken
    assert code(e) == "enroll.exists"
    second = bench.enrol("a", replace=True)
    assert second.tunnel_key != first.tunnel_key
    assert second.generation == first.generation + 1


def test_replacing_keys_re_signs_placements_and_ends_certificates(bench) -> None:
    first = bench.enrol("a")
    bench.add("web", "a")
    bench.registry.record_serial(serial=7, issuer="i", profile="endpoint", spiffe_id=first.spiffe_id, spki="k",
                                 endpoint="a", issued=1, not_after=2)  # fmt: skip
    assert bench.registry.caller(SpiffeId.parse(first.spiffe_id), 7).name == "a"
    second = bench.enrol("a", replace=True)
    row = bench.placements.get("web", 0)
    assert (row.epoch, bench.placement(row.placement).tunnel_key) == (2, second.tunnel_key)
    with pytest.raises(Refused) as e:
        bench.registry.caller(SpiffeId.parse(first.spiffe_id), 7)
    assert code(e) == "caller.certificate"


def test_a_revoked_host_enrols_anew_with_nothing(bench) -> None:
    bench.enrol("a")
    bench.add("web", "a")
    bench.registry.revoke("a", bench.now, "test")
    bench.enrol("a")
    assert bench.placements.get("web", 0).state == "unplaced"
    assert bench.registry.get("a").state == "enrolled"


# ---- sidecars


def test_a_sidecar_takes_the_unplaced_instance(bench) -> None:
    bench.add("shop/api")
    row = bench.use(bench.token(workload="shop/api"))
    assert (row.kind, row.workload, row.name) == ("sidecar", "shop/api", "shop-api-sidecar-1")
    held = bench.placements.get("shop/api", 0)
    assert (held.endpoint, held.state, held.epoch) == (row.name, "active", 1)
    with pytest.raises(Conflict) as e:
        bench.token(workload="shop/api")
    assert code(e) == "sidecar.no_instance"


def test_a_host_gives_its_own_instance_to_its_sidecar_and_to_the_next(bench) -> None:
    bench.enrol("a")
    bench.add("web", "a")
    one = bench.use(bench.token(workload="web", asked_by="a"))
    assert (one.parent, bench.placements.get("web", 0).endpoint) == ("a", one.name)
    two = bench.use(bench.token(workload="web", asked_by="a"))
    assert two.name != one.name
    assert bench.placements.get("web", 0).endpoint == two.name
    assert bench.placements.get("web", 0).epoch == 3


def test_a_host_gets_no_sidecar_for_what_is_elsewhere(bench) -> None:
    bench.enrol("a")
    bench.enrol("b")
    bench.add("web", "b")
    bench.add("free")
    for name in ("web", "free"):
        with pytest.raises(Refused) as e:
            bench.token(workload=name, asked_by="a")
        assert code(e) == "sidecar.not_here"


def test_an_instance_taken_meanwhile_burns_no_token(bench) -> None:
    bench.enrol("a")
    bench.add("web")
    token = bench.token(workload="web")
    prepared = bench.placements.prepare("web", 0, "a", bench.now, "test")
    bench.placements.commit(prepared, bench.now, "test")
    with pytest.raises(Conflict):
        bench.use(token)
    assert bench.registry.token(token).used_at is None


def test_unknown_workloads_are_named(bench) -> None:
    bench.add("shop/api")
    with pytest.raises(NotFound) as e:
        bench.token(workload="shop/ap")
    assert "shop/api" in e.value.hint


def test_a_sidecar_name_is_no_host_name(bench) -> None:
    bench.add("web")
    bench.use(bench.token(workload="web"))
    with pytest.raises(Conflict) as e:
        bench.token("web-sidecar-1", replace=True)
    assert code(e) == "host.kind"


def test_a_sidecar_holds_its_own_workload_only(bench) -> None:
    bench.add("web")
    bench.use(bench.token(workload="web"))
    with pytest.raises(Conflict) as e:
        bench.add("other", "web-sidecar-1")
    assert code(e) == "workload.sidecar"


# ---- life


def test_revoking_a_host_takes_its_sidecars_and_placements(bench) -> None:
    bench.enrol("a")
    bench.enrol("b")
    bench.add("web", "a")
    bench.add("api", "a")
    side = bench.use(bench.token(workload="api", asked_by="a"))
    prepared = bench.placements.prepare("web", 0, "b", bench.now, "test")
    done = bench.registry.revoke("a", bench.now, "test")
    assert done.endpoints == ["a", side.name]
    assert sorted(done.instances) == ["api/0", "web/0"]
    for name in ("web", "api"):
        row = bench.placements.get(name, 0)
        record = bench.placement(row.placement)
        assert (row.state, row.endpoint, record.state, record.epoch) == (
            "unplaced",
            None,
            "revoked",
            row.epoch,
        )
        assert row.epoch == row.epoch_top
    with pytest.raises(Conflict):
        bench.placements.commit(prepared, bench.now, "test")
    assert bench.registry.revoke("a", bench.now, "test").endpoints == []


def test_revoking_the_target_of_a_move_ends_the_move(bench) -> None:
    bench.enrol("a")
    bench.enrol("b")
    bench.add("web", "a")
    bench.placements.prepare("web", 0, "b", bench.now, "test")
    bench.registry.revoke("b", bench.now, "test")
    row = bench.placements.get("web", 0)
    assert (row.state, row.endpoint, row.epoch, row.prepare) == ("active", "a", 1, None)


def test_a_revoked_or_strange_caller_is_refused(bench) -> None:
    row = bench.enrol("a")
    name = SpiffeId.parse(row.spiffe_id)
    with pytest.raises(Refused) as e:
        bench.registry.caller(name, 1)
    assert code(e) == "caller.certificate"
    bench.registry.record_serial(
        serial=1, issuer="i", profile="workload", spiffe_id="x", spki="k", endpoint="a", issued=1, not_after=2
    )
    with pytest.raises(Refused) as e:
        bench.registry.caller(name, 1)
    assert code(e) == "caller.certificate"
    bench.registry.record_serial(
        serial=2, issuer="i", profile="endpoint", spiffe_id="x", spki="k", endpoint="a", issued=1, not_after=2
    )
    bench.registry.caller(name, 2)
    bench.registry.revoke("a", bench.now, "test")
    with pytest.raises(Refused) as e:
        bench.registry.caller(name, 2)
    assert code(e) == "caller.revoked"
    for strange in ("spiffe://reg.test/host/b", "spiffe://reg.test/sidecar/a"):
        with pytest.raises(Refused) as e:
            bench.registry.caller(SpiffeId.parse(strange), 2)
        assert code(e) == "caller.unknown"


def test_a_serial_is_stored_once(bench) -> None:
    about = {
        "serial": 5,
        "issuer": "i",
        "profile": "server",
        "spiffe_id": "x",
        "spki": "k",
        "endpoint": None,
        "issued": 1,
        "not_after": 2,
    }
    bench.registry.record_serial(**about)
    with pytest.raises(Conflict):
        bench.registry.record_serial(**about)


def test_renewal_and_underlay_publish_newer_records(bench) -> None:
    bench.enrol("a")
    row = bench.registry.renew(
        "a", bench.now + 9, ["[2001:db8::0001]:7"], ["aes-256-gcm", "chacha20poly1305"], bench.now
    )
    record = bench.endpoint(row.record)
    assert (record.generation, record.underlay) == (2, ["[2001:db8::1]:7"])
    assert set(record.ciphers) == {"aes-256-gcm", "chacha20poly1305"}
    same = bench.registry.set_underlay("a", ["[2001:db8::1]:7"], bench.now)
    assert same.generation == 2
    assert bench.registry.set_underlay("a", [], bench.now).generation == 3
    bench.registry.revoke("a", bench.now, "test")
    with pytest.raises(Refused):
        bench.registry.set_underlay("a", ["192.0.2.9:1"], bench.now)
    with pytest.raises(Refused):
        bench.registry.finish("a", 1, bench.now, "test")


def test_unknown_hosts_are_named(bench) -> None:
    bench.enrol("web-1")
    with pytest.raises(NotFound) as e:
        bench.registry.get("web1")
    assert "web-1" in e.value.hint


@pytest.mark.parametrize("bad", ["", "x", "192.0.2.1", "192.0.2.1:0", "192.0.2.1:65536", "[192.0.2.1]:1", "2001:db8::1:1",
                                 "224.0.0.1:1", "0.0.0.0:1", "[::]:1", "h:1", "192.0.2.1:1x", "[::1:1"])  # fmt: skip
def test_bad_underlay(bad: str) -> None:
    with pytest.raises(BadInput) as e:
        check_underlay([bad])
    assert code(e) == "underlay.form"


def test_too_many_underlay_hints() -> None:
    with pytest.raises(BadInput):
        check_underlay([f"192.0.2.1:{n}" for n in range(1, 18)])


@given(
    st.lists(
        st.tuples(
            st.ip_addresses().filter(lambda a: not (a.is_multicast or a.is_unspecified)),
            st.integers(1, 65535),
        ),
        max_size=16,
    )
)
def test_underlay_is_canonical(hints) -> None:
    texts = [f"[{a.exploded}]:{p}" if a.version == 6 else f"{a}:{p}" for a, p in hints]
    once = check_underlay(texts)
    assert check_underlay(once) == once
    assert len(set(once)) == len(once)


@given(st.text(max_size=40))
def test_any_underlay_text_is_taken_or_refused(text: str) -> None:
    with contextlib.suppress(BadInput):
        assert check_underlay(check_underlay([text]))
