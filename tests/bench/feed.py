"""``python -m tests.bench.feed [--rounds 7] [--subscribers 1000 5000]``: how soon every endpoint's frame is ready.

One instance an endpoint, every endpoint connected, records of real size, heartbeats really signed. Three policies: everybody
talks with everybody; three tiers (web to api to db); many small applications. Three changes: one move, a new policy, one
revocation. A frame is ready when `Feed.advance` has returned; the store, TLS and the network are not in it. Prints one row
a measure: p50 and p99 over the frames of all rounds, bytes encoded, and the resident memory. Nothing here asserts a timing.
"""

from __future__ import annotations

import argparse
import base64
import gc
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ca.feed import Feed, Frame
from ca.scope import EndpointFact, InstanceFact, Touched, World
from identity import records
from identity.records import Heartbeat
from policy.compile import compile_policy
from policy.language import load
from policy.program import Program, Subject

ROLES = ("web", "api", "db")
HEAD = "meshpolicy: 1\nlabels: {keys: [role, app]}\nsegments:\n  - name: s\n    allow:\n"
APP = 10  # endpoints an application has


def rules(shape: str, count: int, port: int) -> str:
    """A policy text."""
    if shape == "all-to-all":
        return f'{HEAD}      - {{id: all, from: "*", to: "*", on: tcp/{port}}}\n'
    if shape == "tiers":
        pairs = [("{role: web}", "{role: api}"), ("{role: api}", "{role: db}")]
    else:
        apps = (f"{{app: a{n}}}" for n in range(max(1, count // APP)))
        pairs = [(app, app) for app in apps]
    return HEAD + "".join(f"      - {{id: r{n}, from: {a}, to: {b}, on: tcp/{port}}}\n" for n, (a, b) in enumerate(pairs))


def program(shape: str, count: int, port: int) -> Program:
    return compile_policy(load([("bench.yaml", rules(shape, count, port))]), 1_800_000_000, ())


class Bench:
    """A world of `count` endpoints under one policy shape, all connected."""

    def __init__(self, shape: str, count: int) -> None:
        self.shape, self.count, self._port, self._version = shape, count, 1, 0
        self._rng = random.Random(1)
        self._key = Ed25519PrivateKey.generate()
        self.world = World()
        self.world.set_bundle(self._envelope(3000))
        self.world.set_policy(self._envelope(1000), program(shape, count, self._port))
        self.programs = [program(shape, count, port) for port in (1, 2)]
        for n in range(count):
            self.world.set_endpoint(EndpointFact(f"host-{n}", self._envelope(560)))
            self.world.set_instance(self._instance(n, f"host-{n}", frozenset()))
        self.revision = 1
        self.feed = Feed(self.world, "bench", self.revision, self._beat)
        began = time.perf_counter()
        for n in range(count):
            self.feed.connect(f"host-{n}", None, None, 1_800_000_000)
        self.connected_s = time.perf_counter() - began

    def _envelope(self, size: int) -> str:
        return base64.urlsafe_b64encode(self._rng.randbytes(size * 3 // 4)).decode()

    def _beat(self, revision: int, now: int) -> str:
        beat = Heartbeat(trust_domain="bench.test", timeline="bench", revision=revision, time=now)
        return records.sign(beat, self._key)

    def _instance(self, n: int, holder: str | None, former: frozenset[str]) -> InstanceFact:
        labels = {"role": ROLES[n % 3], "app": f"a{n // APP}"}
        return InstanceFact(
            f"w{n}/0", Subject(f"w{n}", labels), holder is None, holder, None, former, self._envelope(640), None
        )

    def move(self) -> Touched:
        n = self._rng.randrange(self.count)
        old = self.world.instances[f"w{n}/0"]
        to = f"host-{self._rng.randrange(self.count)}"
        gone = old.former | ({old.holder} if old.holder else set())
        return self.world.set_instance(self._instance(n, to, frozenset(gone) - {to}))

    def revoke(self) -> Touched:
        n = self._rng.randrange(self.count)
        old = self.world.instances[f"w{n}/0"]
        gone = old.former | ({old.holder} if old.holder else set())
        return self.world.set_instance(self._instance(n, None, frozenset(gone)))

    def policy(self) -> Touched:
        self._port = 1 - self._port
        return self.world.set_policy(self._envelope(1000), self.programs[self._port])

    def measure(self, change: Callable[[], Touched], rounds: int) -> tuple[list[float], int, int]:
        """Milliseconds of every frame, frames of the last round, distinct bytes encoded in it."""
        took: list[float] = []
        frames: dict[str, Frame] = {}
        for _ in range(rounds):
            self.revision += 1
            began = time.perf_counter()
            frames = self.feed.advance(self.revision, change(), 1_800_000_000 + self.revision)
            took += [(time.perf_counter() - began) * 1000] * max(1, len(frames))
        parts = {id(part): len(part) for frame in frames.values() for part in frame}
        return sorted(took), len(frames), sum(parts.values())


def resident() -> float:
    """MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--subscribers", type=int, nargs="*", default=[1000, 5000])
    options = parser.parse_args()
    print(f"{'policy':11} {'endpoints':>9} {'change':8} {'p50 ms':>9} {'p99 ms':>9} {'frames':>7} {'encoded':>10}")
    for count in options.subscribers:
        for shape in ("all-to-all", "tiers", "sparse"):
            gc.collect()
            bench = Bench(shape, count)
            print(f"{shape:11} {count:9} {'connect':8} {bench.connected_s * 1000 / count:9.2f}   (mean of a snapshot)")
            for name, change in (("move", bench.move), ("policy", bench.policy), ("revoke", bench.revoke)):
                took, frames, size = bench.measure(change, options.rounds)
                p50, p99 = (took[min(len(took) - 1, int(len(took) * q))] for q in (0.5, 0.99))
                print(f"{shape:11} {count:9} {name:8} {p50:9.2f} {p99:9.2f} {frames:7} {size:8} B", flush=True)
            print(f"{shape:11} {count:9} {'memory':8} {resident():9.0f} MB resident")
            del bench


if __name__ == "__main__":
    main()
