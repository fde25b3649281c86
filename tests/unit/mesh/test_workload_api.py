"""The Workload API over its real socket: two gRPC clients, one of them the outside `spiffe` in a process of its own.

The agent is a real sidecar with a fake data plane, so the place of its instance is the namespace of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import sys
import time
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key
from grpclib.client import Channel, StreamStreamMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, StreamTerminatedError

from identity.errors import BadInput, BadState, Bug, NotFound, NotVerified, Refused, TimedOut, Unreachable
from identity.wire.enroll import SvidReply
from identity.wire.local import Attach
from mesh import svid_files, workload_api
from mesh.attestation import Caller, NamespaceId, own_namespace
from mesh.svid import WorkloadSvids
from mesh.uplink import boottime
from mesh.workload_api import (
    Full,
    Limits,
    Tally,
    WorkloadApi,
    grpc_error,
    identities,
    instance_order,
    make_reachable,
)
from tests.unit.mesh.test_workload_proto import outside

HEADER = {"workload.spiffe.io": "true"}
CART = "spiffe://test.example/wl/cart"


class RawCodec(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message, message_type):
        return message

    def decode(self, data, message_type):
        return message_type.FromString(data) if message_type else data


class Issuer:
    """The CA's part, with the real authority; `fail` makes it refuse."""

    def __init__(self, live) -> None:
        self.live, self.count, self.fail, self.pause = live, 0, None, None

    async def __call__(self, request) -> SvidReply:
        from identity.names import SpiffeId

        self.count += 1
        if self.pause is not None:
            await self.pause()
        if self.fail:
            raise self.fail
        name = SpiffeId.workload(self.live.trust.trust_domain, request.workload)
        chain = self.live.authority.issue_workload(request.csr, name, [], self.live.now)
        return SvidReply(spiffe_id=str(name), chain=chain, bundle="")


@pytest.fixture
def issuer(live):
    return Issuer(live)


async def tell(agent, line: bytes) -> None:
    await agent._on_events(agent.machine.receive(line, wall=time.time(), mono=boottime()))
    await agent._apply()


@pytest.fixture
async def agent(make_agent, sidecar_enrollment, live, issuer):
    made = make_agent(sidecar_enrollment)
    made.svids = WorkloadSvids(issuer, lambda: made.uplink.trust, time.time)
    made._restore()
    await tell(made, live.snapshot())
    return made


@pytest.fixture
async def api(agent):
    async with WorkloadApi(agent) as made:
        yield made


@pytest.fixture
async def channel(api):
    made = Channel(path=str(api.path), codec=RawCodec())
    yield made
    made.close()


def svid_stream(channel, metadata=HEADER, name="FetchX509SVID"):
    reply = outside().X509SVIDResponse if name == "FetchX509SVID" else outside().X509BundlesResponse
    return UnaryStreamMethod(channel, f"/SpiffeWorkloadAPI/{name}", bytes, reply).open(metadata=metadata)


async def refused(stream, message: bytes = b"") -> tuple[Status, str]:
    async with asyncio.timeout(10):
        with pytest.raises(GRPCError) as caught:
            async with stream:
                await stream.send_message(message, end=True)
                await stream.recv_message()
    return caught.value.status, caught.value.message or ""


@contextlib.asynccontextmanager
async def opened(channel, **options):
    """A stream and a function for its next message."""
    async with asyncio.timeout(30), svid_stream(channel, **options) as stream:
        await stream.send_message(b"", end=True)
        yield stream
        await stream.cancel()


async def until(holds) -> None:
    """What other tasks of the loop bring about."""
    async with asyncio.timeout(10):
        while True:
            if holds():
                return
            await asyncio.sleep(0)


async def moved(agent, live, state: str = "active", to: str = "host-b") -> None:
    line = live.delta({"placement/cart/0": live.placement("cart", to, epoch=2, index=7, state=state, labels={"role": "web"})})
    await tell(agent, line)


# ---- what is given


