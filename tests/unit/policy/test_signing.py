"""Who may sign which part of the policy: what passes, and every way in that must not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadInput, BadPolicy, NotVerified, Refused
from identity.records_policy import PolicySigner, ScopeSigners, Sealed, parse_sealed
from policy.bundle import (
    Bundle,
    check_contents,
    compose,
    dump_bundle,
    is_bundle,
    read_bundle,
    sign_bundle,
    states,
)
from policy.signing import PartMark, open_authority, verify_bundle
from tests.unit.policy.operators import MAIL, MESH, NOW, PAY, TD, Operators, forge

ops = Operators()
AUTHORITY = ops.authority()
FILES = {"mesh.yaml": MESH, "pay.yaml": PAY % 80, "mail.yaml": MAIL}
FIRST = ops.bundle(AUTHORITY, FILES, "alice", "carol", "erin")


def verify(bundle: Bundle, authority=AUTHORITY, marks=None):
    return verify_bundle(authority, bundle.files, bundle.texts(), marks)


def marks(bundle: Bundle, authority=AUTHORITY):
    return {scope: part.mark for scope, part in verify(bundle, authority).items()}


def refused(code: str, call, *args, **more):
    with pytest.raises((NotVerified, BadPolicy, BadInput, Refused)) as e:
        call(*args, **more)
    assert e.value.code == code, e.value
    return e.value


# ---- what passes


def test_each_owner_signs_its_own_part() -> None:
    parts = verify(FIRST)
    assert {s: p.signers for s, p in parts.items()} == {
        "": frozenset({"alice"}), "acme/payments": frozenset({"carol"}), "acme/mail": frozenset({"erin"}),
    }  # fmt: skip
    # the payments owners change their part alone; the others' parts and signatures stay
    second = ops.bundle(AUTHORITY, {"pay.yaml": PAY % 81}, "dave", base=FIRST)
    assert {s: p.mark.serial for s, p in verify(second, marks=marks(FIRST)).items()} == {"": 1, "acme/mail": 1, "acme/payments": 2}
    assert dict(second.files)["mail.yaml"] == MAIL
    # equal files are no new part
    assert compose(AUTHORITY, second, [("pay.yaml", PAY % 81)], NOW) == second


def test_a_part_is_taken_back_by_an_empty_one() -> None:
    gone = compose(AUTHORITY, FIRST, [], NOW, withdraw=["acme/mail"])
    gone, scopes = sign_bundle(gone, AUTHORITY, ops.keys["erin"])
    assert scopes == ["acme/mail"]
    parts = verify(gone, marks=marks(FIRST))
    assert parts["acme/mail"].files == ()
    assert "mail.yaml" not in dict(gone.files)
    refused("bundle.withdraw", compose, AUTHORITY, FIRST, [], NOW, withdraw=["acme/other"])


def test_a_file_belongs_to_the_nearest_scope() -> None:
    deep = ops.authority(scopes=[*ops.document().scopes, ScopeSigners(scope="acme/payments/prod", signers=["dave"], threshold=1)])
    files = {"mesh.yaml": MESH, "prod.yaml": PAY.replace("acme/payments", "acme/payments/prod") % 1}
    assert set(verify(ops.bundle(deep, files, "alice", "dave"), deep)) == {"", "acme/payments/prod"}
    refused("policy.signer_scope", verify, forge(ops.bundle(deep, files, "alice"), ops, "carol"), deep)


def test_bundle_files_read_back() -> None:
    text = dump_bundle(FIRST)
    assert is_bundle(text)
    assert not is_bundle(MESH)
    assert read_bundle("b", text) == FIRST
    assert [(s.scope, s.complete, s.signed) for s in states(FIRST, AUTHORITY)] == [
        ("", True, ("alice",)), ("acme/mail", True, ("erin",)), ("acme/payments", True, ("carol",)),
    ]  # fmt: skip


# ---- signatures


def test_unsigned_and_wrongly_signed() -> None:
    refused("policy.unsigned", verify_bundle, AUTHORITY, FIRST.files, [])
    refused("policy.unsigned", verify, compose(AUTHORITY, None, sorted(FILES.items()), NOW))
    refused("policy.signature", verify, forge(FIRST, ops, "mallory"))
    broken = [Sealed(payload=p.payload, signatures=dict.fromkeys(p.signatures, "A" * 86)) for p in FIRST.parts]
    refused("policy.signature", verify, Bundle(TD, FIRST.files, tuple(broken)))
    # a signature of another part under this one
    swapped = [Sealed(payload=p.payload, signatures=FIRST.parts[0].signatures) for p in FIRST.parts]
    error = refused("policy.signer_scope", verify, Bundle(TD, FIRST.files, tuple(swapped)))
    assert error.hint


def test_the_texts_are_covered_byte_by_byte() -> None:
    for name, text in FIRST.files:
        other = tuple((n, t + " " if n == name else t) for n, t in FIRST.files)
        refused("policy.content", verify, Bundle(TD, other, FIRST.parts))
        renamed = tuple((f"x{n}" if n == name else n, t) for n, t in FIRST.files)
        refused("policy.content", verify, Bundle(TD, renamed, FIRST.parts))
        assert text
    refused("policy.files", verify, Bundle(TD, (*FIRST.files, ("more.yaml", MESH)), FIRST.parts))
    refused("policy.files", verify, Bundle(TD, (*FIRST.files, FIRST.files[0]), FIRST.parts))


def test_nobody_signs_a_text_that_is_not_the_one_that_counts() -> None:
    """A part states the hashes of its files; the second of two signers reads the texts that lie beside it."""
    two = ops.authority(scopes=[ScopeSigners(scope="", signers=["alice", "bob"], threshold=2)])
    one = ops.bundle(two, {"m.yaml": MESH}, "alice")
    check_contents(one)
    more, other = (*one.files, ("n.yaml", MESH)), ((one.files[0][0], one.files[0][1] + "# harmless\n"),)
    for files, code in ((other, "policy.content"), ((), "policy.content"), (more, "policy.files")):
        forged = Bundle(TD, files, one.parts, one.authority)
        refused(code, check_contents, forged)
        refused(code, sign_bundle, forged, two, ops.keys["bob"])


def test_too_few_signatures_and_one_key_twice() -> None:
    two = ops.authority(scopes=[ScopeSigners(scope="", signers=["alice", "bob", "carol"], threshold=2)])
    one = ops.bundle(two, {"m.yaml": MESH}, "alice")
    error = refused("policy.threshold", verify, one, two)
    assert "bob" in error.hint
    twice, scopes = sign_bundle(one, two, ops.keys["alice"])
    assert scopes == []
    refused("policy.threshold", verify, twice, two)
    verify(sign_bundle(one, two, ops.keys["bob"])[0], two)


def test_an_owner_reaches_nothing_outside_its_scope() -> None:
    # carol signs a change of the mesh's guardrails
    loose = compose(AUTHORITY, FIRST, [("mesh.yaml", "meshpolicy: 1\n")], NOW)
    refused("policy.signer_scope", verify, forge(loose, ops, "carol"), marks=marks(FIRST))
    mine = tuple(f for f in loose.files if f[0] == "mesh.yaml")
    refused("policy.signer_scope", sign_bundle, Bundle(TD, mine, (loose.parts[0],)), AUTHORITY, ops.keys["carol"])
    # carol's part names a file of another scope
    stolen = _part_of("acme/payments", [("pay.yaml", MAIL)])
    error = refused("policy.signer_scope", verify, stolen)
    assert (error.file, error.line) == ("pay.yaml", 2)
    wide = _part_of("acme/payments", [("pay.yaml", MESH)])
    refused("policy.signer_scope", verify, wide)
    # and the language keeps an allow rule inside the scope of its file
    from policy.language import load

    refused("policy.outside_scope", load, [("p.yaml", (PAY % 1).replace("from: {role: web}", "from: {under: acme/mail}"))])
    refused("policy.signer_unknown", sign_bundle, FIRST, AUTHORITY, ops.keys["mallory"])


def _part_of(scope: str, files: list[tuple[str, str]]) -> Bundle:
    """A bundle as a scope's owner could forge it: its part claims these files."""
    from identity.records_policy import FileHash, PartStatement, add_signature, seal
    from policy.signing import text_hash

    statement = PartStatement(
        trust_domain=TD, scope=scope, serial=1, issued=NOW, files=[FileHash(name=n, sha256=text_hash(t)) for n, t in files]
    )
    part = add_signature(PartStatement, seal(statement), ops.keys["carol"], ops.public("carol"))
    return Bundle(TD, tuple(files), (part,))


