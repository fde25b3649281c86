"""What a single record has to satisfy before it is used, beyond its signature: its key, its sense, and never going back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from identity import certs
from identity.bundle import TrustBundle
from identity.entries import EntriesRecord
from identity.errors import NotVerified, RetinueError
from identity.names import OVERLAY_V4, SpiffeId, TrustDomain
from identity.records import EndpointRecord, ForeignBundle, Payload, PlacementRecord, PolicyRecord
from mesh.snapshot import InstanceKey, addresses, instance_key
from policy.trust import PolicyTrust

TAKEN: Final = "placement.address_taken"
ENTRIES: Final = InstanceKey("entries")  # object key, and where its mark is kept: no instance is called so


@dataclass(frozen=True, slots=True)
class Mark:
    """The highest number accepted for one thing, and the SHA-256 (hex) of the body that had it."""

    number: int
    body: str


@dataclass(frozen=True, slots=True)
class Held:
    """One object in force: the exact envelope and what it says."""

    envelope: str
    payload: Payload


@dataclass(slots=True)
class Rules:
    """The marks and the checks that need them.

    check_policy: raises RetinueError for a signed policy that cannot be used here.
    policy_trust: the operators whose signatures a policy needs, where they are known (mesh/policy_trust.py)
    """

    domain: TrustDomain
    marks: dict[InstanceKey, Mark]
    policy_mark: Mark | None
    check_policy: Callable[[PolicyRecord], None] | None = None
    endpoint: str = ""
    policy_trust: PolicyTrust | None = None

    def record(self, trust: TrustBundle, key: str, envelope: str, old: Held | None) -> Held:
        """Verify one object; `old` is what is in force under its key. Raises RetinueError; changes nothing."""
        kind, _, rest = key.partition("/")
        match kind:
            case "policy" if not rest:
                policy = trust.verify(PolicyRecord, envelope)
                _not_behind(self.policy_mark, policy.revision, policy.digest, "policy", "revision")
                if self.policy_trust is not None:
                    self.policy_trust.check(policy)
                if self.check_policy is not None:
                    self.check_policy(policy)
                return Held(envelope, policy)
            case "entries" if not rest:
                entries = trust.verify(EntriesRecord, envelope)
                if entries.endpoint != self.endpoint:
                    raise NotVerified("entries.endpoint", "registration entries of another endpoint")
                body = hashlib.sha256(entries.model_dump_json(exclude={"issued"}).encode()).hexdigest()
                _not_behind(self.marks.get(ENTRIES), entries.generation, body, "entries", "generation")
                return Held(envelope, entries)
            case "federation":
                foreign = trust.verify(ForeignBundle, envelope)
                _same_key(rest, foreign.foreign)
                if TrustDomain(foreign.foreign) == self.domain:
                    raise NotVerified("federation.own", "a foreign bundle of our own trust domain")
                for root in foreign.roots:
                    certs.parse_chain(root)
                _not_behind(self.marks.get(foreign_mark(rest)), foreign.sequence, foreign_body(foreign), "federation", "sequence")
                return Held(envelope, foreign)
            case "endpoint":
                endpoint = trust.verify(EndpointRecord, envelope)
                _same_key(rest, endpoint.endpoint)
                if (
                    old is not None
                    and isinstance(old.payload, EndpointRecord)
                    and endpoint.generation < old.payload.generation
                ):
                    raise NotVerified(
                        "endpoint.generation",
                        f"generation {endpoint.generation} is behind {old.payload.generation} in force",
                    )
                return Held(envelope, endpoint)
            case "placement" | "prepare":
                placement = trust.verify(PlacementRecord, envelope)
                instance = instance_key(placement.name, placement.instance)
                _same_key(rest, instance)
                self._placement(placement, kind, self.marks.get(instance))
                return Held(envelope, placement)
        raise NotVerified("record.key", f"an object key of no known kind: {ascii(key)[:80]}")

    def _placement(self, placement: PlacementRecord, kind: str, mark: Mark | None) -> None:
        if str(SpiffeId.workload(self.domain, placement.name)) != placement.spiffe_id:
            raise NotVerified("placement.name", "a placement's name and SPIFFE ID differ")
        try:
            v4, v6 = addresses(placement)
        except ValueError:
            raise NotVerified(
                "placement.address", "a placement's addresses are not one IPv4 and one IPv6"
            ) from None
        if v4 not in OVERLAY_V4 or v6 not in self.domain.overlay_v6():
            raise NotVerified("placement.address", "a placement's address lies outside the overlay")
        if (kind == "prepare") != (placement.state == "prepare"):
            raise NotVerified("placement.state", f"a {placement.state} record under the key of a {kind}")
        if kind == "prepare":
            if mark and placement.epoch <= mark.number:
                raise NotVerified(
                    "placement.epoch", f"a prepared epoch {placement.epoch} is not above {mark.number}"
                )
        else:
            _not_behind(mark, placement.epoch, placement_body(placement), "placement", "epoch")

    def note(self, held: Mapping[str, Held]) -> None:
        """Remember what is in force now."""
        for key, one in held.items():
            match one.payload:
                case PlacementRecord() as p if key.startswith("placement/"):
                    self.marks[instance_key(p.name, p.instance)] = Mark(p.epoch, placement_body(p))
                case EntriesRecord() as p:
                    body = hashlib.sha256(p.model_dump_json(exclude={"issued"}).encode()).hexdigest()
                    self.marks[ENTRIES] = Mark(p.generation, body)
                case ForeignBundle() as p:
                    self.marks[foreign_mark(p.foreign)] = Mark(p.sequence, foreign_body(p))
                case PolicyRecord() as p:
                    self.policy_mark = Mark(p.revision, p.digest)
                    if self.policy_trust is not None:
                        self.policy_trust.note(p)


def overtaken(held: Mapping[str, Held], key: str) -> bool:
    """Is the prepared epoch under `key` one that its placement has reached already?"""
    prepare = held[key].payload
    now = held.get(f"placement/{key.removeprefix('prepare/')}")
    return (
        now is not None
        and isinstance(prepare, PlacementRecord)
        and isinstance(now.payload, PlacementRecord)
        and prepare.epoch <= now.payload.epoch
    )


def settle_addresses(held: dict[str, Held], base: Mapping[str, Held]) -> dict[str, RetinueError]:
    """Take placements out of `held` that claim an address of another instance, and say which.

    Who was in force before keeps the address; a record that is refused leaves its instance with the one before.
    """
    refused: dict[str, RetinueError] = {}
    while clashes := dict(_address_clashes(held, base)):
        for key, error in clashes.items():
            before = base.get(key)
            if key not in refused and before is not None and before.envelope != held[key].envelope:
                held[key] = before
            else:
                del held[key]
            refused[key] = error
    return refused


def foreign_mark(trust_domain: str) -> InstanceKey:
    """Where the mark of a foreign bundle is kept: no instance is called so."""
    return InstanceKey(f"federation {trust_domain}")


def foreign_body(record: ForeignBundle) -> str:
    """SHA-256 (hex) of what a foreign bundle says, without when it was signed."""
    return hashlib.sha256(record.model_dump_json(exclude={"issued"}).encode()).hexdigest()


def placement_body(record: PlacementRecord) -> str:
    """SHA-256 (hex) of what a placement says, without when it was signed: equal for a mere re-signing."""
    return hashlib.sha256(record.model_dump_json(exclude={"issued"}, exclude_none=True).encode()).hexdigest()


def _address_clashes(
    held: Mapping[str, Held], base: Mapping[str, Held]
) -> Iterable[tuple[str, RetinueError]]:
    """Placements that claim an address another instance already has; who was in force first keeps it."""
    owner: dict[str, str] = {}
    # Unchanged ones first, then changed ones, then new ones.
    order = sorted(
        (k for k in held if k.startswith("placement/")),
        key=lambda k: (k not in base or base[k].envelope != held[k].envelope, k not in base, k),
    )
    for key in order:
        payload = held[key].payload
        if not isinstance(payload, PlacementRecord) or payload.state != "active":
            continue
        taken = next((owner[a] for a in payload.addresses if owner.get(a, key) != key), None)
        if taken is not None:
            yield key, NotVerified(TAKEN, f"an address of {key} belongs to {taken}")
            continue
        owner.update(dict.fromkeys(payload.addresses, key))


def _not_behind(mark: Mark | None, number: int, body: str, what: str, unit: str) -> None:
    if mark is None or number > mark.number:
        return
    if number < mark.number:
        raise NotVerified(
            f"{what}.{unit}", f"{unit} {number} is behind {unit} {mark.number}, which was seen before"
        )
    if body != mark.body:
        raise NotVerified(f"{what}.equivocation", f"two different records were signed for {unit} {number}")


def _same_key(rest: str, name: str) -> None:
    if rest != name:
        raise NotVerified("record.key", "a record stands under another object's key")
