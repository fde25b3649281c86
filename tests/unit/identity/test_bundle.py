from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from identity import certs, records
from identity.bundle import open_bundle
from identity.errors import NotVerified
from identity.keys import ed25519_public
from identity.names import SpiffeId, TrustDomain
from identity.records import BundleRecord, Heartbeat, PolicyRecord, SignerChain, Taint
from identity.revocation import id_entry, key_entry, serial_entry, spki_hash

NOW = 1_800_000_000
TD = TrustDomain("prod.example")


class Publisher:
    """Signs bundles over one or more forged chains."""

    def __init__(self, forge) -> None:
        self.forge = forge
        self.records = forge.leaf("spiffe://prod.example/cp/records", profile=certs.SIGNER, key=Ed25519PrivateKey.generate())
        self.policy = forge.leaf("spiffe://prod.example/cp/policy", profile=certs.SIGNER, key=Ed25519PrivateKey.generate())

    def chain(self, pair) -> list[str]:
        return [certs.pem(pair.cert), certs.pem(self.forge.intermediate.cert)]

    def signers(self) -> list[SignerChain]:
        return [
            SignerChain(role="records", chain=self.chain(self.records)), SignerChain(role="policy", chain=self.chain(self.policy))
        ]  # fmt: skip

    def link(self, other: Publisher, *, change=lambda b: b) -> str:
        """Our root's word on another's."""
        root = other.forge.root
        return certs.pem(self.forge.sign(change(self.forge.builder(certs.LINK, root.key, self.forge.root)), self.forge.root.key))

    def bundle(
        self, *, sequence=1, roots=None, signers=None, key=None, trust_domain="prod.example", links=(), revoked=(), tainted=()
    ) -> str:
        record = BundleRecord(
            trust_domain=trust_domain, sequence=sequence, issued=NOW,
            roots=[certs.pem(r) for r in (roots or [self.forge.root.cert])],
            signers=self.signers() if signers is None else signers, links=list(links), revoked=list(revoked),
            tainted=list(tainted),
        )  # fmt: skip
        return records.sign(record, key or self.records.key)

    @property
    def pin(self) -> str:
        return certs.fingerprint(self.forge.root.cert)


@pytest.fixture(scope="module")
def publisher(forge) -> Publisher:
    return Publisher(forge)


@pytest.fixture(scope="module")
def stranger(forge) -> Publisher:
    return Publisher(type(forge)())


def refusal(envelope: str, trusted, now: float = NOW) -> str:
    with pytest.raises(NotVerified) as e:
        open_bundle(envelope, trusted, TD, now)
    return e.value.code


def test_a_bundle_opens_by_pin_and_by_root(publisher, forge):
    envelope = publisher.bundle(sequence=7)
    for trusted in (publisher.pin, [forge.root.cert]):
        bundle = open_bundle(envelope, trusted, TD, NOW)
        assert (bundle.sequence, bundle.issued, bundle.trust_domain) == (7, NOW, TD)
        assert bundle.fingerprints() == {publisher.pin}
        assert certs.parse_chain(bundle.roots_pem()) == (forge.root.cert,)
        assert list(map(ed25519_public, bundle.keys["policy"])) == [ed25519_public(publisher.policy.key)]
        assert bundle.envelope == envelope


def test_records_are_verified_by_the_key_of_their_role(publisher):
    bundle = open_bundle(publisher.bundle(), publisher.pin, TD, NOW)
    beat = Heartbeat(trust_domain=TD.name, timeline="t", revision=1, time=NOW)
    policy = PolicyRecord(trust_domain=TD.name, revision=1, digest="d", files=[], author="a", issued=NOW)
    assert bundle.verify(Heartbeat, records.sign(beat, publisher.records.key)) == beat
    assert bundle.verify(PolicyRecord, records.sign(policy, publisher.policy.key)) == policy
    for kind, forged in (
        (Heartbeat, records.sign(beat, publisher.policy.key)),
        (PolicyRecord, records.sign(policy, publisher.records.key)),
        (Heartbeat, records.sign(policy, publisher.records.key)),
    ):
        with pytest.raises(NotVerified):
            bundle.verify(kind, forged)


