from __future__ import annotations

import asyncio
import os

import pytest

from identity.errors import BadState, Conflict, NotFound
from identity.wire.local import Attach
from mesh import netns
from mesh.attachments import Attachments
from mesh.processes import process_start
from mesh.state import SavedPlace, StateDir

HOST = Attach(name="web", kind="host")


@pytest.fixture
def state(private_dir):
    return StateDir(private_dir)


@pytest.fixture
def inodes(monkeypatch):
    """Namespaces that exist: name or path -> inode. Real ones are used in tests/netns."""
    known: dict[str, int] = {}

    def identify(name: str) -> int:
        if name not in known:
            raise NotFound("netns.unknown", "no")
        return known[name]

    monkeypatch.setattr(netns, "identify", identify)
    monkeypatch.setattr(netns, "foreign", identify)
    return known


def table(state, changed=lambda: None, boot="boot-1") -> Attachments:
    made = Attachments(state, boot, changed)
    made.load()
    return made


def test_attaching_is_idempotent_and_durable(state, inodes):
    inodes["blue"] = 7
    first = table(state)
    blue = Attach(name="shop/api", instance=2, netns="blue")
    assert first.attach(HOST) == "web/0"
    assert first.attach(blue) == first.attach(blue) == "shop/api/2"
    again = table(state)
    assert again.entries() == [blue, HOST]
    assert "web/0" in again
    assert {k: (p.kind, p.netns, p.inode) for k, p in again.local().items()} == {
        "shop/api/2": ("netns", "blue", 7), "web/0": ("host", None, None),
    }  # fmt: skip


def test_a_recreated_namespace_is_the_same_place(state, inodes):
    inodes["blue"] = 7
    made = table(state)
    made.attach(Attach(name="web", netns="blue"))
    inodes["blue"] = 8
    assert made.local()["web/0"].inode == 8
    del inodes["blue"]
    assert made.local()["web/0"].inode == 7


def test_one_instance_has_one_place(state, inodes):
    inodes |= {"blue": 7, "red": 8, "/run/netns/blue": 7}
    made = table(state)
    made.attach(Attach(name="web", netns="blue"))
    for other in (Attach(name="web", netns="red"), HOST):
        with pytest.raises(Conflict):
            made.attach(other)
    made.attach(Attach(name="web", netns="/run/netns/blue"))  # the same namespace by another name
    assert made.detach("web/0") is not None
    assert made.detach("web/0") is None
    made.attach(Attach(name="web", netns="red"))


async def test_a_process_takes_its_attachment_along(state, inodes):
    process = await asyncio.create_subprocess_exec("sleep", "60")
    path = f"/proc/{process.pid}/ns/net"
    inodes[path] = 9
    changed = asyncio.Event()
    made = table(state, changed.set)
    made.attach(Attach(name="web", netns=path))
    assert state.load_attachments("boot-1")[0].started == process_start(process.pid)
    other = table(state, changed.set)  # as after a restart of the agent
    assert "web/0" in other
    made.close()
    process.kill()
    await process.wait()
    async with asyncio.timeout(5):
        await changed.wait()
    assert "web/0" not in other
    assert state.load_attachments("boot-1") == []


async def test_a_process_that_ended_meanwhile_is_not_restored(state, inodes):
    pid = os.getpid()
    inodes[f"/proc/{pid}/ns/net"] = 9
    attach = Attach(name="web", netns=f"/proc/{pid}/ns/net")
    for started in (None, 1):
        state.save_attachments([SavedPlace(attach=attach, inode=9, started=started)], "boot-1")
        assert table(state).entries() == []
    state.save_attachments([SavedPlace(attach=attach, inode=9, started=process_start(pid))], "boot-1")
    kept = table(state)
    assert kept.entries() == [attach]
    kept.close()
    assert table(state, boot="boot-2").entries() == []


async def test_a_process_ends_while_it_is_attached(state, inodes, monkeypatch):
    inodes["/proc/4194000/ns/net"] = 9
    made = table(state)
    with pytest.raises(NotFound):
        made.attach(Attach(name="web", netns="/proc/4194000/ns/net"))
    pid = os.getpid()
    inodes[f"/proc/{pid}/ns/net"] = 9

    def gone(_: int) -> int:
        raise ProcessLookupError

    monkeypatch.setattr(os, "pidfd_open", gone)
    changed = asyncio.Event()
    made = table(state, changed.set)
    made.attach(Attach(name="web", netns=f"/proc/{pid}/ns/net"))
    async with asyncio.timeout(5):
        await changed.wait()
    assert made.entries() == []


async def test_a_full_disk_refuses_to_attach_but_not_to_notice_an_end(state, inodes, monkeypatch):
    process = await asyncio.create_subprocess_exec("sleep", "60")
    path = f"/proc/{process.pid}/ns/net"
    inodes[path] = 9
    changed = asyncio.Event()
    made = table(state, changed.set)
    made.attach(Attach(name="web", netns=path))

    def full(*_: object) -> None:
        raise BadState("state.write", "no space")

    monkeypatch.setattr(state, "save_attachments", full)
    with pytest.raises(BadState):
        made.attach(Attach(name="api", kind="host"))
    assert [a.name for a in made.entries()] == ["web"]
    process.kill()
    await process.wait()
    async with asyncio.timeout(5):
        await changed.wait()
    assert made.entries() == []


def test_start_times():
    assert process_start(os.getpid()) == process_start(os.getpid()) > 0
    assert process_start(4194001) is None
