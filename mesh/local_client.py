"""Asking the agent on this machine: the client side of mesh/local_api.py, for the CLI, sidecars and the gateway."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import aiohttp
from pydantic import BaseModel

from identity.errors import NoPrivilege, RetinueError, TimedOut, Unreachable, from_wire
from identity.wire import parse
from identity.wire.admin import ExplainReply
from identity.wire.enroll import SidecarTokenReply, SidecarTokenRequest
from identity.wire.explain import IdentityExplained
from identity.wire.local import Attach, AttachReply, Down, InstanceRef, SnapshotReply, Status, SvidFiles

DEFAULT_RUN_DIR: Final = Path("/run/retinue")
TIMEOUT: Final = 15.0  # seconds
R = TypeVar("R", bound=BaseModel)


def socket_path(run_dir: Path | None) -> Path:
    """The agent's socket: of `run_dir`, else of RETINUE_RUN_DIR, else the default."""
    return (run_dir or Path(os.environ.get("RETINUE_RUN_DIR") or DEFAULT_RUN_DIR)) / "agent.sock"


class LocalClient:
    """`async with LocalClient(path) as agent:`. Every method raises RetinueError only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(os.fspath(self.path)), timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def status(self) -> Status:
        return await self._ask("GET", "/v1/status", Status)

    async def attach(self, request: Attach) -> AttachReply:
        return await self._ask("POST", "/v1/attach", AttachReply, body=request)

    async def detach(self, ref: InstanceRef) -> AttachReply:
        return await self._ask("POST", "/v1/detach", AttachReply, body=ref)

    async def explain(self, src: str, dst: str, proto: str, port: int | None) -> ExplainReply:
        params = {"src": src, "dst": dst, "proto": proto} | ({"port": str(port)} if port is not None else {})
        return await self._ask("GET", "/v1/explain", ExplainReply, params=params)

    async def explain_identity(self, name: str, instance: int, pid: int | None) -> IdentityExplained:
        params = {"name": name, "instance": str(instance)} | ({"pid": str(pid)} if pid is not None else {})
        return await self._ask("GET", "/v1/explain/identity", IdentityExplained, params=params)

    async def snapshot(self) -> SnapshotReply:
        return await self._ask("GET", "/v1/snapshot", SnapshotReply)

    async def svid(self, ref: InstanceRef) -> SvidFiles:
        return await self._ask("POST", "/v1/svid", SvidFiles, body=ref)

    async def sidecar_token(self, request: SidecarTokenRequest) -> SidecarTokenReply:
        return await self._ask("POST", "/v1/sidecar-token", SidecarTokenReply, body=request)

    async def down(self, *, clean: bool) -> None:
        await self._exchange("POST", "/v1/down", body=Down(clean=clean))

    async def watch(self) -> AsyncIterator[SnapshotReply]:
        """What is in force, now and after each change. Ends with Unreachable when the agent does."""
        try:
            async with self._open().get("http://agent/v1/watch") as response:
                if response.status != 200:
                    raise from_wire(response.status, _json(await response.read()))
                buffer = b""
                async for chunk in response.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        yield parse(SnapshotReply, line)
        except (aiohttp.ClientError, OSError) as e:
            raise self._unreachable(e) from None
        raise Unreachable("agent.gone", "the agent ended")

    async def lines(self, path: str, params: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The lines of an answer, as they come."""
        try:
            async with self._open().get(f"http://agent{path}", params=params) as response:
                if response.status != 200:
                    raise from_wire(response.status, _json(await response.read()))
                buffer = b""
                async for chunk in response.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        yield line
        except (aiohttp.ClientError, OSError) as e:
            raise self._unreachable(e) from None

    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "used outside of its context"
        return self._session

    async def _ask(
        self, method: str, path: str, reply: type[R], *, body: BaseModel | None = None,
        params: Mapping[str, str] | None = None,
    ) -> R:  # fmt: skip
        return parse(reply, await self._exchange(method, path, body=body, params=params))

    async def _exchange(
        self, method: str, path: str, *, body: BaseModel | None = None, params: Mapping[str, str] | None = None
    ) -> bytes:
        data = body.model_dump_json().encode() if body is not None else None
        try:
            async with asyncio.timeout(TIMEOUT), self._open().request(
                method, f"http://agent{path}", data=data, params=params
            ) as response:
                answer = await response.read()
        except TimeoutError:
            raise TimedOut("agent.timeout", f"the agent did not answer within {TIMEOUT:g} s") from None
        except (aiohttp.ClientError, OSError) as e:
            raise self._unreachable(e) from None
        if response.status != 200:
            raise from_wire(response.status, _json(answer))
        return answer

    def _unreachable(self, error: Exception) -> RetinueError:
        cause: BaseException | None = error.__cause__ or getattr(error, "os_error", None) or error
        if isinstance(error, PermissionError) or isinstance(cause, PermissionError):
            return NoPrivilege("agent.privilege", f"you may not ask the agent at {self.path}", hint="run this as root (sudo)")
        if isinstance(error, aiohttp.ClientConnectorError | OSError):
            return Unreachable(
                "agent.unreachable", f"no agent answers on {self.path}",
                hint="start retinue-agent, or name its --run-dir (RETINUE_RUN_DIR)",
            )  # fmt: skip
        return Unreachable("agent.gone", "the agent broke the connection")


def _json(data: bytes) -> object:
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found
