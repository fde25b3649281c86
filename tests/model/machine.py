"""The promises of `move.pml` as a Hypothesis state machine over the product's own code.

    real:    Plane (authority, placements, mirror, feed, high-water mark) on SQLite files, backup and restore, signed records
             and frames, SyncMachine, acceptance rules, StateDir files
    ours:    who does what next: administrators, the network, crashes. And what is remembered from outside (`Truth`)

A receiver acts only after both of its files are written, as mesh.endpoint does; `Agent.follow` is that order.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ca.backup
import ca.store
import mesh.state
from ca.backup import backup, restore
from ca.mirror import Mirror
from ca.placements import Prepared
from ca.plane import Plane
from identity.bundle import TrustBundle, open_bundle
from identity.errors import Conflict, Refused, RetinueError
from identity.keys import write_secret
from identity.names import TrustDomain
from identity.records import Heartbeat, PlacementRecord, PolicyRecord, state_hash
from identity.wire.admin import WorkloadAdd
from identity.wire.feed import Beat, Snapshot, parse_frame
from mesh.acceptance import placement_body
from mesh.state import StateDir
from mesh.sync import Accepted, NeedSnapshot, SyncMachine
from tests.sim.joining import join
from tests.sim.ledger import Ledger, Violation

BEGIN = 1_900_000_000
DOMAIN = TrustDomain("model.example")
HOSTS = ("a", "b", "c")
ROLES = ("web", "api", "db")
MOST = 6  # workloads
ROUNDS = 6  # of reconnecting and hearing everything until all must agree

hosts = st.sampled_from(HOSTS)
picks = st.integers(0, 63)  # which of those there are, modulo
dies = st.integers(0, 7).map(lambda n: n == 7)  # does the CA die between its commit and its word


@contextmanager
def compiled_once() -> Iterator[None]:
    """Compiled SQL is kept from one start of the CA to the next: it is the same program."""
    real, statements = ca.store._engine, dict[Any, Any]()
    with patch.object(ca.store, "_engine", lambda path: real(path).execution_options(compiled_cache=statements)):
        yield


class Crash(BaseException):
    """The process ends at this very write."""


class Truth:
    """Remembered from outside: every record that was signed, and the most that each receiver ever had in force."""

    def __init__(self) -> None:
        self.envelopes: dict[str, Any] = {}  # envelope -> what it says
        self.owners: dict[tuple[str, int], tuple[str, str]] = {}  # (instance, epoch) -> (holder, body)
        self.policies: dict[int, str] = {}
        self.beats: dict[str, int] = {}  # timeline -> newest revision vouched for
        self.accepted: dict[tuple[str, int], tuple[str, str]] = {}  # (instance, epoch) -> (endpoint, tunnel key), by all receivers
        self.followed: dict[tuple[str, str], int] = {}  # (receiver, instance) -> highest epoch in force
        self.positions: dict[tuple[str, str], int] = {}  # (receiver, timeline) -> highest revision in force

    def watch(self, plane: Plane) -> None:
        """Whatever this plane signs is remembered."""
        sign = plane.authority.sign_record

        def watched(payload: Any) -> str:
            envelope = sign(payload)
            self.signed(envelope, payload)
            return envelope

        plane.authority.sign_record = watched  # type: ignore[method-assign]  # this one instance is watched

    def signed(self, envelope: str, said: Any) -> None:
        self.envelopes[envelope] = said
        match said:
            case PlacementRecord():
                key, body = (f"{said.name}/{said.instance}", said.epoch), placement_body(said)
                holder, before = self.owners.setdefault(key, (said.endpoint, body))
                if holder != said.endpoint:
                    raise Violation("one owner", f"epoch {said.epoch} of {key[0]} was signed for {holder} and for {said.endpoint}")
                # A prepare and its commit share an epoch; nothing else does.
                if body != before and placement_body(said.model_copy(update={"state": "prepare"})) != before:
                    raise Violation("one owner", f"epoch {said.epoch} of {key[0]} was signed twice, with different words")
                self.owners[key] = holder, body
            case PolicyRecord():
                if self.policies.setdefault(said.revision, said.digest) != said.digest:
                    raise Violation("one owner", f"policy revision {said.revision} was signed for two policies")
            case Heartbeat():
                if said.revision < self.beats.get(said.timeline, 0):
                    raise Violation("revision", f"the CA goes back to {said.revision} in {said.timeline}")
                self.beats[said.timeline] = said.revision

    def acts(self, agent: Agent) -> None:
        """What `agent` has in force now, after it was written."""
        machine = agent.machine
        if (here := machine.position) is not None:
            before = self.positions.get((agent.name, here.timeline), 0)
            if here.revision < before:
                raise Violation("revision", f"{agent.name} goes back from revision {before} to {here.revision}")
            self.positions[agent.name, here.timeline] = here.revision
        for key, envelope in machine.objects.items():
            if key.startswith(("placement/", "prepare/")):
                said = self.envelopes.get(envelope)
                if not isinstance(said, PlacementRecord) or key.partition("/")[2] != f"{said.name}/{said.instance}":
                    raise Violation("signed", f"{agent.name} has something in force as {key} that was not signed for it")
                if key.startswith("placement/"):
                    self._accepts(agent.name, said)
        for (name, key), epoch in self.followed.items():
            if name == agent.name and (key not in machine.marks or machine.marks[key].number < epoch):
                raise Violation("epoch", f"{name} has forgotten epoch {epoch} of {key}, which it had in force")

    def _accepts(self, receiver: str, said: PlacementRecord) -> None:
        key = f"{said.name}/{said.instance}"
        if said.epoch < self.followed.get((receiver, key), 0):
            raise Violation("epoch", f"{receiver} has epoch {said.epoch} of {key} in force after {self.followed[receiver, key]}")
        self.followed[receiver, key] = said.epoch
        if said.state == "active":
            here = said.endpoint, said.tunnel_key
            if self.accepted.setdefault((key, said.epoch), here) != here:
                raise Violation("one owner", f"epoch {said.epoch} of {key} is accepted from {here[0]} and from another one")


class Agent:
    """One receiver: its machine, its files, and the frames on the way to it, oldest first."""

    def __init__(self, name: str, directory: Path, trust: TrustBundle, truth: Truth) -> None:
        self.name, self.directory, self.trust, self.truth = name, directory, trust, truth
        directory.mkdir(mode=0o700)
        self.machine: SyncMachine
        self.state: StateDir
        self.turn: int | None = None  # of the connection
        self.queue: list[bytes] = []
        self.archive: list[bytes] = []

    def start(self, now: int) -> None:
        """From the files alone."""
        self.turn, self.queue, self.state = None, [], StateDir(self.directory)
        try:
            marks, policy = self.state.load_marks()
            self.machine = SyncMachine(self.trust, self.name, marks=marks, policy_mark=policy)
            if not (self.directory / "epochs.json").exists():
                self.state.save_marks(self.machine)
            self.state.restore(self.machine, boot="boot", wall=now, mono=now)
        except RetinueError as e:
            raise Violation("restart", f"{self.name} cannot start from its own files: {e.code} {e.message}") from e
        self.truth.acts(self)

    def receive(self, line: bytes, now: int) -> None:
        """Judge, write, act: in this order."""
        events = self.machine.receive(line, wall=now, mono=now)
        if any(isinstance(e, Accepted) for e in events):
            self.state.save_snapshot(self.machine, "boot")
            self.state.save_marks(self.machine)
            self.truth.acts(self)
        if any(isinstance(e, NeedSnapshot) for e in events):
            self.turn, self.queue = None, []  # it hangs up, and connects anew


_template: tuple[Path, Truth, dict[str, TrustBundle]] | None = None


def template() -> tuple[Path, Truth, dict[str, TrustBundle]]:
    """A control plane with three hosts and a workload on each, made once a process; all may talk with all."""
    global _template
    if _template is None:
        root, truth, trust = Path(tempfile.mkdtemp(prefix="retinue-machine-", dir="/dev/shm")), Truth(), {}
        Plane.create(root / "ca", DOMAIN, BEGIN)
        plane = Plane.open(root / "ca", lambda: BEGIN)
        truth.watch(plane)
        for host in HOSTS:
            trust[host] = open_bundle(join(plane, host).bundle, plane.authority.root_fingerprint, DOMAIN, BEGIN)
        for host, role in zip(HOSTS, ROLES, strict=True):
            plane.placements.add(WorkloadAdd(name=role, host=host, labels={"role": role}), plane.now, "t")
        plane.policies.apply(Ledger.policy([(a, b) for a in ROLES for b in ROLES]), "t", plane.now, "t")
        plane.publish()
        plane.close()
        backup(root / "ca", root / "begin.db", BEGIN)
        _template = root, truth, trust
    return _template


def forget_template() -> None:
    """Remove the files of the template."""
    global _template
    if _template is not None:
        shutil.rmtree(_template[0], ignore_errors=True)
        _template = None


class Moves(RuleBasedStateMachine):
    """`seen` counts what happened, over all examples of a run: a test asks that there was something to look at."""

    seen: Counter[str] = Counter()

    def __init__(self) -> None:
        super().__init__()
        files, truth, trust = template()
        self.dir = Path(tempfile.mkdtemp(prefix="retinue-machine-", dir="/dev/shm"))
        shutil.copytree(files / "ca", self.dir / "ca")
        self.now = BEGIN + 10
        self.truth = Truth()
        for envelope, said in truth.envelopes.items():
            self.truth.signed(envelope, said)
        self.names = list(ROLES)
        self.moves: list[Prepared] = []
        self.backups = [files / "begin.db"]
        self.plane: Plane
        self.agents = {h: Agent(h, self.dir / f"state-{h}", trust[h], self.truth) for h in HOSTS}
        for agent in self.agents.values():
            agent.start(self.now)
        self._open()
        for agent in self.agents.values():
            self._connect(agent)

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else there is something to say already
                self._settle()
        finally:
            self.plane.close()
            shutil.rmtree(self.dir, ignore_errors=True)

    # ---- the control plane

    def _open(self) -> None:
        self.plane = Plane.open(self.dir / "ca", lambda: float(self.now))
        self.truth.watch(self.plane)

    def _down(self) -> None:
        """The process is gone: what is committed stays, connections and what was on its way do not."""
        self.plane.close()
        for agent in self.agents.values():
            agent.turn, agent.queue = None, []

    def _change(self, job: Callable[[], Any], dead: bool = False) -> Any:
        """One transaction and its word, as ca.service. A refusal is an answer as well. Returns what `job` did, else None."""
        self.now += 1
        done = None
        try:
            done = job()
            self.seen["done"] += 1
        except (Conflict, Refused) as e:
            self.seen[e.code] += 1
        if dead:
            self._down()
            self._open()
            return done
        published = self.plane.publish()
        if published.failed is not None or not published.current:
            raise Violation("publish", "what is committed cannot be told")
        for name, frame in published.frames.items():
            self._send(self.agents[name], b"".join(frame))
        return done

    def _send(self, agent: Agent, line: bytes) -> None:
        frame = parse_frame(line)
        if not isinstance(frame, Beat):
            told = frame.objects if isinstance(frame, Snapshot) else frame.upserts
            if unsigned := [k for k, e in told.items() if k.startswith(("placement/", "prepare/")) and e not in self.truth.envelopes]:
                raise Violation("signed", f"{agent.name} is told {unsigned}, which nobody signed")
        if agent.turn is not None:
            agent.queue.append(line)
        agent.archive.append(line)

    def _connect(self, agent: Agent) -> None:
        self.now += 1
        if agent.turn is not None:
            self.plane.feed.leave(agent.name, agent.turn, self.now)
        agent.machine.connected()
        resume = agent.machine.resume
        at = (resume.timeline, resume.revision) if resume is not None else (None, None)
        frame, agent.turn = self.plane.feed.connect(agent.name, *at, self.now)
        agent.queue = []
        self._send(agent, b"".join(frame))

    def _name(self, pick: int) -> str:
        return self.names[pick % len(self.names)]

    def _prepare(self, name: str, to: str, dead: bool = False) -> Prepared | None:
        plane = self.plane
        prepared: Prepared | None = self._change(lambda: plane.placements.prepare(name, 0, to, plane.now, "t"), dead)
        if prepared is not None:
            self.moves.append(prepared)
        return prepared

    def _commit(self, move: Prepared, dead: bool = False) -> bool:
        plane = self.plane
        done = self._change(lambda: plane.placements.commit(move, plane.now, "t"), dead) is not None
        self.seen["commit"] += done
        return done

    # ---- administrators

    @precondition(lambda self: len(self.names) < MOST)
    @rule(role=st.sampled_from(ROLES), host=hosts, dead=dies)
    def add(self, role: str, host: str, dead: bool) -> None:
        plane, name = self.plane, f"{role}{len(self.truth.envelopes)}"
        self._change(lambda: plane.placements.add(WorkloadAdd(name=name, host=host, labels={"role": role}), plane.now, "t"), dead)
        self.names.append(name)

    @rule(pick=picks, to=hosts, dead=dies)
    def prepare(self, pick: int, to: str, dead: bool) -> None:
        self._prepare(self._name(pick), to, dead)

    @precondition(lambda self: self.moves)
    @rule(pick=picks, dead=dies)
    def commit(self, pick: int, dead: bool) -> None:
        """Any move that was ever prepared, also one that is over: then it has to be refused."""
        self._commit(self.moves[-1 - pick % len(self.moves)], dead)

    @precondition(lambda self: self.moves)
    @rule(pick=picks, dead=dies)
    def abort(self, pick: int, dead: bool) -> None:
        plane, move = self.plane, self.moves[-1 - pick % len(self.moves)]
        self._change(lambda: plane.placements.abort(move, plane.now, "t", "model"), dead)

    @rule(pick=picks, dead=dies)
    def revoke(self, pick: int, dead: bool) -> None:
        plane, name = self.plane, self._name(pick)
        if self._change(lambda: plane.placements.revoke(name, 0, plane.now, "t"), dead) is not None:
            self.seen["revoke"] += 1
        if len(self.names) > 1:
            self.names.remove(name)

    @rule(pick=picks, there=hosts, back=hosts, hears=st.sets(hosts), given_up=st.booleans())
    def there_and_back(self, pick: int, there: str, back: str, hears: set[str], given_up: bool) -> None:
        """A -> B -> A, or the way back is given up; some hear every step, the others of the end alone."""
        name, plane = self._name(pick), self.plane
        for to in (there, back):
            prepared = self._prepare(name, to)
            self._some_hear(hears)
            if prepared is not None and given_up and to == back:
                self._change(lambda move=prepared: plane.placements.abort(move, plane.now, "t", "model"))  # type: ignore[misc]
            elif prepared is not None:
                self._commit(prepared)
            self._some_hear(hears)

    def _some_hear(self, names: set[str]) -> None:
        for name in sorted(names):
            self._hear(self.agents[name])

    @rule(pick=picks, one=hosts, other=hosts, taken_back=st.booleans())
    def race(self, pick: int, one: str, other: str, taken_back: bool) -> None:
        """Two administrators move the same instance; the second may take the first's move back. One of them at most has it."""
        name, plane = self._name(pick), self.plane
        first = self._prepare(name, one)
        if taken_back and first is not None:
            self._change(lambda: plane.placements.take_back(name, 0, plane.now, "other"))
        second = self._prepare(name, other)
        won = [m for m in (first, second) if m is not None and self._commit(m)]
        if len(won) > 1:
            raise Violation("one owner", f"both movers of {name} were told that they had moved it")

    # ---- the network

    def _hear(self, agent: Agent, most: int = 64) -> None:
        while agent.queue and most > 0:
            self.now += 1
            most -= 1
            agent.receive(agent.queue.pop(0), self.now)

    @rule(host=hosts, most=st.integers(1, 8))
    def deliver(self, host: str, most: int) -> None:
        """Some of what is on its way; the rest is held back."""
        self._hear(self.agents[host], most)

    @rule(host=hosts)
    def reconnect(self, host: str) -> None:
        """What was on its way is lost."""
        self._connect(self.agents[host])

    @rule(host=hosts, source=hosts, pick=picks)
    def replay(self, host: str, source: str, pick: int) -> None:
        """A frame from any time, to any host, comes once more."""
        archive = self.agents[source].archive
        self._replay(self.agents[host], archive[pick % len(archive)])

    @rule(host=hosts, now=st.booleans())
    def replay_the_first(self, host: str, now: bool) -> None:
        """The first whole set comes once more: of all, or (`now`) of the timeline served now."""
        timeline = f'"timeline":"{self.plane.store.timeline}"'.encode() if now else b""
        sets = (line for line in self.agents[host].archive if line.startswith(b'{"kind":"snapshot"'))
        if line := next((line for line in sets if timeline in line[:200]), None):
            self._replay(self.agents[host], line)

    def _replay(self, agent: Agent, line: bytes) -> None:
        self.seen["replay"] += 1
        self.now += 1
        agent.receive(line, self.now)

    @rule(host=hosts, pick=picks)
    def splice(self, host: str, pick: int) -> None:
        """Somebody in between has the newest heartbeat, and puts the oldest record of an instance under it."""
        agent, machine = self.agents[host], self.agents[host].machine
        told = sorted(k for k in machine.objects if k.startswith("placement/"))
        if machine.position is None or machine.position.timeline != self.plane.store.timeline or not told:
            return
        key = told[pick % len(told)]
        old = next(e for e, said in self.truth.envelopes.items()
                   if isinstance(said, PlacementRecord) and said.state == "active" and key == f"placement/{said.name}/{said.instance}")  # fmt: skip
        objects = {**machine._received, key: old}
        beat = self.plane.feed._heartbeat(self.now)
        made = Snapshot(timeline=machine.position.timeline, revision=self.plane.feed.revision, objects=objects,
                        hash=state_hash(objects), heartbeat=beat)  # fmt: skip
        self.seen["splice"] += 1
        agent.receive(made.model_dump_json().encode(), self.now)
        self.seen["kept"] += key in machine.refused

    @rule()
    def beat(self) -> None:
        self._change(self.plane.tick)
        frame, names = self.plane.feed.beat(self.now)
        for name in names:
            self._send(self.agents[name], b"".join(frame))

    # ---- crashes and restores

    @rule(host=hosts)
    def agent_crash(self, host: str) -> None:
        self.seen["agent crash"] += 1
        self.agents[host].start(self.now)

    @rule(host=hosts, written=st.integers(0, 2), most=st.integers(1, 8))
    def agent_crash_in_a_write(self, host: str, written: int, most: int) -> None:
        """It dies after so many of its files are written."""
        agent, left = self.agents[host], [written]
        if not agent.queue:
            self._connect(agent)

        def dying(path: Path, content: bytes) -> None:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            write_secret(path, content)

        with patch.object(mesh.state, "write_secret", dying), suppress(Crash):
            self._hear(agent, most)
            return
        self.seen["write crash"] += 1
        agent.start(self.now)

    @rule()
    def ca_crash(self) -> None:
        self.seen["ca crash"] += 1
        self._down()
        self._open()

    @precondition(lambda self: len(self.backups) < 3)
    @rule()
    def take_backup(self) -> None:
        self.now += 1
        target = self.dir / f"backup-{len(self.backups)}.db"
        backup(self.dir / "ca", target, self.now)
        self.backups.append(target)

    @rule(pick=picks, heard=st.booleans())
    def put_back(self, pick: int, heard: bool) -> None:
        """The database is lost, and a backup put in its place, on a new timeline."""
        if heard:
            for agent in self.agents.values():
                self._hear(agent)
        self._down()
        self.now += 2
        real, truth = Plane.over, self.truth

        def watched(*args: Any, **more: Any) -> Plane:
            plane = real(*args, **more)
            truth.watch(plane)
            return plane

        with patch.object(ca.backup.Plane, "over", watched):
            restore(self.dir / "ca", self.backups[pick % len(self.backups)], self.now, new_timeline=True)
        self.seen["restore"] += 1
        self._open()
        rows = [r for r in self.plane.placements.all() if r.state != "revoked"]
        self.names = sorted({r.name for r in rows}) or self.names

    # ---- what holds

    @rule()
    def everybody_hears(self) -> None:
        self._settle()

    def _settle(self) -> None:
        """Everybody connects and hears everything: then all have what the database says, tombstones as well."""
        fresh = Mirror(self.plane.store)
        fresh.load(self.now)
        for agent in self.agents.values():
            truth = dict(fresh.world.view(agent.name).objects)
            for _ in range(ROUNDS):
                self._connect(agent)
                self._hear(agent)
                if agent.turn is not None and agent.machine.received_hash == state_hash(truth):
                    break
            wrong = sorted({k for k, _ in agent.machine._received.items() ^ truth.items()})
            wrong += sorted(agent.machine.refused)
            wrong += [k for k in truth if k.startswith("placement/") and agent.machine.objects.get(k) != truth[k]]
            wrong += [k for k in agent.machine.objects if k not in truth]
            if wrong:
                raise Violation("converged", f"{agent.name} and the database differ in {wrong}")
        self.seen["settled"] += 1

    @invariant()
    def promises(self) -> None:
        for agent in self.agents.values():
            self.truth.acts(agent)
