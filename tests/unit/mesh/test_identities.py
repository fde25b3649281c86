"""What registration entries give a process, in an agent that verified them; and what must not be taken for an entry."""

from __future__ import annotations

import os

import pytest
from grpclib.const import Status

from identity.entries import EntriesRecord, Entry, Facts, Selectors
from identity.errors import Refused
from mesh import identities as module
from mesh.acceptance import ENTRIES
from mesh.attestation import own_namespace
from mesh.identities import Given, by_entries, check_given, identities, unique
from tests.unit.mesh.workload_rig import CART, opened, refused, somebody, svid_stream, tell

API = Selectors(uid=33, unit="api.service")


def entries(live, *found, endpoint="cart-sidecar-1", generation=1):
    record = EntriesRecord(
        trust_domain="test.example", endpoint=endpoint, generation=generation, entries=list(found), issued=live.now
    )
    return live.sign(record)


def entry(name="cart", selectors=None, **more):
    return Entry(id=more.pop("id", "e-1"), name=name, selectors=selectors or Selectors(uid=os.geteuid(), netns="cart"), **more)


@pytest.fixture
def me():
    made = somebody(os.geteuid())
    yield made
    made.close()


async def test_an_entry_gives_and_narrows(agent, live, me):
    """Without an entry everybody in the namespace has the identity; with one, only those it holds for."""
    assert identities(agent, me, own_namespace()) == (Given("cart/0", "cart/0"),)
    await tell(agent, live.delta({"entries": entries(live, entry(hint="main"))}))
    assert identities(agent, me, own_namespace()) == (Given("cart/0", "main", "e-1"),)
    await tell(agent, live.delta({"entries": entries(live, entry(selectors=Selectors(uid=4321, netns="cart")), generation=2)}))
    with pytest.raises(Refused) as caught:
        identities(agent, me, own_namespace())
    assert "no registration entry holds" in caught.value.message
    # an end by time (0: as the CA writes it once it noticed) lets nobody else in
    for generation, ends in ((3, live.now - 1), (4, 0)):
        await tell(agent, live.delta({"entries": entries(live, entry(ends=ends), generation=generation)}))
        with pytest.raises(Refused, match="no registration entry holds"):
            identities(agent, me, own_namespace())
    await tell(agent, live.delta({"entries": entries(live, generation=5)}))
    assert identities(agent, me, own_namespace()) == (Given("cart/0", "cart/0"),)


async def test_the_stream_follows_the_entries(agent, live, channel):
    async with opened(channel) as stream:
        assert [s.hint for s in (await stream.recv_message()).svids] == ["cart/0"]
        await tell(agent, live.delta({"entries": entries(live, entry(hint="main"))}))
        assert [(s.spiffe_id, s.hint) for s in (await stream.recv_message()).svids] == [(CART, "main")]
    await tell(agent, live.delta({"entries": entries(live, entry(selectors=API), generation=2)}))
    assert (await refused(svid_stream(channel)))[0] is Status.PERMISSION_DENIED


async def test_an_entry_that_ends_is_over_by_the_signed_clock(agent, live, me):
    await tell(agent, live.delta({"entries": entries(live, entry(ends=live.time + 2), entry(selectors=API, id="e-2"))}))
    assert identities(agent, me, own_namespace())[0].entry == "e-1"
    live.time += 5
    await tell(agent, live.beat())
    await agent._apply()
    with pytest.raises(Refused):
        identities(agent, me, own_namespace())


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda live: entries(live, entry(hint="forged"), endpoint="host-b", generation=9), "entries.endpoint"),
        (lambda live: entries(live, entry(hint="older"), generation=4), "entries.generation"),
        (lambda live: entries(live, entry(hint="another"), generation=5), "entries.equivocation"),
        (lambda live: live.policy(9), "record.type"),
        (lambda live: entries(live, entry(hint="torn"), generation=9)[:-4] + "AAAA", "record.signature"),
    ],
    ids=["of another host", "an older set", "two sets of one generation", "not a set", "not signed"],
)
async def test_sets_that_are_not_taken_leave_what_was(agent, live, me, make, code):
    await tell(agent, live.delta({"entries": entries(live, entry(hint="good"), generation=5)}))
    await tell(agent, live.delta({"entries": make(live)}))
    assert agent.machine.refused["entries"].code == code
    assert identities(agent, me, own_namespace()) == (Given("cart/0", "good", "e-1"),)


async def test_a_set_never_just_goes(agent, live, me):
    """Without its set an identity would be everybody's again: neither a tombstone nor a snapshot takes it away."""
    await tell(agent, live.delta({"entries": entries(live, entry(hint="good"))}))
    before = agent.machine.position
    await tell(agent, live.delta(removes=["entries"]))
    assert agent.machine.position == before
    await tell(agent, live.snapshot())
    assert agent.machine.position == before
    assert identities(agent, me, own_namespace())[0].hint == "good"
    assert agent.state.load_marks()[0][ENTRIES].number == 1  # and a restart does not forget it


async def test_an_identity_that_is_attached_nowhere(make_agent, enrollment, live, monkeypatch, me):
    """A unit of the host's own namespace: placed here, no attachment."""
    agent = make_agent(enrollment)
    await tell(agent, live.snapshot())
    record = entries(live, entry("web", API, hint="web"), entry("shop/api", API, id="e-2"), endpoint="host-a")
    await tell(agent, live.delta({"entries": record}))
    here = Facts(33, 33, cgroup="/system.slice/api.service")
    monkeypatch.setattr(module, "facts_of", lambda *_, **__: here)
    assert identities(agent, me, own_namespace()) == (Given("web/0", "web", "e-1"),)  # shop/api is placed on host-b
    assert agent.report().attached == ["web/0"]
    await tell(agent, live.delta({"placement/web/0": live.placement("web", "host-b", epoch=2)}))
    with pytest.raises(Refused):
        identities(agent, me, own_namespace())
    with pytest.raises(Refused) as caught:
        check_given(agent, Given("web/0", "web", "e-1"))
    assert caught.value.code == "svid.inactive"


async def test_the_most_specific_entry_is_the_default(make_agent, enrollment, live):
    agent = make_agent(enrollment)
    await tell(agent, live.snapshot())
    found = (
        entry("batch", API, id="e-1", hint="same"), entry("web", Selectors(uid=33, unit="api.service", gid=33), id="e-2", hint="same"),
        entry("web", API, id="e-3", hint="later"), entry("batch", API, id="e-4", labels={"role": "other"}),
    )  # fmt: skip
    facts = Facts(33, 33, cgroup="/system.slice/api.service")
    given = by_entries(agent, agent.in_force, found, facts)
    assert unique(given) == (Given("web/0", "same", "e-2"), Given("batch/0", "batch/0", "e-1"))
    assert by_entries(agent, agent.in_force, found[3:], facts) == []


async def test_an_older_snapshot_without_entries_is_still_read(agent, live, me):
    """An agent that never saw a set is served by a CA that has none."""
    assert ENTRIES not in agent.machine.marks
    await tell(agent, live.snapshot(revision=live.revision))
    assert identities(agent, me, own_namespace())


