"""Policy revisions: checked, tested against the registry, diffed, signed, kept for ever; and questions about them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, insert, select, update

from ca import audit, flow_store, policy_authority, rows, schema, transparency
from ca.contradiction import check_policy
from ca.desk import Desk
from ca.rows import InstanceRow
from ca.store import any_of
from identity.errors import BadInput, BadPolicy, Conflict, NotFound, NotVerified, Refused
from identity.records import PolicyFile, PolicyRecord, PolicyTrial, unverified
from identity.wire.admin import ExplainReply, PolicyFileIn, PolicyReply
from policy import foreign, language
from policy.compile import compile_policy, inactive
from policy.explain import explain, to_reply
from policy.model import Policy
from policy.ports import PortMap, proto_number
from policy.program import Program, Subject
from policy.questions import Group, GroupChanges
from policy.replay import Recording
from policy.rollout import Canary, Staged
from policy.signing import Authority, PartMark, verify_bundle
from policy.test import run_tests

MAX_DIFF: Final = 10_000  # pairs named in one diff

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
    kind: str | None = None
    trial: str | None = None

    def staged(self) -> Staged:
        """The policy and what is rolled out beside it. Raises BadPolicy."""
        base = language.load(self.files)
        if self.trial is None:
            return Staged(base)
        trial = PolicyTrial.model_validate_json(self.trial)
        canary = Canary.of(trial.names, trial.labels, everybody=trial.everybody)
        return Staged(base, language.load([(f.name, f.text) for f in trial.files]), canary)

    def said(self, trust_domain: str) -> PolicyRecord:
        """The record as this CA signed it."""
        return unverified(PolicyRecord, self.record, trust_domain=trust_domain)


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
    trial: Policy | None = None

    @classmethod
    def at(cls, staged: Staged, now: int, running: Collection[str]) -> InForce:
        return cls(staged.base, staged.program(now, running), staged.next_change(now), staged.trial)


NO_POLICY: Final = Program(())


def subjects(instances: Iterable[InstanceRow]) -> dict[str, Subject]:
    """The identities that exist, by name: every instance that is not revoked."""
    return {r.name: Subject(r.name, dict(r.labels), r.spiffe_id) for r in instances if r.state != "revoked"}


class Policies:
    """Transactions over policy revisions. `now` is seconds since the epoch, `actor` goes to the audit."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def apply(
        self, files: Files, author: str, now: int, actor: str, *, dry_run: bool = False, parts: Sequence[str] = (),
        kind: str = "apply",
    ) -> PolicyReply:  # fmt: skip
        """Put a policy in force, or (`dry_run`) say what it would change. The digest in force again changes nothing.

        parts: what operators signed (policy/signing.py); without them an authority refuses.
        Raises BadPolicy ``policy.*`` with its position when it is malformed, ``policy.tests`` when a test in its files
        fails; NotVerified ``policy.*`` for signatures; Conflict ``rollout.running``; then nothing changed.
        """
        with self._desk.store.write() as tx:
            self.no_rollout(tx)
            known = subjects(rows.instances(tx))
            current = newest(tx)
            policy, program = self.check(tx, files, parts, now, known, current)
            before = current.staged().program(now, known) if current else NO_POLICY
            gained, lost = difference_of(before, program, list(known.values()))
            if current is not None and current.digest == policy.digest and self._same_parts(current, parts):
                return _reply(current)
            revision = current.revision + 1 if current else 1
            row = PolicyRow(revision, policy.digest, list(files), author, now, record="", kind=kind)
            if not dry_run:
                self.insert(tx, revision, row.digest, files, author, now, parts=parts, kind=kind)
                audit.append(tx, now, actor, "policy.apply", f"revision {revision}", digest=row.digest, author=author,
                             gained=len(gained), lost=len(lost), kind=kind)  # fmt: skip
        return _reply(row).model_copy(update={"gained": gained, "lost": lost, "applied": not dry_run})

    def _same_parts(self, current: PolicyRow, parts: Sequence[str]) -> bool:
        return sorted(current.said(str(self._desk.trust_domain)).parts) == sorted(parts)

    @staticmethod
    def no_rollout(tx: Connection) -> None:
        """Raises Conflict ``rollout.running`` while a policy is being rolled out."""
        current = newest_raw(tx)
        if current is not None and current["trial"] is not None:
            raise Conflict(
                "rollout.running", "a policy is being rolled out; another one cannot come in between",
                hint="retinue-ca policy rollout status; then promote or abort it",
            )  # fmt: skip

    def check(
        self, tx: Connection, files: Files, parts: Sequence[str], now: int, known: dict[str, Subject], current: PolicyRow | None
    ) -> tuple[Policy, Program]:  # fmt: skip
        """Signatures first, then the language, then the policy's own tests. Raises NotVerified, BadPolicy."""
        authority = policy_authority.load(tx, str(self._desk.trust_domain))
        if authority is not None:
            verify_bundle(authority, files, parts, self.marks(authority, current))
        elif parts:
            raise NotVerified(
                "authority.missing", "a signed bundle, but this CA knows no policy authority",
                hint="retinue-ca policy authority apply FILE, then apply the bundle",
            )  # fmt: skip
        policy = language.load(files)
        if policy.reviews and authority is None:
            first = policy.reviews[0]
            raise BadPolicy(
                "policy.review", "approvals are counted by signatures, and this CA has no policy authority",
                file=first.where.file, line=first.where.line, column=first.where.column,
                hint="remove review:, or set up an authority: retinue policy authority new",
            )  # fmt: skip
        own = str(self._desk.trust_domain)
        for rule in policy.rules():
            if own in foreign.trust_domains(rule.src):
                raise BadPolicy(
                    "policy.foreign", f"{own} is this trust domain itself, so {rule.id} would select nobody",
                    file=rule.where.file, line=rule.where.line, column=rule.where.column, hint="write workload: NAME, or under: PATH",
                )  # fmt: skip
        program = compile_policy(policy, now, known)
        self._tests(policy, program, known, flow_store.recording(tx, now))
        return policy, program

    def marks(self, authority: Authority, current: PolicyRow | None) -> dict[str, PartMark]:
        """What is in force of each scope of the authority, as hosts remember it."""
        if current is None:
            return {}
        said = current.said(str(self._desk.trust_domain))
        if not said.parts or not said.authority:
            return {}
        return policy_authority.marks_of(said, authority)

    def insert(
        self, tx: Connection, revision: int, digest: str, files: Files, author: str, now: int, *,
        parts: Sequence[str] = (), kind: str = "apply", trial: PolicyTrial | None = None,
    ) -> None:  # fmt: skip
        """Sign and publish a revision that was checked, inside the caller's transaction."""
        authority = policy_authority.load(tx, str(self._desk.trust_domain))
        record = PolicyRecord(
            trust_domain=str(self._desk.trust_domain), revision=revision, digest=digest,
            files=[PolicyFile(name=n, text=t) for n, t in files], author=author, issued=now,
            authority=authority.texts() if authority is not None and parts else [], parts=list(parts), trial=trial,
        )  # fmt: skip
        envelope = self._desk.sign(record)
        transparency.record(tx, now, "policy", f"revision {revision}", envelope)
        tx.execute(
            insert(schema.policies).values(
                revision=revision, digest=digest, author=author, issued=now, record=envelope,
                files=json.dumps([{"name": n, "text": t} for n, t in files]), kind=kind,
                trial=trial.model_dump_json() if trial is not None else None,
            )
        )  # fmt: skip
        self._desk.store.log(tx, now, "policy", "policy")

    def verify(self, row: PolicyRow) -> None:
        """Does a row say what was signed for it? Raises BadState ``store.contradiction``."""
        check_policy(self._desk, row)

    def publish(
        self, tx: Connection, current: PolicyRow | None, files: Files, digest: str, author: str, now: int, *,
        parts: Sequence[str] = (), kind: str, trial: PolicyTrial | None = None,
    ) -> int:  # fmt: skip
        """The next revision, inside the caller's transaction; its number. Raises BadState ``store.contradiction``."""
        if current is not None:
            self.verify(current)
        revision = current.revision + 1 if current else 1
        self.insert(tx, revision, digest, files, author, now, parts=parts, kind=kind, trial=trial)
        return revision

    def authority_chain(self) -> list[str]:
        """The documents of the policy authority, oldest first; none while there is none."""
        with self._desk.store.read() as tx:
            found = policy_authority.load(tx, str(self._desk.trust_domain))
        return found.texts() if found is not None else []

    def set_authority(
        self, chain: Sequence[str], now: int, actor: str, bundle: tuple[Files, Sequence[str]] | None = None
    ) -> Authority:
        """Take the first authority document, or the next ones, with a bundle when the policy in force needs other signatures.

        A rollout whose policy would not be signed well enough any more ends at once: the policy before stays.
        Raises NotVerified ``authority.*``, and what `apply` raises; then nothing changed.
        """
        with self._desk.store.write() as tx:
            authority = policy_authority.put(tx, self._desk, chain, now, actor)
            current = newest(tx)
            if current is None and bundle is None:
                return authority
            known = subjects(rows.instances(tx))
            said = current.said(str(self._desk.trust_domain)) if current is not None else None
            files, parts = bundle or (current.files if current else [], said.parts if said else [])
            try:
                policy, _ = self.check(tx, files, parts, now, known, current)
            except (NotVerified, BadPolicy) as error:
                if bundle is not None:
                    raise
                raise policy_authority.still_signed(error) from None
            kept = self._still_signed(authority, said, files, parts)
            self.publish(tx, current, files, policy.digest, current.author if current and bundle is None else actor, now,
                         parts=parts, kind="authority", trial=kept)  # fmt: skip
            if said is not None and said.trial is not None and kept is None:
                audit.append(tx, now, actor, "rollout.abort", said.trial.id, why="a signer of it is a signer no more")
                tx.execute(
                    update(schema.rollouts).where(schema.rollouts.c.id == said.trial.id).values(state="aborted", ended=now)
                )
            return authority

    def _still_signed(
        self, authority: Authority, said: PolicyRecord | None, files: Files, parts: Sequence[str]
    ) -> PolicyTrial | None:
        """The trial under way, when the authority still finds it signed."""
        if said is None or said.trial is None:
            return None
        trial = said.trial
        try:
            base = verify_bundle(authority, files, parts)
            marks = {scope: part.mark for scope, part in base.items()}
            verify_bundle(authority, [(f.name, f.text) for f in trial.files], trial.parts, marks)
        except (NotVerified, BadPolicy):
            return None
        return trial

    def rollback(self, revision: int, author: str, now: int, actor: str, parts: Sequence[str] = ()) -> PolicyReply:
        """Publish an older revision's files anew. With an authority they must come signed anew (`parts`).

        A signature on an older part would let whoever holds the CA go back to it at any time, so hosts never take one
        (``policy.replay``); a rollout that is still watched goes back by itself and needs none, because the policy before
        is in force beside it until it is kept. Raises NotFound, Refused ``policy.rollback_unsigned``, and what `apply` raises.
        """
        found = self.show(revision)
        files = [(f.name, f.text) for f in found.files]
        with self._desk.store.read() as tx:
            signed = policy_authority.load(tx, str(self._desk.trust_domain)) is not None
        if signed and not parts:
            raise Refused(
                "policy.rollback_unsigned", f"revision {revision} comes back only when its owners sign it anew",
                hint=f"retinue-ca policy show --revision {revision} --out DIR; retinue policy sign DIR/* --base BUNDLE --key KEY; "
                f"retinue-ca policy rollback {revision} --signed BUNDLE",
            )  # fmt: skip
        return self.apply(files, author, now, actor, parts=parts, kind=f"rollback {revision}")

    @staticmethod
    def _tests(policy: Policy, program: Program, known: dict[str, Subject], recorded: Recording) -> None:
        failed = [r for r in run_tests(policy, program, list(known.values()), known, recorded) if not r.passed]
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
        query = select(c.revision, c.digest, c.author, c.issued, c.kind).order_by(c.revision.desc())
        with self._desk.store.read() as tx:
            return [
                PolicyReply(files=[], **{**row, "kind": row["kind"] or "apply"})
                for row in tx.execute(query).mappings()
            ]

    def compare(self, one: int, other: int, now: int) -> PolicyReply:
        """What revision `other` gives and takes compared with `one`, over the workloads there are. Raises NotFound."""
        before, after = self._row(one), self._row(other)
        with self._desk.store.read() as tx:
            known = subjects(rows.instances(tx))
        old, new = (compile_policy(language.load(r.files), now, known) for r in (before, after))
        gained, lost = difference_of(old, new, list(known.values()))
        return _reply(after).model_copy(update={"gained": gained, "lost": lost, "applied": False})

    def _row(self, revision: int) -> PolicyRow:
        with self._desk.store.read() as tx:
            found = tx.execute(select(schema.policies).where(schema.policies.c.revision == revision)).mappings().first()
        if found is None:
            raise NotFound("policy.revision", f"there is no policy revision {revision}", hint="see: retinue-ca policy history")
        return parse_row(dict(found))

    def explain(self, src: str, dst: str, proto: str, port: int | None, now: int) -> ExplainReply:
        """Why `src` may or may not reach `dst`. Raises NotFound for unknown workloads, BadInput for a bad flow."""
        number = proto_number(proto)
        if port is not None and not 1 <= port <= 65535:
            raise BadInput("port.range", f"port out of range: {port}", hint="ports are 1 to 65535")
        with self._desk.store.read() as tx:
            known = subjects(rows.instances(tx))
            current = newest(tx)
        own = str(self._desk.trust_domain)
        one, other = _known(known, src, own), _known(known, dst, own)
        staged = current.staged() if current else Staged(Policy(digest=""))
        asleep = tuple(rule for policy in staged.policies for rule in inactive(policy, now, known))
        found = explain(staged.program(now, known), one, other, number, port, asleep=asleep)
        return to_reply(found, src, dst, number, port)

    def time_passed(self, now: int) -> None:
        """A window opened or closed, or a grant ended: let everyone's scope be computed again, at a new position."""
        with self._desk.store.write() as tx:
            self._desk.store.log(tx, now, "policy", "policy")


def difference_of(
    before: Program, after: Program, known: Sequence[Subject]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pairs that gain and lose ports: {"src", "dst", "ports"}, by name, at most MAX_DIFF each.

    Equal to policy.questions.difference, but cut off.
    """
    found = GroupChanges(before, after, known, known)
    gained = {group: [(g, has - had) for g, had, has in pairs if has - had] for group, pairs in found.changes.items()}
    lost = {group: [(g, had - has) for g, had, has in pairs if had - has] for group, pairs in found.changes.items()}
    return _listed(found.names, gained), _listed(found.names, lost)


def _listed(
    groups: dict[Group, list[str]], ports: dict[Group, list[tuple[Group, PortMap]]]
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
        author=row.author, issued=row.issued, kind=row.kind or "apply",
    )  # fmt: skip


def _known(known: dict[str, Subject], name: str, own: str) -> Subject:
    if foreign.is_foreign(name) and (one := foreign.subject_beside(name, own)) is not None:
        return one
    if name not in known:
        raise NotFound(
            "workload.unknown",
            f"no workload named {ascii(name)[:80]}",
            hint=any_of(sorted(known), name) or "see: retinue-ca workload list",
        )
    return known[name]