# ---- going back


def test_older_parts_replays_and_mixtures() -> None:
    second = ops.bundle(AUTHORITY, {"pay.yaml": PAY % 81}, "carol", base=FIRST)
    now = marks(second)
    refused("policy.replay", verify, FIRST, marks=now)
    # another part of the same serial
    other = ops.bundle(AUTHORITY, {"pay.yaml": PAY % 99}, "carol", base=FIRST)
    refused("policy.equivocation", verify, other, marks=now)
    # a part is left out
    lacking = Bundle(TD, tuple(f for f in second.files if f[0] != "mesh.yaml"), second.parts[1:])
    refused("policy.parts", verify, lacking, marks=now)
    # for somebody who has no marks: a newer part beside an older one than its signers saw
    third = ops.bundle(AUTHORITY, {"mesh.yaml": MESH + "# stricter\n"}, "alice", base=second)
    fourth = ops.bundle(AUTHORITY, {"pay.yaml": PAY % 82}, "carol", base=third)
    old_mesh = next(p for p in FIRST.parts if p.hash == marks(FIRST)[""].body)
    mixed = Bundle(TD, tuple((n, MESH if n == "mesh.yaml" else t) for n, t in fourth.files), (old_mesh, *fourth.parts[1:]))
    refused("policy.mixed", verify, mixed)
    without = Bundle(TD, tuple(f for f in fourth.files if f[0] != "mesh.yaml"), fourth.parts[1:])
    refused("policy.mixed", verify, without)
    twice = Bundle(TD, fourth.files, (*fourth.parts, fourth.parts[0]))
    refused("policy.parts", verify, twice)
    refused("policy.parts", verify_bundle, AUTHORITY, FIRST.files, FIRST.texts() * 100)


