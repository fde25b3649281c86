"""The kernel lane (`make test-kernel`): plain pytest collects nothing here, for it has no kernel to boot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.machine import Machine

IMAGE = os.environ.get("RETINUE_KERNEL_IMAGE")
INSIDE = bool(os.environ.get("RETINUE_KERNEL_INSIDE"))  # set in the guest
collect_ignore_glob = [] if INSIDE else ["inside/*"]
if not IMAGE:
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """One guest for all tests: booting is what costs."""
    assert IMAGE
    with Machine(Path(IMAGE)) as booted:
        print(f"\nguest: Linux {booted.kernel}, up after {booted.boot_seconds:.1f} s")
        yield booted
