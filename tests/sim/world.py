"""One simulated mesh: a control plane and agents made of the product's own parts, on a clock, a network and disks of ours.

    real:      Plane (authority, registry, placements, policies, mirror, feed, high-water mark, backup) on real SQLite files,
               signed envelopes, SyncMachine, acceptance rules, StateDir files, Compiler, peer changes
    simulated: time, the network, crashes, disk errors, clock errors, and the shell around the machines (sockets, tasks)

Everything is decided by one seed. What must hold is checked after every event (`ledger.py`).
"""

from __future__ import annotations

import copy
import errno
import heapq
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

import mesh.state
from ca.backup import backup, restore
from ca.mirror import Mirror
from ca.plane import DATABASE, Plane
from ca.store import Store
from identity.bundle import TrustBundle, open_bundle
from identity.errors import RetinueError, Unreachable
from identity.keys import write_secret
from identity.names import TrustDomain
from identity.records import state_hash
from identity.wire.admin import WorkloadAdd
from identity.wire.enroll import SvidRequest
from identity.wire.feed import Beat, Delta, parse_frame
from mesh.compile import Compiler, LocalAttachment, LocalFacts
from mesh.devices import PeerState, after, peer_changes
from mesh.plan import Plan
from mesh.snapshot import InstanceKey
from mesh.state import StateDir
from mesh.sync import Accepted, NeedSnapshot, SyncMachine
from tests.sim.joining import join, make_csr
from tests.sim.ledger import Ledger, Violation

__all__ = ["Simulation", "Violation"]

EPOCH: Final = 1_800_000_000.0
DOMAIN: Final = TrustDomain("sim.example")
HOSTS: Final = ("a", "b", "c")
ROLES: Final = ("web", "api", "db")
LEASE: Final = 30.0
BEAT: Final = 9.0
QUIET: Final = 25.0  # virtual seconds after the last fault until everybody has to agree


class Crash(BaseException):
    """The process stops at this very point."""


