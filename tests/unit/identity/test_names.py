from __future__ import annotations

import ipaddress
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput
from identity.names import MAX_SPIFFE_ID, OVERLAY_V4, SpiffeId, TrustDomain, host_name, workload_path

TD = TrustDomain("prod.example")

domains = st.from_regex(r"[a-z0-9._-]{1,40}", fullmatch=True)
segments = st.from_regex(r"[a-zA-Z0-9._-]{1,20}", fullmatch=True).filter(lambda s: s not in {".", ".."})


@given(domains, st.lists(segments, min_size=1, max_size=8))
def test_ids_round_trip(domain, path):
    made = SpiffeId(TrustDomain(domain), tuple(path))
    assert SpiffeId.parse(str(made)) == made


@given(st.text(max_size=80))
def test_what_parses_prints_the_same(text):
    with suppress(BadInput):
        assert str(SpiffeId.parse(text)) == text


@given(domains, st.text(max_size=30))
def test_no_id_smuggles_a_path(domain, tail):
    try:
        parsed = SpiffeId.parse(f"spiffe://{domain}/{tail}")
    except BadInput:
        return
    assert parsed.segments == tuple(tail.split("/"))
    assert not {"", ".", ".."} & set(parsed.segments)


@pytest.mark.parametrize(
    "text",
    ["", "spiffe:", "spiffe://", "spiffe://td", "spiffe://td/", "spiffe://td//a", "spiffe://td/a/", "spiffe:///a", "SPIFFE://td/a",
     "spiffe://TD/a", "spiffe://td:8/a", "spiffe://u@td/a", "spiffe://td/a?b", "spiffe://td/a#b", "spiffe://td/%41",
     "spiffe://td/../a", "spiffe://td/./a", "spiffe://td/a b", "spiffe://td/é", "spiffe://tд/a", "https://td/a", " spiffe://td/a",
     "spiffe://td/a\n", None, 7, "spiffe://" + "a" * 256 + "/b", "spiffe://td/" + "a" * MAX_SPIFFE_ID],
)  # fmt: skip
def test_bad_ids_are_refused(text):
    with pytest.raises(BadInput) as e:
        SpiffeId.parse(text)
    assert len(e.value.message) < 200
    assert e.value.message.isascii()


def test_limits_are_inclusive():
    assert len(TrustDomain("a" * 255).name) == 255
    longest = "spiffe://td/" + "a" * (MAX_SPIFFE_ID - len("spiffe://td/"))
    assert str(SpiffeId.parse(longest)) == longest
    with pytest.raises(BadInput):
        SpiffeId(TrustDomain("td"), ("a" * MAX_SPIFFE_ID,))
    with pytest.raises(BadInput):
        SpiffeId(TD, ())


@pytest.mark.parametrize("name", ["", "A.example", "a b", "a/b", "é", "a" * 256, "a:1", "a%41"])
def test_bad_trust_domains_are_refused(name):
    with pytest.raises(BadInput) as e:
        TrustDomain(name)
    assert e.value.code == "name.trust_domain"
    assert e.value.hint


def test_kinds_and_names():
    assert str(SpiffeId.workload(TD, "shop/api")) == "spiffe://prod.example/wl/shop/api"
    assert (SpiffeId.workload(TD, "shop/api").kind, SpiffeId.workload(TD, "shop/api").name) == ("wl", "shop/api")
    assert str(SpiffeId.endpoint(TD, "web-1")) == "spiffe://prod.example/host/web-1"
    assert SpiffeId.endpoint(TD, "s", "sidecar").kind == "sidecar"
    with pytest.raises(BadInput) as e:
        SpiffeId.endpoint(TD, "x", "cp")
    assert e.value.code == "name.endpoint_kind"
    assert str(TD) == "prod.example"
    assert TrustDomain("a") < TrustDomain("b")


@pytest.mark.parametrize("name", ["a", "web-1", "a.b_c-d", "0", "a" * 63])
def test_good_names(name):
    assert host_name(name) == name
    assert workload_path(name) == (name,)


@pytest.mark.parametrize("name", ["", "-a", "a-", ".a", "a..b", "A", "a b", "a" * 64, "é", "a\n", None, 7])
def test_bad_names(name):
    with pytest.raises(BadInput):
        host_name(name)
    with pytest.raises(BadInput):
        workload_path(name)


def test_workload_paths():
    assert workload_path("shop/eu/api") == ("shop", "eu", "api")
    for bad in ("/a", "a/", "a//b", "a/../b", "a/./b", "/".join(["a" * 60] * 5)):
        with pytest.raises(BadInput) as e:
            workload_path(bad)
        assert e.value.code == "name.workload"
    with pytest.raises(BadInput):
        host_name("a/b")


def test_overlay_addresses_are_fixed_for_ever():
    """Golden: these are in signed records and in people's configuration."""
    assert str(TD.overlay_v6()) == "fdc4:31b5:7bfe::/48"
    assert tuple(map(str, TD.overlay(1))) == ("100.64.0.1", "fdc4:31b5:7bfe:1::1")


@given(st.integers(1, OVERLAY_V4.num_addresses - 2))
def test_overlay_addresses_lie_in_their_ranges(index):
    v4, v6 = TD.overlay(index)
    assert v4 in OVERLAY_V4
    assert v6 in TD.overlay_v6()
    assert v6 in ipaddress.ip_network("fd00::/8")
    assert int(v4) - int(OVERLAY_V4.network_address) == int(v6) & 0xFFFFFFFF == index


def test_overlay_is_bounded_and_differs_by_domain():
    for index in (0, -1, OVERLAY_V4.num_addresses - 1, 1 << 40):
        with pytest.raises(BadInput) as e:
            TD.overlay(index)
        assert e.value.code == "name.overlay_full"
    assert TrustDomain("other.example").overlay_v6() != TD.overlay_v6()
    assert TD.overlay_v6().prefixlen == 48
