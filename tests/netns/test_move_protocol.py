"""The move protocol beyond the planned move: silent holders and leases, taking back, told step by step, whole hosts."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import suppress
from typing import Any

import pytest

from identity.errors import Conflict, RetinueError
from identity.wire.admin import WorkloadMove, WorkloadRef
from mesh.lab_process import ProcessFailed, command, run
from mesh.probe_pairs import Receiver, Sender

NEWS = 7000
LEASE = 4.0
HOSTS = ("host-a", "host-b", "host-c")
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
      - {id: api-news, from: {role: api}, to: {role: web}, on: udp/7000}
"""


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    """web on host-a; api (available) and vault (strict) on host-b, both with a place ready on host-c."""
    made = make_mesh(extra=HOSTS)
    made.lab.processes["retinue-ca"].kill()
    made.lab.start_ca(init=False, args=("--lease", str(LEASE)))
    for host in HOSTS:
        made.lab.enroll(host)
        made.lab.start_agent(host, args=("--lease", str(LEASE)), wait=False)
    for host in HOSTS:
        made.lab.processes[f"agent-{host}"].wait_ready()
    made.add("web", "host-a")
    made.add("api", "host-b")
    vault = made.lab.ca("workload", "add", "vault", "--host", "host-b", "--label", "role=api", "--fence", "strict")
    made.addresses["vault"] = vault["addresses"]
    made.place("web", "host-a")
    for name in ("api", "vault"):
        made.place(name, "host-b")
        made.place(name, "host-c", wait=0)
    made.apply(POLICY)
    return made


