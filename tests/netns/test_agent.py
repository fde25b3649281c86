"""Real agents against a real CA: what holds when an agent is killed, the CA is gone, a file was altered.

    host-a: web, batch        host-b: api        web -> api tcp/8080 udp/9000 permitted, batch -> api not
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket as unix
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mesh.lab import Lab
from mesh.lab_process import ProcessFailed, command, inside
from mesh.probe_pairs import Receiver, Sender
from tests.netns.plane_rig import until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, api, batch]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: [tcp/8080, udp/9000, icmp]}
"""


class World:
    """A lab with both agents up and three workloads attached."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.ns: dict[str, str] = {}
        self.addresses: dict[str, list[str]] = {}

    def build(self) -> None:
        self.lab.bring_up()
        policy = self.lab.dir / "policy.yaml"
        policy.write_text(POLICY)
        self.lab.ca("policy", "apply", str(policy))
        for name, host in (("web", "host-a"), ("batch", "host-a"), ("api", "host-b")):
            self.addresses[name] = self.lab.ca("workload", "add", name, "--host", host, "--label", f"role={name}")["addresses"]
            self.ns[name] = self.lab.add_workload(name)
            found = self.lab.retinue(host, "attach", name, "--netns", self.ns[name], "--wait", "10")
            assert (found["state"], found["addresses"]) == ("active", self.addresses[name])

    def cli(self, host: str, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        node = self.lab.nodes[host]
        return subprocess.run(
            inside(node.netns, [*command("retinue"), *args]), env={**os.environ, **node.env}, capture_output=True,
            text=True, input=stdin, timeout=60, check=False,
        )  # fmt: skip

    def status(self, host: str) -> dict:
        return self.lab.retinue(host, "status")

    def conditions(self, host: str) -> set[str]:
        return {c["code"] for c in self.status(host)["conditions"]}

    async def until(self, host: str, what, seconds: float = 15.0) -> dict:
        """Poll status until `what(status)`; the status. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while True:
                with contextlib.suppress(ProcessFailed):
                    found = await asyncio.to_thread(self.status, host)
                    if what(found):
                        return found
                await asyncio.sleep(0.1)

    def agent(self, host: str):
        return self.lab.processes[f"agent-{host}"]

    def restart(self, host: str, sig: int = signal.SIGKILL, *args: str) -> None:
        process = self.agent(host)
        process.send(sig)
        process.wait()
        self.lab.start_agent(host, args=args)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab(["host-a", "host-b"], trust_domain="agent.example") as lab:
        made = World(lab)
        made.build()
        yield made


@contextlib.asynccontextmanager
async def traffic(world: World):
    """UDP and TCP over both families on a permitted and a denied pair; yields (receivers, senders by tag)."""
    async with contextlib.AsyncExitStack() as stack:
        receivers, senders = [], {}
        for v6 in (False, True):
            for transport, port in (("udp", 9000), ("tcp", 8080)):
                receiver = await stack.enter_async_context(Receiver(transport, port, netns=world.ns["api"], v6=v6))
                receivers.append(receiver)
                for name in ("web", "batch"):
                    tag = f"{name}-{transport}{6 if v6 else 4}"
                    senders[tag] = (
                        Sender(transport, world.addresses["api"][v6], port, tag=tag, rate=100, netns=world.ns[name]), receiver
                    )  # fmt: skip
        for sender, _ in senders.values():
            await stack.enter_async_context(sender)
        yield senders


def delivered(senders, tag: str):
    return senders[tag][1].of(tag)


def permitted(senders):
    return {tag: pair for tag, pair in senders.items() if tag.startswith("web")}


async def settle(senders, more: int = 20) -> None:
    for tag, (_, receiver) in permitted(senders).items():
        await receiver.wait_more(tag, more)


async def assert_unharmed(senders) -> None:
    """Nothing lost where permitted, nothing delivered where denied; what is denied did try."""
    await settle(senders)
    for sender, _ in senders.values():
        await sender.stop()
    for tag, (sender, receiver) in senders.items():
        if tag.startswith("web"):
            await receiver.wait(tag, sender.sent)
            assert sender.lost(receiver.of(tag)) == [], tag
        else:
            assert sender.attempts > 20, tag
            assert receiver.of(tag).seqs == set(), tag


