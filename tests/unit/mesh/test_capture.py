"""mesh.capture: frames are read as what they are."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.capture import Capture, is_tunnel, udp_payload


def ipv4(payload: bytes, *, proto: int = 17, options: int = 0) -> bytes:
    header = bytes([0x45 + options]) + b"\0" * 8 + bytes([proto]) + b"\0" * 10 + b"\0" * 4 * options
    return b"\0" * 12 + b"\x08\x00" + header + struct.pack("!4H", 1, 2, 8 + len(payload), 0) + payload


def ipv6(payload: bytes, *, proto: int = 17) -> bytes:
    return b"\0" * 12 + b"\x86\xdd" + b"\x60" + b"\0" * 5 + bytes([proto]) + b"\0" * 33 + struct.pack("!4H", 1, 2, 8 + len(payload), 0) + payload


@given(st.binary(max_size=64), st.integers(0, 10))
def test_udp_payloads_of_both_families(payload: bytes, options: int) -> None:
    assert udp_payload(ipv4(payload, options=options)) == payload
    assert udp_payload(ipv6(payload)) == payload
    assert udp_payload(ipv4(payload, proto=6)) is None
    assert udp_payload(ipv6(payload, proto=6)) is None


@given(st.binary(max_size=80))
def test_any_bytes_are_read_without_an_error(frame: bytes) -> None:
    udp_payload(frame)


@pytest.mark.parametrize(
    ("payload", "want"),
    [(b"\4\0\0\0" + b"x" * 28, True), (b"\1\0\0\0" + b"x" * 144, True), (b"\5\0\0\0" + b"x" * 28, False),
     (b"\4\0\0\1" + b"x" * 28, False), (b"\4\0\0\0", False), (b"GET / HTTP/1.1" + b"x" * 28, False)],
)  # fmt: skip
def test_the_shape_of_a_tunnel_message(payload: bytes, want: bool) -> None:
    assert is_tunnel(payload) is want


def test_an_empty_needle_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Capture("x", {"a": b""})
