"""A device in memory, with the address rules of WireGuard: for tests of what is built on devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from mesh.devices import DeviceConfig, DeviceState, PeerChange, PeerState, after
from mesh.plan import AES, CHACHA, Cipher


class FakeDevice:
    """See mesh.devices.Device. `fail` is raised by the next `apply`."""

    kind: Literal["userspace", "kernel"] = "userspace"
    ciphers: tuple[Cipher, ...] = (AES, CHACHA)

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config
        self.peers: dict[str, PeerState] = {}
        self.log: list[PeerChange] = []
        self.fail: Exception | None = None
        self.running = False

    async def start(self) -> bool:
        before, self.running = self.running, True
        return before

    async def read(self) -> DeviceState:
        return DeviceState(None, self.config.listen_port, self.config.fwmark, dict(self.peers))

    async def counters(self) -> Mapping[str, PeerState]:
        return dict(self.peers)

    async def apply(self, changes: Iterable[PeerChange]) -> None:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        changes = tuple(changes)
        self.log += changes
        self.peers = after(self.peers, changes)

    async def stop(self, *, clean: bool) -> None:
        self.running = not clean
        if clean:
            self.peers = {}

    def describe(self) -> str:
        return "fake"
