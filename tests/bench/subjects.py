"""What is measured: a bare veth, our engine in its modes, the whole product, and the peers found on the PATH or in the environment."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from identity.keys import x25519_public
from tests.bench import nebula
from tests.bench.rig import Pair, run, wait_for

Started = tuple[tuple[str, str], list[int]]
TCP1, TCP4, UDP1300, UDP100, RTT, LOADED_RTT = MEASURES = ("tcp1", "tcp4", "udp1300", "udp100", "rtt", "loaded rtt")
UAPI_DIR = Path("/var/run/wireguard")  # where engines that know no WG_UAPI_DIR put their sockets


@dataclass(frozen=True)
class Subject:
    """One data plane. `start` brings it up on a pair: (addresses to measure between, engine pids); `product`: settings
    for tests.bench.enforced instead. `role` names it in the table of ratios.
    """

    name: str
    version: str
    start: Callable[[Pair], Started] | None = None
    product: tuple[tuple[str, object], ...] | None = None
    role: str = ""
    measures: tuple[str, ...] = MEASURES
    settings: str = ""


def _bare(pair: Pair) -> Started:
    return pair.underlay, []


def _wireguard(program: list[str], uapi: Path | None = None, extra: str = "") -> Callable[[Pair], Started]:
    def start(pair: Pair) -> Started:
        keys = [X25519PrivateKey.generate() for _ in range(2)]
        names = [f"rb{pair.number}{end}{os.getpid() % 100000}" for end in "ab"]
        sockets = [(uapi or UAPI_DIR) / f"{n}.sock" for n in names]
        env = {"WG_PROCESS_FOREGROUND": "1", **({"WG_UAPI_DIR": str(uapi)} if uapi else {})}
        pids = [pair.spawn(end, *program, name, env=env).pid for end, name in enumerate(names)]
        wait_for(program[0], sockets)
        for end, name in enumerate(names):
            far = 1 - end
            uapi_set(sockets[end], "".join((
                f"private_key={keys[end].private_bytes_raw().hex()}\nlisten_port={51900 + end}\nreplace_peers=true\n",
                f"public_key={x25519_public(keys[far]).hex()}\n{extra}",
                f"endpoint={pair.underlay[far]}:{51900 + far}\nreplace_allowed_ips=true\nallowed_ip={pair.tunnel[far]}/32\n",
            )))  # fmt: skip
            pair.at(end, "ip", "address", "add", f"{pair.tunnel[end]}/24", "dev", name)
            pair.at(end, "ip", "link", "set", name, "mtu", "1420", "up")
        pair.at(0, "ping", "-c", "1", "-W", "5", pair.tunnel[1])
        return pair.tunnel, pids

    return start


def uapi_set(path: Path, body: str) -> None:
    """One UAPI set operation; raises RuntimeError on an errno."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(path))
        s.sendall(f"set=1\n{body}\n".encode())
        answer = s.makefile().readline().strip()
    if answer != "errno=0":
        raise RuntimeError(f"{path.name}: {answer}")


def engine_program() -> list[str]:
    """The engine as the product launches it."""
    return [str(Path(sys.executable).with_name("retinue-engine")), "-f"]


def wireguard_go() -> list[tuple[str, str]]:
    """(program, version) of the distribution's on the PATH and of WIREGUARD_GO, where there are such."""
    found = []
    for program in dict.fromkeys(filter(None, (shutil.which("wireguard-go"), shutil.which(os.environ.get("WIREGUARD_GO", "-"))))):
        words = run(program, "--version", check=False).split()
        found.append((program, words[1] if len(words) > 1 else "?"))
    return found


def ours() -> str:
    """Version of our engine."""
    return run(engine_program()[0], "--version", check=False).strip() or "unknown"


def _product(name: str, role: str, measures: tuple[str, ...] = MEASURES, note: str = "", **settings: object) -> Subject:
    place = "the hosts hold the identities" if settings.get("host") else "workload namespaces behind veths"
    words = ", ".join(filter(None, ("agents, signed policy, firewall", place, note)))
    return Subject(name, ours(), product=tuple(settings.items()), role=role, measures=measures, settings=words)


def subjects(only: list[str]) -> list[Subject]:
    """Everything that can be measured on this machine, in a fixed order; `only`: those whose name has one of the words."""
    uapi = Path(tempfile.mkdtemp(prefix="retinue-bench-"))
    atexit.register(shutil.rmtree, uapi, ignore_errors=True)
    engine, low = engine_program(), (TCP1, RTT, LOADED_RTT)
    products: tuple[tuple[str, str, tuple[Any, ...], dict[str, Any]], ...] = (
        ("", "chacha", (), {}),
        (" AES", "aes", (), {"aes": True}),
        (" low-power", "low-power", (low,), {"options": ("low-power",)}),
        (", 10,000 elements", "elements", ((TCP1, UDP1300), "10,000 set elements"), {"elements": 10_000}),
    )
    found = [
        Subject("no tunnel", f"Linux {run('uname', '-r').strip()}", _bare),
        *(_product(f"{name}{what}", f"{role} {which}", *rest, **settings, **where)
          for name, role, where in (("retinue enforced", "enforced", {}), ("retinue enforced host", "host", {"host": True}))
          for what, which, rest, settings in products),
        Subject("retinue bare", ours(), _wireguard(engine, uapi), role="bare chacha"),
        Subject("retinue bare AES", ours(), _wireguard(engine, uapi, "retinue_cipher=aes-256-gcm\n"), role="bare aes"),
        Subject("retinue bare low-power", ours(), _wireguard([*engine, "--low-power"], uapi), role="bare low-power", measures=low),
    ]
    for place, (program, version) in enumerate(wireguard_go()):
        # The first is the distribution's: the floor. A second one is newer.
        newest = place > 0 or not version.removeprefix("v").startswith("0.0.2022")
        found.append(
            Subject(
                f"wireguard-go {version.removeprefix('v')}", f"wireguard-go {version}", _wireguard([program, "-f"]),
                role="wireguard-go" if newest else "wireguard-go floor", measures=MEASURES if newest else (TCP1, UDP1300, RTT),
                settings="7 MB socket buffers of its own" if newest else "",
            )
        )  # fmt: skip
    for pair in nebula.programs():
        version = nebula.version(pair[0])
        floor = version.startswith("1.6")
        said = f"nebula {version}"
        found.append(
            Subject(
                said, said, nebula.start(pair), role="nebula floor" if floor else "nebula",
                measures=(TCP1, UDP1300, RTT) if floor else MEASURES, settings="AES, its default buffers",
            )
        )  # fmt: skip
        if not floor:
            found += [
                Subject(f"{said} tuned", said, nebula.start(pair, tuned=True), role="nebula tuned", measures=(TCP1, TCP4, UDP1300),
                        settings=f"AES, {nebula.TUNED}"),
                Subject(f"{said} ChaCha", said, nebula.start(pair, cipher="chachapoly"), role="nebula chacha", measures=(TCP1, UDP1300),
                        settings="ChaCha20-Poly1305, its default buffers"),
            ]  # fmt: skip
    return [s for s in found if not only or any(word in s.name for word in only)]