async def test_the_first_message_comes_at_once_and_is_complete(channel, live, agent):
    async with opened(channel) as stream:
        message = await stream.recv_message()
        (svid,) = message.svids
        assert (svid.spiffe_id, svid.hint) == (CART, "cart/0")
        leaf, issuer = x509.load_der_x509_certificate(svid.x509_svid[: -len(_rest(svid.x509_svid))]), _rest(svid.x509_svid)
        assert x509.load_der_x509_certificate(issuer).subject == leaf.issuer
        key = load_der_private_key(svid.x509_svid_key, None)
        assert key.public_key() == leaf.public_key()
        assert svid.bundle == workload_api._der(live.trust.roots_pem())
        assert (list(message.crl), dict(message.federated_bundles)) == ([], {})


def _rest(der: bytes) -> bytes:
    """What follows the first of several DER values (X.690, long form of two length bytes)."""
    assert der[:2] == b"\x30\x82"
    return der[4 + int.from_bytes(der[2:4]) :]


async def test_bundles_are_keyed_by_the_id_of_the_trust_domain(channel, live):
    async with opened(channel, name="FetchX509Bundles") as stream:
        message = await stream.recv_message()
        assert dict(message.bundles) == {"spiffe://test.example": workload_api._der(live.trust.roots_pem())}


async def test_a_renewed_certificate_is_pushed_and_nothing_else_is(channel, agent, live, api, issuer):
    async with opened(channel) as stream, opened(channel) as other:
        first = await stream.recv_message()
        assert await other.recv_message() == first
        api.ring()
        await tell(agent, live.delta({"endpoint/host-b": live.endpoint("host-b", generation=2)}))
        held = agent.svids._held["cart/0"]
        agent.svids._held["cart/0"] = replace(held, renew_at=time.time())
        second = await stream.recv_message()
        assert second.svids[0].x509_svid != first.svids[0].x509_svid
        assert second.svids[0].x509_svid_key != first.svids[0].x509_svid_key
        assert await other.recv_message() == second
        assert issuer.count == 2


async def test_a_move_away_ends_the_stream_and_a_move_back_gives_new_keys(channel, agent, live):
    async with asyncio.timeout(30):
        stream = svid_stream(channel)
        with pytest.raises(GRPCError) as caught:
            async with stream:
                await stream.send_message(b"", end=True)
                first = await stream.recv_message()
                await moved(agent, live)
                await stream.recv_message()
    assert caught.value.status is Status.PERMISSION_DENIED
    assert agent.svids._held == {}
    assert (await refused(svid_stream(channel)))[0] is Status.PERMISSION_DENIED
    own = agent.enrollment.record.tunnel_key
    again = live.placement("cart", "cart-sidecar-1", epoch=3, index=7, labels={"role": "web"}, tunnel_key=own)
    await tell(agent, live.delta({"placement/cart/0": again}))
    async with opened(channel) as stream:
        second = await stream.recv_message()
        assert second.svids[0].x509_svid_key != first.svids[0].x509_svid_key


async def test_a_revoked_instance_loses_its_bundle_stream_too(channel, agent, live):
    stream = svid_stream(channel, name="FetchX509Bundles")
    with pytest.raises(GRPCError) as caught:
        async with asyncio.timeout(30), stream:
            await stream.send_message(b"", end=True)
            await stream.recv_message()
            own = agent.enrollment.record.tunnel_key
            line = live.placement("cart", "cart-sidecar-1", epoch=2, index=7, state="revoked", labels={"role": "web"}, tunnel_key=own)
            await tell(agent, live.delta({"placement/cart/0": line}))
            await stream.recv_message()
    assert caught.value.status is Status.PERMISSION_DENIED


async def test_a_new_root_renews_what_rested_on_the_old_one_and_is_pushed(channel, agent, live, issuer, api, tmp_path):
    from ca.authority import Authority

    async with opened(channel) as stream, opened(channel, name="FetchX509Bundles") as bundles:
        first, roots = await stream.recv_message(), await bundles.recv_message()
        other = Authority.create(tmp_path / "other", live.trust.trust_domain, live.now)
        live.authority = other
        trust = other.trust_bundle(live.trust.sequence + 1, live.now)
        agent.uplink.enrollment = replace(agent.enrollment, bundle=trust)
        api.ring()
        second = await stream.recv_message()
        assert issuer.count == 2
        assert second.svids[0].bundle == workload_api._der(trust.roots_pem()) != first.svids[0].bundle
        assert second.svids[0].x509_svid != first.svids[0].x509_svid
        assert (await bundles.recv_message()).bundles != roots.bundles


