from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from policy.ports import (
    ALL_PORTS,
    ANYTHING,
    NOTHING,
    PortMap,
    mask,
    parse_ports,
    proto_name,
    proto_number,
    show_ports,
    single,
    union,
    whole,
)

WORDS = ("tcp/80", "tcp/80,443", "tcp/9000-9010", "udp", "icmp", "47", "any", "sctp/1-65535", "tcp/1", "udp/65535")
maps = st.lists(st.sampled_from(WORDS), max_size=3).map(lambda words: union(parse_ports(w) for w in words))
FLOWS = [(6, 1), (6, 80), (6, 443), (6, 9005), (17, 5), (17, 65535), (132, 7), (1, None), (47, None), (50, None)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tcp/5432", "tcp/5432"),
        ("TCP/80, 443", "tcp/80,443"),
        ("tcp/9000-9010", "tcp/9000-9010"),
        ("tcp/*", "tcp"),
        ("udp", "udp"),
        ("icmpv6", "icmp"),
        ("58", "icmp"),
        ("47", "47"),
        ("any", "any"),
        ("*", "any"),
        ("tcp/1-65535", "tcp"),
    ],
)
def test_words_are_read_and_shown(text, shown):
    assert str(parse_ports(text)) == shown


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("tcp/0", "port.range"),
        ("tcp/65536", "port.range"),
        ("tcp/1-65536", "port.range"),
        ("tcp/90-80", "port.reversed"),
        ("tcp/80;", "port.form"),
        ("tcp/,", "port.form"),
        ("tcp/8-", "port.form"),
        ("icmp/8", "port.form"),
        ("", "port.form"),
        ("tpc/80", "port.protocol"),
        ("300", "port.protocol"),
        (None, "port.form"),
    ],
)
def test_bad_words_are_refused(text, code):
    with pytest.raises(BadInput) as caught:
        parse_ports(text)
    assert caught.value.code == code


@given(maps, maps)
def test_algebra_is_the_algebra_of_the_flows(one, other):
    for proto, port in FLOWS:
        a, b = one.allows(proto, port), other.allows(proto, port)
        assert (one | other).allows(proto, port) == (a or b)
        assert (one & other).allows(proto, port) == (a and b)
        assert (one - other).allows(proto, port) == (a and not b)
    assert bool(one) == any(one.allows(p, n) for p, n in FLOWS) or one
    assert hash(one | other) == hash(other | one)
    assert (one - one) == NOTHING
    assert not one - one


def test_shown_forms():
    assert str(NOTHING) == "nothing"
    assert str(ANYTHING - parse_ports("tcp/22")) == "any but tcp/22"
    assert repr(whole(6)) == "PortMap('tcp')"  # a repr in decimal would be refused by Python
    assert show_ports(ALL_PORTS) == "*"
    assert show_ports(mask(1, 2) | mask(9, 9)) == "1-2,9"
    assert (ANYTHING - whole(6)).words() == []
    assert proto_name(6) == "tcp"
    assert proto_name(99) == "99"
    assert proto_number("UDP") == 17
    assert single(1, 8) == whole(1)
    assert single(6, 80) == parse_ports("tcp/80")
    assert not PortMap({6: 0})
    assert parse_ports("tcp/80").allows(6, None)
