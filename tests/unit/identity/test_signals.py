"""A signal is heard, also while the pipe that wakes the loop is full."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from identity.signals import heed


@pytest.fixture
async def restored():
    before = signal.getsignal(signal.SIGUSR1)
    yield
    asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def fill() -> None:
    """Wake the loop more often than its pipe can hold."""
    for _ in range(10_000):
        asyncio.get_running_loop().call_soon_threadsafe(lambda: None)


async def heard(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("full", [False, True])
async def test_it_is_heard(restored, full: bool) -> None:
    event = asyncio.Event()
    heed(asyncio.get_running_loop(), [signal.SIGUSR1], event.set)
    if full:
        fill()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert await heard(event, 10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_asyncio_alone_loses_it(restored) -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, event.set)
    fill()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not await heard(event, 0.5)
