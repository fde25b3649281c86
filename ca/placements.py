"""Workloads, their instances and where they are: one row an instance, changed by compare-and-swap of (epoch, holder).

    unplaced --place--> active --prepare--> moving --commit--> active
        ^                 |                   `--abort--> active (or unplaced)
        `--holder revoked-'            any of them --revoke--> revoked (final)

Every signed record of an instance takes a new epoch, also a prepare that is aborted, so no epoch is ever signed twice.
Overlay addresses are given once and kept for life.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, CursorResult, insert, select, update

from ca import audit, rows, schema, transparency
from ca.contradiction import check_endpoint, check_instance, contradiction
from ca.desk import Desk
from ca.life import end_of
from ca.rows import EndpointRow, InstanceRow
from identity.errors import Bug, Conflict, NotVerified, Refused
from identity.labels import check_labels
from identity.names import SpiffeId
from identity.records import PlacementRecord, unverified
from identity.wire.admin import WorkloadAdd, WorkloadLife


@dataclass(frozen=True, slots=True)
class Prepared:
    """A move that is being made ready; `revision` is the position of its prepare record."""

    instance: InstanceRow
    holder: str | None
    target: str
    revision: int


def check_open(host: EndpointRow) -> None:
    """Raise Conflict ``host.draining`` for a host that nothing new may come to."""
    if host.draining is not None:
        raise Conflict("host.draining", f"{host.name} is being drained", hint=f"retinue-ca host undrain {host.name}")


class Placements:
    """Transactions over workloads and instances. `now` is seconds since the epoch, `actor` goes to the audit."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    # ---- reading

    def all(self) -> list[InstanceRow]:
        """All instances, by name and number."""
        with self._desk.store.read() as tx:
            return rows.instances(tx)

    def get(self, name: str, instance: int) -> InstanceRow:
        """Raises NotFound."""
        with self._desk.store.read() as tx:
            return rows.instance(tx, name, instance)

    # ---- creating

    def add(self, request: WorkloadAdd, now: int, actor: str) -> InstanceRow:
        """Create an instance and, when a host is named, place it there.

        Raises Conflict ``workload.exists`` when the name is taken and `replica` is not asked for; BadInput, NotFound
        and Refused for a bad name, label or host.
        """
        with self._desk.store.write() as tx:
            return self.add_in(tx, request, now, actor)

    def add_in(self, tx: Connection, request: WorkloadAdd, now: int, actor: str) -> InstanceRow:
        """`add` inside a transaction of the caller."""
        spiffe_id = str(SpiffeId.workload(self._desk.trust_domain, request.name))
        labels = check_labels(request.labels)
        siblings = rows.instances(tx, name=request.name)
        fence = request.fence
        ends_at, ends_with = end_of(
            tx, now, request.name, ends_at=request.ends_at, ends_in=request.ends_in, ends_with=request.ends_with
        )
        if siblings:
            labels = self._replica_labels(request, siblings, labels)
            fence = siblings[0].fence
        number = siblings[-1].instance + 1 if siblings else 0
        overlay = self._desk.store.take_number(tx, "overlay_next")
        self._desk.trust_domain.overlay(overlay)  # raises when the range is used up
        tx.execute(
            insert(schema.instances).values(
                name=request.name, instance=number, spiffe_id=spiffe_id, labels=json.dumps(labels), fence=fence,
                overlay=overlay, state="unplaced", epoch=0, epoch_top=self._desk.store.floor(tx), created=now,
                ends_at=ends_at, ends_with=ends_with,
            )
        )  # fmt: skip
        row = rows.instance(tx, request.name, number)
        if request.host is not None:
            target = rows.living_endpoint(tx, request.host)
            check_open(target)
            row = self.place(tx, row, target, now)
        else:
            self._log(tx, row, now)
        life: dict[str, Any] = {k: v for k, v in (("ends_at", ends_at), ("ends_with", ends_with)) if v is not None}
        audit.append(tx, now, actor, "workload.add", row.key, host=request.host, labels=labels, **life)
        return row

    @staticmethod
    def _replica_labels(
        request: WorkloadAdd, siblings: list[InstanceRow], labels: dict[str, str]
    ) -> dict[str, str]:
        first = siblings[0]
        if not request.replica:
            raise Conflict(
                "workload.exists",
                f"there is a workload named {request.name}",
                hint="add another instance of it with --replica",
            )
        if labels and labels != dict(first.labels):
            raise Conflict(
                "workload.labels",
                f"the instances of {request.name} share their labels, and these differ",
                hint="leave --label out",
            )
        return dict(first.labels)

    def set_life(self, request: WorkloadLife, now: int, actor: str) -> InstanceRow:
        """Give an instance another end, or none, and publish it at the next epoch.

        Raises NotFound, BadInput ``lease.*``, Refused for a revoked one, Conflict while it is being moved.
        """
        with self._desk.store.write() as tx:
            row = rows.instance(tx, request.name, request.instance)
            if row.state == "revoked":
                raise Refused("workload.revoked", f"{row.key} is over, which is final", hint="add a new instance with --replica")
            if row.state == "moving":
                raise Conflict("move.running", f"{row.key} is being moved to {row.target}", hint="wait for it to end")
            ends_at, ends_with = end_of(
                tx, now, request.name, ends_at=request.ends_at, ends_in=request.ends_in, ends_with=request.ends_with
            )
            check_instance(self._desk, row)
            self._swap(tx, row, now, ends_at=ends_at, ends_with=ends_with)
            row = rows.instance(tx, row.name, row.instance)
            if row.endpoint is not None:
                row = self.place(tx, row, rows.endpoint(tx, row.endpoint), now)
            else:
                self._log(tx, row, now)
            audit.append(tx, now, actor, "workload.life", row.key, ends_at=ends_at, ends_with=ends_with, epoch=row.epoch)
            return row

    # ---- placing inside a transaction of the caller

    def place(self, tx: Connection, row: InstanceRow, target: EndpointRow, now: int) -> InstanceRow:
        """Make `target` the holder at a new epoch. Compare-and-swap on (epoch, holder). Raises Conflict."""
        self._suits(row, target)
        check_instance(self._desk, row, life=False)
        epoch = row.epoch_top + 1
        self._swap(
            tx, row, now, state="active", endpoint=target.name, epoch=epoch, epoch_top=epoch, target=None, target_epoch=None,
            prepare=None, mover=None, placement=self._record(row, target, epoch, "active", now),
        )  # fmt: skip
        self._hold(tx, row, target.name)
        self._log(tx, row, now)
        return rows.instance(tx, row.name, row.instance)

    def withdraw(self, tx: Connection, row: InstanceRow, now: int, *, final: bool) -> InstanceRow:
        """Publish that nobody holds the instance. `final`: it is revoked for ever; else it may be placed again."""
        values: dict[str, Any] = {"state": "revoked" if final else "unplaced", "endpoint": None, "target": None,
                                  "target_epoch": None, "prepare": None, "mover": None}  # fmt: skip
        # A never placed instance has no record that anybody would have to be told about.
        if row.endpoint is not None and row.placement is not None:
            # Taking a place away has to work whatever became of the row: what was signed is said again, as revoked.
            epoch = row.epoch_top + 1
            values |= {"epoch": epoch, "epoch_top": epoch, "placement": self._desk.sign(self._gone(row, row.placement, epoch, now))}
        self._swap(tx, row, now, **values)
        self._log(tx, row, now)
        return rows.instance(tx, row.name, row.instance)

    def _gone(self, row: InstanceRow, envelope: str, epoch: int, now: int) -> PlacementRecord:
        """What an envelope of a row said, as revoked and of that instance: whoever wrote the row has nothing else signed.

        Raises BadState ``store.contradiction`` when it cannot be read at all.
        """
        try:
            said = unverified(PlacementRecord, envelope, trust_domain=str(self._desk.trust_domain))
        except NotVerified as e:
            raise contradiction(row.key, f"its record cannot be read: {e.message}") from None
        name = {"name": row.name, "instance": row.instance, "spiffe_id": str(SpiffeId.workload(self._desk.trust_domain, row.name))}
        return said.model_copy(update={**name, "epoch": epoch, "state": "revoked", "issued": now})

    def resign(self, tx: Connection, row: InstanceRow, now: int) -> InstanceRow:
        """Publish the same placement anew, after its holder enrolled again with another tunnel key."""
        if row.endpoint is None:
            raise Bug("placement.holder", f"nobody holds {row.key}, so there is nothing to sign again")
        check_instance(self._desk, row)
        return self.place(tx, row, rows.endpoint(tx, row.endpoint), now)

    def sign_anew(self, tx: Connection, row: InstanceRow, now: int) -> None:
        """Publish what the newest record of an instance says at the next epoch, whoever holds it or held it last."""
        if row.endpoint is not None:
            self.resign(tx, row, now)
        elif row.placement is not None:
            epoch = row.epoch_top + 1
            record = self._gone(row, row.placement, epoch, now)
            self._swap(tx, row, now, epoch=epoch, epoch_top=epoch, placement=self._desk.sign(record))
            self._log(tx, row, now)

    # ---- moving

    def prepare(self, name: str, instance: int, to: str, now: int, actor: str) -> Prepared:
        """Publish that a move to `to` is being made ready. Nothing is accepted from there yet.

        Raises NotFound, Refused for a revoked host or workload, Conflict for its present holder or a running move.
        """
        with self._desk.store.write() as tx:
            row, target = self._movable(tx, name, instance, to)
            check_instance(self._desk, row)
            epoch = row.epoch_top + 1
            self._swap(
                tx, row, now, state="moving", epoch_top=epoch, target=target.name, target_epoch=epoch,
                mover=self._desk.process,
                prepare=self._record(row, target, epoch, "prepare", now),
            )  # fmt: skip
            revision = self._log(tx, row, now)
            audit.append(tx, now, actor, "workload.prepare", row.key, holder=row.endpoint, to=to, epoch=epoch)
            return Prepared(rows.instance(tx, name, instance), row.endpoint, target.name, revision)

    def plan(self, name: str, instance: int, to: str) -> InstanceRow:
        """Check a move without making it ready. Raises as `prepare`."""
        with self._desk.store.read() as tx:
            return self._movable(tx, name, instance, to)[0]

    def commit(self, move: Prepared, now: int, actor: str, **detail: Any) -> tuple[InstanceRow, int]:
        """The compare-and-swap that decides the move. Raises Conflict when anything changed since `prepare`."""
        with self._desk.store.write() as tx:
            row = self._still(tx, move)
            check_instance(self._desk, row)
            target = rows.living_endpoint(tx, move.target)
            epoch = row.target_epoch
            if epoch is None or epoch != row.epoch_top:
                raise Bug("placement.epoch", f"{row.key} was given another epoch than the one prepared for it")
            self._swap(
                tx, row, now, state="active", endpoint=target.name, epoch=epoch, target=None, target_epoch=None, prepare=None,
                mover=None, placement=self._record(row, target, epoch, "active", now),
            )  # fmt: skip
            self._hold(tx, row, target.name)
            revision = self._log(tx, row, now)
            audit.append(
                tx,
                now,
                actor,
                "workload.move",
                row.key,
                holder=move.holder,
                to=target.name,
                epoch=epoch,
                **detail,
            )
            return rows.instance(tx, row.name, row.instance), revision

    def abort(self, move: Prepared, now: int, actor: str, why: str) -> InstanceRow:
        """Take the prepare record back; the placement stays as it is. Raises Conflict when the move is no more."""
        with self._desk.store.write() as tx:
            return self._abort(tx, self._still(tx, move), now, actor, why)

    def take_back(self, name: str, instance: int, now: int, actor: str) -> tuple[InstanceRow, int]:
        """Abort the move of an instance that is being made ready; the placement stays as it is.

        Returns the row and the epoch that is given up. Raises NotFound, Conflict ``move.none``.
        """
        with self._desk.store.write() as tx:
            row = rows.instance(tx, name, instance)
            if row.state != "moving" or row.target_epoch is None:
                raise Conflict("move.none", f"{row.key} is not being moved", hint="see: retinue-ca workload list")
            return self._abort(tx, row, now, actor, "asked"), row.target_epoch

    def abort_left(self, now: int, living: Collection[str] = (), running: Collection[str] = ()) -> int:
        """Moves that were left half-way: of processes that are not `living`, and ours that are not `running`. How many.

        One of ours is left when the store failed at its commit and again when it was to be taken back.
        """

        def left(tx: Connection) -> list[InstanceRow]:
            moving = rows.instances(tx, state="moving")
            return [r for r in moving if r.mover not in living or (r.mover == self._desk.process and r.key not in running)]

        with self._desk.store.read() as tx:
            if not left(tx):
                return 0
        with self._desk.store.write() as tx:
            found = left(tx)
            for row in found:
                self.give_up(tx, row, now, "restart")
            return len(found)

    def give_up(self, tx: Connection, row: InstanceRow, now: int, why: str) -> InstanceRow:
        """Abort whatever move of the instance is being made ready, inside the caller's transaction."""
        return self._abort(tx, row, now, "ca", why)

    def _abort(self, tx: Connection, row: InstanceRow, now: int, actor: str, why: str) -> InstanceRow:
        state = "unplaced" if row.endpoint is None else "active"
        self._swap(tx, row, now, state=state, target=None, target_epoch=None, prepare=None, mover=None)
        self._log(tx, row, now)
        audit.append(tx, now, actor, "workload.abort", row.key, why=why)
        return rows.instance(tx, row.name, row.instance)

    # ---- revoking

    def revoke(self, name: str, instance: int, now: int, actor: str) -> InstanceRow:
        """Revoke one instance for ever. Idempotent. Raises NotFound."""
        with self._desk.store.write() as tx:
            row = rows.instance(tx, name, instance)
            if row.state == "revoked":
                return row
            row = self.withdraw(tx, row, now, final=True)
            audit.append(tx, now, actor, "workload.revoke", row.key, epoch=row.epoch)
            return row

    def leave(self, tx: Connection, endpoint: str, now: int) -> list[str]:
        """Withdraw all that an endpoint holds or is about to hold, inside the transaction that revokes it."""
        held = rows.instances(tx, endpoint=endpoint)
        for row in held:
            self.withdraw(tx, row, now, final=False)
        for row in rows.instances(tx, target=endpoint):
            self.give_up(tx, row, now, "target revoked")
        return [row.key for row in held]

    # ---- inside

    def _movable(self, tx: Connection, name: str, instance: int, to: str) -> tuple[InstanceRow, EndpointRow]:
        row = rows.instance(tx, name, instance)
        target = rows.living_endpoint(tx, to)
        if row.state == "moving":
            raise Conflict(
                "move.running", f"{row.key} is being moved to {row.target}", hint="wait for it to end"
            )
        if row.endpoint == to:
            raise Conflict("move.same", f"{row.key} is on {to} already")
        check_open(target)
        self._suits(row, target)
        return row, target

    def _still(self, tx: Connection, move: Prepared) -> InstanceRow:
        row = rows.instance(tx, move.instance.name, move.instance.instance)
        before = move.instance
        if (row.state, row.epoch, row.endpoint, row.target, row.target_epoch) != (
            "moving", before.epoch, move.holder, move.target, before.target_epoch,
        ):  # fmt: skip
            raise Conflict(
                "move.lost",
                f"{row.key} was changed while it was being moved",
                hint="see: retinue-ca workload list",
            )
        return row

    @staticmethod
    def _suits(row: InstanceRow, target: EndpointRow) -> None:
        if row.state == "revoked":
            raise Refused(
                "workload.revoked",
                f"{row.key} was revoked, which is final",
                hint="add a new instance with --replica",
            )
        if target.kind == "sidecar" and target.workload != row.name:
            raise Conflict(
                "workload.sidecar", f"{target.name} is the sidecar of {target.workload}, not of {row.name}"
            )

    def _record(
        self,
        row: InstanceRow,
        holder: EndpointRow,
        epoch: int,
        state: Literal["prepare", "active", "revoked"],
        now: int,
    ) -> str:
        check_endpoint(self._desk, holder)
        return self._desk.sign(
            PlacementRecord(
                trust_domain=str(self._desk.trust_domain), spiffe_id=row.spiffe_id, name=row.name, instance=row.instance,
                endpoint=holder.name, tunnel_key=holder.tunnel_key, epoch=epoch, state=state,
                addresses=row.addresses(self._desk.trust_domain), labels=dict(row.labels), fence=row.fence, issued=now,
                ends=row.ends_at,
            )
        )  # fmt: skip

    @staticmethod
    def _swap(tx: Connection, row: InstanceRow, now: int, **values: Any) -> None:
        """The compare-and-swap: nothing is written unless the row is as it was read. Raises Conflict.

        What it publishes goes to the ledger.
        """
        c = schema.instances.c
        result: CursorResult[Any] = tx.execute(
            update(schema.instances)
            .where(c.name == row.name, c.instance == row.instance, c.state == row.state, c.epoch == row.epoch,
                   c.epoch_top == row.epoch_top, c.endpoint.is_not_distinct_from(row.endpoint),
                   c.target.is_not_distinct_from(row.target))
            .values(**values)
        )  # fmt: skip
        if result.rowcount != 1:
            raise Conflict("placement.changed", f"{row.key} was changed by someone else", hint="try again")
        for published in ("placement", "prepare"):
            if values.get(published) is not None:
                transparency.record(tx, now, "placement", row.key, values[published])

    @staticmethod
    def _hold(tx: Connection, row: InstanceRow, endpoint: str) -> None:
        key = {"endpoint": endpoint, "name": row.name, "instance": row.instance}
        known = select(schema.holdings.c.endpoint).filter_by(**key)
        if tx.execute(known).first() is None:
            tx.execute(insert(schema.holdings).values(**key))

    def _log(self, tx: Connection, row: InstanceRow, now: int) -> int:
        return self._desk.store.log(tx, now, "instance", row.key)
