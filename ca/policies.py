"""Policy revisions: checked, tested against the registry, diffed, signed, kept for ever; and questions about them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, insert, select

from ca import audit, rows, schema
from ca.desk import Desk
from ca.rows import InstanceRow
from ca.store import any_of
from identity.errors import BadInput, BadPolicy, NotFound
from identity.records import PolicyFile, PolicyRecord
from identity.wire.admin import ExplainReply, PolicyFileIn, PolicyReply
from policy import language
from policy.classes import Classes
from policy.compile import compile_policy, inactive, next_change
from policy.explain import explain
from policy.model import Policy
from policy.ports import PortMap, proto_name, proto_number
from policy.program import Program, Subject
from policy.test import run_tests

MAX_DIFF: Final = 10_000  # pairs named in one diff
_Group = tuple[int, int]  # class before, class after

Files = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One revision as stored."""

    revision: int
    digest: str
    files: list[tuple[str, str]]
    author: str
    issued: int
    record: str


def newest(tx: Connection) -> PolicyRow | None:
    """The revision in force; None before the first."""
    row = newest_raw(tx)
    return None if row is None else parse_row(row)


def newest_raw(tx: Connection) -> dict[str, Any] | None:
    """The same, not parsed yet."""
    row = (
        tx.execute(select(schema.policies).order_by(schema.policies.c.revision.desc()).limit(1))
        .mappings()
        .first()
    )
    return None if row is None else dict(row)


def parse_row(row: dict[str, Any]) -> PolicyRow:
    return PolicyRow(**{**row, "files": [(f["name"], f["text"]) for f in json.loads(row["files"])]})


@dataclass(frozen=True, slots=True)
class InForce:
    """A policy and what it compiles to at one moment; `until` is when that may change by itself (None: never)."""

    policy: Policy
    program: Program
    until: int | None

    @classmethod
    def at(cls, policy: Policy, now: int, running: Collection[str]) -> InForce:
        return cls(policy, compile_policy(policy, now, running), next_change(policy, now))


NO_POLICY: Final = Program(())


def subjects(instances: Iterable[InstanceRow]) -> dict[str, Subject]:
    """The identities that exist, by name: every instance that is not revoked."""
    return {r.name: Subject(r.name, dict(r.labels), r.spiffe_id) for r in instances if r.state != "revoked"}


class Policies:
    """Transactions over policy revisions. `now` is seconds since the epoch, `actor` goes to the audit."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def apply(self, files: Files, author: str, now: int, actor: str, *, dry_run: bool = False) -> PolicyReply:
        """Put a policy in force, or (`dry_run`) say what it would change. The digest in force again changes nothing.

        Raises BadPolicy ``policy.*`` with its position when it is malformed, ``policy.tests`` when a test in its files
        fails; then nothing changed.
        """
        policy = language.load(files)
        with self._desk.store.write() as tx:
            known = subjects(rows.instances(tx))
            program = compile_policy(policy, now, known)
            self._tests(policy, program, known)
            current = newest(tx)
            before = compile_policy(language.load(current.files), now, known) if current else NO_POLICY
            gained, lost = _diff(before, program, list(known.values()))
            if current is not None and current.digest == policy.digest:
                return _reply(current)
            revision = current.revision + 1 if current else 1
            row = PolicyRow(revision, policy.digest, list(files), author, now, record="")
            if not dry_run:
                self.insert(tx, revision, row.digest, files, author, now)
                audit.append(tx, now, actor, "policy.apply", f"revision {revision}", digest=row.digest, author=author,
                             gained=len(gained), lost=len(lost))  # fmt: skip
        return _reply(row).model_copy(update={"gained": gained, "lost": lost, "applied": not dry_run})

    def insert(
        self, tx: Connection, revision: int, digest: str, files: Files, author: str, now: int
    ) -> None:
        """Sign and publish a revision that was checked, inside the caller's transaction."""
        record = PolicyRecord(
            trust_domain=str(self._desk.trust_domain), revision=revision, digest=digest,
            files=[PolicyFile(name=n, text=t) for n, t in files], author=author, issued=now,
        )  # fmt: skip
        tx.execute(
            insert(schema.policies).values(
                revision=revision, digest=digest, author=author, issued=now, record=self._desk.sign(record),
                files=json.dumps([{"name": n, "text": t} for n, t in files]),
            )
        )  # fmt: skip
        self._desk.store.log(tx, now, "policy", "policy")

    @staticmethod
    def _tests(policy: Policy, program: Program, known: dict[str, Subject]) -> None:
        failed = [r for r in run_tests(policy, program, list(known.values()), known) if not r.passed]
        if failed:
            first = failed[0]
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise BadPolicy(
                "policy.tests", f"a test of this policy fails: {first.message}{more}", file=first.where.file,
                line=first.where.line, column=first.where.column, hint="correct the rule or the test; the policy in force is unchanged",
            )  # fmt: skip

    def show(self, revision: int | None = None) -> PolicyReply:
        """One revision, by default the one in force. Raises NotFound."""
        with self._desk.store.read() as tx:
            current = newest(tx)
            if current is None:
                raise NotFound(
                    "policy.none",
                    "no policy was ever applied: nothing is permitted",
                    hint="retinue-ca policy apply FILE...",
                )
            if revision is None or revision == current.revision:
                return _reply(current)
            row = (
                tx.execute(select(schema.policies).where(schema.policies.c.revision == revision))
                .mappings()
                .first()
            )
            if row is None:
                raise NotFound(
                    "policy.revision",
                    f"there is no policy revision {revision}",
                    hint=f"the newest is {current.revision}",
                )
            return _reply(parse_row(dict(row)))

    def history(self) -> list[PolicyReply]:
        """Every revision without its files' texts, newest first."""
        c = schema.policies.c
        query = select(c.revision, c.digest, c.author, c.issued).order_by(c.revision.desc())
        with self._desk.store.read() as tx:
            return [PolicyReply(files=[], **row) for row in tx.execute(query).mappings()]

    def explain(self, src: str, dst: str, proto: str, port: int | None, now: int) -> ExplainReply:
        """Why `src` may or may not reach `dst`. Raises NotFound for unknown workloads, BadInput for a bad flow."""
        number = proto_number(proto)
        if port is not None and not 1 <= port <= 65535:
            raise BadInput("port.range", f"port out of range: {port}", hint="ports are 1 to 65535")
        with self._desk.store.read() as tx:
            known = subjects(rows.instances(tx))
            current = newest(tx)
        one, other = _known(known, src), _known(known, dst)
        policy = language.load(current.files) if current else Policy(digest="")
        program = compile_policy(policy, now, known)
        found = explain(program, one, other, number, port, asleep=inactive(policy, now, known))
        rule = found.decision.rule
        return ExplainReply(
            src=src, dst=dst, proto=proto_name(number), port=port, verdict=found.decision.verdict,
            reason=found.decision.reason, rule=rule.id if rule else None,
            where=str(rule.where) if rule and rule.where else None, digest=found.decision.digest,
            near_misses=[f"{m.rule.id}: {m.failed}" for m in found.near_misses],
            smallest_change=str(found.smallest_change) if found.smallest_change else None,
        )  # fmt: skip

    def time_passed(self, now: int) -> None:
        """A window opened or closed, or a grant ended: let everyone's scope be computed again, at a new position."""
        with self._desk.store.write() as tx:
            self._desk.store.log(tx, now, "policy", "policy")


