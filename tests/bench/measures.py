"""The measurements: each takes a running pair and returns rows of (measure, value, unit)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.rig import Pair, rss_kib, system_cpu_seconds

Row = tuple[str, float, str]

ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 7007)); print("ready", flush=True)
while True:
    data, peer = s.recvfrom(2048); s.sendto(data, peer)
"""
PING = """
import socket, sys, time, json
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1); s.connect((sys.argv[1], 7007))
out, end = [], time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    t = time.perf_counter_ns(); s.send(b"x" * 64)
    try: s.recv(2048)
    except TimeoutError: continue
    out.append((time.perf_counter_ns() - t) / 1000)
    time.sleep(0.002)
print(json.dumps(out))
"""


def _iperf(pair: Pair, target: str, seconds: float, *options: str) -> dict[str, object]:
    server = pair.spawn(1, "iperf3", "-s", "-1", "-B", target)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and ":5201" not in pair.at(1, "ss", "-lnt"):
        time.sleep(0.05)
    text = pair.at(0, "iperf3", "-J", "-c", target, "-t", str(seconds), *options, check=False, timeout=seconds + 30)
    server.wait(15)
    pair.processes.remove(server)
    answer: dict[str, object] = json.loads(text)
    if "error" in answer:
        raise RuntimeError(f"iperf3: {answer['error']}")
    return answer


def tcp(pair: Pair, target: str, pids: list[int], seconds: float, streams: int) -> list[Row]:
    """Throughput, and for one stream the CPU of the whole machine per gigabyte and the engines' memory under load."""
    busy = system_cpu_seconds()
    end = _iperf(pair, target, seconds, "-P", str(streams), "-O", "1")["end"]
    busy = system_cpu_seconds() - busy
    received = end["sum_received"]  # type: ignore[index]  # iperf3's JSON
    rows = [(f"TCP {streams} stream{'s' * (streams > 1)}", received["bits_per_second"] / 1e9, "Gb/s")]
    if streams == 1:
        carried = received["bytes"] * (seconds + 1) / seconds  # the omitted second was carried too
        rows.append(("CPU per GB", busy / (carried / 1e9), "s/GB"))
        rows += [("RSS loaded", max(rss_kib(_engine(p)) for p in pids) / 1024, "MiB")] if pids else []
    return rows


def udp(pair: Pair, target: str, seconds: float, size: int) -> list[Row]:
    """Delivered datagrams a second when the sender offers as many as it can."""
    end = _iperf(pair, target, seconds, "-u", "-b", "0", "-l", str(size))["end"]
    total = end["sum"]  # type: ignore[index]  # iperf3's JSON
    delivered = (total["packets"] - total["lost_packets"]) / total["seconds"]
    return [(f"UDP {size} B delivered", delivered / 1000, "kpps")]


def rtt(pair: Pair, target: str, seconds: float) -> list[Row]:
    """Round trips of 64-byte datagrams, one at a time with pauses, microseconds."""
    server = pair.spawn(1, sys.executable, "-c", ECHO, target)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and ":7007" not in pair.at(1, "ss", "-lnu"):
        time.sleep(0.05)
    try:
        times = json.loads(pair.at(0, sys.executable, "-c", PING, target, str(seconds), timeout=seconds + 30))
    finally:
        server.terminate()
        server.wait()
        pair.processes.remove(server)
    if len(times) < 20:
        raise RuntimeError(f"only {len(times)} round trips")
    cut = statistics.quantiles(times, n=100)
    return [("RTT p50", cut[49], "us"), ("RTT p99", cut[98], "us")]


def _engine(pid: int) -> int:
    """The process that does the work: `ip netns exec` replaces itself, so it is the pid itself unless it has a child."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def measure(pair: Pair, target: str, pids: list[int], seconds: float) -> list[Row]:
    """One round of everything on one subject. A measurement that fails is reported and left out, not guessed."""
    rows: list[Row] = []
    plans = (
        lambda: tcp(pair, target, pids, seconds, 1),
        lambda: tcp(pair, target, pids, seconds, 4),
        lambda: udp(pair, target, seconds, 1300),
        lambda: udp(pair, target, seconds, 100),
        lambda: rtt(pair, target, min(seconds, 2)),
    )
    for plan in plans:
        try:
            rows += plan()
        except (RuntimeError, subprocess.TimeoutExpired, KeyError, ValueError) as e:
            print(f"  left out: {e}", file=sys.stderr)
    return rows
