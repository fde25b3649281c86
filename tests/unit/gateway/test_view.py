"""gateway.view: only verified state decides, and it never goes back."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.config import Caller, Route
from gateway.view import Pin, View, refusal, refusal_text, rule_on, verify_reply
from identity.errors import BadPolicy, NotVerified
from identity.names import TrustDomain

CALLER = Caller(workload="partner/acme", token_sha256=["a" * 64])
ROUTE = Route(workload="shop/api", port=8080)


def ruled(view: View, caller: Caller = CALLER, route: Route = ROUTE) -> str:
    return rule_on(view, caller, route, time.time()).code


def test_permitted_and_denied(world: Any) -> None:
    view = world.view()
    ruling = rule_on(view, CALLER, ROUTE, time.time())
    assert ruling.allowed
    assert ruling.rule == "partner-to-api"
    assert ruling.where == "edge.yaml:5"
    assert ruling.source is not None
    assert ruling.source.addresses[0] == "127.0.0.31"
    denied = rule_on(view, CALLER, Route(workload="shop/api", port=22), time.time())
    assert (denied.code, denied.rule) == ("policy", None)


def test_a_caller_placed_elsewhere_or_nowhere_is_refused(world: Any) -> None:
    world.place("partner/acme", "host-b", "127.0.0.31", role="partner", epoch=2)
    assert ruled(world.view()) == "unplaced"
    world.place("partner/acme", world.host, "127.0.0.31", role="partner", epoch=3, state="revoked")
    assert ruled(world.view()) == "unplaced"
    assert ruled(world.view(), Caller(workload="other", token_sha256=["a" * 64])) == "unplaced"


def test_unknown_destination_and_no_policy(world: Any) -> None:
    assert ruled(world.view(), route=Route(workload="shop/db", port=1)) == "unknown"
    del world.objects["policy"]
    assert ruled(world.view()) == "unknown"


def test_only_allowed_instances_are_targets(world: Any) -> None:
    world.place("shop/api", "host-c", "127.0.0.42", role="other", instance=1)
    world.place("shop/api", "host-c", "127.0.0.43", role="api", instance=2)
    ruling = rule_on(world.view(), CALLER, ROUTE, time.time())
    assert [t.instance for t in ruling.targets] == [0, 2]


def test_forged_and_foreign_state_is_refused(world: Any) -> None:
    good = world.reply()

    def refused(code: str, objects: dict[str, str] | None = None, pin: Pin | None = None, before: View | None = None) -> None:
        reply = good.model_copy(update={"objects": good.objects if objects is None else objects})
        with pytest.raises(NotVerified) as caught:
            verify_reply(reply, world.host, pin or world.pin, before, time.time())
        assert caught.value.code == code

    refused("gateway.trust_domain", pin=Pin(TrustDomain("other.example"), world.pin.root_fingerprint))
    refused("bundle.root", pin=Pin(world.pin.trust_domain, "0" * 64))
    refused("gateway.no_bundle", objects={})
    forged = good.objects["placement/shop/api/0"]
    refused("record.signature", objects={**good.objects, "placement/shop/api/0": forged[:-8] + "AAAAAAAA"[: len(forged[-8:])]})
    refused("record.key", objects={**good.objects, "placement/shop/web/0": forged})
    refused("record.type", objects={**good.objects, "policy": forged})
    view = world.view()
    world.place("shop/api", "host-c", "127.0.0.41", role="api", epoch=5)
    newer = world.view(view)
    assert newer.epochs["shop/api/0"] == 5
    refused("placement.epoch", before=newer)


def test_an_uncompilable_policy_is_refused_and_the_view_before_stays(world: Any) -> None:
    view = world.view()
    world.policy("meshpolicy: 9\n", revision=2)
    with pytest.raises(BadPolicy):
        world.view(view)
    assert ruled(view) == "ok"


def test_a_lost_permission_is_seen_at_once(world: Any) -> None:
    view = world.view()
    assert ruled(view) == "ok"
    world.policy(world.template % 9090, revision=2)
    assert ruled(world.view(view)) == "policy"


def test_time_windows_decide(world: Any) -> None:
    grant = (
        "meshpolicy: 1\ngrants:\n  - {id: g, from: {role: partner}, to: {role: api}, on: tcp/8080, "
        'not_after: "2040-01-01T00:00:00Z", why: x}\n'
    )
    world.policy(grant, revision=2)
    view = world.view()
    end = view.changes_at(time.time())
    assert end == 2208988800
    assert rule_on(view, CALLER, ROUTE, end - 1).allowed
    assert not rule_on(view, CALLER, ROUTE, end).allowed


def test_refusals_say_why(world: Any) -> None:
    view = world.view()
    route = Route(workload="shop/api", port=22)
    ruling = rule_on(view, CALLER, route, time.time())
    body = refusal(ruling, route, view, full=True, explained={"reason": "default deny", "smallest_change": "allow tcp/22"})
    assert body["smallest_change"] == "allow tcp/22"
    assert body["policy_digest"] == view.policy.digest if view.policy else False
    text = refusal_text(body)
    assert "rule: none (default deny)" in text
    assert "smallest change: allow tcp/22" in text
    assert set(refusal(ruling, route, view, full=False)) == {"error", "verdict"}
    unplaced = rule_on(view, Caller(workload="x", token_sha256=["a" * 64]), ROUTE, time.time())
    assert "workload move" in refusal(unplaced, ROUTE, view, full=True)["error"]["hint"]


def test_the_gateway_holds_a_policy_to_its_operators(world: Any) -> None:
    """Whatever its agent shows: once an authority is known, the CA's signature alone opens nothing."""
    from identity.records import PolicyFile, PolicyRecord
    from identity.records_policy import ScopeSigners
    from policy.language import digest
    from tests.unit.policy.operators import Operators

    ops = Operators(world.pin.trust_domain.name)
    authority = ops.authority(scopes=[ScopeSigners(scope="", signers=["alice", "bob"], threshold=1)])

    def publish(text: str, revision: int, bundle: Any = None) -> None:
        record = PolicyRecord(
            trust_domain=ops.trust_domain, revision=revision, digest=digest([("edge.yaml", text)]), author="t", issued=int(time.time()),
            files=[PolicyFile(name="edge.yaml", text=text)], authority=authority.texts() if bundle else [], parts=bundle.texts() if bundle else [],
        )  # fmt: skip
        world.objects["policy"] = world.authority.sign_record(record)

    shut = "meshpolicy: 1\n"
    first = ops.bundle(authority, {"edge.yaml": shut}, "alice")
    publish(shut, 2, first)
    view = world.view()
    assert ruled(view) == "policy"
    wide = world.template % 8080
    for revision, bundle, code in ((3, None, "policy.unsigned"), (3, ops.bundle(authority, {"edge.yaml": wide}), "policy.unsigned"), (3, first, "policy.content")):
        publish(wide, revision, bundle)
        with pytest.raises(NotVerified) as e:
            world.view(view)
        assert e.value.code == code
    del world.objects["policy"]
    with pytest.raises(NotVerified):
        world.view(view)
    assert ruled(view) == "policy"
