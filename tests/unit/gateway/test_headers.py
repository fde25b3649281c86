"""gateway.headers: nothing a caller says about itself gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import headers
from identity.errors import BadInput

OURS = headers.statements(client="192.0.2.1", proto="https", host="h", caller="spiffe://t/wl/a", by="token", request_id="1")


@pytest.mark.parametrize(
    "name",
    ["X-Forwarded-For", "x_forwarded_for", "X-Forwarded-Client-Cert", "Forwarded", "X-Retinue-Caller", "X-RETINUE_caller",
     "X-Real-IP", "X-Request-Id", "Connection", "Keep-Alive", "TE", "Transfer-Encoding", "Upgrade", "Proxy-Authorization",
     "Expect", "X-Hop"],
)  # fmt: skip
def test_callers_cannot_say_who_they_are(name: str) -> None:
    sent = headers.upstream_headers([(name, "evil"), ("Connection", "x-hop"), ("Accept", "a")], OURS, drop_authorization=False)
    assert ("Accept", "a") in sent
    assert all(value != "evil" for _, value in sent)
    assert dict(sent).items() >= OURS.items()


def test_authorization_is_dropped_only_when_it_was_ours() -> None:
    given_headers = [("Authorization", "Bearer x")]
    assert headers.upstream_headers(given_headers, {}, drop_authorization=False) == given_headers
    assert headers.upstream_headers(given_headers, {}, drop_authorization=True) == []


def test_websocket_fields_are_made_anew() -> None:
    sent = headers.upstream_headers(
        [("Sec-WebSocket-Key", "k"), ("Origin", "o")], {}, drop_authorization=False, websocket=True
    )
    assert sent == [("Origin", "o")]


def test_host_survives_a_connection_field_that_names_it() -> None:
    sent = headers.upstream_headers([("Host", "a"), ("Connection", "host, close")], {}, drop_authorization=False)
    assert sent == [("Host", "a")]


def test_answers_lose_their_hop_by_hop_fields() -> None:
    got = headers.downstream_headers([("Connection", "X-A"), ("X-A", "1"), ("Keep-Alive", "2"), ("ETag", "3")])
    assert got == [("ETag", "3")]


@given(st.lists(st.tuples(st.from_regex(r"[A-Za-z_-]{1,20}", fullmatch=True), st.just("evil")), max_size=20))
def test_statements_are_ours_whatever_comes(given_headers: list[tuple[str, str]]) -> None:
    sent = headers.upstream_headers(given_headers, OURS, drop_authorization=False)
    for name, value in sent:
        if headers.is_ours(name):
            assert OURS[name] == value


@pytest.mark.parametrize("raw", ["/", "/a/b?x=/../y", "/a%20b", "/%C3%A9", "/a;p=1/b", "/a..b", "/.well-known/x"])
def test_plain_paths(raw: str) -> None:
    assert headers.checked_path(raw).startswith("/")


@pytest.mark.parametrize(
    "raw",
    ["", "*", "http://x/", "/a/../b", "/..", "/./a", "/a/%2e%2e/b", "/a%2Fb", "/a%5cb", "/a%00b", "//a", "/a//b", "/a\\b", "/%ff",
     "/a#b", "/a/..;x=1/b", "/a%0ab", "/a%09b"],
)  # fmt: skip
def test_paths_that_could_mean_two_things(raw: str) -> None:
    with pytest.raises(BadInput):
        headers.checked_path(raw)


@pytest.mark.parametrize(("host", "want"), [("A.example:80", "a.example"), ("[::1]:443", "[::1]"), ("x.", "x"), ("x", "x")])
def test_hosts(host: str, want: str) -> None:
    assert headers.host_only(host) == want


@pytest.mark.parametrize("host", ["", "a b", "a/b", "a:b", "a@b", "[::1"])
def test_bad_hosts(host: str) -> None:
    with pytest.raises(BadInput):
        headers.host_only(host)


def test_authority() -> None:
    assert headers.authority("::1", 80) == "[::1]:80"
    assert headers.authority("127.0.0.1", 80) == "127.0.0.1:80"


@given(st.text(max_size=60) | st.lists(st.sampled_from(["/", ".", "..", "%2e", "%2F", "%00", "\\\\", "?", "#", ";", "a", "//", "%", "\r\n"]), max_size=8).map("".join))
def test_any_path_is_refused_or_stays_where_it_says(raw: str) -> None:
    try:
        path = headers.checked_path(raw)
    except BadInput:
        return
    plain = path.partition("?")[0]
    assert plain.startswith("/")
    assert not {".", ".."} & set(plain.split("/"))
    assert not any(ord(c) < 0x20 or c in "\x7f\\" for c in path)


@given(st.text(max_size=40))
def test_any_host_is_refused_or_a_name(raw: str) -> None:
    try:
        host = headers.host_only(raw)
    except BadInput:
        return
    assert not set(host) & set("/@ \r\n\0")


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=12))
def test_any_headers_lose_what_is_ours(given_headers: list[tuple[str, str]]) -> None:
    sent = headers.upstream_headers(given_headers, OURS, drop_authorization=True)
    assert all(OURS[name] == value for name, value in sent if headers.is_ours(name))
    assert not [name for name, _ in sent if name.lower() in {"connection", "transfer-encoding", "authorization"}]
    headers.downstream_headers(given_headers)
