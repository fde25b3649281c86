"""Control groups: which may hold an identity, telling one from the next under its name, and hearing of both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput, Conflict, NotFound, Refused, RetinueError
from identity.wire.local import Attach
from mesh import units
from mesh.attachments import Attachments
from mesh.attestation import Caller
from mesh.plan import UnitPlan
from mesh.snapshot import instance_key
from mesh.state import SavedPlace, StateDir


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hierarchy that is a directory: the same names, owners and numbers. Real ones are in tests/netns."""
    (tmp_path / "system.slice").mkdir()
    (tmp_path / "system.slice" / "web.service").mkdir()
    monkeypatch.setattr(units, "TREE", tmp_path)
    monkeypatch.setattr(units, "root", lambda: tmp_path)
    if os.getuid() != 0:
        monkeypatch.setattr(units, "OWNER", os.getuid())
    return tmp_path


@pytest.mark.parametrize("path", ["", "/", "//", "/a//b", "/../a", "/a/..", "/./a", '/a"', "/a\nb", "/" + "a/" * 256 + "b"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(BadInput):
        units.clean(path)


@given(st.text(max_size=40))
def test_any_text(text: str) -> None:
    try:
        name = units.clean(text)
    except BadInput:
        return
    assert units.clean(name) == name
    assert '"' not in name
    assert ".." not in name.split("/")


def test_only_a_group_whose_way_is_roots(tree: Path) -> None:
    ident = units.inspect("/system.slice/web.service")
    assert ident == (tree / "system.slice" / "web.service").stat().st_ino
    for gone in ("/system.slice/none", "/none/none"):
        with pytest.raises(NotFound):
            units.inspect(gone)
    (tree / "system.slice").chmod(0o777)
    with pytest.raises(Refused, match="could make"):
        units.inspect("/system.slice/web.service")
    (tree / "file").write_text("")
    assert units.ident_of("/file") is None
    assert units.exists("system.slice/web.service")
    assert not units.exists("system.slice/none")


def test_the_group_as_it_is_now(tree: Path) -> None:
    one = units.unit_plan("/system.slice/web.service", 7)
    assert (one.path, one.place, one.level, one.uid) == ("system.slice/web.service", "system.slice/web.service", 2, 7)
    assert units.unit_plan("/none", None).ident is None


def test_without_a_hierarchy(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise NotFound("attach.no_cgroups", "none")

    monkeypatch.setattr(units, "root", none)
    assert units.ident_of("/a") is None
    assert units.unit_plan("/a/b", None).place == "a/b"
    assert list(units._above("/a/b")) == []


@pytest.mark.parametrize(("group", "path", "holds"), [
    ("a/b", "/a/b", True), ("a/b/c", "/a/b", True), ("a/bc", "/a/b", False), ("a", "/a/b", False), ("", "/a", False),
])  # fmt: skip
def test_groups_below(group: str, path: str, holds: bool) -> None:
    assert units.within(group, path) is holds


def test_the_group_of_a_process() -> None:
    assert units.group_of(os.getpid()) is not None
    assert units.group_of(4_194_000) is None


@pytest.mark.parametrize(("name", "path"), [
    ("nginx", "/system.slice/nginx.service"), ("nginx.service", "/system.slice/nginx.service"), ("x.scope", "/system.slice/x.scope"),
    ("a-b@1.service", "/system.slice/system-a\\x2db.slice/a-b@1.service"),
])  # fmt: skip
def test_the_group_of_a_unit_where_nobody_can_be_asked(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", silent)
    assert units.group_of_unit(name) == path
    assert units.clean(path)


def test_the_group_of_a_unit_is_what_the_manager_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "systemctl"
    tool.write_text('#!/bin/sh\n[ "$5" = shop.service ] && echo /shop.slice/shop.service\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert units.group_of_unit("shop") == "/shop.slice/shop.service"
    assert units.group_of_unit("other") == "/system.slice/other.service"


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "a\n", "x" * 300])
def test_names_of_units(name: str) -> None:
    with pytest.raises(BadInput):
        units.group_of_unit(name)


# ---- in the table of attachments


UNIT = Attach(name="web", kind="unit", cgroup="system.slice/web.service/")


async def test_a_group_that_goes_and_comes_again(tree: Path, private_dir: Path) -> None:
    place = tree / "system.slice" / "web.service"
    heard = asyncio.Event()
    made = Attachments(StateDir(private_dir), "boot", heard.set)
    assert made.attach(UNIT) == made.attach(UNIT) == "web/0"
    assert made.entries()[0].cgroup == "/system.slice/web.service"
    first = made.local()["web/0"].unit
    assert first is not None
    for step in (place.rmdir, (tree / "system.slice").rmdir, (tree / "system.slice").mkdir, place.mkdir):
        heard.clear()
        step()
        if step in {place.rmdir, place.mkdir}:
            async with asyncio.timeout(5):
                await heard.wait()
    again = made.local()["web/0"].unit
    assert again is not None
    assert again.ident is not None
    made.close()
    other = Attachments(StateDir(private_dir), "boot", heard.set)
    other.load()
    assert "web/0" in other
    heard.clear()
    place.rmdir()
    async with asyncio.timeout(5):
        await heard.wait()
    assert other.local()["web/0"].unit is not None
    other.close()


async def test_a_group_that_policy_names_is_followed(tree: Path, private_dir: Path) -> None:
    """It need not be there yet, and nobody else's attachment has to be in it."""
    heard = asyncio.Event()
    made = Attachments(StateDir(private_dir), "boot", heard.set)
    made.attach(Attach(name="web", kind="host"))
    path, place = "system.slice/job.service", tree / "system.slice" / "job.service"

    def ident() -> int | None:
        found = made.local()["web/0"].groups[path]
        assert isinstance(found, UnitPlan)
        return found.ident

    assert ident() is None
    for step, there in ((place.mkdir, True), (place.rmdir, False), (place.mkdir, True)):
        heard.clear()
        step()
        async with asyncio.timeout(5):
            await heard.wait()
        assert (ident() is not None) is there
    heard.clear()
    (tree / "system.slice").chmod(0o777)
    async with asyncio.timeout(5):
        await heard.wait()
    view = made.local()["web/0"].groups
    why = view.get(path)
    assert isinstance(why, str)
    assert "root alone" in why
    (tree / "system.slice").chmod(0o755)
    assert view[path] == why, "one plan sees one state"
    assert list(view) == [path]
    assert len(view) == 1
    made.close()


async def test_only_places_on_the_host_itself_know_groups(tree: Path, private_dir: Path) -> None:
    made = Attachments(StateDir(private_dir), "boot", lambda: None)
    made.attach(UNIT)
    made.attach(Attach(name="api", kind="host"))
    spaces = [SavedPlace(attach=Attach(name="job", kind="netns", netns="none"), inode=7)]
    made._places |= {instance_key(one.attach.name, 0): one for one in spaces}
    found = made.local()
    assert found["web/0"].groups is found["api/0"].groups
    assert "system.slice/web.service" in found["api/0"].groups
    assert dict(found["job/0"].groups) == {}
    made.close()


def test_a_group_that_policy_names(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = units.named("system.slice/web.service")
    assert isinstance(found, UnitPlan)
    assert found.ident == units.ident_of("/system.slice/web.service")

    def none() -> Path:
        raise NotFound("attach.no_cgroups", "none here")

    monkeypatch.setattr(units, "root", none)
    assert units.named("system.slice/web.service") == "none here"


async def test_one_place_at_a_time(tree: Path, private_dir: Path) -> None:
    made = Attachments(StateDir(private_dir), "boot", lambda: None)
    made.attach(UNIT)
    (tree / "other.service").mkdir()
    with pytest.raises(Conflict):
        made.attach(Attach(name="web", kind="unit", cgroup="/other.service"))
    made.attach(UNIT.model_copy(update={"uid": 5}))
    assert made.entries()[0].uid == 5, "another user of the same place is a change"
    (tree / "system.slice" / "web.service").rmdir()
    made.attach(Attach(name="web", kind="unit", cgroup="/other.service"))  # the old place is gone
    made.close()
    made.close()


@pytest.mark.parametrize("fields", [
    {"cgroup": None}, {"netns": "x"}, {"device": "tap0"}, {"kind": "host"}, {"kind": "netns", "netns": "x"}, {"kind": "host", "cgroup": None, "uid": 1},
    {"cgroup": "/"}, {"cgroup": "/a/../b"}, {"cgroup": "/none"},
])  # fmt: skip
async def test_what_is_no_unit(tree: Path, private_dir: Path, fields: dict[str, object]) -> None:
    made = Attachments(StateDir(private_dir), "boot", lambda: None)
    with pytest.raises(RetinueError):
        made.attach(UNIT.model_copy(update=fields))
    assert made.entries() == []
    made.close()


async def test_whose_process_it_is(tree: Path, private_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Attachments(StateDir(private_dir), "boot", lambda: None)
    made.attach(UNIT.model_copy(update={"uid": 5}))
    groups = {10: "system.slice/web.service", 11: "system.slice/web.service/sub", 12: "system.slice", 13: None}
    monkeypatch.setattr(units, "group_of", groups.get)
    with contextlib.closing(Caller(10, 5, 5, os.pidfd_open(os.getpid()))) as alive:
        def asks(pid: int, uid: int = 5) -> bool:
            return made.is_member("web/0", Caller(pid, uid, uid, alive.pidfd))  # type: ignore[arg-type]  # a plain text is a key here

        assert [asks(pid) for pid in (10, 11, 12, 13)] == [True, True, False, False]
        assert not asks(10, uid=6)
        made.detach("web/0")  # type: ignore[arg-type]
        assert not asks(10)
    made.close()


def test_joining_what_is_not_there(tree: Path) -> None:
    with pytest.raises(Refused):
        units.join("/none")
