from __future__ import annotations

import json

import nacl.signing
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from identity import records
from identity.errors import BadInput, NotVerified
from identity.keys import b64, ed25519_public, unb64
from identity.records import (
    BundleRecord,
    EndpointRecord,
    Heartbeat,
    PlacementRecord,
    PolicyFile,
    PolicyRecord,
    envelope_hash,
    header,
    sign,
    state_hash,
    unverified,
    verify,
)

KEY = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
PUBLIC = KEY.public_key()
OTHER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32).public_key()
TD = "prod.example"
BEAT = Heartbeat(trust_domain=TD, timeline="t1", revision=7, time=1_800_000_000)
PLACED = PlacementRecord(
    trust_domain=TD, spiffe_id="spiffe://prod.example/wl/api", name="api", instance=0, endpoint="b-1", tunnel_key="k",
    epoch=3, state="active", addresses=["100.64.0.1", "fd00::1"], labels={"role": "api"}, issued=1_800_000_000,
)  # fmt: skip
ENDPOINT = EndpointRecord(
    trust_domain=TD, endpoint="b-1", kind="host", tunnel_key="k", underlay=[], ciphers=["aes-256-gcm"], generation=1,
    issued=1, expires=2,
)  # fmt: skip
POLICY = PolicyRecord(
    trust_domain=TD, revision=1, digest="d", files=[PolicyFile(name="a.yaml", text="é")], author="me", issued=1
)
ALL = [BEAT, PLACED, ENDPOINT, POLICY]


def refusal(kind, envelope, keys=(PUBLIC,), trust_domain=TD) -> str:
    with pytest.raises(NotVerified) as e:
        verify(kind, envelope, keys, trust_domain=trust_domain)
    return e.value.code


@pytest.mark.parametrize("payload", ALL, ids=lambda p: p.typ)
def test_what_is_sealed_comes_back(payload):
    envelope = sign(payload, KEY)
    assert verify(type(payload), envelope, [OTHER, PUBLIC], trust_domain=TD) == payload
    assert unverified(type(payload), envelope, trust_domain=TD) == payload


def test_the_envelope_is_a_compact_jws_and_a_second_implementation_agrees():
    protected, payload, signature = sign(BEAT, KEY).split(".")
    assert json.loads(unb64(protected)) == {"alg": "EdDSA", "typ": "retinue-heartbeat", "v": 1}
    assert json.loads(unb64(payload)) == {"trust_domain": TD, "timeline": "t1", "revision": 7, "time": 1_800_000_000}
    nacl.signing.VerifyKey(ed25519_public(PUBLIC)).verify(f"{protected}.{payload}".encode(), unb64(signature))
    assert sign(BEAT, KEY) == GOLDEN


GOLDEN = (
    "eyJhbGciOiJFZERTQSIsInR5cCI6InJldGludWUtaGVhcnRiZWF0IiwidiI6MX0.eyJ0cnVzdF9kb21haW4iOiJwcm9kLmV4YW1w"
    "bGUiLCJ0aW1lbGluZSI6InQxIiwicmV2aXNpb24iOjcsInRpbWUiOjE4MDAwMDAwMDB9.tn_ulLigNuMBNcX0ooQU2TOX9-"
    "vx1LTX0Bo8wEPXCsyzCb4a-OUCtddR2Sv1DAxS8RDtoUoeViLg6W6G_9MRAA"
)


@pytest.mark.parametrize("payload", ALL, ids=lambda p: p.typ)
def test_a_record_of_one_type_is_no_record_of_another(payload):
    for kind in (Heartbeat, PlacementRecord, EndpointRecord, PolicyRecord, BundleRecord):
        if kind is not type(payload):
            assert refusal(kind, sign(payload, KEY)) == "record.type"
            with pytest.raises(NotVerified):
                unverified(kind, sign(payload, KEY), trust_domain=TD)


