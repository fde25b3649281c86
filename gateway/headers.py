"""What is carried from one side of the proxy to the other. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote_to_bytes

from identity.errors import BadInput

# RFC 9110 section 7.6.1, and what RFC 2616 section 13.5.1 named besides.
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
})  # fmt: skip
# Statements about the caller: only ours count. Prefixes end with '-'.
OURS = frozenset({"forwarded", "x-real-ip", "via", "x-request-id", "x-client-verify", "x-client-cert", "true-client-ip"})
OUR_PREFIXES = ("x-forwarded-", "x-retinue-", "x-ssl-", "x-envoy-")
WEBSOCKET = frozenset({
    "sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol", "sec-websocket-accept",
})  # fmt: skip

Pairs = list[tuple[str, str]]


def connection_tokens(headers: Iterable[tuple[str, str]]) -> set[str]:
    """Header names that Connection lists: they belong to this hop too."""
    values = (value for name, value in headers if name.lower() == "connection")
    return {token.strip().lower() for value in values for token in value.split(",")} - {""}


def is_ours(name: str) -> bool:
    """May only we set this header? ``_`` counts as ``-``: some servers fold the two (CGI, WSGI)."""
    folded = name.lower().replace("_", "-")
    return folded in OURS or folded.startswith(OUR_PREFIXES)


def upstream_headers(
    headers: Iterable[tuple[str, str]], ours: Mapping[str, str], *, drop_authorization: bool, websocket: bool = False
) -> Pairs:  # fmt: skip
    """Request headers for the workload: hop-by-hop gone, every statement about the caller replaced by ours.

    A field that Connection names goes too, except Host, which a caller must not be able to remove.
    """
    given = list(headers)
    hop = HOP_BY_HOP | (connection_tokens(given) - {"host"})
    out = []
    for name, value in given:
        low = name.lower()
        skip = low in hop or is_ours(low) or low == "expect" or (websocket and low in WEBSOCKET)
        if not skip and not (drop_authorization and low == "authorization"):
            out.append((name, value))
    return out + list(ours.items())


def downstream_headers(headers: Iterable[tuple[str, str]]) -> Pairs:
    """Response headers for the caller."""
    given = list(headers)
    hop = HOP_BY_HOP | connection_tokens(given)
    return [(name, value) for name, value in given if name.lower() not in hop]


def statements(*, client: str, proto: str, host: str, caller: str, by: str, request_id: str) -> dict[str, str]:
    """What we say about a request: where it came from and whom we found it to be."""
    return {
        "X-Forwarded-For": client,
        "X-Forwarded-Proto": proto,
        "X-Forwarded-Host": host,
        "X-Retinue-Caller": caller,
        "X-Retinue-Caller-Proof": by,
        "X-Request-Id": request_id,
    }


_BAD_TARGET = re.compile(r"[\x00-\x20\x7f\\#]")


def checked_path(raw: str) -> str:
    """The decoded path of an origin-form request target, for routing. Raises BadInput for one that could mean two things.

    Dot segments, encoded separators and bytes that are not UTF-8 are refused: what we route must be what they serve.
    """
    path = raw.partition("?")[0]
    if not raw.startswith("/") or _BAD_TARGET.search(raw):
        raise BadInput("gateway.target", "the request target must be a plain absolute path")
    try:
        decoded = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise BadInput("gateway.target", "the path is not UTF-8") from None
    if re.search(r"%(2f|5c|00|2e)", path, re.IGNORECASE) or any(s.partition(";")[0] in {".", ".."} for s in decoded.split("/")):
        raise BadInput("gateway.target", "dot segments and encoded separators are not accepted")
    if "//" in decoded or _BAD_TARGET.search(decoded.replace(" ", "")):
        raise BadInput("gateway.target", "empty segments and control characters are not accepted")
    return decoded


def host_only(host: str) -> str:
    """The Host header without port, lower-case. Raises BadInput for none or a malformed one."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?", host)
    if match is None:
        raise BadInput("gateway.host", "the Host header is missing or malformed")
    return match[1].lower().rstrip(".") or "."


def authority(address: str, port: int) -> str:
    """``address:port`` for a URL."""
    return f"[{address}]:{port}" if ipaddress.ip_address(address).version == 6 else f"{address}:{port}"
