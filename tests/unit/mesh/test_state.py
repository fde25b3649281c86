from __future__ import annotations

import errno
import json
import os

import pytest

from identity.errors import BadState, Conflict
from identity.wire.local import Attach
from mesh import state as state_module
from mesh.state import SavedPlace, StateDir, read_owned

NOW = 2_000_000_000.0


def saved(ca, private_dir, mono: float = 3.0):
    """A directory with a complete saved state, and the machine it was saved from."""
    directory = StateDir(private_dir)
    directory.open()
    machine = ca.machine()
    directory.save_marks(machine)
    machine.receive(ca.snapshot(), wall=NOW, mono=mono)
    directory.save_snapshot(machine, "boot-1")
    directory.save_marks(machine)
    return directory, machine


def restore(ca, directory, *, boot: str = "boot-1", mono: float = 5.0):
    marks, policy = directory.load_marks()
    machine = ca.machine(marks=marks, policy_mark=policy)
    assert directory.restore(machine, boot=boot, wall=NOW + 1, mono=mono)
    return machine


def test_what_is_saved_comes_back(ca, private_dir):
    directory, machine = saved(ca, private_dir)
    fresh = restore(ca, directory)
    assert fresh.objects == machine.objects
    assert fresh.marks == machine.marks
    assert fresh.policy_mark == machine.policy_mark
    assert fresh.resume == machine.position
    assert fresh.age(5.0) == 2.0
    assert {p.name: p.stat().st_mode & 0o777 for p in private_dir.iterdir()} == {
        "snapshot.json": 0o600, "epochs.json": 0o600, "lock": 0o600,
    }  # fmt: skip


def test_another_boot_knows_only_the_wall_clock(ca, private_dir):
    directory, _ = saved(ca, private_dir)
    assert restore(ca, directory, boot="boot-2").age(5.0) == 30.0
    assert restore(ca, directory, mono=2.0).age(2.0) == 30.0  # a clock that went back is another boot, too


def test_nothing_saved_is_nothing_restored(ca, private_dir):
    directory = StateDir(private_dir)
    assert directory.load_marks() == ({}, None)
    machine = ca.machine()
    directory.save_snapshot(machine, "boot-1")
    assert directory.restore(machine, boot="b", wall=NOW, mono=0.0) is False
    assert directory.load_attachments("boot-1") == []


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_objects(content) -> None:
    objects = content["objects"]
    objects["placement/web/0"], objects["placement/shop/api/0"] = (
        objects["placement/shop/api/0"],
        objects["placement/web/0"],
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda c: c.update(endpoint="host-b"), "state.snapshot"),
        (lambda c: c.update(revision=10**12), "state.snapshot"),
        (lambda c: c.update(revision=0), "state.rollback"),
        (lambda c: c.update(timeline="t2"), "state.snapshot"),
        (lambda c: c.update(heartbeat=""), "state.snapshot"),
        (lambda c: c.update(proof=""), "state.snapshot"),
        (lambda c: c.update(objects={}), "state.snapshot"),
        (lambda c: c.update(version=2), "state.snapshot"),
        (lambda c: c.update(extra=1), "state.snapshot"),
        (lambda c: c["objects"].pop("bundle"), "state.snapshot"),
        (lambda c: c["objects"].pop("policy"), "state.snapshot"),
        (lambda c: c["objects"].update({"placement/web/0": "x.y.z"}), "state.snapshot"),
        (swap_objects, "state.snapshot"),
    ],
)
def test_an_edited_snapshot_is_refused_whole(ca, private_dir, change, code):
    directory, _ = saved(ca, private_dir)
    edit(private_dir / "snapshot.json", change)
    marks, policy = directory.load_marks()
    machine = ca.machine(marks=marks, policy_mark=policy)
    with pytest.raises(BadState) as caught:
        directory.restore(machine, boot="boot-1", wall=NOW, mono=5.0)
    assert caught.value.code == code
    assert caught.value.hint
    assert machine.objects == {}
    assert machine.view(5.0).snapshot.placements == {}
    assert machine.marks == marks  # the epochs stay


@pytest.mark.parametrize("name", ["snapshot.json", "epochs.json", "attachments.json"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_a_cut_file_is_bad_state(ca, private_dir, name, keep):
    directory, _ = saved(ca, private_dir)
    directory.save_attachments([SavedPlace(attach=Attach(name="web"))], "boot-1")
    path = private_dir / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    machine = ca.machine()
    with pytest.raises(BadState) as caught:
        directory.load_attachments("boot-1")
        directory.load_marks()
        directory.restore(machine, boot="boot-1", wall=NOW, mono=5.0)
    assert (
        caught.value.code == {"s": "state.snapshot", "e": "state.epochs", "a": "state.attachments"}[name[0]]
    )
    assert caught.value.hint
    assert machine.objects == {}


def test_a_rolled_back_snapshot_is_refused(ca, private_dir):
    directory, machine = saved(ca, private_dir)
    old = (private_dir / "snapshot.json").read_bytes()
    machine.receive(ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}), wall=NOW, mono=4.0)
    directory.save_snapshot(machine, "boot-1")
    directory.save_marks(machine)
    (private_dir / "snapshot.json").write_bytes(old)
    with pytest.raises(BadState) as caught:
        restore(ca, directory)
    assert caught.value.code == "state.rollback"


