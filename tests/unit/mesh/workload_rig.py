"""What the tests of the Workload API share: a CA's part, and the calls of a client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import replace

import pytest
from grpclib.client import UnaryStreamMethod
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

from identity.names import SpiffeId
from identity.wire.enroll import SvidReply
from identity.wire.jwt import JwtReply
from mesh.attestation import Caller
from mesh.uplink import boottime
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


async def tell(agent, line: bytes) -> None:
    await agent._on_events(agent.machine.receive(line, wall=time.time(), mono=boottime()))
    await agent._apply()


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


def somebody(uid: int) -> Caller:
    return Caller(os.getpid(), uid, 0, os.pidfd_open(os.getpid()))


class JwtIssuer:
    """The CA's part for JWT-SVIDs, with its real keys; `publish` puts them into a bundle that the agent trusts."""

    def __init__(self, live, directory) -> None:
        from ca.jwt_authority import JwtAuthority

        self.live, self.count, self.fail, self.spoil = live, 0, None, None
        directory.mkdir()
        self.keys = JwtAuthority.load(directory, live.now)

    def publish(self, agent) -> None:
        trust = agent.uplink.trust
        made = replace(trust, sequence=trust.sequence + 1, jwt_authorities=tuple(self.keys.published()))
        agent.uplink.enrollment = replace(agent.enrollment, bundle=made)

    async def __call__(self, request) -> JwtReply:
        self.count += 1
        if self.fail:
            raise self.fail
        name = SpiffeId.workload(self.live.trust.trust_domain, request.workload)
        token, expires = self.keys.sign(name, request.audience, self.live.now)
        return JwtReply(spiffe_id=str(name), token=self.spoil or token, expires=expires)