def test_ping_and_explain_tell_the_same(world):
    allowed = world.cli("host-a", "explain", "web", "api", "udp/9000", "-o", "json")
    assert (allowed.returncode, json.loads(allowed.stdout)["rule"]) == (0, "web-to-api")
    denied = world.cli("host-a", "explain", "batch", "api", "8080")
    assert denied.returncode == 1
    assert denied.stdout.startswith("DENIED  batch -> api tcp/8080\n")
    assert "web-to-api" in denied.stdout
    assert "policy.yaml:7" in denied.stdout
    ping = world.cli("host-a", "ping", "api", "8080", "--as", "batch", "-c", "1", "-o", "json")
    assert ping.returncode == 1
    answer = json.loads(ping.stdout)
    assert "default deny" in answer["reason"]
    assert [r["answered"] for r in answer["results"]] == [0, 0]


async def test_ping_reaches_both_families(world):
    async with Receiver("tcp", 8080, netns=world.ns["api"]), Receiver("tcp", 8080, netns=world.ns["api"], v6=True):
        ping = await asyncio.to_thread(world.cli, "host-a", "ping", "api", "8080", "--as", "web", "-c", "2", "-o", "json")
    assert ping.returncode == 0, ping
    answer = json.loads(ping.stdout)
    assert {r["address"]: r["answered"] for r in answer["results"]} == dict.fromkeys(world.addresses["api"], 2)
    assert answer["reason"] is None


@pytest.mark.parametrize("host", ["host-a", "host-b"])
async def test_an_agent_killed_under_traffic_loses_and_leaks_nothing(world, host):
    async with traffic(world) as senders:
        await settle(senders)
        for _ in range(3):
            await asyncio.to_thread(world.restart, host)
            await settle(senders)
        await world.until(host, lambda s: s["control"] == "connected")
        await assert_unharmed(senders)


async def test_the_ca_dies_and_both_agents_restart(world):
    world.lab.processes["retinue-ca"].kill()
    try:
        async with traffic(world) as senders:
            await settle(senders)
            await asyncio.to_thread(world.restart, "host-a", signal.SIGTERM)
            await asyncio.to_thread(world.restart, "host-b", signal.SIGKILL)
            found = await world.until("host-a", lambda s: any(c["code"] == "control.stale" for c in s["conditions"]))
            assert found["ready"]
            assert found["control"] == "disconnected"
            assert {a["name"]: (a["state"], a["epoch"]) for a in found["attachments"]} == {
                "web": ("active", 1), "batch": ("active", 1),
            }  # fmt: skip
            await assert_unharmed(senders)
    finally:
        await asyncio.to_thread(world.lab.start_ca, init=False)
    for host in ("host-a", "host-b"):
        await world.until(host, lambda s: s["control"] == "connected" and not s["conditions"])


def test_a_ca_that_was_started_anew_learns_what_is_applied(world):
    """Nothing changes meanwhile, so the agents have nothing new to say."""
    lab = world.lab

    def applied() -> set[int | None]:
        return {host["revision"] for host in lab.ca("host", "list")}

    assert until(lambda: len(applied()) == 1 and None not in applied(), timeout=20)
    before = applied()
    lab.forget("retinue-ca")
    lab.start_ca(init=False)
    assert until(lambda: applied() == before, timeout=20)


async def test_a_policy_change_cuts_an_open_flow(world):
    policy = world.lab.dir / "policy.yaml"
    try:
        async with traffic(world) as senders:
            await settle(senders)
            policy.write_text(POLICY.replace("tcp/8080, ", ""))
            await asyncio.to_thread(world.lab.ca, "policy", "apply", str(policy))
            revision = world.status("host-a")["policy_revision"]
            await world.until("host-b", lambda s: s["policy_revision"] >= revision)
            before = {t: len(delivered(senders, t).seqs) for t in ("web-tcp4", "web-tcp6")}
            for tag in ("web-udp4", "web-udp6"):
                await senders[tag][1].wait_more(tag, 50)
            assert {t: len(delivered(senders, t).seqs) for t in before} == before
    finally:
        policy.write_text(POLICY)
        world.lab.ca("policy", "apply", str(policy))


