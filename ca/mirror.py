"""The registry's state in memory, kept in step with the store by reading its change log in commit order.

A row that cannot be used (an unreadable label, a policy this program cannot compile) leaves what was known of it in
force, is reported and tried again; everything else goes on.

Where a row says something else than the record that was signed for it, the record counts and an alarm is raised: labels,
holder and policy decide who is told of whom, and whoever writes in the database is not to decide that. A record that does
not hold at all is shown as it is: endpoints refuse it and keep what they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Final, TypeVar

import structlog
from sqlalchemy import Connection, RowMapping, bindparam, select

from ca import recovery, schema
from ca.desk import Opener
from ca.policies import InForce, PolicyRow, newest_raw, parse_row
from ca.rows import EndpointRow, InstanceRow
from ca.scope import EndpointFact, InstanceFact, Touched, World
from ca.store import Store
from identity.errors import Bug, NotVerified
from identity.records import P, PlacementRecord, PolicyRecord
from policy.program import Subject
from policy.rollout import Staged

log = structlog.get_logger("retinue.ca.mirror")

BUNDLE = "bundle"  # the name in `meta` as well
_ENDPOINT: Final = select(schema.endpoints).where(schema.endpoints.c.name == bindparam("name"))
_INSTANCE: Final = select(schema.instances).where(
    schema.instances.c.name == bindparam("name"), schema.instances.c.instance == bindparam("instance")
)
_HOLDERS: Final = select(schema.holdings.c.endpoint).where(
    schema.holdings.c.name == bindparam("name"), schema.holdings.c.instance == bindparam("instance")
)
Thing = tuple[str, str]  # (kind, key) of the change log
R = TypeVar("R", PolicyRow, InstanceRow)


class Mirror:
    """`world` is at `revision`. `broken` names rows that could not be used, with the reason."""

    def __init__(self, database: Store, opener: Opener | None = None) -> None:
        self._store = database
        self._open = opener  # verifies records; None: rows are believed
        self.contradicted: dict[Thing, str] = {}  # rows that differ from what was signed for them, with how
        self.world = World()
        self.revision = 0
        self.broken: dict[Thing, str] = {}
        self.in_force: InForce | None = None
        self._loaded: tuple[tuple[str, str | None], Staged] | None = None  # ((digest, trial), policy)

    def load(self, now: int) -> None:
        """Read everything, once. Raises BadState or Unreachable when the store cannot be read."""
        with self._store.read() as tx:
            self.revision = self._store.revision(tx)
            things: list[Thing] = [(BUNDLE, BUNDLE)]
            things += [("federation", name) for name in tx.execute(select(schema.federations.c.trust_domain)).scalars()]
            things += [("endpoint", name) for name in tx.execute(select(schema.endpoints.c.name)).scalars()]
            columns = schema.instances.c
            things += [
                ("instance", f"{n}/{i}") for n, i in tx.execute(select(columns.name, columns.instance))
            ]
            # The policy last: what a grant ends with must be known.
            self._apply(tx, [*things, ("policy", "policy")], now)

    def catch_up(self, now: int) -> Touched:
        """Apply every change committed since. Raises when the store cannot be read: then nothing has changed here."""
        with self._store.read() as tx:
            revision = self._store.revision(tx)
            if revision == self.revision and not self.broken:
                return Touched()
            things = dict.fromkeys((c.kind, c.key) for c in self._store.changes_after(tx, self.revision))
            touched = self._apply(tx, [*self.broken, *things], now)
        self.revision = revision
        return touched

    def _apply(self, tx: Connection, things: list[Thing], now: int) -> Touched:
        out = Touched()
        if self._ends_with(things) is not None and ("policy", "policy") not in things:
            things = [*things, ("policy", "policy")]
        steps = [
            (thing, step)
            for thing in dict.fromkeys(things)
            if (step := self._read(tx, thing, now)) is not None
        ]
        for thing, step in steps:
            try:
                out.merge(step())
                self.broken.pop(thing, None)
            except Exception as e:
                self._report(thing, e)
        return out

    def _ends_with(self, things: list[Thing]) -> str | None:
        """A changed workload that a grant ends with: then the program may be another now."""
        if self.in_force is None:
            return None
        policies = (self.in_force.policy, *([self.in_force.trial] if self.in_force.trial is not None else []))
        ends = {g.ends_with for policy in policies for g in policy.grants if g.ends_with is not None}
        return next(
            (
                key.rpartition("/")[0]
                for kind, key in things
                if kind == "instance" and key.rpartition("/")[0] in ends
            ),
            None,
        )

    def _policy_as_signed(self, row: PolicyRow) -> PolicyRow:
        said = self._signed(PolicyRecord, row.record, ("policy", "policy"))
        if said is None:
            return row
        trial = None if said.trial is None else said.trial.model_dump_json()
        true = replace(row, digest=said.digest, files=[(f.name, f.text) for f in said.files], trial=trial)
        return self._compare(("policy", "policy"), row, true)

    def _instance(self, found: RowMapping) -> InstanceRow:
        """Where its labels are no longer readable, its record still has them. Raises ValueError where it has none that holds."""
        try:
            row = InstanceRow.of(found)
            if isinstance(row.labels, dict):
                return row
            raise ValueError("labels are a JSON object")
        except ValueError:
            said = self._signed(PlacementRecord, found["placement"], ("instance", f"{found['name']}/{found['instance']}"))
            if said is None or (said.name, said.instance) != (found["name"], found["instance"]):
                raise
            return InstanceRow.of({**found, "labels": "{}"})

    def _instance_as_signed(self, row: InstanceRow) -> InstanceRow:
        thing = ("instance", row.key)
        said = self._signed(PlacementRecord, row.placement, thing)
        if said is None or (said.name, said.instance) != (row.name, row.instance):
            return row
        held = said.state == "active"
        state = row.state if held == (row.state in {"active", "moving"}) else "active" if held else "unplaced"
        true = replace(row, labels=dict(said.labels), spiffe_id=said.spiffe_id, state=state, endpoint=said.endpoint if held else None)
        return self._compare(thing, replace(row, labels=dict(row.labels)), true)

    def _signed(self, kind: type[P], envelope: str | None, thing: Thing) -> P | None:
        if self._open is None or envelope is None:
            return None
        try:
            return self._open(kind, envelope)
        except NotVerified as e:
            self._alarm(thing, f"its record does not hold: {e.message}")
            return None

    def _compare(self, thing: Thing, row: R, true: R) -> R:
        if row == true:
            self.contradicted.pop(thing, None)
        else:
            names = [f.name for f in fields(row) if getattr(row, f.name) != getattr(true, f.name)]
            self._alarm(thing, f"{', '.join(names)} not as signed")
        return true

    def _alarm(self, thing: Thing, why: str) -> None:
        if self.contradicted.get(thing) != why:
            log.critical("the database contradicts what was signed; the record counts", kind=thing[0], key=thing[1], why=why)
        self.contradicted[thing] = why

    def _set_policy(self, row: PolicyRow, now: int) -> Touched:
        # Loading a policy is the dear part: only a new revision is loaded.
        key = (row.digest, row.trial)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = key, row.staged()
        policy, record = self._loaded[1], row.record
        running = {fact.subject.name for fact in self.world.instances.values() if not fact.revoked}
        in_force = InForce.at(policy, now, running)
        same = self.world.policy == record and self.world.program == in_force.program
        touched = Touched() if same else self.world.set_policy(record, in_force.program)
        self.in_force = in_force
        return touched

    def _read(self, tx: Connection, thing: Thing, now: int) -> Callable[[], Touched] | None:
        """Read one thing; the returned step applies it. An error of the store itself is raised, not recorded."""
        kind, key = thing
        world = self.world
        match kind:
            case "bundle":
                envelope = self._store.get(tx, BUNDLE)
                return None if envelope is None else lambda: world.set_bundle(envelope)
            case "policy":
                row = newest_raw(tx)
                return None if row is None else lambda: self._set_policy(self._policy_as_signed(parse_row(row)), now)
            case "federation":
                found = tx.execute(
                    select(schema.federations.c.record).where(schema.federations.c.trust_domain == key)
                ).scalar_one_or_none()
                return lambda: world.set_foreign(key, found)
            case "endpoint":
                raw = tx.execute(_ENDPOINT, {"name": key}).mappings().one()
                out = recovery.quarantined(tx, key)
                return lambda: world.set_endpoint(endpoint_fact(EndpointRow.of(raw), out=out))
            case "instance":
                name, _, number = key.rpartition("/")
                which = {"name": name, "instance": int(number)}
                found = tx.execute(_INSTANCE, which).mappings().one()
                former = tx.execute(_HOLDERS, which).scalars().all()
                return lambda: world.set_instance(instance_fact(self._instance_as_signed(self._instance(found)), frozenset(former)))
        raise Bug("change.kind", f"a change of unknown kind {kind!a}")

    def _report(self, thing: Thing, e: Exception) -> None:
        why = f"{type(e).__name__}: {e}"
        if self.broken.get(thing) != why:
            log.error(
                "a row cannot be used; what was known of it stays", kind=thing[0], key=thing[1], why=why
            )
        self.broken[thing] = why


def endpoint_fact(row: EndpointRow, *, out: bool = False) -> EndpointFact:
    """A revoked endpoint has no record to show, nor has one in quarantine."""
    if out:
        return EndpointFact(row.name, None)
    living = row.state == "enrolled"
    return EndpointFact(row.name, row.record if living else None, row.entries if living else None)


def instance_fact(row: InstanceRow, held: frozenset[str]) -> InstanceFact:
    """`held` are all endpoints that ever held the instance."""
    here = {row.endpoint, row.target}
    return InstanceFact(
        row.key, Subject(row.name, dict(row.labels), row.spiffe_id), row.state == "revoked", row.endpoint, row.target,
        held - here, row.placement, row.prepare,
    )  # fmt: skip
