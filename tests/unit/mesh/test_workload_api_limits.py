"""Ceilings of the Workload API, for callers and strangers."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from grpclib.client import Channel
from grpclib.const import Status

from mesh import workload_api
from mesh.attestation import NamespaceId
from mesh.workload_api import (
    Full,
    Limits,
    Tally,
    WorkloadApi,
)
from tests.unit.mesh.workload_rig import (
    RawCodec,
    opened,
    refused,
    somebody,
    svid_stream,
    until,
)

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
