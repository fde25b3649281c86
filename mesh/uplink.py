"""The endpoint's link to the control plane: the feed in, reports out, its own certificate renewed. All of it may fail
for as long as it likes: nothing here widens or removes anything, and every wait has full jitter.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Literal

import structlog
from cryptography import x509

from identity.bundle import TrustBundle
from identity.errors import BadState, NotVerified, RetinueError, Unreachable
from identity.wire.admin import ExplainReply
from identity.wire.enroll import Cipher, SidecarTokenReply, SidecarTokenRequest, SvidReply, SvidRequest
from identity.wire.feed import Report
from identity.wire.jwt import JwtReply, JwtRequest
from identity.wire.log import MAX_LEAVES, LogReply
from mesh.control import FEED_IDLE, Busy, ControlClient, backoff
from mesh.enroll import Enrollment, renew
from mesh.heads import Heads
from mesh.health import Health
from mesh.recovery import OF_NO_USE, newer_trust, recover, useless
from mesh.summaries import APART, EVERY, Summaries
from mesh.svid import renew_at, taint_at
from mesh.sync import Accepted, Event, FrameRefused, NeedSnapshot, RecordRefused, Refreshed, SyncMachine
from policy.flows import FlowSummary

FEED_CAP: Final = 5.0  # seconds, ceiling of the wait before reconnecting
RENEW_CAP: Final = 300.0
LOG_EVERY: Final = 60.0  # seconds between two looks at the transparency log, at most
SPREAD: Final = 0.5  # seconds within which a report goes that nobody waits for: thousands would come at once
RETURNING: Final = 3.0  # the same, after coming back: the CA may have been started anew and know nothing
LOW_LIFE: Final = 0.25  # of the certificate's life left: say so

log = structlog.get_logger("retinue.uplink")


def boottime() -> float:
    """Seconds on the clock that never steps and goes on during suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Uplink:
    """One endpoint's conversations with its CA.

    on_events: is told, and awaited, after every line of the feed that had an effect
    report:    what to report now, None for nothing yet
    instead:   the ciphers to promise when the device cannot do those of the record given, else None
    gather:    what was recorded of flows since the last call
    """

    def __init__(
        self,
        enrollment: Enrollment,
        machine: SyncMachine,
        health: Health,
        *,
        on_events: Callable[[list[Event]], Awaitable[None]],
        report: Callable[[], Report | None],
        instead: Callable[[list[Cipher]], list[Cipher] | None] = lambda _: None,
        gather: Callable[[], Iterable[FlowSummary]] = tuple,
    ) -> None:
        self.enrollment = enrollment
        self.machine = machine
        self.control: Literal["connected", "disconnected"] = "disconnected"
        self._health = health
        self._on_events = on_events
        self._report = report
        self._instead = instead
        self._client: tuple[ControlClient, TrustBundle, Enrollment] | None = None
        self._tell = asyncio.Event()
        self._owed = False  # a report, equal to the last one or not
        self._trust_news = asyncio.Event()
        self._fetched: TrustBundle | None = None  # newer trust than the feed has brought
        self._heard: tuple[int, str, float] | None = None  # (our serial, tainted key, when it was heard of)
        self.log_every = LOG_EVERY
        self.workload_certificates: Callable[[], Mapping[str, x509.Certificate]] = dict  # of what is placed here
        self.summaries = Summaries()
        self._gather = gather

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed(), name="feed")
                tasks.create_task(self._reports(), name="reports")
                tasks.create_task(self._renewals(), name="renewals")
                tasks.create_task(self._log_watch(), name="log")
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client[0].close()

    def tell(self) -> None:
        """Something worth a report changed."""
        self._tell.set()

    # ---- requests

    async def svid(self, request: SvidRequest) -> SvidReply:
        """A workload's certificate. Raises what the CA answered."""
        return await (await self._current()).post("/v1/svid", request, SvidReply)

    async def jwt(self, request: JwtRequest) -> JwtReply:
        """A JWT-SVID of an instance placed here. Raises what the CA answered."""
        return await (await self._current()).post("/v1/jwt", request, JwtReply)

    async def sidecar_token(self, request: SidecarTokenRequest) -> SidecarTokenReply:
        """A join token for the sidecar of a workload placed here."""
        return await (await self._current()).post("/v1/sidecar-token", request, SidecarTokenReply)

    async def explain(self, src: str, dst: str, proto: str, port: int | None) -> ExplainReply:
        """The CA's answer for workloads this endpoint does not know."""
        params = {"src": src, "dst": dst, "proto": proto} | ({"port": str(port)} if port is not None else {})
        return await (await self._current()).get("/v1/explain", ExplainReply, params=params, timeout=5.0)

    async def _current(self) -> ControlClient:
        """The client for short requests: a new one for a new certificate of ours, or when newer trust ends the server's."""
        trust = self.trust
        if self._client is not None and self._client[2] == self.enrollment:
            client, known, _ = self._client
            if known == trust or client.adopt(trust):
                self._client = (client, trust, self.enrollment)
                return client
        await self.close()
        self._client = (self.enrollment.client(trust), trust, self.enrollment)
        return self._client[0]

    @property
    def trust(self) -> TrustBundle:
        """The newest bundle known."""
        known = [self.machine.trust, self.enrollment.bundle, *([self._fetched] if self._fetched else [])]
        return max(known, key=lambda b: b.sequence)

    # ---- feed

    async def _feed(self) -> None:
        attempt = 0
        while True:
            heard = [False]
            retry_after = 0.0
            try:
                await self._follow(heard)
            except Busy as e:
                retry_after = e.retry_after
                self._lost(e)
            except RetinueError as e:
                self._lost(e)
            except Exception as e:
                log.exception("the feed failed in an unforeseen way")
                self._lost(Unreachable("feed.failed", f"the feed failed: {type(e).__name__}"))
            self.control = "disconnected"
            attempt = 0 if heard[0] else attempt + 1
            await asyncio.sleep(backoff(attempt, random.random(), cap=FEED_CAP, retry_after=retry_after))  # noqa: S311 -- jitter

    async def _follow(self, heard: list[bool]) -> None:
        """One connection. `heard[0]` becomes true once it carried anything that verified."""
        self.machine.connected()
        resume = self.machine.resume
        params = {"timeline": resume.timeline, "revision": str(resume.revision)} if resume else None
        async with (
            self.enrollment.client(self.trust) as client,
            client.stream("/v1/feed", params=params, idle=FEED_IDLE) as lines,
        ):
            async for line in lines:
                events = self.machine.receive(line, wall=time.time(), mono=boottime())
                if any(isinstance(e, Accepted | Refreshed) for e in events):
                    heard[0] = True
                    if self.control == "disconnected":
                        self.control = "connected"
                        log.info("connected", ca=self.enrollment.ca_url)
                        self._health.clear("control.disconnected")
                        self._owed = True
                        self._tell.set()
                self._log(events)
                if events:
                    await self._on_events(events)
                if any(isinstance(e, NeedSnapshot) for e in events):
                    return
                if self.machine.lag >= self.machine.lease:
                    log.warning("heartbeats come late: connecting anew", seconds=round(self.machine.lag, 1))
                    return
                if any(isinstance(e, Accepted) and "bundle" in e.changed for e in events):
                    self._trust_news.set()
                    if not client.believed(self.trust):
                        log.info("the CA's certificate is not believed any more: connecting anew")
                        return

    def _lost(self, error: RetinueError) -> None:
        self._health.put("control.disconnected", "warning", f"no feed from the CA: {error.message}")

    def _log(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case RecordRefused(key, error):
                    loud = log.error if error.code.endswith((".equivocation", ".signature")) else log.warning
                    loud("a record was refused; what was in force stays", key=key, code=error.code, why=error.message)
                case FrameRefused(error):
                    log.warning("a frame was refused", code=error.code, why=error.message)
                case NeedSnapshot(reason):
                    log.info("asking for a snapshot", why=reason)
                case Accepted(position, changed):
                    log.debug("accepted", timeline=position.timeline, revision=position.revision, changed=len(changed))
                case _:
                    pass

    # ---- reports

    async def _reports(self) -> None:
        attempt, flows_sent, due = 0, 0.0, None
        sent: Report | None = None
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY):
                    await self._tell.wait()
            self._tell.clear()
            self.summaries.collect(self._gather())
            report = self._report()
            same = report == sent and attempt == 0 and not self._owed
            if report is None or (same and not len(self.summaries)) or self.control == "disconnected":
                continue
            if same and boottime() - flows_sent < APART:
                loop.call_later(APART, self._tell.set)
                continue
            if not same and not self._awaited(report, sent):
                if due is None:
                    due = loop.time() + random.uniform(0.0, RETURNING if self._owed else SPREAD)  # noqa: S311 -- jitter
                    loop.call_at(due, self._tell.set)
                if loop.time() < due:
                    continue
            due = None
            batch, flows_sent = self.summaries.take(), boottime()
            try:
                full = report.model_copy(update={"flows": batch}) if batch else report
                await (await self._current()).send("/v1/report", full, timeout=10.0)
                attempt, sent, self._owed = 0, report, False
                if len(self.summaries):
                    self._tell.set()
            except RetinueError as e:
                self.summaries.give_back(batch)
                log.info("a report could not be sent", code=e.code, why=e.message)
                attempt += 1
                loop.call_later(backoff(attempt, random.random(), cap=5.0), self._tell.set)  # noqa: S311 -- jitter

    def _awaited(self, report: Report, sent: Report | None) -> bool:
        """Does a move wait for it? What is held or attached here changed, or peers are being prepared."""
        if sent is None or (report.held, report.attached) != (sent.held, sent.attached):
            return True
        return self.machine.preparing

    # ---- the transparency log

    async def _log_watch(self) -> None:
        """Ask for the log's head and for proofs of what is in force; what does not fit is a condition, nothing more."""
        try:
            heads = Heads(self.enrollment.directory)
        except BadState as e:
            self._health.put("log.state", "error", e.message)
            return
        while True:
            more = heads.pending > MAX_LEAVES
            await asyncio.sleep(random.uniform(0.5, 1.0) if more else self.log_every * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter
            if self.control == "disconnected":
                continue
            asked = heads.ask(self.machine.objects, boottime(), self._certificates())
            try:
                reply = await (await self._current()).post("/v1/log", asked, LogReply, timeout=10.0)
                findings = heads.take(asked, reply, self.trust, boottime())
            except NotVerified as e:
                self._health.put("log.proof", "error", f"the transparency log does not prove what it says: {e.message}")
                continue
            except RetinueError as e:
                if e.code == "log.size":
                    self._health.put("log.fork", "error", e.message)
                log.info("the transparency log could not be asked", code=e.code, why=e.message)
                continue
            self._health.clear("log.proof")
            for found in findings:
                if found.text is None:
                    self._health.clear(found.code)
                else:
                    self._health.put(found.code, "warning" if found.code == "log.restarted" else "error", found.text)

    def _certificates(self) -> dict[str, x509.Certificate]:
        own = self.enrollment.svid
        return {f"{own.spiffe_id} {own.serial:x}": own.chain[0], **self.workload_certificates()}

    # ---- our own certificate

    async def _renewals(self) -> None:
        attempt, unit, drawn_for = 0, 0.0, -1
        while True:
            svid = self.enrollment.svid
            if svid.serial != drawn_for:
                # Drawn once a certificate: drawn at every look, the earliest moment would win.
                unit, drawn_for = random.random(), svid.serial  # noqa: S311 -- jitter
            now, life = time.time(), svid.not_after - svid.not_before
            if svid.not_after - now < LOW_LIFE * life:
                left = max(0, int(svid.not_after - now))
                self._health.put("svid.expiring", "error" if left == 0 else "warning", f"our certificate ends in {left} s")
            else:
                self._health.clear("svid.expiring")
            if attempt:
                cap = min(RENEW_CAP, max(1.0, life / 20))
                await asyncio.sleep(backoff(attempt, random.random(), base=min(2.0, cap), cap=cap))  # noqa: S311 -- jitter
            elif (due := self._due(unit)) > now and self._instead(self.enrollment.record.ciphers) is None:
                # Short steps: the wall clock may be set, and the machine may sleep.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(due - now, 60.0)):
                        await self._trust_news.wait()
                self._trust_news.clear()
                if time.time() < self._due(unit):
                    continue
            try:
                await self._stay()
                log.info("our certificate was renewed", expires=self.enrollment.svid.not_after)
                # A CA that kept the promise in the record is asked again, but not at once.
                attempt = 0 if self._instead(self.enrollment.record.ciphers) is None else attempt + 1
                self._health.clear("svid.refused")
            except RetinueError as e:
                attempt += 1
                if not isinstance(e, Unreachable):
                    self._health.put("svid.refused", "error", f"our certificate cannot be renewed: {e.message}")
                log.warning("renewal failed", code=e.code, why=e.message, hint=e.hint)

    def _due(self, unit: float) -> float:
        """When to renew (seconds since the epoch): in the middle of its life; sooner when what it hangs from is tainted,
        at a moment of our own; at once when it is of no use.
        """
        svid, trust = self.enrollment.svid, self.trust
        if useless(self.enrollment, trust, time.time()):
            return 0.0
        due = renew_at(svid.not_before, svid.not_after, unit)
        taint = trust.taint_of(svid.chain)
        if taint is None:
            return due
        if self._heard is None or self._heard[:2] != (svid.serial, taint.key):
            self._heard = svid.serial, taint.key, time.time()
        return min(due, taint_at(taint, self._heard[2], unit))

    async def _stay(self) -> None:
        """Renew; or, when our certificate or the trust held here is of no use any more, come back by the enrolment key."""
        record = self.enrollment.record
        ciphers = self._instead(record.ciphers) or record.ciphers
        if not useless(self.enrollment, self.trust, time.time()):
            try:
                self.enrollment = await renew(self.enrollment, record.underlay, ciphers, bundle=self.trust)
                return
            except RetinueError as e:
                if e.code not in OF_NO_USE:
                    raise
                log.info("renewal was refused; looking for newer trust", code=e.code)
        self._fetched = await newer_trust(self.enrollment.ca_url, self.trust)
        if useless(self.enrollment, self._fetched, time.time()):
            log.info("coming back by the enrolment key")
            self.enrollment = await recover(self.enrollment, self._fetched, record.underlay, ciphers)
        else:
            self.enrollment = await renew(self.enrollment, record.underlay, ciphers, bundle=self._fetched)
