"""The data plane of one endpoint behind one door: device, firewall, links and routes.

    plane = DataPlane(PlaneConfig(...))
    await plane.start()                 # deny rules first; a running engine is adopted, not restarted
    applied = await plane.apply(plan)   # narrow, then tunnels, then widen, then addresses
    await plane.stop(clean=False)       # traffic goes on without the agent

Order of a change: first everything that is no longer allowed goes (elements, routes, addresses), then the tunnels
change in one step, then what is newly allowed comes, and only when the firewall holds do addresses and routes appear.
So there is no moment at which something passes that neither the old nor the new plan allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from identity.errors import RetinueError, Unreachable
from mesh import netns, taps
from mesh.devices import Choice, Device, DeviceConfig, PeerState, after, choose, peer_changes
from mesh.firewall import DeniedFlow, Firewall
from mesh.firewall_names import log_group
from mesh.host import HostNet
from mesh.inside import Places
from mesh.netfilter import Handler, Listener, Tracked, forget, listing
from mesh.netlink_watch import NETWORK, Watcher
from mesh.nft_touches import Touches
from mesh.plan import Changes, Note, PairPlan, Plan, diff, elements_of
from mesh.snapshot import InstanceKey
from policy.ports import NOTHING

log = logging.getLogger(__name__)

CHECK_EVERY: Final = 2.0  # seconds between two verifications of device and firewall without a reason
HOST_EVERY: Final = 20.0  # the same for links, routes and rules, whose changes the kernel tells of
HOST_CALM: Final = 1.5  # so soon after a change of our own they are not compared: it is ours that the kernel tells of
FORGET_AFTER: Final = (0.5, 2.0)  # seconds until connections that may not go on are forgotten, where that can wait
HOST_SHARE: Final = 50  # reading all routes and rules may take one part in so many of the time
RETRY: Final = 1.0  # seconds after a failed repair
Denied = DeniedFlow


@dataclass(frozen=True, slots=True)
class PlaneConfig:
    """private_key: returns the 32 raw bytes of the tunnel key, called only when a device needs them.

    run_dir: engine socket, pid file and log. on_event: called on the loop after the plane repaired itself or lost
    something (see `Event`). places: who works inside the namespaces of workloads; ourselves by default.
    """

    interface: str
    listen_port: int
    private_key: Callable[[], bytes]
    run_dir: Path
    mtu: int = 1420
    device: Choice = "auto"
    engine: Path | None = None
    engine_options: tuple[str, ...] = ()
    on_event: Callable[[Event], None] | None = None
    places: Places | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened by itself: ``firewall.restored``, ``host.restored``, ``device.restarted``,
    ``device.failed``, ``netns.gone`` (instance named), ``attach.failed`` (a place is not there; apply again to retry).
    """

    code: str
    text: str
    instance: InstanceKey | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a plan. failed: instances whose place could not be set up (they get nothing), with the reason."""

    changes: Changes
    seconds: float
    failed: Mapping[InstanceKey, str] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Counters:
    """peers by tunnel key; verdicts: name -> packets since the table was made; denied: flows of the last minutes."""

    peers: Mapping[str, PeerState]
    verdicts: Mapping[str, int]
    denied: tuple[Denied, ...]
    elements: int


class DataPlane:
    """See the module text. All methods raise RetinueError; none of them widens access when it fails."""

    def __init__(self, config: PlaneConfig) -> None:
        self.config = config
        self.firewall = Firewall(config.interface)
        self.host = HostNet(config.interface, config.run_dir, config.places)
        self.plan: Plan | None = None  # the last one that was applied or attempted: what repairs lead to
        self._device: Device | None = None
        self._why = ""
        self._peers: dict[str, PeerState] | None = None  # as the device has them; None when that is not known
        self._gone: set[InstanceKey] = set()
        self._lock = asyncio.Lock()
        self._suspicion = asyncio.Event()
        self.firewall.touches = Touches(self.firewall.table, self._suspicion.set)
        self._watchers = (self.firewall.touches, Watcher(NETWORK, self._network_changed))
        self._guard: asyncio.Task[None] | None = None
        self._doomed: dict[tuple[InstanceKey, InstanceKey], PairPlan] = {}  # pairs whose connections are to be forgotten
        self._forgetting: asyncio.Task[None] | None = None
        self._lost_device = False
        self._arp = False  # is the table for the taps there?
        self._moved = False  # did links, addresses, routes or rules change since they were last compared?
        self._host_soon = self._host_due = 0.0  # when they are compared next: after such a change, and without

    @property
    def device(self) -> Device | None:
        """The tunnel device in use."""
        return self._device

    def describe(self) -> str:
        """Device in use and why, for `status`."""
        return "none" if self._device is None else f"{self._device.describe()}: {self._why}"

    # ---- life

    async def start(self) -> None:
        """Deny everything that is not already allowed, then the device. Raises RetinueError.

        A first start that fails leaves nothing; a later one leaves in force what was.
        """
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        self.firewall.close_v6 = self.host.closes_v6()
        found = await self.firewall.start()
        try:
            await self.host.start()
            await self._choose_device()
            await self._start_device()
        except RetinueError:
            if not found:
                with contextlib.suppress(RetinueError):
                    await self.stop(clean=True)
            raise
        for watcher in self._watchers:
            watcher.start()
        self._guard = asyncio.create_task(self._guarding(), name="data plane guard")

    async def _choose_device(self) -> None:
        config = DeviceConfig(
            self.config.interface, self.config.mtu, self.config.listen_port, self.config.private_key,
            self.config.run_dir, self.config.engine, self.config.engine_options,
        )  # fmt: skip
        self._device, self._why = await choose(self.config.device, config, on_exit=self._device_exited)

    async def _start_device(self) -> None:
        assert self._device is not None
        await self._device.start()
        self._peers = None
        await self.host.device_up(self.config.mtu)

    async def stop(self, *, clean: bool) -> None:
        """Let go. `clean` removes the device, the firewall table, links, routes and rules, started here or before."""
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.gather(self._guard, return_exceptions=True)
            self._guard = None
        for watcher in self._watchers:
            watcher.stop()
        if self._forgetting is not None:
            self._forgetting.cancel()
            await asyncio.gather(self._forgetting, return_exceptions=True)
            self._forgetting = None
        async with self._lock:
            await self._forget_doomed()
            if self._device is None and clean:
                await self._choose_device()
            if self._device is not None:
                await self._device.stop(clean=clean)
            if clean:
                # The rules that keep packets out go last.
                await self.host.clean()
                await self.firewall.remove()
                with contextlib.suppress(RetinueError):  # a kernel without it has had none
                    await taps.answer_arp(self.config.interface, wanted=False)
            await self.host.stop()

    # ---- apply

    async def apply(self, plan: Plan) -> Applied:
        """Carry out a plan. Raises RetinueError; then nothing is allowed that the old plan or this one does not allow."""
        async with self._lock:
            started = time.monotonic()
            changes = diff(self.plan, plan)
            self.plan = plan
            before = self.host.layout
            failed = await self._carry_out(plan)
            if self.host.layout is not before:  # what the kernel will tell of now is our own doing
                self._host_soon = max(self._host_soon, time.monotonic() + HOST_CALM)
            await self._forget(changes, plan)
            return Applied(changes, time.monotonic() - started, failed, plan.notes)

    async def _carry_out(self, plan: Plan) -> dict[InstanceKey, str]:
        if self._device is None:
            raise Unreachable("device.gone", "the data plane has not been started")
        # Taking away is tried on every part, whatever becomes of the others.
        errors: list[RetinueError] = []
        bad: dict[str, str] = {}
        try:
            await self.firewall.narrow(plan)
        except RetinueError as e:
            errors.append(e)
        try:
            bad = await self.host.narrow(plan)
        except RetinueError as e:
            errors.append(e)
        try:
            await self._apply_peers(plan)
        except RetinueError as e:
            errors.append(e)
        if errors:
            raise errors[0]
        await self.firewall.widen(plan)
        await self._answer_arp(plan)
        bad |= await self.host.widen(plan, bad)
        return {key: bad[at.veth] for key, at in plan.attachments.items() if at.veth is not None and at.veth in bad}

    async def _answer_arp(self, plan: Plan, *, again: bool = False) -> None:
        """Guests behind a tap find their gateway; without it they only cannot be reached."""
        wanted = any(at.kind == "tap" for at in plan.attachments.values())
        if wanted == self._arp and not (again and wanted):
            return
        try:
            await taps.answer_arp(self.config.interface, wanted=wanted)
            self._arp = wanted
        except RetinueError as e:
            self._tell("tap.arp", f"guests cannot find their gateway by ARP: {e.message}")

    async def _forget(self, changes: Changes, plan: Plan) -> None:
        """Tracked connections that may not go on: the elements that held them are gone already, so nothing passes; but
        while the kernel remembers one, a new flow the other way on the same two ports would be taken for its answer.
        Where no flow may begin the other way, that can wait: one that is remembered is told by a reset that it is over,
        and looking for all of them walks everything that the kernel tracks, in every namespace.
        """
        for pair in (*changes.pairs_gone, *(old for old, now in changes.pairs_changed if old.ports - now.ports)):
            self._doomed[pair.src, pair.dst] = pair
        if any((dst, src) in plan.pairs for src, dst in self._doomed):
            await self._forget_doomed()
        elif self._doomed and self._forgetting is None:
            self._forgetting = asyncio.create_task(self._forget_later(), name="forget connections")

    async def _forget_later(self) -> None:
        await asyncio.sleep(random.uniform(*FORGET_AFTER))  # noqa: S311 -- jitter
        self._forgetting = None
        await self._forget_doomed()

    async def _forget_doomed(self) -> None:
        doomed, self._doomed = self._doomed, {}
        keep: dict[tuple[str, str], Callable[[int, int | None], bool]] = {}
        for key, pair in doomed.items():
            now = None if self.plan is None else self.plan.pairs.get(key)
            for ends in zip(pair.src_addresses, pair.dst_addresses, strict=True):
                keep[ends] = elements_of(NOTHING if now is None else now.ports).allows
        if not keep:
            return
        try:
            gone = await asyncio.to_thread(forget, keep)
        except (RetinueError, OSError) as e:
            log.warning("tracked connections were not forgotten: %s", e)
            return
        if gone:
            log.info("%d tracked connections ended with their permission", gone)

    async def _apply_peers(self, plan: Plan) -> None:
        assert self._device is not None
        if self._peers is None:
            self._peers = dict((await self._device.read()).peers)
        changes = peer_changes(self._peers, plan.peers)
        if not changes:
            return
        known, self._peers = self._peers, None
        await self._device.apply(changes)
        self._peers = after(known, changes)

    # ---- guard: somebody flushed the rules, the engine died, a namespace went away

    def _device_exited(self) -> None:
        self._lost_device = True
        self._peers = None
        self._suspicion.set()

    def _link_is_gone(self) -> bool:
        if self._device is None or self._device.kind != "kernel":
            return False
        try:
            socket.if_nametoindex(self.config.interface)
        except OSError:
            return True
        return False

    def _network_changed(self) -> None:
        self._moved = True
        if time.monotonic() >= self._host_soon:  # a flood of changes wakes nobody; they are looked at within CHECK_EVERY
            self._suspicion.set()

    async def _guarding(self) -> None:
        while True:
            try:
                async with asyncio.timeout(CHECK_EVERY):
                    await self._suspicion.wait()
            except TimeoutError:
                pass
            self._suspicion.clear()
            now = time.monotonic()
            try:
                await self._verify(host=now >= (self._host_soon if self._moved else self._host_due))
            except RetinueError as e:
                self._tell("plane.repair", f"cannot repair the data plane: {e.message}")
                await asyncio.sleep(RETRY)
                self._suspicion.set()
            except Exception:
                log.exception("the data plane guard failed; it goes on")
                await asyncio.sleep(RETRY)

    async def verify(self) -> tuple[Note, ...]:
        """Compare what is there with the plan last applied, repair it, and say what was repaired."""
        return await self._verify(host=True)

    async def _verify(self, *, host: bool) -> tuple[Note, ...]:
        gone: list[InstanceKey] | None = None
        async with self._lock:
            notes: list[Note] = []
            # The firewall first: it is what others flush, and what must be back soonest.
            if await self.firewall.verify():
                notes.append(Note("firewall.restored", "somebody else had changed our firewall table; it is back"))
                if self.plan is not None:
                    await self._answer_arp(self.plan, again=True)
            # A device of the kernel has no process whose end tells that it is gone.
            if self._lost_device or self._link_is_gone():
                self._lost_device, self._peers = True, None
                await self._start_device()
                self._lost_device = False
                self.host.layout = None
                notes.append(Note("device.restarted", "the tunnel device had gone; a new one is there"))
                if self.plan is not None:
                    await self._carry_out(self.plan)
        if host:
            # Reading all routes and rules takes its time, and no change shall wait for that: under the lock they are read
            # again only where something seems wrong, which a change that came in between explains.
            started, doubtful, self._moved = time.monotonic(), self.host.layout is None, False
            wrong, gone = await self.host.verify()
            now = time.monotonic()
            self._host_soon = now + HOST_SHARE * (now - started)
            self._host_due = max(self._host_soon, now + HOST_EVERY)
            host = bool(wrong) or doubtful
        if host:
            async with self._lock:
                wrong, gone = await self.host.verify()
                if self.host.layout is None:
                    wrong = ["an earlier change was not carried out whole"]
                if wrong and self.plan is not None:
                    self.host.layout = None
                    await self.host.device_up(self.config.mtu)
                    failed = await self._carry_out(self.plan)
                    notes.append(Note("host.restored", "; ".join(wrong[:3])))
                    if failed:
                        notes.append(Note("attach.failed", "; ".join(f"{k}: {why}" for k, why in sorted(failed.items())[:3])))
        for note in notes:
            self._tell(note.code, note.text)
        if gone is not None:
            for key in gone:
                if key not in self._gone:
                    self._tell("netns.gone", f"the network namespace of {key} is gone", key)
            self._gone = set(gone)
        return tuple(notes)

    def _tell(self, code: str, text: str, instance: InstanceKey | None = None) -> None:
        if self.config.on_event is not None:
            self.config.on_event(Event(code, text, instance))

    # ---- read

    def listen(self, handle: Handler) -> tuple[list[Listener], list[str]]:
        """Sockets that tell of connections and of logged packets, and why one of them is missing."""
        with contextlib.suppress(RetinueError, OSError):
            self.host.count_connections()
        begins: tuple[tuple[str, Callable[[Listener], None]], ...] = (
            ("connections", Listener.watch_connections),
            ("refusals", lambda one: one.bind_log(log_group(self.config.interface))),
        )
        found: list[Listener] = []
        missing: list[str] = []
        for what, begin in begins:
            one: Listener | None = None
            try:
                one = Listener(handle)
                begin(one)
                found.append(one)
            except (RetinueError, OSError) as e:
                if one is not None:
                    one.close()
                missing.append(f"{what} are not recorded: {e.message if isinstance(e, RetinueError) else e.strerror}")
        return found, missing

    def connections(self, limit: int) -> list[Tracked]:
        """Tracked connections of this namespace; none when there are more than `limit`. Blocking."""
        count = netns.sysctl("netfilter/nf_conntrack_count")
        return listing() if count is not None and int(count) <= limit else []

    async def verdicts(self) -> dict[str, int]:
        """Packets by verdict since the table was made."""
        return await self.firewall.verdicts()

    async def noted(self, kind: str) -> list[DeniedFlow]:
        """Flows ``denied``, ``audited`` or ``idled`` (ended as idle) lately."""
        return await self.firewall.noted(kind)

    async def counters(self) -> Counters:
        """What the device and the firewall have counted."""
        if self._device is None:
            raise Unreachable("device.gone", "the data plane has not been started")
        peers = await self._device.counters()
        verdicts, denied = await self.firewall.counters()
        return Counters(peers, verdicts, tuple(denied), 0 if self.plan is None else self.plan.element_count)
