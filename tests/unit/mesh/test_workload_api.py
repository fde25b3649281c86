"""The Workload API over its real socket, asked by a plain gRPC client: what is given, who is refused, the outside client.

The agent is a real sidecar with a fake data plane, so the place of its instance is the namespace of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key
from grpclib.client import StreamStreamMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from mesh import svid_files, workload_api
from mesh.attestation import NamespaceId
from tests.unit.mesh.workload_rig import (
    CART,
    HEADER,
    moved,
    opened,
    refused,
    svid_stream,
    tell,
)

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


async def test_federated_bundles_are_told_and_followed(channel, agent, live, tmp_path):
    """As the CA signed them; a bundle without roots is withdrawn, an older one is not taken."""
    from ca.authority import Authority
    from identity.certs import pem
    from identity.names import TrustDomain
    from identity.records import ForeignBundle

    other = Authority.create(tmp_path / "other", TrustDomain("other.example"), live.now)

    def bundle(sequence: int, name: str = "other.example", roots: int = 1) -> str:
        return live.sign(ForeignBundle(
            trust_domain="test.example", foreign=name, sequence=sequence, roots=[pem(other.root)] * roots, issued=live.now
        ))  # fmt: skip

    async with opened(channel) as stream, opened(channel, name="FetchX509Bundles") as bundles:
        assert dict((await stream.recv_message()).federated_bundles) == {}
        await bundles.recv_message()
        await tell(agent, live.delta({"federation/other.example": bundle(2)}))
        told = workload_api._der(pem(other.root))
        assert dict((await stream.recv_message()).federated_bundles) == {"spiffe://other.example": told}
        assert set((await bundles.recv_message()).bundles) == {"spiffe://test.example", "spiffe://other.example"}
        for key, envelope, code in (
            ("federation/other.example", bundle(1), "federation.sequence"), ("federation/third.example", bundle(3), "record.key"),
            ("federation/test.example", bundle(3, "test.example"), "federation.own"),
        ):  # fmt: skip
            await tell(agent, live.delta({key: envelope}))
            assert agent.machine.refused[key].code == code
        await tell(agent, live.delta({"federation/other.example": bundle(3, roots=0)}))
        assert dict((await stream.recv_message()).federated_bundles) == {}
        assert set((await bundles.recv_message()).bundles) == {"spiffe://test.example"}


# ---- who is refused


@pytest.mark.parametrize("metadata", [None, {"workload.spiffe.io": "yes"}, {"workload.spiffe.io": "TRUE"}])
@pytest.mark.parametrize("name", ["FetchX509SVID", "FetchX509Bundles"])
async def test_without_the_header_nothing_is_told(channel, metadata, name, issuer):
    status, message = await refused(svid_stream(channel, metadata, name))
    assert (status, "workload.spiffe.io: true" in message) == (Status.INVALID_ARGUMENT, True)
    assert issuer.count == 0


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
