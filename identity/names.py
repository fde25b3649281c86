"""Names: trust domains and SPIFFE IDs (SPIFFE-ID sections 2.1-2.4), frozen, parse/format round trip.

Path layout (our own):
    /host/<endpoint name>     a host agent
    /sidecar/<endpoint name>  a sidecar with a tunnel key of its own
    /wl/<scope path>/<name>   a workload; no host and no instance in it
    /admin/<name>  /cp/<role> operators and the control plane
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass

from identity.errors import BadInput

# SPIFFE-ID 2.1, 2.2, 2.3
TRUST_DOMAIN_CHARS = re.compile(r"[a-z0-9._-]+")
SEGMENT_CHARS = re.compile(r"[a-zA-Z0-9._-]+")
MAX_TRUST_DOMAIN = 255
MAX_SPIFFE_ID = 2048

# Our choices.
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
MAX_WORKLOAD_PATH = 255
OVERLAY_V4 = ipaddress.IPv4Network("100.64.0.0/10")
RESERVED = frozenset({"host", "sidecar", "admin", "cp"})


@dataclass(frozen=True, slots=True, order=True)
class TrustDomain:
    """A trust domain name, e.g. ``prod.example``."""

    name: str

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > MAX_TRUST_DOMAIN or not TRUST_DOMAIN_CHARS.fullmatch(self.name):
            raise BadInput(
                "name.trust_domain", f"not a trust domain: {_show(self.name)}",
                hint="use lower-case letters, digits, '.', '-' and '_' only, for example prod.example",
            )  # fmt: skip

    def __str__(self) -> str:
        return self.name

    def overlay_v6(self) -> ipaddress.IPv6Network:
        """The ULA /48 of this trust domain (RFC 4193; the 40 bits come from SHA-256 of the name)."""
        digest = hashlib.sha256(b"retinue overlay v6\0" + self.name.encode()).digest()
        return ipaddress.IPv6Network((b"\xfd" + digest[:5] + bytes(10), 48))

    def overlay(self, index: int) -> tuple[ipaddress.IPv4Address, ipaddress.IPv6Address]:
        """Overlay addresses number `index` (1-based): one IPv4, one IPv6. Raises BadInput when the range is used up."""
        if not 0 < index < OVERLAY_V4.num_addresses - 1:
            raise BadInput("name.overlay_full", f"no overlay address number {index} in {OVERLAY_V4}")
        return OVERLAY_V4[index], self.overlay_v6()[(1 << 64) + index]


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A SPIFFE ID: trust domain and path segments (never empty here: the root ID belongs to the authority)."""

    trust_domain: TrustDomain
    segments: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise BadInput("name.spiffe_id", "a SPIFFE ID of a host or workload needs a path")
        for seg in self.segments:
            if seg in {".", ".."} or not SEGMENT_CHARS.fullmatch(seg):
                raise BadInput("name.spiffe_id", f"bad path segment in a SPIFFE ID: {_show(seg)}")
        if len(str(self)) > MAX_SPIFFE_ID:
            raise BadInput("name.spiffe_id", f"a SPIFFE ID is at most {MAX_SPIFFE_ID} bytes")

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/{'/'.join(self.segments)}"

    @property
    def kind(self) -> str:
        """First segment: host, sidecar, wl, admin or cp (others are foreign layouts)."""
        return self.segments[0]

    @property
    def name(self) -> str:
        """What stands after the kind: ``web``, ``shop/api``."""
        return "/".join(self.segments[1:])

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Parse a URI. Raises BadInput. Scheme and trust domain must already be lower-case (no folding)."""
        if not isinstance(text, str) or len(text) > MAX_SPIFFE_ID or not text.startswith("spiffe://"):
            raise BadInput("name.spiffe_id", f"not a SPIFFE ID: {_show(text)}")
        td, slash, path = text[len("spiffe://") :].partition("/")
        if not slash or not path:
            raise BadInput("name.spiffe_id", f"a SPIFFE ID needs a path: {_show(text)}")
        return cls(TrustDomain(td), tuple(path.split("/")))

    @classmethod
    def workload(cls, trust_domain: TrustDomain, name: str) -> SpiffeId:
        """ID of the workload `name` (``web`` or ``shop/api``). Raises BadInput."""
        return cls(trust_domain, ("wl", *workload_path(name)))

    @classmethod
    def endpoint(cls, trust_domain: TrustDomain, name: str, kind: str = "host") -> SpiffeId:
        """ID of an endpoint: kind is ``host`` or ``sidecar``. Raises BadInput."""
        if kind not in {"host", "sidecar"}:
            raise BadInput("name.endpoint_kind", f"not an endpoint kind: {_show(kind)}")
        return cls(trust_domain, (kind, host_name(name)))


def host_name(text: str) -> str:
    """A host or endpoint name: one DNS-like label path, lower-case. Raises BadInput."""
    if not isinstance(text, str) or not NAME.fullmatch(text) or ".." in text:
        raise BadInput(
            "name.host", f"not a host name: {_show(text)}",
            hint="1-63 characters: lower-case letters, digits, '.', '_' and '-', starting and ending with a letter or digit",
        )  # fmt: skip
    return text


def workload_path(text: str) -> tuple[str, ...]:
    """The segments of a workload name such as ``shop/api``. Raises BadInput."""
    parts = tuple(text.split("/")) if isinstance(text, str) else ()
    if not parts or len(text) > MAX_WORKLOAD_PATH or not all(NAME.fullmatch(p) and ".." not in p for p in parts):
        raise BadInput(
            "name.workload", f"not a workload name: {_show(text)}",
            hint="segments of lower-case letters, digits, '.', '_' and '-', separated by '/', for example shop/api",
        )  # fmt: skip
    return parts


def _show(text: object) -> str:
    """A hostile string made safe for a message: escaped and short."""
    return ascii(text)[:80]
