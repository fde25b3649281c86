"""retinue-gateway as a process: TLS with client certificates, reload, drain, and clear errors at the start."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from gateway.callers import spki_sha256
from gateway.config import Listen
from gateway.daemon import Listener, tls_context
from identity.keys import private_pem, write_secret

TOKEN = "daemon-secret"


def self_signed(directory: Path, name: str) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (directory / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    write_secret(directory / f"{name}.key", private_pem(key))
    return certificate


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Daemon:
    def __init__(self, directory: Path, agent: Any, world: Any) -> None:
        self.dir, self.agent, self.world = directory, agent, world
        self.port, self.health, self.upstream = free_port(), free_port(), 0
        self.process: asyncio.subprocess.Process | None = None
        self.log = ""
        self.more = asyncio.Condition()
        self.reader: asyncio.Task[None] | None = None
        self.pinned = self_signed(directory, "client")
        self_signed(directory, "server")
        self_signed(directory, "stranger")

    def write(self, *, token: str = TOKEN, extra: str = "") -> Path:
        path = self.dir / "gateway.toml"
        path.write_text(f"""
            agent = "agent.sock"
            trust_domain = "edge.example"
            root_fingerprint = "{self.world.pin.root_fingerprint}"
            health = "127.0.0.1:{self.health}"
            drain = 5.0
            {extra}
            [[listen]]
            address = "127.0.0.1:{self.port}"
            certificate = "server.pem"
            key = "server.key"
            client_ca = ["client.pem"]
            [[caller]]
            workload = "partner/acme"
            token_sha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]
            spki_sha256 = ["{spki_sha256(self.pinned)}"]
            [[route]]
            workload = "shop/api"
            port = {self.upstream}
            family = "ipv4"
        """)
        return path

    async def start(self) -> None:
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.setblocking(False)
        notify.bind(str(self.dir / "notify"))
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.daemon", "--config", str(self.write()),
            stderr=asyncio.subprocess.PIPE, env={**os.environ, "NOTIFY_SOCKET": str(self.dir / "notify")},
        )  # fmt: skip
        self.reader = asyncio.create_task(self.read())
        with notify:
            async with asyncio.timeout(20):
                assert await asyncio.get_running_loop().sock_recv(notify, 100) == b"READY=1"

    def tls(self, name: str | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.dir / "server.pem"))
        context.check_hostname = False
        if name:
            context.load_cert_chain(str(self.dir / f"{name}.pem"), str(self.dir / f"{name}.key"))
        return context

    async def get(self, path: str = "/", *, token: str | None = None, certificate: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"https://127.0.0.1:{self.port}{path}", headers=headers, ssl=self.tls(certificate)) as answer,
        ):
            return answer.status, await answer.json()

    async def until_ready(self) -> None:
        """The first verified state; health says so."""
        async with aiohttp.ClientSession() as client, asyncio.timeout(20):
            while True:
                async with client.get(f"http://127.0.0.1:{self.health}/healthz") as answer:
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.02)

    async def until_log(self, text: str) -> None:
        async with asyncio.timeout(20), self.more:
            await self.more.wait_for(lambda: text in self.log)

    async def read(self) -> None:
        assert self.process is not None
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self.more:
                self.log += line.decode()
                self.more.notify_all()


@pytest.fixture
async def daemon(tmp_path: Path, agent: Any, world: Any) -> AsyncIterator[Daemon]:
    made = Daemon(tmp_path, agent, world)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/wait":
            out = web.StreamResponse()
            await out.prepare(request)
            await out.write(b"begun\n")
            await asyncio.sleep(0.5)
            await out.write(b"ended\n")
            return out
        return web.json_response({"source": request.remote, "by": request.headers.get("X-Retinue-Caller-Proof")})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.41", 0).start()
    made.upstream = runner.addresses[0][1]
    world.policy(world.template % made.upstream)
    yield made
    if made.process is not None and made.process.returncode is None:
        made.process.kill()
        await made.process.wait()
    await runner.cleanup()


async def test_life_of_a_gateway(daemon: Daemon) -> None:
    await daemon.start()
    await daemon.until_ready()
    source = {"source": "127.0.0.31"}
    assert await daemon.get(token=TOKEN) == (200, source | {"by": "token"})
    assert await daemon.get(certificate="client") == (200, source | {"by": "spki"})
    assert (await daemon.get())[0] == 401
    with pytest.raises(aiohttp.ClientError):
        await daemon.get(certificate="stranger")

    # a bad file changes nothing, a good one is taken
    assert daemon.process is not None
    daemon.write(extra="nonsense = 1")
    daemon.process.send_signal(signal.SIGHUP)
    await daemon.until_log("not reloaded")
    assert (await daemon.get(token=TOKEN))[0] == 200
    daemon.write(token="other")
    daemon.process.send_signal(signal.SIGHUP)
    await daemon.until_log("configuration reloaded")
    assert (await daemon.get(token=TOKEN))[0] == 401
    assert (await daemon.get(token="other"))[0] == 200

    # what has begun may end, nothing new begins
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"https://127.0.0.1:{daemon.port}/wait", headers={"Authorization": "Bearer other"}, ssl=daemon.tls()) as answer,
    ):
        assert await answer.content.readline() == b"begun\n"
        daemon.process.send_signal(signal.SIGTERM)
        assert await answer.content.read() == b"ended\n"
    async with asyncio.timeout(20):
        assert await daemon.process.wait() == 0
    with pytest.raises(aiohttp.ClientError):
        await daemon.get(token="other")
    assert daemon.reader is not None
    await daemon.reader
    log = daemon.log
    assert TOKEN not in log
    assert "other" not in log
    requests = [json.loads(line) for line in log.splitlines() if '"event": "request"' in line]
    assert [r["proof"] for r in requests][:3] == ["token", "spki", None]


async def test_start_errors_are_clear(daemon: Daemon, tmp_path: Path) -> None:
    async def fails(path: Path, *args: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.daemon", "--config", str(path), *args, stderr=asyncio.subprocess.PIPE
        )
        _, err = await process.communicate()
        assert b"Traceback" not in err
        return process.returncode or 0, err.decode()

    assert (await fails(tmp_path / "none.toml"))[0] == 2
    path = daemon.write()
    assert (await fails(path, "--check")) == (0, "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", daemon.port))
        taken.listen()
        code, said = await fails(path)
        assert (code, "gateway.port" in said) == (1, True)
    (tmp_path / "server.pem").write_text("junk")
    code, said = await fails(path, "--check")
    assert (code, "gateway.certificate" in said) == (2, True)
    path.write_text(path.read_text().replace("trust_domain =", "#").replace("root_fingerprint =", "#"))
    (tmp_path / "server.pem").unlink()
    self_signed(tmp_path, "server")
    path.write_text('state_dir = "none"\n' + path.read_text())
    code, said = await fails(path)
    assert (code, "gateway.pin" in said) == (2, True)


async def test_changing_tls_settings_loses_no_connection(tmp_path: Path) -> None:
    """Settings change again and again while callers come in: each of them is answered."""
    self_signed(tmp_path, "server")
    listen = Listen(address="127.0.0.1:0", certificate=tmp_path / "server.pem", key=tmp_path / "server.key")
    listener = Listener(listen, 10.0)
    listener.bind()

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="ok")

    server = web.Server(answer)
    await listener.serve(server, tls_context(listen, None))
    trust = ssl.create_default_context(cafile=str(tmp_path / "server.pem"))
    trust.check_hostname = False
    done = asyncio.Event()

    async def swap() -> int:
        count = 0
        while not done.is_set():
            await listener.serve(server, tls_context(listen, None))
            count += 1
        return count

    swapping = asyncio.create_task(swap())

    async def call() -> str:
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"https://127.0.0.1:{listener.port}/", ssl=trust, timeout=aiohttp.ClientTimeout(total=20)) as said,
        ):
            return await said.text()

    for _ in range(6):
        assert await asyncio.gather(*(call() for _ in range(10))) == ["ok"] * 10
    done.set()
    assert await swapping > 5
    await listener.close()
    await server.shutdown(0.1)
