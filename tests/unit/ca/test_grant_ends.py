"""Grants that end by themselves: told once, with their cause, over restarts."""

from __future__ import annotations

from typing import Any

import pytest

from ca import audit, grant_ends
from ca.store import Store
from policy.language import load

TEXT = """meshpolicy: 1
grants:
  - {id: timed, from: "*", to: "*", on: tcp/1, not_before: "1970-01-01T00:00:10Z", not_after: "1970-01-01T00:01:40Z"}
  - {id: job, from: "*", to: "*", on: tcp/2, until: {workload_ends: job}}
  - {id: gone, from: "*", to: "*", on: tcp/3, not_after: "1970-01-01T00:01:40Z"}
"""


@pytest.fixture
def store(bench: Any) -> Store:
    found: Store = bench.store
    return found


def told(store: Store) -> list[tuple[str, Any]]:
    with store.read() as tx:
        return [(e.subject, e) for e in audit.entries(tx) if getattr(e, "action", "") == "grant.expired"]


def test_what_ends_is_told_once_with_its_cause(store: Store) -> None:
    policy = load([("p.yaml", TEXT)])
    assert grant_ends.follow(store, [policy], 5, set()) == []  # the job has not begun, and that is no end
    assert grant_ends.follow(store, [policy], 20, {"job"}) == []
    without = load([("p.yaml", "\n".join(line for line in TEXT.splitlines() if "gone" not in line))])
    assert grant_ends.follow(store, [without], 30, {"job"}) == []  # taken out by its author
    assert grant_ends.follow(store, [without], 40, set()) == ["grant:job"]
    assert grant_ends.follow(store, [without], 41, set()) == []
    assert grant_ends.follow(store, [without], 100, set()) == ["grant:timed"]
    assert grant_ends.follow(store, [], 101, set()) == []
    found = dict(told(store))
    assert set(found) == {"job", "timed"}
    assert "the end of the workload job" in str(found["job"])
    assert "its end 1970-01-01T00:01:40Z" in str(found["timed"])


def test_a_job_that_comes_back_opens_its_grant_and_may_end_again(store: Store) -> None:
    policy = load([("p.yaml", TEXT)])
    for now in (200, 300):
        assert grant_ends.follow(store, [policy], now, {"job"}) == []
        assert grant_ends.follow(store, [policy], now + 1, set()) == ["grant:job"]
    assert len(told(store)) == 2
