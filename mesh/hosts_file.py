"""The /etc/hosts of a program that `retinue run` starts: the names of the workloads it may know, hosts(5).

Addresses are for life, so a line never becomes wrong; names that appear later are appended, nothing is rewritten.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from identity.errors import BadState
from identity.records import PlacementRecord, unverified
from identity.wire.local import SnapshotReply

ORIGINAL: Final = Path("/etc/hosts")
_LOOPBACK: Final = "localhost"  # RFC 6761 section 6.3: never anything but loopback


def host_names(workload: str, trust_domain: str) -> tuple[str, ...]:
    """What a workload is called: ``api`` -> api, api.TRUST_DOMAIN; ``shop/api`` -> api.shop, api.shop.TRUST_DOMAIN."""
    short = ".".join(reversed(workload.split("/")))
    if short.rpartition(".")[2] == _LOOPBACK:
        return (f"{short}.{trust_domain}",)
    return short, f"{short}.{trust_domain}"


def lines(reply: SnapshotReply) -> list[str]:
    """One line an address of every active placement, by name and instance. Raises NotVerified when it cannot be read.

    Signatures were checked by the agent of this machine, which is the only one that can answer on its socket.
    """
    records = [
        unverified(PlacementRecord, envelope, trust_domain=reply.trust_domain)
        for key, envelope in reply.objects.items()
        if key.startswith("placement/")
    ]
    active = sorted((r for r in records if r.state == "active"), key=lambda r: (r.name, r.instance))
    return [f"{address} {' '.join(host_names(r.name, r.trust_domain))}" for r in active for address in r.addresses]


def write(path: Path, found: list[str], original: Path = ORIGINAL) -> None:
    """Make the file: names of the mesh first, so that they win over the machine's own, then its lines. Raises BadState."""
    try:
        own = original.read_bytes() if original.exists() else b""
        head = "".join(f"{line}\n" for line in ("# names of the mesh", *found, f"# {original} of this machine"))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(head.encode() + own + (b"" if own.endswith(b"\n") else b"\n"))
        path.chmod(0o644)  # the directory is private; the program may have another user
    except OSError as e:
        raise BadState("run.hosts_file", f"cannot write {path}: {e.strerror}") from None


def append(path: Path, found: list[str]) -> None:
    """Add the lines that are not there yet, in one write and in place: the file is mounted."""
    known = set(path.read_bytes().decode("utf-8", "surrogateescape").splitlines())
    new = [line for line in found if line not in known]
    if new:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, "".join(f"{line}\n" for line in new).encode())
        finally:
            os.close(fd)
