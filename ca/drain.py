"""Emptying a host: everything it holds is moved, a few at a time, to hosts where a place is ready.

The host is marked first, so that nothing new comes there meanwhile. Every instance has its own move, so an interrupted drain
leaves each of them whole on one host or the other, and draining again goes on with the rest. Before the first move each
instance must have a place to go to; otherwise nothing is begun.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from sqlalchemy import update

from ca import audit, rows, schema
from ca.moves import Tell
from ca.placements import check_open
from ca.rows import EndpointRow, InstanceRow
from ca.service import Service
from ca.store import Store
from identity.errors import BadInput, Conflict, NotFound, RetinueError
from identity.wire.admin import WorkloadMove
from identity.wire.moves import Drain, DrainDone, DrainLine


def mark(store: Store, name: str, now: int, actor: str, *, draining: bool) -> EndpointRow:
    """Let nothing new come to a host, or let it again. Idempotent. Raises NotFound, Refused for a revoked host."""
    with store.write() as tx:
        row = rows.living_endpoint(tx, name)
        if row.kind != "host":
            raise BadInput("drain.kind", f"{name} is a sidecar: it holds its own workload only")
        if (row.draining is not None) != draining:
            tx.execute(update(schema.endpoints).where(schema.endpoints.c.name == name).values(draining=now if draining else None))
            audit.append(tx, now, actor, "host.drain" if draining else "host.undrain", name)
        return rows.endpoint(tx, name)


def assign(
    held: Sequence[InstanceRow], targets: Sequence[str], attached: Mapping[str, Collection[str]], anywhere: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """(instance -> host, instances that have no place). Pure.

    attached: host -> instances that it reports a place for; anywhere: workloads whose processes tell themselves apart by
    registration entries, and so need none. The emptiest of the fitting hosts gets the next one.
    """
    load: Counter[str] = Counter()
    out: dict[str, str] = {}
    missing: list[str] = []
    for row in held:
        fitting = [t for t in targets if row.name in anywhere or row.key in attached.get(t, ())]
        if not fitting:
            missing.append(row.key)
            continue
        best = min(fitting, key=lambda t: (load[t], targets.index(t)))
        load[best] += 1
        out[row.key] = best
    return out, missing


async def drain(
    service: Service, request: Drain, actor: str, tell: Tell, line: Callable[[DrainLine], None]
) -> DrainDone:
    """Carry it out. Raises NotFound, BadInput, and Conflict ``drain.no_target`` before anything is moved."""
    plane = service.plane

    def look() -> tuple[list[InstanceRow], list[str], set[str]]:
        with plane.store.read() as tx:
            source = rows.living_endpoint(tx, request.name)
            if source.kind != "host":
                raise BadInput("drain.kind", f"{request.name} is a sidecar: it holds its own workload only")
            for name in request.to:
                target = rows.living_endpoint(tx, name)
                if target.kind != "host" or name == request.name:
                    raise BadInput("drain.target", f"{name} cannot take the instances of {request.name}")
                check_open(target)
            hosts = [r.name for r in plane.registry.all() if r.kind == "host" and r.state == "enrolled" and r.draining is None]
            entered = {e.name for e in plane.list_entries()}
            return rows.instances(tx, endpoint=request.name), request.to or hosts, entered

    held, targets, entered = await service.read(look)
    targets = [t for t in dict.fromkeys(targets) if t != request.name and t in service.streams]
    if request.to and (gone := sorted(set(request.to) - set(targets))):
        raise NotFound("drain.target", f"{', '.join(gone)} is not connected", hint="start its agent, or name another with --to")
    attached = {t: report.attached for t in targets if (report := service.reports.get(t)) is not None}
    moving = [row.key for row in held if row.state == "moving"]
    if moving:
        raise Conflict("drain.moving", f"{moving[0]} is being moved already", hint="wait for it, or retinue-ca workload abort")
    where, missing = assign(held, targets, attached, entered)
    if missing:
        raise Conflict(
            "drain.no_target", f"no host has a place for {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''};"
            " nothing was moved", hint="attach them on another host first: retinue attach NAME --netns ...",
        )  # fmt: skip
    total = len(where)
    if request.dry_run:
        for key, to in where.items():
            line(DrainLine(instance=key, to=to, outcome="planned", done=0, total=total))
        return DrainDone(name=request.name, moved=0, left=sorted(where), dry_run=True)
    await service.read(lambda: mark(plane.store, request.name, plane.now, actor, draining=True))
    room, done = asyncio.Semaphore(request.parallel), 0
    left: list[str] = []

    async def one(row: InstanceRow, to: str) -> None:
        nonlocal done
        async with room:
            move = WorkloadMove(name=row.name, instance=row.instance, to=to, wait=request.wait, force=request.force)
            try:
                await service.move(move, actor, tell)
            except RetinueError as e:
                left.append(row.key)
                line(DrainLine(instance=row.key, to=to, outcome="failed", done=done, total=total, code=e.code, text=e.message))
                return
            done += 1
            line(DrainLine(instance=row.key, to=to, outcome="moved", done=done, total=total))

    async with asyncio.TaskGroup() as group:
        for row in held:
            group.create_task(one(row, where[row.key]))
    return DrainDone(name=request.name, moved=done, left=sorted(left))
