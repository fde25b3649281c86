"""Facts about real processes: another user, an ended one, one that became somebody else, a name with newlines."""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from identity.entries import NOBODY
from mesh.attestation import Caller, NotAttested
from mesh.process_facts import cgroup_of, facts_of

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start processes of other users")
WAIT = "import sys; sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"


@pytest.fixture
def start():
    made = []

    def begin(argv=None, **options):
        process = subprocess.Popen(
            argv or [sys.executable, "-c", WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **options
        )
        assert process.stdout.read(1) == b"x"
        made.append(process)
        return process

    yield begin
    for process in made:
        process.kill()
        process.communicate()


def caller_of(process, uid=0, gid=0):
    return Caller(process.pid, uid, gid, os.pidfd_open(process.pid))


def look(caller, **options):
    try:
        return facts_of(caller, frozenset({"web"}), **options)
    finally:
        caller.close()


@root
def test_the_facts_of_another_user(start):
    process = start(["/bin/sh", "-c", "printf x; read line"], user=4321, group=4322, extra_groups=[4323, 4324])
    found = look(caller_of(process, 4321, 4322), program=True, digest=True)
    shell = os.path.realpath("/bin/sh")
    assert (found.uid, found.gid, found.groups, found.netns) == (4321, 4322, {4323, 4324}, {"web"})
    assert (found.path, found.sha256) == (shell, hashlib.sha256(Path(shell).read_bytes()).hexdigest())
    assert found.cgroup.startswith("/")


@root
def test_a_process_that_became_another_user_is_nobody(start):
    process = start(["/bin/sh", "-c", "printf x; read line"], user=4321, group=4321, extra_groups=[])
    for uid, gid in ((0, 0), (4322, 4321), (4321, 0)):
        with pytest.raises(NotAttested) as caught:
            look(caller_of(process, uid, gid))
        assert caught.value.code == "attest.changed"


@root
def test_nobody_is_nobody(start):
    process = start(["/bin/sh", "-c", "printf x; read line"], user=NOBODY, group=4321, extra_groups=[])
    with pytest.raises(NotAttested) as caught:
        look(caller_of(process, NOBODY, 4321))
    assert caught.value.code == "attest.nobody"


def test_an_ended_process_has_no_facts(start):
    process = start()
    caller = caller_of(process, os.geteuid(), os.getegid())
    process.kill()
    process.wait()
    with pytest.raises(NotAttested) as caught:
        look(caller)
    assert caught.value.code == "attest.gone"


def test_a_number_that_is_another_process_by_now_has_no_facts(start):
    """The pidfd is of one that ended, its number is one that lives: what /proc says is somebody else's."""
    ended, alive = start(), start()
    fd = os.pidfd_open(ended.pid)
    ended.kill()
    ended.wait()
    with pytest.raises(NotAttested) as caught:
        look(Caller(alive.pid, os.geteuid(), os.getegid(), fd))
    assert caught.value.code == "attest.gone"


def test_a_name_with_lines_in_it_says_nothing(start, tmp_path):
    """A program may be called anything: its name is not read as a line about its user."""
    evil = tmp_path / "a\nUid:\t0\t0"
    shutil.copy(os.path.realpath("/bin/sh"), evil)
    process = start([str(evil), "-c", "printf x; read line"])
    found = look(caller_of(process, os.geteuid(), os.getegid()), program=True)
    assert found.uid == os.geteuid()
    assert found.path == str(evil)


def test_what_is_not_asked_for_is_not_read(start):
    found = look(caller_of(start(), os.geteuid(), os.getegid()))
    assert (found.path, found.sha256) == (None, None)


def test_a_program_too_large_has_no_digest(start, monkeypatch):
    monkeypatch.setattr("mesh.process_facts.MAX_PROGRAM", 10)
    found = look(caller_of(start(), os.geteuid(), os.getegid()), program=True, digest=True)
    assert found.path is not None
    assert found.sha256 is None


def test_a_replaced_program_is_told_by_what_runs(start, tmp_path):
    """The file at the path is not what runs: the digest is of what runs, and the path says that it is gone."""
    program = tmp_path / "program"
    shutil.copy(os.path.realpath("/bin/sh"), program)
    before = hashlib.sha256(program.read_bytes()).hexdigest()
    process = start([str(program), "-c", "printf x; read line"])
    program.unlink()
    program.write_bytes(b"the approved program")
    found = look(caller_of(process, os.geteuid(), os.getegid()), program=True, digest=True)
    assert found.sha256 == before
    assert found.path == f"{program} (deleted)"


def test_a_process_that_execs_is_what_it_became(start, tmp_path):
    """The stated limit: who connects and then runs the approved program is taken for it, by path and by digest. Its user and
    its place are what they were, and those are what an entry has to ask for.
    """
    approved = tmp_path / "approved"
    shutil.copy(os.path.realpath("/bin/sleep"), approved)
    process = start(["/bin/sh", "-c", f"printf x; read line; exec {approved} 60"])
    caller = caller_of(process, os.geteuid(), os.getegid())
    before = facts_of(caller, frozenset(), program=True, digest=True)
    process.stdin.write(b"go\n")
    process.stdin.flush()
    for _ in range(1000):
        after = facts_of(caller, frozenset(), program=True, digest=True)
        if after.path == str(approved):
            break
        select.select([], [], [], 0.01)
    caller.close()
    assert before.path != after.path == str(approved)
    assert after.sha256 == hashlib.sha256(approved.read_bytes()).hexdigest() != before.sha256
    assert (after.uid, after.gid, after.cgroup) == (before.uid, before.gid, before.cgroup)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0::/system.slice/a.service\n", "/system.slice/a.service"),
        ("1:name=systemd:/system.slice/b.service\n0::/\n", "/system.slice/b.service"),
        ("4:memory:/box/1\n1:cpu:/\n0::/\n", "/"),
        ("0::/a:b/c\n", "/a:b/c"),
        ("0::/a\n0::/b\n", "/a"),
        ("", "/"), ("nonsense", "/"),
    ],
)  # fmt: skip
def test_control_groups(text, found):
    assert cgroup_of(text) == found
