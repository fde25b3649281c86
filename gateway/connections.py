"""Client connections: a limit on their number, and a time within which each must bring a whole request head."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway.config import Limits


class _Handler(RequestHandler):
    """aiohttp's connection, closed when its first request head is not complete in time (a slow-header attack)."""

    head_time = 15.0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._patience = asyncio.get_running_loop().call_later(self.head_time, self._too_slow)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def _too_slow(self) -> None:
        if self._request_count == 0 and self._current_request is None and not self._messages:
            self.force_close()


# aiohttp logs malformed requests with their bytes, and those may hold a token.
_SILENT = logging.getLogger("retinue.gateway.http")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False
_SILENT.setLevel(logging.CRITICAL + 1)


class FrontServer(web.Server):
    """aiohttp's low-level server with `limits`."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], limits: Limits) -> None:
        super().__init__(
            handler, handler_cancellation=True, access_log=None, logger=_SILENT, keepalive_timeout=limits.idle, auto_decompress=False,
            max_line_size=limits.header_bytes, max_field_size=limits.header_bytes,
        )  # fmt: skip
        self._limits = limits

    def __call__(self) -> RequestHandler:
        connection = _Handler(self, loop=asyncio.get_running_loop(), **self._kwargs)
        connection.head_time = self._limits.header
        return connection

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        """Turn a connection above the limit away at once."""
        super().connection_made(handler, transport)
        if len(self._connections) > self._limits.connections:
            transport.abort()
