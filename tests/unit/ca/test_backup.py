"""Backup and restore of a whole control plane, and what an endpoint's own sync machine makes of the new timeline."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from ca import backup as backups
from ca.highwater import HighWater
from ca.plane import Plane
from identity.bundle import open_bundle
from identity.errors import BadInput, BadState, Conflict, Refused
from identity.records import EndpointRecord, PlacementRecord, PolicyRecord
from identity.wire.admin import WorkloadAdd
from identity.wire.enroll import RenewRequest
from mesh.sync import Accepted, RecordRefused, SyncMachine

# `retinue-ca backup` is for SQLite; PostgreSQL has its own (tests/unit/ca/test_replica.py).
pytestmark = pytest.mark.parametrize("plane", ["sqlite"], indirect=True)

POLICY = """meshpolicy: 1
labels: {keys: [role]}
segments:
  - {name: s, allow: [{id: r, from: "*", to: "*", on: tcp/PORT}]}
"""


class Agent:
    """An endpoint's sync machine fed by the plane's real frames."""

    def __init__(self, plane: Plane, name: str) -> None:
        self.name = name
        bundle = open_bundle(plane.bundle, plane.authority.roots, plane.trust_domain, plane.clock())
        self.machine = SyncMachine(bundle, name)
        self.refused: list[str] = []

    def follow(self, plane: Plane) -> list[object]:
        at = self.machine.resume
        frame, _ = plane.feed.connect(self.name, at and at.timeline, at and at.revision, plane.now)
        events: list[object] = list(self.machine.receive(b"".join(frame), wall=plane.clock(), mono=1.0))
        self.refused += [e.error.code for e in events if isinstance(e, RecordRefused)]
        return events


@pytest.fixture
def shop(plane: Plane, enrol) -> Plane:
    for name in ("a", "b", "c"):
        enrol(plane, name)
    plane.placements.add(WorkloadAdd(name="web", host="a"), plane.now, "t")
    plane.placements.add(WorkloadAdd(name="api", host="b"), plane.now, "t")
    plane.placements.add(WorkloadAdd(name="old", host="b"), plane.now, "t")
    plane.placements.revoke("old", 0, plane.now, "t")
    apply(plane, 1)
    plane.publish()
    return plane


def apply(plane: Plane, port: int) -> None:
    plane.policies.apply([("p.yaml", POLICY.replace("PORT", str(port)))], "me", plane.now, "t")


def move(plane: Plane, name: str, to: str) -> None:
    plane.placements.commit(plane.placements.prepare(name, 0, to, plane.now, "t"), plane.now, "t")


def reopen(plane: Plane) -> Plane:
    plane.close()
    return Plane.open(plane.directory, plane.clock)


def numbers(plane: Plane) -> dict[str, int]:
    """Every number that endpoints compare, by object key."""
    trust = plane.authority.trust_bundle(0, plane.clock())
    out = {}
    for name in plane.mirror.world.endpoints:
        for key, envelope in plane.mirror.world.view(name).objects.items():
            kind = key.partition("/")[0]
            if kind in {"placement", "prepare"}:
                out[key.partition("/")[2]] = trust.verify(PlacementRecord, envelope).epoch
            elif kind == "endpoint":
                out[key] = trust.verify(EndpointRecord, envelope).generation
            elif kind == "policy":
                out[key] = trust.verify(PolicyRecord, envelope).revision
    with plane.store.read() as tx:
        out["bundle"] = int(plane.store.get(tx, "bundle_sequence") or 0)
        out["overlay"] = int(plane.store.get(tx, "overlay_next") or 0)
    return out


def later(plane: Plane, clock, enrol) -> None:
    """What happens after the backup and is lost."""
    clock.now += 100
    move(plane, "web", "b")
    move(plane, "web", "c")
    apply(plane, 2)
    plane.placements.revoke("api", 0, plane.now, "t")
    plane.placements.add(WorkloadAdd(name="new", host="c"), plane.now, "t")
    enrol(plane, "d")
    plane.registry.revoke("b", plane.now, "t")
    plane.publish()
    clock.now += 100


# ---- the high-water mark in use


def test_a_restart_goes_on(shop: Plane) -> None:
    again = reopen(reopen(shop))
    assert again.water.mark is not None
    assert again.water.mark.revision == again.mirror.revision
    again.close()


def test_an_older_database_is_not_served(shop: Plane, tmp_path: Path) -> None:
    shop.store.settle()
    shutil.copy(shop.directory / "ca.db", tmp_path / "old.db")
    again = reopen(shop)
    again.placements.revoke("web", 0, again.now, "t")
    again.publish()
    again.store.settle()
    again.close()
    shutil.copy(tmp_path / "old.db", again.directory / "ca.db")
    with pytest.raises(BadState) as e:
        Plane.open(again.directory, again.clock)
    assert (e.value.code, "--new-timeline" in e.value.hint) == ("store.old", True)
    done = backups.restore(again.directory, again.directory / "ca.db", again.now, new_timeline=True)
    assert done.lost == 1
    reopen(again).close()


def test_nothing_is_published_before_it_is_marked(shop: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.feed.connect("a", None, None, shop.now)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    shop.placements.revoke("api", 0, shop.now, "t")
    with monkeypatch.context() as patch:
        patch.setattr("ca.highwater.os.pwrite", fail)
        published = shop.publish()
    assert published.frames == {}
    assert isinstance(published.failed, BadState)
    with pytest.raises(BadState):
        shop.placements.revoke("web", 0, shop.now, "t")
    shop.close()
    again = Plane.open(shop.directory, shop.clock)
    assert again.placements.get("api", 0).state == "revoked"
    again.close()


# ---- backup


def test_a_backup_of_a_running_server(shop: Plane, tmp_path: Path) -> None:
    done = backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    assert (done.trust_domain, done.timeline, done.revision) == ("reg.test", shop.store.timeline, shop.mirror.revision)
    assert (tmp_path / "b.db").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["b.db"]
    data = (tmp_path / "b.db").read_bytes()
    assert b"PRIVATE KEY" not in data
    for key in shop.directory.glob("*.key"):
        assert key.read_bytes().splitlines()[1] not in data
    shop.placements.revoke("web", 0, shop.now, "t")


def test_a_backup_overwrites_nothing(shop: Plane, tmp_path: Path) -> None:
    (tmp_path / "b.db").write_text("mine")
    with pytest.raises(Conflict) as e:
        backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    assert e.value.code == "backup.exists"
    assert (tmp_path / "b.db").read_text() == "mine"
    with pytest.raises(BadInput) as bad:
        backups.backup(shop.directory, tmp_path / "no" / "b.db", shop.now)
    assert bad.value.code == "backup.file"


def test_a_backup_is_not_served_as_it_is(shop: Plane, tmp_path: Path) -> None:
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    shop.close()
    (shop.directory / "ca.db").unlink()
    shutil.copy(tmp_path / "b.db", shop.directory / "ca.db")
    with pytest.raises(BadState) as e:
        Plane.open(shop.directory, shop.clock)
    assert e.value.code == "store.backup"


# ---- restore


def test_a_backup_that_lacks_nothing_needs_no_new_timeline(shop: Plane, tmp_path: Path) -> None:
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    shop.close()
    (shop.directory / "ca.db").write_bytes(b"damaged")
    (shop.directory / "ca.db").chmod(0o600)
    done = backups.restore(shop.directory, tmp_path / "b.db", shop.now, new_timeline=False)
    assert (done.lost, done.timeline) == (0, shop.store.timeline)
    again = Plane.open(shop.directory, shop.clock)
    assert again.mirror.revision == shop.mirror.revision
    assert done.replaced is not None
    assert (shop.directory / done.replaced).read_bytes() == b"damaged"
    again.close()


def test_an_older_backup_needs_the_word(shop: Plane, tmp_path: Path, clock, enrol) -> None:
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    later(shop, clock, enrol)
    shop.close()
    before = (shop.directory / "ca.db").read_bytes()
    with pytest.raises(Conflict) as e:
        backups.restore(shop.directory, tmp_path / "b.db", shop.now, new_timeline=False)
    assert e.value.code == "restore.timeline"
    assert (shop.directory / "ca.db").read_bytes() == before
    assert not list(shop.directory.glob(".restore*"))
    reopen(shop).close()


def test_agents_end_on_the_restored_state(shop: Plane, tmp_path: Path, clock, enrol) -> None:
    agents = [Agent(shop, name) for name in ("a", "b", "c")]
    for agent in agents:
        agent.follow(shop)
    made = backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    later(shop, clock, enrol)
    agents.append(Agent(shop, "d"))
    for agent in agents:
        if agent.name != "b":
            agent.follow(shop)
            assert agent.machine.objects == shop.mirror.world.view(agent.name).objects
    assert "placement/new/0" in agents[2].machine.objects
    before = numbers(shop)
    shop.close()
    done = backups.restore(shop.directory, tmp_path / "b.db", int(clock()), new_timeline=True)
    assert done.lost == shop.mirror.revision - made.revision > 0
    assert done.compared
    assert (done.revoked_hosts, done.revoked_instances) == (["b"], ["api/0"])
    assert (done.gone_hosts, done.gone_instances) == (["d"], ["new/0"])
    clock.now += 1
    again = Plane.open(shop.directory, clock)
    assert again.store.timeline == done.timeline != shop.store.timeline
    assert again.placements.get("web", 0).endpoint == "a"
    now = numbers(again)
    assert {k for k in before if k in now and now[k] <= before[k]} == set()
    for agent in agents[:3]:
        events = agent.follow(again)
        assert any(isinstance(e, Accepted) for e in events)
        assert agent.refused == []
        assert agent.machine.objects == again.mirror.world.view(agent.name).objects
    # and they go on from there: lost names given again are believed
    again.placements.add(WorkloadAdd(name="new", host="a"), again.now, "t")
    enrol(again, "d")
    move(again, "web", "d")
    again.publish()
    assert numbers(again)["new/0"] > before["new/0"]
    assert numbers(again)["endpoint/d"] > before["endpoint/d"]
    for agent in agents[:3]:
        agent.follow(again)
        assert agent.refused == []
        assert agent.machine.objects == again.mirror.world.view(agent.name).objects
    taken = [row.overlay for row in again.placements.all()]
    assert len(set(taken)) == len(taken)
    assert max(taken) >= before["overlay"]
    again.close()


def test_restoring_twice_goes_up_twice(shop: Plane, tmp_path: Path, clock, enrol) -> None:
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    agent = Agent(shop, "a")
    agent.follow(shop)
    top = numbers(shop)
    for _ in range(2):
        shop.close()
        backups.restore(shop.directory, tmp_path / "b.db", int(clock()), new_timeline=True)
        clock.now += 1
        shop = Plane.open(shop.directory, clock)
        move(shop, "web", "b")
        move(shop, "web", "c")
        shop.publish()
        agent.follow(shop)
        assert agent.refused == []
        now = numbers(shop)
        assert min(now[k] - top[k] for k in top) >= 0
        assert min(now[k] - top[k] for k in top if k != "overlay") > 0
        top = now
    shop.close()


def test_without_the_mark_counters_jump(shop: Plane, tmp_path: Path, clock) -> None:
    """Another machine: nobody knows what was acknowledged after the backup."""
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    shop.close()
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    for path in shop.directory.iterdir():
        if path.suffix in {".key", ".pem", ".json"}:
            shutil.copy(path, other / path.name)
    with pytest.raises(Conflict):
        backups.restore(other, tmp_path / "b.db", int(clock()), new_timeline=False)
    done = backups.restore(other, tmp_path / "b.db", int(clock()), new_timeline=True)
    assert (done.lost, done.replaced, done.compared) == (None, None, False)
    again = Plane.open(other, clock)
    assert again.placements.get("web", 0).epoch > 1 << 32
    again.close()


def test_a_ca_without_policy_still_denies_and_is_followed(plane: Plane, tmp_path: Path, clock, enrol) -> None:
    enrol(plane, "a")
    backups.backup(plane.directory, tmp_path / "b.db", plane.now)
    apply(plane, 1)
    plane.publish()
    agent = Agent(plane, "a")
    agent.follow(plane)
    plane.close()
    backups.restore(plane.directory, tmp_path / "b.db", int(clock()), new_timeline=True)
    clock.now += 1
    again = Plane.open(plane.directory, clock)
    agent.follow(again)
    assert agent.refused == []
    policy = agent.machine.view(1.0).snapshot.policy
    assert policy is not None
    assert [f.name for f in policy.files] == ["none.yaml"]
    again.close()


def test_a_certificate_of_the_lost_time_counts_until_its_host_enrols_anew(
    plane: Plane, tmp_path: Path, clock, enrol, csr
) -> None:
    joined = enrol(plane, "a")
    backups.backup(plane.directory, tmp_path / "b.db", plane.now)
    clock.now += 1000
    caller, _ = plane.caller(joined.der)
    renewed = plane.renew(caller, RenewRequest(csr=csr(), underlay=[], ciphers=["chacha20poly1305"]))
    plane.publish()
    clock.now += 1000
    plane.close()
    backups.restore(plane.directory, tmp_path / "b.db", int(clock()), new_timeline=True)
    clock.now += 1
    again = Plane.open(plane.directory, clock)
    chain = joined.der_of(renewed.chain)
    assert again.caller(chain)[0].name == "a"
    assert again.caller(joined.der)[0].name == "a"
    from identity.wire.admin import TokenCreate

    enrol(again, None, again.token(TokenCreate(host="a", replace=True), "t").token)
    for old in (chain, joined.der):
        with pytest.raises(Refused):
            again.caller(old)
    again.close()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda p: None, "backup.missing"),
        (lambda p: p.write_bytes(b"x" * 9000), "backup.damaged"),
        (lambda p: sqlite3.connect(p).execute("create table t (a)").connection.close(), "store.damaged"),
    ],
)
def test_an_unusable_backup_changes_nothing(shop: Plane, tmp_path: Path, make, code: str) -> None:
    shop.close()
    before = (shop.directory / "ca.db").read_bytes()
    make(tmp_path / "b.db")
    with pytest.raises((BadInput, BadState)) as e:
        backups.restore(shop.directory, tmp_path / "b.db", shop.now, new_timeline=True)
    assert e.value.code == code
    assert (shop.directory / "ca.db").read_bytes() == before
    assert not list(shop.directory.glob(".restore*"))


def test_a_backup_of_another_domain_or_without_an_authority(shop: Plane, tmp_path: Path) -> None:
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    with sqlite3.connect(tmp_path / "b.db") as other:
        other.execute("update meta set value = 'other.test' where key = 'trust_domain'")
    other.close()
    shop.close()
    with pytest.raises(BadState) as e:
        backups.restore(shop.directory, tmp_path / "b.db", shop.now, new_timeline=True)
    assert e.value.code == "ca.foreign"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadState) as e:
        backups.restore(tmp_path / "empty", tmp_path / "b.db", shop.now, new_timeline=True)
    assert e.value.code == "ca.missing"


def test_a_move_that_was_being_made_is_given_up(shop: Plane, tmp_path: Path, clock) -> None:
    shop.placements.prepare("web", 0, "c", shop.now, "t")
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    with shop.store.write() as tx:
        tx.execute(text("update meta set value = value where key = 'base'"))
    shop.placements.revoke("api", 0, shop.now, "t")
    shop.publish()
    shop.close()
    backups.restore(shop.directory, tmp_path / "b.db", int(clock()), new_timeline=True)
    again = Plane.open(shop.directory, clock)
    assert (again.placements.get("web", 0).state, again.placements.get("web", 0).endpoint) == ("active", "a")
    again.close()


def test_the_mark_of_the_restored_timeline_is_taken_up(shop: Plane, tmp_path: Path, clock) -> None:
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    shop.placements.revoke("api", 0, shop.now, "t")
    shop.publish()
    shop.close()
    done = backups.restore(shop.directory, tmp_path / "b.db", int(clock()), new_timeline=True)
    mark = HighWater(shop.directory / "highwater").mark
    assert mark is not None
    assert mark.timeline == shop.store.timeline
    Plane.open(shop.directory, clock).close()
    mark = HighWater(shop.directory / "highwater").mark
    assert mark is not None
    assert (mark.timeline, mark.revision >= done.revision) == (done.timeline, True)


def test_a_database_of_another_line_is_not_served(shop: Plane, tmp_path: Path, clock) -> None:
    """The database of before a restore, put back after it."""
    backups.backup(shop.directory, tmp_path / "b.db", shop.now)
    shop.placements.revoke("api", 0, shop.now, "t")
    shop.publish()
    shop.close()
    done = backups.restore(shop.directory, tmp_path / "b.db", int(clock()), new_timeline=True)
    Plane.open(shop.directory, clock).close()
    assert done.replaced is not None
    shutil.copy(shop.directory / done.replaced, shop.directory / "ca.db")
    with pytest.raises(BadState) as e:
        Plane.open(shop.directory, clock)
    assert (e.value.code, "another timeline" in e.value.message) == ("store.old", True)