async def test_without_the_ca_strict_goes_dark_with_its_lease_and_available_stays(world):
    """Both agents lose the CA: `db` (strict) ends within the lease, `api` (available) does not notice."""
    lab = world.lab
    address = lab.ca("workload", "add", "db", "--host", "host-b", "--label", "role=api", "--fence", "strict")["addresses"]
    world.ns["db"] = lab.add_workload("db")
    lab.retinue("host-b", "attach", "db", "--netns", world.ns["db"], "--wait", "10")
    for host in ("host-a", "host-b"):
        await asyncio.to_thread(world.restart, host, signal.SIGTERM, "--lease", "3")
    for host in ("host-a", "host-b"):
        await world.until(host, lambda s: s["control"] == "connected")
    async with (
        traffic(world) as senders,
        Receiver("udp", 9000, netns=world.ns["db"]) as strict,
        Sender("udp", address[0], 9000, tag="strict", rate=100, netns=world.ns["web"]) as sender,
    ):
        await settle(senders)
        await strict.wait_more("strict", 20)
        lab.processes["retinue-ca"].kill()
        try:
            for host in ("host-a", "host-b"):
                await world.until(host, lambda s: any(c["code"] == "fence.closed" for c in s["conditions"]), 3 + 10)
            before, tried = len(strict.of("strict").seqs), sender.attempts
            await settle(senders, 50)
            assert len(strict.of("strict").seqs) == before
            assert sender.attempts > tried
            # A restart without the CA does not reopen it.
            await asyncio.to_thread(world.restart, "host-b", signal.SIGKILL, "--lease", "3")
            await settle(senders, 50)
            assert len(strict.of("strict").seqs) == before
        finally:
            await asyncio.to_thread(lab.start_ca, init=False)
        await strict.wait_more("strict", 20, 20)
        await assert_unharmed(senders)
    lab.retinue("host-b", "detach", "db")
    for host in ("host-a", "host-b"):
        await asyncio.to_thread(world.restart, host, signal.SIGTERM)


# ---- run


def test_run_passes_status_output_signals_and_certificates(world):
    world.lab.ca("workload", "add", "job", "--host", "host-a", "--label", "role=web")
    code = (
        "import os, sys, ssl; c = os.environ['SVID_CERT']; k = os.stat(os.environ['SVID_KEY']).st_mode & 0o777;"
        "ssl.create_default_context(cafile=os.environ['SVID_BUNDLE']).load_cert_chain(c, os.environ['SVID_KEY']);"
        "print(os.environ['SPIFFE_ID'], oct(k), sys.stdin.read(), len(os.listdir('/sys/class/net')) > 0); sys.exit(9)"
    )
    done = world.cli("host-a", "run", "--as", "job", "--", sys.executable, "-c", code, stdin="hello")
    assert (done.returncode, done.stdout) == (9, "spiffe://agent.example/wl/job 0o600 hello True\n"), done
    missing = world.cli("host-a", "run", "--as", "job", "--", "no-such-command")
    assert (missing.returncode, "error[run.exec]" in missing.stderr) == (127, True)
    late = world.cli("host-a", "run", "--as", "job", "--instance", "7", "--wait", "0.5", "--", "true")
    assert (late.returncode, "error[attach.timeout]" in late.stderr) == (5, True)
    assert {a["name"] for a in world.status("host-a")["attachments"]} == {"web", "batch"}
    assert not (world.lab.nodes["host-a"].run_dir / "run").exists()


async def test_run_forwards_signals_and_leaves_nothing_after_kill(world):
    node = world.lab.nodes["host-a"]
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print('up', flush=True); time.sleep(60)"
    argv = inside(node.netns, [*command("retinue"), "run", "--as", "job", "--", sys.executable, "-c", script])
    for number, expected in ((signal.SIGTERM, 3), (signal.SIGKILL, -9)):
        process = await asyncio.create_subprocess_exec(*argv, env={**os.environ, **node.env}, stdout=asyncio.subprocess.PIPE)
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"up\n"
            found = await world.until("host-a", lambda s: any(a["name"] == "job" for a in s["attachments"]))
            place = next(a["netns"] for a in found["attachments"] if a["name"] == "job")
            process.send_signal(number)
            assert await process.wait() == expected
        await world.until("host-a", lambda s: all(a["name"] != "job" for a in s["attachments"]))
        assert not os.path.exists(place)
        links = subprocess.run(inside(node.netns, ["ip", "-j", "link"]), capture_output=True, text=True, check=True).stdout
        assert sum(link["ifname"].startswith("rt") and link["ifname"] != "rtn0" for link in json.loads(links)) == 2


# ---- bad state


