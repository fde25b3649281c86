"""Runs one real data plane in the namespace it is started in; commands come as lines on stdin, answers go to stdout.

    start | apply <b64 pickled Plan> | counters | verify | stop | clean | events
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import pickle
import sys
from pathlib import Path

from identity.errors import RetinueError
from mesh import netns
from mesh.dataplane import DataPlane, PlaneConfig


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--interface", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--device", default="userspace")
    parser.add_argument("--old-kernel", action="store_true", help="hide the setting that kernels before 6.17 do not have")
    args = parser.parse_args()
    if args.old_kernel:
        real = netns.sysctl
        netns.sysctl = lambda name, value=None: None if "force_forwarding" in name else real(name, value)
    events: list[str] = []
    plane = DataPlane(PlaneConfig(
        interface=args.interface, listen_port=args.port, private_key=args.key.read_bytes, run_dir=args.run_dir,
        engine=args.engine, device=args.device, on_event=lambda e: events.append(f"{e.code} {e.instance or ''}".strip()),
    ))  # fmt: skip
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        verb, _, rest = line.decode().strip().partition(" ")
        try:
            answer: object = None
            if verb == "start":
                await plane.start()
                answer = plane.describe()
            elif verb == "apply":
                applied = await plane.apply(pickle.loads(base64.b64decode(rest)))
                answer = {"failed": dict(applied.failed), "seconds": applied.seconds, "changes": applied.changes.summary()}
            elif verb == "counters":
                counters = await plane.counters()
                answer = {
                    "verdicts": dict(counters.verdicts),
                    "denied": [[d.src, d.dst, d.proto, d.port, d.packets] for d in counters.denied],
                    "handshakes": {k: p.latest_handshake for k, p in counters.peers.items()},
                    "allowed": {k: sorted(p.allowed_ips) for k, p in counters.peers.items()},
                }
            elif verb == "verify":
                answer = [n.code for n in await plane.verify()]
            elif verb == "events":
                answer = list(events)
            elif verb in {"stop", "clean"}:
                await plane.stop(clean=verb == "clean")
            print(json.dumps({"ok": answer}), flush=True)
        except RetinueError as e:
            print(json.dumps({"error": e.code, "message": e.message}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
