"""The agent's side of the Workload API: a slow CA, instances that come and go, its socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from dataclasses import replace

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import StreamTerminatedError

from identity.errors import BadInput, BadState, Bug, NotFound, NotVerified, Refused, TimedOut, Unreachable
from identity.wire.local import Attach
from mesh import svid_files, workload_api
from mesh.attestation import NamespaceId, own_namespace
from mesh.identities import Given, identities, instance_order
from mesh.workload_api import (
    Full,
    WorkloadApi,
    grpc_error,
    make_reachable,
)
from tests.unit.mesh.workload_rig import (
    RawCodec,
    moved,
    opened,
    refused,
    somebody,
    svid_stream,
    tell,
    until,
)

# ---- the agent's side


async def test_before_the_first_state_a_client_is_told_to_come_back(make_agent, sidecar_enrollment):
    agent = make_agent(sidecar_enrollment)
    async with WorkloadApi(agent) as api:
        channel = Channel(path=str(api.path), codec=RawCodec())
        assert (await refused(svid_stream(channel)))[0] is Status.UNAVAILABLE
        channel.close()


async def test_a_ca_that_does_not_answer(channel, issuer, api, agent):
    issuer.fail = Unreachable("ca.unreachable", "no CA")
    assert await refused(svid_stream(channel)) == (Status.UNAVAILABLE, "no CA")
    issuer.fail = Refused("svid.not_here", "cart is not placed on cart-sidecar-1")
    assert (await refused(svid_stream(channel)))[0] is Status.PERMISSION_DENIED
    issuer.fail = RuntimeError("a defect")
    status, message = await refused(svid_stream(channel))
    assert (status, "a defect" in message) == (Status.INTERNAL, False)
    issuer.fail = None
    async with opened(channel) as stream:
        first = await stream.recv_message()
        issuer.fail = Unreachable("ca.unreachable", "no CA")
        held = agent.svids._held["cart/0"]
        agent.svids._held["cart/0"] = replace(held, renew_at=0.0)
        api.ring()
        await until(lambda: issuer.count == 5)
        assert time.time() < agent.svids.due() < time.time() + 31  # tried again later, served meanwhile
        async with opened(channel) as other:
            assert await other.recv_message() == first


async def test_an_instance_that_leaves_while_the_ca_is_asked_gets_nothing(channel, issuer, agent, live):
    async def leave() -> None:
        await moved(agent, live)

    issuer.pause = leave
    assert (await refused(svid_stream(channel)))[0] is Status.PERMISSION_DENIED
    assert agent.svids._held == {}


async def test_instances_that_never_stop_changing(api, agent, monkeypatch):
    answers = iter(range(100))
    monkeypatch.setattr(workload_api, "identities", lambda *_: (Given(key := f"cart/{next(answers)}", key),))

    async def refuse(*_):
        raise Refused("svid.inactive", "moved")

    monkeypatch.setattr(workload_api, "svid_of_given", refuse)
    with pytest.raises(Unreachable) as caught:
        await api.svids(None)
    assert caught.value.code == "workload.busy"


async def test_renewals_are_looked_for(api, agent, monkeypatch):
    monkeypatch.setattr(workload_api, "LOOK", 0.2)
    rung = asyncio.Event()
    monkeypatch.setattr(api, "ring", rung.set)
    await agent.svids.get("cart", 0)
    held = agent.svids._held["cart/0"]
    agent.svids._held["cart/0"] = replace(held, renew_at=time.time() + 0.1)
    async with asyncio.timeout(10):
        await rung.wait()


# ---- who is who


async def test_on_a_host_its_own_identities_are_for_root(make_agent, enrollment, live):
    agent = make_agent(enrollment)
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    root, user = somebody(0), somebody(1000)
    try:
        assert identities(agent, root, own_namespace()) == (Given("web/0", "web/0"),)
        with pytest.raises(Refused):
            identities(agent, user, own_namespace())
        with pytest.raises(Refused):
            identities(agent, root, NamespaceId(0, 0))
        agent.plane.failed = {"web/0": "no"}
        await agent._apply()
        with pytest.raises(Refused):
            identities(agent, root, own_namespace())
    finally:
        root.close()
        user.close()


async def test_a_place_is_compared_as_it_is_now(make_agent, enrollment):
    from mesh.processes import process_start
    from mesh.state import SavedPlace

    agent, pid, here = make_agent(enrollment), os.getpid(), own_namespace()
    request = Attach(name="web", netns=f"/proc/{pid}/ns/net")
    started = process_start(pid)
    for saved, wanted in ((started, True), (started + 1, False), (None, False)):
        agent.attachments._places = {"web/0": SavedPlace(attach=request, inode=here.inode, started=saved)}
        assert agent.attachments.is_at("web/0", here) is wanted
    assert not agent.attachments.is_at("web/0", NamespaceId(here.device, here.inode + 1))
    assert not agent.attachments.is_at("web/1", here)
    named = Attach(name="web", netns="/proc/self/ns/net")
    agent.attachments._places = {"web/0": SavedPlace(attach=named, inode=1)}
    assert agent.attachments.is_at("web/0", here)
    agent.attachments._places = {"web/0": SavedPlace(attach=Attach(name="web", kind="host"))}
    assert not agent.attachments.is_at("web/0", here)


def test_instances_are_in_order_of_their_numbers():
    assert sorted(["a/10", "a/2", "a/b/0", "a/0"], key=instance_order) == ["a/0", "a/2", "a/10", "a/b/0"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Full("workload.limit", "x"), Status.RESOURCE_EXHAUSTED),
        (NotVerified("cert.x", "x"), Status.UNAVAILABLE),
        (Refused("x", "x"), Status.PERMISSION_DENIED),
        (NotFound("x", "x"), Status.PERMISSION_DENIED),
        (BadInput("proto.malformed", "x"), Status.INVALID_ARGUMENT),
        (BadInput("wire.form", "what the CA sent"), Status.UNAVAILABLE),
        (TimedOut("x", "x"), Status.UNAVAILABLE),
        (Bug("x", "x"), Status.UNAVAILABLE),
    ],
)
def test_what_refusals_become(error, status):
    assert grpc_error(error).status is status

# ---- the socket


async def test_the_socket_is_for_everybody_and_the_directory_is_not(agent):
    agent.config.run_dir.chmod(0o700)
    async with WorkloadApi(agent) as api:
        assert stat.S_IMODE(api.path.stat().st_mode) == 0o666
        assert stat.S_IMODE(api.path.parent.stat().st_mode) == 0o711
        assert svid_files.api_environment(agent.config.run_dir) == {"SPIFFE_ENDPOINT_SOCKET": f"unix://{api.path}"}
    assert not api.path.exists()
    assert svid_files.api_environment(agent.config.run_dir) == {}


async def test_where_others_could_replace_the_socket_there_is_none(agent):
    agent.config.run_dir.chmod(0o777)
    async with WorkloadApi(agent) as api:
        assert not api.path.exists()
        assert "workload.socket" in agent.health
    assert (agent.config.run_dir.stat().st_mode & 0o777) == 0o777


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadState) as caught:
        make_reachable(tmp_path / "file" / "run")
    assert caught.value.code == "workload.directory"


async def test_the_end_of_the_agent_ends_connections(agent):
    async with WorkloadApi(agent) as api:
        channel = Channel(path=str(api.path), codec=RawCodec())
        stream = svid_stream(channel)
        await stream.__aenter__()
        await stream.send_message(b"", end=True)
        await stream.recv_message()
    with pytest.raises(StreamTerminatedError):
        async with asyncio.timeout(10):
            await stream.recv_message()
    with contextlib.suppress(Exception):
        await stream.__aexit__(None, None, None)
    channel.close()
    assert api.connections == set()
    assert len(api._tally) == 0