def test_an_absent_role_trusts_nobody(publisher):
    bundle = open_bundle(publisher.bundle(signers=publisher.signers()[:1]), publisher.pin, TD, NOW)
    policy = PolicyRecord(trust_domain=TD.name, revision=1, digest="d", files=[], author="a", issued=NOW)
    with pytest.raises(NotVerified):
        bundle.verify(PolicyRecord, records.sign(policy, publisher.policy.key))


def test_svids_are_verified_in_any_form(publisher, forge):
    bundle = open_bundle(publisher.bundle(), publisher.pin, TD, NOW)
    chain = (forge.leaf().cert, forge.intermediate.cert)
    texts = [certs.pem(c) for c in chain]
    name = SpiffeId.endpoint(TD, "web-1")
    for form in (chain, texts, "".join(texts)):
        assert bundle.verify_svid(form, NOW, expect=name).spiffe_id == name
    with pytest.raises(NotVerified) as e:
        bundle.verify_svid(chain, NOW, expect=SpiffeId.endpoint(TD, "web-2"))
    assert e.value.code == "svid.name"
    with pytest.raises(NotVerified):
        bundle.verify_svid([], NOW)
    with pytest.raises(NotVerified):
        bundle.verify_svid(chain, NOW + 90_000)


def test_a_bundle_of_somebody_else_is_refused(publisher, stranger, forge):
    assert refusal(stranger.bundle(), publisher.pin) == "bundle.root"
    assert refusal(stranger.bundle(), [forge.root.cert]) == "cert.untrusted"
    # The pinned root is only listed; the signers hang from another.
    both = [forge.root.cert, stranger.forge.root.cert]
    assert refusal(stranger.bundle(roots=both), publisher.pin) == "cert.untrusted"
    # Our signers are listed, the envelope is signed by another key.
    assert refusal(publisher.bundle(key=stranger.records.key), publisher.pin) == "record.signature"
    assert refusal(publisher.bundle(key=publisher.policy.key), publisher.pin) == "record.signature"
    assert refusal(publisher.bundle(trust_domain="other.example"), publisher.pin) == "record.trust_domain"


def test_signers_must_be_what_they_are_named(publisher, forge):
    def signers(role, pair):
        return [SignerChain(role=role, chain=publisher.chain(pair))]

    assert refusal(publisher.bundle(signers=[]), publisher.pin) == "bundle.no_signer"
    assert refusal(publisher.bundle(signers=signers("policy", publisher.policy)), publisher.pin) == "bundle.no_signer"
    swapped = signers("records", publisher.policy)
    assert refusal(publisher.bundle(signers=swapped, key=publisher.policy.key), publisher.pin) == "bundle.signer_name"
    host = forge.leaf(key=Ed25519PrivateKey.generate())
    assert refusal(publisher.bundle(signers=signers("records", host), key=host.key), publisher.pin) == "cert.extended_key_usage"
    assert refusal(publisher.bundle(), publisher.pin, NOW + 31 * 86400) == "cert.expired"
    worse = [*publisher.signers()[:1], SignerChain(role="policy", chain=publisher.chain(publisher.records))]
    assert refusal(publisher.bundle(signers=worse), publisher.pin) == "bundle.signer_name"


def test_roots_must_be_roots(publisher, forge):
    with_mid = [forge.root.cert, forge.intermediate.cert]
    assert refusal(publisher.bundle(roots=with_mid), publisher.pin) == "cert.not_root"
    record = records.unverified(BundleRecord, publisher.bundle(), trust_domain=TD.name)
    double = record.model_copy(update={"roots": [record.roots[0] * 2]})
    assert refusal(records.sign(double, publisher.records.key), publisher.pin) == "bundle.roots"
    junk = record.model_copy(update={"roots": ["junk"]})
    assert refusal(records.sign(junk, publisher.records.key), publisher.pin) == "chain.syntax"


