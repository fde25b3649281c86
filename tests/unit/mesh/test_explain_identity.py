"""`retinue explain identity`: held, held elsewhere, over, fenced; and whether a process is given it, and why not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from identity.entries import Selectors
from identity.errors import BadInput, NotFound
from identity.wire.local import Attach
from mesh.explain_identity import explain_identity, lines
from mesh.local_api import LocalApi, snapshot_of
from mesh.local_client import LocalClient
from tests.unit.mesh.test_identities import API, entries, entry
from tests.unit.mesh.workload_rig import moved, tell


async def test_a_sidecar_holds_its_identity(agent, live):
    await agent.svids.get("cart", 0)
    found = explain_identity(agent, "cart", 0)
    assert (found.holds, found.state, found.holder, found.epoch, found.since) == (True, "active", "cart-sidecar-1", 1, live.now)
    assert found.certificate.serial == f"{agent.svids.shown('cart/0').svid.serial:x}"
    assert found.certificate.not_before < found.certificate.renew_at < found.certificate.not_after
    assert any("spiffe://test.example/sidecar/cart-sidecar-1" in p for p in found.proof)
    text = "\n".join(lines(found))
    assert text.startswith("HELD  spiffe://test.example/wl/cart instance 0")
    assert "until    it is moved or revoked" in text


async def test_who_holds_it_instead(agent, live):
    await moved(agent, live)
    found = explain_identity(agent, "cart", 0)
    assert (found.holds, found.holder, found.epoch) == (False, "host-b", 2)
    assert found.reason == "host-b holds it, not cart-sidecar-1"
    assert found.certificate is None
    assert "epochs below 2 are refused here for ever" in found.fences
    assert explain_identity(agent, "other", 0).state == "unknown"
    assert not explain_identity(agent, "cart", 7).holds


async def test_what_is_over(agent, live):
    own = agent.enrollment.record.tunnel_key
    at = {"index": 7, "labels": {"role": "web"}, "tunnel_key": own}
    await tell(agent, live.delta({"placement/cart/0": live.placement("cart", "cart-sidecar-1", epoch=2, ends=live.time + 1, **at)}))
    found = explain_identity(agent, "cart", 0)
    assert (found.holds, found.state, found.reason, found.ends) == (False, "fenced", "its end has come", live.time)
    assert "fenced: its end has come" in found.fences
    assert "placement/cart/0" not in snapshot_of(agent).objects  # the gateway reads these
    await tell(agent, live.delta({"placement/cart/0": live.placement("cart", "cart-sidecar-1", epoch=3, state="revoked", **at)}))
    found = explain_identity(agent, "cart", 0)
    assert (found.state, found.holder) == ("revoked", None)
    assert "until    it is moved" in "\n".join(lines(found))


async def test_a_fence_for_want_of_the_ca(agent):
    agent.machine.heard -= 13 * 3600
    await agent._apply()
    found = explain_identity(agent, "cart", 0)
    assert (found.holds, found.state) == (False, "fenced")
    assert "fenced: no sign of life of the CA" in found.fences


async def test_on_a_host(make_agent, enrollment, live):
    agent = make_agent(enrollment)
    assert explain_identity(agent, "web", 0).reason == "the agent has not applied any state yet"
    await tell(agent, live.snapshot())
    assert "nothing is attached for it" in explain_identity(agent, "web", 0).reason
    agent.attachments.attach(Attach(name="web", kind="host"))
    await agent._apply()
    found = explain_identity(agent, "web", 0)
    assert (found.holds, found.proof[-1]) == (True, "attachment of kind host, the host itself")
    agent.plane.failed = {"web/0": "no"}
    await agent._apply()
    assert not explain_identity(agent, "web", 0).holds
    await tell(agent, live.delta({"placement/batch/0": live.placement("batch", "host-a", epoch=2, index=3)}))
    assert "earlier tunnel key" in explain_identity(agent, "batch", 0).reason


async def test_a_process_and_the_selector_that_failed(agent, live):
    found = explain_identity(agent, "cart", 0, os.getpid())
    assert (found.holds, found.proof[0]) == (True, "it is in the network namespace of the instance")
    await tell(agent, live.delta({"entries": entries(live, entry(selectors=Selectors(uid=os.geteuid(), netns="cart", path="/bin/other")), entry(selectors=API, id="e-2"))}))
    found = explain_identity(agent, "cart", 0, os.getpid())
    assert not found.holds
    assert {f.selector for e in found.entries for f in e.findings if not f.ok} >= {"path", "unit"}
    text = "\n".join(lines(found))
    assert "path: wanted /bin/other, found " + os.path.realpath(sys.executable) in text
    assert "does not hold" in text
    await tell(agent, live.delta({"entries": entries(live, entry(hint="main"), generation=2)}))
    found = explain_identity(agent, "cart", 0, os.getpid())
    assert (found.holds, found.proof) == (True, ["entry e-1 holds", "hint main"])
    await tell(agent, live.delta({"entries": entries(live, entry(labels={"role": "db"}), generation=3)}))
    assert "labels" in "\n".join(lines(explain_identity(agent, "cart", 0, os.getpid())))


async def test_an_entry_that_has_ended_is_named(agent, live):
    await tell(agent, live.delta({"entries": entries(live, entry(id="e-7", ends=live.time + 100))}))
    assert not any("e-7 ended" in f for f in explain_identity(agent, "cart", 0).fences)
    await tell(agent, live.beat(time=live.time + 200))
    found = explain_identity(agent, "cart", 0)
    assert any(f.startswith("entry e-7 ended ") and "until it is deleted" in f for f in found.fences)
    of_us = explain_identity(agent, "cart", 0, os.getpid())
    assert not of_us.holds
    assert "entry e-7 has ended, and keeps others out" in of_us.reason


async def test_a_process_that_is_not_there(agent):
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    for pid in (ended.pid, 1 << 40):
        with pytest.raises(NotFound) as caught:
            explain_identity(agent, "cart", 0, pid)
        assert caught.value.code == "explain.process"


async def test_over_the_local_api(agent):
    import asyncio

    async with LocalApi(agent, asyncio.Event()) as api, LocalClient(api.path) as client:
        assert (await client.explain_identity("cart", 0, None)).holds
        assert (await client.explain_identity("cart", 0, os.getpid())).holds
        for name in ("../x", "a\x1b[2J", ""):
            with pytest.raises(BadInput) as caught:
                await client.explain_identity(name, 0, None)
            assert "\x1b" not in caught.value.message
        with pytest.raises(BadInput):
            await client._ask("GET", "/v1/explain/identity", type(explain_identity(agent, "cart", 0)), params={"name": "a", "pid": "x"})
