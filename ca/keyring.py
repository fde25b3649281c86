"""The authority's members: which roots, intermediates and record keys there are, and what may be done with each.

    prepared -> active -> old -> tainted -> revoked

One of a kind is active; it signs. What is prepared is published already, so that it is known before it signs. What is old
signs no more and stays good; what is tainted stays good while everything below it is renewed; what is revoked is refused
everywhere. The manifest (authority.json) is written last and as one, so every change happens or does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Protocol, get_args

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ca.signer import FileSigner, Signer
from identity.errors import BadInput, BadState, Conflict
from identity.keys import write_secret
from identity.names import TrustDomain

MANIFEST: Final = "authority.json"
VERSIONS: Final = (1, 2)  # 1: one member of each kind, named as the kind, active

Kind = Literal["root", "intermediate", "records", "policy"]
State = Literal["prepared", "active", "old", "tainted", "revoked"]
KeyType = Literal["p256", "p384", "ed25519"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
KEY_TYPES: Final[dict[str, KeyType]] = {"root": "p384", "intermediate": "p256", "records": "ed25519", "policy": "ed25519", "jwt": "p256"}
NAME: Final = re.compile(r"(root|intermediate|records|policy)(-[1-9][0-9]{0,5})?|jwt-[0-9a-f]{16}")  # the last: kid, no member
GOOD: Final[frozenset[State]] = frozenset({"prepared", "active", "old", "tainted"})  # states in which others believe it


class Keys(Protocol):
    """Where private keys are: they are made there, sign there and never leave it. Names are those of members."""

    def make(self, name: str, kind: KeyType) -> Signer:
        """A new key, durable before it is used. Raises Conflict ``key.exists``."""

    def open(self, name: str) -> Signer:
        """Raises BadState ``state.key*`` when it is missing or unusable."""

    def has(self, name: str) -> bool: ...

    def destroy(self, name: str) -> None:
        """For ever. A key that is not there is no error."""


class FileKeys:
    """Key files ``NAME.key``, 0600, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise BadInput("key.name", f"not the name of a key: {ascii(name)[:80]}")
        return self._directory / f"{name}.key"

    def make(self, name: str, kind: KeyType) -> Signer:
        path = self._path(name)
        if path.exists():
            raise Conflict("key.exists", f"{path} exists already")
        return FileSigner.create(path, new_key(kind))

    def open(self, name: str) -> Signer:
        return FileSigner.load(self._path(name))

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def destroy(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)


def new_key(kind: KeyType) -> ec.EllipticCurvePrivateKey | Ed25519PrivateKey:
    """A private key in memory."""
    if kind == "ed25519":
        return Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP384R1() if kind == "p384" else ec.SECP256R1())


@dataclass(frozen=True, slots=True)
class Member:
    """One root, intermediate or record key. `since`: when its state began; `until`: end of a taint's spread, else 0."""

    name: str
    kind: Kind
    state: State
    made: int
    since: int
    until: int = 0
    key: str = ""  # of a revoked one: SHA-256 of its SubjectPublicKeyInfo, hex
    ends: int = 0  # of a revoked one: when its certificate ends; it is listed until then


@dataclass(frozen=True, slots=True)
class Ring:
    """All members, in the order they were made."""

    trust_domain: TrustDomain
    created: int
    members: tuple[Member, ...]

    def get(self, name: str) -> Member:
        """Raises BadInput ``authority.unknown``."""
        for member in self.members:
            if member.name == name:
                return member
        raise BadInput(
            "authority.unknown", f"the authority has no member {ascii(name)[:80]}",
            hint=f"it has: {', '.join(m.name for m in self.members)}",
        )  # fmt: skip

    def of(self, kind: Kind, states: Iterable[State] = get_args(State)) -> list[Member]:
        wanted = frozenset(states)
        return [m for m in self.members if m.kind == kind and m.state in wanted]

    def active(self, kind: Kind) -> Member:
        """The one that signs. Raises BadState ``ca.state``."""
        found = self.of(kind, ["active"])
        if len(found) != 1:
            raise BadState("ca.state", f"the authority has {len(found)} active members of kind {kind}")
        return found[0]

    def prepared(self, kind: Kind) -> Member | None:
        return next(iter(self.of(kind, ["prepared"])), None)

    def new_name(self, kind: Kind) -> str:
        """``intermediate-3``: names are never used again."""
        numbers = [int(m.name.partition("-")[2] or 1) for m in self.members if m.kind == kind]
        return f"{kind}-{max(numbers, default=0) + 1}"

    def put(self, *changed: Member) -> Ring:
        """With these members in the place of those of their names, or added."""
        by_name = {m.name: m for m in changed}
        kept = tuple(by_name.pop(m.name, m) for m in self.members)
        return replace(self, members=(*kept, *by_name.values()))

    def without(self, name: str) -> Ring:
        return replace(self, members=tuple(m for m in self.members if m.name != name))

    # ---- the file

    def save(self, directory: Path) -> None:
        """The moment a change happens."""
        members = [
            {k: getattr(m, k) for k in ("name", "kind", "state", "made", "since", "until", "key", "ends")}
            for m in self.members
        ]
        state = {"version": 2, "trust_domain": self.trust_domain.name, "created": self.created, "members": members}
        write_secret(directory / MANIFEST, json.dumps(state, indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> Ring:
        """Raises BadState ``ca.missing``, ``ca.version``, ``ca.state``."""
        path = directory / MANIFEST
        try:
            state = json.loads(path.read_bytes())
            if not isinstance(state, dict) or state.get("version") not in VERSIONS:
                raise BadState("ca.version", f"{path} is not of version {VERSIONS[-1]}")
            trust_domain, created = TrustDomain(str(state["trust_domain"])), int(state.get("created", 0))
            raw = state["members"] if state["version"] == 2 else [_first(kind, created) for kind in KINDS]
            ring = cls(trust_domain, created, tuple(_member(one) for one in raw))
            for kind in KINDS:
                ring.active(kind)
            if len({m.name for m in ring.members}) != len(ring.members):
                raise ValueError("names")
        except FileNotFoundError:
            raise BadState(
                "ca.missing", f"there is no authority in {directory}",
                hint="run: retinue-ca init --dir DIR --trust-domain NAME",
            ) from None  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BadInput):
            raise BadState("ca.state", f"{path} cannot be read") from None
        return ring


def _first(kind: Kind, created: int) -> dict[str, object]:
    return {"name": kind, "kind": kind, "state": "active", "made": created, "since": created}


def _member(raw: dict[str, object]) -> Member:
    member = Member(**raw)  # type: ignore[arg-type]  # checked below
    texts = (member.name, member.kind, member.state, member.key)
    numbers = (member.made, member.since, member.until, member.ends)
    if not (all(isinstance(t, str) for t in texts) and all(isinstance(n, int) for n in numbers)):
        raise ValueError("type")
    found = NAME.fullmatch(member.name)
    if found is None or found[1] != member.kind or member.state not in get_args(State):
        raise ValueError("member")
    return member
