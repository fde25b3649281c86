"""Directories and databases of several processes: what a further one gets, what an older database is worth."""

from __future__ import annotations

import shutil
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from ca import backup as backups
from ca import jwt_authority, succession
from ca import postgres as addresses
from ca.authority import Authority
from ca.plane import Plane
from ca.replica import copy
from ca.store import Store
from identity.errors import BadInput, BadState, Conflict, RetinueError, Unreachable
from identity.names import SpiffeId
from identity.records import Heartbeat, PlacementRecord
from identity.wire.admin import WorkloadAdd
from identity.wire.jwt import JwtRequest
from tests.unit.ca.conftest import make_csr

pytestmark = pytest.mark.parametrize("plane", ["postgresql"], indirect=True)


def reopened(plane: Plane, directory: Path | None = None) -> Plane:
    return Plane.open(directory or plane.directory, plane.clock)


def test_a_replica_has_the_keys_but_not_the_root(plane: Plane, enrol, tmp_path: Path) -> None:
    done = copy(plane.directory, tmp_path / "two")
    names = {p.name for p in (tmp_path / "two").iterdir()}
    assert set(done.files) < names
    assert "root.key" not in names
    assert "highwater" not in names
    assert (tmp_path / "two").stat().st_mode & 0o777 == 0o700
    assert all((tmp_path / "two" / n).stat().st_mode & 0o077 == 0 for n in names if n.endswith((".key", ".url")))
    two = reopened(plane, tmp_path / "two")
    sequence = plane.bundle
    enrol(two, "a")
    plane.publish()
    two.maintain()
    assert two.bundle == plane.bundle == sequence  # a replica publishes none
    assert plane.registry.get("a").state == "enrolled"
    copy(plane.directory, tmp_path / "two")  # again, after a rotation
    two.close()
    with pytest.raises(Conflict):
        copy(plane.directory, tmp_path)


def test_two_planes_follow_one_another(plane: Plane, enrol, tmp_path: Path) -> None:
    copy(plane.directory, tmp_path / "two")
    two = reopened(plane, tmp_path / "two")
    enrol(plane, "a")
    two.placements.add(WorkloadAdd(name="shop/api", host="a"), two.now, "test")
    for one in (plane, two):
        one.publish()
        assert one.mirror.world.instances["shop/api/0"].holder == "a"
    assert plane.mirror.revision == two.mirror.revision == plane.feed.revision
    with pytest.raises(Conflict):
        two.placements.add(WorkloadAdd(name="shop/api"), two.now, "test")
    plane.seal()
    two.seal()
    with two.store.read() as tx:
        assert two.log.verify(tx) == plane.log.head(tx)
    two.close()


def test_a_move_is_given_up_only_when_its_process_is_gone(plane: Plane, enrol, tmp_path: Path) -> None:
    enrol(plane, "a")
    enrol(plane, "b")
    plane.placements.add(WorkloadAdd(name="shop/api", host="a"), plane.now, "test")
    plane.tick()
    plane.placements.prepare("shop/api", 0, "b", plane.now, "test")
    copy(plane.directory, tmp_path / "two")
    two = reopened(plane, tmp_path / "two")
    two.tick()
    assert plane.placements.get("shop/api", 0).state == "moving"
    plane.close()
    two.tick()
    assert two.placements.get("shop/api", 0).state == "active"
    two.close()


def test_an_older_database_is_refused_until_a_new_timeline(plane: Plane, enrol, postgres, tmp_path: Path) -> None:
    enrol(plane, "a")
    plane.placements.add(WorkloadAdd(name="shop/api", host="a"), plane.now, "test")
    plane.publish()
    before = plane.placements.get("shop/api", 0)
    plane.store.close()
    address = addresses.address_of(plane.directory)
    assert address is not None
    older = f"{address}_older"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{older.rpartition("/")[2]}" TEMPLATE "{address.rpartition("/")[2]}"')
    again = reopened(plane)
    again.placements.revoke("shop/api", 0, again.now, "test")
    again.publish()
    again.close()
    (plane.directory / addresses.FILE).unlink()
    addresses.write_address(plane.directory, older)
    with pytest.raises(BadState) as e:
        reopened(plane)
    assert e.value.code == "store.old"
    done = backups.continue_in_place(plane.directory, plane.now)
    assert done.lost is not None
    assert done.lost > 0
    restored = reopened(plane)
    row = restored.placements.get("shop/api", 0)
    assert (row.state, row.epoch > before.epoch + 1) == ("active", True)  # the revocation is lost, its epoch is not given again
    assert restored.store.timeline == done.timeline
    restored.close()


