"""Which transport ciphers an endpoint may promise in its record.

AES-256-GCM is our engine's extension, and faster than ChaCha20-Poly1305 only where the CPU has the vector AES
instructions. A record that promises what the device cannot do gives no session (the choice is mixed into the handshake),
so an agent whose device does less than its record says has the record renewed before anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from identity.wire.enroll import Cipher
from mesh.devices import Device
from mesh.plan import AES, CHACHA

FASTER: Final = frozenset({"aes", "vaes"})  # names in /proc/cpuinfo


def fast_aes(cpuinfo: str) -> bool:
    """Does the text of /proc/cpuinfo name the instructions that make AES-GCM the faster one?"""
    flags = next((line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return set(flags) >= FASTER


async def offers() -> list[Cipher]:
    """What to promise at enrolment: AES too, unless the kernel's WireGuard will be used or the CPU is slow at it."""
    from mesh.devices.kernel import probe

    try:
        fast = fast_aes(Path("/proc/cpuinfo").read_text())
    except OSError:
        fast = False
    return [AES, CHACHA] if fast and await probe() else [CHACHA]


def broken(promised: list[Cipher], device: Device) -> list[Cipher] | None:
    """The ciphers to promise instead, when the device cannot do all that is promised; else None."""
    kept = [cipher for cipher in promised if cipher in device.ciphers]
    return kept if len(kept) < len(promised) else None
