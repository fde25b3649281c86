"""The kernel lane (`make test-kernel`): plain pytest collects nothing here, for it has no kernel to boot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.machine import Machine
from tests.kernel.rekey import Rekey
from tests.kernel.within import Within

IMAGE = os.environ.get("RETINUE_KERNEL_IMAGE")
INSIDE = bool(os.environ.get("RETINUE_KERNEL_INSIDE"))  # set in the guest
collect_ignore_glob = [] if INSIDE else ["inside/*"]
if not IMAGE:
    collect_ignore_glob.append("test_*.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in the guest is waited for last: it runs beside the tests from here."""
    items.sort(key=_waits)


def _waits(item: pytest.Item) -> bool:
    return item.path.name == "test_inside.py"


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """One guest for all tests: booting is what costs."""
    assert IMAGE
    with Machine(Path(IMAGE)) as booted:
        print(f"\nguest: Linux {booted.kernel}, up after {booted.boot_seconds:.1f} s")
        yield booted


@pytest.fixture(scope="session", autouse=True)
def rekey(request: pytest.FixtureRequest) -> Iterator[Rekey | None]:
    """The tunnel whose first keys have to grow old, begun before anything else."""
    if not any(item.path.name == "test_rekey.py" for item in request.session.items):
        yield None
        return
    run = Rekey(request.getfixturevalue("machine"), tag=str(os.getpid() % 100000))
    yield run
    run.close()


@pytest.fixture(scope="session", autouse=True)
def within(request: pytest.FixtureRequest, rekey: Rekey | None) -> Iterator[Within | None]:
    """The tests in the guest, started before the first test from here."""
    if not any(_waits(item) for item in request.session.items):
        yield None
        return
    run = Within(request.getfixturevalue("machine"))
    yield run
    run.close()
