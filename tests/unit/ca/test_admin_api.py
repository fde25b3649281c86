"""Administration over the unix socket of a running server, with the command line's own client; moves with real feeds."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ca import gate
from ca.client import MAX_PATH, AdminClient, socket_path
from ca.plane import Plane
from ca.serve import Options, listener, parse_listen, running, show, sole
from identity.errors import (
    BadInput,
    BadState,
    Conflict,
    NoPrivilege,
    NotFound,
    Refused,
    RetinueError,
    Unreachable,
)
from identity.names import TrustDomain
from identity.wire.admin import (
    ExplainReply,
    Host,
    HostList,
    HostRef,
    Info,
    MoveReply,
    PolicyApply,
    PolicyFileIn,
    PolicyReply,
    Token,
    TokenCreate,
    Workload,
    WorkloadAdd,
    WorkloadList,
    WorkloadMove,
    WorkloadRef,
)
from identity.wire.entries import EntryCreate, EntryInfo, EntryRef
from identity.wire.feed import Delta, Report, Snapshot, parse_frame
from mesh.enroll import Enrollment, enroll

TD = TrustDomain("reg.test")
POLICY = "meshpolicy: 1\nlabels: {keys: [role]}\nsegments:\n  - {name: s, allow: [{id: r, from: {role: web}, to: {role: api}, on: tcp/1}]}\n"
T = TypeVar("T")


class Agent:
    """A machine that follows its feed and reports what it has, as far as a test lets it."""

    def __init__(self, machine: Enrollment) -> None:
        self.machine, self.name = machine, machine.endpoint
        self.objects: dict[str, str] = {}
        self.attached: list[str] = []
        self.reports = True
        self.seen = asyncio.Event()

    async def run(self) -> None:
        async with self.machine.client(self.machine.bundle) as client, client.stream("/v1/feed") as lines:
            async for line in lines:
                frame = parse_frame(line)
                if isinstance(frame, Snapshot):
                    self.objects = dict(frame.objects)
                elif isinstance(frame, Delta):
                    self.objects = {
                        k: v for k, v in self.objects.items() if k not in frame.removes
                    } | frame.upserts
                else:
                    continue
                if self.reports:
                    await client.send(
                        "/v1/report",
                        Report(
                            timeline=frame.timeline,
                            revision=frame.revision,
                            hash=frame.hash,
                            attached=self.attached,
                        ),
                    )
                self.seen.set()


class Rig:
    def __init__(self, server, path: Path) -> None:
        self.server, self.path = server, path
        self.plane, self.service = server.service.plane, server.service
        self.admin = AdminClient(path / "ca")

    async def call(self, fn: Callable[..., T], *args: Any, **more: Any) -> T:
        """The client blocks, so it runs beside the loop."""
        return await asyncio.to_thread(fn, *args, **more)

    async def get(self, path: str, kind: type[T], query: dict | None = None) -> T:
        return await self.call(self.admin.get, path, kind, query)

    async def post(self, path: str, message, kind: type[T]) -> T:
        return await self.call(self.admin.post, path, message, kind)

    async def refused(self, path: str, message, kind: type[RetinueError]) -> str:
        with pytest.raises(kind) as e:
            await self.post(path, message, Host)
        return e.value.code

    async def join(self, host: str) -> Agent:
        token = await self.post("/v1/tokens", TokenCreate(host=host), Token)
        return Agent(
            await enroll(
                f"https://{self.server.listen}", token.token, self.path / host, [], ["chacha20poly1305"]
            )
        )

    async def start(self, tasks: asyncio.TaskGroup, *hosts: str) -> list[Agent]:
        agents = [await self.join(host) for host in hosts]
        self.tasks = [tasks.create_task(agent.run()) for agent in agents]
        async with asyncio.timeout(10):
            for agent in agents:
                await agent.seen.wait()
        return agents

    def stop_agents(self) -> None:
        for task in self.tasks:
            task.cancel()

    async def add(self, name: str, host: str | None = None, **labels: str) -> Workload:
        return await self.post("/v1/workloads", WorkloadAdd(name=name, host=host, labels=labels), Workload)

    async def move(self, name: str, to: str, **more: Any) -> MoveReply:
        return await self.post("/v1/workloads/move", WorkloadMove(name=name, to=to, **more), MoveReply)

    async def workload(self, name: str) -> Workload:
        found = await self.get("/v1/workloads", WorkloadList)
        return next(w for w in found.workloads if w.name == name)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    Plane.create(tmp_path / "ca", TD, time.time())
    async with AsyncExitStack() as stack:
        yield Rig(
            await stack.enter_async_context(running(Options(tmp_path / "ca", "127.0.0.1:0", heartbeat=0.2))),
            tmp_path,
        )


# ---- the plain commands


async def test_info(rig: Rig) -> None:
    info = await rig.get("/v1/info", Info)
    assert (info.trust_domain, info.pid, info.listen) == ("reg.test", os.getpid(), rig.server.listen)
    assert info.root_fingerprint == rig.plane.authority.root_fingerprint
    assert info.timeline == rig.plane.store.timeline


async def test_hosts_and_workloads(rig: Rig) -> None:
    await rig.join("a")
    made = await rig.add("shop/api", "a", role="api")
    assert (made.state, made.host, made.epoch) == ("active", "a", 1)
    hosts = (await rig.get("/v1/hosts", HostList)).hosts
    assert [(h.name, h.state, h.connected, h.revision) for h in hosts] == [("a", "enrolled", False, None)]
    gone = await rig.post("/v1/workloads/revoke", WorkloadRef(name="shop/api"), Workload)
    assert (gone.state, gone.host, gone.epoch) == ("revoked", None, 2)
    assert (await rig.post("/v1/hosts/revoke", HostRef(name="a"), Host)).state == "revoked"


async def test_refusals_keep_their_code_and_hint(rig: Rig) -> None:
    await rig.join("web-1")
    await rig.add("api", "web-1")
    with pytest.raises(NotFound) as e:
        await rig.add("x", "web1")
    assert (e.value.code, e.value.hint) == ("host.unknown", "did you mean web-1?")
    assert await rig.refused("/v1/workloads", WorkloadAdd(name="api"), Conflict) == "workload.exists"
    assert await rig.refused("/v1/workloads/revoke", WorkloadRef(name="apl"), NotFound) == "workload.unknown"
    assert await rig.refused("/v1/hosts/revoke", HostRef(name="b"), NotFound) == "host.unknown"
    assert await rig.refused("/v1/tokens", TokenCreate(host="web-1"), Conflict) == "host.exists"
    with pytest.raises(BadInput):
        await rig.call(rig.admin.raw, "GET", "/v1/audit", query={"limit": 0})
    with pytest.raises(NotFound):
        await rig.call(rig.admin.raw, "GET", "/v1/nothing")


async def test_policy_and_explain(rig: Rig) -> None:
    await rig.join("a")
    await rig.add("web", "a", role="web")
    await rig.add("api", "a", role="api")
    request = PolicyApply(files=[PolicyFileIn(name="p", text=POLICY)], dry_run=True)
    dry = await rig.post("/v1/policy", request, PolicyReply)
    assert (dry.applied, len(dry.gained)) == (False, 1)
    done = await rig.post("/v1/policy", request.model_copy(update={"dry_run": False}), PolicyReply)
    assert done.author.startswith("admin:")
    assert (await rig.get("/v1/policy", PolicyReply)).digest == done.digest
    history = await rig.call(rig.admin.raw, "GET", "/v1/policy/history")
    assert [r["revision"] for r in history["revisions"]] == [1]
    found = await rig.get("/v1/explain", ExplainReply, {"src": "web", "dst": "api", "port": 1})
    assert (found.verdict, found.rule) == ("allow", "r")
    bad = PolicyApply(files=[PolicyFileIn(name="p", text="meshpolicy: 2\n")])
    with pytest.raises(BadInput) as e:
        await rig.post("/v1/policy", bad, PolicyReply)
    assert e.value.as_dict()["line"] == 1


async def test_everything_is_audited(rig: Rig) -> None:
    await rig.join("a")
    await rig.add("web", "a")
    listed = (await rig.call(rig.admin.raw, "GET", "/v1/audit"))["entries"]
    actions = [e["action"] for e in listed]
    for action in (
        "init",
        "bundle.publish",
        "token.create",
        "enroll.claim",
        "issue",
        "enroll.finish",
        "workload.add",
    ):
        assert action in actions
    assert {e["actor"] for e in listed if e["action"] == "workload.add"} == {gate.user_of(os.geteuid())}
    assert await rig.refused("/v1/hosts/revoke", HostRef(name="b"), NotFound)
    listed = (await rig.call(rig.admin.raw, "GET", "/v1/audit"))["entries"]
    assert (listed[-1]["action"], listed[-1]["subject"], listed[-1]["outcome"]) == (
        "admin",
        "/v1/hosts/revoke",
        "host.unknown",
    )
    await rig.service.change(rig.service.plane.seal)
    done = await rig.call(rig.admin.raw, "GET", "/v1/audit/verify")
    assert done["size"] > len(listed)  # the published records are in it too
    noted = {"size": done["size"], "root": done["root"]}
    assert (await rig.call(rig.admin.raw, "GET", "/v1/audit/verify", query=noted)) == done
    with pytest.raises(BadState) as e:
        await rig.call(rig.admin.raw, "GET", "/v1/audit/verify", query={**noted, "root": "f" * 64})
    assert e.value.code == "log.cut"


# ---- moves


async def test_an_entry_is_acknowledged_when_the_hosts_have_applied_it(rig: Rig) -> None:
    """Until then they answer as before, which for a first entry is more than it says: who has not is named."""
    async with asyncio.TaskGroup() as tasks:
        here, silent = await rig.start(tasks, "web-1", "web-2")
        await rig.join("web-3")  # never connects
        await rig.add("api", "web-1")
        silent.reports = False
        wanted = EntryCreate(name="api", parent="web-*", selectors=["uid:33", "unit:api.service"], wait=0.5)
        made = await rig.post("/v1/entries", wanted, EntryInfo)
        assert ("entries" in here.objects, made.hosts) == (True, ["web-1", "web-2", "web-3"])
        assert made.waiting_for == ["web-2", "web-3"]
        only = EntryCreate(name="api", parent="web-1", selectors=["uid:33", "unit:api.service"], wait=20)
        more = await rig.post("/v1/entries", only, EntryInfo)  # ends as soon as web-1 has said so
        assert (more.waiting_for, more.ended) == ([], False)
        gone = await rig.post("/v1/entries/delete", EntryRef(id=made.id, wait=0), EntryInfo)
        assert set(gone.waiting_for) >= {"web-2", "web-3"}
        assert gone.opens == ["web-2", "web-3"]
        rig.stop_agents()


async def test_a_move_waits_for_everybody_and_says_how_long(rig: Rig) -> None:
    async with asyncio.TaskGroup() as tasks:
        a, b, c = await rig.start(tasks, "a", "b", "c")
        await rig.add("api", "a", role="api")
        await rig.add("web", "c", role="web")
        await rig.post("/v1/policy", PolicyApply(files=[PolicyFileIn(name="p", text=POLICY)]), PolicyReply)
        b.attached.append("api/0")
        done = await rig.move("api", "b", wait=10)
        assert (done.workload.host, done.workload.epoch, done.from_host) == ("b", 2, "a")
        assert 0 < done.prepared_ms <= done.committed_ms <= done.released_ms < 10_000
        assert done.waiting_for == []
        for agent in (a, b, c):
            assert "placement/api/0" in agent.objects
            assert "prepare/api/0" not in agent.objects
        assert "endpoint/b" in c.objects
        assert "endpoint/a" not in c.objects
        assert "endpoint/c" not in a.objects  # it holds nothing that may talk to web any more
        rig.stop_agents()


async def test_a_move_to_who_is_not_ready_changes_nothing(rig: Rig) -> None:
    async with asyncio.TaskGroup() as tasks:
        a, b = await rig.start(tasks, "a", "b")
        before = await rig.add("web", "a")
        with pytest.raises(Conflict) as e:
            await rig.move("web", "b", wait=0.3)
        assert e.value.code == "move.not_ready"
        assert "nothing is attached" in e.value.message
        assert await rig.workload("web") == before
        b.attached.append("web/0")
        b.reports = False
        with pytest.raises(Conflict) as e:
            await rig.move("web", "b", wait=0.3)
        assert "has not applied" in e.value.message
        forced = await rig.move("web", "b", wait=0.2, force=True)
        assert (forced.workload.host, forced.prepared_ms, forced.released_ms, forced.waiting_for) == (
            "b",
            None,
            None,
            ["b"],
        )
        assert forced.workload.epoch == 4
        a.reports = False
        rig.stop_agents()


async def test_a_move_to_who_is_not_connected(rig: Rig) -> None:
    await rig.join("a")
    await rig.join("b")
    await rig.add("web", "a")
    with pytest.raises(Conflict) as e:
        await rig.move("web", "b", wait=0.1)
    assert "not connected" in e.value.message
    done = await rig.move("web", "b", wait=0, force=True)
    assert (done.workload.host, done.waiting_for) == ("b", [])


async def test_a_slow_peer_does_not_stop_a_move(rig: Rig) -> None:
    async with asyncio.TaskGroup() as tasks:
        _, b, c = await rig.start(tasks, "a", "b", "c")
        await rig.add("api", "a", role="api")
        await rig.add("web", "c", role="web")
        await rig.post("/v1/policy", PolicyApply(files=[PolicyFileIn(name="p", text=POLICY)]), PolicyReply)
        b.attached.append("api/0")
        c.reports = False
        done = await rig.move("api", "b", wait=0.3)
        assert (done.workload.host, done.released_ms, done.waiting_for) == ("b", None, ["c"])
        rig.stop_agents()


async def test_a_dry_run_moves_nothing(rig: Rig) -> None:
    async with asyncio.TaskGroup() as tasks:
        await rig.start(tasks, "a", "b")
        before = await rig.add("web", "a")
        done = await rig.move("web", "b", dry_run=True)
        assert (done.applied, done.from_host, done.waiting_for) == (False, "a", ["a", "b"])
        assert await rig.workload("web") == before
        with pytest.raises(Conflict):
            await rig.move("web", "a", dry_run=True)
        rig.stop_agents()


async def test_two_movers_one_wins(rig: Rig) -> None:
    for host in ("a", "b", "c"):
        await rig.join(host)
    await rig.add("web", "a")
    outcomes = await asyncio.gather(
        *(rig.move("web", to, wait=0.2, force=True) for to in ("b", "c")), return_exceptions=True
    )
    errors = [o for o in outcomes if isinstance(o, Conflict)]
    assert [e.code for e in errors] in ([], ["move.running"])
    assert (await rig.workload("web")).epoch == 3 - len(errors)


async def test_revoking_in_the_middle_of_a_move(rig: Rig) -> None:
    await rig.join("a")
    await rig.join("b")
    await rig.add("web", "a")
    moving = asyncio.create_task(rig.move("web", "b", wait=0.5, force=True))
    async with asyncio.timeout(10):
        while (await rig.workload("web")).state != "moving":
            pass
    await rig.post("/v1/workloads/revoke", WorkloadRef(name="web"), Workload)
    with pytest.raises((Conflict, Refused)) as e:
        await moving
    assert e.value.code == "move.lost"
    assert (await rig.workload("web")).state == "revoked"


async def test_a_mover_that_is_cut_off_leaves_no_move(rig: Rig) -> None:
    await rig.join("a")
    await rig.join("b")
    await rig.add("web", "a")
    moving = asyncio.create_task(rig.service.move(WorkloadMove(name="web", to="b", wait=30), "test"))
    async with asyncio.timeout(10):
        while (await rig.workload("web")).state != "moving":
            pass
    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    assert (await rig.workload("web")).state == "active"


# ---- who may administer


async def test_the_socket_is_private(rig: Rig) -> None:
    info = rig.server.admin.stat()
    assert stat.S_ISSOCK(info.st_mode)
    assert stat.S_IMODE(info.st_mode) == 0o600


async def test_another_user_is_refused_even_with_the_socket_open(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "peer_uid", lambda _: 12345)
    with pytest.raises(NoPrivilege) as e:
        await rig.get("/v1/info", Info)
    assert (e.value.code, e.value.exit) == ("admin.user", 4)


def test_the_kernel_names_the_peer() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert gate.peer_uid(one) == os.geteuid()


# ---- the client without a server


def test_no_server(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(Unreachable) as e:
            AdminClient(directory).get("/v1/info", Info)
        assert (e.value.code, e.value.exit) == ("ca.down", 3)
        assert "retinue-ca serve" in e.value.hint
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "admin.sock"))
    left.close()
    with pytest.raises(Unreachable):
        AdminClient(tmp_path).get("/v1/info", Info)


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as e:
        socket_path(tmp_path / ("x" * MAX_PATH))
    assert e.value.code == "ca.path"


@pytest.mark.parametrize(("said", "code"), [(b"", "ca.lost"), (b"nonsense\r\n\r\n", "ca.lost"), (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "ca.answer"),
                                            (b"HTTP/1.1 500 X\r\nContent-Length: 1\r\n\r\n{", "api.unexpected")])  # fmt: skip
def test_a_server_that_talks_nonsense(tmp_path: Path, said: bytes, code: str) -> None:
    import threading

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "admin.sock"))
        server.listen(1)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RetinueError) as e:
            AdminClient(tmp_path).get("/v1/info", Info)
        thread.join()
    assert e.value.code == code


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "admin.sock"))
        server.listen(1)
        with pytest.raises(RetinueError) as e:
            AdminClient(tmp_path, timeout=0.1).get("/v1/info", Info)
    assert e.value.code == "ca.slow"


# ---- starting


async def test_one_server_a_directory(rig: Rig) -> None:
    with pytest.raises(Conflict) as e:
        async with running(Options(rig.path / "ca", "127.0.0.1:0")):
            pytest.fail("a second server started")
    assert e.value.code == "serve.running"


async def test_a_taken_port_stops_the_start_and_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    Plane.create(tmp_path / "two", TD, time.time())
    with pytest.raises(Conflict) as e:
        async with running(Options(tmp_path / "two", rig.server.listen)):
            pytest.fail("it started on a taken port")
    assert e.value.code == "serve.port"
    with sole(tmp_path / "two"):
        pass


async def test_a_server_that_was_killed_leaves_no_obstacle(tmp_path: Path) -> None:
    Plane.create(tmp_path / "ca", TD, time.time())
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "ca" / "admin.sock"))
    async with running(Options(tmp_path / "ca", "127.0.0.1:0")) as server:
        assert server.service.plane.trust_domain == TD
    assert not (tmp_path / "ca" / "admin.sock").exists()


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(BadState) as e, sole(tmp_path / "none"):
        pytest.fail("locked nothing")
    assert e.value.code == "ca.missing"


@pytest.mark.parametrize(
    "text", ["", "8443", ":8443", "host", "host:x", "127.0.0.1:70000", "::1:8443", "[::1]"]
)
def test_bad_listen_addresses(text: str) -> None:
    with pytest.raises(BadInput) as e:
        parse_listen(text)
    assert e.value.code == "serve.listen"


def test_an_address_that_is_not_ours() -> None:
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises((BadInput, NoPrivilege)):
            listener(host, 0)


def test_one_listener_for_both_families() -> None:
    with listener("::", 0) as sock:
        port = sock.getsockname()[1]
        assert show(sock) in {f"[::]:{port}", f"0.0.0.0:{port}"}
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), timeout=5):
                pass
