"""Tests that run in the guest, on its kernel: the contract of all devices, whole data planes and agents on the kernel device."""

from __future__ import annotations

import pytest

from tests.kernel.within import Within

pytestmark = [pytest.mark.netns, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def outcomes(within: Within) -> dict[str, str]:
    return within.outcomes()


def bad(outcomes: dict[str, str], module: str) -> dict[str, str]:
    """What did not pass of a module, where skipping is not passing."""
    mine = {name: outcome for name, outcome in outcomes.items() if name.startswith(f"{module}:")}
    assert mine, f"nothing of {module} ran in the guest"
    return {name: outcome for name, outcome in mine.items() if outcome != "passed"}


def test_the_kernel_device_keeps_the_contract_of_all_devices(outcomes: dict[str, str]) -> None:
    assert bad(outcomes, "test_dataplane_devices") == {}
    assert sum(name.endswith("[kernel]") for name in outcomes) >= 5


def test_the_kernel_device_by_itself(outcomes: dict[str, str]) -> None:
    assert bad(outcomes, "test_device") == {}


def test_data_planes_on_the_kernel_device(outcomes: dict[str, str]) -> None:
    assert bad(outcomes, "test_plane") == {}


def test_agents_on_the_kernel_device(outcomes: dict[str, str]) -> None:
    assert bad(outcomes, "test_agents") == {}
    assert sum(name.startswith("test_agents:") for name in outcomes) == 5