def test_sqlite_has_no_replica_and_postgresql_no_backup_file(plane: Plane, tmp_path: Path) -> None:
    with pytest.raises(BadState) as e:
        backups.backup(plane.directory, tmp_path / "b", plane.now)
    assert e.value.code == "backup.engine"
    shutil.copytree(plane.directory, tmp_path / "one")
    (tmp_path / "one" / addresses.FILE).unlink()
    with pytest.raises(BadState) as e:
        copy(tmp_path / "one", tmp_path / "two")
    assert e.value.code == "replica.store"
    with pytest.raises(BadState):
        backups.continue_in_place(tmp_path / "one", plane.now)


def test_addresses(plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plane.store.shared
    for bad in ("", "mysql://a/b", "postgresql://host", "not an address", "postgresql:///"):
        with pytest.raises(BadInput):
            addresses.parse(bad)
    with pytest.raises(BadInput) as e:
        addresses.chosen("postgresql://u:secret@h/d", None)
    assert e.value.code == "store.password"
    assert "secret" not in e.value.message + e.value.hint
    file = tmp_path / "url"
    addresses.write_address(tmp_path, "postgresql://u:secret@h/d")
    (tmp_path / addresses.FILE).rename(file)
    assert addresses.chosen(None, file) == "postgresql://u:secret@h/d"
    file.chmod(0o644)
    with pytest.raises(BadState):
        addresses.chosen(None, file)
    monkeypatch.setenv(addresses.ENVIRONMENT, "postgresql://h/d")
    assert addresses.chosen(None, None) == "postgresql://h/d"


@pytest.mark.parametrize(("user", "database", "kind"), [("nobody_there", None, RetinueError), ("retinue", "none", RetinueError)])
def test_a_database_that_refuses(plane: Plane, postgres, user: str, database: str | None, kind: type[RetinueError]) -> None:
    name = database or "postgres"
    with pytest.raises(kind) as e:
        Store.open_shared(f"postgresql://{user}@127.0.0.1:{postgres.port}/{name}")
    assert e.value.code in {"store.refused", "store.unreachable"}
    with pytest.raises(Unreachable) as gone:
        Store.open_shared("postgresql://retinue@127.0.0.1:1/x")
    assert gone.value.code == "store.unreachable"
    with pytest.raises(BadState) as empty:
        Store.open_shared(postgres.database())
    assert empty.value.code == "store.missing"
    assert plane.store.shared


# ---- the authority changes in the first process


@pytest.fixture
def two(plane: Plane, enrol, tmp_path: Path):
    enrol(plane, "a")
    plane.placements.add(WorkloadAdd(name="shop/api", host="a"), plane.now, "test")
    copy(plane.directory, tmp_path / "two")
    made = reopened(plane, tmp_path / "two")
    yield made
    made.close()


def follows(two: Plane) -> None:
    two.publish()
    two.tick()


def signs(two: Plane) -> str:
    """``records`` and ``certificates``: what it may sign."""
    able = []
    for what, act in (
        ("records", lambda: two.sign(Heartbeat(trust_domain=str(two.trust_domain), timeline="t", revision=1, time=two.now))),
        ("certificates", lambda: two.authority.issue_endpoint(make_csr(), SpiffeId.endpoint(two.trust_domain, "a"), two.now)),
    ):
        try:
            act()
            able.append(what)
        except BadState as e:
            if e.code != "replica.keys" or "retinue-ca replica" not in e.hint:
                raise
    return " ".join(able)


def test_a_changed_record_key_is_noticed_at_the_very_next_signature(plane: Plane, two: Plane) -> None:
    assert signs(two) == "records certificates"
    succession.prepare(plane, "records", "test")
    follows(two)
    assert signs(two) == "records certificates"  # nothing else signs yet
    succession.activate(plane, "records", "test")
    # Not told of anything, it signs nothing with the key before: that could be revoked a moment later.
    with pytest.raises(BadState) as e:
        two.placements.add(WorkloadAdd(name="shop/lost", host="a"), two.now, "test")
    assert e.value.code == "replica.keys"
    succession.revoke(plane, "records", "test")
    published = two.publish()
    assert (published.current, published.frames) == (False, {})
    follows(two)
    assert signs(two) == ""
    copy(plane.directory, two.directory)
    follows(two)
    assert signs(two) == "records certificates"
    two.placements.add(WorkloadAdd(name="shop/db", host="a"), two.now, "test")
    assert two.publish().current
    plane.publish()
    row = plane.placements.get("shop/db", 0)
    assert plane.open_record(PlacementRecord, row.placement).endpoint == "a"
    assert {"shop/api/0", "shop/db/0"} <= two.mirror.world.instances.keys()


@pytest.mark.parametrize("root", [False, True])
def test_a_tainted_intermediate_issues_nothing_and_a_revoked_one_ends_it(plane: Plane, two: Plane, root: bool) -> None:
    succession.prepare(plane, "root" if root else "intermediate", "test")
    succession.activate(plane, "root" if root else "intermediate", "test")
    follows(two)
    assert signs(two) == "records certificates"  # what it issues is as good as before
    succession.taint(plane, "root" if root else "intermediate", 60, "test")
    follows(two)
    assert signs(two) == "records"
    succession.revoke(plane, "root" if root else "intermediate", "test", force=True)
    follows(two)
    assert signs(two) == ""
    copy(plane.directory, two.directory)
    follows(two)
    assert signs(two) == "records certificates"
    chain = two.authority.issue_endpoint(make_csr(), SpiffeId.endpoint(two.trust_domain, "a"), two.now)
    plane.trust.verify_svid(chain, plane.now)


def test_tokens_of_a_key_that_is_out_are_not_signed(plane: Plane, two: Plane, clock) -> None:
    request = JwtRequest(workload="shop/api", instance=0, audience=["db"])
    holder = plane.registry.get("a")
    assert two.jwt_svid(holder, request).token
    later = clock.now + jwt_authority.LIFE
    assert plane.jwt.maintain(later)
    assert plane.jwt.maintain(later + jwt_authority.DAY + jwt_authority.AFTER)
    plane.refresh_bundle()
    follows(two)
    with pytest.raises(BadState) as e:
        two.jwt_svid(holder, request)
    assert e.value.code == "replica.keys"
    assert signs(two) == "records certificates"


def test_keys_are_changed_in_the_first_process_only(plane: Plane, two: Plane, clock) -> None:
    before = {p.name: p.read_bytes() for p in two.directory.iterdir() if p.suffix in {".key", ".json"}}
    for act in (
        lambda: succession.prepare(two, "records", "t"), lambda: succession.activate(two, "intermediate", "t"),
        lambda: succession.taint(two, "intermediate", 60, "t"), lambda: succession.revoke(two, "records", "t"),
    ):  # fmt: skip
        with pytest.raises(Conflict) as e:
            act()
        assert e.value.code == "replica.keeper"
    clock.now += 350 * 86400  # a year's key is due, and an intermediate is over half of its life
    two.authority.refresh(clock())
    again = Authority.load(two.directory, clock(), upkeep=False)
    again.close()
    assert {p.name: p.read_bytes() for p in two.directory.iterdir() if p.suffix in {".key", ".json"}} == before


def test_what_is_blocked_in_any_process_is_published_by_the_first(plane: Plane, two: Plane) -> None:
    sequence = plane.bundle
    succession.block(two, "key:" + "ab" * 32, 0, "test")
    assert two.bundle == sequence
    assert "ab" * 32 in two.trust.blocked.keys  # at once, where it was said
    plane.publish()
    assert plane.bundle != sequence
    follows(two)
    assert "ab" * 32 in two.trust.blocked.keys


def test_half_a_copy_is_not_taken_over(plane: Plane, two: Plane) -> None:
    succession.prepare(plane, "records", "test")
    succession.activate(plane, "records", "test")
    (two.directory / "authority.json").write_bytes((plane.directory / "authority.json").read_bytes())  # and not its keys
    follows(two)
    assert signs(two) == ""
    copy(plane.directory, two.directory)
    follows(two)
    assert signs(two) == "records certificates"


def test_an_older_bundle_in_the_database_is_not_believed(plane: Plane, two: Plane) -> None:
    old = plane.bundle
    succession.block(plane, "key:" + "cd" * 32, 0, "test")
    follows(two)
    with plane.store.write() as tx:
        plane.store.put(tx, "bundle", old)
        tx.execute(text("delete from blocks"))
        plane.store.log(tx, plane.now, "bundle", "bundle")
    follows(two)
    assert "cd" * 32 in two.trust.blocked.keys
