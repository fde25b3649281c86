"""The WireGuard userspace API (https://www.wireguard.com/xplatform/): texts (pure) and the socket client.

A request is ``set=1`` or ``get=1``, `key=value` lines, an empty line; the answer ends with ``errno=N`` and an empty
line. Keys travel in hex. Our one extension, ``retinue_cipher``, is sent only to our own engine.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final

from identity.errors import BadInput, BadState, Bug, Conflict, RetinueError, TimedOut, Unreachable
from identity.keys import b64, unb64
from mesh.devices import DeviceState, PeerChange, PeerState
from mesh.plan import AES, CHACHA, Cipher

CIPHER_KEY: Final = "retinue_cipher"
TIMEOUT: Final = 15.0  # seconds for one request
_LIMIT: Final = 256 * 1024 * 1024  # bytes of an answer; 10,000 peers with 50 addresses each are 30 MB


def key_hex(tunnel_key: str) -> str:
    """Hex of a b64 key as the records have it. Raises BadInput."""
    return unb64(tunnel_key, length=32).hex()


def set_request(
    changes: Iterable[PeerChange] = (), *, private_key: bytes | None = None, listen_port: int | None = None,
    fwmark: int | None = None, ciphers: bool = False,
) -> str:  # fmt: skip
    """One ``set`` operation. `ciphers`: may the extension key be used? The text holds the private key when given."""
    lines = ["set=1"]
    if private_key is not None:
        if len(private_key) != 32:
            raise BadInput("device.key", "a tunnel key has 32 bytes")
        lines.append(f"private_key={private_key.hex()}")
    if listen_port is not None:
        lines.append(f"listen_port={listen_port}")
    if fwmark is not None:
        lines.append(f"fwmark={fwmark}")
    for change in changes:
        lines += _peer_lines(change, ciphers=ciphers)
    return "\n".join(lines) + "\n\n"


def _peer_lines(change: PeerChange, *, ciphers: bool) -> list[str]:
    lines = [f"public_key={key_hex(change.tunnel_key)}"]
    if change.remove:
        return [*lines, "remove=true"]
    if not change.create:
        lines.append("update_only=true")
    if ciphers and change.cipher is not None:
        lines.append(f"{CIPHER_KEY}={change.cipher}")
    if change.underlay is not None:
        lines.append(f"endpoint={change.underlay}")
    if change.keepalive is not None:
        lines.append(f"persistent_keepalive_interval={change.keepalive}")
    if change.replace:
        lines.append("replace_allowed_ips=true")
    lines += [f"allowed_ip={prefix}" for prefix in change.allowed_ips or ()]
    return lines


def parse_answer(text: str) -> DeviceState:
    """Parse a ``get`` reply. Unknown keys are skipped, as the protocol asks. Raises BadState for what is no reply."""
    device: dict[str, str] = {}
    peers: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] | None = None
    for line in text.splitlines():
        if not line:
            break
        key, eq, value = line.partition("=")
        if not eq:
            raise BadState("device.answer", f"the engine sent a line that is no key=value: {ascii(line)[:60]}")
        if key == "errno":
            if value != "0":
                raise _failed(value)
        elif key == "public_key":
            current = peers.setdefault(_b64_of(value), [])
        elif current is None:
            device[key] = value
        else:
            current.append((key, value))
    private = device.get("private_key")
    return DeviceState(
        public_key=_public_of(private),
        listen_port=_number(device.get("listen_port", "0")),
        fwmark=_number(device.get("fwmark", "0")),
        peers={key: _peer(lines) for key, lines in peers.items()},
    )


def _peer(lines: list[tuple[str, str]]) -> PeerState:
    allowed: set[str] = set()
    fields: dict[str, str] = {}
    for key, value in lines:
        if key == "allowed_ip":
            allowed.add(value)
        else:
            fields[key] = value
    cipher: Cipher = AES if fields.get(CIPHER_KEY) == AES else CHACHA
    return PeerState(
        underlay=_endpoint(fields.get("endpoint")),
        allowed_ips=frozenset(allowed),
        keepalive=_number(fields.get("persistent_keepalive_interval", "0")),
        cipher=cipher,
        latest_handshake=_number(fields.get("last_handshake_time_sec", "0")) or None,
        rx_bytes=_number(fields.get("rx_bytes", "0")),
        tx_bytes=_number(fields.get("tx_bytes", "0")),
    )


def _endpoint(text: str | None) -> str | None:
    """Canonical ``address:port``, IPv6 in brackets and without zone."""
    if not text:
        return None
    host, _, port = text.rpartition(":")
    try:
        parsed = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    if isinstance(parsed, IPv6Address):
        return f"[{parsed}]:{port}"
    return f"{parsed}:{port}"


def _b64_of(hex_text: str) -> str:
    try:
        raw = bytes.fromhex(hex_text)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise BadState("device.answer", "the engine sent a malformed public key")
    return b64(raw)


def _public_of(private_hex: str | None) -> str | None:
    """The public key of the device; the private half the reply carries is used for nothing else."""
    if private_hex is None or len(private_hex) != 64 or not private_hex.strip("0"):
        return None
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from identity.keys import x25519_public

    try:
        return b64(x25519_public(X25519PrivateKey.from_private_bytes(bytes.fromhex(private_hex))))
    except ValueError:
        raise BadState("device.answer", "the engine sent a malformed key") from None


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise BadState("device.answer", f"the engine sent {ascii(text)[:30]} for a number") from None


def _failed(value: str) -> RetinueError:
    number = abs(_number(value))
    if number == errno.EADDRINUSE:
        return Conflict("device.port_taken", "the tunnel's UDP port is in use by another program",
                        hint="stop that program, or choose another port with --listen-port")  # fmt: skip
    return Bug("device.refused", f"the engine refused the change: {errno.errorcode.get(number, number)} ({os.strerror(number)})")


async def request(path: Path, text: str) -> str:
    """One request over the socket `path`. Raises Unreachable (no engine), TimedOut."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=_LIMIT)
            writer.write(text.encode())
            await writer.drain()
            # get answers hold the device and its peers; both kinds end with an empty line
            answer = await reader.readuntil(b"\n\n")
    except TimeoutError:
        raise TimedOut("device.slow", f"the engine did not answer within {TIMEOUT:.0f} s") from None
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as e:
        raise Unreachable("device.gone", f"no engine answers on {path} ({type(e).__name__})") from None
    finally:
        if writer is not None:
            writer.close()
    return answer.decode("ascii", errors="replace")


async def get(path: Path) -> DeviceState:
    """Read a device. Raises Unreachable, TimedOut, BadState."""
    return parse_answer(await request(path, "get=1\n\n"))


async def apply(path: Path, text: str) -> None:
    """Send a ``set``. Raises Bug (refused), Unreachable, TimedOut."""
    answer = await request(path, text)
    for line in answer.splitlines():
        key, _, value = line.partition("=")
        if key == "errno" and value != "0":
            raise _failed(value)
