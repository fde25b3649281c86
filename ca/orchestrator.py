"""What a scheduler says becomes placements: registered, placed, moved or retired, once.

An event is accepted in two steps: what it asks for is done as anybody else's request would be (a placement, a move with its
epochs and its waiting for the new host), and then its id, its sequence number and the answer are written down together. A
crash between the two is harmless: told again, the event finds the state that it asks for, and no second epoch is signed.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final

from aiohttp import web
from sqlalchemy import Connection, delete, func, insert, select, update

from ca import audit, rows, schema
from ca.http import body, reply
from ca.placements import check_open
from ca.principals import ACTOR
from ca.rows import InstanceRow
from ca.service import Service
from identity.errors import Conflict, Refused
from identity.labels import check_labels
from identity.names import workload_path
from identity.wire.admin import WorkloadAdd, WorkloadMove
from identity.wire.orchestrator import Event, EventAnswer, Outcome

KEEP_EVENTS: Final = 100_000  # answers remembered; the sequence numbers of instances are for ever


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""
    hook = Hook(service)

    async def event(request: web.Request) -> web.Response:
        return reply(await hook.take(await body(request, Event), request[ACTOR]))

    return [web.post("/v1/orchestrator/events", event)]


class Hook:
    """Events about one instance are taken one after the other."""

    def __init__(self, service: Service) -> None:
        self._service, self._plane = service, service.plane
        self._turns: dict[tuple[str, str], tuple[asyncio.Lock, int]] = {}

    async def take(self, event: Event, actor: str) -> EventAnswer:
        """Carry one event out. Raises Conflict ``event.reused`` for an id that said something else, and what placing and
        moving raise: then nothing is written down, and it may be told again.
        """
        workload_path(event.workload)
        check_labels(event.labels)
        key = (event.workload, event.instance)
        lock, waiting = self._turns.get(key, (asyncio.Lock(), 0))
        self._turns[key] = (lock, waiting + 1)
        try:
            async with lock:
                return await self._in_turn(event, actor)
        finally:
            lock, waiting = self._turns[key]
            if waiting == 1:
                del self._turns[key]
            else:
                self._turns[key] = (lock, waiting - 1)

    async def _in_turn(self, event: Event, actor: str) -> EventAnswer:
        service, plane, said = self._service, self._plane, _digest(event)

        def look() -> tuple[EventAnswer | None, InstanceRow | None, int]:
            with plane.store.read() as tx:
                known = _answered(tx, event, said)
                number, seq = _known(tx, event)
                row = None if number is None else rows.instance(tx, event.workload, number)
                rows.endpoint(tx, event.host)
                return known, row, seq

        known, row, seq = await service.read(look)
        if known is not None:
            return known
        if event.seq <= seq:
            answer = self._answer(event, "stale", row)
            await service.read(lambda: self._keep(event, said, answer, None))
            return answer
        match event.kind:
            case "stopped":
                outcome, row = await self._stopped(event, row, actor)
            case _ if row is None:
                return await self._new(event, said, actor)
            case _:
                outcome, row = await self._there(event, row, actor)
        answer = self._answer(event, outcome, row)
        await service.read(lambda: self._keep(event, said, answer, row))
        return answer

    async def _new(self, event: Event, said: str, actor: str) -> EventAnswer:
        """Register, place and write down in one transaction: a number is given once."""
        plane = self._plane

        def run() -> EventAnswer:
            with plane.store.write() as tx:
                number, _ = _known(tx, event)
                if number is not None or _answered(tx, event, said) is not None:
                    raise Conflict("event.turn", "another process takes an event about this instance", hint="tell it again")
                siblings = rows.instances(tx, name=event.workload)
                asked = WorkloadAdd(
                    name=event.workload, host=event.host, labels={} if siblings else event.labels, replica=bool(siblings),
                    ends_at=event.ends,
                )  # fmt: skip
                if siblings and event.labels and event.labels != dict(siblings[0].labels):
                    raise Conflict("workload.labels", f"the instances of {event.workload} share their labels, and these differ")
                row = plane.placements.add_in(tx, asked, plane.now, actor)
                answer = self._answer(event, "registered", row)
                _write(tx, event, said, answer, row.instance, plane.now)
                return answer

        return (await self._service.change(run))[0]

    async def _there(self, event: Event, row: InstanceRow, actor: str) -> tuple[Outcome, InstanceRow]:
        """An instance that is known runs, or will run, on a host."""
        service, plane = self._service, self._plane
        if row.state == "revoked":
            raise Refused("workload.revoked", f"{row.key} is over, which is final", hint="give the new one another instance name")
        if event.labels and event.labels != dict(row.labels):
            raise Conflict("workload.labels", f"{row.key} has other labels; they are certified and do not change by an event")
        if row.endpoint == event.host and row.state == "active":
            return "unchanged", row
        if row.endpoint is None and row.state == "unplaced":
            placed, _ = await service.change(lambda: self._place(event, row, actor))
            return "placed", placed
        if event.kind == "scheduled":
            return "noted", row  # it still runs elsewhere: it moves when it runs there
        done = await service.move(WorkloadMove(name=row.name, instance=row.instance, to=event.host, wait=event.wait), actor)
        return "moved", await service.read(lambda: plane.placements.get(row.name, done.workload.instance))

    def _place(self, event: Event, row: InstanceRow, actor: str) -> InstanceRow:
        plane = self._plane
        with plane.store.write() as tx:
            row = rows.instance(tx, row.name, row.instance)
            target = rows.living_endpoint(tx, event.host)
            check_open(target)
            placed = plane.placements.place(tx, row, target, plane.now)
            audit.append(tx, plane.now, actor, "workload.place", row.key, to=target.name, epoch=placed.epoch, event=event.id)
            return placed

    async def _stopped(self, event: Event, row: InstanceRow | None, actor: str) -> tuple[Outcome, InstanceRow | None]:
        """It ended on a host. Where it runs elsewhere by now, that is old news; nobody is told twice."""
        plane = self._plane
        if row is None or row.state == "revoked":
            return "unchanged", row
        if row.endpoint != event.host:
            return ("noted" if row.endpoint is not None else "unchanged"), row
        if row.state == "moving":
            raise Conflict("move.running", f"{row.key} is being moved to {row.target}", hint="tell it again when it is over")

        def run() -> InstanceRow:
            with plane.store.write() as tx:
                now_row = rows.instance(tx, row.name, row.instance)
                gone = plane.placements.withdraw(tx, now_row, plane.now, final=event.final)
                audit.append(tx, plane.now, actor, "workload.retire", row.key, host=event.host, final=event.final, epoch=gone.epoch)
                return gone

        return "retired", (await self._service.change(run))[0]

    # ---- what is written down

    def _answer(self, event: Event, outcome: Outcome, row: InstanceRow | None) -> EventAnswer:
        return EventAnswer(
            id=event.id, outcome=outcome, workload=event.workload, instance=event.instance,
            number=None if row is None else row.instance, host=None if row is None else row.endpoint,
            epoch=0 if row is None else row.epoch, addresses=[] if row is None else row.addresses(self._plane.trust_domain),
        )  # fmt: skip

    def _keep(self, event: Event, said: str, answer: EventAnswer, row: InstanceRow | None) -> None:
        with self._plane.store.write() as tx:
            if _answered(tx, event, said) is None:
                _write(tx, event, said, answer, None if row is None else row.instance, self._plane.now)


def _digest(event: Event) -> str:
    return hashlib.sha256(event.model_dump_json().encode()).hexdigest()


def _answered(tx: Connection, event: Event, said: str) -> EventAnswer | None:
    """The answer that this event got. Raises Conflict ``event.reused``."""
    row = tx.execute(select(schema.orchestrator_events).where(schema.orchestrator_events.c.id == event.id)).mappings().first()
    if row is None:
        return None
    if row["digest"] != said:
        raise Conflict("event.reused", f"the event id {ascii(event.id)[:80]} said something else before", hint="every event has an id of its own")
    return EventAnswer.model_validate_json(row["answer"])


def _known(tx: Connection, event: Event) -> tuple[int | None, int]:
    """(number, last sequence) of the scheduler's instance. A number names the instance that has it, when nobody else took it."""
    c = schema.orchestrated.c
    row = tx.execute(select(c.number, c.seq).where(c.workload == event.workload, c.instance == event.instance)).first()
    if row is not None:
        return row.number, row.seq
    if event.instance.isascii() and event.instance.isdigit() and len(event.instance) < 10:
        number = int(event.instance)
        taken = tx.execute(select(c.instance).where(c.workload == event.workload, c.number == number)).first()
        if taken is None and any(r.instance == number for r in rows.instances(tx, name=event.workload)):
            return number, -1
    return None, -1


def _write(tx: Connection, event: Event, said: str, answer: EventAnswer, number: int | None, now: int) -> None:
    t, e = schema.orchestrated, schema.orchestrator_events
    mine = (t.c.workload == event.workload) & (t.c.instance == event.instance)
    if answer.outcome != "stale":
        known = {} if number is None else {"number": number}
        if not tx.execute(update(t).where(mine).values(seq=event.seq, **known)).rowcount:
            tx.execute(insert(t).values(workload=event.workload, instance=event.instance, number=number, seq=event.seq))
    place = int(tx.execute(select(func.coalesce(func.max(e.c.place), 0))).scalar_one()) + 1
    tx.execute(insert(e).values(id=event.id, digest=said, answer=answer.model_dump_json(), at=now, place=place))
    tx.execute(delete(e).where(e.c.place <= place - KEEP_EVENTS))