# ---- owners and approvals that the files ask for


def test_owners_and_review_of_a_file_are_kept() -> None:
    asked = "meshpolicy: 1\nscope: acme/payments\nowners: [role:payments-lead]\nreview: {approvals: 2}\n"
    one = ops.bundle(AUTHORITY, {"mesh.yaml": MESH, "pay.yaml": asked}, "alice", "carol")
    error = refused("policy.owners", verify, one)
    assert (error.file, error.line) == ("pay.yaml", 4)
    assert "carol, dave" in error.hint
    both, _ = sign_bundle(one, AUTHORITY, ops.keys["dave"])
    parts = verify(both)
    assert parts["acme/payments"].approvals == 2
    # one of them alone cannot lift the rule of two
    lifted = ops.bundle(AUTHORITY, {"pay.yaml": PAY % 1}, "carol", base=both)
    refused("policy.approvals", verify, lifted, marks=marks(both))
    verify(sign_bundle(lifted, AUTHORITY, ops.keys["dave"])[0], marks=marks(both))
    stranger = ops.bundle(AUTHORITY, {"mesh.yaml": MESH, "pay.yaml": asked.replace("role:payments-lead", "erin")}, "alice", "carol", "dave")
    refused("policy.owners", verify, stranger)


# ---- the authority


def test_the_authority_moves_on_by_its_own_root_only() -> None:
    second = ops.next(AUTHORITY, "alice", "bob", threshold=1)
    assert (second.version, second.document.threshold) == (2, 1)
    refused("authority.threshold", ops.next, AUTHORITY, "alice")
    # its own new root does not vouch for a new version
    refused("authority.threshold", ops.next, AUTHORITY, "carol", "dave", root=["carol", "dave"])
    refused("authority.threshold", ops.next, AUTHORITY, "alice", "bob", root=["carol", "dave"])
    third = ops.next(AUTHORITY, "alice", "bob", "carol", "dave", root=["carol", "dave"])
    assert third.document.root == ["carol", "dave"]


def test_the_authority_never_goes_back_or_aside() -> None:
    second = ops.next(AUTHORITY, "alice", "bob", threshold=1)
    refused("authority.rollback", open_authority, AUTHORITY.texts(), TD, known=second)
    other = ops.authority(threshold=1)
    refused("authority.fork", open_authority, other.texts(), TD, known=AUTHORITY)
    forked = ops.next(AUTHORITY, "alice", "bob", threshold=1, issued=NOW + 1)
    refused("authority.fork", open_authority, forked.texts(), TD, known=second)
    refused("authority.chain", open_authority, second.texts()[1:], TD)
    refused("authority.chain", open_authority, [*second.texts(), second.texts()[1]], TD)
    refused("authority.missing", open_authority, [], TD)
    refused("authority.long", open_authority, AUTHORITY.texts() * 300, TD)
    refused("record.trust_domain", open_authority, AUTHORITY.texts(), "other.example")
    refused("record.schema", open_authority, ["{"], TD)
    refused("authority.fingerprint", open_authority, AUTHORITY.texts(), TD, fingerprint="0" * 64)
    assert open_authority(second.texts(), TD, fingerprint=AUTHORITY.fingerprint).version == 2


