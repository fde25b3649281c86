"""Tests that run in the guest, on its kernel: the contract of all devices and whole data planes on the kernel device."""

from __future__ import annotations

import sys
from xml.etree import ElementTree as ET

import pytest

from tests.kernel.machine import Machine

pytestmark = [pytest.mark.netns, pytest.mark.timeout(400)]

REPORT = "/run/report.xml"
TESTS = ("tests/netns/test_dataplane_devices.py", "tests/kernel/inside")
PLUGINS = ("pytest_asyncio.plugin", "pytest_timeout", "_hypothesis_pytestplugin")


@pytest.fixture(scope="module")
def outcomes(machine: Machine) -> dict[str, str]:
    """One pytest in the guest: module and test -> ``passed``, ``skipped``, ``failure`` or ``error``."""
    argv = [sys.executable, "-m", "pytest", "-q", "--timeout=200", f"--junit-xml={REPORT}", "-k", "kernel or choice", "--durations=8"]
    argv += [word for plugin in PLUGINS for word in ("-p", plugin)] + [*TESTS]
    # Only the plugins in use: emulated start-up is slow.
    env = {"RETINUE_KERNEL_INSIDE": "1", "RETINUE_KERNEL_IMAGE": "guest", "CI": "true", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with machine.start(*argv, env=env) as command:
        while (line := command.readline()) is not None:
            print(f"guest: {line}")
        print(command.err)
    assert command.rc in {0, 1}, f"pytest in the guest ended with {command.rc}"
    found = {}
    for case in ET.fromstring(machine.run("cat", REPORT)).iter("testcase"):
        bad = [child.tag for child in case if child.tag in {"skipped", "failure", "error"}]
        found[f"{case.attrib['classname'].rpartition('.')[2]}:{case.attrib['name']}"] = bad[0] if bad else "passed"
    assert found
    assert command.rc == 0 or set(found.values()) & {"failure", "error"}
    return found


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
