"""Alerts: a refused flow of a segment that asks for it becomes one message at a sink.

    attempt -> incident (source, destination, segment) -> spool on disk -> sink

An incident collects for the segment's `collapse` seconds. It is told when its attempts pause (SETTLE) or at the latest
after MAX_SETTLE; if more attempts come after that, once more at its end, under the same id and with `update`. A source
with many incidents at once is sweeping: the rest is one incident with `dst` "*".

Where alerts go is said by this host's own configuration alone: policy names a sink, never an address. A sink that hangs
or fails keeps its alerts in the spool, over restarts of either; a full spool loses the oldest, and says how many.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import structlog

from identity.errors import BadInput
from policy.fields import SINKS
from policy.flows import FlowRecord
from policy.ports import proto_name
from policy.program import Alert

SETTLE: Final = 1.0  # seconds without an attempt until an incident is told
MAX_SETTLE: Final = 5.0
SWEEP: Final = 20  # incidents of one source at once
OPEN: Final = 2000  # incidents at once
LISTED: Final = 32  # ports and rules named in one alert
SPOOL: Final = 1000  # alerts waiting for one sink
TIMEOUT: Final = 10.0
RETRY: Final = (1.0, 60.0)  # first and longest pause
DIRECTORY: Final = "alerts"

log = structlog.get_logger("retinue.alerts")


@dataclass(frozen=True, slots=True)
class Sink:
    """Where alerts of one name go: ``https``/``http`` webhook, ``unix`` stream of lines, ``syslog`` datagrams."""

    name: str
    scheme: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Sink:
        """``page=https://host/path``, ``log=syslog:/dev/log``, ``log=syslog://host:514``, ``webhook=unix:/path``. Raises BadInput."""
        name, equals, url = text.partition("=")
        if not equals or name not in SINKS:
            raise BadInput("alert.sink", f"not an alert sink: {ascii(text)[:80]}",
                           hint=f"write NAME=URL with NAME one of {', '.join(sorted(SINKS))}")  # fmt: skip
        scheme, colon, rest = url.partition(":")
        good = bool(colon) and url.isprintable() and " " not in url
        if scheme in {"http", "https"}:
            try:
                parts = urlsplit(url)
                good = good and bool(parts.hostname) and parts.username is None and (parts.port is None or 0 < parts.port < 65536)
            except ValueError:
                good = False
            return cls(name, scheme, url) if good else cls._bad(url)
        if scheme == "unix" and rest.startswith("/"):
            return cls(name, scheme, rest) if good and len(rest) < 108 else cls._bad(url)
        if scheme == "syslog":
            host, _, port = rest.removeprefix("//").rpartition(":")
            remote = rest.startswith("//") and bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65536
            return cls(name, scheme, rest) if good and (remote or (rest.startswith("/") and not rest.startswith("//"))) else cls._bad(url)
        return cls._bad(url)

    @staticmethod
    def _bad(url: str) -> Sink:
        raise BadInput("alert.sink", f"not the address of an alert sink: {ascii(url)[:80]}",
                       hint="https://HOST/PATH, unix:/PATH, syslog:/dev/log or syslog://HOST:PORT")  # fmt: skip

    async def send(self, message: Mapping[str, Any]) -> None:
        """Deliver one message. Raises OSError, TimeoutError or ValueError when it may not have arrived."""
        async with asyncio.timeout(TIMEOUT):
            if self.scheme in {"http", "https"}:
                await self._post(message)
            elif self.scheme == "unix":
                await self._line(message)
            else:
                await self._syslog(message)

    async def _post(self, message: Mapping[str, Any]) -> None:
        import aiohttp

        try:
            async with aiohttp.ClientSession() as session, session.post(self.target, json=dict(message), allow_redirects=False) as reply:
                if not 200 <= reply.status < 300:
                    raise ValueError(f"status {reply.status}")
        except aiohttp.ClientError as e:
            raise OSError(type(e).__name__) from None

    async def _line(self, message: Mapping[str, Any]) -> None:
        _, writer = await asyncio.open_unix_connection(self.target)
        try:
            writer.write(json.dumps(message).encode() + b"\n")
            await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _syslog(self, message: Mapping[str, Any]) -> None:
        """RFC 5424, facility auth, severity warning."""
        when = datetime.fromtimestamp(int(message["last"]), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        data = f"<36>1 {when} {message['host'] or '-'} retinue - denied - {json.dumps(message)}".encode()
        await asyncio.to_thread(self._datagram, data)

    def _datagram(self, data: bytes) -> None:
        if not self.target.startswith("//"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(TIMEOUT / 2)
                sock.sendto(data, self.target)
            return
        host, _, port = self.target[2:].rpartition(":")
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.sendto(data, address)


@dataclass(slots=True)
class Incident:
    """Attempts of one source at one destination (or many) that one message tells."""

    id: str
    alert: Alert
    src: str
    dst: str
    first: int
    last: int
    opened: float  # monotonic
    touched: float
    count: int = 0
    told: int = -1  # count when it was last told
    flows: list[tuple[str, str]] = field(default_factory=list)  # (proto/port, by), each once
    more: int = 0  # flows that are not listed
    instance: int | None = None
    process: dict[str, object] | None = None

    def add(self, record: FlowRecord, count: int, mono: float) -> None:
        self.count += count
        self.last, self.touched = max(self.last, record.time), mono
        flow = (proto_name(record.proto) + (f"/{record.port}" if record.port is not None else ""), record.by)
        if flow not in self.flows:
            if len(self.flows) < LISTED:
                self.flows.append(flow)
            else:
                self.more += 1

    def message(self, host: str) -> dict[str, Any]:
        """What is sent."""
        flow, by = self.flows[0] if self.flows else ("", "")
        proto, _, port = flow.partition("/")
        return {
            "kind": "denied", "id": self.id, "update": self.told >= 0, "segment": self.alert.segment, "sink": self.alert.sink,
            "src": self.src, "src_instance": self.instance, "dst": self.dst, "proto": proto, "port": int(port) if port else None,
            "by": by or "unknown", "flows": [{"on": on, "by": why or "unknown"} for on, why in self.flows], "more_flows": self.more,
            "host": host, "first": self.first, "last": self.last, "count": self.count, "src_process": self.process,
        }  # fmt: skip


class Spool:
    """Messages on their way, one file each, so that a restart loses none."""

    def __init__(self, directory: Path, *, size: int = SPOOL) -> None:
        self.path, self.size = directory, size
        self.dropped = 0
        self._order = 0

    def put(self, key: str, message: Mapping[str, Any]) -> None:
        """Write or replace one message; blocking. A disk that takes nothing is counted, not raised."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            waiting = self.waiting()
            for old in waiting[: max(0, len(waiting) - self.size + 1)]:
                self.done(old)
                self.dropped += 1
            temporary = self.path / f".{key}.tmp"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump(message, file)
            temporary.replace(self.path / f"{key}.json")
        except OSError:
            self.dropped += 1

    def key(self, incident: str) -> str:
        """A name that sorts by time."""
        self._order += 1
        return f"{int(time.time() * 1000):015d}-{self._order:06d}-{incident}"

    def waiting(self) -> list[str]:
        """Keys, oldest first."""
        with contextlib.suppress(OSError):
            return sorted(p.stem for p in self.path.glob("*.json") if not p.is_symlink())
        return []

    def get(self, key: str) -> dict[str, Any] | None:
        """One message; None (and gone) when it cannot be read."""
        try:
            found = json.loads((self.path / f"{key}.json").read_text())
            if isinstance(found, dict) and isinstance(found.get("last"), int):
                return found
        except (OSError, ValueError, RecursionError):
            pass
        self.done(key)
        return None

    def done(self, key: str) -> None:
        with contextlib.suppress(OSError):
            (self.path / f"{key}.json").unlink()


class AlertDesk:
    """Collects incidents and delivers them. `tell` says what is wrong with a sink, for health conditions."""

    def __init__(
        self, host: str, sinks: Sequence[Sink], state_dir: Path, *, tell: Callable[[str, str | None], None] = lambda *_: None,
        mono: Callable[[], float] = time.monotonic, settle: float = SETTLE,
    ) -> None:  # fmt: skip
        self.host, self.mono, self.settle = host, mono, settle
        self.sinks = {sink.name: sink for sink in sinks}
        self.spools = {name: Spool(state_dir / DIRECTORY / name) for name in self.sinks}
        self._tell = tell
        self._incidents: OrderedDict[tuple[str, str, str, str], tuple[Incident, str]] = OrderedDict()
        self._sources: dict[tuple[str, str, str], int] = {}
        self._held: set[str] = set()  # spooled, not to be sent yet
        self._wake = {name: asyncio.Event() for name in self.sinks}
        self._any = asyncio.Event()  # is there an incident to look after?
        self._unsent = 0

    def attempt(self, alert: Alert, record: FlowRecord, count: int) -> None:
        """A refused flow (or `count` attempts at one)."""
        if alert.sink not in self.sinks:
            self._unsent += count
            self._tell("alert.no_sink", f"policy sends alerts to {alert.sink}, which this host does not know: {self._unsent} not sent")
            return
        dst, source = record.dst, (alert.sink, alert.segment, record.src)
        key = (*source, dst)
        if key not in self._incidents and self._sources.get(source, 0) >= SWEEP:
            dst = "*"
            key = (*source, dst)
        if key not in self._incidents:
            if len(self._incidents) >= OPEN:
                self._close(next(iter(self._incidents)))
            made = Incident(secrets.token_hex(8), alert, record.src, dst, record.time, record.time, self.mono(), self.mono(),
                            instance=record.src_instance)  # fmt: skip
            if record.src_process is not None:
                made.process = {"executable": record.src_process.executable, "unit": record.src_process.unit, "uid": record.src_process.uid}
            name = self.spools[alert.sink].key(made.id)
            self._incidents[key] = made, name
            self._any.set()
            self._sources[source] = self._sources.get(source, 0) + 1
            self._held.add(name)
            made.add(record, count, self.mono())
            # On disk from the first attempt: a restart tells it as it was then.
            self.spools[alert.sink].put(name, made.message(self.host))
            return
        self._incidents[key][0].add(record, count, self.mono())

    def tick(self) -> None:
        """Tell incidents that have settled, close those whose time is over."""
        now = self.mono()
        for key, (one, name) in list(self._incidents.items()):
            if one.told < 0 and (now - one.touched >= self.settle or now - one.opened >= MAX_SETTLE):
                self._release(one, name)
            if now - one.opened >= max(one.alert.collapse, MAX_SETTLE):
                self._close(key)

    def _release(self, one: Incident, name: str) -> None:
        spool = self.spools[one.alert.sink]
        spool.put(name, one.message(self.host))
        one.told = one.count
        self._held.discard(name)
        self._wake[one.alert.sink].set()

    def _close(self, key: tuple[str, str, str, str]) -> None:
        one, name = self._incidents.pop(key)
        source = key[:3]
        self._sources[source] -= 1
        if not self._sources[source]:
            del self._sources[source]
        if one.told != one.count:
            self._release(one, name if one.told < 0 else self.spools[one.alert.sink].key(one.id))

    async def run(self) -> None:
        """Deliver, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ticking())
            for name in self.sinks:
                group.create_task(self._deliver(name))

    async def _ticking(self) -> None:
        while True:
            self._any.clear()
            if not self._incidents:
                await self._any.wait()
            await asyncio.sleep(self.settle / 4)
            self.tick()

    async def _deliver(self, name: str) -> None:
        sink, spool, pause = self.sinks[name], self.spools[name], RETRY[0]
        while True:
            self._wake[name].clear()
            ready = [key for key in spool.waiting() if key not in self._held]
            for key in ready:
                message = spool.get(key)
                if message is None:
                    continue
                if spool.dropped:
                    message["dropped_before"] = spool.dropped
                try:
                    await sink.send(message)
                except (OSError, TimeoutError, ValueError) as e:
                    why = str(e) or type(e).__name__
                    self._tell("alert.undelivered", f"{len(ready)} alerts wait for the sink {name}: {ascii(why)[:120]}")
                    await asyncio.sleep(pause)
                    pause = min(RETRY[1], 2 * pause)
                    break
                spool.done(key)
                spool.dropped, pause = 0, RETRY[0]
            else:
                self._tell("alert.undelivered", None)
                waiting: Awaitable[object] = self._wake[name].wait()
                await waiting

    def flush(self) -> None:
        """At the end: what is still open goes to the spool as it is."""
        for one, name in self._incidents.values():
            if one.told != one.count:
                self.spools[one.alert.sink].put(name if one.told < 0 else self.spools[one.alert.sink].key(one.id), one.message(self.host))
