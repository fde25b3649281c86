"""The measurements: each takes a running pair and returns rows of (measure, value, unit)."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rig import Pair, rss_kib, system_cpu_seconds
from tests.bench.subjects import LOADED_RTT, RTT, TCP1, TCP4, UDP100, UDP1300

Row = tuple[str, float, str]

ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 7007)); print("ready", flush=True)
while True:
    data, peer = s.recvfrom(2048); s.sendto(data, peer)
"""
PING = """
import socket, sys, time, json
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.25); s.connect((sys.argv[1], 7007))
out, end, n = [], time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    n += 1
    t = time.perf_counter_ns(); s.send(n.to_bytes(64, "big"))
    try:
        while int.from_bytes(s.recv(2048), "big") != n: pass
    except TimeoutError: continue
    out.append((time.perf_counter_ns() - t) / 1000)
    time.sleep(0.002)
print(json.dumps([n, out]))
"""


@dataclass(frozen=True)
class Target:
    """A running subject."""

    pair: Pair
    far: str
    pids: list[int]
    seconds: int


@contextlib.contextmanager
def _server(pair: Pair, listening: str, *argv: str) -> Iterator[None]:
    """A server at the far end, from when it listens."""
    process = pair.spawn(1, *argv)
    try:
        deadline = time.monotonic() + 10
        while listening not in pair.at(1, "ss", "-Hlntu"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens on {listening}")
            time.sleep(0.03)
        yield
    finally:
        process.kill()
        process.wait()
        pair.processes.remove(process)


def _iperf(t: Target, *options: str) -> dict[str, object]:
    with _server(t.pair, ":5201", "iperf3", "-s", "-1", "-B", t.far):
        text = t.pair.at(0, "iperf3", "-J", "-c", t.far, "--connect-timeout", "5000", *options, check=False, timeout=t.seconds + 20)
    answer: dict[str, object] = json.loads(text)
    if "error" in answer:
        raise RuntimeError(f"iperf3: {answer['error']}")
    return answer


def tcp(t: Target, streams: int) -> list[Row]:
    """Throughput, and for one stream the CPU of the whole machine per gigabyte and the engines' memory afterwards."""
    seconds = 2 * t.seconds if streams == 1 else t.seconds
    busy = system_cpu_seconds()
    end = _iperf(t, "-t", str(seconds), "-P", str(streams))["end"]
    busy = system_cpu_seconds() - busy
    received = end["sum_received"]  # type: ignore[index]  # iperf3's JSON
    rows = [(f"TCP {streams} stream{'s' * (streams > 1)}", received["bits_per_second"] / 1e9, "Gb/s")]
    if streams == 1:
        rows.append(("CPU per GB", busy / (received["bytes"] / 1e9), "s/GB"))
        rows += [("RSS loaded", max(rss_kib(engine(p)) for p in t.pids) / 1024, "MiB")] if t.pids else []
    return rows


def udp(t: Target, size: int) -> list[Row]:
    """Delivered datagrams a second when the sender offers as many as it can."""
    end = _iperf(t, "-t", str(t.seconds), "-u", "-b", "0", "-l", str(size))["end"]
    total = end["sum"]  # type: ignore[index]  # iperf3's JSON
    delivered = (total["packets"] - total["lost_packets"]) / total["seconds"]
    return [(f"UDP {size} B delivered", delivered / 1000, "kpps")]


def rtt(t: Target) -> list[Row]:
    """Round trips of 64-byte datagrams, one at a time with pauses, microseconds."""
    _, times = _ping(t, t.seconds)
    cut = statistics.quantiles(times, n=100)
    return [("RTT p50", cut[49], "us"), ("RTT p99", cut[98], "us")]


def _ping(t: Target, seconds: float) -> tuple[int, list[float]]:
    """(datagrams sent, round trips in microseconds); a datagram without answer within 250 ms counts as lost."""
    with _server(t.pair, ":7007", sys.executable, "-IS", "-c", ECHO, t.far):
        sent, times = json.loads(t.pair.at(0, sys.executable, "-IS", "-c", PING, t.far, str(seconds), timeout=seconds + 20))
    if len(times) < 5:
        raise RuntimeError(f"only {len(times)} round trips")
    return sent, times


def loaded_rtt(t: Target) -> list[Row]:
    """The same beside one TCP stream at full speed."""
    with _server(t.pair, ":5201", "iperf3", "-s", "-1", "-B", t.far):
        load = t.pair.spawn(0, "iperf3", "-c", t.far, "-t", str(t.seconds + 10))
        try:
            time.sleep(0.5)  # until the stream has its speed
            if load.poll() is not None:
                raise RuntimeError("the load did not start")
            sent, times = _ping(t, 1.5 * t.seconds)
        finally:
            load.kill()
            load.wait()
            t.pair.processes.remove(load)
    cut = statistics.quantiles(times, n=100)
    return [
        ("RTT under load p50", cut[49] / 1000, "ms"), ("RTT under load p99", cut[98] / 1000, "ms"),
        ("RTT under load, lost", 100 * (sent - len(times)) / sent, "%"),
    ]  # fmt: skip


def engine(pid: int) -> int:
    """The process that does the work: `ip netns exec` replaces itself, so it is the pid itself unless it has a child."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def idle(pids: list[int]) -> list[Row]:
    """Memory before any traffic but a few pings."""
    return [("RSS idle", max(rss_kib(engine(p)) for p in pids) / 1024, "MiB")] if pids else []


PLANS: dict[str, Callable[[Target], list[Row]]] = {
    TCP1: lambda t: tcp(t, 1),
    TCP4: lambda t: tcp(t, 4),
    UDP1300: lambda t: udp(t, 1300),
    UDP100: lambda t: udp(t, 100),
    RTT: rtt,
    LOADED_RTT: loaded_rtt,
}


def measure(t: Target, wanted: tuple[str, ...]) -> list[Row]:
    """One round of what is wanted on one subject. A measurement that fails is reported and left out, not guessed."""
    rows: list[Row] = []
    for name in wanted:
        try:
            rows += PLANS[name](t)
        except (RuntimeError, OSError, subprocess.TimeoutExpired, KeyError, ValueError) as e:
            print(f"  left out {name}: {e}", file=sys.stderr)
    return rows
