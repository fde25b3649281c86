"""Who may sign which part of the policy, and whether a bundle is signed by them. Pure.

    authority   a chain of documents (identity.records_policy.AuthorityDocument), each signed by the root signers of the
                one before: it names the operators' keys and, for subtrees of the mesh, who signs and how many it takes
    part        the files of one scope of the authority, with a serial that only grows, signed by that scope's signers
    bundle      one part of every scope: what a host checks before it compiles anything

A file belongs to the nearest enclosing scope of the authority, so an owner speaks for its subtree and for nothing else,
and nobody above can speak for it either, except by a new authority document. A part is taken back by an empty one of a
higher serial, never by leaving it out. Parts state the serials of the others that their signers saw, so a newer part
cannot be put beside an older one of another scope than that (rules beside guardrails that they were written under).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from identity.errors import BadInput, BadPolicy, NotVerified
from identity.names import workload_path
from identity.records_policy import (
    AuthorityDocument,
    PartStatement,
    ScopeSigners,
    Sealed,
    claimed,
    parse_sealed,
    signed_by,
)
from policy.document import parse
from policy.selectors import inside

MAX_CHAIN: Final = 256  # authority documents kept and sent
MAX_PARTS: Final = 200
_ROLE: Final = "role:"
Files = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class PartMark:
    """What was accepted for one scope last: its serial, the hash of the statement, and the approvals its files ask for."""

    serial: int
    body: str
    approvals: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One verified part. `signers` are those whose signature holds and who may sign for the scope."""

    statement: PartStatement
    body: str
    signers: frozenset[str]
    approvals: int
    files: tuple[tuple[str, str], ...]

    @property
    def mark(self) -> PartMark:
        return PartMark(self.statement.serial, self.body, self.approvals)


