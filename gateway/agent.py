"""The gateway's side of the agent's local API: attach the callers, follow the signed state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gateway.config import Caller
from gateway.view import Pin, View, verify_reply
from identity.errors import RetinueError
from identity.wire.local import Attach, SnapshotReply
from mesh.local_client import LocalClient

LOG = logging.getLogger("retinue.gateway")
FIRST_PAUSE: Final = 0.1  # seconds; doubles to LAST_PAUSE
LAST_PAUSE: Final = 5.0


class AgentLink:
    """Follows what the agent has in force. `on_view` gets each newer verified view; what does not verify is logged,
    skipped and shown by health, and the view before stays.
    """

    def __init__(
        self, path: Path, pin: Pin, on_view: Callable[[View], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        self.callers: Sequence[Caller] = ()
        self.view: View | None = None
        self.error: str | None = "not connected to the agent yet"
        self.unattached: dict[str, str] = {}  # "<workload>/<instance>" -> why not; empty when attached
        self._path, self._pin, self._on_view, self._clock = path, pin, on_view, clock

    async def run(self) -> None:
        """Connect and follow, again and again, until cancelled."""
        pause = FIRST_PAUSE
        while True:
            try:
                async with LocalClient(self._path) as agent:
                    endpoint = (await agent.status()).endpoint
                    async for reply in agent.watch():
                        self._take(reply, endpoint)
                        await self._attach(agent)
                        pause = FIRST_PAUSE
            except RetinueError as e:
                self.error = f"[{e.code}] {e.message}"
            LOG.warning("%s; what is known stays in force", self.error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  jitter is no secret
            pause = min(pause * 2, LAST_PAUSE)

    async def attach(self, callers: Sequence[Caller]) -> None:
        """Serve these callers from now on; new ones are attached at once."""
        self.callers = callers
        with contextlib.suppress(RetinueError):
            async with LocalClient(self._path) as agent:
                await self._attach(agent)

    async def explain(self, src: str, dst: str, proto: str, port: int) -> Mapping[str, Any] | None:
        """The agent's explanation of a verdict; None when it has none to give."""
        try:
            async with LocalClient(self._path) as agent:
                return (await agent.explain(src, dst, proto, port)).model_dump()
        except RetinueError:
            return None

    def _take(self, reply: SnapshotReply, endpoint: str) -> None:
        try:
            view = verify_reply(reply, endpoint, self._pin, self.view, self._clock())
        except RetinueError as e:
            self.error = f"[{e.code}] {e.message}"
            LOG.warning("state of the agent refused: %s", self.error)
            return
        self.view, self.error = view, None
        self._on_view(view)

    async def _attach(self, agent: LocalClient) -> None:
        """Give each caller its place on this host (idempotent): its addresses then are ours to speak from."""
        for caller in self.callers:
            name = f"{caller.workload}/{caller.instance}"
            if self.unattached.get(name) == "":
                continue
            try:
                await agent.attach(Attach(name=caller.workload, instance=caller.instance, kind="host"))
                self.unattached[name] = ""
            except RetinueError as e:
                self.unattached[name] = e.message
                LOG.warning("%s is not attached: %s", name, e.message)