def test_succession_over_an_overlap_of_roots(publisher, stranger, forge):
    """Old root -> both roots -> new root only; each step signed by what the step before trusts."""
    old, new = forge.root.cert, stranger.forge.root.cert
    first = open_bundle(publisher.bundle(sequence=1), publisher.pin, TD, NOW)
    both = publisher.signers() + stranger.signers()
    unlinked = publisher.bundle(sequence=2, roots=[old, new], signers=both)
    with pytest.raises(NotVerified) as e:
        first.accept_next(unlinked, NOW)  # a records key alone makes no root
    assert e.value.code == "bundle.root_link"
    links = [publisher.link(stranger)]
    second = first.accept_next(publisher.bundle(sequence=2, roots=[old, new], signers=both, links=links), NOW)
    third = second.accept_next(stranger.bundle(sequence=3), NOW)
    assert third.fingerprints() == {stranger.pin}
    with pytest.raises(NotVerified):
        first.accept_next(stranger.bundle(sequence=3), NOW)  # the overlap was missed
    assert first.accept_next(stranger.bundle(sequence=3, links=links), NOW).fingerprints() == {stranger.pin}
    with pytest.raises(NotVerified):
        third.accept_next(publisher.bundle(sequence=4), NOW)  # the old root is out


def test_a_root_is_vouched_for_by_a_root_and_by_nothing_else(publisher, stranger, forge, live):
    first = open_bundle(publisher.bundle(), publisher.pin, TD, NOW)
    third = Publisher(type(forge)())

    def refused(*links: str, roots=None, signers=None) -> str:
        with pytest.raises(NotVerified) as e:
            first.accept_next(
                stranger.bundle(sequence=2, links=links, roots=roots, signers=signers), NOW
            )
        return e.value.code

    ended = publisher.link(stranger, change=lambda b: live(b, NOW - 900, NOW - 1))
    by_intermediate = certs.pem(forge.sign(forge.builder(certs.LINK, stranger.forge.root.key, forge.intermediate), forge.intermediate.key))
    of_another_key = publisher.link(third)
    for link in (ended, by_intermediate, of_another_key, third.link(stranger), stranger.link(stranger), certs.pem(forge.root.cert)):
        assert refused(link) == "cert.untrusted"
    with pytest.raises(NotVerified):
        first.accept_next(stranger.bundle(sequence=2, links=["junk"]), NOW)
    # Over two links: the machine was away while the roots changed twice.
    two = [publisher.link(third), third.link(stranger)]
    roots = [third.forge.root.cert, stranger.forge.root.cert]
    assert len(first.accept_next(stranger.bundle(sequence=9, links=two, roots=roots), NOW).roots) == 2
    assert refused(two[1], roots=roots) == "cert.untrusted"
    # A pin takes a bundle of several roots only when the pinned one vouches for the others.
    both = stranger.bundle(sequence=2, roots=[stranger.forge.root.cert, forge.root.cert])
    assert refusal(both, stranger.pin) == "bundle.root_link"
    both = stranger.bundle(sequence=2, roots=[stranger.forge.root.cert, forge.root.cert], links=[stranger.link(publisher)])
    assert len(open_bundle(both, stranger.pin, TD, NOW).roots) == 2


def test_a_link_is_no_step_of_a_path(publisher, stranger, forge):
    """It may issue no authority, so what another root issued is not pulled under ours by it."""
    link = certs.parse_chain(publisher.link(stranger))[0]
    theirs = stranger.forge.leaf().cert
    with pytest.raises(NotVerified):
        certs.verify_chain([theirs, stranger.forge.intermediate.cert, link], [forge.root.cert], TD, NOW)


