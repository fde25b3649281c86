"""What must hold, whatever happens: looked at from outside, with what was signed as the only truth."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from identity import certs
from identity.records import Heartbeat, PlacementRecord, PolicyRecord
from mesh.acceptance import placement_body

if TYPE_CHECKING:
    from tests.sim.agent import SimAgent


class Violation(AssertionError):
    """A promise was broken; `promise` names it."""

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise = promise


class Ledger:
    """Ghosts: everything ever signed, and the most that every agent ever had in force."""

    def __init__(self) -> None:
        self.owners: dict[tuple[str, int, int], tuple[str, str]] = {}  # (name, instance, epoch) -> (holder, body)
        self.addresses: dict[tuple[str, str], set[int]] = {}  # (address, tunnel key) -> epochs signed active
        self.allowed: dict[str, frozenset[tuple[str, str]]] = {}  # policy digest -> role pairs
        self.revisions: dict[int, str] = {}
        self.serials: set[int] = set()
        self.timelines: dict[str, int] = {}
        self.in_force: dict[tuple[str, str], int] = {}  # (agent, instance) -> highest epoch persisted and in force
        self.positions: dict[tuple[str, str], int] = {}  # (agent, timeline) -> highest revision persisted
        self.checks = 0

    @staticmethod
    def policy(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """A policy that permits exactly these pairs of roles; its text names them for `signed`."""
        rules = "".join(f"      - {{id: {a}-{b}, from: {{role: {a}}}, to: {{role: {b}}}, on: tcp/1}}\n" for a, b in pairs)
        body = f"segments:\n  - name: s\n    allow:\n{rules}" if rules else ""
        return [("p.yaml", f"meshpolicy: 1\n{body}")]

    # ---- what is signed

    def signed(self, payload: Any) -> None:
        match payload:
            case PlacementRecord():
                self._placement(payload)
            case PolicyRecord():
                text = payload.files[0].text
                ids = [line.split("id: ")[1].split(",")[0] for line in text.splitlines() if "id: " in line]
                self.allowed[payload.digest] = frozenset((i.split("-")[0], i.split("-")[1]) for i in ids)
                if self.revisions.setdefault(payload.revision, payload.digest) != payload.digest:
                    raise Violation("policy revision", f"{payload.revision} was signed for two policies")
            case Heartbeat():
                if payload.revision < self.timelines.get(payload.timeline, 0):
                    raise Violation("revision", f"a heartbeat goes back to {payload.revision} in {payload.timeline}")
                self.timelines[payload.timeline] = payload.revision

    def _placement(self, record: PlacementRecord) -> None:
        key = (record.name, record.instance, record.epoch)
        holder, body = self.owners.setdefault(key, (record.endpoint, placement_body(record)))
        if holder != record.endpoint:
            raise Violation("one owner", f"epoch {record.epoch} of {record.name}/{record.instance} was signed for {holder} and for {record.endpoint}")
        # A prepare and its commit share an epoch; nothing else does.
        if body != placement_body(record):
            plain = record.model_copy(update={"state": "prepare"})
            if placement_body(plain) != body:
                raise Violation("epoch", f"epoch {record.epoch} of {record.name}/{record.instance} was signed twice, with different words")
            self.owners[key] = (holder, placement_body(record))
        if record.state == "active":
            for address in record.addresses:
                self.addresses.setdefault((address, record.tunnel_key), set()).add(record.epoch)

    def certificate(self, chain: list[str]) -> None:
        serial = certs.parse_chain(chain)[0].serial_number
        if serial in self.serials:
            raise Violation("serial", f"{serial:x} was given out twice")
        self.serials.add(serial)

    # ---- what an agent does

    def persisted(self, agent: SimAgent) -> None:
        here = agent.machine.position
        if here is not None:
            key = (agent.name, here.timeline)
            if here.revision < self.positions.get(key, 0):
                raise Violation("revision", f"{agent.name} goes back from {self.positions[key]} to {here.revision}")
            self.positions[key] = here.revision
        for key, mark in agent.machine.marks.items():
            self.in_force[agent.name, key] = max(mark.number, self.in_force.get((agent.name, key), 0))

    def restarted(self, agent: SimAgent) -> None:
        here = agent.machine.position
        if here is not None and here.revision < self.positions.get((agent.name, here.timeline), 0):
            raise Violation("revision", f"{agent.name} came back at {here.revision}, behind what it had on disk")

    def agent(self, agent: SimAgent) -> None:
        """After every event. Epochs never go back; what is let through was signed and is permitted; no stale strict ones."""
        if not agent.up or agent.plan is None:
            return
        self.checks += 1
        snapshot = agent.view.snapshot
        for key, record in snapshot.placements.items():
            if record.epoch < self.in_force.get((agent.name, key), 0):
                raise Violation("epoch", f"{agent.name} has epoch {record.epoch} of {key} in force after {self.in_force[agent.name, key]}")
        epochs = {a: r.epoch for r in snapshot.placements.values() if r.state == "active" for a in r.addresses}
        owner: dict[str, str] = {}
        for tunnel_key, peer in agent.peers.items():
            for allowed in peer.allowed_ips:
                address = allowed.partition("/")[0]
                if owner.setdefault(address, tunnel_key) != tunnel_key:
                    raise Violation("one owner", f"{agent.name} takes {address} from two peers")
                if epochs.get(address) not in self.addresses.get((address, tunnel_key), set()):
                    raise Violation("signed allow", f"{agent.name} takes {address} from a key that was not signed for epoch {epochs.get(address)}")
        permitted = self.allowed.get(agent.plan.policy_digest, frozenset())
        for src, dst in agent.plan.pairs:
            roles = tuple(snapshot.placements[k].labels["role"] if k in snapshot.placements else snapshot.prepares[k].labels["role"] for k in (src, dst))
            if roles not in permitted:
                raise Violation("signed allow", f"{agent.name} lets {src} talk to {dst}, which no policy in force says")
        from tests.sim.agent import LEASE

        age = agent.machine.age(agent.mono)
        if age is not None and age >= LEASE + 1.5:
            strict = [k for k, a in agent.plan.attachments.items() if a.active and (r := snapshot.placements.get(k)) is not None and r.fence == "strict"]
            if strict:
                raise Violation("lease", f"{agent.name} still serves {strict} after {age:.1f} s without a heartbeat")

    def settled(self, agent: SimAgent) -> None:
        """In the end: every permitted remote instance is reached at its own holder's key."""
        snapshot = agent.view.snapshot
        for record in snapshot.placements.values():
            if record.state == "active" and record.endpoint != agent.name:
                for tunnel_key, peer in agent.peers.items():
                    if any(a.partition("/")[0] in record.addresses for a in peer.allowed_ips) and tunnel_key != record.tunnel_key:
                        raise Violation("converged", f"{agent.name} reaches {record.name} at an old place")

    # ---- the database, seen from outside

    @staticmethod
    def placed(directory: Path) -> tuple[int, list[tuple[str, int, str]]]:
        """(newest revision, who is placed where) by the rows themselves."""
        with closing(sqlite3.connect(f"file:{directory / 'ca.db'}?mode=ro", uri=True)) as raw:
            rows = raw.execute("select name, instance, endpoint from instances where endpoint is not null").fetchall()
            return int(raw.execute("select coalesce(max(revision), 0) from changes").fetchone()[0]), rows
