"""Workloads that are powered down: how long they stay members (`idle: keep_membership` of the policy).

A host renews its certificate at half its life, so one whose newest certificate has ended has been off at least since
then. When the policy's time after that is over, what it holds is withdrawn and audited as lapsed: no peer, no address, no
policy names it any more. It is not revoked. On return the host enrols or recovers as any other, gets the current policy, and
an operator places the workload again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sqlalchemy import Connection, select

from ca import audit, rows, schema
from ca.contradiction import CONTRADICTION
from ca.placements import Placements
from identity.errors import BadState
from policy.model import Idle, Policy
from policy.selectors import inside

ACTOR: Final = "ca"
GRACE: Final = 3600  # seconds that the CA has to be up first: when it was away itself, nobody could renew


def due(tx: Connection, policies: Collection[Policy], now: int) -> list[tuple[rows.InstanceRow, Idle, int]]:
    """Instances whose membership is over, with the declaration and since when their host is off. A read."""
    declared = [one for policy in policies for one in policy.idle if one.keep_membership is not None]
    if not declared:
        return []
    shortest = min(one.keep_membership or 0 for one in declared)
    ended = select(schema.endpoints.c.name, schema.endpoints.c.svid_expires).where(schema.endpoints.c.svid_expires < now - shortest)
    out = []
    for endpoint, since in sorted((row.name, row.svid_expires) for row in tx.execute(ended)):
        for row in rows.instances(tx, endpoint=endpoint, state="active"):
            # Of several declarations the one of the innermost scope holds, and of two files of one scope the longer one.
            over = [one for one in declared if inside(row.name, one.scope)]
            one = max(over, key=lambda i: (i.scope.count("/") + bool(i.scope), i.keep_membership), default=None)
            if one is not None and one.keep_membership is not None and since + one.keep_membership < now:
                out.append((row, one, since))
    return out


def lapse(tx: Connection, placements: Placements, policies: Collection[Policy], now: int) -> list[str]:
    """Withdraw what is due, inside the caller's transaction. Returns the instances."""
    done = []
    for row, one, since in due(tx, policies, now):
        try:
            with tx.begin_nested():
                found = placements.withdraw(tx, row, now, final=False)
        except BadState as e:
            if e.code != CONTRADICTION:
                raise
            continue  # somebody changed the database: said there
        audit.append(tx, now, ACTOR, "workload.lapse", row.key, epoch=found.epoch, host=row.endpoint, off_since=since, kept=one.keep_membership)
        done.append(row.key)
    return done
