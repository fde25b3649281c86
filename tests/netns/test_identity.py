"""Identities that end and identities by registration entry, on real hosts: open flows are cut, also without the CA."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from identity.errors import RetinueError
from mesh.lab import Lab
from mesh.lab_process import inside
from tests.netns.test_workload_api import CLIENT, World

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]

POLICY = """\
meshpolicy: 1
labels: {keys: [role]}
segments:
  - name: s
    allow:
      - {id: r, from: {role: job}, to: {role: api}, on: tcp/8080}
"""

SERVER = """
import asyncio

async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
        await writer.drain()

async def main():
    servers = [await asyncio.start_server(echo, host, 8080) for host in ("0.0.0.0", "::")]
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

# Says `open`, echoes for ever, says `cut` when an answer does not come; then tries anew and says how that went.
FLOW = """
import socket, sys, time

def dial(timeout=2):
    return socket.create_connection((sys.argv[1], 8080), timeout=timeout)

flow = dial(20)  # the other host may be slow to hear of us
print("open", flush=True)
try:
    while True:
        flow.sendall(b"x")
        flow.settimeout(2)
        if not flow.recv(1):
            raise OSError("closed")
        time.sleep(0.02)
except OSError:
    print("cut", flush=True)
try:
    dial()
    print("again", flush=True)
except OSError:
    print("refused", flush=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    with Lab(["host-a", "host-b"], trust_domain="ends.example") as lab:
        lab.bring_up(["host-a", "host-b"])
        policy = tmp_path_factory.mktemp("policy") / "p.yaml"
        policy.write_text(POLICY)
        lab.ca("policy", "apply", str(policy))
        yield World(lab)


@pytest.fixture(scope="module")
def api(world) -> Iterator[dict[str, str]]:
    """Addresses of `api` on host-b, where a server echoes."""
    lab = world.lab
    made = lab.ca("workload", "add", "api", "--host", "host-b", "--label", "role=api")
    space = lab.add_workload("api")
    lab.retinue("host-b", "attach", "api", "--netns", space, "--wait", "10")
    server = subprocess.Popen(inside(space, [sys.executable, "-c", SERVER]), stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    yield {"v4": made["addresses"][0], "v6": made["addresses"][1]}
    server.kill()
    server.communicate()


@contextlib.asynccontextmanager
async def flow(space: str, address: str):
    """An open connection; a function for what is said about it next."""
    process = await asyncio.create_subprocess_exec(*inside(space, [sys.executable, "-c", FLOW, address]), stdout=asyncio.subprocess.PIPE)

    async def said() -> str:
        async with asyncio.timeout(40):
            return (await process.stdout.readline()).decode().strip()

    try:
        yield said
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def job(world, name: str, *life: str) -> str:
    """A namespace with an active instance on host-a."""
    lab = world.lab
    await lab.aca("workload", "add", name, "--host", "host-a", "--label", "role=job", *life)
    space = await asyncio.to_thread(lab.add_workload, name)
    await lab.aretinue("host-a", "attach", name, "--netns", space, "--wait", "10")
    return space


async def audited(world, subject: str) -> list[str]:
    return [e["action"] for e in await world.lab.aca("audit", "list", "--subject", subject)]


async def until_expired(world, name: str) -> None:
    async with asyncio.timeout(60):
        while True:
            if "workload.expire" in await audited(world, f"{name}/0"):
                return
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_an_end_cuts_open_flows_and_is_audited_as_expired(world, api, family):
    name = f"job-{family}"
    space = await job(world, name)
    async with flow(space, api[family]) as said, world.watch("host-a", space) as svids:
        assert await said() == "open"
        assert (await svids())[0] == "svids"
        await world.lab.aca("workload", "life", name, "--ends-at", "+3s")
        assert await said() == "cut"
        assert await said() == "refused"
        while (last := await svids())[0] == "svids":
            pass
        assert last == ["end", "PERMISSION_DENIED"]
    found = await world.lab.aretinue("host-a", "explain", "identity", name, codes=(1,))
    assert not found["holds"]
    await until_expired(world, name)
    assert "workload.revoke" not in await audited(world, f"{name}/0")
    known = await world.lab.aca("workload", "list")
    assert next(w for w in known if w["name"] == name)["state"] == "revoked"


async def test_an_end_comes_while_the_ca_is_away(world, api):
    """Both hosts act on the signed time by themselves; the CA writes it down when it is back."""
    lab = world.lab
    space = await job(world, "alone")
    async with flow(space, api["v4"]) as said, flow(space, api["v6"]) as other:
        assert (await said(), await other()) == ("open", "open")
        await lab.aca("workload", "life", "alone", "--ends-at", "+5s")
        await lab.until("host-b", lambda s: s.revision is not None)
        ca = lab.processes["retinue-ca"]
        ca.send(signal.SIGKILL)
        ca.wait()
        assert (await said(), await other()) == ("cut", "cut")
        assert await said() == "refused"
        found = await lab.aretinue("host-a", "explain", "identity", "alone", codes=(1,))
        assert (found["holds"], found["reason"]) == (False, "its end has come")
        # a restart of the agent, without the CA, does not bring it back
        agent = lab.processes["agent-host-a"]
        agent.send(signal.SIGKILL)
        agent.wait()
        await asyncio.to_thread(lab.start_agent, "host-a", wait=False)
        async with asyncio.timeout(60):
            while True:
                try:
                    found = await lab.aretinue("host-a", "explain", "identity", "alone", codes=(1, 3)) or {}
                except RetinueError:  # the agent is only just starting
                    found = {}
                if found.get("reason") == "its end has come":
                    break
                await asyncio.sleep(0.2)
    await asyncio.to_thread(lab.start_ca, init=False)
    await until_expired(world, "alone")


async def test_a_helper_ends_with_its_job(world, api):
    await job(world, "main-job")
    space = await job(world, "helper", "--ends-with", "main-job")
    async with flow(space, api["v4"]) as said:
        assert await said() == "open"
        await world.lab.aca("workload", "revoke", "main-job")
        assert await said() == "cut"
    assert (await audited(world, "helper/0"))[-1] == "workload.expire"


# ---- entries


def cgroup_root() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(where)
    pytest.skip("no cgroup2 hierarchy is writable on this machine: entries by cgroup are not tried here")


@pytest.fixture
def cgroups() -> Iterator[tuple[Path, str]]:
    """(directory, path in the hierarchy) of a control group with one called api.service below it."""
    top = cgroup_root() / f"rtn-wl-{os.getpid()}"
    unit = top / "api.service"
    unit.mkdir(parents=True)
    yield unit, f"/{top.name}/api.service"
    for directory in (unit, top):
        with contextlib.suppress(OSError):
            directory.rmdir()


def ask_from(world, group: Path | None, uid: str):
    """What a process of a user is given in the host's own namespace, in a control group."""
    enter = "" if group is None else f"echo $$ > {group}/cgroup.procs; "
    argv = inside(world.lab.nodes["host-a"].netns, ["/bin/sh", "-c", f'{enter}exec "$0" -c "$1" fetch {uid}', sys.executable, CLIENT])
    done = subprocess.run(argv, env=world.env("host-a"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def test_a_unit_of_the_host_has_its_identity_and_its_neighbours_have_not(world, cgroups):
    """uid and control group, in the host's own namespace: nothing is attached anywhere."""
    lab, (group, path) = world.lab, cgroups
    lab.ca("workload", "add", "unit", "--host", "host-a")
    made = lab.ca("entry", "create", "unit", "--parent", "host-*", "-s", "uid:4321", "-s", f"cgroup:{path}", "-s", "unit:api.service")
    assert sorted(made["hosts"]) == ["host-a", "host-b"]
    assert ask_from(world, group, "4321")[:2] == ["svid", world.id("unit")]
    for where, uid in ((group, "4322"), (group, "0"), (None, "4321"), (group.parent, "4321"), (group, "65534")):
        word, text = ask_from(world, where, uid)
        assert (word, "PERMISSION_DENIED" in text) == ("error", True), (where, uid, text)
    found = lab.retinue("host-a", "explain", "identity", "unit")
    assert (found["holds"], [e["id"] for e in found["entries"]]) == (True, [made["id"]])
    lab.ca("entry", "delete", made["id"])
    assert "PERMISSION_DENIED" in ask_from(world, group, "4321")[1]


async def test_an_entry_narrows_a_namespace(world):
    lab = world.lab
    space = await job(world, "narrow")
    assert (await world.aask("host-a", space, "fetch"))[:2] == ["svid", world.id("narrow")]
    made = await lab.aca("entry", "create", "narrow", "--parent", "host-a", "-s", "uid:4321", "-s", "netns:narrow", "--ends-at", "+1h")
    assert (await world.aask("host-a", space, "fetch", "4321"))[:2] == ["svid", world.id("narrow")]
    for uid in ("0", "4322", "65534"):
        assert "PERMISSION_DENIED" in (await world.aask("host-a", space, "fetch", uid))[1]
    await lab.aca("entry", "delete", made["id"])
    assert (await world.aask("host-a", space, "fetch"))[:2] == ["svid", world.id("narrow")]


# A child becomes uid 4321, then root of a user namespace of its own, connects, and hands the connection to its parent,
# which is the machine's root: the kernel's word is on who connected.
ROOTED = """
import asyncio, ctypes, json, os, signal, socket, sys
from grpclib.client import Channel, UnaryStreamMethod
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

ours, theirs = socket.socketpair()
os.chdir(sys.argv[1])
child = os.fork()
if child == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([]); os.setgid(4321); os.setuid(4321)
    libc.prctl(4, 1, 0, 0, 0)  # so that it may write its own maps
    if libc.unshare(0x10000000):
        theirs.send(b"no user namespaces")
        os._exit(0)
    for name, text in (("setgroups", "deny"), ("uid_map", "0 4321 1"), ("gid_map", "0 4321 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    assert os.getuid() == 0
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("workload.sock")
    socket.send_fds(theirs, [b"here"], [connection.fileno()])
    signal.pause()
said, fds, _, _ = socket.recv_fds(ours, 100, 1)

class Raw(CodecBase):
    __content_subtype__ = "proto"
    def encode(self, message, message_type):
        return message
    def decode(self, data, message_type):
        return data

class Given(Channel):
    async def _create_connection(self):
        sock = socket.socket(fileno=fds[0])
        return (await self._loop.create_unix_connection(self._protocol_factory, sock=sock))[1]

async def main():
    channel = Given(path="given", codec=Raw())
    call = UnaryStreamMethod(channel, "/SpiffeWorkloadAPI/FetchX509SVID", bytes, bytes)
    try:
        async with call.open(metadata={"workload.spiffe.io": "true"}) as stream:
            await stream.send_message(b"", end=True)
            print(json.dumps(["svid", len(await stream.recv_message())]))
            await stream.cancel()
    except GRPCError as e:
        print(json.dumps(["end", e.status.name]))
    channel.close()

if fds:
    asyncio.run(main())
    os.kill(child, signal.SIGKILL)
else:
    print(json.dumps(["none", said.decode()]))
"""


async def test_root_of_a_user_namespace_is_not_root(world):
    """uid 0 in a user namespace of its own is uid 4321 here: an entry for root does not hold for it, one for 4321 does."""
    lab = world.lab
    space = await job(world, "rooted")

    def ask() -> list:
        argv = inside(space, [sys.executable, "-c", ROOTED, str(lab.nodes["host-a"].run_dir)])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done
        return json.loads(done.stdout)

    made = await lab.aca("entry", "create", "rooted", "--parent", "host-a", "-s", "uid:0", "-s", "netns:rooted")
    assert (await world.aask("host-a", space, "fetch"))[:2] == ["svid", world.id("rooted")]
    found = await asyncio.to_thread(ask)
    if found[0] == "none":
        pytest.skip("this kernel makes no user namespaces for plain users")
    assert found == ["end", "PERMISSION_DENIED"]
    await lab.aca("entry", "create", "rooted", "--parent", "host-a", "-s", "uid:4321", "-s", "netns:rooted")
    await lab.aca("entry", "delete", made["id"])
    assert (await asyncio.to_thread(ask))[0] == "svid"


async def test_tokens_of_the_outside_client(world, api):
    """The JWT profile end to end: signed by the CA, checked by the other host's agent for its own workload."""
    lab = world.lab
    space = await job(world, "caller")
    script = """
import sys
from spiffe import WorkloadApiClient
with WorkloadApiClient() as client:
    if len(sys.argv) > 1:
        print(client.validate_jwt_svid(sys.argv[1], "api", timeout=20).spiffe_id)
    else:
        print(client.fetch_jwt_svid({"api"}, timeout=20).token)
"""

    def run(host: str, netns: str, *args: str) -> str:
        argv = inside(netns, [sys.executable, "-c", script, *args])
        done = subprocess.run(argv, env=world.env(host), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done
        return done.stdout.strip()

    token = await asyncio.to_thread(run, "host-a", space)
    assert await asyncio.to_thread(run, "host-b", lab.netns("api"), token) == world.id("caller")
