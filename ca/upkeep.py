"""What changes by the clock alone, once a heartbeat and once an hour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from ca import grant_ends, leases, membership, processes, succession
from ca.directory import NOBODY

if TYPE_CHECKING:
    from ca.plane import Plane

log = structlog.get_logger("retinue.ca")


class Upkeep:
    """Of one plane; its worker thread calls."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._lapse_at = plane.now + membership.GRACE
        self._ticked: int | None = None  # the moment `tick` acted on last

    def tick(self) -> None:
        """Once a heartbeat: what changes by the clock alone, and the log's next head."""
        plane = self._plane
        if plane.following is not None and not plane.follow_keeper(plane.following):
            return
        if plane.store.shared:
            processes.sight(plane.store, plane.process, plane.listen, plane.mirror.revision)
        living = processes.living(plane.store) if plane.store.shared else {plane.process}
        running = {key for key, count in list(plane.moving.items()) if count}  # the event loop may add one meanwhile
        plane.placements.abort_left(plane.now, living, running)
        plane.seal()
        if plane.authority.refresh(plane.clock()):
            succession.follow(plane, NOBODY)
        self.expire()
        if (rollout := plane.rollouts.tick(plane.now)) is not None:
            log.warning("a rollout goes on by itself", rollout=rollout.id, state=rollout.state, why=rollout.why)
        self.follow_grants()
        self._lapse()
        in_force = plane.mirror.in_force
        if in_force is None or in_force.until is None or self._ticked == in_force.until:
            return
        if in_force.until <= plane.now:
            self._ticked = in_force.until
            plane.policies.time_passed(plane.now)

    def _lapse(self) -> None:
        """End the membership of what was powered down for longer than the policy in force allows; looked at once a minute."""
        plane = self._plane
        in_force = plane.mirror.in_force
        if in_force is None or plane.now < self._lapse_at:
            return
        self._lapse_at = plane.now + 60
        with plane.store.read() as tx:
            if not membership.due(tx, [in_force.policy], plane.now):
                return
        with plane.store.write() as tx:
            for key in membership.lapse(tx, plane.placements, [in_force.policy], plane.now):
                log.warning("a workload was powered down for so long that it is no member any more", instance=key)

    def follow_grants(self) -> None:
        """Note which grants are live, and tell which have ended.

        At every change, not by the heartbeat alone: a grant that came and went between two beats was live as well.
        """
        plane = self._plane
        in_force = plane.mirror.in_force
        if in_force is None:
            return
        policies = [p for p in (in_force.policy, in_force.trial) if p is not None]
        if any(p.grants for p in policies):
            there = {fact.subject.name for fact in plane.mirror.world.instances.values() if not fact.revoked}
            for grant in grant_ends.follow(plane.store, policies, plane.now, there):
                log.info("a grant has ended", grant=grant)

    def maintain(self) -> None:
        """Once an hour: renew the authority's own certificates. A replica leaves that to the process it was copied from."""
        plane = self._plane
        if plane.replica:
            return
        fresh_jwt = plane.jwt.maintain(plane.clock())
        if plane.authority.maintain(plane.clock()) or fresh_jwt:
            succession.follow(plane, NOBODY)

    def expire(self) -> list[str]:
        """End the identities and entries whose time has come. Returns them."""
        plane = self._plane
        with plane.store.read() as tx:
            if not leases.anything_due(tx, plane.now):
                return []
        with plane.store.write() as tx:
            return leases.expire(tx, plane.placements, plane.entries, plane.now)