async def test_several_instances_have_unique_hints_and_the_first_is_the_default(channel, agent, live):
    own = agent.enrollment.record.tunnel_key
    upserts = {
        f"placement/cart/{n}": live.placement("cart", "cart-sidecar-1", index=20 + n, instance=n, labels={"role": "web"}, tunnel_key=own)
        for n in (2, 10)
    }
    await tell(agent, live.delta(upserts))
    async with opened(channel) as stream:
        assert [s.hint for s in (await stream.recv_message()).svids] == ["cart/0", "cart/2", "cart/10"]
        await tell(agent, live.delta(removes=["placement/cart/10"]))
        assert [s.hint for s in (await stream.recv_message()).svids] == ["cart/0", "cart/2"]


# ---- who is refused


@pytest.mark.parametrize("metadata", [None, {"workload.spiffe.io": "yes"}, {"workload.spiffe.io": "TRUE"}])
@pytest.mark.parametrize("name", ["FetchX509SVID", "FetchX509Bundles"])
async def test_without_the_header_nothing_is_told(channel, metadata, name, issuer):
    status, message = await refused(svid_stream(channel, metadata, name))
    assert (status, "workload.spiffe.io: true" in message) == (Status.INVALID_ARGUMENT, True)
    assert issuer.count == 0


@pytest.mark.parametrize(("name", "method"), [("FetchJWTSVID", UnaryUnaryMethod), ("FetchJWTBundles", UnaryStreamMethod), ("ValidateJWTSVID", UnaryUnaryMethod)])
async def test_the_jwt_profile_says_that_it_is_not_offered(channel, name, method):
    call = method(channel, f"/SpiffeWorkloadAPI/{name}", bytes, None)
    status, message = await refused(call.open(metadata=HEADER))
    assert (status, "JWT-SVID" in message) == (Status.UNIMPLEMENTED, True)
    assert (await refused(call.open()))[0] is Status.INVALID_ARGUMENT


async def test_callers_of_other_namespaces_are_nobody(api, channel):
    api.own = NamespaceId(0, 0)
    status, message = await refused(svid_stream(channel))
    assert (status, "network namespace" in message) == (Status.PERMISSION_DENIED, True)


async def test_a_caller_that_cannot_be_attested_is_told_so(api, channel, monkeypatch):
    from mesh.attestation import NotAttested

    def fail(_):
        raise NotAttested("attest.unseen", "the calling process is in another PID namespace")

    monkeypatch.setattr(workload_api, "attest", fail)
    assert await refused(svid_stream(channel)) == (Status.PERMISSION_DENIED, "the calling process is in another PID namespace")


async def raw(channel, *chunks: bytes) -> tuple[Status, str]:
    """The answer to a request of these bytes, frame header and all."""
    call = StreamStreamMethod(channel, "/SpiffeWorkloadAPI/FetchX509SVID", bytes, None)
    with pytest.raises(GRPCError) as caught:
        async with asyncio.timeout(10), call.open(metadata=HEADER) as stream:
            await stream.send_request()
            for chunk in chunks:
                await stream._stream.send_data(chunk)
            if chunks != HANGING:
                await stream._stream.send_data(b"", end_stream=True)
            await stream.recv_message()
    return caught.value.status, caught.value.message or ""


HANGING = (b"\0\0\0",)


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        ((b"\0\0\0\0\x01\x08",), Status.INVALID_ARGUMENT),
        ((), Status.INVALID_ARGUMENT),
        ((b"\0\0\0\0\x09", b"abc"), Status.INVALID_ARGUMENT),
        ((b"\x01\0\0\0\0",), Status.UNIMPLEMENTED),
        (HANGING, Status.INVALID_ARGUMENT),
    ],
    ids=["no protobuf", "no message", "cut short", "compressed", "never ends"],
)
async def test_malformed_requests(channel, chunks, status, monkeypatch):
    monkeypatch.setattr(workload_api, "REQUEST_TIMEOUT", 0.3)
    assert (await raw(channel, *chunks))[0] is status


async def test_fields_from_the_future_are_skipped(channel):
    async with asyncio.timeout(10), svid_stream(channel) as stream:
        await stream.send_message(b"\x12\x03abc\x08\x01", end=True)
        assert (await stream.recv_message()).svids
        await stream.cancel()


