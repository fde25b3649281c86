"""What is measured: a bare veth, our engine in its modes, and the peers found on the PATH."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from identity.keys import x25519_public
from tests.bench.rig import Pair, run, wait_for


@dataclass(frozen=True)
class Subject:
    """One data plane: `start` brings it up on a pair and returns (addresses to measure between, engine pids)."""

    name: str
    version: str
    start: Callable[[Pair], tuple[tuple[str, str], list[int]]] = lambda _: (("", ""), [])


def _bare(pair: Pair) -> tuple[tuple[str, str], list[int]]:
    return pair.underlay, []


def _wireguard(program: list[str], uapi: Path | None, env: dict[str, str], extra: str = "") -> Callable[[Pair], tuple[tuple[str, str], list[int]]]:
    def start(pair: Pair) -> tuple[tuple[str, str], list[int]]:
        keys = [X25519PrivateKey.generate() for _ in range(2)]
        directory = uapi or Path("/var/run/wireguard")
        names = [f"rb{pair.number}{end}{os.getpid() % 10000}" for end in "ab"]
        pids = []
        for end, name in enumerate(names):
            process = pair.spawn(end, *program, name, env={**env, **({"WG_UAPI_DIR": str(uapi)} if uapi else {})})
            pids.append(process.pid)
        wait_for(program[0], [directory / f"{n}.sock" for n in names])
        for end, name in enumerate(names):
            far = 1 - end
            uapi_set(directory / f"{name}.sock", "".join((
                f"private_key={_hex(keys[end])}\nlisten_port={51900 + end}\nreplace_peers=true\n",
                f"public_key={x25519_public(keys[far]).hex()}\n{extra}",
                f"endpoint={pair.underlay[far]}:{51900 + far}\nreplace_allowed_ips=true\nallowed_ip={pair.tunnel[far]}/32\n",
            )))  # fmt: skip
            pair.at(end, "ip", "address", "add", f"{pair.tunnel[end]}/24", "dev", name)
            pair.at(end, "ip", "link", "set", name, "mtu", "1420", "up")
        pair.at(0, "ping", "-c", "1", "-W", "5", pair.tunnel[1])
        return pair.tunnel, pids

    return start


def _hex(key: X25519PrivateKey) -> str:
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()


def uapi_set(path: Path, body: str) -> None:
    """One UAPI set operation; raises RuntimeError on an errno."""
    import socket

    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(path))
        s.sendall(f"set=1\n{body}\n".encode())
        answer = s.makefile().readline().strip()
    if answer != "errno=0":
        raise RuntimeError(f"{path.name}: {answer}")


def engine_program() -> list[str]:
    """The engine as the product launches it."""
    return [str(Path(sys.executable).with_name("retinue-engine")), "--foreground"]


def subjects(only: list[str]) -> list[Subject]:
    """Everything that can be measured on this machine, in a fixed order."""
    uapi = Path(tempfile.mkdtemp(prefix="retinue-bench-"))
    kernel = run("uname", "-r").strip()
    ours = run(engine_program()[0], "--version", check=False).strip() or "unknown"
    found = [
        Subject("no tunnel", f"Linux {kernel}", _bare),
        Subject("retinue", ours, _wireguard(engine_program(), uapi, {})),
        Subject("retinue low-power", ours, _wireguard([*engine_program(), "--low-power"], uapi, {})),
        Subject("retinue AES", ours, _wireguard(engine_program(), uapi, {}, "retinue_cipher=aes-256-gcm\n")),
    ]
    for program in dict.fromkeys(filter(None, (shutil.which("wireguard-go"), os.environ.get("WIREGUARD_GO")))):
        version = run(program, "--version", check=False).split("\n")[0].strip()
        env = {"WG_PROCESS_FOREGROUND": "1"}
        found.append(Subject(f"wireguard-go {version.split()[-1] if version else '?'}", version, _wireguard([program, "-f"], None, env)))
    return [s for s in found if not only or any(word in s.name for word in only)]
