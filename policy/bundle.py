"""Bundle files: the policy's files and the signed parts that cover them, as one JSON text that people pass around. Pure.

A bundle may be signed in part while it goes from owner to owner; whether it is signed enough is policy/signing.py's word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from identity.errors import BadInput, BadPolicy, NotVerified, Refused
from identity.keys import b64, ed25519_public
from identity.records import SignsBytes
from identity.records_policy import (
    AuthorityDocument,
    FileHash,
    PartStatement,
    Sealed,
    add_signature,
    claimed,
    parse_sealed,
    seal,
    signed_by,
)
from policy.signing import Authority, Files, check_content, file_scope, text_hash

KEY: Final = "retinue_policy_bundle"
VERSION: Final = 1
MAX_BUNDLE: Final = 12 * 1024 * 1024
MAX_FILES: Final = 1_000


class OperatorKey(SignsBytes, Protocol):
    """What `sign_bundle` needs of a private key: an Ed25519PrivateKey."""

    def public_key(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Bundle:
    """`authority` is the chain it was made under (sealed texts), so that a bundle can be looked at by itself."""

    trust_domain: str
    files: tuple[tuple[str, str], ...]
    parts: tuple[Sealed, ...]
    authority: tuple[str, ...] = ()

    def statements(self) -> dict[str, PartStatement]:
        """What the parts claim, by scope. Raises NotVerified."""
        return {p.scope: p for p in (claimed(PartStatement, s, self.trust_domain) for s in self.parts)}

    def texts(self) -> list[str]:
        """The parts as texts, as records carry them."""
        return [part.model_dump_json() for part in self.parts]


def is_bundle(text: str) -> bool:
    """Does a file look like a bundle, not like a policy?"""
    return text.lstrip()[:1] == "{" and f'"{KEY}"' in text[:4096]


def dump_bundle(bundle: Bundle) -> str:
    """The text that `read_bundle` reads back to an equal bundle."""
    return json.dumps(
        {
            KEY: VERSION,
            "trust_domain": bundle.trust_domain,
            "parts": [json.loads(part.model_dump_json()) for part in bundle.parts],
            "files": [{"name": name, "text": text} for name, text in bundle.files],
            "authority": [json.loads(text) for text in bundle.authority],
        },
        indent=1,
        ensure_ascii=True,
    ) + "\n"  # fmt: skip


def read_bundle(name: str, text: str) -> Bundle:
    """A bundle from its text. Raises BadInput ``bundle.*``; says nothing about its signatures."""
    if len(text) > MAX_BUNDLE:
        raise BadInput("bundle.large", f"{name} has {len(text)} characters; at most {MAX_BUNDLE}")
    try:
        top = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 0)
        raise BadPolicy("bundle.form", "not a policy bundle: it is not readable as JSON", file=name, line=line,
                        column=getattr(error, "colno", 0), hint="it may be cut off: ask for it again") from None  # fmt: skip
    try:
        if not isinstance(top, dict) or set(top) != {KEY, "trust_domain", "parts", "files", "authority"} or top[KEY] != VERSION:
            raise BadInput("bundle.form", "its keys are not those of a version 1 bundle")
        files = tuple((_word(f["name"]), _word(f["text"])) for f in _list(top["files"]) if set(f) == {"name", "text"})
        if len(files) != len(top["files"]):
            raise BadInput("bundle.form", "a file has a name and a text")
        parts = tuple(parse_sealed(json.dumps(p)) for p in _list(top["parts"]))
        authority = tuple(parse_sealed(json.dumps(p)).model_dump_json() for p in _list(top["authority"]))
        return Bundle(_word(top["trust_domain"]), files, parts, authority)
    except (BadInput, NotVerified, KeyError, TypeError) as error:
        why = error.message if isinstance(error, BadInput | NotVerified) else "it lacks a part"
        raise BadInput("bundle.form", f"{name} is not a policy bundle: {why}",
                       hint="make one with: retinue policy sign FILE... --key KEY --out BUNDLE") from None  # fmt: skip


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise BadInput("bundle.form", "a name or text is not text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_FILES or not all(isinstance(v, dict) for v in value):
        raise BadInput("bundle.form", "files, parts and authority are lists of maps")
    return value


# ---- making one


def compose(
    authority: Authority, base: Bundle | None, files: Files, now: int, withdraw: Collection[str] = ()
) -> Bundle:
    """The next bundle: `files` become the whole parts of the scopes they belong to; other scopes keep theirs.

    base: the bundle in force (None: there is none). withdraw: scopes whose part is taken back.
    A part whose files are the same keeps its statement and its signatures. Raises BadInput, BadPolicy.
    """
    before = base.statements() if base is not None else {}
    sealed = {c.scope: p for c, p in zip(before.values(), base.parts, strict=True)} if base is not None else {}
    mine = _by_scope(authority, files)
    for scope in withdraw:
        if scope in mine or authority.entry(scope) is None:
            raise BadInput("bundle.withdraw", f"{scope!a} is not a scope of the authority without files here")
        mine[scope] = []
    texts: dict[str, str] = dict(base.files) if base is not None else {}
    changed = {}
    for scope, own in mine.items():
        old = before.get(scope)
        hashes = [FileHash(name=name, sha256=text_hash(text)) for name, text in sorted(own)]
        if old is not None and list(old.files) == hashes:
            continue
        for one in old.files if old is not None else ():
            texts.pop(one.name, None)
        changed[scope] = hashes
    for scope in changed:
        for name, text in mine[scope]:
            if name in texts:
                raise BadInput("bundle.duplicate", f"another scope has a file named {ascii(name)[:80]} already",
                               hint="give the file another name")  # fmt: skip
            texts[name] = text
    serials = {scope: old.serial + (scope in changed) for scope, old in before.items()}
    serials |= {scope: 1 for scope in changed if scope not in before}
    for scope, hashes in changed.items():
        old_seal = sealed.get(scope)
        sealed[scope] = seal(
            PartStatement(
                trust_domain=authority.document.trust_domain, scope=scope, serial=serials[scope],
                previous=old_seal.hash if old_seal is not None else "", files=hashes, issued=now,
                sees={other: serial for other, serial in sorted(serials.items()) if other != scope},
            )
        )  # fmt: skip
    kept = [part for scope, part in sorted(sealed.items()) if authority.entry(scope) is not None]
    owned = {f.name for p in kept for f in claimed(PartStatement, p, authority.document.trust_domain).files}
    return Bundle(
        authority.document.trust_domain, tuple(sorted((n, t) for n, t in texts.items() if n in owned)), tuple(kept),
        tuple(authority.texts()),
    )  # fmt: skip


def _by_scope(authority: Authority, files: Files) -> dict[str, list[tuple[str, str]]]:
    out: dict[str, list[tuple[str, str]]] = {}
    for name, text in files:
        entry = authority.scope_of(file_scope(name, text))
        assert entry is not None  # the whole mesh always has an entry
        out.setdefault(entry.scope, []).append((name, text))
    return out


def sign_bundle(bundle: Bundle, authority: Authority, key: OperatorKey) -> tuple[Bundle, list[str]]:
    """The bundle with this key's signature on every part that its signer may sign and that lacks signatures.

    Returns it with the scopes that were signed. Raises Refused ``policy.signer_scope`` when there is none, and NotVerified
    ``policy.content`` when a text in it is not the one its part states: who signs has read the text.
    """
    check_contents(bundle)
    public = b64(ed25519_public(key.public_key()))
    name = next((n for n, signer in authority.document.signers.items() if signer.key == public), None)
    if name is None:
        raise Refused("policy.signer_unknown", "the policy authority does not name this key",
                      hint="compare: retinue policy key show KEY, retinue policy authority show FILE")  # fmt: skip
    parts, signed = [], []
    for part in bundle.parts:
        statement = claimed(PartStatement, part, bundle.trust_domain)
        entry = authority.entry(statement.scope)
        if entry is None or name not in entry.signers or public in part.signatures:
            parts.append(part)
            continue
        parts.append(add_signature(PartStatement, part, key, public))
        signed.append(statement.scope)
    if not signed and not any(public in part.signatures for part in bundle.parts):
        scopes = ", ".join(sorted(repr(s.scope) for s in authority.document.scopes if name in s.signers)) or "nothing"
        raise Refused("policy.signer_scope", f"{name} may sign for {scopes}, and no part here is of that", hint="ask the owners of the part")
    return Bundle(bundle.trust_domain, bundle.files, tuple(parts), bundle.authority), signed


def check_contents(bundle: Bundle) -> None:
    """Every file is the one that its part states, and stands in one part. Says nothing about signatures. Raises NotVerified."""
    texts = dict(bundle.files)
    stated = [name for statement in bundle.statements().values() for name, _ in check_content(statement, texts)]
    loose = [name for name, _ in bundle.files if stated.count(name) != 1]
    if loose:
        raise NotVerified("policy.files", f"the file {ascii(loose[0])[:80]} is in {'two parts' if loose[0] in stated else 'no part'} of the bundle")


@dataclass(frozen=True, slots=True)
class PartState:
    """One part as it is signed now: for people."""

    scope: str
    serial: int
    files: tuple[str, ...]
    signed: tuple[str, ...]
    wanted: int

    @property
    def complete(self) -> bool:
        return len(self.signed) >= self.wanted


def states(bundle: Bundle, authority: Authority) -> list[PartState]:
    """Who signed what so far. Raises NotVerified."""
    out = []
    for part in bundle.parts:
        statement = claimed(PartStatement, part, bundle.trust_domain)
        entry = authority.entry(statement.scope)
        keys: Mapping[str, str] = authority.keys(entry.signers) if entry is not None else {}
        good = tuple(sorted(signed_by(PartStatement, part, keys)))
        names: Sequence[str] = tuple(f.name for f in statement.files)
        out.append(PartState(statement.scope, statement.serial, tuple(names), good, entry.threshold if entry else 0))
    return out


# ---- the authority's documents


def next_document(authority: Authority | None, document: AuthorityDocument) -> Sealed:
    """A new version of the authority's document, not signed yet: numbered and linked to the one before."""
    from policy.signing import check_document

    version, previous = (1, "") if authority is None else (authority.version + 1, authority.fingerprint)
    return seal(check_document(document.model_copy(update={"version": version, "previous": previous})))
