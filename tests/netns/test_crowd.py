"""Revocation before a small crowd, real and simulated: every peer refuses, others lose nothing, the CA restarts and stops. `make crowd`."""

from __future__ import annotations

import pytest

from tests.ha.crowd import play

pytestmark = pytest.mark.timeout(180)


async def test_the_last_peer_refuses_and_the_control_plane_comes_and_goes() -> None:
    assert await play(agents=3, simulated=40, rounds=1, changes=1, reports=True, out=None) == []