@dataclass(frozen=True, slots=True)
class Authority:
    """A verified chain: the document in force, its hash, and all keys that earlier documents named and this one does not."""

    document: AuthorityDocument
    chain: tuple[Sealed, ...]
    retired: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """Hash of the document in force, lower-case hex: what operators compare."""
        return self.chain[-1].hash

    @property
    def version(self) -> int:
        return self.document.version

    def scope_of(self, path: str) -> ScopeSigners | None:
        """The nearest enclosing scope of a path; None when no scope of the authority covers it."""
        fitting = [s for s in self.document.scopes if inside(path, s.scope)]
        return max(fitting, key=lambda s: len(s.scope), default=None)

    def entry(self, scope: str) -> ScopeSigners | None:
        """The entry of exactly this scope."""
        return next((s for s in self.document.scopes if s.scope == scope), None)

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Public keys of signers by name."""
        return {name: self.document.signers[name].key for name in names}

    def texts(self) -> list[str]:
        """The chain as texts that `open_authority` reads."""
        return [one.model_dump_json() for one in self.chain]


# ---- the authority


def open_authority(
    texts: Sequence[str], trust_domain: str, *, known: Authority | None = None, fingerprint: str | None = None
) -> Authority:
    """The authority of a chain of documents, oldest first.

    known:       what is believed already: the chain must contain it, and go on from it
    fingerprint: hash of a document that the chain must contain, where an operator gave one
    Raises NotVerified ``authority.*``; what was known then stays.
    """
    if not texts:
        raise NotVerified("authority.missing", "there is no policy authority in what was sent")
    if len(texts) > MAX_CHAIN:
        raise NotVerified("authority.long", f"a policy authority of {len(texts)} documents; at most {MAX_CHAIN}")
    chain = tuple(parse_sealed(text) for text in texts)
    document = _first(chain[0], trust_domain)
    seen = {signer.key for signer in document.signers.values()}
    for before, sealed in itertools.pairwise(chain):
        document = _next(document, before.hash, sealed, trust_domain)
        seen |= {signer.key for signer in document.signers.values()}
    hashes = [sealed.hash for sealed in chain]
    if fingerprint is not None and fingerprint not in hashes:
        raise NotVerified(
            "authority.fingerprint", "no document of this policy authority has the fingerprint that was given",
            hint="compare it with: retinue policy authority show FILE",
        )  # fmt: skip
    if known is not None:
        _continues(known, hashes)
    return Authority(document, chain, frozenset(seen - {s.key for s in document.signers.values()}))


def _continues(known: Authority, hashes: Sequence[str]) -> None:
    if known.version > len(hashes):
        raise NotVerified(
            "authority.rollback", f"a policy authority of version {len(hashes)} after version {known.version}"
        )
    if hashes[: known.version] != [sealed.hash for sealed in known.chain]:
        raise NotVerified(
            "authority.fork", "another policy authority than the one that is known here",
            hint="only its root signers can replace it; a CA that shows another one is not to be believed",
        )  # fmt: skip


def _first(sealed: Sealed, trust_domain: str) -> AuthorityDocument:
    document = check_document(claimed(AuthorityDocument, sealed, trust_domain))
    if document.version != 1 or document.previous:
        raise NotVerified("authority.chain", "a policy authority begins with version 1")
    _root_signed(document, document, sealed, "its own")
    return document


def _next(old: AuthorityDocument, old_hash: str, sealed: Sealed, trust_domain: str) -> AuthorityDocument:
    document = check_document(claimed(AuthorityDocument, sealed, trust_domain))
    if document.version != old.version + 1 or document.previous != old_hash:
        raise NotVerified("authority.chain", f"authority version {document.version} does not follow version {old.version}")
    _root_signed(old, document, sealed, "the old")
    _root_signed(document, document, sealed, "its own")
    return document


def _root_signed(by: AuthorityDocument, document: AuthorityDocument, sealed: Sealed, whose: str) -> None:
    found = signed_by(AuthorityDocument, sealed, {name: by.signers[name].key for name in by.root})
    if len(found) < by.threshold:
        raise NotVerified(
            "authority.threshold",
            f"authority version {document.version} is signed by {_names(found)} of {whose} root signers; it takes {by.threshold}",
            hint="have more root signers sign it: retinue policy authority sign FILE --key KEY",
        )


def check_document(document: AuthorityDocument) -> AuthorityDocument:
    """Does a document make sense: names that exist, thresholds that can be met? Raises NotVerified ``authority.document``."""
    scopes = [s.scope for s in document.scopes]
    twice = [scope for scope, count in Counter(scopes).items() if count > 1]
    keys = Counter(signer.key for signer in document.signers.values())
    if twice:
        raise _bad(f"scope {twice[0]!a} is there twice")
    if any(count > 1 for count in keys.values()):
        raise _bad("two signers have one key")
    if "" not in scopes:
        raise _bad('the whole mesh (scope "") has no signers')
    for what, names, threshold in (
        ("the root", document.root, document.threshold),
        *((f"scope {s.scope or 'of the whole mesh'}", s.signers, s.threshold) for s in document.scopes),
    ):
        unknown = [name for name in names if name not in document.signers]
        if unknown:
            raise _bad(f"{what} names {unknown[0]}, who has no key")
        if len(set(names)) != len(names):
            raise _bad(f"{what} names a signer twice")
        if threshold > len(names):
            raise _bad(f"{what} asks for {threshold} signatures and has {len(names)} signers")
    for scope in filter(None, scopes):
        try:
            workload_path(scope)
        except BadInput as error:
            raise _bad(error.message) from None
    return document


def _bad(why: str) -> NotVerified:
    return NotVerified("authority.document", f"a policy authority document is not usable: {why}")


# ---- parts and bundles


def text_hash(text: str) -> str:
    """SHA-256 (hex) of a file's exact text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_scope(name: str, text: str) -> str:
    """The ``scope:`` of a file; empty for the whole mesh. Raises BadPolicy."""
    root = parse(name, text)
    if root.kind != "map" or "scope" not in root.entries:
        return ""
    node = root.entries["scope"][1]
    return "" if node.null else node.scalar("scope")