async def test_a_caller_that_sends_too_much_is_dropped(api, channel):
    with pytest.raises((GRPCError, StreamTerminatedError)):
        async with asyncio.timeout(20), svid_stream(channel) as stream:
            await stream.send_message(b"\x12\x80\x80\x08" + bytes(2**17), end=True)
            await stream.recv_message()
    async with opened(channel) as stream:  # a new connection
        assert await stream.recv_message()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x05\x04" + bytes(10)])
async def test_garbage_ends_its_own_connection_only(api, channel, garbage):
    reader, writer = await asyncio.open_unix_connection(str(api.path))
    writer.write(garbage)
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()
    async with opened(channel) as stream:
        assert (await stream.recv_message()).svids[0].spiffe_id == CART


async def test_a_broken_http2_machine_costs_its_connection(api, channel, monkeypatch):
    def fail(self, data):
        raise KeyError("unforeseen")

    with monkeypatch.context() as broken:
        broken.setattr(workload_api.H2Protocol, "data_received", fail)
        reader, writer = await asyncio.open_unix_connection(str(api.path))
        writer.write(b"x")
        async with asyncio.timeout(10):
            while await reader.read(4096):
                pass
        writer.close()
    assert len(api._tally) == 0
    async with opened(channel) as stream:
        assert await stream.recv_message()


# ---- limits


async def test_streams_of_a_process_are_limited_and_given_back(agent):
    async with WorkloadApi(agent, Limits(process_streams=2)) as api:
        channel = Channel(path=str(api.path), codec=RawCodec())
        async with opened(channel) as one, opened(channel) as two:
            await one.recv_message()
            await two.recv_message()
            assert (await refused(svid_stream(channel)))[0] is Status.RESOURCE_EXHAUSTED
        async with opened(channel) as again:
            assert await again.recv_message()
        channel.close()


@pytest.mark.parametrize("limits", [Limits(caller_connections=2), Limits(connections=2), Limits(strangers=2)])
async def test_connections_are_limited_and_given_back(agent, limits):
    async with WorkloadApi(agent, limits) as api:
        if limits.strangers == 2:
            api.own = NamespaceId(0, 0)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                reader, writer = await asyncio.open_unix_connection(str(api.path))
                stack.callback(writer.close)
                assert await reader.read(9)  # SETTINGS: it was taken
            reader, writer = await asyncio.open_unix_connection(str(api.path))
            assert await reader.read(9) == b""
            writer.close()
            assert len(api.connections) == 2
        await until(lambda: not api.connections)
        reader, writer = await asyncio.open_unix_connection(str(api.path))
        assert await reader.read(9)
        writer.close()


async def test_a_stranger_that_is_given_an_identity_makes_room_for_others(agent):
    async with WorkloadApi(agent, Limits(strangers=1)) as api:
        here, api.own = api.own, NamespaceId(0, 0)
        channel = Channel(path=str(api.path), codec=RawCodec())
        assert (await refused(svid_stream(channel)))[0] is Status.PERMISSION_DENIED
        reader, writer = await asyncio.open_unix_connection(str(api.path))
        assert await reader.read(9) == b""
        writer.close()
        api.own = here
        async with opened(channel) as stream, opened(channel) as again:  # on the same connection
            assert await stream.recv_message() == await again.recv_message()
            assert [c.peer.known for c in api.connections] == [True]
            api.own = NamespaceId(0, 0)
            reader, writer = await asyncio.open_unix_connection(str(api.path))
            assert await reader.read(9)
            writer.close()
        channel.close()
        await until(lambda: not api.connections)
        assert len(api._tally) == 0


async def test_one_user_does_not_take_all_places_of_strangers(agent, monkeypatch):
    monkeypatch.setattr(workload_api, "attest", lambda _: somebody(1000))
    async with WorkloadApi(agent, Limits(user_strangers=1)) as api:
        api.own = NamespaceId(0, 0)
        first = await asyncio.open_unix_connection(str(api.path))
        assert await first[0].read(9)
        second = await asyncio.open_unix_connection(str(api.path))
        assert await second[0].read(9) == b""
        monkeypatch.setattr(workload_api, "attest", lambda _: somebody(1001))
        third = await asyncio.open_unix_connection(str(api.path))
        assert await third[0].read(9)
        for _, writer in (first, second, third):
            writer.close()


