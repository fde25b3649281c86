"""What a release before ours reads of ours: fields that came later are written only when they say something."""

from __future__ import annotations

import json
from typing import Any

import pytest

from identity.grown import Grown
from identity.records import BundleRecord, PlacementRecord, PolicyRecord
from identity.wire.admin import ExplainReply
from identity.wire.enroll import EnrollReply, EnrollRequest
from identity.wire.feed import Report
from identity.wire.local import Attach, Attachment, Status

# Fields of the first release, as its schemas list them.
FIRST = {
    PlacementRecord: "trust_domain spiffe_id name instance endpoint tunnel_key epoch state addresses labels fence issued",
    PolicyRecord: "trust_domain revision digest files author issued",
    BundleRecord: "trust_domain sequence roots signers issued",
    EnrollRequest: "version token_id nonce csr tunnel_key enroll_key token_proof tunnel_proof enroll_proof underlay ciphers",
    EnrollReply: "trust_domain endpoint kind workload chain bundle record",
    Attach: "name instance kind netns",
    Attachment: "name instance kind netns state epoch addresses",
    Report: "timeline revision hash held attached",
    Status: "version trust_domain endpoint kind spiffe_id device interface control timeline revision policy_revision "
    "policy_digest staleness_s svid_expires attachments peers firewall_elements conditions ready",
}  # fmt: skip
PLACEMENT: dict[str, Any] = {
    "trust_domain": "a.example", "spiffe_id": "spiffe://a.example/w/x", "name": "x", "instance": 0, "endpoint": "h",
    "tunnel_key": "k", "epoch": 1, "state": "active", "addresses": ["100.64.0.1", "fd00::1"], "labels": {}, "issued": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", FIRST, ids=lambda k: k.__name__)
def test_every_field_of_today_was_there_or_is_named_as_later(kind: type[Grown]) -> None:
    first = set(FIRST[kind].split())
    assert set(kind.model_fields) == first | kind.later
    assert not first & kind.later
    assert all(not kind.model_fields[name].is_required() for name in kind.later)


def test_a_default_is_not_written_and_a_value_is() -> None:
    plain = PlacementRecord(**PLACEMENT)
    assert "ends" not in json.loads(plain.model_dump_json())
    assert "ends" not in plain.model_dump()
    ending = PlacementRecord(**PLACEMENT, ends=5)
    assert json.loads(ending.model_dump_json())["ends"] == 5
    assert "ends" not in json.loads(ending.model_dump_json(exclude={"ends"}))
    for one in (plain, ending):
        assert PlacementRecord.model_validate_json(one.model_dump_json()) == one


def test_what_a_newer_one_wrote_out_is_read_as_well() -> None:
    assert PlacementRecord.model_validate({**PLACEMENT, "ends": None}) == PlacementRecord(**PLACEMENT)


def test_explanations() -> None:
    assert ExplainReply.later <= set(ExplainReply.model_fields)
