"""The ledger: every act, certificate, JWT-SVID and published record, append-only, and the Merkle tree over it.

An entry is written in the transaction of what it tells of. Its place in the tree is given by `seal`, under the writer's
lock and at most once a heartbeat, so issuing needs no global order and a head costs one batch of inserts. Complete
subtrees are stored once (`ledger_nodes`); a proof reads about log2(size) of them, and they never change, so they are
kept in memory as well. Secrets never come here: callers pass names, serials and codes, and of a token what it says.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from ca.schema import ledger, ledger_heads, ledger_nodes
from identity.errors import BadInput, BadState, NotFound, NotVerified
from identity.merkle import Tree, grow
from identity.transparency import (
    CERTIFICATE_FIELDS,
    JWT_FIELDS,
    act_leaf,
    canonical,
    certificate_leaf,
    jwt_leaf,
    record_leaf,
)

ACT: Final = "act"
CERTIFICATE: Final = "certificate"
JWT: Final = "jwt"
TOLD: Final = frozenset({ACT, CERTIFICATE, JWT})  # kinds whose detail is JSON; of any other it is a signed record
BATCH: Final = 20_000  # leaves placed in one transaction at most
_INSERT: Final = insert(ledger)
CACHE: Final = 200_000  # subtrees kept in memory, about 100 bytes each


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the ledger. `outcome` is ``ok`` or the code of the error; `detail` of a record is its envelope."""

    seq: int
    leaf: int | None
    kind: str
    at: int
    actor: str
    action: str
    subject: str
    outcome: str
    detail: dict[str, Any] | str
    hash: str

    @classmethod
    def of(cls, row: RowMapping) -> Entry:
        detail = json.loads(row["detail"]) if row["kind"] in TOLD else row["detail"]
        return cls(**{**row, "detail": detail})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Head:
    """`root` (hex) over the first `size` leaves."""

    size: int
    root: str


# ---- writing


def record_act(
    tx: Connection, at: int, actor: str, action: str, subject: str, outcome: str, detail: str
) -> None:
    """Log an act; `detail` is JSON text."""
    actor, subject = actor[:255], subject[:320]
    found = act_leaf(at, actor, action, subject, outcome, detail)
    _append(tx, found, kind=ACT, at=at, actor=actor, action=action, subject=subject, outcome=outcome, detail=detail)


def record(tx: Connection, at: int, kind: str, subject: str, envelope: str) -> None:
    """Log a signed record that is being published: kind is its type."""
    _append(
        tx, record_leaf(envelope), kind=kind, at=at, actor="ca", action="publish", subject=subject[:320], outcome="ok",
        detail=envelope,
    )  # fmt: skip


def record_certificate(tx: Connection, at: int, endpoint: str | None, about: Mapping[str, Any]) -> None:
    """Log a certificate that is about to be signed (identity.transparency.CERTIFICATE_FIELDS)."""
    _append(
        tx, certificate_leaf(about), kind=CERTIFICATE, at=at, actor=endpoint or "ca", action="issue",
        subject=str(about["spiffe_id"])[:320], outcome="ok", detail=canonical(about),
    )  # fmt: skip


def record_jwt(tx: Connection, at: int, endpoint: str, about: Mapping[str, Any]) -> None:
    """Log a JWT-SVID that is about to be handed out (identity.transparency.JWT_FIELDS)."""
    _append(
        tx, jwt_leaf(about), kind=JWT, at=at, actor=endpoint, action="issue", subject=str(about["spiffe_id"])[:320],
        outcome="ok", detail=canonical(about),
    )  # fmt: skip


def is_logged(tx: Connection, kind: str, subject: str, envelope: str) -> bool:
    """Is this very record an entry, placed or waiting?"""
    c = ledger.c
    query = select(c.seq).where(c.hash == record_leaf(envelope).hex(), c.kind == kind, c.subject == subject[:320])
    return tx.execute(query.limit(1)).first() is not None


def _append(tx: Connection, found: bytes, **values: Any) -> None:
    tx.execute(_INSERT, {"hash": found.hex(), **values})


# ---- reading


def entries(
    tx: Connection, *, after: int = 0, limit: int = 1000, subject: str | None = None, kinds: Collection[str] = ()
) -> list[Entry]:
    """Entries with a sequence number above `after`, oldest first."""
    query = select(ledger).where(ledger.c.seq > after).order_by(ledger.c.seq).limit(limit)
    if subject is not None:
        query = query.where(ledger.c.subject == subject)
    if kinds:
        query = query.where(ledger.c.kind.in_(kinds))
    return [Entry.of(row) for row in tx.execute(query).mappings()]


