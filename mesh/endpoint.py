"""The wiring of one endpoint, host agent or sidecar. Restore from disk, verify, compile, apply; only then look for the network.

    feed -> sync (verify) -> state dir -> compile -> data plane -> report

Every arrow may break: then what is in force stays in force. The data plane outlives this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from identity.errors import BadInput, BadState, NotFound, RetinueError
from identity.records import PolicyRecord
from identity.signals import heed
from identity.wire.enroll import Cipher
from identity.wire.feed import Report
from identity.wire.local import Attach
from mesh import broker, policy_trust, svid_files
from mesh.alerts import AlertDesk, Sink
from mesh.attachments import Attachments
from mesh.compile import Compiler, LocalAttachment, LocalFacts, running
from mesh.dataplane import DataPlane, PlaneConfig
from mesh.dataplane import Event as PlaneEvent
from mesh.devices import Choice
from mesh.devices.offers import broken
from mesh.enroll import Enrollment, load_enrollment
from mesh.flows import SUMMARIES, Directory
from mesh.health import Health
from mesh.identities import placed_here
from mesh.jwt_svid import JwtSvids
from mesh.plan import Plan
from mesh.recorder import Recorder
from mesh.sd_notify import notify
from mesh.snapshot import InstanceKey, Snapshot, instance_key
from mesh.state import StateDir
from mesh.svid import WorkloadSvids
from mesh.sync import LEASE, STALE_MAX, Accepted, Event, Position, Refreshed, SyncMachine, View
from mesh.uplink import Uplink, boottime

STALE_SAID: Final = 5.0  # seconds without a heartbeat until `status` calls the state stale
RETRY: Final = 1.0  # seconds until a failed apply is tried again
RETRY_PLACES: Final = 5.0  # seconds until a place that could not be set up is tried again
MAX_SKEW: Final = 30.0  # seconds between our wall clock and a heartbeat just received
APPLY_FIRST: Final = 0.25  # seconds that the disk lets the data plane go ahead: its syncs are slower than a fence may be
TICK: Final = 1.0  # longest sleep while something ends by time: timers stand still during suspend, deadlines do not

_SURVIVABLE: Final = frozenset({"state.snapshot", "state.rollback", "state.attachments"})  # start with nothing from it

log = structlog.get_logger("retinue.agent")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """engine: path of the retinue-engine program, engine_options: more words of its command line; lease and stale_max in seconds (mesh.sync)."""

    state_dir: Path
    run_dir: Path
    interface: str = "rtn0"
    listen_port: int = 51820
    device: Choice = "auto"
    engine: Path | None = None
    engine_options: tuple[str, ...] = ()
    mtu: int = 1420
    clean_on_exit: bool = False
    forget_epochs: bool = False
    lease: float = LEASE
    stale_max: float = STALE_MAX
    broker: Path | None = None
    alerts: tuple[Sink, ...] = ()


@dataclass(frozen=True, slots=True)
class InForce:
    """What the data plane was last told, and what came of it."""

    plan: Plan
    view: View
    position: Position | None
    hash: str
    failed: frozenset[InstanceKey] = field(default=frozenset())


class Agent:
    """One endpoint. `run` is its life; everything else is asked by the local API."""

    def __init__(self, config: AgentConfig, enrollment: Enrollment, state: StateDir) -> None:
        self.config = config
        self.health = Health()
        self.state = state
        self.boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        marks, policy_mark = state.load_marks()
        self.compiler = Compiler()
        self.machine = SyncMachine(
            enrollment.bundle, enrollment.endpoint, marks=marks, policy_mark=policy_mark,
            check_policy=self._check_policy, lease=config.lease, stale_max=config.stale_max,
            policy_trust=policy_trust.load(config.state_dir, enrollment.trust_domain.name),
        )  # fmt: skip
        self.attachments = Attachments(state, self.boot, self._process_ended)
        self.uplink = Uplink(
            enrollment, self.machine, self.health, on_events=self._on_events, report=self.report, instead=self._instead,
            gather=lambda: self.recorder.summary(SUMMARIES),
        )
        self.svids = WorkloadSvids(self.uplink.svid, lambda: self.uplink.trust, time.time)
        self.uplink.workload_certificates = self.svids.certificates
        self.jwts = JwtSvids(self.uplink.jwt, lambda: self.uplink.trust, time.time)
        self.plane = DataPlane(PlaneConfig(
            interface=config.interface, listen_port=config.listen_port, private_key=self._private_key, run_dir=config.run_dir,
            mtu=config.mtu, device=config.device, engine=config.engine, engine_options=config.engine_options, on_event=self._on_plane_event,
            places=None if config.broker is None else broker.use(config.broker),
        ))  # fmt: skip
        desk = AlertDesk(enrollment.endpoint, config.alerts, config.state_dir, tell=self._tell)
        self.recorder = Recorder(enrollment.endpoint, self.plane, config.state_dir, desk, tell=self._tell)
        self.in_force: InForce | None = None
        self.changed = asyncio.Condition()
        self.clean = config.clean_on_exit
        self._held: set[InstanceKey] = set()
        self._wake, self._tried = asyncio.Event(), asyncio.Event()
        self._serving = False
        self._saved = True
        self._heartbeat_saved = 0.0
        self._ready = False

    def _instead(self, promised: list[Cipher]) -> list[Cipher] | None:
        return None if self.plane.device is None else broken(promised, self.plane.device)

    @property
    def enrollment(self) -> Enrollment:
        return self.uplink.enrollment

    @property
    def ready(self) -> bool:
        """Is a state of the CA's applied?"""
        return self.in_force is not None and self.in_force.position is not None

    def _private_key(self) -> bytes:
        return self.enrollment.tunnel_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    # ---- life

    async def run(self, stop: asyncio.Event, beside: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Restore, apply, serve; until `stop`. Traffic goes on after it ends unless `clean`.

        beside: what runs along from the moment the restored state is applied; its failure ends the endpoint.
        """
        self._restore()
        await self.plane.start()
        self.recorder.start()
        await self._apply()
        self._serving = True
        gc.collect()
        gc.freeze()  # what is there now stays: no later collection, in the middle of a change, has to walk it
        tasks = [
            asyncio.create_task(self._recording(), name="recorder"),
            asyncio.create_task(self._applying(), name="apply"),
            asyncio.create_task(self.uplink.run(), name="uplink"),
            asyncio.create_task(stop.wait(), name="stop"),
            *([asyncio.create_task(beside(), name="beside")] if beside is not None else []),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            notify("STOPPING=1")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.attachments.close()
            await self.recorder.stop()
            await self.plane.stop(clean=self.clean)

    async def _recording(self) -> None:
        """Without its records a host enforces all the same: a fault of theirs ends nothing."""
        while True:
            try:
                await self.recorder.run()
            except Exception:
                log.exception("the flow recorder failed; it starts again")
                self._tell("flows.off", "the flow recorder failed; see the log")
                await asyncio.sleep(RETRY_PLACES)

    def _tell(self, code: str, text: str | None) -> None:
        if text is None:
            self.health.clear(code)
        else:
            self.health.put(code, "warning", text)

    def _restore(self) -> None:
        """What was in force before, verified again. Damage is said loudly; then nothing of it is used."""
        try:
            if not (self.state.path / "epochs.json").exists():
                self.state.save_marks(self.machine)
            self.state.restore(self.machine, boot=self.boot, wall=time.time(), mono=boottime())
        except BadState as e:
            if e.code not in _SURVIVABLE:
                raise  # a file that others could write: not ours to believe, nor to overwrite
            self.health.put(e.code, "error", f"{e.message}; {e.hint}")
        svid_files.collect(self.config.run_dir)
        try:
            self.attachments.load()
        except BadState as e:
            if e.code not in _SURVIVABLE:
                raise
            self.health.put(e.code, "error", f"{e.message}; {e.hint}")

    # ---- from the feed

    async def _on_events(self, events: list[Event]) -> None:
        if any(isinstance(e, Accepted) for e in events) or not self._saved:
            # Applied at once, for it may be a fence; reported only when it is on disk, too.
            self._saved = False
            self.touch()
            if self._serving:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(APPLY_FIRST):
                        await self._tried.wait()
            await self._save()
            self.uplink.tell()
        elif boottime() - self._heartbeat_saved > self.config.lease / 3:
            await self._save()
        for event in events:
            if isinstance(event, Refreshed):
                self._say_skew(event.time - time.time())
        if self.in_force is not None and self.in_force.view.fenced:
            self.touch()  # a heartbeat may have lifted the fence

    async def _save(self) -> None:
        try:
            await asyncio.to_thread(self._write)
            self._saved, self._heartbeat_saved = True, boottime()
            self.health.clear("state.write")
            for code in _SURVIVABLE - {"state.attachments"}:
                self.health.clear(code)
        except BadState as e:
            # What came is still applied, since it may be a removal; but it is not reported until it is on disk.
            self._saved = False
            self.health.put("state.write", "error", f"{e.message}; {e.hint}")

    def _write(self) -> None:
        self.state.save_snapshot(self.machine, self.boot)
        self.state.save_marks(self.machine)

    def _check_policy(self, record: PolicyRecord) -> None:
        """Does a signed policy say what its digest names, and does it compile here? Raises RetinueError."""
        from policy.language import digest

        files = [(f.name, f.text) for f in record.files]
        trial = record.trial
        beside = [] if trial is None else [([(f.name, f.text) for f in trial.files], trial.digest)]
        for texts, stated in [(files, record.digest), *beside]:
            if digest(texts) != stated:
                raise BadInput("policy.digest", f"policy revision {record.revision} does not have the digest it states")
        there = running(self.in_force.view.snapshot.placements) if self.in_force is not None else frozenset()
        self.compiler.classes(record, int(time.time()), there)

    # ---- to the data plane

    def touch(self) -> None:
        """Something changed: compile and apply again."""
        self._tried.clear()
        self._wake.set()

    def _process_ended(self) -> None:
        svid_files.collect(self.config.run_dir)
        self.touch()

    async def _applying(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._until_due()):
                    await self._wake.wait()
            if self._wake.is_set() or self._due():
                self._wake.clear()
                await self._apply()
                if not self._wake.is_set():
                    self._tried.set()
            self._say_age()

    def _until_due(self) -> float:
        return TICK if self.in_force is not None and self.in_force.view.deadline is not None else 60.0

    def _due(self) -> bool:
        """Did something end or begin by time?"""
        if self.in_force is None:
            return True
        deadline = self.in_force.view.deadline
        return (deadline is not None and boottime() >= deadline) or time.time() >= self._policy_change

    async def _apply(self) -> None:
        """Compile the state as it is now and bring the data plane to it. An error leaves what is in force."""
        view = self.machine.view(boottime())
        position, now = self.machine.position, int(time.time())
        self._policy_change = float("inf")
        try:
            plan = self.compiler.plan(view.snapshot, self._facts(view), now)
            if view.snapshot.policy is not None:
                change = self.compiler.changes_at(view.snapshot.policy, now, running(view.snapshot.placements))
                self._policy_change = float("inf") if change is None else float(change)
            directory = self._directory(plan, view, now)
            self.recorder.expect(directory)
            applied = await self.plane.apply(plan)
        except RetinueError as e:
            self.health.put("apply.failed", "error", f"the new state could not be applied: {e.message}")
            log.error("apply failed", code=e.code, why=e.message)  # noqa: TRY400 -- a refusal, not a defect
            asyncio.get_running_loop().call_later(RETRY, self.touch)
            return
        self.health.clear("apply.failed")
        active = {a.key for a in plan.active}
        self._held |= active
        self._held &= set(self.attachments.local())
        self.in_force = InForce(plan, view, position, view.snapshot.state_hash, frozenset(applied.failed))
        held = active | set(placed_here(self, self.in_force))  # entries give identities that are attached nowhere
        self.svids.keep_only(frozenset(held))
        self.jwts.keep_only(frozenset(held))
        self._conditions(plan, view, dict(applied.failed))
        self.recorder.update(directory, plan)
        if applied.failed:
            asyncio.get_running_loop().call_later(RETRY_PLACES, self.touch)
        if applied.changes:
            log.info("applied", revision=plan.revision, changes=applied.changes.summary(), ms=round(applied.seconds * 1e3, 1))
        if self.ready and not self._ready:
            self._ready = True
            notify(f"READY=1\nSTATUS=policy applied, revision {plan.revision}")
        self.uplink.tell()
        async with self.changed:
            self.changed.notify_all()

    def _directory(self, plan: Plan, view: View, now: int) -> Directory:
        policy = view.snapshot.policy
        there = running(view.snapshot.placements)
        program = None if policy is None else self.compiler.classes(policy, now, there).program
        return Directory(self.enrollment.endpoint, plan, view.snapshot, program)

    def _facts(self, view: View) -> LocalFacts:
        return LocalFacts(
            endpoint=self.enrollment.endpoint, tunnel_key=self.enrollment.tunnel_public, interface=self.config.interface,
            mtu=self.config.mtu, attachments=self.places(view.snapshot), held=frozenset(self._held), fenced=view.fenced,
            ended=view.ended,
        )  # fmt: skip

    def places(self, snapshot: Snapshot) -> dict[InstanceKey, LocalAttachment]:
        """Who has a place here. A sidecar is the place of its own workload, whichever instance that is."""
        places = dict(self.attachments.local())
        if self.enrollment.kind == "sidecar":
            for key, record in (*snapshot.placements.items(), *snapshot.prepares.items()):
                if record.endpoint == self.enrollment.endpoint:
                    places.setdefault(key, LocalAttachment("host"))
        return places

    def _conditions(self, plan: Plan, view: View, failed: dict[InstanceKey, str]) -> None:
        health = self.health
        notes: dict[str, list[str]] = {}
        for note in plan.notes:
            notes.setdefault(note.code, []).append(note.text)
        health.clear_prefix("plan.", keep=set(notes))
        for code, texts in notes.items():
            health.put(code, "warning", _few(texts))
        for code, texts in (
            ("attach.failed", [f"{key}: {why}" for key, why in sorted(failed.items())]),
            ("feed.refused", [f"{key}: {error.message}" for key, error in sorted(self.machine.refused.items())]),
            ("fence.closed", [*map(str, sorted(view.fenced))]),
            ("device.upgrade", [held] if (held := getattr(self.plane.device, "held_back", None)) else []),
        ):
            if texts:
                mild = code in {"feed.refused", "device.upgrade"}
                health.put(code, "warning" if mild else "error", _few(texts))
            else:
                health.clear(code)
        if view.snapshot.policy is None and view.snapshot.timeline:
            health.put("policy.none", "warning", "no policy has been published: nothing is permitted")
        else:
            health.clear("policy.none")

    def _say_age(self) -> None:
        age = self.machine.age(boottime())
        if age is not None and age > STALE_SAID:
            self.health.put("control.stale", "warning", f"the newest heartbeat of the CA is {age:.0f} s old")
        else:
            self.health.clear("control.stale")

    def _say_skew(self, ahead: float) -> None:
        if abs(ahead) > MAX_SKEW:
            side = "behind" if ahead > 0 else "ahead of"
            self.health.put("clock.skew", "warning", f"this machine's clock is {abs(ahead):.0f} s {side} the CA's")
        else:
            self.health.clear("clock.skew")

    def _on_plane_event(self, event: PlaneEvent) -> None:
        log.warning("the data plane changed by itself", code=event.code, text=event.text)
        if event.code in {"netns.gone", "attach.failed"}:
            self.touch()

    # ---- to the CA

    def report(self) -> Report | None:
        """What is applied here; None before anything is, and while it is not on disk."""
        now = self.in_force
        if now is None or now.position is None or not self._saved:
            return None
        return Report(
            timeline=now.position.timeline,
            revision=now.position.revision,
            hash=now.hash,
            held={a.key: a.epoch for a in now.plan.active if a.epoch is not None},
            attached=sorted({k for k in now.plan.attachments if k not in now.failed} | self._entered(now)),
        )

    def _entered(self, now: InForce) -> set[InstanceKey]:
        """Instances placed or coming here whose processes a registration entry tells: they need no attachment."""
        names = {entry.name for entry in now.view.snapshot.entries}
        records = (*now.view.snapshot.placements.items(), *now.view.snapshot.prepares.items())
        return {key for key, r in records if r.name in names and r.endpoint == self.enrollment.endpoint and r.state != "revoked"}

    # ---- for the local API

    def attach(self, request: Attach) -> InstanceKey:
        """Give an instance a place here. Raises BadInput, NotFound, Conflict, BadState."""
        key = self.attachments.attach(request)
        self.touch()
        return key

    def detach(self, name: str, instance: int) -> InstanceKey:
        """Take its place away. Raises NotFound."""
        key = instance_key(name, instance)
        if self.attachments.detach(key) is None:
            raise NotFound("attach.unknown", f"{key} is not attached here", hint="see: retinue status")
        self.touch()
        return key

    async def applied(self) -> None:
        """Wait until everything that changed so far is applied."""
        self.touch()
        async with self.changed:
            await self.changed.wait()

    async def watch(self) -> AsyncGenerator[InForce, None]:
        """What is in force now, and after every change."""
        last: InForce | None = None
        while True:
            if self.in_force is not None and self.in_force is not last:
                last = self.in_force
                yield last
                continue
            async with self.changed:
                if self.in_force is last:
                    await self.changed.wait()

    _policy_change: float = float("inf")


def _few(texts: list[str]) -> str:
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return "; ".join(texts[:3]) + more


async def serve(config: AgentConfig, *, beside: Callable[[Agent], Coroutine[Any, Any, None]] | None = None) -> None:
    """The whole endpoint with its local API, until SIGTERM or SIGINT. `beside` makes what else it does."""
    from mesh.local_api import LocalApi
    from mesh.workload_api import WorkloadApi

    enrollment = load_enrollment(config.state_dir)
    state = StateDir(config.state_dir)
    state.open()
    try:
        if config.forget_epochs:
            state.forget_marks()
        agent = Agent(config, enrollment, state)
        stop = asyncio.Event()
        heed(asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT), stop.set)
        async with LocalApi(agent, stop), WorkloadApi(agent):
            await agent.run(stop, (lambda: beside(agent)) if beside is not None else None)
    finally:
        state.close()

