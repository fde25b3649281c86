"""The plan: what this endpoint's data plane has to be, as one immutable value, and the difference of two plans.

A plan is made by mesh/compile.py from verified state and local facts, and carried out by mesh/dataplane.py. Each part
carries its reason. Nothing in it is a secret; the tunnel's private key never enters a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal, TypeVar

from identity.names import OVERLAY_V4, TrustDomain
from mesh.snapshot import InstanceKey
from policy.evaluate import Bound
from policy.ports import ALL_PORTS, ICMP, ICMPV6, PORTED, PortMap, ranges

K = TypeVar("K")
V = TypeVar("V")

AttachmentKind = Literal["netns", "host", "tap", "unit"]
AttachmentState = Literal["waiting", "prepared", "active", "fenced"]
Cipher = Literal["chacha20poly1305", "aes-256-gcm"]

CHACHA: Final[Cipher] = "chacha20poly1305"
AES: Final[Cipher] = "aes-256-gcm"

# A run of ports up to this long becomes single ports of the hash set. Interval sets are rebuilt on every commit
# (nftables pipapo), so only wide ranges go there.
EXPAND_RANGE: Final = 16


@dataclass(frozen=True, slots=True)
class Elements:
    """A port map in the form of the firewall's sets, before addresses.

    exact: (protocol, port), ranges: (protocol, first, last), protocols: allowed whole; rest: every protocol but `except_`.
    ICMP stays number 1 here: the firewall writes 1 or 58 by family.
    """

    exact: tuple[tuple[int, int], ...] = ()
    ranges: tuple[tuple[int, int, int], ...] = ()
    protocols: tuple[int, ...] = ()
    rest: bool = False
    except_: tuple[int, ...] = ()

    def allows(self, proto: int, port: int | None) -> bool:
        """The verdict the sets give, for a packet that has a port iff its protocol has ports."""
        number = ICMP if proto == ICMPV6 else proto
        if number in self.protocols or (self.rest and number not in self.except_):
            return True
        if port is None:
            return False
        return (number, port) in self.exact or any(p == number and a <= port <= b for p, a, b in self.ranges)

    def __len__(self) -> int:
        return len(self.exact) + len(self.ranges) + len(self.protocols) + (1 + len(self.except_) if self.rest else 0)


@lru_cache(maxsize=4096)
def elements_of(ports: PortMap) -> Elements:
    """The set elements of a port map."""
    exact: list[tuple[int, int]] = []
    wide: list[tuple[int, int, int]] = []
    protocols: list[int] = []
    for proto, bits in ports.ports.items():
        if not bits:
            continue
        if proto not in PORTED or bits == ALL_PORTS:
            protocols.append(proto)
            continue
        for first, last in ranges(bits):
            if last - first < EXPAND_RANGE:
                exact.extend((proto, port) for port in range(first, last + 1))
            else:
                wide.append((proto, first, last))
    return Elements(
        tuple(exact), tuple(wide), tuple(protocols), ports.rest, tuple(ports.ports) if ports.rest else ()
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeerPlan:
    """One tunnel: the peer's key and what may come out of it.

    underlay:    ``address:port`` to send to first (the peer may roam), None when only it knows how to reach us
    allowed_ips: overlay addresses with prefix length, sorted; empty for a peer that is only kept warm
    keepalive:   seconds, 0 for never
    """

    endpoint: str
    tunnel_key: str
    underlay: str | None
    allowed_ips: tuple[str, ...]
    keepalive: int
    cipher: Cipher
    why: str

    @property
    def warm(self) -> bool:
        """Is it there only to be ready?"""
        return not self.allowed_ips


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """A control group that holds an identity inside the host's own network namespace, or that a rule names.

    path:  from the root of the unified hierarchy, without a slash in front
    place: the same as nft has it, from /sys/fs/cgroup
    ident: its id (cgroup_id in the kernel, 64 bits, given once); another one under the same path is another group.
           None: it is not there, and nobody may use the addresses
    uid:   the user whose connections choose the addresses by themselves
    """

    path: str
    place: str
    ident: int | None
    uid: int | None = None

    @property
    def level(self) -> int:
        """How far below the root; the kernel compares the ancestor of a socket's group at this level."""
        return self.path.count("/") + 1


@dataclass(frozen=True, slots=True)
class AttachmentPlan:
    """One local instance.

    veth:      name of the host side of the pair of its namespace, or of its tap; None for kinds host and unit
    addresses: (IPv4, IPv6) it holds inside (states prepared and active), else empty
    Only in state active is it routed to and may anything come from it.
    """

    key: InstanceKey
    kind: AttachmentKind
    netns: str | None
    veth: str | None
    state: AttachmentState
    epoch: int | None
    addresses: tuple[str, ...]
    why: str
    unit: UnitPlan | None = None

    @property
    def active(self) -> bool:
        return self.state == "active"

    @property
    def where(self) -> str:
        """The place, for people."""
        return f"the control group /{self.unit.path}" if self.unit is not None else self.netns or self.veth or "the host itself"


