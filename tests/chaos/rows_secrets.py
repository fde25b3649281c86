"""Row F30: secrets are planted everywhere the product keeps them, and every byte it says or writes elsewhere is searched."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from identity.enrollment import JoinToken
from identity.errors import RetinueError
from identity.keys import private_pem
from identity.support import Redactor
from mesh.lab_process import ProcessFailed
from mesh.support import secrets_of
from tests.chaos.registry import Run, row
from tests.chaos.stage import Stage

KEEPERS: Final = (".key",)  # files that are there to hold a secret


def said(stage: Stage) -> Iterator[tuple[str, bytes]]:
    """Everything that is not a place for secrets: logs, run directories, databases, records, and what /proc shows of us."""
    for path in sorted(stage.lab.dir.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix not in KEEPERS and "planted" not in path.name and "flow-" not in path.name:
            with contextlib.suppress(OSError):
                yield str(path.relative_to(stage.lab.dir)), path.read_bytes()
    for name, process in stage.lab.processes.items():
        for file in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                yield f"{name}/{file}", Path(f"/proc/{process.pid}/{file}").read_bytes()


def cores(stage: Stage) -> list[str]:
    """Core files that a process of ours may have left where it ran."""
    return [str(p) for d in (stage.lab.dir, Path.cwd()) for p in d.glob("core*") if p.is_file()]


@row("F30", "Key leak in logs, core, support bundle", "canary keys and tokens, every log level: 0 hits; no core dump", fast=True)
async def leaks(stage: Stage, run: Run) -> None:
    lab, host = stage.lab, "host-a"
    before = set(cores(stage))
    stage.agent(host).kill()
    await asyncio.to_thread(lab.start_agent, host, args=[*stage.agent_args, "--log-level", "debug"])
    planted: list[bytes] = []
    token = lab.ca("token", "create", "--host", f"late{run.seed}-{int(time.time()) % 10000}")["token"]
    planted.append(JoinToken.parse(token).secret)
    # An enrolment that fails with a good token, one with a bent one, and a token as a stray argument: what do errors repeat?
    for text in (token, token[:-3] + "000", token[:60]):
        with contextlib.suppress(RetinueError):
            lab.retinue("host-b", "enroll", "--ca", lab.ca_url, "--token-file", "-", "--state-dir", str(lab.nodes["host-b"].state_dir), stdin=text)
    svid = lab.dir / f"svid-{run.seed}-{int(time.time()) % 10000}"
    svid.mkdir()
    lab.retinue(host, "svid", "fetch", "web", "--dir", str(svid))
    (svid / "key.pem").rename(svid / "workload.key")
    admin = lab.dir / f"admin-{run.seed}-{int(time.time()) % 10000}"
    with contextlib.suppress(ProcessFailed):
        lab.ca("admin", "request", "--out", str(admin))
    psk = os.urandom(32)
    planted.append(psk)
    for directory in (lab.ca_dir, svid, admin, *(lab.nodes[h].state_dir for h in stage.hosts)):
        planted += secrets_of(directory)
    searcher = Redactor(planted)
    stray = private_pem(X25519PrivateKey.generate())
    logs = lab.dir / "planted.log"
    logs.write_text(f"token {token}\npreshared_key={psk.hex()}\n{stray.decode()}\n{(lab.nodes[host].state_dir / 'tunnel.key').read_text()}\nlast line\n")
    # A crash of each kind of process: no core may be written.
    os.kill(stage.engine_pid(host), signal.SIGABRT)
    stage.agent(host).send(signal.SIGABRT)
    await asyncio.to_thread(stage.agent(host).wait)
    await stage.restart_agent(host)
    await stage.flowing("web-api")
    out = lab.dir / f"support-{run.seed}-{int(time.time()) % 10000}.tar.gz"
    more = [word for p in (logs, *sorted((lab.dir / "logs").iterdir())) for word in ("--log", str(p))]
    done = lab.retinue(host, "support", "--out", str(out), "--state-dir", str(lab.nodes[host].state_dir), *more)
    with tarfile.open(fileobj=io.BytesIO(out.read_bytes())) as archive:
        bundled = {m.name: (archive.extractfile(m) or io.BytesIO()).read() for m in archive.getmembers()}
    out.unlink()
    hits = [name for name, data in bundled.items() if searcher.holds(data) or stray.splitlines()[1] in data]
    leaked, bytes_read = [], 0
    for name, data in said(stage):
        bytes_read += len(data)
        if searcher.holds(data):
            leaked.append(name)
    status = json.loads(next(d for n, d in bundled.items() if n.endswith("status.json")))
    run.note(secrets=len(planted), bundle_files=len(bundled), bundle_hits=len(hits), searched_mib=bytes_read / 2**20, hits=len(leaked),
             cores=len(set(cores(stage)) - before))  # fmt: skip
    run.check(f"0 in the support bundle {hits[:2] or ''}".strip(), not hits)
    run.check(f"0 in logs, databases, run files, arguments, environments {leaked[:3] or ''}".strip(), not leaked)
    run.check("no core dump", not set(cores(stage)) - before)
    run.check("control: the searcher finds them where they are", searcher.holds(logs.read_bytes()) and len(planted) > 20)
    run.check("control: the bundle holds the agent's status and the end of the log", status["endpoint"] == host and any(
        b"last line" in d for n, d in bundled.items() if "planted" in n) and len(done["members"]) == len(bundled))  # fmt: skip
    logs.unlink()
