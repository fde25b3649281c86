"""One host's agent in a simulated mesh: the product's machines and state directory, without sockets and tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from identity.errors import RetinueError
from mesh.compile import Compiler, LocalAttachment, LocalFacts
from mesh.devices import PeerState, after, peer_changes
from mesh.plan import Plan
from mesh.snapshot import InstanceKey
from mesh.state import StateDir
from mesh.sync import Accepted, NeedSnapshot, SyncMachine
from tests.sim.clock import EPOCH, Crash
from tests.sim.ledger import Violation
from tests.sim.template import enrolled

if TYPE_CHECKING:
    from tests.sim.world import Simulation

LEASE: Final = 30.0


class SimAgent:
    """One host's agent: its machines and its state directory. The device lives on when the agent dies, as the engine does."""

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim, self.name = sim, name
        self.state_dir = sim.dir / f"state-{name}"
        self.state_dir.mkdir(mode=0o700)
        self.trust, self.tunnel_key = enrolled[name]
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