@pytest.mark.parametrize(
    "more",
    [
        {"scopes": [ScopeSigners(scope="acme", signers=["alice"], threshold=1)]},
        {"scopes": [ScopeSigners(scope="", signers=["alice"], threshold=2)]},
        {"scopes": [ScopeSigners(scope="", signers=["zoe"], threshold=1)]},
        {"scopes": [ScopeSigners(scope="", signers=["alice", "alice"], threshold=2)]},
        {"scopes": [ScopeSigners(scope="", signers=["alice"], threshold=1)] * 2},
        {"scopes": [ScopeSigners(scope="", signers=["alice"], threshold=1), ScopeSigners(scope="A B", signers=["alice"], threshold=1)]},
        {"threshold": 3},
        {"signers": {n: PolicySigner(key="A" * 43) for n in ("alice", "bob")}},
    ],
)
def test_a_document_must_make_sense(more) -> None:
    refused("authority.document", ops.authority, **more)


def test_a_revoked_signer_signs_no_more() -> None:
    gone = {n: s for n, s in ops.document().signers.items() if n != "carol"}
    scopes = [s if s.scope != "acme/payments" else ScopeSigners(scope=s.scope, signers=["dave"], threshold=1) for s in ops.document().scopes]
    second = ops.next(AUTHORITY, "alice", "bob", signers=gone, scopes=scopes)
    refused("policy.signer_revoked", verify, FIRST, second)
    again, _ = sign_bundle(FIRST, second, ops.keys["dave"])
    verify(again, second)
    refused("policy.signer_unknown", sign_bundle, FIRST, second, ops.keys["carol"])


# ---- hostile texts


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"retinue_policy_bundle": 1}', "{" * 100_000,
        '{"retinue_policy_bundle": 1, "trust_domain": "x", "parts": [1], "files": [], "authority": []}',
        '{"retinue_policy_bundle": 1, "trust_domain": "x", "parts": [{}], "files": [], "authority": []}',
        '{"retinue_policy_bundle": 1, "trust_domain": "x", "parts": [], "files": [{"name": 1, "text": ""}], "authority": []}',
        '{"retinue_policy_bundle": 1, "trust_domain": "x", "parts": [], "files": [{"name": "a"}], "authority": []}',
        '{"retinue_policy_bundle": 2, "trust_domain": "x", "parts": [], "files": [], "authority": []}',
    ],
)
def test_a_bundle_that_is_none(text) -> None:
    refused("bundle.form", read_bundle, "b", text)


def test_a_bundle_that_is_too_large() -> None:
    refused("bundle.large", read_bundle, "b", " " * (12 * 1024 * 1024 + 1))


BOMB = "meshpolicy: 1\nscope: acme/payments\na: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "code"), [(BOMB, "policy.alias"), ("meshpolicy: 1\nscope: acme/payments\nx: [1", "policy.syntax"),
                       ("meshpolicy: 1\nscope: acme/payments\nx: " + "[" * 30 + "]" * 30, "policy.too_deep"), ("[1]", "policy.signer_scope")]
)  # fmt: skip
def test_a_bomb_in_a_signed_file_is_refused_with_its_position(text, code) -> None:
    error = refused(code, verify, _part_of("acme/payments", [("pay.yaml", text)]))
    assert error.file == "pay.yaml"
    assert error.line


def test_nothing_is_read_before_its_signature_held() -> None:
    """A bomb that nobody signed is not even looked at."""
    bomb = _part_of("acme/payments", [("pay.yaml", BOMB)])
    refused("policy.signature", verify, forge(bomb, ops, "mallory"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_edit_of_a_signed_part_passes(data) -> None:
    index = data.draw(st.integers(0, len(FIRST.parts) - 1))
    part = FIRST.parts[index]
    at = data.draw(st.integers(0, len(part.payload) - 1))
    letter = data.draw(st.sampled_from("ABCabc012-_").filter(lambda c: c != part.payload[at]))
    edited = Sealed(payload=part.payload[:at] + letter + part.payload[at + 1 :], signatures=part.signatures)
    with pytest.raises((NotVerified, BadPolicy)):
        verify(Bundle(TD, FIRST.files, (*FIRST.parts[:index], edited, *FIRST.parts[index + 1 :])))


def test_a_sealed_text_is_bounded() -> None:
    refused("record.schema", parse_sealed, "x" * 200_000)
    assert PartMark(1, "a") == PartMark(1, "a", 0)


def test_files_of_two_scopes_with_one_name() -> None:
    refused("bundle.duplicate", compose, AUTHORITY, FIRST, [("mail.yaml", PAY % 5)], NOW)
