"""The messages of the SPIFFE Workload API in the protobuf wire format, as much of it as the API needs.

Field names and numbers are the standard's (SPIFFE Workload API, sections 5 and 6). A server writes a few small messages
and reads three, so this is less to trust than a protobuf runtime; the tests compare it with that runtime.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from grpclib.encoding.base import CodecBase

from identity.errors import BadInput

MAX_REQUEST: Final = 64 * 1024  # bytes of one request message

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED: Final = {_FIXED64: 8, _FIXED32: 4}


class Encodable(Protocol):
    """A message that a server sends."""

    def encode(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Empty:
    """X509SVIDRequest and X509BundlesRequest: no fields are defined, unknown ones are skipped."""

    @classmethod
    def decode(cls, data: bytes) -> Empty:
        """Raises BadInput ``proto.malformed`` when it is not a message at all."""
        for _ in fields(data):
            pass
        return cls()


@dataclass(frozen=True, slots=True)
class X509Svid:
    """svid: DER certificates one after the other, leaf first; key: PKCS#8 DER; bundle: DER roots one after the other."""

    spiffe_id: str
    svid: bytes
    key: bytes = field(repr=False)
    bundle: bytes
    hint: str = ""

    def encode(self) -> bytes:
        """Wire form of X509SVID."""
        return b"".join((
            _text(1, self.spiffe_id), _bytes(2, self.svid), _bytes(3, self.key), _bytes(4, self.bundle), _text(5, self.hint),
        ))  # fmt: skip


@dataclass(frozen=True, slots=True)
class X509SvidResponse:
    """Everything a caller has, each time; federated: trust domain's SPIFFE ID -> DER roots."""

    svids: tuple[X509Svid, ...]
    crl: tuple[bytes, ...] = ()
    federated: Mapping[str, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Wire form of X509SVIDResponse."""
        return b"".join((
            *(_field(1, svid.encode()) for svid in self.svids), *(_field(2, crl) for crl in self.crl), *_map(3, self.federated),
        ))  # fmt: skip


@dataclass(frozen=True, slots=True)
class X509BundlesResponse:
    """bundles: trust domain's SPIFFE ID -> DER roots one after the other."""

    bundles: Mapping[str, bytes]
    crl: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """Wire form of X509BundlesResponse."""
        return b"".join((*(_field(1, crl) for crl in self.crl), *_map(2, self.bundles)))


@dataclass(frozen=True, slots=True)
class JwtSvidRequest:
    """Tokens for these audiences; spiffe_id: of this identity only, empty for all."""

    audience: tuple[str, ...]
    spiffe_id: str = ""

    @classmethod
    def decode(cls, data: bytes) -> JwtSvidRequest:
        """Raises BadInput ``proto.malformed``."""
        audience, spiffe_id = [], ""
        for number, kind, value in fields(data):
            if number == 1:
                audience.append(_as_text(kind, value))
            elif number == 2:
                spiffe_id = _as_text(kind, value)
        return cls(tuple(audience), spiffe_id)


@dataclass(frozen=True, slots=True)
class ValidateJwtSvidRequest:
    """Is this token good for this audience?"""

    audience: str
    svid: str = field(repr=False)

    @classmethod
    def decode(cls, data: bytes) -> ValidateJwtSvidRequest:
        """Raises BadInput ``proto.malformed``."""
        said = {1: "", 2: ""}
        for number, kind, value in fields(data):
            if number in said:
                said[number] = _as_text(kind, value)
        return cls(said[1], said[2])


@dataclass(frozen=True, slots=True)
class JwtSvid:
    """One token."""

    spiffe_id: str
    svid: str = field(repr=False)
    hint: str = ""

    def encode(self) -> bytes:
        """Wire form of JWTSVID."""
        return b"".join((_text(1, self.spiffe_id), _text(2, self.svid), _text(3, self.hint)))


@dataclass(frozen=True, slots=True)
class JwtSvidResponse:
    """Tokens of a caller, the default identity first."""

    svids: tuple[JwtSvid, ...]

    def encode(self) -> bytes:
        """Wire form of JWTSVIDResponse."""
        return b"".join(_field(1, svid.encode()) for svid in self.svids)


@dataclass(frozen=True, slots=True)
class JwtBundlesResponse:
    """bundles: trust domain's SPIFFE ID -> JWK Set."""

    bundles: Mapping[str, bytes]

    def encode(self) -> bytes:
        """Wire form of JWTBundlesResponse."""
        return b"".join(_map(1, self.bundles))


@dataclass(frozen=True, slots=True)
class ValidateJwtSvidResponse:
    """What a token that holds says."""

    spiffe_id: str
    claims: Mapping[str, Any]

    def encode(self) -> bytes:
        """Wire form of ValidateJWTSVIDResponse."""
        return _text(1, self.spiffe_id) + _field(2, _struct(self.claims))


class Codec(CodecBase):
    """What grpclib turns messages into bytes with. Requests stay bytes here: who reads them says what is wrong with them."""

    @property
    def __content_subtype__(self) -> str:
        return "proto"

    def encode(self, message: Encodable, _type: Any) -> bytes:
        return message.encode()

    def decode(self, data: bytes, _type: Any) -> bytes:
        return bytes(data)


# ---- the wire format (protobuf encoding)


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(number, wire type, value) of each field of a message. Raises BadInput ``proto.malformed``."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if not 1 <= number <= 0x1FFF_FFFF:
            raise _malformed()
        if kind == _VARINT:
            value, at = _read_varint(data, at)
        elif kind == _BYTES or kind in _FIXED:
            size, at = _read_varint(data, at) if kind == _BYTES else (_FIXED[kind], at)
            value = data[at : at + size]
            if len(value) != size:
                raise _malformed()
            at += size
        else:  # groups are gone from the format since proto3
            raise _malformed()
        yield number, kind, value


def _as_text(kind: int, value: int | bytes) -> str:
    if kind != _BYTES or not isinstance(value, bytes):
        raise _malformed()
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _malformed() from None


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise _malformed()


def _malformed() -> BadInput:
    return BadInput("proto.malformed", "the request is not a protobuf message")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _bytes(number: int, data: bytes) -> bytes:
    return _field(number, data) if data else b""


def _text(number: int, text: str) -> bytes:
    return _bytes(number, text.encode())


def _struct(entries: Mapping[str, Any]) -> bytes:
    """google.protobuf.Struct: map<string, Value> fields = 1."""
    return b"".join(_field(1, _text(1, str(key)) + _field(2, _value(value))) for key, value in entries.items())


def _value(value: Any) -> bytes:
    """google.protobuf.Value of a JSON value."""
    match value:
        case None:
            return _varint(1 << 3 | _VARINT) + b"\0"
        case bool():
            return _varint(4 << 3 | _VARINT) + bytes([value])
        case int() | float():
            return _varint(2 << 3 | _FIXED64) + struct.pack("<d", value)
        case str():
            return _field(3, value.encode("utf-8", "replace"))
        case Mapping():
            return _field(5, _struct(value))
        case _:
            return _field(6, b"".join(_field(1, _value(one)) for one in value))


def _map(number: int, entries: Mapping[str, bytes]) -> Iterator[bytes]:
    return (_field(number, _text(1, key) + _bytes(2, entries[key])) for key in sorted(entries))
