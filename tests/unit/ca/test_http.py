from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca import http
from ca.http import Buckets, TooMany, answer
from identity.errors import Conflict, Unreachable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def taken(buckets: Buckets, address: str, times: int) -> int:
    passed = 0
    for _ in range(times):
        try:
            buckets.take(address)
        except TooMany:
            continue
        passed += 1
    return passed


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    buckets = Buckets(2.0, 5.0, clock)
    assert taken(buckets, "192.0.2.1", 20) == 5
    assert taken(buckets, "192.0.2.2", 1) == 1
    clock.now = 1.0
    assert taken(buckets, "192.0.2.1", 20) == 2
    clock.now = 1000.0
    assert taken(buckets, "192.0.2.1", 20) == 5


def test_the_time_to_wait_is_enough() -> None:
    clock = Clock()
    buckets = Buckets(0.5, 1.0, clock)
    buckets.take("192.0.2.1")
    with pytest.raises(TooMany) as e:
        buckets.take("192.0.2.1")
    clock.now += e.value.retry_after
    buckets.take("192.0.2.1")


def test_an_ipv6_client_is_its_network() -> None:
    buckets = Buckets(1.0, 2.0, Clock())
    assert taken(buckets, "2001:db8::1", 1) + taken(buckets, "2001:db8::ffff:2", 5) == 2
    assert taken(buckets, "2001:db8:0:1::1", 1) == 1
    assert taken(buckets, "fe80::1%eth0", 3) == 2
    assert taken(buckets, "192.0.2.1", 1) + taken(buckets, "::ffff:192.0.2.1", 3) == 2


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_ADDRESSES", 10)
    buckets = Buckets(1.0, 1.0, Clock())
    for n in range(100):
        buckets.take(f"192.0.2.{n}")
    assert len(buckets._buckets) == 10


@given(st.text(max_size=80))
def test_any_address_text_is_taken(text: str) -> None:
    Buckets(1.0, 1.0, Clock()).take(text)


def test_answers_say_when_to_come_back() -> None:
    assert answer(TooMany(2.2)).headers["Retry-After"] == "3"
    assert answer(TooMany(2.2)).status == 429
    assert "Retry-After" in answer(Unreachable("store.busy", "x")).headers
    assert "Retry-After" not in answer(Conflict("x", "y")).headers