@pytest.fixture(params=[0, 1], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


async def home(mesh: Any, name: str) -> str:
    return str(next(w["host"] for w in await mesh.lab.aca("workload", "list") if w["name"] == name))


@pytest.fixture(autouse=True)
async def _at_home(mesh: Any) -> None:
    """api and vault on host-b, every agent connected."""
    for host in HOSTS:
        await mesh.lab.until(host, lambda s: s.control == "connected", timeout=30)
    for name in ("api", "vault"):
        if await home(mesh, name) != "host-b":
            await mesh.lab.aca("workload", "move", name, "--to", "host-b")


def steps(mesh: Any, *args: str, codes: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """`retinue-ca ARGS -o jsonl`, its lines."""
    done = run([*command("retinue-ca"), *args, "-o", "jsonl"], env={"RETINUE_CA_DIR": str(mesh.lab.ca_dir)}, codes=codes)
    return [json.loads(line) for line in done.stdout.splitlines()]


async def audit(mesh: Any, subject: str) -> list[dict[str, Any]]:
    return list(await mesh.lab.aca("audit", "list", "--subject", subject))


class Heard:
    """What web hears of a workload that two places claim to be."""

    def __init__(self, mesh: Any, name: str, family: int) -> None:
        self.mesh, self.name, self.family = mesh, name, family
        self.own = mesh.addresses[name][family]
        self.news = Receiver("udp", NEWS, netns=mesh.lab.netns("web-host-a"), address=mesh.addresses["web"][family])

    def sender(self, host: str) -> Sender:
        to = self.mesh.addresses["web"][self.family]
        return Sender("udp", to, NEWS, tag=host, rate=200, netns=self.mesh.lab.netns(f"{self.name}-{host}"), bind=self.own)

    def of(self, host: str) -> int:
        return len(self.news.of(host).seqs)


async def test_the_steps_of_a_planned_move(mesh: Any) -> None:
    said = await asyncio.to_thread(steps, mesh, "workload", "move", "api", "--to", "host-c")
    assert [s.get("step", s["event"]) for s in said if s.get("step") != "waiting"] == ["prepare", "ready", "commit", "released", "done"]
    assert said[-1]["move"]["silent"] is False
    epochs = {s["epoch"] for s in said if s.get("epoch")}
    assert epochs == {said[-1]["move"]["workload"]["epoch"]}
    status = await mesh.lab.until("host-b", lambda s: any(a.name == "api" and a.state == "fenced" for a in s.attachments))
    assert next(a.epoch for a in status.attachments if a.name == "api") is None


async def test_a_plan_changes_nothing(mesh: Any) -> None:
    before = await mesh.lab.aca("workload", "list")
    planned = await mesh.lab.aca("workload", "move", "api", "--to", "host-c", "--plan")
    assert planned["applied"] is False
    assert "host-c" in planned["waiting_for"]
    assert await mesh.lab.aca("workload", "list") == before


@pytest.mark.parametrize("family", [1])
async def test_a_move_is_taken_back(mesh: Any, family: int) -> None:
    """While it waits for its target; traffic does not notice, and the epoch that was prepared is never used."""
    heard = Heard(mesh, "api", family)
    before = next(w for w in await mesh.lab.aca("workload", "list") if w["name"] == "api")
    async with heard.news, heard.sender("host-b"):
        await heard.news.wait("host-b", 50)
        move = asyncio.create_task(mesh.lab.admin("POST", "/v1/workloads/move", WorkloadMove(name="api", to="host-a", wait=60), timeout=90))
        while next(w["state"] for w in await mesh.lab.aca("workload", "list") if w["name"] == "api") != "moving":
            pass
        with pytest.raises(Conflict) as other:
            await mesh.lab.admin("POST", "/v1/workloads/move", WorkloadMove(name="api", to="host-c", wait=1))
        assert other.value.code == "move.running"
        taken = await mesh.lab.admin("POST", "/v1/workloads/abort", WorkloadRef(name="api"))
        assert (taken["state"], taken["host"], taken["epoch"]) == ("active", "host-b", before["epoch"])
        with pytest.raises(Conflict) as told:
            await move
        assert told.value.code == "move.aborted"
        await heard.news.wait_more("host-b", 50)
    with pytest.raises(Conflict) as again:
        await mesh.lab.admin("POST", "/v1/workloads/abort", WorkloadRef(name="api"))
    assert again.value.code == "move.none"
    moved = await mesh.lab.aca("workload", "move", "api", "--to", "host-c")
    assert moved["workload"]["epoch"] >= before["epoch"] + 2, "the epoch of the aborted move is not signed again"


async def test_there_and_back_within_a_second(mesh: Any, family: int) -> None:
    heard = Heard(mesh, "api", family)
    async with heard.news, heard.sender("host-b"), heard.sender("host-c"):
        await heard.news.wait("host-b", 50)
        began = time.monotonic()
        for to in ("host-c", "host-b"):
            await mesh.lab.admin("POST", "/v1/workloads/move", WorkloadMove(name="api", to=to, wait=5))
        print(f"there and back: {time.monotonic() - began:.3f} s")
        fenced = heard.of("host-c")
        await heard.news.wait_more("host-b", 100)
        assert heard.of("host-c") == fenced


async def test_crash_of_an_available_holder(mesh: Any, family: int) -> None:
    """Its agent and engine are dead: the move needs no force, says whose silence it is, and is over in a moment."""
    lab, heard = mesh.lab, Heard(mesh, "api", family)
    async with heard.news, heard.sender("host-c"):
        lab.processes["agent-host-b"].kill()
        began = time.monotonic()
        moved = await lab.aca("workload", "move", "api", "--to", "host-c")
        await heard.news.wait("host-c", 1)
        took = time.monotonic() - began
        print(f"crash move: first packet of the new holder {took:.3f} s after the order")
    assert moved["silent"] is True
    assert moved["double_until"] > time.time()
    entry = next(e for e in reversed(await audit(mesh, "api/0")) if e["action"] == "workload.move")
    assert "host-b" in json.dumps(entry), "the audit names the silent holder"
    await asyncio.to_thread(lab.start_agent, "host-b", args=("--lease", str(LEASE)))
    await lab.until("host-b", lambda s: all(a.state != "active" for a in s.attachments if a.name == "api"))


async def test_a_strict_identity_waits_for_the_lease_of_a_stopped_holder(mesh: Any, family: int) -> None:
    """At COMMIT nobody serves it any more; the stopped one, resumed, is fenced at once."""
    lab, heard = mesh.lab, Heard(mesh, "vault", family)
    agent = lab.processes["agent-host-b"]
    async with heard.news, heard.sender("host-b"):
        await heard.news.wait("host-b", 50)
        agent.send(signal.SIGSTOP)
        try:
            said = await asyncio.to_thread(steps, mesh, "workload", "move", "vault", "--to", "host-c", "--wait", "1")
            names = [s.get("step", s["event"]) for s in said]
            assert "holder_silent" in names
            assert names.index("lease") < names.index("commit")
            wait = next(s for s in said if s.get("step") == "lease")
            commit = next(s for s in said if s.get("step") == "commit")
            assert commit["ms"] - wait["ms"] >= (LEASE - 1) * 1000, "it has waited the lease out"
            assert said[-1]["move"]["silent"] is False
            fenced = heard.of("host-b")
            async with heard.sender("host-c"):
                await heard.news.wait("host-c", 50)
            assert heard.of("host-b") == fenced, "0 accepted from the stopped host, whose engine still runs"
        finally:
            agent.send(signal.SIGCONT)
        resumed = time.monotonic()
        await lab.until("host-b", lambda s: all(a.state != "active" for a in s.attachments if a.name == "vault"))
        print(f"self-fence {time.monotonic() - resumed:.3f} s after it went on")
        assert heard.of("host-b") == fenced


async def test_force_does_not_wait_and_says_so(mesh: Any) -> None:
    lab, agent = mesh.lab, mesh.lab.processes["agent-host-b"]
    agent.send(signal.SIGSTOP)
    try:
        said = await asyncio.to_thread(steps, mesh, "workload", "move", "vault", "--to", "host-c", "--wait", "1", "--force")
        names = [s.get("step", s["event"]) for s in said]
        assert "lease" not in names
        assert "fenced" in names, "it is said how long two may serve"
        assert said[-1]["move"]["silent"] is True
        entry = next(e for e in reversed(await audit(mesh, "vault/0")) if e["action"] == "workload.move")
        assert "forced" in json.dumps(entry)
    finally:
        agent.send(signal.SIGCONT)
    await lab.until("host-b", lambda s: all(a.state != "active" for a in s.attachments if a.name == "vault"))


async def test_a_long_lease_is_refused_rather_than_waited_out(mesh: Any) -> None:
    """An available identity is served for hours without the CA: who wants to be sure is told until when."""
    agent = mesh.lab.processes["agent-host-b"]
    agent.send(signal.SIGSTOP)
    try:
        with pytest.raises(ProcessFailed, match=r"move\.lease"):
            await mesh.lab.aca("workload", "move", "api", "--to", "host-c", "--wait", "1", "--wait-lease")
        assert await home(mesh, "api") == "host-b"
    finally:
        agent.send(signal.SIGCONT)


async def test_the_message_is_lost(mesh: Any) -> None:
    """The new holder's agent is restarted in the middle of the move: it learns of it on connecting, and the move goes on."""
    lab = mesh.lab
    lab.processes["agent-host-c"].kill()
    move = asyncio.create_task(lab.admin("POST", "/v1/workloads/move", WorkloadMove(name="api", to="host-c", wait=30), timeout=90))
    with suppress(RetinueError):
        await asyncio.to_thread(lab.start_agent, "host-c", args=("--lease", str(LEASE)))
    moved = await move
    assert moved["workload"]["host"] == "host-c"
    await lab.until("host-c", lambda s: any(a.name == "api" and a.state == "active" for a in s.attachments))


@pytest.mark.parametrize("family", [0])
async def test_a_host_is_drained(mesh: Any, family: int) -> None:
    """Everything leaves host-b while web hears api all the time; what has no place stops it before anything is moved."""
    lab = mesh.lab
    lab.ca("workload", "add", f"stuck{family}", "--host", "host-b")
    with pytest.raises(ProcessFailed, match=r"drain\.no_target"):
        await lab.aca("host", "drain", "host-b")
    assert await home(mesh, "api") == "host-b", "nothing was moved"
    space = lab.add_workload(f"stuck{family}-host-c")
    lab.retinue("host-c", "attach", f"stuck{family}", "--netns", space)
    dry = await asyncio.to_thread(steps, mesh, "host", "drain", "host-b", "--dry-run")
    assert {(s["instance"], s["to"]) for s in dry[:-1]} >= {("api/0", "host-c"), ("vault/0", "host-c")}
    heard = Heard(mesh, "api", family)
    async with heard.news, heard.sender("host-b"), heard.sender("host-c"):
        await heard.news.wait("host-b", 50)
        said = await asyncio.to_thread(steps, mesh, "host", "drain", "host-b", "--to", "host-c")
        await heard.news.wait("host-c", 50)
    assert (said[-1]["event"], said[-1]["left"]) == ("drained", [])
    assert [s["done"] for s in said if s["event"] == "instance"] == list(range(1, said[-1]["moved"] + 1))
    again = await lab.aca("host", "drain", "host-b")
    assert (again["moved"], again["left"]) == (0, []), "draining again has nothing left to do"
    with pytest.raises(ProcessFailed, match=r"host\.draining"):
        await lab.aca("workload", "move", "api", "--to", "host-b")
    assert next(h["draining"] for h in await lab.aca("host", "list") if h["name"] == "host-b")
    await lab.aca("host", "undrain", "host-b")
    await lab.aca("workload", "move", "api", "--to", "host-b")


async def test_the_fences_are_in_the_status(mesh: Any) -> None:
    """`explain identity` on the old host: epochs below the one it saw are refused for ever."""
    await mesh.lab.aca("workload", "move", "api", "--to", "host-c")
    await mesh.lab.until("host-b", lambda s: any(a.name == "api" and a.state == "fenced" for a in s.attachments))
    found = await asyncio.to_thread(mesh.lab.retinue, "host-b", "explain", "identity", "api", codes=(0, 1))
    assert any("refused here for ever" in text for text in found["fences"])
