"""mesh.lab and its registry, as far as no privilege is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from identity.errors import Conflict, NoPrivilege
from mesh import lab_registry
from mesh.lab import Lab, Node
from mesh.lab_process import base_env, command, inside, start_time
from mesh.lab_registry import Entry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lab_registry, "ROOT", tmp_path / "labs")
    return tmp_path / "labs"


def test_a_lab_that_is_down_has_no_names() -> None:
    lab = Lab(["a"])
    with pytest.raises(Conflict):
        _ = lab.id
    assert lab.stop() == []


def test_without_root_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoPrivilege, match="root"):
        Lab(["a"]).start()


def test_nodes_know_their_places(tmp_path: Path) -> None:
    node = Node("a", "rtnlab-x-a", "198.51.100.10", "2001:db8:51:100::a", tmp_path)
    assert node.underlay == ["198.51.100.10:51820", "[2001:db8:51:100::a]:51820"]
    assert node.env["RETINUE_RUN_DIR"] == str(tmp_path / "run")


def test_the_registry_round_trip(registry: Path) -> None:
    assert lab_registry.entries() == []
    entry = lab_registry.create()
    assert entry.owner_alive
    assert entry.directory.stat().st_mode & 0o777 == 0o700
    entry.processes.append((1, 2))
    entry.kept = True
    entry.save()
    assert lab_registry.entries() == [entry]
    assert registry.stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in registry.iterdir()) == [entry.id, f"{entry.id}.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"owner": [1]}', '{"owner": ["a", "b"], "processes": [], "kept": false}', '{"owner": 5}'])
def test_damaged_files_name_an_ownerless_lab(registry: Path, text: str) -> None:
    registry.mkdir()
    (registry / "abc123.json").write_text(text)
    (registry / "notes.json").write_text("{}")
    found = lab_registry.entries()
    assert [e.id for e in found] == ["abc123"]
    assert not found[0].owner_alive
    assert found[0].processes == []


def test_an_owner_is_its_pid_and_its_start(registry: Path) -> None:
    mine = start_time(os.getpid())
    assert mine is not None
    assert Entry("abc123", (os.getpid(), mine)).owner_alive
    assert not Entry("abc123", (os.getpid(), mine + 1)).owner_alive
    assert start_time(2**22 + 1) is None


def test_a_zombie_has_no_start_time() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None
    child.wait()


def test_a_new_file_is_whole_json(registry: Path) -> None:
    entry = lab_registry.create()
    assert json.loads(entry.file.read_text())["owner"] == list(entry.owner)


def test_commands_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_SECRET", "x")
    monkeypatch.setenv("HTTPS_PROXY", "x")
    assert not {"SOME_SECRET", "HTTPS_PROXY"} & set(base_env())
    assert base_env({"A": "b"})["A"] == "b"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "from ca.cli import main" in command("retinue-ca")[-1]
    (tmp_path / "retinue-ca").touch()
    assert command("retinue-ca") == [str(tmp_path / "retinue-ca")]
    assert inside(None, ["a", "b"]) == ["a", "b"]
