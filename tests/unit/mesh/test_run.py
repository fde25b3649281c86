"""`retinue run` without an agent: the child, its namespace, signals, exit statuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from identity.errors import BadInput, Unreachable
from identity.records import PlacementRecord, sign
from identity.wire.local import Attachment, AttachReply, SnapshotReply, Status, SvidFiles
from mesh import hosts_file, run

netns = pytest.mark.netns  # a network namespace needs root
OWN = os.stat("/proc/self/ns/net").st_ino


@netns
def test_the_child_waits_in_a_namespace_of_its_own(tmp_path):
    out = tmp_path / "out"
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['X'] + open('/sys/class/net/lo/flags').read())"
    child = run.spawn([sys.executable, "-c", code, str(out)])
    assert os.stat(f"/proc/{child.pid}/ns/net").st_ino != OWN
    assert not out.exists()
    run.start(child, {"X": "told "})
    assert run.exit_status(os.waitpid(child.pid, 0)[1]) == 0
    assert out.read_text().startswith("told ")


@netns
def test_a_child_that_is_given_up_leaves(tmp_path):
    child = run.spawn(["true"])
    os.close(child.go)
    os.close(child.failed)
    run.abandon(child)
    assert not os.path.exists(f"/proc/{child.pid}")
    run.abandon(child)


@netns
@pytest.mark.parametrize(("name", "error", "status"), [("no-such-command", run.CommandNotFound, 127), ("/etc/passwd", run.CannotRun, 126)])
def test_a_command_that_cannot_run(name, error, status):
    child = run.spawn([name])
    with pytest.raises(error) as caught:
        run.start(child, {})
    assert (caught.value.exit, caught.value.code) == (status, "run.exec")
    assert run.exit_status(os.waitpid(child.pid, 0)[1]) == status


def test_no_command():
    with pytest.raises(BadInput):
        run.spawn([])


@pytest.mark.parametrize(("wait_status", "expected"), [(0, 0), (7 << 8, 7), (signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_exit_statuses(wait_status, expected):
    assert run.exit_status(wait_status) == expected


def placement(name: str) -> str:
    record = PlacementRecord(
        trust_domain="t.example", spiffe_id=f"spiffe://t.example/wl/{name}", name=name, instance=0, endpoint="host-b",
        tunnel_key="k", epoch=1, state="active", addresses=["100.64.0.7", "fd00::7"], labels={}, issued=1,
    )  # fmt: skip
    return sign(record, Ed25519PrivateKey.generate())


class FakeAgent:
    """The local API's answers for one run."""

    calls: list[str]
    fail: Exception | None

    def __init__(self, _path) -> None:
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def attach(self, request):
        type(self).calls.append(f"attach {request.name} {request.netns.startswith('/proc/')}")
        if self.fail:
            raise self.fail
        place = Attachment(name=request.name, instance=0, kind="netns", netns=request.netns, state="active", epoch=1, addresses=["100.64.0.9"])
        return AttachReply(attachment=place)

    async def detach(self, ref):
        type(self).calls.append(f"detach {ref.name}")
        raise Unreachable("agent.unreachable", "it ended meanwhile")

    async def svid(self, ref):
        return SvidFiles(spiffe_id="spiffe://t/wl/web", certificate="c", key="k", bundle="b", expires=1)

    async def snapshot(self) -> SnapshotReply:
        return SnapshotReply(timeline="t", revision=1, trust_domain="t.example", objects={"placement/api/0": placement("api")})

    async def status(self) -> Status:
        raise NotImplementedError


@pytest.fixture
def agent(monkeypatch):
    FakeAgent.calls, FakeAgent.fail = [], None
    monkeypatch.setattr("mesh.local_client.LocalClient", FakeAgent)
    return FakeAgent


