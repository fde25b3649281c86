"""Rolling a policy out: canary, everybody, watch, keep; back to the policy before at any moment until it is kept.

    start    checks signatures, tests and the replay of recorded flows; then the canary is decided by the new policy
    promote  canary -> everybody (a larger canary on the way is another `promote` with --percent or --canary)
    watch    everybody is decided by the new policy, the old one still stands beside it in the same signed record
    keep     the new policy becomes the policy; by itself when the watch is over and the budget is not spent
    abort    the record without the trial: what was in force before is in force again, signed as it always was

Going back needs no signature of anybody: until it is kept, the policy before is in force by its own. Every step is a
policy revision of its own, so the history says what was enforced at any time. State is in the store: a restart of the
CA continues where it was, and a rollout whose time is over while the CA was down is judged when it is back.

The budget counts distinct flows that (1) an endpoint holding one of the ends reports as refused since the rollout began,
(2) were reported as forwarded before it began, by the end that does not report the denial or by both, and (3) the policy
before allows and the new one denies, by the evaluator itself. So a lying host can name its own ends only, can count only
what the new policy really denies, and cannot bring about more than the end of this one rollout; a new one starts by an
operator's hand. What it can do is keep silent about denials that it alone sees: those of flows out of its own workloads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from sqlalchemy import Connection, insert, select, update

from ca import audit, flow_store, rows, schema
from ca.desk import Desk
from ca.flow_store import DESTINATION, SOURCE, Denial
from ca.policies import Files, Policies, PolicyRow, newest, subjects
from identity.errors import BadInput, Conflict, NotFound, Refused
from identity.records import PolicyFile, PolicyTrial
from identity.wire.flows import FlowSummary
from policy.compile import compile_policy
from policy.evaluate import evaluate
from policy.program import Program, Subject
from policy.replay import Replayed, replay
from policy.rollout import Canary, sample
from policy.windows import DAY

State = Literal["canary", "watch", "kept", "rolled_back", "aborted"]
RUNNING: Final = ("canary", "watch")
MAX_SECONDS: Final = 90 * DAY
REPLAY: Final = 30 * DAY
SHOWN: Final = 50  # denials and broken flows named in one answer
NOBODY: Final = "ca"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout. Times in seconds since the epoch; `watch` in seconds; `budget` in distinct flows.

    canary: for people; `stage` is when its present state began
    auto:   the canary is promoted by itself after `watch` as well
    """

    id: str
    state: State
    canary: str
    digest: str
    before: str
    author: str
    started: int
    stage: int
    watch: int
    budget: int
    auto: bool = False
    ended: int | None = None
    why: str = ""

    @property
    def running(self) -> bool:
        return self.state in RUNNING


@dataclass(frozen=True, slots=True)
class Who:
    """How the canary is chosen: one of these."""

    labels: Mapping[str, str]
    percent: int | None = None
    hosts: Sequence[str] = ()
    everybody: bool = False


