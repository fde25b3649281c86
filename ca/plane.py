"""The control plane of one directory: authority, store, registry and feed behind blocking calls of one worker thread.

Whatever changes the store is followed by `publish`, in the same thread, so frames leave in commit order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import structlog

from ca import audit, processes, succession, transparency
from ca.admins import Admins
from ca.authority import Authority, Issuing, Lifetimes
from ca.callers import Callers
from ca.desk import Desk
from ca.directory import NOBODY, REPLICA, check_newest, create, open_store
from ca.enroll import Challenges
from ca.entries import Entries, check_known
from ca.feed import Feed, Frame
from ca.following import Following
from ca.highwater import FILE as HIGHWATER
from ca.highwater import HighWater, Mark
from ca.joining import Joining
from ca.jwt_authority import JwtAuthority
from ca.life import end_of
from ca.mirror import BUNDLE, Mirror
from ca.older import Plain
from ca.people import People
from ca.placements import Placements
from ca.policies import Policies
from ca.registry import Registry
from ca.returning import Returns
from ca.roles import Principal
from ca.rollouts import Rollouts
from ca.rows import EndpointRow
from ca.scope import Touched
from ca.store import Store
from ca.svids import Svids
from ca.transparency import Head, Log
from ca.upkeep import Upkeep
from identity import certs
from identity.bundle import TrustBundle
from identity.errors import BadState, NotVerified, Refused, RetinueError
from identity.names import TrustDomain
from identity.records import BundleRecord, Heartbeat, P, Payload
from identity.transparency import TreeHead
from identity.wire.admin import ExplainReply, Token, TokenCreate
from identity.wire.enroll import (
    Challenge,
    EnrollReply,
    EnrollRequest,
    RenewReply,
    RenewRequest,
    SidecarTokenReply,
    SvidReply,
    SvidRequest,
)
from identity.wire.entries import EntryCreate, EntryInfo
from identity.wire.jwt import JwtReply, JwtRequest

log = structlog.get_logger("retinue.ca")

MAX_REFUSALS: Final = 120  # audited a minute: strangers must not fill the disk


@dataclass(frozen=True, slots=True)
class Published:
    """Frames to deliver, and endpoints whose streams are to be closed."""

    frames: dict[str, Frame]
    closed: frozenset[str]
    failed: RetinueError | None = None  # nothing committed since may be called done
    current: bool = True  # False: the change log could not be read, so nobody can be told that nothing has changed
    endpoints: frozenset[str] = frozenset()  # whose record is another one
    trust: bool = False  # the bundle is another one


class Plane:
    """Everything but sockets. Open one with `Plane.open`; `clock` gives seconds since the epoch."""

    def __init__(self, directory: Path, store: Store, clock: Callable[[], float]) -> None:
        self.directory = directory
        self.store = store
        self.clock = clock
        self.trust_domain = TrustDomain(store.trust_domain)
        self.process = str(uuid4())
        self.listen = ""
        self.replica = (directory / REPLICA).exists()
        desk = Desk(store, self.trust_domain, self.sign, self.open_record, self.process)
        self.log = Log()
        self.placements = Placements(desk)
        self.registry = Registry(desk, self.placements)
        self.policies = Policies(desk)
        self.rollouts = Rollouts(desk, self.policies)
        self.entries = Entries(desk)
        self.admins = Admins(desk)
        self.people = People(self, self.admins, lambda: self.now)
        self.mirror = Mirror(store, self.open_record)
        self.plain = self.mirror.world.plain = Plain(self.sign, lambda: self.trust)
        self.challenges = Challenges()
        self.joining = Joining(self)
        self.svids = Svids(self)
        self.upkeep = Upkeep(self)
        self.returns = Returns(self)
        self.water: HighWater
        self.authority: Authority
        self.jwt: JwtAuthority
        self.feed: Feed
        self._issuing_for: str | None = None
        self._noted = (0, 0)  # (minute, refusals audited in it)
        self._trust: TrustBundle | None = None
        self._callers = Callers()
        self.moving: Counter[str] = Counter()  # instances that this process is moving now
        self._blocks: str | None = None  # how often the block list changed, as far as the bundle shows it
        self.targets: dict[str, str] = {}  # of moves being prepared, by any process (shared stores only)
        self.leaving: dict[str, str] = {}  # the same instances -> who holds them
        self._head: tuple[tuple[int, int], str] | None = None
        self.following = Following(self) if self.replica else None
        self._held_back = Touched()  # what nobody was told of, while nothing may be signed here

    create = staticmethod(create)

    @classmethod
    def open(cls, directory: Path, clock: Callable[[], float], *, lifetimes: Lifetimes | None = None) -> Plane:
        """Open and check one. Raises BadState ``store.*``, ``ca.*``, ``state.*``."""
        if not directory.is_dir():
            raise BadState(
                "ca.missing",
                f"there is no directory {directory}",
                hint="make a control plane with: retinue-ca init --dir DIR --trust-domain NAME",
            )
        store = open_store(directory)
        try:
            water = HighWater(directory / HIGHWATER)
            check_newest(store, water.mark, directory)
            self = cls.over(directory, store, clock, lifetimes=lifetimes)
            self.water = water
            succession.follow(self, NOBODY)
            self.entries.log_sets(self.now)
            self.placements.abort_left(self.now, processes.living(store) if store.shared else ())
            self.mirror.load(self.now)
            if self.following is not None:
                self.following.look()
            self._acknowledge()
            self.feed = Feed(self.mirror.world, store.timeline, self.mirror.revision, self._sign_beat)
        except BaseException:
            store.close()
            raise
        return self

    @classmethod
    def over(
        cls, directory: Path, store: Store, clock: Callable[[], float], *, lifetimes: Lifetimes | None = None
    ) -> Plane:
        """Registry and authority over an open store, without mirror and feed. Raises BadState ``ca.*``, ``state.*``."""
        self = cls(directory, store, clock)
        self.authority = Authority.load(
            directory, clock(), record_serial=self._record_serial, lifetimes=lifetimes, upkeep=not self.replica
        )
        if self.authority.trust_domain != self.trust_domain:
            raise BadState(
                "ca.foreign",
                f"the database is of {self.trust_domain}, the authority of {self.authority.trust_domain}",
                hint="the database belongs to another directory's authority",
            )
        self.jwt = JwtAuthority.load(directory, clock(), self.authority.keys, upkeep=not self.replica)
        self.authority.jwt_authorities = self.jwt.published
        self.authority.earliest = lambda name: self.trust.blocked.identities.get(str(name), 0)
        return self

    def close(self) -> None:
        if self.store.shared:
            with suppress(RetinueError):
                processes.gone(self.store, self.process)
        self.store.close()
        self.water.close()
        self.authority.close()

    @property
    def now(self) -> int:
        return int(self.clock())

    # ---- signing

    def sign(self, payload: Payload) -> str:
        """A record's envelope. Raises BadState ``replica.keys`` where others sign now."""
        if self.following is not None:
            self.following.check()
        return self.authority.sign_record(payload)

    @property
    def trust(self) -> TrustBundle:
        """What this control plane itself believes, its block list included."""
        if self._trust is None:
            with self.store.read() as tx:
                out = succession.blocked(tx, self.now)
            own = self.following
            self._trust = own.trust(out) if own is not None else self.authority.trust_bundle(0, self.clock(), out)
        return self._trust

    def open_record(self, kind: type[P], envelope: str) -> P:
        """A record of our own, verified. Raises NotVerified."""
        with suppress(NotVerified):  # perhaps of a key that is newer than the bundle kept here
            return self.trust.verify(kind, envelope)
        self._trust = None
        return self.trust.verify(kind, envelope)

    def _sign_beat(self, revision: int, now: int) -> str:
        return self.sign(
            Heartbeat(
                trust_domain=str(self.trust_domain), timeline=self.store.timeline, revision=revision, time=now
            )
        )

    def _record_serial(self, about: Issuing) -> None:
        if self.following is not None:
            self.following.check(certificate=True)
        self.registry.record_serial(
            serial=about.serial, issuer=about.issuer, profile=about.profile, spiffe_id=about.spiffe_id, spki=about.spki,
            endpoint=self._issuing_for, issued=self.now, not_after=about.not_after,
            also=self.returns.note(about, self._issuing_for),
        )  # fmt: skip

    @contextmanager
    def issuing(self, endpoint: str) -> Iterator[None]:
        """Serials recorded meanwhile belong to this endpoint."""
        self._issuing_for = endpoint
        try:
            yield
        finally:
            self._issuing_for = None

    def refresh_bundle(self) -> None:
        """Publish a new bundle when what it says has changed since the stored one. A replica publishes none."""
        with self.store.read() as tx:
            self._trust, self._blocks = None, self.store.get(tx, "blocks")
        if self.replica:
            return
        with self.store.read() as tx:
            stored, sequence = self.store.get(tx, BUNDLE), int(self.store.get(tx, "bundle_sequence") or 0)
            out = succession.blocked(tx, self.now)
        self._trust = fresh = self.authority.trust_bundle(sequence, self.clock(), out)
        if stored is not None:
            try:
                old = fresh.verify(BundleRecord, stored)
                new = fresh.verify(BundleRecord, self.authority.bundle(sequence, self.clock(), out))
                if old.model_copy(update={"issued": 0}) == new.model_copy(update={"issued": 0, "sequence": old.sequence}):
                    return
            except NotVerified:
                log.warning("the stored bundle does not verify any more; a new one is made")
        with self.store.write() as tx:
            envelope = self.authority.bundle(sequence + 1, self.clock(), out)
            self.store.put(tx, BUNDLE, envelope)
            transparency.record(tx, self.now, BUNDLE, f"sequence {sequence + 1}", envelope)
            self.store.put(tx, "bundle_sequence", str(sequence + 1))
            self.store.log(tx, self.now, BUNDLE, BUNDLE)
            audit.append(tx, self.now, NOBODY, "bundle.publish", f"sequence {sequence + 1}")

    @property
    def bundle(self) -> str:
        """The bundle in force."""
        with self.store.read() as tx:
            found = self.store.get(tx, BUNDLE)
        if found is None:
            raise BadState(
                "store.damaged", "the database holds no trust bundle", hint="restore it from a backup"
            )
        return found

    # ---- upkeep

    def publish(self) -> Published:
        """Bring the mirror and every scope up to date. Raises nothing: what cannot be done now is tried again."""
        try:
            if self._blocks_changed():
                self.refresh_bundle()
            self._acknowledge()
        except RetinueError as e:
            log.critical("a position cannot be acknowledged; nobody is told of it", why=e.message)
            return Published({}, frozenset(), e, current=False)
        try:
            touched = self.mirror.catch_up(self.now)
        except Exception as e:
            log.critical(
                "the change log cannot be read; nobody is told anything until it can",
                why=f"{type(e).__name__}: {e}",
            )
            return Published({}, frozenset(), current=False)
        try:
            self.upkeep.follow_grants()
        except RetinueError as e:
            log.warning("which grants are live could not be noted; tried again with the next heartbeat", why=e.message)
        if self.following is not None:
            if BUNDLE in touched.keys:
                self._trust = None
                self.following.look()
            self._held_back.merge(touched)
            if self.following.stale is not None:
                return Published({}, frozenset(self.feed.connected), current=False)
            touched, self._held_back = self._held_back, Touched()
        world = self.mirror.world
        gone = frozenset(n for n in touched.endpoints if world.endpoints[n].record is None)
        for name in gone:
            self.feed.drop(name)
        if self.store.shared:
            for key in touched.instances:
                self._note_target(key)
        frames = self.feed.advance(self.mirror.revision, touched, self.now)
        return Published(frames, gone, endpoints=frozenset(touched.endpoints), trust=BUNDLE in touched.keys)

    def _note_target(self, key: str) -> None:
        target = self.mirror.world.instances[key].target
        if target is None:
            self.targets.pop(key, None)
            self.leaving.pop(key, None)
        else:
            self.targets[key] = target
            if (holder := self.mirror.world.instances[key].holder) is not None:
                self.leaving[key] = holder

    def _blocks_changed(self) -> bool:
        with self.store.read() as tx:
            return self.store.get(tx, "blocks") != self._blocks

    def _acknowledge(self) -> None:
        """Put the mark to the newest position, before anybody is told of it.

        Raises BadState ``store.failed`` when it cannot be written; then nothing more is accepted.
        """
        with self.store.read() as tx:
            mark = Mark(self.store.timeline, self.store.revision(tx), int(self.store.get(tx, "base") or 0))
        try:
            self.water.raise_to(mark)
        except OSError as e:
            raise self.store.fail(f"{self.water.path.name} cannot be written: {e.strerror}") from None

    def tick(self) -> None:
        """Once a heartbeat: what changes by the clock alone, and the log's next head."""
        self.upkeep.tick()

    def follow_keeper(self, own: Following) -> bool:
        """Take a new copy of the directory over, if there is one. May anything be signed here?"""
        try:
            if self.authority.refresh(self.clock()) or own.stale is not None:
                self.jwt = JwtAuthority.load(self.directory, self.clock(), self.authority.keys, upkeep=False)
                self.authority.jwt_authorities = self.jwt.published
                self._trust = None
                own.look()
        except BadState as e:
            log.critical("the copy of the authority cannot be read; the one before stays", code=e.code, why=e.message)
        return own.stale is None

    def seal(self) -> None:
        """Place what waits for the transparency log."""
        with self.store.read() as tx:
            if not self.log.waiting(tx):
                return
        with self.store.write() as tx:
            self.log.seal(tx, self.now, self.store.timeline)

    def tree_head(self, head: Head) -> str:
        """A head, signed: at most once a second for one size."""
        at = (head.size, self.now)
        if self._head is None or self._head[0] != at:
            self._head = at, self.sign(
                TreeHead(
                    trust_domain=str(self.trust_domain), timeline=self.store.timeline, size=head.size, root=head.root,
                    time=self.now,
                )
            )  # fmt: skip
        return self._head[1]

    def maintain(self) -> None:
        """Once an hour: renew the authority's own certificates. A replica leaves that to the process it was copied from."""
        self.upkeep.maintain()

    def expire(self) -> list[str]:
        """End the identities and entries whose time has come. Returns them."""
        return self.upkeep.expire()

    # ---- registration entries

    def create_entry(self, request: EntryCreate, actor: str) -> EntryInfo:
        """Raises what `Entries.create` and `end_of` raise."""
        check_known(request)
        with self.store.write() as tx:
            ends_at, ends_with = end_of(
                tx, self.now, request.name, ends_at=request.ends_at, ends_in=request.ends_in, ends_with=request.ends_with
            )
            row = self.entries.create(tx, request, ends_at, ends_with, self.now, actor)
            return self.entries.info(tx, row)

    def list_entries(self) -> list[EntryInfo]:
        with self.store.read() as tx:
            return [self.entries.info(tx, row) for row in self.entries.all(tx)]

    def delete_entry(self, entry_id: str, actor: str) -> EntryInfo:
        """Raises NotFound."""
        with self.store.write() as tx:
            row = self.entries.get(tx, entry_id)
            found = self.entries.info(tx, row).model_copy(update={"opens": self.entries.opens(tx, row)})
            self.entries.delete(tx, entry_id, self.now, actor)
            return found

    # ---- tokens and enrolment

    def token(self, request: TokenCreate, actor: str) -> Token:
        """Make a join token. Raises BadInput unless exactly one of host and workload is named."""
        return self.joining.token(request, actor)

    def sidecar_token(self, caller: EndpointRow, workload: str) -> SidecarTokenReply:
        """A token for the sidecar of a workload that is placed on the calling host."""
        return self.joining.sidecar_token(caller, workload)

    def challenge(self, token_id: str, server_leaf: bytes, source: str = "") -> Challenge:
        """A nonce; the same answer whether or not the token exists."""
        return self.joining.challenge(token_id, server_leaf, source)

    def enroll(self, request: EnrollRequest) -> EnrollReply:
        """Decide, claim, issue, publish. Raises what `ca.enroll.admit` and `Registry.claim` raise."""
        return self.joining.enroll(request)

    # ---- members

    def still_in_force(self, name: str, serial: int) -> bool:
        """Does this certificate still speak for that endpoint?"""
        return self.registry.in_force(name, serial)

    def caller(self, chain: list[bytes]) -> tuple[EndpointRow, int]:
        """Who presented this chain (DER, leaf first), and when its certificate ends. Raises NotVerified, Refused."""
        try:
            caller = self._callers.verify(chain, self.trust, self.clock())
        except NotVerified as e:
            if e.code == "cert.revoked":  # the registry may know why
                shown = certs.parse_der_chain(chain)
                svid = certs.verify_chain(shown, self.trust.roots, self.trust_domain, self.clock())
                self.registry.caller(svid.spiffe_id, svid.serial, certs.not_before(svid.leaf))
            raise
        if caller.spiffe_id.kind not in {"host", "sidecar"}:
            raise Refused(
                "caller.kind",
                f"{caller.spiffe_id} is not an endpoint",
                hint="use the endpoint's own certificate",
            )
        row = self.registry.caller(caller.spiffe_id, caller.serial, caller.not_before)
        self.returns.check(row.name)
        return row, caller.not_after

    def believes(self, chain: Sequence[bytes]) -> bool:
        """Would this chain (DER, leaf first) be accepted now?"""
        try:
            self._callers.verify(chain, self.trust, self.clock())
        except NotVerified:
            return False
        return True

    def admin_caller(self, chain: list[bytes]) -> Principal:
        """The administrator who presented this chain (DER, leaf first). Raises NotVerified, Refused ``admin.*``."""
        svid = self.trust.verify_svid(certs.parse_der_chain(chain), self.clock())
        with self.store.read() as tx:
            return self.admins.caller(tx, svid)

    def renew(self, caller: EndpointRow, request: RenewRequest, serial: int | None = None) -> RenewReply:
        """`serial`: of the certificate that the caller showed. Raises Refused ``caller.quarantined``."""
        return self.returns.renew(caller, serial, request)

    def underlay(self, caller: EndpointRow, hints: list[str]) -> EndpointRow:
        return self.registry.set_underlay(caller.name, hints, self.now)

    def svid(self, caller: EndpointRow, request: SvidRequest) -> SvidReply:
        """A workload's certificate, for the endpoint that holds the instance or is about to. Raises Refused."""
        return self.svids.svid(caller, request)

    def jwt_svid(self, caller: EndpointRow, request: JwtRequest) -> JwtReply:
        """A JWT-SVID of an instance that the calling endpoint holds. Raises Refused, BadInput ``jwt.audience``."""
        return self.svids.jwt_svid(caller, request)

    def explain_for(
        self, caller: EndpointRow, src: str, dst: str, proto: str, port: int | None
    ) -> ExplainReply:
        """Explain a pair to a member that holds one of the two. Raises Refused otherwise."""
        mine = {r.name for r in self.placements.all() if caller.name in {r.endpoint, r.target}}
        if not mine & {src, dst}:
            raise Refused(
                "explain.not_here",
                f"neither workload is placed on {caller.name}",
                hint="ask on the machine of one of them, or on the CA: retinue-ca explain",
            )
        return self.policies.explain(src, dst, proto, port, self.now)

    # ---- audit of refusals

    def refused(self, action: str, subject: str, error: RetinueError, *, actor: str = "endpoint") -> None:
        """Note a refusal, so many a minute; a store that cannot write must not hide the refusal itself."""
        minute, count = self.now // 60, self._noted[1] + 1
        self._noted = (minute, count if minute == self._noted[0] else 1)
        if self._noted[1] > MAX_REFUSALS:
            log.warning("a refusal is not audited: too many in this minute", action=action, code=error.code)
            return
        try:
            with self.store.write() as tx:
                audit.append(tx, self.now, actor, action, subject, outcome=error.code)
        except RetinueError as e:
            log.critical("a refusal could not be audited", code=e.code)
