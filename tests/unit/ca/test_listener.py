"""Half-open connections against the real server: bounded, and an honest machine gets through."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ca import listener
from ca.listener import Caps, allow_files
from ca.plane import Plane
from ca.serve import Options, Running, running
from identity.names import TrustDomain
from identity.wire.admin import TokenCreate
from mesh.enroll import enroll

TD = TrustDomain("reg.test")
WAIT = 30.0


@asynccontextmanager
async def served(path: Path, caps: Caps) -> AsyncIterator[Running]:
    Plane.create(path / "ca", TD, time.time())
    async with running(Options(path / "ca", "127.0.0.1:0", 0.2, caps=caps)) as server:
        yield server


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not done():  # noqa: ASYNC110 - the listener has no event for tests
            await asyncio.sleep(0.01)


def address(server: Running) -> tuple[str, int]:
    host, _, port = server.listen.rpartition(":")
    return host, int(port)


async def half_open(server: Running, source: str = "127.0.0.1") -> socket.socket:
    """A connection that begins a handshake and says no more."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((source, 0))
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, address(server))
    await loop.sock_sendall(sock, b"\x16\x03\x01\x02\x00\x01")
    return sock


async def closed(sock: socket.socket) -> bool:
    """The server ended it, with or without a last word."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(WAIT):
            while await loop.sock_recv(sock, 4096):
                pass
    except ConnectionError:
        return True
    return True


async def join(server: Running, path: Path, name: str) -> str:
    plane = server.service.plane
    token = (await server.service.read(lambda: plane.token(TokenCreate(host=name), "t"))).token
    return (await enroll(f"https://{server.listen}", token, path / name, [], ["chacha20poly1305"])).endpoint


async def test_the_oldest_makes_room_and_an_honest_machine_gets_through(tmp_path: Path) -> None:
    caps = Caps(per_source=20, half_open=50, grace_s=0.0)
    async with served(tmp_path, caps) as server:
        socks = []
        for _ in range(300):
            socks.append(await half_open(server))
            assert server.front.half_open <= 20
        assert await join(server, tmp_path, "a") == "a"
        assert await closed(socks[0])
        for sock in socks:
            sock.close()
        await until(lambda: server.front.half_open == 0)
        assert server.front._of == {}


async def test_newcomers_wait_while_the_others_are_young(tmp_path: Path) -> None:
    async with served(tmp_path, Caps(per_source=3, half_open=50, grace_s=60)) as server:
        socks = [await half_open(server) for _ in range(3)]
        await until(lambda: server.front.half_open == 3)
        late = await half_open(server)
        assert await closed(late)
        assert server.front.half_open == 3
        elsewhere = await half_open(server, "127.0.0.9")
        await until(lambda: server.front.half_open == 4)
        for sock in (*socks, late, elsewhere):
            sock.close()
        await until(lambda: server.front.half_open == 0)
        assert await join(server, tmp_path, "a") == "a"


async def test_all_sources_together_are_bounded(tmp_path: Path) -> None:
    async with served(tmp_path, Caps(per_source=4, half_open=10, grace_s=0.0)) as server:
        socks = [await half_open(server, f"127.0.1.{n}") for n in range(1, 60)]
        assert server.front.half_open <= 10
        assert await join(server, tmp_path, "a") == "a"
        for sock in socks:
            sock.close()
        await until(lambda: server.front.half_open == 0)


async def test_established_connections_are_bounded(tmp_path: Path) -> None:
    async with served(tmp_path, Caps(established=4)) as server:
        plain = ssl.create_default_context()
        plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
        streams = [await asyncio.open_connection(*address(server), ssl=plain) for _ in range(4)]
        await until(lambda: server.front.half_open == 0)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await asyncio.open_connection(*address(server), ssl=plain)
        streams[0][1].close()
        await asyncio.gather(streams[0][1].wait_closed(), return_exceptions=True)

        async def again() -> asyncio.StreamWriter:
            async with asyncio.timeout(WAIT):
                while True:
                    try:
                        return (await asyncio.open_connection(*address(server), ssl=plain))[1]
                    except (ConnectionError, ssl.SSLError):
                        await asyncio.sleep(0.01)

        writers = [await again(), *(w for _, w in streams[1:])]
        for writer in writers:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for w in writers), return_exceptions=True)


async def test_slow_handshakes_hold_nobody_up(tmp_path: Path) -> None:
    """More silent ones than have a turn: each has its turn for a while, and then the next comes, and an honest machine."""
    async with served(tmp_path, Caps(at_once=2, turn_s=0.02, grace_s=60)) as server:
        socks = [await half_open(server) for _ in range(9)]
        await until(lambda: server.front.half_open == 9)
        assert await join(server, tmp_path, "a") == "a"
        for sock in socks:
            sock.close()
        await until(lambda: server.front.half_open == 0)
        await until(lambda: not server.front._turns.locked())


async def test_a_handshake_has_an_end(tmp_path: Path) -> None:
    async with served(tmp_path, Caps(handshake_s=0.2)) as server:
        sock = await half_open(server)
        assert await closed(sock)
        await until(lambda: server.front.half_open == 0)
        sock.close()


async def test_a_stop_ends_handshakes(tmp_path: Path) -> None:
    async with served(tmp_path, Caps()) as server:
        sock = await half_open(server)
        await until(lambda: server.front.half_open == 1)
    assert await closed(sock)
    sock.close()


async def test_a_system_without_files_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "PAUSE_S", 0.0)
    async with served(tmp_path, Caps()) as server:
        loop = asyncio.get_running_loop()
        real, failures = loop.sock_accept, [0]

        async def full(sock: socket.socket) -> object:
            if failures[0] < 3:
                failures[0] += 1
                raise OSError(24, "Too many open files")
            return await real(sock)

        monkeypatch.setattr(loop, "sock_accept", full)
        for name in ("a", "b"):
            assert await join(server, tmp_path, name) == name
        assert failures == [3]


def test_the_limit_of_files_is_raised_as_far_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert allow_files(100) == 100
    assert len(limits) == 1
    assert allow_files(16_384) == 4096 - listener.SPARE_FILES
    assert limits[-1] == (4096, 4096)
    limits.append((1024, resource.RLIM_INFINITY))
    assert allow_files(2000) == 2000
    limits.append((resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert allow_files(2000) == 2000


async def test_few_sources_with_many_keep_no_other_source_out(tmp_path: Path) -> None:
    """All places are taken by young handshakes of two addresses: one of theirs goes for each newcomer from elsewhere."""
    async with served(tmp_path, Caps(per_source=6, half_open=10, grace_s=60)) as server:
        socks = [await half_open(server, f"127.0.1.{n % 2}") for n in range(12)]
        await until(lambda: server.front.half_open == 10)
        assert await join(server, tmp_path, "a") == "a"
        crowd = [await half_open(server, f"127.0.2.{n}") for n in range(8)]
        await until(lambda: len(server.front._of) >= 8)
        assert server.front.half_open <= 10
        assert max(len(of) for of in server.front._of.values()) <= 2
        late = await half_open(server, "127.0.1.1")  # who holds as much as the others waits again
        assert await closed(late)
        for sock in (*socks, *crowd, late):
            sock.close()
        await until(lambda: server.front.half_open == 0)
