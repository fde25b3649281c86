"""Keys of the running engine: out of reach of other users, out of dumps, and gone from memory when their peer is."""

from __future__ import annotations

import base64
import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tests.netns.engine_rig import OURS, THEIRS, UAPI, End, ours_set, run, two_ends, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

READ_MEMORY = """
import os, sys
os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    try:
        open(path, "rb").read(1)
    except PermissionError:
        continue
    sys.exit(f"{path} can be read")
"""


def unb64(text: str) -> bytes:
    return base64.b64decode(text)


def pid_of(end: End) -> int:
    """The engine itself; `ip netns exec` becomes it."""
    return end.process.pid


def found_in_memory(pid: int, *needles: bytes) -> list[int]:
    """How often each of these is in the writable memory of a process."""
    counts = [0] * len(needles)
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, mode, *_ = line.split()
            if not mode.startswith("rw"):
                continue
            start, end = (int(x, 16) for x in where.split("-"))
            with contextlib.suppress(OSError):
                memory.seek(start)
                data = memory.read(end - start)
                for i, needle in enumerate(needles):
                    counts[i] += data.count(needle)
    return counts


def forms(key: bytes) -> tuple[bytes, bytes]:
    return key, key.hex().encode()


def test_no_other_user_reads_its_memory_and_it_dumps_no_core(tmp_path: Path) -> None:
    with two_ends(OURS, THEIRS, tmp_path, outer=4) as (a, _):
        proc = f"/proc/{pid_of(a)}"
        done = subprocess.run(
            [sys.executable, "-c", READ_MEMORY, f"{proc}/mem", f"{proc}/environ", f"{proc}/maps", str(UAPI / f"{a.interface}.sock")],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # Not dumpable: its files belong to root whoever it runs as, and nobody but root may trace it.
        limits = Path(f"{proc}/limits").read_text()
        assert "Max core file size        0                    0" in limits
        assert resource.prlimit(pid_of(a), resource.RLIMIT_CORE) == (0, 0)


def test_keys_are_gone_from_memory_when_their_peer_is(tmp_path: Path) -> None:
    """Looked for as root, raw and in hex: preshared key, and the secret shared by both static keys."""
    with two_ends(OURS, OURS, tmp_path, outer=4, psk=True) as (a, b):
        for n in (0, 1):
            a.ping(b.tunnel[n])
        psk = unb64(a.show("preshared-keys")[b.public][0])
        private = unb64(a.private)
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(unb64(b.public)))
        pid = pid_of(a)
        assert all(found_in_memory(pid, psk, private, shared)), "the control: while they are used they are there"
        a.wg("peer", b.public, "remove")
        left: list[int] = []

        def gone() -> bool:
            left[:] = found_in_memory(pid, *forms(psk), *forms(shared))
            return not any(left)

        # The control thread may be about to clean up after its last handshake.
        until(gone, "keys of a removed peer are still in memory", 5)
        # The device's own key goes with its replacement.
        run("wg", "set", a.interface, "private-key", str(secret_file(tmp_path)))

        def own_gone() -> bool:
            left[:] = found_in_memory(pid, *forms(private))
            return not any(left)

        until(own_gone, "the old private key is still in memory", 5)


def secret_file(tmp: Path) -> Path:
    path = tmp / "another"
    path.write_text(run("wg", "genkey"))
    return path


def test_nothing_secret_is_in_what_it_prints(tmp_path: Path) -> None:
    with two_ends(OURS, OURS, tmp_path, outer=4, psk=True, env=({"LOG_LEVEL": "verbose"}, {})) as (a, b):
        a.ping(b.tunnel[0])
        ours_set(a, f"public_key={unb64(b.public).hex()}", "retinue_cipher=aes-256-gcm")
        psk = a.show("preshared-keys")[b.public][0]
        shown = run("wg", "show", a.interface)
        command = Path(f"/proc/{pid_of(a)}/cmdline").read_text()
        for text in (shown, command):
            assert psk not in text
            assert a.private not in text
