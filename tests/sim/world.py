"""One simulated mesh: a control plane and agents made of the product's own parts, on a clock, a network and disks of ours.

    real:      Plane (authority, registry, placements, policies, mirror, feed, high-water mark, backup) on real SQLite files,
               signed envelopes, SyncMachine, acceptance rules, StateDir files, Compiler, peer changes
    simulated: time, the network, crashes, disk errors, clock errors, and the shell around the machines (sockets, tasks)

Everything is decided by one seed. What must hold is checked after every event (`ledger.py`).
"""

from __future__ import annotations

import copy
import errno
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import mesh.state
from ca.directory import DATABASE
from ca.mirror import Mirror
from ca.store import Store
from identity.keys import write_secret
from identity.records import state_hash
from tests.sim.agent import SimAgent
from tests.sim.clock import EPOCH, Clock, Crash
from tests.sim.control import BEAT, ControlPlane
from tests.sim.ledger import Violation
from tests.sim.template import HOSTS, forget_template, signed, template

__all__ = ["Simulation", "Violation", "forget_template"]

QUIET: Final = 25.0  # virtual seconds after the last fault until everybody has to agree


class Simulation:
    """`Simulation(seed).run()`. Raises Violation with what was broken; `mutate` plants a bug (tests of the simulator)."""

    def __init__(self, seed: int, *, actions: int = 14, faults: str = "all", mutate: Callable[[Simulation], None] | None = None) -> None:
        self.seed, self.actions, self.faults = seed, actions, faults
        self.dice = random.Random(seed)
        self.clock = Clock()
        self.dir = Path(tempfile.mkdtemp(prefix=f"retinue-sim-{seed}-", dir="/dev/shm"))
        shutil.copytree(template() / "ca", self.dir / "ca")
        self.ledger = copy.deepcopy(signed)
        self.failed_reads = 0
        self.over = False  # faults are: now everything is to heal
        self.story: list[str] = []
        self.ca = ControlPlane(self)
        self.agents = {h: SimAgent(self, h) for h in HOSTS}
        self.mutations = mutate
        if mutate is not None:
            mutate(self)

    def say(self, text: str) -> None:
        self.story.append(f"{self.clock.now:7.2f} {text}")

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability and not self.over

    # ---- the run

    def run(self) -> None:
        """Faults and changes, then quiet, then agreement."""
        real = mesh.state.write_secret
        mesh.state.write_secret = self._write
        try:
            self.ca.start()
            for agent in self.agents.values():
                agent.start()
            self.clock.at(BEAT, self.ca.beat)
            for agent in self.agents.values():
                self.clock.at(self.dice.uniform(0, 1), agent.tick)
            self._to(3.0)
            for _ in range(self.actions):
                self._act()
                self._to(self.clock.now + self.dice.expovariate(0.5))
            self._heal()
            self._to(self.clock.now + QUIET)
            self._agree()
        except Violation as e:
            e.add_note(f"seed {self.seed}: python -m tests.sim --seed {self.seed} --actions {self.actions} --faults {self.faults}")
            raise
        finally:
            mesh.state.write_secret = real
            self.ca.close()
            shutil.rmtree(self.dir, ignore_errors=True)

    def _to(self, until: float) -> None:
        while self.clock.step(until):
            pass

    def _act(self) -> None:
        kinds = {
            "move": 6, "policy": 3, "workload": 3, "revoke": 2, "svid": 1,
            "crash ca": 2, "crash agent": 4, "crash engine": 1, "cut": 3, "partition": 1, "backup": 2, "restore": 2, "skew": 1, "replay": 3,
        }  # fmt: skip
        what = self.dice.choices(list(kinds), list(kinds.values()))[0]
        self.say(what)
        match what:
            case "move" | "policy" | "workload" | "revoke" | "svid" | "backup" | "restore":
                getattr(self.ca, what)()
            case "crash ca":
                self.ca.crash(self.dice.uniform(0.5, 20))
            case "crash agent":
                self.dice.choice(list(self.agents.values())).crash(self.dice.uniform(0, 10))
            case "crash engine":
                self.dice.choice(list(self.agents.values())).engine_crash()
            case "cut":
                self.ca.hang_up(self.dice.choice(HOSTS))
            case "partition":
                agent = self.dice.choice(list(self.agents.values()))
                agent.cut_until = self.clock.now + self.dice.uniform(1, 80)
                self.ca.hang_up(agent.name)
            case "skew":
                self.dice.choice(list(self.agents.values())).skew = self.dice.choice([-300.0, 300.0, -3600.0, 500.0])
            case "replay":
                self.dice.choice(list(self.agents.values())).replay()

    def _heal(self) -> None:
        self.over = True
        self.say("quiet")
        for agent in self.agents.values():
            agent.cut_until, agent.skew = 0.0, 0.0
            agent.start()
        self.ca.start()

    def _agree(self) -> None:
        """Every agent has what the database says, by a mirror of its own; and the addresses are where they belong."""
        store = Store.open(self.dir / "ca" / DATABASE)
        try:
            fresh = Mirror(store)
            fresh.load(int(EPOCH + self.clock.now))
            for name, agent in self.agents.items():
                truth = dict(fresh.world.view(name).objects)
                if agent.machine.received_hash != state_hash(truth):
                    mine = set(agent.machine._received.items()) ^ set(truth.items())
                    raise Violation("converged", f"{name} has another state than the database: {sorted(k for k, _ in mine)}")
                if agent.machine.refused:
                    raise Violation("converged", f"{name} refuses {sorted(agent.machine.refused)}")
                self.ledger.settled(agent)
        finally:
            store.close()

    # ---- disks

    def _write(self, path: Path, content: bytes) -> None:
        """What StateDir writes with: it may fail, and the machine may stop before or after it."""
        if "state-" in str(path) and self.faults == "all":
            if self.chance(0.02):
                raise OSError(self.dice.choice([errno.ENOSPC, errno.EIO]), "simulated")
            if self.chance(0.02):
                if self.chance(0.5):
                    write_secret(path, content)
                raise Crash
        write_secret(path, content)