@netns
async def test_a_run_from_attach_to_detach(agent, tmp_path):
    out = tmp_path / "out"
    script = f'echo "$RETINUE_ADDRESSES $SPIFFE_ID $(cat $SVID_KEY)" > {out}; exit 5'
    child = run.spawn(["sh", "-c", script])
    assert await run.run_as(child, "web", 0, tmp_path / "agent.sock", wait=5, svid=True) == 5
    assert out.read_text() == "100.64.0.9 spiffe://t/wl/web k\n"
    assert agent.calls == ["attach web True", "detach web"]
    assert not (tmp_path / "run").exists()


@netns
async def test_the_program_knows_the_names_and_nobody_else_does(agent, tmp_path):
    out, before = tmp_path / "out", Path("/etc/hosts").read_bytes()
    child = run.spawn(["sh", "-c", f"getent ahosts api > {out}; getent ahosts api.t.example >> {out}; cat /etc/hosts >> {out}"])
    assert await run.run_as(child, "web", 0, tmp_path / "agent.sock", wait=5, svid=False, names=True) == 0
    said = out.read_text()
    assert said.count("100.64.0.7 ") >= 3
    assert "fd00::7 api api.t.example\n" in said
    assert before.decode() in said, "localhost and what the machine knows stay"
    assert Path("/etc/hosts").read_bytes() == before
    assert not (tmp_path / "run").exists()


@netns
def test_a_hosts_file_that_cannot_be_mounted(tmp_path):
    child = run.spawn(["true"])
    with pytest.raises(run.CannotRun) as caught:
        run.start(child, {}, tmp_path / "missing")
    assert caught.value.code == "run.hosts"
    assert run.exit_status(os.waitpid(child.pid, 0)[1]) == 126


@netns
async def test_names_that_come_later_are_added_in_place(agent, tmp_path, monkeypatch):
    from identity.wire.local import InstanceRef

    path = tmp_path / "svid" / run.HOSTS
    hosts_file.write(path, [])
    inode = path.stat().st_ino
    monkeypatch.setattr(run, "REFRESH", 0.0)
    task = asyncio.create_task(run._refresh(tmp_path / "agent.sock", InstanceRef(name="web"), tmp_path / "svid", svid=False))
    async with asyncio.timeout(5):
        while "api" not in path.read_text():  # noqa: ASYNC110 -- a file has no event
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert path.stat().st_ino == inode
    assert path.read_text().count("100.64.0.7 api api.t.example\n") == 1
    assert not (tmp_path / "svid" / "cert.pem").exists()


@netns
async def test_a_refused_attach_ends_the_child(agent, tmp_path):
    agent.fail = Unreachable("agent.unreachable", "no")
    child = run.spawn(["true"])
    with pytest.raises(Unreachable):
        await run.run_as(child, "web", 0, tmp_path / "agent.sock", wait=5, svid=False)
    assert not os.path.exists(f"/proc/{child.pid}")


@netns
async def test_signals_reach_the_command(agent, tmp_path):
    child = run.spawn(["sh", "-c", f"trap 'exit 9' TERM; echo up > {tmp_path}/up; while :; do sleep 0.05; done"])
    task = asyncio.create_task(run.run_as(child, "web", 0, tmp_path / "agent.sock", wait=5, svid=False))
    try:
        async with asyncio.timeout(10):
            while not (tmp_path / "up").exists():  # noqa: ASYNC110 -- a file has no event
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await task == 9
    finally:
        for number in run.FORWARDED:
            asyncio.get_running_loop().remove_signal_handler(number)


@netns
async def test_the_files_are_kept_fresh(agent, tmp_path, monkeypatch):
    from identity.wire.local import InstanceRef

    monkeypatch.setattr(run, "REFRESH", 0.0)
    task = asyncio.create_task(run._refresh(tmp_path / "agent.sock", InstanceRef(name="web"), tmp_path / "svid"))
    async with asyncio.timeout(5):
        while not (tmp_path / "svid" / "cert.pem").exists():  # noqa: ASYNC110 -- a file has no event
            await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