def verify_bundle(
    authority: Authority, files: Files, texts: Sequence[str], marks: Mapping[str, PartMark] | None = None
) -> dict[str, Part]:
    """The parts of a signed bundle by scope.

    files: the policy's files; texts: its sealed parts; marks: what was accepted before, by scope.
    Raises NotVerified ``policy.*`` (unsigned, signature, threshold, signer_scope, signer_revoked, replay, ...), or
    BadPolicy with a position for a file that its signers may not sign. Nothing of the files is read before their
    signatures held.
    """
    if not texts:
        raise NotVerified(
            "policy.unsigned", "the policy is not signed by the operators of the policy authority",
            hint="retinue policy sign FILE... --key KEY --base BUNDLE --out BUNDLE",
        )  # fmt: skip
    if len(texts) > MAX_PARTS:
        raise NotVerified("policy.parts", f"a bundle of {len(texts)} parts; at most {MAX_PARTS}")
    held = dict(marks or {})
    by_name = dict(files)
    if len(by_name) != len(files):
        raise NotVerified("policy.files", "a bundle names a file twice")
    parts: dict[str, Part] = {}
    for text in texts:
        part = _part(authority, parse_sealed(text), by_name)
        if part.statement.scope in parts:
            raise NotVerified("policy.parts", f"a bundle has two parts of {_scope(part.statement.scope)}")
        parts[part.statement.scope] = part
    _complete(authority, parts, by_name, held)
    for scope, part in parts.items():
        _not_behind(scope, part, held.get(scope))
        _sees(part, parts)
    return {scope: _approved(authority, part, held.get(scope)) for scope, part in sorted(parts.items())}


def _part(authority: Authority, sealed: Sealed, files: Mapping[str, str]) -> Part:
    trust_domain = authority.document.trust_domain
    statement = claimed(PartStatement, sealed, trust_domain)
    entry = authority.entry(statement.scope)
    if entry is None:
        raise NotVerified("policy.signer_scope", f"the policy authority names no signers for the scope {statement.scope!a}")
    signers = signed_by(PartStatement, sealed, authority.keys(entry.signers))
    if len(signers) < entry.threshold:
        raise _too_few(authority, entry, sealed, signers, entry.threshold)
    return Part(statement, sealed.hash, signers, 0, tuple(check_content(statement, files)))


def check_content(statement: PartStatement, files: Mapping[str, str]) -> list[tuple[str, str]]:
    """The files of a part, each with the text that it states. Raises NotVerified ``policy.content``, ``policy.files``."""
    mine = []
    for one in statement.files:
        if one.name not in files or text_hash(files[one.name]) != one.sha256:
            raise NotVerified(
                "policy.content", f"the file {ascii(one.name)[:80]} is not the one that was signed for {_scope(statement.scope)}",
                hint="somebody changed it after it was signed: ask for the bundle again, or sign the files anew",
            )  # fmt: skip
        mine.append((one.name, files[one.name]))
    if len({name for name, _ in mine}) != len(mine):
        raise NotVerified("policy.files", f"the part of {_scope(statement.scope)} names a file twice")
    return mine


def _too_few(
    authority: Authority, entry: ScopeSigners, sealed: Sealed, signers: frozenset[str], wanted: int
) -> NotVerified:
    """Too few good signatures: say what is wrong with the others."""
    scope, given = _scope(entry.scope), set(sealed.signatures)
    missing = sorted(set(entry.signers) - signers)
    hint = f"have {' or '.join(missing[:5])} sign it: retinue policy sign --add BUNDLE --key KEY"
    if not given:
        return NotVerified("policy.unsigned", f"the part of {scope} has no signature", hint=hint)
    if given & authority.retired:
        return NotVerified(
            "policy.signer_revoked", f"the part of {scope} is signed by a signer whom the authority names no more", hint=hint
        )
    by_key = {signer.key: name for name, signer in authority.document.signers.items()}
    outside = sorted(by_key[key] for key in given if key in by_key and by_key[key] not in entry.signers)
    if outside and not signers:
        return NotVerified("policy.signer_scope", f"{outside[0]} may not sign for {scope}", hint=hint)
    if not signers:
        return NotVerified("policy.signature", f"no signature on the part of {scope} holds", hint=hint)
    return NotVerified(
        "policy.threshold", f"the part of {scope} is signed by {_names(signers)}; it takes {wanted} signers", hint=hint
    )


def _complete(
    authority: Authority, parts: Mapping[str, Part], files: Mapping[str, str], marks: Mapping[str, PartMark]
) -> None:
    """Every file in exactly one part; every scope that ever had a part still has one."""
    owned = Counter(one.name for part in parts.values() for one in part.statement.files)
    for name in files:
        if owned[name] != 1:
            how = "no part" if not owned[name] else "two parts"
            raise NotVerified("policy.files", f"the file {ascii(name)[:80]} is in {how} of the bundle")
    for entry in authority.document.scopes:
        if entry.scope in marks and entry.scope not in parts:
            raise NotVerified("policy.parts", f"the bundle lacks the part of {_scope(entry.scope)}, which was in force before",
                              hint="a part is taken back by a signed empty one")  # fmt: skip


