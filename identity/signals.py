"""Signals that end a daemon, or have it look again. Here and not in a daemon's room, because the daemons of all rooms do it.

asyncio has a signal's number written into the pipe that wakes its loop, and the number is lost when that is full: a server
with thousands of results on their way to its loop would not hear that it shall end.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import Any, Protocol


class Loop(Protocol):
    """Of asyncio's event loop what is needed here."""

    def add_signal_handler(self, sig: int, callback: Callable[..., object]) -> None: ...

    def call_soon_threadsafe(self, callback: Callable[..., object]) -> Any: ...


def heed(loop: Loop, numbers: Iterable[int], act: Callable[[], object]) -> None:
    """Call `act` on the loop at each of these signals, perhaps twice. In the main thread only.

    The pipe wakes the loop whichever thread the kernel interrupts; the interpreter's own handler, which needs no room in
    it, runs once the loop is awake.
    """
    for number in numbers:
        loop.add_signal_handler(number, act)
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(act))
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
