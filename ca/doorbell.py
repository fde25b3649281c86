"""The doorbell between CA processes on one PostgreSQL database: "look at the change log", and nothing more.

NOTIFY is sent outside of every transaction of the registry, at most RINGS times a second a process, without payload; a
commit with a NOTIFY in it would wait for every other one. A bell that is lost costs one poll interval, never a change.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Final

import structlog

from ca import postgres

log = structlog.get_logger("retinue.ca")

CHANNEL: Final = "retinue"
RINGS: Final = 20.0
POLL_S: Final = 1.0  # the change log is looked at this often without any bell
RETRY_S: Final = 1.0


class Doorbell:
    """Two threads with a connection each: one rings, one listens and calls `heard` (from its own thread)."""

    def __init__(self, address: str, heard: Callable[[], None]) -> None:
        self._address = postgres.parse(address).set(drivername="postgresql").render_as_string(hide_password=False)
        self._heard = heard
        self._ring, self._stop = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"retinue-{name}", daemon=True)
            for name, work in (("bell", self._ringing), ("ear", self._listening))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def ring(self) -> None:
        """Something was committed. Returns at once; many rings are one."""
        self._ring.set()

    def stop(self) -> None:
        """End both threads; waits for neither longer than a poll takes."""
        self._stop.set()
        self._ring.set()
        for thread in self._threads:
            thread.join(2 * POLL_S)

    def _run(self, work: Callable[[Any], None]) -> None:
        import psycopg

        while not self._stop.is_set():
            try:
                with psycopg.connect(self._address, autocommit=True, **postgres.connect_arguments()) as connection:
                    work(connection)
            except psycopg.Error as e:
                log.warning("the doorbell is away; the change log is polled", why=str(e).splitlines()[0][:120])
                self._stop.wait(RETRY_S)

    def _ringing(self, connection: Any) -> None:
        while not self._stop.is_set():
            if self._ring.wait(POLL_S) and not self._stop.is_set():
                self._ring.clear()
                connection.execute(f"NOTIFY {CHANNEL}")
                self._stop.wait(1 / RINGS)

    def _listening(self, connection: Any) -> None:
        connection.execute(f"LISTEN {CHANNEL}")
        while not self._stop.is_set():
            for _ in connection.notifies(timeout=POLL_S, stop_after=1):
                with contextlib.suppress(RuntimeError):  # the loop it wakes is closed already
                    self._heard()
