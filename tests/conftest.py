"""What every test may rely on: the privilege rule of the `netns` marker and the place of the judge cases."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # how long an example takes says what else runs here
settings.load_profile("any machine")


def missing_privilege() -> str:
    """Why namespaces cannot be used here, or an empty string."""
    if os.geteuid() != 0:
        return "not root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netns") is None:
        return
    why = missing_privilege()
    if why and os.environ.get("CI"):
        pytest.fail(f"a privileged test cannot run under CI: {why}", pytrace=False)
    if why:
        pytest.skip(f"needs root, network namespaces and /dev/net/tun: {why}")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
