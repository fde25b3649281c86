"""The signed history of a trust domain, offline: who could reach whom on date D, and how anybody can check it. Pure.

A history file is JSON lines: a header with the newest signed head of the transparency log, then every leaf of the log in
order, as its hash, and for bundles, policies and placements with the signed record itself:

    {"retinue_history": 1, "trust_domain": "...", "head": ENVELOPE}
    {"leaf": 0, "hash": "..."}
    {"leaf": 1, "hash": "...", "kind": "policy", "record": ENVELOPE}

Checked before a question is answered: the root pin, each bundle by the one before, each record's signature by a key of a
bundle, the policy's operators where there is an authority (never less than before), that each record is the leaf that the
tree has there, and that the tree is the one of the signed head: so nothing between was left out, cut or changed. What
is missing after the head can only be seen by comparing with a head noted elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from identity.bundle import TrustBundle, open_bundle
from identity.errors import BadInput, NotFound, NotVerified, RetinueError
from identity.merkle import Tree, grow
from identity.names import TrustDomain
from identity.records import BundleRecord, PlacementRecord, PolicyRecord, unverified
from identity.transparency import TreeHead, record_leaf
from policy.language import digest, load
from policy.program import Program, Subject
from policy.rollout import Canary, Staged
from policy.trust import PolicyTrust

KEY: Final = "retinue_history"
VERSION: Final = 1
MAX_LINE: Final = 16 * 1024 * 1024
KINDS: Final = ("bundle", "policy", "placement")


@dataclass(frozen=True, slots=True)
class Line:
    """One leaf; `record` is empty for those that are only counted."""

    leaf: int
    hash: str
    kind: str = ""
    record: str = ""


def dump_history(trust_domain: str, head: str, lines: Iterable[Line]) -> Iterator[str]:
    """The lines of a history file."""
    yield json.dumps({KEY: VERSION, "trust_domain": trust_domain, "head": head}) + "\n"
    for one in lines:
        row: dict[str, Any] = {"leaf": one.leaf, "hash": one.hash}
        if one.record:
            row |= {"kind": one.kind, "record": one.record}
        yield json.dumps(row) + "\n"


@dataclass(slots=True)
class History:
    """A verified history. `size` and `root` are the log's; `policies` and `placements` are in the order of the log."""

    trust_domain: str
    root_fingerprint: str
    size: int
    root: str
    until: int
    policies: list[PolicyRecord] = field(default_factory=list)
    placements: list[PlacementRecord] = field(default_factory=list)
    trust: PolicyTrust = field(default_factory=lambda: PolicyTrust(""))
    signed_since: int | None = None  # revision from which on operators' signatures were needed

    def at(self, when: int) -> Then:
        """What was in force at an instant. Raises NotFound before the first policy, BadInput after the end of the history."""
        if when > self.until:
            raise BadInput("history.future", f"the history ends at {self.until}, before the date that was asked for",
                           hint="export it again")  # fmt: skip
        policy: PolicyRecord | None = None
        for record in self.policies:
            if record.issued <= when:
                policy = record
        if policy is None:
            raise NotFound("history.before", "no policy was in force at that date: nothing was permitted")
        newest: dict[tuple[str, int], PlacementRecord] = {}
        for one in self.placements:
            if one.issued <= when and one.state != "prepare":
                held = newest.get((one.name, one.instance))
                if held is None or one.epoch >= held.epoch:
                    newest[one.name, one.instance] = one
        subjects: dict[str, Subject] = {}
        places: dict[str, list[str]] = {}
        for (name, _), one in sorted(newest.items()):
            if one.state == "active":
                subjects[name] = Subject(name, dict(one.labels), one.spiffe_id)
                places.setdefault(name, []).append(one.endpoint)
        return Then(when, policy, tuple(subjects.values()), places, self.signed_since)


@dataclass(frozen=True, slots=True)
class Then:
    """The state at one instant: the policy, who was placed, and where."""

    when: int
    record: PolicyRecord
    subjects: tuple[Subject, ...]
    places: dict[str, list[str]]
    signed_since: int | None = None

    @property
    def staged(self) -> Staged:
        base, trial = load([(f.name, f.text) for f in self.record.files]), self.record.trial
        if trial is None:
            return Staged(base)
        canary = Canary.of(trial.names, trial.labels, everybody=trial.everybody)
        return Staged(base, load([(f.name, f.text) for f in trial.files]), canary)

    @property
    def program(self) -> Program:
        return self.staged.program(self.when, {s.name for s in self.subjects})

    @property
    def signed(self) -> bool:
        """Did operators' keys sign it, or the CA's policy key alone?"""
        return bool(self.record.parts)


