"""Support bundles: what may leave a machine for somebody else to read, with every secret taken out of it first.

Two nets. Forms that are secret wherever they stand (keys in PEM, join tokens, signed tokens, passwords in addresses) are
taken out by pattern. Then the machine's own keys are looked for byte by byte in everything, in each notation they could
have been printed in; where one is found nothing is written at all.
"""

from __future__ import annotations

import base64
import io
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from identity.errors import BadState

GONE: Final = "[removed]"
MIN_SECRET: Final = 16  # bytes; shorter ones would be found everywhere

_PATTERNS: Final = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL), GONE),
    (re.compile(r"\brt1\.([A-Za-z0-9_-]{1,64})\.[^\s\"',.]+(?:\.[0-9a-f]{64})?"), rf"rt1.\1.{GONE}"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+"), GONE),
    (re.compile(r"(://[^\s/:@\"']+):[^\s/@\"']+@"), rf"\1:{GONE}@"),
    (re.compile(r"(?i)\b(authorization\s*[:=]\s*(?:bearer|basic)\s+)\S+"), rf"\1{GONE}"),
    # Names that end in one of these words, as JSON, as settings, as WireGuard writes them, and as environment.
    (re.compile(r"(?i)([a-z0-9_-]*(?:private_?key|preshared_?key|passw(?:or)?d|secret|psk|token)[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&}]+)"), rf"\1{GONE}"),
)  # fmt: skip


def secrets_in(data: bytes) -> list[bytes]:
    """The secret bytes of a key file: the key itself, and as the file shows it."""
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        return [line for line in data.splitlines() if len(line) >= MIN_SECRET and b"-----" not in line]
    if isinstance(key, ec.EllipticCurvePrivateKey):
        raw = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
    else:
        raw = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    # Only the characters that are the key's own: the rest of the file is the same for all keys of a kind, or public.
    lines = [line.strip() for line in data.splitlines() if line.strip() and b"-----" not in line]
    at = base64.b64decode(b"".join(lines)).find(raw)
    first, last = -(-at // 3) * 4, (at + len(raw)) // 3 * 4
    found, begin = [raw], 0
    for line in lines:
        found.append(line[max(0, first - begin) : max(0, last - begin)])
        begin += len(line)
    return [one for one in found if len(one) >= MIN_SECRET]


class Redactor:
    """Takes out what is secret by its form, and finds what is secret by its value. `secrets`: at least 16 bytes each."""

    def __init__(self, secrets: Iterable[bytes] = ()) -> None:
        self._values = {form for secret in secrets if len(secret) >= MIN_SECRET for form in _forms(secret)}

    def text(self, said: str) -> str:
        """The text without anything of a secret form."""
        for pattern, instead in _PATTERNS:
            said = pattern.sub(instead, said)
        return said

    def holds(self, data: bytes) -> bool:
        """Is one of the known secrets in these bytes, in any notation?"""
        return any(value in data for value in self._values)


def _forms(secret: bytes) -> set[bytes]:
    out = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    # In the middle of other bytes base64 shows a secret in one of three ways; the characters at its ends differ.
    for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
        for shift in range(3):
            text = encode(bytes(shift) + secret)
            cut = -(-shift * 8 // 6)
            out.add(text.rstrip(b"=")[cut:-1])
    return out


def pack(members: Mapping[str, str], redactor: Redactor, *, now: float) -> bytes:
    """A gzipped tar of redacted texts. Raises BadState ``support.secret`` when a key of this machine is still in one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, said in sorted(members.items()):
            data = redactor.text(said).encode(errors="replace")
            if redactor.holds(data) or redactor.holds(name.encode()):
                where = "the name of a file" if redactor.holds(name.encode()) else name
                raise BadState(
                    "support.secret", f"a secret of this machine stands in {where}: nothing was written",
                    hint="that is a defect: report it without the file; leave a log out by naming others with --log",
                )  # fmt: skip
            entry = tarfile.TarInfo(f"retinue-support/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(now), 0o600
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
