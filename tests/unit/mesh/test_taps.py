"""Links of guests: what netlink says about links that go, and the table that answers ARP for the gateway."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput, NotFound
from mesh.taps import LinkWatch, arp_table, index_of, inspect, removed


def message(kind: int, index: int, family: int = socket.AF_UNSPEC) -> bytes:
    body = struct.pack("=BxHiII", family, 1, index, 0, 0)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_links_that_are_gone() -> None:
    data = message(16, 3) + message(17, 4) + message(17, 5, socket.AF_BRIDGE) + message(17, 6)
    assert removed(data) == [4, 6], "new ones and ports that leave a bridge are not gone"


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    removed(data)
    removed(message(17, 9) + data)


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", "a b", "a\n"])
def test_names(name: str) -> None:
    with pytest.raises(BadInput):
        inspect(name)


def test_a_link_that_is_not_there() -> None:
    assert index_of("att-nothere") is None
    with pytest.raises(NotFound):
        inspect("att-nothere")


def test_the_loopback_is_no_guest() -> None:
    with pytest.raises(BadInput, match="no tap"):
        inspect("lo")


def test_the_table_marks_questions_for_the_gateway_alone() -> None:
    text = arp_table("rtn1")
    assert "table arp retinue_rtn1" in text
    assert "arp daddr ip 169.254.82.1" in text


async def test_the_watch_reads_until_closed() -> None:
    gone: list[int] = []
    watch = LinkWatch(gone.append, lambda: None)
    await asyncio.sleep(0)
    watch.close()
    assert gone == []
