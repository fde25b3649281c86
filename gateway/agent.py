"""The gateway's side of the agent's local API: attach the callers, follow the signed state."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from gateway.config import Caller
from gateway.view import Pin, View, verify_reply
from identity.errors import RetinueError, Unreachable, from_wire
from identity.wire import parse
from identity.wire.local import Attach, SnapshotReply, Status

LOG = logging.getLogger("retinue.gateway")
MAX_LINE: Final = 64 * 1024 * 1024
FIRST_PAUSE: Final = 0.1  # seconds; doubles to LAST_PAUSE
LAST_PAUSE: Final = 5.0
ANSWER: Final = 10.0  # seconds for one answer


class AgentLink:
    """Follows `/v1/watch` for ever. `on_view` gets each newer verified view; what does not verify is logged and skipped."""

    def __init__(
        self, path: Path, pin: Pin, on_view: Callable[[View], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        self.callers: Sequence[Caller] = ()
        self.view: View | None = None
        self.error: str | None = "not connected to the agent yet"
        self.unattached: dict[str, str] = {}
        self._path, self._pin, self._on_view, self._clock = path, pin, on_view, clock

    async def run(self) -> None:
        """Connect and follow, again and again, until cancelled."""
        pause = FIRST_PAUSE
        while True:
            try:
                async with self._session() as session:
                    endpoint = (await self._get(session, "status", Status)).endpoint
                    async with session.get("http://agent/v1/watch", timeout=aiohttp.ClientTimeout(total=None)) as answer:
                        if answer.status != 200:
                            raise from_wire(answer.status, await answer.json())
                        while line := await answer.content.readline():
                            self._take(line, endpoint)
                            await self._attach(session)
                            pause = FIRST_PAUSE
                self.error = "the agent closed the connection"
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                self.error = f"the agent at {self._path} cannot be reached ({type(e).__name__})"
            except RetinueError as e:
                self.error = e.message
            LOG.warning("%s; what is known stays in force", self.error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  jitter is no secret
            pause = min(pause * 2, LAST_PAUSE)

    async def explain(self, src: str, dst: str, proto: str, port: int) -> Mapping[str, Any] | None:
        """The agent's explanation of a verdict; None when it has none to give."""
        query = {"src": src, "dst": dst, "proto": proto, "port": str(port)}
        try:
            async with self._session() as session, session.get(
                "http://agent/v1/explain", params=query, timeout=aiohttp.ClientTimeout(total=ANSWER)
            ) as answer:
                said = await answer.json()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None
        return said if answer.status == 200 and isinstance(said, dict) else None

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self._path)), read_bufsize=MAX_LINE)

    async def _get(self, session: aiohttp.ClientSession, what: str, kind: type[Status]) -> Status:
        async with session.get(f"http://agent/v1/{what}", timeout=aiohttp.ClientTimeout(total=ANSWER)) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise Unreachable("gateway.agent", f"the agent answered HTTP {answer.status} to {what}")
            return parse(kind, body)

    def _take(self, line: bytes, endpoint: str) -> None:
        try:
            view = verify_reply(parse(SnapshotReply, line), endpoint, self._pin, self.view, self._clock())
        except RetinueError as e:
            self.error = f"[{e.code}] {e.message}"
            LOG.warning("state of the agent refused: %s", self.error)
            return
        self.view, self.error = view, None
        self._on_view(view)

    async def _attach(self, session: aiohttp.ClientSession) -> None:
        """Give each caller its place on this host (idempotent): its addresses then are ours to speak from."""
        for caller in self.callers:
            name = f"{caller.workload}/{caller.instance}"
            if name in self.unattached and not self.unattached[name]:
                continue
            request = Attach(name=caller.workload, instance=caller.instance, kind="host")
            async with session.post(
                "http://agent/v1/attach", data=request.model_dump_json(),
                headers={"Content-Type": "application/json"}, timeout=aiohttp.ClientTimeout(total=ANSWER),
            ) as answer:  # fmt: skip
                body = await answer.json(content_type=None)
            self.unattached[name] = "" if answer.status == 200 else from_wire(answer.status, body).message
            if self.unattached[name]:
                LOG.warning("%s is not attached: %s", name, self.unattached[name])
