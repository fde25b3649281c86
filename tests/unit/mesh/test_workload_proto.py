"""Our messages against the protobuf runtime and the message classes of an outside client."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from mesh.workload_proto import Codec, Empty, X509BundlesResponse, X509Svid, X509SvidResponse, fields


def outside():
    """workload_pb2 of the `spiffe` package, without the package: that would bring a gRPC runtime into this process."""
    name = "retinue_test_workload_pb2"
    if name not in sys.modules:
        package = importlib.util.find_spec("spiffe")
        spec = importlib.util.spec_from_file_location(name, Path(package.origin).parent / "_proto" / "workload_pb2.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
svids = st.builds(X509Svid, texts, st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300), texts)
bundles = st.dictionaries(texts, st.binary(max_size=300), max_size=4)
lists = st.lists(st.binary(max_size=200), max_size=3).map(tuple)


@given(st.lists(svids, max_size=4).map(tuple), lists, bundles)
def test_svid_responses_are_read_as_they_were_meant(items, crl, federated):
    message = X509SvidResponse(items, crl, federated)
    read = outside().X509SVIDResponse.FromString(Codec().encode(message, X509SvidResponse))
    assert [
        X509Svid(s.spiffe_id, s.x509_svid, s.x509_svid_key, s.bundle, s.hint) for s in read.svids
    ] == list(items)  # fmt: skip
    assert tuple(read.crl) == crl
    assert dict(read.federated_bundles) == federated


@given(bundles, lists)
def test_bundle_responses_are_read_as_they_were_meant(entries, crl):
    read = outside().X509BundlesResponse.FromString(X509BundlesResponse(entries, crl).encode())
    assert dict(read.bundles) == entries
    assert tuple(read.crl) == crl


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(data):
    """Stricter than the runtime only where it still knows groups."""
    try:
        Empty.decode(data)
    except BadInput:
        return
    outside().X509SVIDRequest.FromString(data)


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=5), texts)
def test_fields_of_an_outside_message_are_all_found(audience, spiffe_id):
    values = [a.hex() for a in audience]
    data = outside().JWTSVIDRequest(audience=values, spiffe_id=spiffe_id).SerializeToString()
    wanted = [(1, 2, v.encode()) for v in values] + ([(2, 2, spiffe_id.encode())] if spiffe_id else [])
    assert list(fields(data)) == wanted
    Empty.decode(data)  # unknown there, and skipped


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\x08\x96\x01", [(1, 0, 150)]),
        (b"\x09" + bytes(8), [(1, 1, bytes(8))]),
        (b"\x0d" + bytes(4), [(1, 5, bytes(4))]),
        (b"\x08" + b"\xff" * 9 + b"\x01", [(1, 0, 2**64 - 1)]),
    ],
)
def test_all_kinds_of_fields(data, found):
    assert list(fields(data)) == found


@pytest.mark.parametrize(
    "data",
    [b"\x00", b"\x08", b"\x0a\x05abc", b"\x09abc", b"\x0b\x0c", b"\x08" + b"\xff" * 10, b"\x08" + b"\xff" * 9 + b"\x02", b"\x80\x80\x80\x80\x80\x01"],
)  # fmt: skip
def test_what_is_no_message(data):
    with pytest.raises(BadInput):
        list(fields(data))


def test_keys_do_not_show():
    svid = X509Svid("spiffe://x/y", b"cert", b"SECRET", b"bundle")
    assert "SECRET" not in repr(X509SvidResponse((svid,)))
    assert Codec().decode(bytearray(b"x"), None) == b"x"
    assert Codec().__content_subtype__ == "proto"


def test_claims_are_read_by_the_outside_runtime_as_they_were():
    from google.protobuf.json_format import MessageToDict

    from mesh.workload_proto import ValidateJwtSvidResponse

    claims = {"sub": "x", "n": 1.5, "none": None, "yes": True, "no": False, "list": ["a", 2.0, None, {"k": []}], "map": {"é": "ü"}, "empty": {}}
    message = outside().ValidateJWTSVIDResponse.FromString(ValidateJwtSvidResponse("spiffe://t/wl/a", claims).encode())
    assert message.spiffe_id == "spiffe://t/wl/a"
    assert MessageToDict(message.claims) == claims


def test_jwt_requests_are_read_as_the_outside_runtime_writes_them():
    from mesh.workload_proto import JwtSvidRequest, ValidateJwtSvidRequest

    asked = outside().JWTSVIDRequest(audience=["a", "b"], spiffe_id="spiffe://t/wl/a").SerializeToString()
    assert JwtSvidRequest.decode(asked + b"\x18\x01") == JwtSvidRequest(("a", "b"), "spiffe://t/wl/a")
    asked = outside().ValidateJWTSVIDRequest(audience="a", svid="token").SerializeToString()
    assert ValidateJwtSvidRequest.decode(asked) == ValidateJwtSvidRequest("a", "token")
