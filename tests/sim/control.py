"""The control plane's process in a simulated mesh: the product's Plane on real files, with a network and disasters of ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection

from ca.backup import backup, restore
from ca.plane import Plane
from identity.errors import RetinueError, Unreachable
from identity.wire.admin import WorkloadAdd
from identity.wire.enroll import SvidRequest
from identity.wire.feed import Beat, Delta, parse_frame
from tests.sim.clock import EPOCH
from tests.sim.joining import make_csr
from tests.sim.ledger import Ledger, Violation
from tests.sim.template import HOSTS, ROLES, watch

if TYPE_CHECKING:
    from tests.sim.agent import SimAgent
    from tests.sim.world import Simulation

BEAT: Final = 9.0
_statements: dict[Any, Any] = {}  # compiled SQL, kept from one simulated start to the next: it is the same program


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