@dataclass(frozen=True, slots=True)
class PairPlan:
    """All that is forwarded from one instance to another; at least one of the two is local.

    enforced: what of it policy permits; the rest is open only while something audits, and is recorded. None: all of it
    bounds:   ceilings, and processes that this host checks because the source is here
    groups:   the control groups among those, as they are now; in one without an id there is nobody
    """

    src: InstanceKey
    dst: InstanceKey
    src_addresses: tuple[str, str]
    dst_addresses: tuple[str, str]
    ports: PortMap
    why: str
    enforced: PortMap | None = None
    bounds: tuple[Bound, ...] = ()
    groups: tuple[UnitPlan, ...] = ()


@dataclass(frozen=True, slots=True)
class Overlay:
    """The address ranges of the mesh."""

    v4: IPv4Network
    v6: IPv6Network

    @classmethod
    def of(cls, trust_domain: str) -> Overlay:
        """Ranges of a trust domain. Raises BadInput for a malformed name."""
        return cls(OVERLAY_V4, TrustDomain(trust_domain).overlay_v6())


@dataclass(frozen=True, slots=True)
class Note:
    """Something the operator should know about this plan; coded, for `retinue status` and doctor."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What the data plane has to be.

    peers by tunnel key; attachments by instance; pairs by (source, destination); `remotes` are the overlay addresses
    of permitted instances elsewhere -> instance; timeline and revision say which state it was made from.
    """

    overlay: Overlay
    interface: str
    mtu: int
    peers: Mapping[str, PeerPlan] = field(default_factory=dict)
    attachments: Mapping[InstanceKey, AttachmentPlan] = field(default_factory=dict)
    pairs: Mapping[tuple[InstanceKey, InstanceKey], PairPlan] = field(default_factory=dict)
    remotes: Mapping[str, InstanceKey] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    timeline: str = ""
    revision: int = 0
    policy_digest: str = ""

    @property
    def active(self) -> Iterator[AttachmentPlan]:
        """Attachments that hold their addresses now."""
        return (a for a in self.attachments.values() if a.active)

    @property
    def host_addresses(self) -> tuple[str, ...]:
        """Addresses held by the host's own namespace: the host's own first, then units', those without a user before."""
        held = [at for at in self.attachments.values() if at.kind in {"host", "unit"} and at.active]
        held.sort(key=lambda at: (at.unit is not None, at.unit is not None and at.unit.uid is not None, at.key))
        return tuple(a for at in held for a in at.addresses)

    @property
    def units(self) -> tuple[AttachmentPlan, ...]:
        """Active instances that are control groups of this host."""
        return tuple(at for _, at in sorted(self.attachments.items()) if at.unit is not None and at.active)

    @property
    def element_count(self) -> int:
        """Firewall elements, both families."""
        return 2 * sum(len(elements_of(p.ports)) for p in self.pairs.values())


@dataclass(frozen=True, slots=True)
class Changes:
    """The difference of two plans. A changed entry is in both the old and the new form."""

    peers_gone: tuple[PeerPlan, ...] = ()
    peers_new: tuple[PeerPlan, ...] = ()
    peers_changed: tuple[tuple[PeerPlan, PeerPlan], ...] = ()
    attachments_gone: tuple[AttachmentPlan, ...] = ()
    attachments_new: tuple[AttachmentPlan, ...] = ()
    attachments_changed: tuple[tuple[AttachmentPlan, AttachmentPlan], ...] = ()
    pairs_gone: tuple[PairPlan, ...] = ()
    pairs_new: tuple[PairPlan, ...] = ()
    pairs_changed: tuple[tuple[PairPlan, PairPlan], ...] = ()

    def __bool__(self) -> bool:
        return any((self.peers_gone, self.peers_new, self.peers_changed, self.attachments_gone, self.attachments_new,
                    self.attachments_changed, self.pairs_gone, self.pairs_new, self.pairs_changed))  # fmt: skip

    def summary(self) -> str:
        """``+1 peer, ~2 pairs``; ``nothing``."""
        parts = []
        for noun, new, changed, gone in (
            ("peer", self.peers_new, self.peers_changed, self.peers_gone),
            ("attachment", self.attachments_new, self.attachments_changed, self.attachments_gone),
            ("pair", self.pairs_new, self.pairs_changed, self.pairs_gone),
        ):
            for sign, many in (("+", len(new)), ("~", len(changed)), ("-", len(gone))):
                if many:
                    parts.append(f"{sign}{many} {noun}{'s' if many > 1 else ''}")
        return ", ".join(parts) or "nothing"


def diff(old: Plan | None, new: Plan) -> Changes:
    """What has to change to get from `old` (None: nothing at all) to `new`."""
    peers = _diff({} if old is None else old.peers, new.peers)
    attachments = _diff({} if old is None else old.attachments, new.attachments)
    pairs = _diff({} if old is None else old.pairs, new.pairs)
    return Changes(*peers, *attachments, *pairs)


def _diff(old: Mapping[K, V], new: Mapping[K, V]) -> tuple[tuple[V, ...], tuple[V, ...], tuple[tuple[V, V], ...]]:
    gone = tuple(v for k, v in old.items() if k not in new)
    added = tuple(v for k, v in new.items() if k not in old)
    changed = tuple((old[k], v) for k, v in new.items() if k in old and old[k] != v)
    return gone, added, changed