def _not_behind(scope: str, part: Part, mark: PartMark | None) -> None:
    if mark is None or part.statement.serial > mark.serial:
        return
    if part.statement.serial < mark.serial:
        raise NotVerified(
            "policy.replay", f"part {part.statement.serial} of {_scope(scope)} after part {mark.serial}, which was in force before",
            hint="an older policy comes back only by being signed anew",
        )  # fmt: skip
    if part.body != mark.body:
        raise NotVerified("policy.equivocation", f"two different parts {mark.serial} of {_scope(scope)} were signed")


def _sees(part: Part, parts: Mapping[str, Part]) -> None:
    for scope, serial in part.statement.sees.items():
        there = parts.get(scope)
        have = there.statement.serial if there else 0
        if have < serial and scope != part.statement.scope:
            raise NotVerified(
                "policy.mixed", f"the part of {_scope(part.statement.scope)} was signed beside part {serial} of {_scope(scope)}; "
                f"the bundle has part {have}",
            )  # fmt: skip


# ---- what the files themselves ask for: owners and approvals


def _approved(authority: Authority, part: Part, mark: PartMark | None) -> Part:
    """Are the files inside the part's scope, and signed by as many owners as they, and those before them, ask for?"""
    entry = authority.entry(part.statement.scope)
    assert entry is not None  # verified above
    approvals = 0
    for name, text in part.files:
        scope = file_scope(name, text)
        nearest = authority.scope_of(scope)
        if nearest is None or nearest.scope != entry.scope:
            raise BadPolicy(
                "policy.signer_scope", f"this file is about {_scope(scope)}, and it is signed for {_scope(entry.scope)}",
                file=name, line=_line(name, text, "scope"), column=1, hint=f"it takes the signers of {_scope(nearest.scope if nearest else '')}",
            )  # fmt: skip
        owners, asked = file_review(name, text)
        approvals = max(approvals, asked)
        able = [n for n in entry.signers if not owners or _owns(authority, n, owners)]
        good = [n for n in able if n in part.signers]
        wanted = max(entry.threshold, asked)
        if len(good) < wanted:
            raise BadPolicy(
                "policy.owners", f"signed by {_names(good)} of its owners; it takes {wanted}", file=name,
                line=_line(name, text, "review" if asked > entry.threshold else "owners"), column=1,
                hint=f"owners who may sign: {_names(able)}",
            )  # fmt: skip
    before = mark.approvals if mark is not None and part.statement.serial > mark.serial else 0
    if len(part.signers) < before:
        raise NotVerified(
            "policy.approvals", f"the files of {_scope(entry.scope)} in force ask for {before} approvals of a change; there are "
            f"{len(part.signers)}",
            hint="a smaller number of approvals takes as many approvals as the old one",
        )  # fmt: skip
    return Part(part.statement, part.body, part.signers, approvals, part.files)


def _owns(authority: Authority, name: str, owners: Sequence[str]) -> bool:
    roles = authority.document.signers[name].roles
    return any(word == name or (word.startswith(_ROLE) and word.removeprefix(_ROLE) in roles) for word in owners)


def file_review(name: str, text: str) -> tuple[tuple[str, ...], int]:
    """(owners, approvals) as a file writes them; () and 0 where it does not. Raises BadPolicy."""
    root = parse(name, text)
    if root.kind != "map":
        return (), 0
    top = {key: node for key, _, node in root.pairs() if not node.null}
    owners = tuple(n.scalar("an owner") for n in top["owners"].one_or_more("owners")) if "owners" in top else ()
    if "review" not in top:
        return owners, 0
    fields = top["review"].mapping("review", {"approvals", "paths"}, {"approvals"})
    return owners, fields["approvals"].integer("approvals", 1, 20)


def _line(name: str, text: str, key: str) -> int:
    root = parse(name, text)
    return root.entries[key][0].line if root.kind == "map" and key in root.entries else 1


def _scope(scope: str) -> str:
    return f"scope {scope}" if re.fullmatch(r"[\w./-]+", scope, re.ASCII) else "the whole mesh" if not scope else ascii(scope)[:80]


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"
