"""The Workload API of real agents and of a sidecar, asked by the outside client from real namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mesh.lab import Lab
from mesh.lab_process import command, inside

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]

# One request, or with `watch` a stream, of whoever runs this; a line of JSON an answer.
CLIENT = """
import ctypes, json, os, sys
import grpc
from spiffe import WorkloadApiClient
from spiffe._proto import workload_pb2 as pb, workload_pb2_grpc as rpc

what, uid = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
if uid:
    # What is imported late is imported now: another user may not be able to read this checkout.
    from grpc import _channel, _interceptor
    os.environ["SPIFFE_ENDPOINT_SOCKET"], real = "unix:///nowhere", os.environ["SPIFFE_ENDPOINT_SOCKET"]
    try:
        with WorkloadApiClient() as client:
            client.fetch_x509_context(timeout=0.1)
    except Exception:
        os.environ["SPIFFE_ENDPOINT_SOCKET"] = real
    os.chdir(os.path.dirname(os.environ["SPIFFE_ENDPOINT_SOCKET"].removeprefix("unix://")))
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
    os.environ["SPIFFE_ENDPOINT_SOCKET"] = "unix:///proc/self/cwd/workload.sock"

def say(*what):
    print(json.dumps(what), flush=True)

if what == "fetch":
    try:
        with WorkloadApiClient() as client:
            context = client.fetch_x509_context(timeout=20)
            bundles = client.fetch_x509_bundles(timeout=20).bundles
            say("svid", str(context.default_svid.spiffe_id), sorted(str(b.trust_domain) for b in bundles), os.environ.get("SPIFFE_ID"))
    except Exception as e:
        say("error", str(e))
else:
    metadata = () if what == "bare" else (("workload.spiffe.io", "true"),)
    with grpc.insecure_channel(os.environ["SPIFFE_ENDPOINT_SOCKET"]) as channel:
        answers = rpc.SpiffeWorkloadAPIStub(channel).FetchX509SVID(pb.X509SVIDRequest(), metadata=metadata, timeout=120)
        try:
            for answer in answers:
                say("svids", [[s.spiffe_id, s.hint] for s in answer.svids])
                if what == "list":
                    break
        except grpc.RpcError as e:
            say("end", e.code().name)
