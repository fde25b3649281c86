"""The kernel initiates, sends on and makes new keys by its own timer, which our engine takes up without a loss."""

from __future__ import annotations

import pytest

from tests.kernel.rekey import INITIATION, PROBES, RESPONSE, Pings, Rekey

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

REKEY_AFTER = 120  # seconds, REKEY_AFTER_TIME of the whitepaper, 6.1
SLACK = 2.0  # seconds that the guest's clock and ours may differ over it


def test_the_kernel_makes_new_keys_and_nothing_is_lost(rekey: Rekey) -> None:
    """Everything was started before the first test; this one waits for the rest of the two minutes."""
    assert rekey.results() == [Pings(PROBES, PROBES)] * 2
    rekey.wire.close()
    assert rekey.wire.dropped == 0
    seen = rekey.wire.seen
    assert {h.sender for h in seen if h.kind == INITIATION} == {"kernel"}, "our engine must not have been the one"
    assert {h.sender for h in seen if h.kind == RESPONSE} == {"engine"}
    begun = seen[0].at
    # Under load an answer may come late and the kernel ask again: that belongs to the same handshake.
    first = [h for h in seen if h.at - begun < REKEY_AFTER / 2]
    second = [h for h in seen if h not in first]
    for made in (first, second):
        assert (made[0].sender, made[0].kind) == ("kernel", INITIATION)
        assert made[-1].kind == RESPONSE
    assert second[0].at - first[-1].at >= REKEY_AFTER - SLACK
    assert second[-1].at - second[0].at < REKEY_AFTER / 2, "one new set of keys"
    for before, now in zip(rekey.first, rekey.latest(), strict=True):
        assert now - before >= REKEY_AFTER - SLACK