def read_history(file: str, lines: Iterable[str], root_fingerprint: str, noted: tuple[int, str] | None = None) -> History:
    """Verify a history file from its first line to its last.

    root_fingerprint: of the trust domain's root, hex SHA-256, from elsewhere than this file.
    noted: (size, root) of a head that somebody noted: the history must contain it.
    Raises NotVerified ``history.*``, ``record.*``, ``bundle.*``, ``policy.*``, ``authority.*``, or BadInput for a bad file.
    """
    rows = iter(lines)
    top = _row(file, 1, next(rows, ""))
    if top.get(KEY) != VERSION or not isinstance(top.get("trust_domain"), str) or not isinstance(top.get("head"), str):
        raise BadInput("history.form", f"{file} is not a version {VERSION} history",
                       hint="make one with: retinue-ca policy export-history FILE")  # fmt: skip
    reader = _Reader(TrustDomain(top["trust_domain"]), root_fingerprint, noted)
    for number, text in enumerate(rows, 2):
        if text.strip():
            try:
                reader.take(_line(file, number, text))
            except NotVerified as error:
                raise NotVerified(error.code, f"{file}:{number}: {error.message}", hint=error.hint) from None
    return reader.done(top["head"])


def _row(file: str, number: int, text: str) -> dict[str, Any]:
    try:
        if len(text) > MAX_LINE:
            raise ValueError
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput("history.form", f"{file}:{number}: not a line of a history") from None
    if not isinstance(row, dict):
        raise BadInput("history.form", f"{file}:{number}: not a line of a history")
    return row


def _line(file: str, number: int, text: str) -> Line:
    row = _row(file, number, text)
    leaf, found, kind, record = row.get("leaf"), row.get("hash"), row.get("kind", ""), row.get("record", "")
    if type(leaf) is not int or not isinstance(found, str) or not isinstance(kind, str) or not isinstance(record, str):
        raise BadInput("history.form", f"{file}:{number}: a leaf has a number, a hash and perhaps a record")
    return Line(leaf, found, kind, record)


class _Reader:
    def __init__(self, domain: TrustDomain, pin: str, noted: tuple[int, str] | None) -> None:
        self.domain, self.pin, self.noted = domain, pin, noted
        self.size = 0
        self.bundles: list[TrustBundle] = []
        self.history = History(str(domain), pin, 0, "", 0, trust=PolicyTrust(str(domain)))
        self._nodes: dict[tuple[int, int], bytes] = {}

    def take(self, line: Line) -> None:
        try:
            found = bytes.fromhex(line.hash)
        except ValueError:
            found = b""
        if line.leaf != self.size or len(found) != 32:
            raise NotVerified("history.gap", f"leaf {self.size} of the log is not there")
        if line.record:
            if record_leaf(line.record) != found:
                raise NotVerified("history.leaf", f"the record at leaf {line.leaf} is not the one in the log")
            self._record(line)
        for level, position, node in grow(self.size, [found], lambda n, p: self._nodes[n, p]):
            self._nodes[level, position] = node
            self._nodes.pop((level, position - 2), None)
        self.size += 1
        if self.noted is not None and self.noted[0] == self.size and self._root() != self.noted[1]:
            raise NotVerified("history.head", "the head that was noted is not of this log: a past was rewritten")

    def _root(self) -> str:
        return Tree(self.size, lambda n, p: self._nodes[n, p]).root().hex()

    def _record(self, line: Line) -> None:
        match line.kind:
            case "bundle":
                self._bundle(line.record)
            case "policy":
                self._policy(self._verify(PolicyRecord, line.record))
            case "placement":
                self.history.placements.append(self._verify(PlacementRecord, line.record))
            case _:
                raise NotVerified("history.kind", f"a record of another kind: {ascii(line.kind)[:40]}")

    def _bundle(self, envelope: str) -> None:
        issued = unverified(BundleRecord, envelope, trust_domain=self.domain.name).issued
        if not self.bundles:
            self.bundles.append(open_bundle(envelope, self.pin, self.domain, issued))
        else:
            self.bundles.append(self.bundles[-1].accept_next(envelope, issued))

    def _verify(self, kind: Any, envelope: str) -> Any:
        error: NotVerified = NotVerified("history.bundle", "a record before the first bundle")
        for bundle in reversed(self.bundles):
            try:
                return bundle.verify(kind, envelope)
            except NotVerified as e:
                error = e
        raise error

    def _policy(self, record: PolicyRecord) -> None:
        for texts, stated in [(record.files, record.digest), *([(record.trial.files, record.trial.digest)] if record.trial else [])]:
            if digest([(f.name, f.text) for f in texts]) != stated:
                raise NotVerified("policy.digest", f"policy revision {record.revision} does not have the digest it states")
        try:
            self.history.trust.check(record)
        except RetinueError as e:
            raise NotVerified(e.code, f"policy revision {record.revision}: {e.message}", hint=e.hint) from None
        if self.history.policies and record.revision <= self.history.policies[-1].revision:
            raise NotVerified("policy.revision", f"revision {record.revision} after revision {self.history.policies[-1].revision}")
        self.history.trust.note(record)
        if record.parts and self.history.signed_since is None:
            self.history.signed_since = record.revision
        self.history.policies.append(record)

    def done(self, envelope: str) -> History:
        """The head, signed by a key of a bundle, must be of exactly this tree."""
        head: TreeHead = self._verify(TreeHead, envelope)
        if head.size != self.size or head.root != self._root():
            raise NotVerified("history.head", f"the signed head is of {head.size} leaves; the file has {self.size}, or others")
        if self.noted is not None and self.noted[0] > self.size:
            raise NotVerified("history.cut", f"a head of {self.noted[0]} leaves was noted; this history ends at {self.size}")
        self.history.size, self.history.root, self.history.until = head.size, head.root, head.time
        return self.history