def test_a_crash_between_the_two_files_is_no_damage(ca, private_dir):
    directory, machine = saved(ca, private_dir)
    machine.receive(ca.delta({"placement/web/0": ca.placement("web", "host-b", 2)}), wall=NOW, mono=4.0)
    directory.save_snapshot(machine, "boot-1")
    fresh = restore(ca, directory)
    assert fresh.marks["web/0"].number == 2
    assert fresh.view(5.0).snapshot.placements["web/0"].endpoint == "host-b"


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["epochs"].pop("web/0"),
        lambda c: c["epochs"]["web/0"].update(number=0),
        lambda c: c.update(policy=None),
        lambda c: c.update(check=""),
        lambda c: c.update(revision=0),
    ],
)
def test_edited_epochs_are_never_lost_silently(ca, private_dir, change):
    directory, _ = saved(ca, private_dir)
    edit(private_dir / "epochs.json", change)
    with pytest.raises(BadState) as caught:
        directory.load_marks()
    assert caught.value.code == "state.epochs"
    assert "--forget-epochs" in caught.value.hint
    directory.forget_marks()
    assert directory.load_marks() == ({}, None)
    assert (private_dir / "epochs.json.damaged").exists()
    assert (private_dir / "snapshot.json.damaged").exists()


def test_epochs_missing_beside_a_snapshot_are_bad_state(ca, private_dir):
    directory, _ = saved(ca, private_dir)
    (private_dir / "epochs.json").unlink()
    with pytest.raises(BadState) as caught:
        directory.load_marks()
    assert caught.value.code == "state.epochs"


def test_epochs_of_removed_instances_stay(ca, private_dir):
    directory, machine = saved(ca, private_dir)
    machine.receive(ca.delta(removes=["placement/web/0"]), wall=NOW, mono=4.0)
    directory.save_snapshot(machine, "boot-1")
    directory.save_marks(machine)
    assert restore(ca, directory).marks["web/0"].number == 1


def test_attachments_come_back(private_dir):
    directory = StateDir(private_dir)
    named = SavedPlace(attach=Attach(name="web", kind="netns", netns="blue"), inode=7)
    process = SavedPlace(attach=Attach(name="db", kind="netns", netns="/proc/9/ns/net"), inode=8, started=9)
    host = SavedPlace(attach=Attach(name="api", instance=2, kind="host"))
    directory.save_attachments([named, process, host], "boot-1")
    assert directory.load_attachments("boot-1") == [named, process, host]
    assert directory.load_attachments("boot-2") == [SavedPlace(attach=named.attach), host]


# ---- modes, owners, kinds


def test_a_second_agent_is_refused(private_dir):
    first, second = StateDir(private_dir), StateDir(private_dir)
    first.open()
    with pytest.raises(Conflict) as caught:
        second.open()
    assert caught.value.code == "agent.running"
    first.close()
    first.close()
    second.open()


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o755, 0o777])
def test_an_open_directory_is_refused(private_dir, mode):
    private_dir.chmod(mode)
    with pytest.raises(BadState) as caught:
        StateDir(private_dir).open()
    assert caught.value.code == "state.mode"
    assert caught.value.hint == f"chmod 700 {private_dir}"


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644, 0o666])
@pytest.mark.parametrize("name", ["snapshot.json", "epochs.json"])
def test_a_file_others_can_reach_is_refused(ca, private_dir, mode, name):
    directory, _ = saved(ca, private_dir)
    (private_dir / name).chmod(mode)
    with pytest.raises(BadState) as caught:
        restore(ca, directory)
    assert caught.value.code == "state.mode"
    assert caught.value.hint == f"chmod 600 {private_dir / name}"


def test_another_owner_is_refused(private_dir, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BadState) as caught:
        StateDir(private_dir).open()
    assert caught.value.code == "state.owner"
    assert "chown" in caught.value.hint


def test_no_directory_or_not_one(private_dir):
    for path in (private_dir / "none", private_dir / "file"):
        (private_dir / "file").write_text("")
        with pytest.raises(BadState) as caught:
            StateDir(path).open()
        assert caught.value.code == "state.dir"


def test_only_regular_files_are_read(private_dir, monkeypatch):
    real = private_dir / "real"
    real.write_text("x")
    real.chmod(0o600)
    assert read_owned(real) == b"x"
    (private_dir / "link").symlink_to(real)
    os.mkfifo(private_dir / "fifo", 0o600)
    (private_dir / "dir").mkdir()
    for name in ("link", "fifo", "dir"):
        with pytest.raises(BadState) as caught:
            read_owned(private_dir / name)
        assert caught.value.code == "state.file"
    monkeypatch.setattr(state_module, "MAX_FILE", 0)
    with pytest.raises(BadState):
        read_owned(real)


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, "space"), (errno.EIO, "disk")])
def test_a_full_or_failing_disk_is_said_and_leaves_the_old_file(ca, private_dir, monkeypatch, number, hint):
    directory, machine = saved(ca, private_dir)
    before = (private_dir / "snapshot.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("identity.keys.os.fsync", fail)
    with pytest.raises(BadState) as caught:
        directory.save_snapshot(machine, "boot-1")
    assert caught.value.code == "state.write"
    assert hint in caught.value.hint
    assert (private_dir / "snapshot.json").read_bytes() == before
    assert sorted(p.name for p in private_dir.iterdir()) == ["epochs.json", "lock", "snapshot.json"]