def placed(tx: Connection, first: int, limit: int) -> list[Entry]:
    """Entries by their place in the tree, from leaf `first` on."""
    query = select(ledger).where(ledger.c.leaf >= first).order_by(ledger.c.leaf).limit(limit)
    return [Entry.of(row) for row in tx.execute(query).mappings()]


def computed(entry: Entry) -> bytes:
    """The leaf hash of what an entry says. Raises NotVerified ``log.entry`` for a certificate's or token's that names none."""
    if entry.kind in {CERTIFICATE, JWT}:
        fields, leaf = (CERTIFICATE_FIELDS, certificate_leaf) if entry.kind == CERTIFICATE else (JWT_FIELDS, jwt_leaf)
        if not isinstance(entry.detail, dict) or not set(fields) <= entry.detail.keys():
            raise NotVerified("log.entry", f"entry {entry.leaf} does not say which {entry.kind} it is of")
        return leaf(entry.detail)
    if entry.kind == ACT:
        return act_leaf(entry.at, entry.actor, entry.action, entry.subject, entry.outcome, canonical(entry.detail))
    return record_leaf(str(entry.detail))


class Log:
    """The tree over one store's ledger. One object a process; its methods take a transaction of the caller."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def head(self, tx: Connection) -> Head:
        """The newest sealed head; the empty tree before the first."""
        row = tx.execute(select(ledger_heads.c.size, ledger_heads.c.root).order_by(ledger_heads.c.size.desc()).limit(1)).first()
        return Head(row.size, row.root) if row is not None else Head(0, Tree(0, self._missing).root().hex())

    @staticmethod
    def waiting(tx: Connection) -> bool:
        """Are there entries without a place?"""
        return tx.execute(select(ledger.c.seq).where(ledger.c.leaf.is_(None)).limit(1)).first() is not None

    def seal(self, tx: Connection, now: int, timeline: str) -> Head:
        """Give every waiting entry its place and store the head, inside a write transaction of the caller."""
        head = self.head(tx)
        query = select(ledger.c.seq, ledger.c.hash).where(ledger.c.leaf.is_(None)).order_by(ledger.c.seq).limit(BATCH)
        waiting = tx.execute(query).all()
        if not waiting:
            return head
        read = self._reader(tx)
        fresh = grow(head.size, [bytes.fromhex(row.hash) for row in waiting], read)
        for leaf, row in enumerate(waiting, head.size):
            tx.execute(update(ledger).where(ledger.c.seq == row.seq).values(leaf=leaf))
        stored = [{"level": n, "position": p, "hash": h.hex()} for n, p, h in fresh if n > 0]
        if stored:
            tx.execute(insert(ledger_nodes), stored)
        known = {(n, p): h for n, p, h in fresh}
        size = head.size + len(waiting)
        root = Tree(size, lambda n, p: known.get((n, p)) or read(n, p)).root().hex()
        tx.execute(insert(ledger_heads).values(size=size, root=root, at=now, timeline=timeline))
        return Head(size, root)

    def inclusion(self, tx: Connection, found: str, size: int) -> tuple[int, list[bytes]] | None:
        """Place and path of a leaf hash (hex) in the tree of `size`; None when it is not there (yet)."""
        query = select(func.min(ledger.c.leaf)).where(ledger.c.hash == found, ledger.c.leaf < size)
        index: int | None = tx.execute(query).scalar_one()
        return None if index is None else (index, self._tree(tx, size).inclusion(index))

    def inclusions(self, tx: Connection, found: Collection[str], size: int) -> dict[str, tuple[int, list[bytes]]]:
        """`inclusion` of many: those that are there."""
        c = ledger.c
        query = select(c.hash, func.min(c.leaf)).where(c.hash.in_(found), c.leaf < size).group_by(c.hash)
        tree = self._tree(tx, size)
        return {leaf: (index, tree.inclusion(index)) for leaf, index in tx.execute(query).all()}

    def consistency(self, tx: Connection, earlier: int, size: int) -> list[bytes]:
        """The path from one size to a later one. Raises BadInput for sizes that are not of this log."""
        if not 0 <= earlier <= size <= self.head(tx).size:
            raise BadInput("log.size", f"this log has no tree that leads from {earlier} to {size} leaves")
        return self._tree(tx, size).consistency(earlier)

    def verify(self, tx: Connection, noted: Head | None = None) -> Head:
        """Make the whole tree again from the entries and compare it with everything stored.

        Raises BadState ``log.broken`` naming the first leaf that does not fit, ``log.cut`` when a head noted elsewhere
        is not of this log.
        """
        edge: dict[tuple[int, int], bytes] = {}  # the complete subtrees a next leaf can need
        per_level: dict[int, Any] = defaultdict(hashlib.sha256)  # over the subtrees of a level, in their order
        heads = dict(tx.execute(select(ledger_heads.c.size, ledger_heads.c.root)).all())

        def read(level: int, position: int) -> bytes:
            return edge[level, position]

        size = 0
        for entry in _walk(tx):
            try:
                same = entry.leaf == size and computed(entry).hex() == entry.hash
            except NotVerified:
                same = False
            if not same:
                raise _broken(size)
            for level, position, found in grow(size, [bytes.fromhex(entry.hash)], read):
                edge[level, position] = found
                edge.pop((level, position - 2), None)
                if level:
                    per_level[level].update(found)
            size += 1
            if size in heads or (noted is not None and noted.size == size):
                root = Tree(size, read).root().hex()
                if heads.get(size, root) != root:
                    raise _broken(size - 1)
                if noted is not None and noted.size == size and noted.root != root:
                    raise _cut()
        head = self.head(tx)
        if head.size != size or (noted is not None and noted.size > size):
            raise _cut()
        stored: dict[int, Any] = defaultdict(hashlib.sha256)
        ordered = select(ledger_nodes).order_by(ledger_nodes.c.level, ledger_nodes.c.position)
        for row in tx.execute(ordered).yield_per(1000):
            stored[row.level].update(bytes.fromhex(row.hash))
        if {n: d.digest() for n, d in stored.items()} != {n: d.digest() for n, d in per_level.items()}:
            raise _broken(size - 1)
        return head

    def find(self, tx: Connection, found: str) -> Entry:
        """The entry of a leaf hash. Raises NotFound."""
        row = tx.execute(select(ledger).where(ledger.c.hash == found).order_by(ledger.c.seq).limit(1)).mappings().first()
        if row is None:
            raise NotFound("log.unknown", "the log has no such entry", hint="see: retinue-ca audit list")
        return Entry.of(row)

    # ---- inside

    def _tree(self, tx: Connection, size: int) -> Tree:
        return Tree(size, self._reader(tx))

    def _reader(self, tx: Connection) -> Any:
        def read(level: int, position: int) -> bytes:
            at = (level, position)
            if (kept := self._nodes.get(at)) is not None:
                return kept
            if level == 0:
                query = select(ledger.c.hash).where(ledger.c.leaf == position)
            else:
                query = select(ledger_nodes.c.hash).where(
                    ledger_nodes.c.level == level, ledger_nodes.c.position == position
                )
            found = tx.execute(query).scalar_one_or_none()
            if found is None:
                self._missing(level, position)
            digest = self._nodes[at] = bytes.fromhex(str(found))
            if len(self._nodes) > CACHE:
                self._nodes.popitem(last=False)
            return digest

        return read

    @staticmethod
    def _missing(level: int, position: int) -> bytes:
        raise BadState(
            "log.broken", f"the transparency log lacks its subtree {level}/{position}", hint="restore it from a backup"
        )


def _walk(tx: Connection) -> Iterator[Entry]:
    query = select(ledger).where(ledger.c.leaf.is_not(None)).order_by(ledger.c.leaf)
    for row in tx.execute(query).mappings().yield_per(1000):
        yield Entry.of(row)


def _broken(leaf: int) -> BadState:
    return BadState(
        "log.broken", f"the transparency log does not hold at leaf {leaf}",
        hint="compare with a backup and with the heads that others remember; from here on it proves nothing",
    )  # fmt: skip


def _cut() -> BadState:
    return BadState(
        "log.cut", "the transparency log is not the one that the noted or recorded head speaks of",
        hint="entries were removed or replaced, or the head is of another CA",
    )  # fmt: skip


def hexes(path: Sequence[bytes]) -> list[str]:
    """A proof as it is sent."""
    return [step.hex() for step in path]