def test_what_is_blocked_is_refused_whoever_asks(publisher, forge):
    leaf, chain = forge.leaf(), [forge.leaf().cert, forge.intermediate.cert]
    named = certs.revocation_id(leaf.cert)
    name = SpiffeId.endpoint(TD, "web-1")
    whole = [leaf.cert, forge.intermediate.cert]
    cases = {
        serial_entry(named.issuer, named.serial): True,
        serial_entry(named.issuer, named.serial + 1000): False,
        serial_entry("ab", named.serial): False,
        key_entry(leaf.cert): True,
        id_entry(name, NOW): True,
        id_entry(name, certs.not_before(leaf.cert)): False,
        id_entry(name, certs.not_before(leaf.cert) + 1): True,
        id_entry(SpiffeId.endpoint(TD, "web-2"), NOW): False,
    }
    for entry, out in cases.items():
        bundle = open_bundle(publisher.bundle(revoked=[entry]), publisher.pin, TD, NOW)
        if out:
            with pytest.raises(NotVerified) as e:
                bundle.verify_svid(whole, NOW)
            assert e.value.code == "cert.revoked"
        else:
            bundle.verify_svid(whole, NOW)
        if not entry.startswith("id:"):
            bundle.verify_svid(chain, NOW)  # another certificate of the same name
    for junk in ("sha256:" + "0" * 64, "key:", "key:" + "0" * 63, "serial:zz:1", "id:1:https://a", "id:x:spiffe://a/b", ""):
        assert refusal(publisher.bundle(revoked=[junk]), publisher.pin) in {"bundle.revoked", "record.schema"}


def test_a_blocked_authority_signs_no_bundle(publisher, forge):
    """Not its own, and none after one that blocked it: a leaked key cannot lift its own block."""
    second = Publisher(forge)
    other = forge.authority(certs.INTERMEDIATE, type(forge)().intermediate.key, forge.root)
    leaf = forge.leaf("spiffe://prod.example/cp/records", profile=certs.SIGNER, key=Ed25519PrivateKey.generate(), issuer=other)
    fresh = [SignerChain(role="records", chain=[certs.pem(leaf.cert), certs.pem(other.cert)])]
    out = key_entry(forge.intermediate.cert)
    assert refusal(second.bundle(revoked=[out]), publisher.pin) == "cert.revoked"
    first = open_bundle(publisher.bundle(), publisher.pin, TD, NOW)
    blocked = first.accept_next(second.bundle(sequence=2, signers=fresh, key=leaf.key, revoked=[out]), NOW)
    with pytest.raises(NotVerified) as e:
        blocked.accept_next(publisher.bundle(sequence=3), NOW)
    assert e.value.code == "cert.revoked"
    with pytest.raises(NotVerified) as e:
        blocked.verify_svid([forge.leaf().cert, forge.intermediate.cert], NOW)
    assert e.value.code == "cert.revoked"


def test_a_chain_knows_its_taint(publisher, forge):
    taint = Taint(key=spki_hash(forge.intermediate.cert), since=NOW, until=NOW + 60)
    other = Taint(key="0" * 64, since=NOW, until=NOW + 1)
    chain = (forge.leaf().cert, forge.intermediate.cert)
    bundle = open_bundle(publisher.bundle(tainted=[other, taint]), publisher.pin, TD, NOW)
    assert bundle.taint_of(chain) == taint
    assert bundle.taint_of(chain[:1]) is None
    assert open_bundle(publisher.bundle(), publisher.pin, TD, NOW).taint_of(chain) is None


def test_a_bundle_never_goes_back(publisher):
    bundle = open_bundle(publisher.bundle(sequence=5), publisher.pin, TD, NOW)
    assert bundle.accept_next(publisher.bundle(sequence=5), NOW).sequence == 5
    with pytest.raises(NotVerified) as e:
        bundle.accept_next(publisher.bundle(sequence=4), NOW)
    assert e.value.code == "bundle.rollback"


@given(st.data())
def test_a_mutated_bundle_is_refused(publisher, data):
    envelope = publisher.bundle()
    position = data.draw(st.integers(0, len(envelope) - 1))
    char = data.draw(st.characters(codec="ascii").filter(lambda c: c != envelope[position]))
    with pytest.raises(NotVerified):
        open_bundle(envelope[:position] + char + envelope[position + 1 :], publisher.pin, TD, NOW)


@given(st.text(max_size=200))
def test_junk_is_refused(publisher, text):
    with pytest.raises(NotVerified):
        open_bundle(text, publisher.pin, TD, NOW)


def test_a_bundle_too_large_is_refused(publisher):
    assert refusal("x" * (records.MAX_BUNDLE + 1), publisher.pin) == "record.large"
