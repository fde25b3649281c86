"""Flows for the hand-over test, each end a process of its own in a namespace: numbered datagrams, and a TCP stream.

python handover_flows.py udp-send|udp-receive|tcp-send|tcp-receive ADDRESS PORT [RATE]; a sender stops at the end of its
standard input. Every end prints one JSON line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import socket
import sys
import time

SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32  # asm/socket.h: a full buffer of the probe would be no loss of the tunnel
END = 0xFFFFFFFF
CHUNK = 1000
MOST = 100  # numbers at once


def stopped() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def paced(rate: float):
    """Numbers at `rate` a second. A sender that was not run for a while sends less: a burst would overflow any queue."""
    at, n = time.monotonic(), 0
    while not stopped():
        at = max(at, time.monotonic() - MOST / rate)
        while at <= time.monotonic():
            yield n
            n += 1
            at += 1 / rate
        time.sleep(0.001)


def main() -> None:
    what, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rate = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    said: dict[str, object] = {}
    if what == "udp-send":
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
            s.connect((address, port))
            sent = 0
            for n in paced(rate):
                s.send(n.to_bytes(4, "big") + bytes(196))
                sent = n + 1
            time.sleep(1)
            with contextlib.suppress(ConnectionRefusedError):  # it has had one, and is gone
                for _ in range(5):
                    s.send(END.to_bytes(4, "big"))
        said = {"sent": sent}
    elif what == "udp-receive":
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
            s.bind((address, port))
            print("ready", flush=True)
            seen: set[int] = set()
            last = early = twice = 0
            gap, before = 0.0, time.monotonic()
            while (n := int.from_bytes(s.recv(2048)[:4], "big")) != END:
                now = time.monotonic()
                gap, before = max(gap, now - before) if seen else 0.0, now
                twice += n in seen
                early += n < last
                last = max(n, last)
                seen.add(n)
        said = {"seen": len(seen), "reordered": early, "twice": twice, "gap_ms": round(gap * 1000)}
    elif what == "tcp-send":
        digest = hashlib.sha256()
        with socket.create_connection((address, port), 20) as s:
            for n in paced(rate):
                piece = n.to_bytes(4, "big") * (CHUNK // 4)
                s.sendall(piece)
                digest.update(piece)
        said = {"digest": digest.hexdigest()}
    elif what == "tcp-receive":
        digest, size = hashlib.sha256(), 0
        with socket.create_server((address, port), family=family) as server:
            print("ready", flush=True)
            c, _ = server.accept()
            with c:
                while data := c.recv(1 << 16):
                    digest.update(data)
                    size += len(data)
        said = {"digest": digest.hexdigest(), "bytes": size}
    print(json.dumps(said), flush=True)


main()
