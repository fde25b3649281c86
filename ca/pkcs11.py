"""Root and intermediate keys in a PKCS#11 token (an HSM, or SoftHSM); record keys, which are Ed25519, stay files.

Keys are made in the token, sensitive and not extractable; their labels are the names of members. The PIN is read from a
0600 file. Needs the extra ``pkcs11``.
"""

from __future__ import annotations

import hashlib
import stat
import threading
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from ca.keyring import NAME, FileKeys, KeyType
from ca.signer import Signer
from identity import certs
from identity.errors import BadInput, BadState, Conflict, Unreachable

try:
    import pkcs11
    from pkcs11.util.ec import encode_named_curve_parameters
except ImportError:
    pkcs11 = None  # type: ignore[assignment]  # an extra that is not installed

_CURVES = {"p256": "secp256r1", "p384": "secp384r1"}


def read_pin(path: Path) -> str:
    """Raises BadState for a missing file, or one that others can read."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise BadState("pkcs11.pin", f"{path} can be read by others", hint=f"chmod 600 {path}")
        return path.read_text().strip()
    except OSError as e:
        raise BadState("pkcs11.pin", f"cannot read the PIN in {path}: {e.strerror}") from None


class TokenKeys:
    """P-256 and P-384 keys in the token named `token`; everything else in `files`."""

    def __init__(self, module: Path, token: str, pin_file: Path, files: FileKeys) -> None:
        if pkcs11 is None:
            raise BadState("pkcs11.missing", "PKCS#11 needs a further package", hint="pip install 'retinue[pkcs11]'")
        self._files = files
        self._lock = threading.Lock()
        try:
            found = pkcs11.lib(str(module)).get_token(token_label=token)
            pin = read_pin(pin_file)
            try:
                self._session: Any = found.open(rw=True, user_pin=pin)
            except pkcs11.exceptions.UserAlreadyLoggedIn:  # a login is of the process, not of the session
                self._session = found.open(rw=True)
        except (pkcs11.exceptions.PKCS11Error, RuntimeError) as e:
            raise BadState(
                "pkcs11.token", f"cannot use the token {token!a} through {module}: {type(e).__name__}",
                hint="look at the module's path, the token's label and the PIN",
            ) from None  # fmt: skip

    def _find(self, name: str, kind: Any) -> Any | None:
        if not NAME.fullmatch(name):
            raise BadInput("key.name", f"not the name of a key: {ascii(name)[:80]}")
        try:
            with self._lock:
                found = list(self._session.get_objects({pkcs11.Attribute.LABEL: name, pkcs11.Attribute.CLASS: kind}))
        except pkcs11.exceptions.PKCS11Error as e:
            raise Unreachable("pkcs11.failed", f"the token does not answer: {type(e).__name__}") from None
        return found[0] if found else None

    def make(self, name: str, kind: KeyType) -> Signer:
        if kind == "ed25519":
            return self._files.make(name, kind)
        if self.has(name):
            raise Conflict("key.exists", f"the token holds a key {name}")
        try:
            with self._lock:
                parameters = self._session.create_domain_parameters(
                    pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters(_CURVES[kind])}, local=True
                )
                hidden = {pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False}
                parameters.generate_keypair(store=True, label=name, private_template=hidden)
        except pkcs11.exceptions.PKCS11Error as e:
            raise Unreachable("pkcs11.failed", f"the token made no key: {type(e).__name__}") from None
        return self.open(name)

    def open(self, name: str) -> Signer:
        private = self._find(name, pkcs11.ObjectClass.PRIVATE_KEY)
        public = self._find(name, pkcs11.ObjectClass.PUBLIC_KEY)
        if private is None or public is None:
            if self._files.has(name):
                return self._files.open(name)
            raise BadState("state.key", f"the token holds no key {name}")
        return TokenSigner(private, _public(public), self._lock)

    def has(self, name: str) -> bool:
        return self._find(name, pkcs11.ObjectClass.PRIVATE_KEY) is not None or self._files.has(name)

    def destroy(self, name: str) -> None:
        for kind in (pkcs11.ObjectClass.PRIVATE_KEY, pkcs11.ObjectClass.PUBLIC_KEY):
            found = self._find(name, kind)
            if found is not None:
                with self._lock:
                    found.destroy()
        self._files.destroy(name)


class TokenSigner:
    """One key of the token."""

    def __init__(self, key: Any, public: ec.EllipticCurvePublicKey, lock: threading.Lock) -> None:
        self._key, self._public, self._lock = key, public, lock

    @property
    def public_key(self) -> certs.PublicKey:
        return self._public

    def sign(self, data: bytes, /) -> bytes:
        digest = hashlib.sha384 if isinstance(self._public.curve, ec.SECP384R1) else hashlib.sha256
        try:
            with self._lock:
                raw = bytes(self._key.sign(digest(data).digest(), mechanism=pkcs11.Mechanism.ECDSA))
        except pkcs11.exceptions.PKCS11Error as e:
            raise Unreachable("pkcs11.failed", f"the token signed nothing: {type(e).__name__}") from None
        half = len(raw) // 2
        return encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))


def _public(handle: Any) -> ec.EllipticCurvePublicKey:
    point = bytes(handle[pkcs11.Attribute.EC_POINT])
    curve: ec.EllipticCurve = ec.SECP384R1() if len(point) > 80 else ec.SECP256R1()
    size = 2 * ((curve.key_size + 7) // 8) + 1
    return ec.EllipticCurvePublicKey.from_encoded_point(curve, point[-size:])  # without the OCTET STRING around it
