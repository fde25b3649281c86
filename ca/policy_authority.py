"""The policy authority in the store: the chain of documents that the operators' root signers signed.

Once there is one, this CA signs no policy that its operators did not sign; it could not make hosts take one either, since
every host keeps the chain it has seen and checks the signatures by itself (mesh/policy_trust.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, insert, select

from ca import audit, schema
from ca.desk import Desk
from identity.errors import NotVerified, RetinueError
from identity.records import PolicyRecord
from identity.records_policy import PartStatement, claimed, parse_sealed
from policy.signing import Authority, PartMark, file_review, open_authority


def load(tx: Connection, trust_domain: str) -> Authority | None:
    """The authority in force, verified again; None while there is none. Raises NotVerified for a damaged chain."""
    c = schema.policy_authority.c
    texts = list(tx.execute(select(c.document).order_by(c.version)).scalars())
    return open_authority(texts, trust_domain) if texts else None


def marks_of(said: PolicyRecord, authority: Authority) -> dict[str, PartMark]:
    """The marks of a record of ours: parts by scope, with the approvals that their files ask for."""
    files = {f.name: f.text for f in said.files}
    marks = {}
    for text in said.parts:
        sealed = parse_sealed(text)
        statement = claimed(PartStatement, sealed, authority.document.trust_domain)
        asked = [file_review(f.name, files[f.name])[1] for f in statement.files if f.name in files]
        marks[statement.scope] = PartMark(statement.serial, sealed.hash, max(asked, default=0))
    return marks


def put(tx: Connection, desk: Desk, chain: Sequence[str], now: int, actor: str) -> Authority:
    """Take a longer chain (or the first). Raises NotVerified ``authority.*``; then nothing changed."""
    known = load(tx, str(desk.trust_domain))
    authority = open_authority(chain, str(desk.trust_domain), known=known)
    have = known.version if known is not None else 0
    for sealed, version in zip(authority.chain[have:], range(have + 1, authority.version + 1), strict=True):
        tx.execute(
            insert(schema.policy_authority).values(version=version, document=sealed.model_dump_json(), at=now, actor=actor)
        )
        audit.append(
            tx, now, actor, "policy.authority", f"version {version}", fingerprint=sealed.hash, signatures=len(sealed.signatures)
        )
    return authority


def still_signed(error: RetinueError) -> NotVerified:
    """The policy in force does not fit a new authority document: what to do about it."""
    return NotVerified(
        "authority.orphans",
        f"the policy in force would not be signed well enough under the new document: {error.message}",
        hint="have the remaining signers sign it (retinue policy sign --add) and give the bundle together with the document",
    )
