"""A tunnel between the guest's kernel and our engine on which the kernel initiates, watched on the outer wire.

It has a device of its own at either end and is left alone for REKEY_AFTER_TIME (whitepaper 6.1) while other tests run.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh import netns
from mesh.capture import udp_payload
from tests.kernel.machine import Command, Machine

ENGINE: Final = Path(sys.executable).with_name("retinue-engine")
UAPI: Final = Path("/var/run/wireguard")
ETH_P_ALL: Final = 0x0003  # linux/if_ether.h
PORT: Final = 51830  # of the outer packets, both ends
HERE: Final = ("10.95.0.1", "fd95::1")  # of our engine, inside the tunnel
THERE: Final = ("10.95.0.2", "fd95::2")  # of the kernel
PROBES: Final = 680  # of each family, five a second: longer than the 120 s by a good margin
PATIENCE: Final = 30.0  # seconds for what should come at once
INITIATION, RESPONSE = 1, 2
SIZES: Final = {INITIATION: 148, RESPONSE: 92}  # whitepaper 5.4.2, 5.4.3


@dataclass(frozen=True, slots=True)
class Handshake:
    """A handshake message on the wire; `at` is CLOCK_MONOTONIC seconds of this machine."""

    at: float
    sender: str  # kernel or engine
    kind: int  # INITIATION or RESPONSE


@dataclass(frozen=True, slots=True)
class Pings:
    """What `ping` in the guest says at its end."""

    sent: int
    received: int


def handshake(frame: bytes, outgoing: bool, at: float) -> Handshake | None:
    """The handshake message of our tunnel in a frame of the guest's link, None for anything else."""
    payload = udp_payload(frame)
    if payload is None or len(payload) < 4 or payload[1:4] != b"\0\0\0" or SIZES.get(payload[0]) != len(payload):
        return None
    ports = frame[len(frame) - len(payload) - 8 :][:4]
    if int.from_bytes(ports[:2], "big") != PORT or int.from_bytes(ports[2:], "big") != PORT:
        return None
    return Handshake(at, "engine" if outgoing else "kernel", payload[0])


class Wire:
    """Reads the handshake messages of the tunnel on the guest's link until closed."""

    def __init__(self, machine: Machine) -> None:
        self.seen: list[Handshake] = []
        self.dropped = 0
        self._socket = netns.inside(machine.ns, self._open)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @staticmethod
    def _open() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        made.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        made.bind(("tap0", ETH_P_ALL))
        made.settimeout(0.2)
        return made

    def _read(self) -> None:
        while not self._closed.is_set():
            try:
                frame, address = self._socket.recvfrom(65536)
            except TimeoutError:
                continue
            found = handshake(frame, address[2] == socket.PACKET_OUTGOING, time.monotonic())
            if found is not None:
                self.seen.append(found)

    def close(self) -> None:
        """Stop reading; `dropped` then says how many frames the reader missed."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(5)
        statistics = self._socket.getsockopt(263, 6, 8)  # SOL_PACKET, PACKET_STATISTICS: packets, drops
        self.dropped = int.from_bytes(statistics[4:], sys.byteorder)
        self._socket.close()


class Rekey:
    """The tunnel and its probes, started at once; `kernel_first` False lets our engine make the first keys instead."""

    def __init__(self, machine: Machine, *, tag: str, kernel_first: bool = True) -> None:
        self.machine = machine
        self.here, self.there = f"rk{tag}", "wg1"
        self._engine: subprocess.Popen[bytes] | None = None
        self.wire = Wire(machine)
        self.pings: list[Command] = []
        try:
            self._build()
            self._meet(kernel_first)
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        machine = self.machine
        argv = ["ip", "netns", "exec", machine.ns, str(ENGINE), "--foreground", self.here]
        self._engine = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while not (UAPI / f"{self.here}.sock").exists():
            assert time.monotonic() < deadline, "our engine did not come up"
            time.sleep(0.1)
        machine.run("ip", "link", "add", self.there, "type", "wireguard")
        keys = [subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout for _ in range(2)]
        public = [subprocess.run(["wg", "pubkey"], check=True, capture_output=True, text=True, input=k).stdout.strip() for k in keys]
        ends = (
            (machine.sh, self.here, keys[0], public[1], THERE, machine.there),
            (machine.run, self.there, keys[1], public[0], HERE, machine.here),
        )
        for (sh, name, private, peer, inside, outside), addresses in zip(ends, (HERE, THERE), strict=True):
            sh("wg", "set", name, "listen-port", str(PORT), "private-key", "/dev/stdin", "peer", peer,
               "endpoint", f"{outside[0]}:{PORT}", "allowed-ips", ",".join(inside), stdin=private)  # fmt: skip
            sh("ip", "address", "add", f"{addresses[0]}/24", "dev", name)
            sh("ip", "address", "add", f"{addresses[1]}/64", "dev", name, "nodad")
            sh("ip", "link", "set", name, "mtu", "1420", "up")

    def _meet(self, kernel_first: bool) -> None:
        """The first keys; then the kernel sends probes over both families, which our end only answers."""
        if kernel_first:
            self.machine.run("ping", "-c", "1", "-W", str(int(PATIENCE)), HERE[0])
        else:
            self.machine.sh("ping", "-c", "1", "-W", str(int(PATIENCE)), THERE[0])
        self.first = self.latest()
        self.pings = [self.machine.start("ping", "-q", "-i", "0.2", "-c", str(PROBES), "-W", "10", address) for address in HERE]

    def latest(self) -> tuple[int, int]:
        """Time of the latest handshake as (our engine, the kernel) tell it, seconds since the epoch."""
        shown = (self.machine.sh("wg", "show", self.here, "latest-handshakes"), self.machine.run("wg", "show", self.there, "latest-handshakes"))
        ours, kernels = (int(text.split()[-1]) for text in shown)
        return ours, kernels

    def results(self) -> list[Pings]:
        """Wait for the probes' end: what became of them, by family."""
        found = []
        for command in self.pings:
            command.wait()
            said = re.search(r"(\d+) packets transmitted, (\d+) received", "\n".join(command.lines))
            assert said, command.err
            found.append(Pings(int(said[1]), int(said[2])))
        return found

    def close(self) -> None:
        self.wire.close()
        for command in self.pings:
            command.hang_up()
        if self._engine is not None:
            self._engine.terminate()
            try:
                self._engine.wait(5)
            except subprocess.TimeoutExpired:
                self._engine.kill()
                self._engine.wait()
        self.machine.try_("ip", "link", "del", self.there)