async def test_a_process_is_limited_over_all_its_connections(agent):
    async with WorkloadApi(agent, Limits(process_streams=1)) as api:
        one, two = (Channel(path=str(api.path), codec=RawCodec()) for _ in range(2))
        async with opened(one) as stream:
            await stream.recv_message()
            assert (await refused(svid_stream(two)))[0] is Status.RESOURCE_EXHAUSTED
        one.close()
        two.close()


async def test_a_stumble_does_not_end_the_pushes(agent, monkeypatch):
    calls = []

    async def stumble(self):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a defect")
        await asyncio.Event().wait()

    monkeypatch.setattr(WorkloadApi, "_follow", stumble)
    async with WorkloadApi(agent), asyncio.timeout(10):
        while len(calls) < 2:
            await asyncio.sleep(0.05)
            assert calls


def test_a_tally_takes_all_or_none():
    tally = Tally()
    back = tally.take({"a": 2, "b": 1})
    with pytest.raises(Full):
        tally.take({"a": 2, "b": 1})
    also = tally.take({"a": 2})
    with pytest.raises(Full):
        tally.take({"a": 2})
    also()
    back()
    assert len(tally) == 0


def test_connections_follow_the_files_that_may_be_open(monkeypatch):
    for soft, wanted in ((256, 64), (1024, 256), (1 << 20, 4096)):
        monkeypatch.setattr(workload_api.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert Limits.here().connections == wanted


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
    monkeypatch.setattr(workload_api, "identities", lambda *_: (f"cart/{next(answers)}",))

    async def refuse(*_):
        raise Refused("svid.inactive", "moved")

    monkeypatch.setattr(workload_api, "svid_of", refuse)
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


def somebody(uid: int) -> Caller:
    return Caller(os.getpid(), uid, 0, os.pidfd_open(os.getpid()))


async def test_on_a_host_its_own_identities_are_for_root(make_agent, enrollment, live):
    agent = make_agent(enrollment)
    agent.attachments.attach(Attach(name="web", kind="host"))
    await tell(agent, live.snapshot())
    root, user = somebody(0), somebody(1000)
    try:
        assert identities(agent, root, own_namespace()) == ("web/0",)
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


# ---- the outside client

CLIENT = """
import json, sys
from spiffe import WorkloadApiClient

def show(context):
    svid = context.default_svid
    roots = [len(b.x509_authorities) for b in context.x509_bundle_set.bundles]
    print(json.dumps([str(svid.spiffe_id), len(svid.cert_chain), svid.leaf.serial_number, roots]), flush=True)

with WorkloadApiClient() as client:
    print(json.dumps(str(client.fetch_x509_svid().spiffe_id)), flush=True)
    print(json.dumps([str(b.trust_domain) for b in client.fetch_x509_bundles().bundles]), flush=True)
    try:
        client.fetch_jwt_bundles()
    except Exception as e:
        print(json.dumps(str(e)), flush=True)
    handler = client.stream_x509_contexts(show, lambda e: print(json.dumps(str(e)), flush=True))
    sys.stdin.readline()
    handler.cancel()
    try:
        client.fetch_x509_svid()
    except Exception as e:
        print(json.dumps(str(e)), flush=True)
"""


async def test_the_outside_client_fetches_watches_and_is_cut_off(api, agent, live):
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env=os.environ | svid_files.api_environment(agent.config.run_dir) | {"GRPC_VERBOSITY": "NONE"},
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):

            async def said():
                return json.loads(await client.stdout.readline())

            assert await said() == CART
            assert await said() == ["test.example"]
            assert "UNIMPLEMENTED" in await said()
            first = await said()
            assert (first[:2], first[3:]) == ([CART, 2], [[1]])
            for _ in range(3):
                held = agent.svids._held["cart/0"]
                agent.svids._held["cart/0"] = replace(held, renew_at=time.time())
                renewed = await said()
                assert renewed[0] == CART
                assert renewed[2] != first[2]
                first = renewed
            await moved(agent, live)
            client.stdin.write(b"go on\n")
            assert "PERMISSION_DENIED" in await said()
            assert await client.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            client.kill()
        await client.wait()