@dataclass(frozen=True, slots=True)
class Watched:
    """What was refused so far. `counted` spend the budget; `denials` are all, with why one does not count."""

    counted: tuple[Denial, ...]
    denials: tuple[tuple[Denial, str], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy would do: pairs gained and lost are in the policy's reply; this is the replay and the verdict."""

    replayed: Replayed
    budget: int

    @property
    def good(self) -> bool:
        return len(self.replayed.broken) <= self.budget


class Rollouts:
    """Transactions over rollouts. `now` is seconds since the epoch."""

    def __init__(self, desk: Desk, policies: Policies) -> None:
        self._desk = desk
        self._policies = policies

    # ---- by operators

    def plan(self, files: Files, now: int, budget: int = 0) -> Plan:
        """Replay what was recorded in the last 30 days, against what is in force. Raises BadPolicy."""
        from policy.language import load

        policy = load(files)
        with self._desk.store.read() as tx:
            known = subjects(rows.instances(tx))
            return Plan(self._replay(tx, compile_policy(policy, now, known, audit=False), known, now), budget)

    def _replay(self, tx: Connection, program: Program, known: dict[str, Subject], now: int) -> Replayed:
        current = newest(tx)
        # What stands without a trial: its canary denies already what it is about to deny.
        before = compile_policy(current.staged().base, now, known) if current is not None else None
        recorded = flow_store.recording(tx, now, now - REPLAY)
        return replay(program, recorded.edges, list(known.values()), before)

    def start(
        self, files: Files, who: Who, author: str, now: int, actor: str, *, watch: int = 3600, budget: int = 0,
        parts: Sequence[str] = (), auto: bool = False, force: bool = False,
    ) -> Rollout:  # fmt: skip
        """Begin with a canary. Raises Conflict while one runs, Refused ``rollout.replay``, and what `Policies.apply` raises."""
        if not 1 <= watch <= MAX_SECONDS:
            raise BadInput("rollout.watch", f"a watch is from 1 s to {MAX_SECONDS // DAY} days")
        if not 0 <= budget <= 1_000_000:
            raise BadInput("rollout.budget", "a budget is from 0 to 1000000 flows")
        with self._desk.store.write() as tx:
            self._policies.no_rollout(tx)
            current = newest(tx)
            if current is None:
                raise Conflict(
                    "rollout.first", "nothing is in force yet, so there is nothing to go back to",
                    hint="begin with a policy whose segments audit: retinue-ca policy apply FILE",
                )  # fmt: skip
            known = subjects(rows.instances(tx))
            policy, _ = self._policies.check(tx, files, parts, now, known, current)
            if policy.digest == current.digest:
                raise Conflict("rollout.same", "this policy is in force already")
            found = self._replay(tx, compile_policy(policy, now, known, audit=False), known, now)
            if len(found.broken) > budget and not force:
                raise Refused(
                    "rollout.replay", f"{len(found.broken)} of {found.flows} recorded flows would be denied, first {found.broken[0]}",
                    hint="correct the policy, raise --budget, or start with --force",
                )  # fmt: skip
            rollout_id = os.urandom(6).hex()
            canary = self._canary(tx, who, rollout_id)
            state: State = "watch" if canary.everybody else "canary"
            one = Rollout(rollout_id, state, str(canary), policy.digest, current.digest, author, now, now, watch, budget, auto)
            trial = _trial(one, files, parts, canary)
            tx.execute(insert(schema.rollouts).values(id=one.id, state=one.state, started=now, data=_data(one)))
            self._publish(tx, current, trial, f"rollout {one.id} {one.state}", now)
            audit.append(tx, now, actor, "rollout.start", one.id, digest=policy.digest, canary=str(canary), budget=budget, watch=watch,
                         forced=force, broken=len(found.broken))  # fmt: skip
            return one

    def _canary(self, tx: Connection, who: Who, salt: str) -> Canary:
        if who.percent is not None and not who.labels and not who.hosts and not who.everybody:
            if who.percent == 100:
                return Canary.of(everybody=True)
            return Canary.of(sample({r.name for r in rows.instances(tx) if r.state != "revoked"}, who.percent, salt))
        names: set[str] = set()
        for host in who.hosts:
            rows.endpoint(tx, host)
            names |= {r.name for r in rows.instances(tx) if r.endpoint == host and r.state != "revoked"}
        if who.hosts and not names:
            raise BadInput("rollout.canary", "no workload is placed on these hosts")
        return Canary.of(names, who.labels, everybody=who.everybody)

    def promote(self, now: int, actor: str, who: Who | None = None) -> Rollout:
        """From canary to a larger canary (`who`) or to everybody; from the watch to keeping it. Raises NotFound when none runs."""
        with self._desk.store.write() as tx:
            one, current, trial = self._running(tx)
            if one.state == "watch":
                if who is not None:
                    raise BadInput("rollout.canary", "everybody is in already; promote it once more to keep it")
                return self._keep(tx, one, current, trial, now, actor)
            canary = self._canary(tx, who, one.id) if who is not None else Canary.of(everybody=True)
            return self._spread(tx, one, current, trial, canary, now, actor)

    def abort(self, now: int, actor: str, why: str = "") -> Rollout:
        """Back to the policy before. Raises NotFound when none runs."""
        with self._desk.store.write() as tx:
            one, current, _ = self._running(tx)
            return self._end(tx, one, current, now, actor, "aborted", why)

    def status(self, now: int) -> tuple[Rollout, Watched] | None:
        """The one that runs, or the last one; None before the first."""
        with self._desk.store.read() as tx:
            c = schema.rollouts.c
            found = tx.execute(select(c.data, c.state, c.ended).order_by(c.started.desc(), c.id.desc()).limit(1)).first()
            if found is None:
                return None
            one = _read(*found)
            return one, self._watched(tx, one, now)

    # ---- by reports and time

    def observe(self, endpoint: str, flows: Sequence[FlowSummary], now: int) -> flow_store.Noted:
        """Keep what an endpoint reports of its flows."""
        with self._desk.store.write() as tx:
            running = self._id(tx)
            since = None if running is None else (running, self._get(tx, running).started)
            return flow_store.note(tx, endpoint, flows, now, since)

    def tick(self, now: int) -> Rollout | None:
        """Once a heartbeat: roll back when the budget is spent, keep when the watch is over. The rollout, if it changed."""
        with self._desk.store.read() as tx:
            running = self._id(tx)
            if running is None:
                return None
            one = self._get(tx, running)
            watched = self._watched(tx, one, now)
        if len(watched.counted) > one.budget:
            first = watched.counted[0]
            why = f"{len(watched.counted)} flows denied that were seen before, budget {one.budget}; first {_show(first)}"
            return self._change(lambda tx, o, c, _: self._end(tx, o, c, now, NOBODY, "rolled_back", why), one)
        if now - one.stage < one.watch:
            return None
        if one.state == "watch":
            return self._change(lambda tx, o, c, t: self._keep(tx, o, c, t, now, NOBODY), one)
        if one.auto:
            return self._change(
                lambda tx, o, c, t: self._spread(tx, o, c, t, Canary.of(everybody=True), now, NOBODY), one
            )
        return None

    def _change(self, act: Any, expected: Rollout) -> Rollout | None:
        with self._desk.store.write() as tx:
            if self._id(tx) != expected.id:
                return None
            one, current, trial = self._running(tx)
            done: Rollout = act(tx, one, current, trial)
            return done

    def _watched(self, tx: Connection, one: Rollout, now: int) -> Watched:
        found = flow_store.denials(tx, one.id, one.started)
        if not found:
            return Watched((), ())
        current = newest(tx)
        known = subjects(rows.instances(tx))
        programs: tuple[Program, Program] | None = None
        if current is not None and current.trial is not None:
            staged = current.staged()  # as it stands: outside the canary nothing is the new policy's doing
            programs = (compile_policy(staged.base, now, known), staged.program(now, known))
        holders: dict[str, set[str]] = {}
        for row in rows.instances(tx):
            if row.endpoint is not None:
                holders.setdefault(row.name, set()).add(row.endpoint)
        out = [(d, _excluded(d, known, holders, programs)) for d in found]
        return Watched(tuple(d for d, why in out if not why), tuple(out))

    # ---- steps inside a transaction

    @staticmethod
    def _id(tx: Connection) -> str | None:
        c = schema.rollouts.c
        return tx.execute(select(c.id).where(c.state.in_(RUNNING)).limit(1)).scalar()

    @staticmethod
    def _get(tx: Connection, rollout: str) -> Rollout:
        c = schema.rollouts.c
        return _read(*tx.execute(select(c.data, c.state, c.ended).where(c.id == rollout)).one())

    def _running(self, tx: Connection) -> tuple[Rollout, PolicyRow, PolicyTrial]:
        found, current = self._id(tx), newest(tx)
        if found is None or current is None or current.trial is None:
            raise NotFound("rollout.none", "no policy is being rolled out", hint="retinue-ca policy rollout start FILE...")
        return self._get(tx, found), current, PolicyTrial.model_validate_json(current.trial)

    def _spread(
        self, tx: Connection, one: Rollout, current: PolicyRow, trial: PolicyTrial, canary: Canary, now: int, actor: str
    ) -> Rollout:
        state: State = "watch" if canary.everybody else "canary"
        one = replace(one, state=state, canary=str(canary), stage=now)
        wider = trial.model_copy(
            update={"names": sorted(canary.names), "labels": dict(canary.labels), "everybody": canary.everybody}
        )
        self._publish(tx, current, wider, f"rollout {one.id} {one.state}", now)
        return self._save(tx, one, now, actor, "rollout.promote")

    def _keep(
        self, tx: Connection, one: Rollout, current: PolicyRow, trial: PolicyTrial, now: int, actor: str
    ) -> Rollout:
        files = [(f.name, f.text) for f in trial.files]
        self._policies.publish(tx, current, files, trial.digest, one.author, now, parts=trial.parts, kind=f"rollout {one.id} kept")
        return self._save(tx, replace(one, state="kept", ended=now), now, actor, "rollout.keep")

    def _end(
        self, tx: Connection, one: Rollout, current: PolicyRow, now: int, actor: str, state: State, why: str
    ) -> Rollout:
        self._publish(tx, current, None, f"rollout {one.id} {state}", now)
        return self._save(tx, replace(one, state=state, ended=now, why=why), now, actor, f"rollout.{state}")

    def _publish(self, tx: Connection, current: PolicyRow, trial: PolicyTrial | None, kind: str, now: int) -> None:
        parts = current.said(str(self._desk.trust_domain)).parts
        self._policies.publish(
            tx, current, current.files, current.digest, current.author, now, parts=parts, kind=kind, trial=trial
        )

    def _save(self, tx: Connection, one: Rollout, now: int, actor: str, action: str) -> Rollout:
        tx.execute(
            update(schema.rollouts).where(schema.rollouts.c.id == one.id).values(state=one.state, ended=one.ended, data=_data(one))
        )
        audit.append(tx, now, actor, action, one.id, canary=one.canary, digest=one.digest, why=one.why)
        return one


def _excluded(
    one: Denial, known: dict[str, Subject], holders: Mapping[str, set[str]], programs: tuple[Program, Program] | None
) -> str:
    """Why a refused flow does not spend the budget; empty when it does."""
    src, dst, proto, port = one.edge
    if one.seen is None:
        return "not seen before the rollout"
    if src not in known or dst not in known:
        return "an end is gone"
    reporters = set(one.endpoints)
    by_source = bool(reporters & holders.get(src, set()))
    by_destination = bool(reporters & holders.get(dst, set()))
    vouched = (one.ends & DESTINATION and by_source) or (one.ends & SOURCE and by_destination)
    if not vouched:
        return "seen before by the reporting end only"
    if programs is None:
        return ""
    before, after = (evaluate(p, known[src], known[dst], proto, port).allowed for p in programs)
    if after:
        return "allowed now (outside the canary, or by the new policy): the reporter is mistaken or not up to date"
    return "" if before else "the policy before denies it as well"


def _trial(one: Rollout, files: Files, parts: Sequence[str], canary: Canary) -> PolicyTrial:
    return PolicyTrial(
        id=one.id, digest=one.digest, files=[PolicyFile(name=n, text=t) for n, t in files], parts=list(parts),
        names=sorted(canary.names), labels=dict(canary.labels), everybody=canary.everybody,
    )  # fmt: skip


def _data(one: Rollout) -> str:
    return json.dumps(asdict(one))


def _read(text: str, state: State, ended: int | None) -> Rollout:
    """The columns lead: a new authority may end a rollout, too (ca/policies.py)."""
    return Rollout(**{**json.loads(text), "state": state, "ended": ended})


def _show(one: Denial) -> str:
    from policy.evaluate import show_flow

    src, dst, proto, port = one.edge
    return f"{src} -> {dst} {show_flow(proto, port)}"
