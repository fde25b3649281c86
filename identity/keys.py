"""Keys: generate, encode, load and store. P-256/P-384 for X.509, Ed25519 for records, X25519 for tunnels.

Private key files are created 0600 with O_EXCL and refused when others can read them.
"""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from identity.errors import BadInput, BadState

PrivateKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey | X25519PrivateKey

X25519_LEN = 32  # RFC 7748 section 5
_P = 2**255 - 19


def b64(data: bytes) -> str:
    """URL-safe base64 without padding (RFC 4648 section 5; the alphabet of JWS)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str, *, length: int | None = None) -> bytes:
    """Inverse of `b64`, strict: no padding, no foreign or non-canonical characters. Raises BadInput."""
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, UnicodeEncodeError, AttributeError):
        raise BadInput("encoding.base64", "not URL-safe base64 without padding") from None
    if b64(data) != text or (length is not None and len(data) != length):
        raise BadInput("encoding.base64", "not canonical URL-safe base64 of the expected length")
    return data


def canonical_x25519(raw: bytes) -> bytes:
    """The one 32-byte form of a tunnel public key: bit 255 clear, value below 2^255-19.

    RFC 7748 section 5 makes implementations ignore bit 255 and reduce the value, so one key has several byte
    strings; uniqueness and blocklists need this form. Raises BadInput for another length or a small-order point.
    """
    if len(raw) != X25519_LEN:
        raise BadInput("key.tunnel", f"a tunnel key has {X25519_LEN} bytes, not {len(raw)}")
    value = (int.from_bytes(raw, "little") & ((1 << 255) - 1)) % _P
    canonical = value.to_bytes(32, "little")
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(canonical))
    except ValueError:
        raise BadInput("key.tunnel", "a small-order point is not a tunnel key") from None
    return canonical


def x25519_public(key: X25519PrivateKey) -> bytes:
    """Raw public key, 32 bytes."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def ed25519_public(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """Raw public key, 32 bytes."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def private_pem(key: PrivateKey) -> bytes:
    """PKCS#8 PEM without encryption; the file mode protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_private(path: Path) -> PrivateKey:
    """Read a private key file. Raises BadState for a missing, readable-by-others, symlinked or damaged file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        raise BadState("state.key", f"cannot read the key {path}: {e.strerror}") from None
    with os.fdopen(fd, "rb") as f:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & 0o077:
            raise BadState("state.key_mode", f"{path} has mode {mode:04o}: others can read it", hint=f"chmod 600 {path}")
        data = f.read(65536)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadState("state.key", f"{path} is not a readable private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | Ed25519PrivateKey | X25519PrivateKey):
        raise BadState("state.key", f"{path} holds a kind of key that is not used here")
    return key


def write_secret(path: Path, data: bytes) -> None:
    """Durably create or replace a 0600 file: O_EXCL temporary, fsync, rename, fsync of the directory."""
    write_file(path, data, 0o600)


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Durably create or replace a file with `mode`; never a moment with half of it in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(fd, "wb") as f:
            os.fchmod(f.fileno(), mode)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
