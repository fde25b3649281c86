"""nebula as a subject: a CA and two certificates made with its own tool, one UDP socket a host, everything allowed by its firewall."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.rig import Pair, run, wait_for

TUNED = "tx_queue 5000, 10 MB socket buffers"
_CONFIG = """\
pki: {{ca: {d}/ca.crt, cert: {d}/{me}.crt, key: {d}/{me}.key}}
static_host_map: {{"{far}": ["{underlay}:4242"]}}
lighthouse: {{am_lighthouse: false, hosts: []}}
listen: {{host: 0.0.0.0, port: 4242{buffers}}}
punchy: {{punch: false}}
cipher: {cipher}
tun: {{dev: {dev}, mtu: 1420, tx_queue: {queue}}}
logging: {{level: warning, format: text}}
firewall:
  outbound: [{{port: any, proto: any, host: any}}]
  inbound: [{{port: any, proto: any, host: any}}]
"""


def programs() -> list[tuple[str, str]]:
    """(nebula, nebula-cert) on the PATH and from NEBULA, NEBULA_CERT; what is there."""
    found = []
    for nebula, cert in (("nebula", "nebula-cert"), (os.environ.get("NEBULA"), os.environ.get("NEBULA_CERT"))):
        if nebula and cert and (a := shutil.which(nebula)) and (b := shutil.which(cert)):
            found.append((a, b))
    return list(dict.fromkeys(found))


def version(program: str) -> str:
    """``1.6.1`` or what the build calls itself."""
    return run(program, "-version", check=False).strip().removeprefix("Version: ") or "unknown"


def start(programs: tuple[str, str], *, tuned: bool = False, cipher: str = "aes") -> Callable[[Pair], tuple[tuple[str, str], list[int]]]:
    """Starter of a pair; addresses and process ids as the other subjects return them."""
    program, cert = programs

    def up(pair: Pair) -> tuple[tuple[str, str], list[int]]:
        d = tempfile.mkdtemp(prefix="retinue-bench-nebula-")
        pair.leftovers.append(Path(d))
        run(cert, "ca", "-name", "bench", "-out-crt", f"{d}/ca.crt", "-out-key", f"{d}/ca.key")
        pids = []
        for end, me in enumerate("ab"):
            run(cert, "sign", "-ca-crt", f"{d}/ca.crt", "-ca-key", f"{d}/ca.key", "-name", me, "-ip", f"{pair.tunnel[end]}/24",
                "-out-crt", f"{d}/{me}.crt", "-out-key", f"{d}/{me}.key")  # fmt: skip
            text = _CONFIG.format(
                d=d, me=me, far=pair.tunnel[1 - end], underlay=pair.underlay[1 - end], cipher=cipher, dev=f"nb{pair.number}",
                queue=5000 if tuned else 500, buffers=", read_buffer: 10485760, write_buffer: 10485760" if tuned else "",
            )  # fmt: skip
            Path(d, f"{me}.yaml").write_text(text)
            pids.append(pair.spawn(end, program, "-config", f"{d}/{me}.yaml", log=Path(d, f"{me}.log")).pid)
        wait_for("nebula", [], ready=lambda: all(pair.tunnel[e] in pair.at(e, "ip", "-br", "address") for e in (0, 1)))
        pair.at(0, "ping", "-c", "3", "-i", "0.3", "-W", "5", pair.tunnel[1])
        return pair.tunnel, pids

    return up
