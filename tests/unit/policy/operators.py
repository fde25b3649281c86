"""Operators with keys, an authority and bundles, for the tests of signing."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from identity.keys import b64, ed25519_public
from identity.records_policy import AuthorityDocument, PolicySigner, ScopeSigners, add_signature, parse_sealed
from policy.bundle import Bundle, compose, next_document, sign_bundle
from policy.signing import Authority, open_authority

TD = "prod.example"
NOW = 1_900_000_000
MESH = "meshpolicy: 1\nlabels: {keys: [role]}\nguardrails:\n  - deny: {id: SEC-1, from: {role: web}, to: {role: db}}\n"
PAY = "meshpolicy: 1\nscope: acme/payments\nsegments:\n  - name: pay\n    allow:\n      - {id: a, from: {role: web}, to: {role: api}, on: tcp/%d}\n"
MAIL = "meshpolicy: 1\nscope: acme/mail\nsegments:\n  - name: mail\n    allow:\n      - {id: m, from: {role: web}, to: {role: api}, on: tcp/25}\n"


class Operators:
    """alice, bob, carol (payments-lead), dave (payments-lead), erin (mail), mallory (nobody)."""

    def __init__(self, trust_domain: str = TD) -> None:
        self.trust_domain = trust_domain
        names = ("alice", "bob", "carol", "dave", "erin", "mallory")
        self.keys = {name: Ed25519PrivateKey.generate() for name in names}

    def public(self, name: str) -> str:
        return b64(ed25519_public(self.keys[name]))

    def document(self, **more: object) -> AuthorityDocument:
        values: dict[str, object] = {
            "trust_domain": self.trust_domain, "version": 1, "issued": NOW, "root": ["alice", "bob"], "threshold": 2,
            "signers": {
                n: PolicySigner(key=self.public(n), roles=["payments-lead"] if n in {"carol", "dave"} else [])
                for n in ("alice", "bob", "carol", "dave", "erin")
            },
            "scopes": [
                ScopeSigners(scope="", signers=["alice", "bob"], threshold=1),
                ScopeSigners(scope="acme/payments", signers=["carol", "dave"], threshold=1),
                ScopeSigners(scope="acme/mail", signers=["erin"], threshold=1),
            ],
        }  # fmt: skip
        return AuthorityDocument(**{**values, **more})  # type: ignore[arg-type]  # a test's own values

    def sealed(self, known: Authority | None, document: AuthorityDocument, *signers: str) -> str:
        sealed = next_document(known, document)
        for name in signers:
            sealed = add_signature(AuthorityDocument, sealed, self.keys[name], self.public(name))
        return sealed.model_dump_json()

    def authority(self, **more: object) -> Authority:
        return open_authority([self.sealed(None, self.document(**more), "alice", "bob")], self.trust_domain)

    def next(self, known: Authority, *signers: str, **more: object) -> Authority:
        chain = [*known.texts(), self.sealed(known, self.document(**more), *signers)]
        return open_authority(chain, self.trust_domain, known=known)

    def bundle(self, authority: Authority, files: dict[str, str], *signers: str, base: Bundle | None = None) -> Bundle:
        made = compose(authority, base, sorted(files.items()), NOW)
        for name in signers:
            made, _ = sign_bundle(made, authority, self.keys[name])
        return made


def forge(bundle: Bundle, ops: Operators, name: str) -> Bundle:
    """The bundle with this operator's signature on every part, allowed or not, and no other."""
    from identity.records_policy import PartStatement, Sealed

    parts = tuple(
        add_signature(PartStatement, Sealed(payload=p.payload), ops.keys[name], ops.public(name)) for p in bundle.parts
    )
    return Bundle(bundle.trust_domain, bundle.files, parts, bundle.authority)


__all__ = ["MAIL", "MESH", "NOW", "PAY", "TD", "Operators", "forge", "parse_sealed"]
