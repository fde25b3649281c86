"""Connections into the mesh: one pool for each (caller, destination instance and epoch, family), never shared.

A pooled connection has its caller's address as source, so it may serve no other caller; and an instance that moved is
another kernel behind the same address, so its old connections are never used again.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp

from gateway.config import Route
from gateway.view import Ruling
from identity.records import PlacementRecord
from mesh.snapshot import InstanceKey, instance_key

KEEPALIVE: Final = 30.0  # seconds an unused connection is kept


@dataclass(frozen=True, slots=True)
class _Key:
    source: InstanceKey
    source_epoch: int
    target: InstanceKey
    target_epoch: int
    local: str


class Upstreams:
    """The sessions in use. `connect`: seconds to wait for a connection."""

    def __init__(self, connect: float) -> None:
        self._connect = connect
        self._sessions: dict[_Key, aiohttp.ClientSession] = {}
        self._turn = 0
        self._closing: set[asyncio.Task[None]] = set()

    def candidates(self, ruling: Ruling, route: Route) -> Iterator[tuple[aiohttp.ClientSession, PlacementRecord, str]]:
        """Sessions to try in order: instances in turn, IPv4 before IPv6 unless the route says otherwise."""
        assert ruling.source is not None
        self._turn += 1
        first = self._turn % len(ruling.targets)
        families = {"any": (0, 1), "ipv4": (0,), "ipv6": (1,)}[route.family]
        for family in families:
            for target in (*ruling.targets[first:], *ruling.targets[:first]):
                yield self._session(ruling.source, target, family), target, target.addresses[family]

    def _session(self, source: PlacementRecord, target: PlacementRecord, family: int) -> aiohttp.ClientSession:
        key = _Key(
            instance_key(source.name, source.instance), source.epoch,
            instance_key(target.name, target.instance), target.epoch, source.addresses[family],
        )  # fmt: skip
        session = self._sessions.get(key)
        if session is None:
            connector = aiohttp.TCPConnector(
                local_addr=(key.local, 0), family=(socket.AF_INET, socket.AF_INET6)[family],
                limit=0, keepalive_timeout=KEEPALIVE, use_dns_cache=False,
            )  # fmt: skip
            session = self._sessions[key] = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False,
                max_line_size=64 * 1024, max_field_size=64 * 1024,
            )  # fmt: skip
        return session

    def keep(self, placements: Mapping[InstanceKey, PlacementRecord]) -> None:
        """Close the sessions whose caller or destination is no longer placed as it was. Answers under way on them end."""
        for key in list(self._sessions):
            source, target = placements.get(key.source), placements.get(key.target)
            now = (source.epoch if source else 0, target.epoch if target else 0)
            if now != (key.source_epoch, key.target_epoch):
                task = asyncio.ensure_future(self._sessions.pop(key).close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close everything."""
        sessions = list(self._sessions.values())
        self._sessions.clear()
        await asyncio.gather(*(s.close() for s in sessions), *self._closing)