def test_a_wrong_key_a_wrong_domain_and_no_key():
    envelope = sign(BEAT, KEY)
    assert refusal(Heartbeat, envelope, [OTHER]) == "record.signature"
    assert refusal(Heartbeat, envelope, []) == "record.signature"
    assert refusal(Heartbeat, envelope, trust_domain="other.example") == "record.trust_domain"


@given(st.sampled_from(ALL), st.data())
def test_a_mutated_envelope_is_refused(payload, data):
    envelope = sign(payload, KEY)
    position = data.draw(st.integers(0, len(envelope) - 1))
    char = data.draw(st.characters().filter(lambda c: c != envelope[position]))
    assert refusal(type(payload), envelope[:position] + char + envelope[position + 1 :]).startswith("record.")


@given(st.sampled_from(ALL), st.data())
def test_a_cut_or_longer_envelope_is_refused(payload, data):
    envelope = sign(payload, KEY)
    cut = data.draw(st.integers(0, len(envelope) - 1))
    refusal(type(payload), envelope[:cut])
    refusal(type(payload), envelope + data.draw(st.text(min_size=1, max_size=5)))


@given(st.text(max_size=300))
def test_junk_is_refused(text):
    refusal(Heartbeat, text)


def _raw(payload: bytes, protected: bytes = header("heartbeat")) -> str:
    signed = f"{b64(protected)}.{b64(payload)}"
    return f"{signed}.{b64(KEY.sign(signed.encode()))}"


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"[]", b"null", b"\xff", b'{"trust_domain":"prod.example"}',
     BEAT.model_dump_json().encode()[:-1] + b',"more":1}',
     BEAT.model_dump_json().replace("7", '"7"', 1).encode(), BEAT.model_dump_json().replace('"revision":7', '"revision":-7').encode(),
     b"[" * 2000],
)  # fmt: skip
def test_a_signed_payload_must_still_fit_its_schema(payload):
    assert refusal(Heartbeat, _raw(payload)) == "record.schema"


@pytest.mark.parametrize(
    "protected",
    [b'{"alg":"none","typ":"retinue-heartbeat","v":1}', b'{"alg":"EdDSA","typ":"retinue-heartbeat","v":2}',
     b'{"typ":"retinue-heartbeat","alg":"EdDSA","v":1}', b'{"alg":"HS256","typ":"retinue-heartbeat","v":1}', b"{}"],
)  # fmt: skip
def test_the_header_is_one_constant(protected):
    assert refusal(Heartbeat, _raw(BEAT.model_dump_json().encode(), protected)) == "record.type"


def test_the_header_constant_is_accepted():
    assert verify(Heartbeat, _raw(BEAT.model_dump_json().encode()), [PUBLIC], trust_domain=TD) == BEAT


def test_the_signature_has_one_text_form():
    envelope = sign(BEAT, KEY)
    for bad in (envelope + "=", envelope[:-1], envelope + "\n"):
        assert refusal(Heartbeat, bad) == "record.signature"
    assert refusal(Heartbeat, 7) == "record.large"


def test_sizes_are_limited():
    big = POLICY.model_copy(update={"files": [PolicyFile(name="a", text="x" * records.MAX_POLICY)]})
    with pytest.raises(BadInput) as e:
        sign(big, KEY)
    assert e.value.code == "record.large"
    assert refusal(Heartbeat, "x" * (records.MAX_SMALL + 1)) == "record.large"
    with pytest.raises(NotVerified) as v:
        unverified(Heartbeat, "x" * (records.MAX_SMALL + 1), trust_domain=TD)
    assert v.value.code == "record.large"
    with pytest.raises(NotVerified):
        unverified(Heartbeat, "x", trust_domain=TD)


def test_hashes_tell_sets_apart():
    a, b = sign(BEAT, KEY), sign(PLACED, KEY)
    assert len(envelope_hash(a)) == 64
    assert state_hash({"x": a, "y": b}) == state_hash({"y": b, "x": a})
    sets = [{}, {"x": a}, {"x": b}, {"y": a}, {"x": a, "y": b}, {"x": b, "y": a}]
    assert len({state_hash(s) for s in sets}) == len(sets)
