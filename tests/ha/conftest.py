from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ha.processes import Process, pair
from tests.postgres_server import Server, server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    with server() as made:
        yield made


@pytest.fixture
def two(tmp_path: Path, postgres: Server) -> Iterator[list[Process]]:
    with pair(tmp_path, postgres.database(), time.time()) as made:
        yield made