def test_a_second_agent_on_the_same_state_is_refused(world):
    node = world.lab.nodes["host-a"]
    argv = [*command("retinue-agent"), "--state-dir", str(node.state_dir), "--run-dir", str(node.dir / "other")]
    done = subprocess.run(inside(node.netns, argv), capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "error[agent.running]" in done.stderr) == (1, True)


def test_nobody_else_may_ask_the_agent(world):
    socket = world.lab.nodes["host-a"].run_dir / "agent.sock"
    assert socket.stat().st_mode & 0o777 == 0o600
    child = os.fork()
    if child == 0:  # another user, without anything of ours but the path
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            unix.socket(unix.AF_UNIX).connect(str(socket))
        except PermissionError:
            os._exit(13)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 13


def stop(world, host: str) -> None:
    process = world.agent(host)
    process.send(signal.SIGTERM)
    process.wait()


@pytest.mark.parametrize("name", ["snapshot.json", "epochs.json", "attachments.json", "tls.key", "tunnel.key"])
def test_a_file_that_others_can_reach_stops_the_agent_with_the_command_that_helps(world, name):
    node = world.lab.nodes["host-b"]
    stop(world, "host-b")
    path = node.state_dir / name
    path.chmod(0o644)
    with pytest.raises(ProcessFailed) as caught:
        world.lab.start_agent("host-b")
    assert "status 78" in str(caught.value)
    assert f"chmod 600 {path}" in str(caught.value)
    path.chmod(0o600)
    world.lab.start_agent("host-b")


def test_altered_epochs_stop_the_agent_until_the_operator_decides(world):
    node = world.lab.nodes["host-b"]
    stop(world, "host-b")
    path = node.state_dir / "epochs.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProcessFailed) as caught:
        world.lab.start_agent("host-b")
    assert "status 78" in str(caught.value)
    assert "--forget-epochs" in str(caught.value)
    assert path.read_bytes() == whole[: len(whole) // 2]
    path.write_bytes(whole)
    world.lab.start_agent("host-b")


async def test_an_altered_snapshot_permits_nothing_until_the_ca_answers(world):
    node = world.lab.nodes["host-b"]
    async with traffic(world) as senders:
        await settle(senders)
        world.lab.processes["retinue-ca"].kill()
        try:
            await asyncio.to_thread(stop, world, "host-b")
            await settle(senders)  # the data plane goes on without its agent
            path = node.state_dir / "snapshot.json"
            saved = json.loads(path.read_text())
            saved["objects"]["placement/web/0"] = saved["objects"]["placement/api/0"]
            path.write_text(json.dumps(saved))
            await asyncio.to_thread(world.lab.start_agent, "host-b", wait=False)
            found = await world.until("host-b", lambda s: any(c["code"] == "state.snapshot" for c in s["conditions"]))
            assert not found["ready"]
            await world.until("host-b", lambda s: all(a["state"] != "active" for a in s["attachments"]))
            before = {t: len(delivered(senders, t).seqs) for t in senders}
            tries = {t: s.attempts for t, (s, _) in senders.items()}
            await asyncio.sleep(1)
            assert {t: len(delivered(senders, t).seqs) for t in senders} == before
            assert all(s.attempts > tries[t] for t, (s, _) in senders.items())
        finally:
            await asyncio.to_thread(world.lab.start_ca, init=False)
        await world.until("host-b", lambda s: s["ready"] and not s["conditions"])
        await settle(senders)
        assert all(not delivered(senders, t).seqs for t in senders if t.startswith("batch"))


# ---- the end


def test_down_takes_everything_away_also_after_the_agent(world):
    for host, first in (("host-a", None), ("host-b", signal.SIGKILL)):
        node = world.lab.nodes[host]
        if first is not None:
            world.agent(host).send(first)
            world.agent(host).wait()
        done = world.cli(host, "down")
        assert done.returncode == 0, done
        for argv in (["ip", "-j", "link"], ["ip", "-6", "-j", "rule"], ["ip", "-j", "rule"], ["nft", "-j", "list", "ruleset"]):
            found = subprocess.run(inside(node.netns, argv), capture_output=True, text=True, check=True).stdout
            assert "rtn0" not in found, argv
            assert "retinue" not in found, argv
        links = subprocess.run(inside(node.netns, ["ip", "-j", "link"]), capture_output=True, text=True, check=True).stdout
        assert {link["ifname"] for link in json.loads(links)} <= {"lo", "eth0", "eth0@if4"}
        assert world.cli(host, "status").returncode == 3
        again = world.cli(host, "down")
        assert again.returncode == 0, again