class Clock:
    """Virtual seconds since the begin; one queue of what is to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, delay: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + max(0.0, delay), self._number, act))

    def step(self, until: float) -> bool:
        """Do the next thing that is due before `until`; False when there is none."""
        if not self._queue or self._queue[0][0] > until:
            self.now = until
            return False
        self.now, _, act = heapq.heappop(self._queue)
        act()
        return True


_template: Path | None = None
_enrolled: dict[str, tuple[TrustBundle, str]] = {}  # what each host took away from its enrolment


_signed = Ledger()
_statements: dict[Any, Any] = {}  # compiled SQL, kept from one simulated start to the next: it is the same program


def watch(plane: Plane, ledger: Ledger) -> None:
    """Every record that this plane signs goes through the ledger."""
    sign = plane.authority.sign_record

    def watched(payload: Any) -> str:
        envelope = sign(payload)
        ledger.signed(payload)
        return envelope

    plane.authority.sign_record = watched  # type: ignore[method-assign]  # this one instance is watched


def template() -> Path:
    """A control plane with the hosts enrolled and some workloads placed, made once a process."""
    global _template
    if _template is None:
        root = Path(tempfile.mkdtemp(prefix="retinue-sim-", dir="/dev/shm"))
        Plane.create(root / "ca", DOMAIN, EPOCH)
        plane = Plane.open(root / "ca", lambda: EPOCH)
        watch(plane, _signed)
        for host in HOSTS:
            reply = join(plane, host)
            trust = open_bundle(reply.bundle, plane.authority.root_fingerprint, DOMAIN, EPOCH)
            row = next(r for r in plane.registry.all() if r.name == host)
            _enrolled[host] = trust, row.tunnel_key
        for n, role in enumerate(ROLES):
            fence = "strict" if role == "db" else "available"
            plane.placements.add(WorkloadAdd(name=role, host=HOSTS[n % len(HOSTS)], labels={"role": role}, fence=fence), plane.now, "t")
        files = Ledger.policy([("web", "api"), ("api", "db")])
        plane.policies.apply(files, "t", plane.now, "t")
        plane.publish()
        plane.close()
        _template = root
    return _template


def forget_template() -> None:
    """Remove the files of the template."""
    global _template
    if _template is not None:
        shutil.rmtree(_template, ignore_errors=True)
        _template = None


class Simulation:
    """`Simulation(seed).run()`. Raises Violation with what was broken; `mutate` plants a bug (tests of the simulator)."""

    def __init__(self, seed: int, *, actions: int = 14, faults: str = "all", mutate: Callable[[Simulation], None] | None = None) -> None:
        self.seed, self.actions, self.faults = seed, actions, faults
        self.dice = random.Random(seed)
        self.clock = Clock()
        self.dir = Path(tempfile.mkdtemp(prefix=f"retinue-sim-{seed}-", dir="/dev/shm"))
        shutil.copytree(template() / "ca", self.dir / "ca")
        self.ledger = copy.deepcopy(_signed)
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


class ControlPlane:
    """The CA's process: it may be down, its database may fail to be read, its connections end."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.directory = sim.dir / "ca"
        self.plane: Plane | None = None
        self.streams: dict[str, int] = {}
        self.turns: dict[str, int] = {}
        self.reports: dict[str, tuple[str, int, frozenset[str]]] = {}
        self.connection = 0
        self.backups: list[Path] = []
        self.names = list(ROLES)
        self.number = 0
        self.moves = 0
        self._truth: tuple[int, tuple[int, list[tuple[str, int, str]]]] = (-1, (-1, []))

    @property
    def now(self) -> float:
        return EPOCH + self.sim.clock.now

    def start(self) -> None:
        if self.plane is not None:
            return
        self.plane = Plane.open(self.directory, lambda: self.now)
        self._truth = (-1, (-1, []))  # it may be another database now, at the same revision
        store = self.plane.store
        store.engine = store.engine.execution_options(compiled_cache=_statements)
        self._watch(self.plane)
        self.sim.say("ca up")

    def _watch(self, plane: Plane) -> None:
        """Every record that is signed goes through the ledger; reads of the store may fail."""
        watch(plane, self.sim.ledger)
        read = plane.store.read

        def flaky() -> AbstractContextManager[Connection]:
            if self.sim.chance(0.1 if self.sim.faults == "read" else 0.01):
                self.sim.failed_reads += 1
                raise Unreachable("store.busy", "simulated")
            return read()

        plane.store.read = flaky  # type: ignore[method-assign]  # reads from this one may fail

    def close(self) -> None:
        if self.plane is not None:
            self.plane.close()
            self.plane = None

    def crash(self, down: float) -> None:
        """The process is gone; what was committed stays."""
        if self.plane is None:
            return
        self.close()
        for host in sorted(self.streams):
            self.hang_up(host)
        self.reports.clear()
        self.sim.say("ca down")
        self.sim.clock.at(down, self.start)

    # ---- connections

    def connect(self, agent: SimAgent, timeline: str | None, revision: int | None) -> None:
        if self.plane is None:
            return
        try:
            frame, turn = self.plane.feed.connect(agent.name, timeline, revision, int(self.now))
        except RetinueError:
            return
        self.connection += 1
        self.streams[agent.name], self.turns[agent.name] = self.connection, turn
        agent.connected(self.connection)
        self._send(agent.name, b"".join(frame))

    def hang_up(self, host: str) -> None:
        connection = self.streams.pop(host, None)
        if connection is not None:
            if self.plane is not None:
                self.plane.feed.leave(host, self.turns[host], int(self.now))
            agent = self.sim.agents[host]
            self.sim.clock.at(self.sim.dice.uniform(0.01, 0.3), lambda: agent.disconnected(connection))

    def _send(self, host: str, line: bytes) -> None:
        """TLS keeps order; a relay or a bug may not, so frames may also be doubled and late here. A lost one ends the connection."""
        sim, agent, connection = self.sim, self.sim.agents[host], self.streams[host]
        self._no_removal_by_mistake(host, line)
        agent.archive.append(line)
        if sim.chance(0.01):
            sim.clock.at(sim.dice.uniform(0, 3), lambda: self.hang_up(host) if self.streams.get(host) == connection else None)
            return
        delay = sim.dice.uniform(0.001, 0.05) if not sim.chance(0.03) else sim.dice.uniform(0.05, 2.0)
        for _ in range(2 if sim.chance(0.01) else 1):
            sim.clock.at(delay, lambda: agent.frame(connection, line))

    def _no_removal_by_mistake(self, host: str, line: bytes) -> None:
        """What a delta removes must not be something that the database says this host holds."""
        if self.plane is None or b'"kind":"heartbeat"' in line[:40]:
            return
        frame = parse_frame(line)
        if isinstance(frame, Beat):
            return
        revision = self.plane.mirror.revision
        if self._truth[0] != revision:
            self._truth = revision, self.sim.ledger.placed(self.directory)
        at, rows = self._truth[1]
        held = {f"placement/{name}/{number}" for name, number, endpoint in rows if endpoint == host}
        missing = held & set(frame.removes) if isinstance(frame, Delta) else held - frame.objects.keys()
        if missing and at == revision:
            raise Violation("removal", f"{host} is told that {sorted(missing)} is gone, and it is not")

    def beat(self) -> None:
        self.sim.clock.at(BEAT, self.beat)
        if self.plane is None:
            return
        self.change(self.plane.tick)
        if self.plane is None:
            return  # it died of that
        frame, names = self.plane.feed.beat(int(self.now))
        for name in sorted(names & self.streams.keys()):
            self._send(name, b"".join(frame))

    def change(self, job: Callable[[], Any]) -> Any:
        """As ca.service.Service.change: do it, publish, deliver. The process may die between the commit and the word."""
        if self.plane is None:
            return None
        result = None
        try:
            result = job()
        except RetinueError as e:
            self.sim.say(f"refused: {e.code}")
        if self.sim.chance(0.03):
            self.crash(self.sim.dice.uniform(0.1, 5))
            return None
        published = self.plane.publish()
        for name, frame in sorted(published.frames.items()):
            if name in self.streams:
                self._send(name, b"".join(frame))
        for name in sorted(published.closed):
            self.hang_up(name)
        return result

    def report(self, host: str, timeline: str, revision: int, attached: frozenset[str]) -> None:
        if self.plane is not None and timeline == self.plane.store.timeline:
            self.reports[host] = (timeline, revision, attached)

    # ---- administrators

    def _existing(self) -> str:
        return self.sim.dice.choice(self.names)

    def workload(self) -> None:
        plane, role = self.plane, self.sim.dice.choice(ROLES)
        if plane is None:
            return
        self.number += 1
        name = f"{role}{self.number}"
        request = WorkloadAdd(name=name, host=self.sim.dice.choice(HOSTS), labels={"role": role}, fence=self.sim.dice.choice(["available", "strict"]))
        if self.change(lambda: plane.placements.add(request, plane.now, "t")) is not None:
            self.names.append(name)

    def revoke(self) -> None:
        plane, name = self.plane, self._existing()
        if plane is not None:
            self.change(lambda: plane.placements.revoke(name, 0, plane.now, "t"))

    def policy(self) -> None:
        plane = self.plane
        if plane is None:
            return
        pairs = [(a, b) for a in ROLES for b in ROLES if self.sim.dice.random() < 0.4]
        self.change(lambda: plane.policies.apply(Ledger.policy(pairs), "t", plane.now, "t"))

    def svid(self) -> None:
        plane, host = self.plane, self.sim.dice.choice(HOSTS)
        if plane is None:
            return

        def issue() -> None:
            caller = next(r for r in plane.registry.all() if r.name == host)
            mine = [r for r in plane.placements.all() if r.endpoint == host]
            if mine:
                reply = plane.svid(caller, SvidRequest(workload=mine[0].name, instance=mine[0].instance, csr=make_csr()))
                self.sim.ledger.certificate(reply.chain)

        self.change(issue)

    def move(self) -> None:
        """PREPARE, wait a while for reports, COMMIT (or give up); anything may happen in between, also another mover."""
        plane, name, to = self.plane, self._existing(), self.sim.dice.choice(HOSTS)
        if plane is None:
            return
        prepared = self.change(lambda: plane.placements.prepare(name, 0, to, plane.now, "t"))
        if prepared is None or self.plane is not plane:
            return
        forced, deadline = self.sim.dice.random() < 0.3, self.sim.clock.now + 2.0
        racing = self.sim.dice.random() < 0.2

        def attempt() -> None:
            if self.plane is not plane:
                return  # that process is gone, and its move with it
            report = self.reports.get(to)
            ready = report is not None and report[1] >= prepared.revision
            if ready or forced:
                self.change(lambda: plane.placements.commit(prepared, plane.now, "t"))
                if racing:
                    self.change(lambda: plane.placements.commit(prepared, plane.now, "other"))
                self.moves += 1
            elif self.sim.clock.now >= deadline:
                self.change(lambda: plane.placements.abort(prepared, plane.now, "t", "late"))
            else:
                self.sim.clock.at(0.1, attempt)

        self.sim.clock.at(self.sim.dice.uniform(0.05, 0.5), attempt)

    def backup(self) -> None:
        target = self.sim.dir / f"backup-{len(self.backups)}.db"
        try:
            backup(self.directory, target, int(self.now))
        except RetinueError as e:
            self.sim.say(f"no backup: {e.code}")
            return
        self.backups.append(target)

    def restore(self) -> None:
        """The database is lost and an old one put in its place."""
        if not self.backups or self.plane is None:
            return
        source = self.sim.dice.choice(self.backups)
        self.crash(1e9)
        done = self._restored(source)
        self.sim.say(f"restored, {done} lost")
        self.sim.clock.at(self.sim.dice.uniform(0.1, 5), self.start)

    def _restored(self, source: Path) -> int | None:
        import ca.backup

        real = ca.backup.Plane.over

        def watched(*args: Any, **kwargs: Any) -> Plane:
            plane = real(*args, **kwargs)
            watch(plane, self.sim.ledger)
            return plane

        ca.backup.Plane.over = watched  # type: ignore[method-assign,assignment]  # put back below
        try:
            return restore(self.directory, source, int(self.now), new_timeline=True).lost
        finally:
            ca.backup.Plane.over = real  # type: ignore[method-assign]  # as it was


