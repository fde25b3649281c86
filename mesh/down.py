"""`retinue down`: end the agent and its data plane, also when the agent is already gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

from identity.errors import TimedOut, Unreachable
from mesh.local_client import LocalClient

WAIT = 15.0  # seconds for the agent to end


async def take_down(socket: Path, state_dir: Path, interface: str, *, clean: bool) -> str:
    """Returns what was done, in words. Raises what the agent answered, TimedOut, or Unreachable when nothing runs."""
    try:
        async with LocalClient(socket) as agent:
            await agent.down(clean=clean)
    except Unreachable:
        if not clean:
            raise
        return await _clean_alone(socket, state_dir, interface)
    try:
        async with asyncio.timeout(WAIT):
            while socket.exists():  # noqa: ASYNC110 -- a file of another process has no event
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise TimedOut("agent.timeout", f"the agent was told to end but has not within {WAIT:g} s") from None
    return (
        "the agent ended and took its data plane down" if clean else "the agent ended; tunnels and rules stay"
    )


async def _clean_alone(socket: Path, state_dir: Path, interface: str) -> str:
    """No agent runs: take away what the last one left."""
    from mesh.dataplane import DataPlane, PlaneConfig
    from mesh.state import StateDir

    state = StateDir(state_dir)
    if state_dir.exists():
        state.open()  # nobody starts an agent meanwhile
    try:
        plane = DataPlane(PlaneConfig(interface=interface, listen_port=0, private_key=bytes, run_dir=socket.parent))
        await plane.stop(clean=True)
        socket.unlink(missing_ok=True)
    finally:
        state.close()
    return "no agent was running; its data plane is taken down"
