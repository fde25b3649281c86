"""The data plane of one endpoint behind one door: device, firewall, links and routes.

    plane = DataPlane(PlaneConfig(...))
    await plane.start()                 # deny rules first; a running engine is adopted, not restarted
    applied = await plane.apply(plan)   # narrow, then tunnels, then widen, then addresses
    await plane.stop(clean=False)       # traffic goes on without the agent
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mesh.devices import Choice, PeerState
from mesh.plan import Changes, Note, Plan
from mesh.snapshot import InstanceKey


@dataclass(frozen=True, slots=True)
class PlaneConfig:
    """private_key: returns the 32 raw bytes of the tunnel key, called only when a device needs them.

    run_dir: engine socket, pid file and log. on_event: called on the loop after the plane repaired itself or lost
    something (see `Event`).
    """

    interface: str
    listen_port: int
    private_key: Callable[[], bytes]
    run_dir: Path
    mtu: int = 1420
    device: Choice = "auto"
    engine: Path | None = None
    on_event: Callable[[Event], None] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened by itself: ``firewall.restored``, ``engine.restarted``, ``netns.gone`` (instance named)."""

    code: str
    text: str
    instance: InstanceKey | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a plan. failed: instances whose place could not be set up (they get nothing), with the reason."""

    changes: Changes
    seconds: float
    failed: Mapping[InstanceKey, str] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Denied:
    """A denied flow, seen lately. port is 0 for protocols without ports."""

    src: str
    dst: str
    proto: int
    port: int
    packets: int


@dataclass(frozen=True, slots=True)
class Counters:
    """peers by tunnel key; verdicts: name -> packets since the table was made; denied: flows of the last minutes."""

    peers: Mapping[str, PeerState]
    verdicts: Mapping[str, int]
    denied: tuple[Denied, ...]
    elements: int


class DataPlane:
    """See the module text. All methods raise RetinueError; none of them widens access when it fails."""

    def __init__(self, config: PlaneConfig) -> None:
        self.config = config

    def describe(self) -> str:
        """Device in use and why, for `status`."""
        ...

    async def start(self) -> None: ...

    async def apply(self, plan: Plan) -> Applied: ...

    async def verify(self) -> tuple[Note, ...]:
        """Compare what is there with the plan last applied, repair it, and say what was repaired."""
        ...

    async def counters(self) -> Counters: ...

    async def stop(self, *, clean: bool) -> None:
        """Let go. `clean` removes the device, the firewall table, links, routes and rules."""
        ...