class SimAgent:
    """One host's agent: its machines and its state directory. The device lives on when the agent dies, as the engine does."""

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim, self.name = sim, name
        self.state_dir = sim.dir / f"state-{name}"
        self.state_dir.mkdir(mode=0o700)
        self.trust, self.tunnel_key = _enrolled[name]
        self.compiler = Compiler()
        self.up = False
        self.connection: int | None = None
        self.cut_until = 0.0
        self.skew = 0.0
        self.attempt = 0
        self.archive: list[bytes] = []
        self.peers: dict[str, PeerState] = {}
        self.plan: Plan | None = None
        self.saved = True
        self.life = 0
        self.boots = 0

    @property
    def wall(self) -> float:
        return EPOCH + self.sim.clock.now + self.skew

    @property
    def mono(self) -> float:
        return 1000.0 + self.sim.clock.now

    # ---- life

    def start(self) -> None:
        if self.up:
            return
        self.state = StateDir(self.state_dir)
        try:
            marks, policy_mark = self.state.load_marks()
        except RetinueError as e:
            raise Violation("restart", f"{self.name} cannot read its own marks: {e.message}") from e
        self.machine = SyncMachine(self.trust, self.name, marks=marks, policy_mark=policy_mark, lease=LEASE)
        if not (self.state_dir / "epochs.json").exists():
            try:
                self.state.save_marks(self.machine)
            except (RetinueError, Crash):
                self.sim.clock.at(1.0, self.start)  # its supervisor starts it again
                return
        try:
            self.state.restore(self.machine, boot="boot", wall=self.wall, mono=self.mono)
        except RetinueError as e:
            raise Violation("restart", f"{self.name} cannot restore its own state: {e.code} {e.message}") from e
        self.up, self.connection, self.saved = True, None, True
        self.life += 1
        self.sim.ledger.restarted(self)
        self.apply()
        self.sim.clock.at(self.sim.dice.uniform(0, 0.5), self.dial)

    def crash(self, down: float) -> None:
        if not self.up:
            return
        self.up, self.connection = False, None
        self.sim.ca.streams.pop(self.name, None)
        self.sim.say(f"{self.name} dies")
        self.sim.clock.at(down, self.start)

    def engine_crash(self) -> None:
        """The engine's peers are gone; the agent gives them back."""
        self.peers = {}
        if self.up:
            self.apply()

    def tick(self) -> None:
        """What ends by time."""
        self.sim.clock.at(1.0, self.tick)
        if not self.up:
            return
        if self.view.deadline is not None and self.mono >= self.view.deadline:
            self.apply()
        else:
            self.sim.ledger.agent(self)

    # ---- the feed

    def dial(self) -> None:
        if not self.up or self.connection is not None:
            return
        if self.sim.clock.now >= self.cut_until:
            resume = self.machine.resume
            self.sim.ca.connect(self, resume.timeline if resume else None, resume.revision if resume else None)
        if self.connection is None:
            life = self.life
            self.sim.clock.at(self.sim.dice.uniform(0.1, 5.0), lambda: self.dial() if life == self.life else None)

    def connected(self, connection: int) -> None:
        self.connection = connection

    def disconnected(self, connection: int) -> None:
        if self.connection == connection:
            self.connection = None
            self.dial()

    def frame(self, connection: int, line: bytes) -> None:
        if self.up and connection == self.connection and self.sim.clock.now >= self.cut_until:
            self.receive(line)

    def replay(self) -> None:
        """Somebody in between sends what was sent before."""
        if self.up and self.archive:
            self.receive(self.sim.dice.choice(self.archive))

    def receive(self, line: bytes) -> None:
        events = self.machine.receive(line, wall=self.wall, mono=self.mono)
        try:
            if any(isinstance(e, Accepted) for e in events) or not self.saved:
                self._save()
                self.apply()
        except Crash:
            self.sim.say(f"{self.name} dies while it writes")
            self.crash(self.sim.dice.uniform(0, 5))
            return
        if any(isinstance(e, NeedSnapshot) for e in events) and self.connection is not None:
            self.sim.ca.hang_up(self.name)

    def _save(self) -> None:
        """Persist, then act, then report: the order of mesh.endpoint."""
        try:
            self.state.save_snapshot(self.machine, "boot")
            self.state.save_marks(self.machine)
            self.saved = True
            self.sim.ledger.persisted(self)
        except RetinueError:
            self.saved = False

    def apply(self) -> None:
        view = self.machine.view(self.mono)
        places = {
            InstanceKey(key): LocalAttachment("netns", key)
            for key, record in (*view.snapshot.placements.items(), *view.snapshot.prepares.items())
            if record.endpoint == self.name
        }
        facts = LocalFacts(endpoint=self.name, tunnel_key=self.tunnel_key, attachments=places, fenced=view.fenced)
        self.plan = self.compiler.plan(view.snapshot, facts, int(self.wall))
        self.peers = after(self.peers, peer_changes(self.peers, self.plan.peers))
        self.view = view
        self.sim.ledger.agent(self)
        position = self.machine.position
        if position is not None and self.saved and self.connection is not None and self.sim.clock.now >= self.cut_until:
            attached = frozenset(self.plan.attachments)
            self.sim.clock.at(self.sim.dice.uniform(0.001, 0.02),
                              lambda: self.sim.ca.report(self.name, position.timeline, position.revision, attached))  # fmt: skip