def _diff(
    before: Program, after: Program, known: Sequence[Subject]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pairs that gain and lose ports: {"src", "dst", "ports"}, by name, at most MAX_DIFF each.

    Equal to policy.questions.difference, but over pairs of groups: subjects that neither program tells apart.
    """
    old, new = Classes(before, known), Classes(after, known)
    groups: dict[_Group, list[str]] = defaultdict(list)
    for name in sorted(s.name for s in known):
        groups[old.class_of(name), new.class_of(name)].append(name)
    of_old, of_new = defaultdict[int, list[_Group]](list), defaultdict[int, list[_Group]](list)
    for group in groups:
        of_old[group[0]].append(group)
        of_new[group[1]].append(group)
    gained: dict[_Group, list[tuple[_Group, PortMap]]] = {}
    lost: dict[_Group, list[tuple[_Group, PortMap]]] = {}
    for group in groups:
        others = {g for number in old.targets(group[0]) for g in of_old[number]}
        others |= {g for number in new.targets(group[1]) for g in of_new[number]}
        pairs = [(g, old.between(group[0], g[0]), new.between(group[1], g[1])) for g in others]
        gained[group] = [(g, has - had) for g, had, has in pairs if has - had]
        lost[group] = [(g, had - has) for g, had, has in pairs if had - has]
    return _listed(groups, gained), _listed(groups, lost)


def _listed(
    groups: dict[_Group, list[str]], ports: dict[_Group, list[tuple[_Group, PortMap]]]
) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for src, group in sorted((name, group) for group, names in groups.items() for name in names):
        shown = [(str(allowed), groups[other]) for other, allowed in ports[group]]
        pairs = sorted((dst, text) for text, names in shown for dst in names if dst != src)
        out += [{"src": src, "dst": dst, "ports": text} for dst, text in pairs]
        if len(out) >= MAX_DIFF:
            return out[:MAX_DIFF]
    return out


def _reply(row: PolicyRow) -> PolicyReply:
    return PolicyReply(
        revision=row.revision, digest=row.digest, files=[PolicyFileIn(name=n, text=t) for n, t in row.files],
        author=row.author, issued=row.issued,
    )  # fmt: skip


def _known(known: dict[str, Subject], name: str) -> Subject:
    if name not in known:
        raise NotFound(
            "workload.unknown",
            f"no workload named {ascii(name)[:80]}",
            hint=any_of(sorted(known), name) or "see: retinue-ca workload list",
        )
    return known[name]