"""


class World:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def id(self, name: str) -> str:
        return f"spiffe://{self.lab.trust_domain}/wl/{name}"

    def env(self, host: str) -> dict[str, str]:
        endpoint = f"unix://{self.lab.nodes[host].run_dir / 'workload.sock'}"
        return {**os.environ, "SPIFFE_ENDPOINT_SOCKET": endpoint, "GRPC_VERBOSITY": "NONE"}

    def argv(self, netns: str | None, *args: str) -> list[str]:
        return inside(netns, [sys.executable, "-c", CLIENT, *args])

    def ask(self, host: str, netns: str | None, *args: str):
        done = subprocess.run(
            self.argv(netns, *args), env=self.env(host), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done
        return json.loads(done.stdout)

    async def aask(self, *args):
        return await asyncio.to_thread(self.ask, *args)

    @contextlib.asynccontextmanager
    async def watch(self, host: str, netns: str):
        """What a stream of a program there says, one after the other."""
        process = await asyncio.create_subprocess_exec(
            *self.argv(netns, "watch"), env=self.env(host), stdout=asyncio.subprocess.PIPE
        )

        async def said():
            async with asyncio.timeout(30):
                return json.loads(await process.stdout.readline())

        try:
            yield said
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab(["host-a", "host-b", "svc"], trust_domain="workload.example") as lab:
        lab.bring_up(["host-a", "host-b"])
        yield World(lab)


@pytest.fixture(scope="module")
def web(world) -> str:
    """Namespace of `web`, active on host-a."""
    lab = world.lab
    lab.ca("workload", "add", "web", "--host", "host-a", "--label", "role=web")
    space = lab.add_workload("web")
    lab.retinue("host-a", "attach", "web", "--netns", space, "--wait", "10")
    return space


def test_a_program_of_an_attached_namespace_has_its_identity(world, web):
    assert world.ask("host-a", web, "fetch") == ["svid", world.id("web"), [world.lab.trust_domain], None]


def test_user_rights_do_not_matter_but_the_namespace_does(world, web):
    assert world.ask("host-a", web, "fetch", "65534")[:2] == ["svid", world.id("web")]


@pytest.mark.parametrize("where", ["the machine", "the host", "another host", "an unattached namespace"])
def test_everybody_else_is_nobody(world, web, where):
    lab = world.lab
    netns = {"the machine": None, "the host": lab.nodes["host-a"].netns, "another host": lab.nodes["host-b"].netns}.get(where)
    if where == "an unattached namespace":
        netns = lab.add_workload("stranger")
    for user in ("0", "65534"):
        word, text = world.ask("host-a", netns, "fetch", user)
        assert (word, "PERMISSION_DENIED" in text) == ("error", True), text


def test_an_identity_of_another_host_is_not_had_here(world, web):
    assert "PERMISSION_DENIED" in world.ask("host-b", web, "fetch")[1]


def test_without_the_header_the_request_is_invalid(world, web):
    assert world.ask("host-a", web, "bare") == ["end", "INVALID_ARGUMENT"]


def test_run_tells_the_program_where_to_ask(world):
    lab = world.lab
    lab.ca("workload", "add", "job", "--host", "host-a", "--label", "role=web")
    node = lab.nodes["host-a"]
    argv = [*command("retinue"), "run", "--as", "job", "--", sys.executable, "-c", CLIENT, "fetch"]
    environment = {k: v for k, v in os.environ.items() if k != "SPIFFE_ENDPOINT_SOCKET"}
    done = subprocess.run(
        inside(node.netns, argv), env={**environment, **node.env, "GRPC_VERBOSITY": "NONE"}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert json.loads(done.stdout) == ["svid", world.id("job"), [lab.trust_domain], world.id("job")]


async def test_a_namespace_with_several_instances_has_them_all(world, web):
    lab = world.lab
    async with world.watch("host-a", web) as said:
        assert await said() == ["svids", [[world.id("web"), "web/0"]]]
        await lab.aca("workload", "add", "admin", "--host", "host-a", "--label", "role=web")
        await lab.aretinue("host-a", "attach", "admin", "--netns", web, "--wait", "10")
        assert await said() == ["svids", [[world.id("admin"), "admin/0"], [world.id("web"), "web/0"]]]
        await lab.aretinue("host-a", "detach", "admin")
        assert await said() == ["svids", [[world.id("web"), "web/0"]]]


async def test_a_move_ends_the_stream_here_and_opens_it_there(world):
    lab = world.lab
    await lab.aca("workload", "add", "api", "--host", "host-a", "--label", "role=api")
    spaces = {}
    for host, wait in (("host-a", "10"), ("host-b", None)):
        spaces[host] = await asyncio.to_thread(lab.add_workload, f"api-{host}")
        await lab.aretinue(host, "attach", "api", "--netns", spaces[host], *(["--wait", wait] if wait else []))
    assert "PERMISSION_DENIED" in (await world.aask("host-b", spaces["host-b"], "fetch"))[1]
    async with world.watch("host-a", spaces["host-a"]) as said:
        assert await said() == ["svids", [[world.id("api"), "api/0"]]]
        await lab.aca("workload", "move", "api", "--to", "host-b")
        assert await said() == ["end", "PERMISSION_DENIED"]
    await lab.until("host-b", lambda s: any(a.name == "api" and a.state == "active" for a in s.attachments))
    assert (await world.aask("host-b", spaces["host-b"], "fetch"))[:2] == ["svid", world.id("api")]
    assert "PERMISSION_DENIED" in (await world.aask("host-a", spaces["host-a"], "fetch"))[1]
    async with world.watch("host-b", spaces["host-b"]) as said:
        await said()
        await lab.aca("workload", "revoke", "api")
        assert await said() == ["end", "PERMISSION_DENIED"]


async def test_an_agent_that_comes_back_serves_again(world, web):
    process = world.lab.processes["agent-host-a"]
    async with world.watch("host-a", web) as said:
        await said()
        process.send(signal.SIGKILL)
        process.wait()
        assert await said() == ["end", "UNAVAILABLE"]
    await asyncio.to_thread(world.lab.start_agent, "host-a")
    assert (await world.aask("host-a", web, "fetch"))[:2] == ["svid", world.id("web")]


async def test_a_sidecar_serves_the_namespace_of_its_service(world):
    lab = world.lab
    await lab.aca("workload", "add", "cart", "--label", "role=web")
    token = (await lab.aca("token", "create", "--workload", "cart"))["token"]
    here = lab.nodes["svc"]
    process = lab.spawn(
        command("retinue-sidecar"), name="sidecar-svc", netns=here.netns, env={**here.env, "RETINUE_TOKEN": token, "RETINUE_CA": lab.ca_url}
    )
    await asyncio.to_thread(process.wait_ready)
    await lab.until("svc", lambda s: any(a.state == "active" for a in s.attachments))
    for user in ("0", "65534"):
        assert (await world.aask("svc", here.netns, "fetch", user))[:2] == ["svid", world.id("cart")]
    for netns in (None, lab.nodes["host-a"].netns):
        assert "PERMISSION_DENIED" in (await world.aask("svc", netns, "fetch"))[1]
