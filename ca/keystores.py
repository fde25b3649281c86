"""Where the keys of a control plane's directory are: key files there, a signer process, or a PKCS#11 token.

keys.json says which; without it they are files. No key and no PIN is in it.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
from pathlib import Path
from typing import Any, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pydantic import BaseModel, ConfigDict, ValidationError

from ca.keyring import FileKeys, Keys, KeyType
from ca.signer import Signer
from identity import certs
from identity.errors import BadInput, BadState, Bug, Unreachable, from_wire
from identity.keys import write_file

FILE: Final = "keys.json"
TIMEOUT_S: Final = 20.0


class KeyPlace(BaseModel):
    """keys.json. socket: of the signer process; module: path of the PKCS#11 library; token: its label; pin_file: path."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    backend: Literal["files", "signer", "pkcs11"] = "files"
    socket: str = ""
    module: str = ""
    token: str = ""
    pin_file: str = ""


def open_keys(directory: Path) -> Keys:
    """The keys of a directory. Raises BadState ``ca.keys``."""
    path = directory / FILE
    try:
        place = KeyPlace.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return FileKeys(directory)
    except (OSError, ValidationError):
        raise BadState("ca.keys", f"{path} cannot be read") from None
    return keys_of(place, directory)


def writable(directory: Path) -> tuple[Path, ...]:
    """Where a server with these keys has to write; empty when that is not known: a PKCS#11 library's own files."""
    try:
        token = KeyPlace.model_validate_json((directory / FILE).read_bytes()).backend == "pkcs11"
    except (OSError, ValidationError):
        token = False
    return () if token else (directory,)


def keys_of(place: KeyPlace, directory: Path) -> Keys:
    """The keys at a place; Ed25519 keys beside a token stay files in `directory`."""
    if place.backend == "signer":
        return SignerClient(Path(place.socket))
    if place.backend == "pkcs11":
        from ca.pkcs11 import TokenKeys

        return TokenKeys(Path(place.module), place.token, Path(place.pin_file), FileKeys(directory))
    return FileKeys(directory)


def key_place(signer: Path | None, pkcs11: Path | None, token: str, pin_file: Path | None) -> KeyPlace | None:
    """What the command line asks for; None for key files. Raises BadInput ``ca.keys``."""
    if signer is not None and pkcs11 is not None:
        raise BadInput("ca.keys", "keys are in one place", hint="give --signer or --pkcs11; the signer may use a token itself")
    if signer is not None:
        return KeyPlace(backend="signer", socket=str(signer.absolute()))
    if pkcs11 is not None:
        if pin_file is None:
            raise BadInput("ca.keys", "a token needs its PIN", hint="give --pin-file FILE")
        return KeyPlace(backend="pkcs11", module=str(pkcs11), token=token, pin_file=str(pin_file.absolute()))
    return None


def write_place(directory: Path, place: KeyPlace) -> None:
    write_file(directory / FILE, place.model_dump_json(indent=1).encode(), 0o600)


class SignerClient:
    """Keys in a signer process (ca/signer_process.py). One connection, made anew when it breaks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reader: Any = None

    def __repr__(self) -> str:
        return f"SignerClient({self._path})"

    def ask(self, op: str, name: str, **more: Any) -> dict[str, Any]:
        """One request. Raises Unreachable ``signer.down``, and what the signer answered."""
        line = json.dumps({"op": op, "name": name, **more}).encode() + b"\n"
        with self._lock:
            for attempt in (0, 1):
                try:
                    answer = self._exchange(line)
                    break
                except (OSError, ValueError):
                    self._close()
                    # Asking again is harmless: a signature that nobody got is no certificate.
                    if attempt or op == "make":
                        raise Unreachable(
                            "signer.down", f"no signer answers on {self._path}",
                            hint=f"start it: retinue-ca signer --socket {self._path}",
                        ) from None  # fmt: skip
        if "error" in answer:
            raise from_wire(int(answer.get("http", 500)), answer["error"])
        return answer

    def _exchange(self, line: bytes) -> dict[str, Any]:
        if self._socket is None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            made.settimeout(TIMEOUT_S)
            try:
                made.connect(str(self._path))
            except OSError:
                made.close()
                raise
            self._socket, self._reader = made, made.makefile("rb")
        self._socket.sendall(line)
        answer = json.loads(self._reader.readline() or b"null")
        if not isinstance(answer, dict):
            raise OSError("closed")
        return answer

    def _close(self) -> None:
        if self._socket is not None:
            self._reader.close()
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._close()

    # ---- as keys

    def make(self, name: str, kind: KeyType) -> Signer:
        return RemoteSigner(self, name, _public(self.ask("make", name, kind=kind)))

    def open(self, name: str) -> Signer:
        return RemoteSigner(self, name, _public(self.ask("public", name)))

    def has(self, name: str) -> bool:
        return bool(self.ask("has", name)["has"])

    def destroy(self, name: str) -> None:
        self.ask("retire", name)


class RemoteSigner:
    """One key of a signer process."""

    def __init__(self, client: SignerClient, name: str, public: certs.PublicKey) -> None:
        self._client, self._name, self._key = client, name, public

    @property
    def public_key(self) -> certs.PublicKey:
        return self._key

    def sign(self, data: bytes, /) -> bytes:
        """A record's signature, or with a JWT key a token's: `data` is its header and payload."""
        if self._name.startswith("jwt-"):
            return _signature(self._client.ask("token", self._name, text=data.decode("ascii")))
        if not isinstance(self._key, Ed25519PublicKey):
            raise Bug("signer.bytes", "the signer signs certificates and records, not bytes")
        return _signature(self._client.ask("record", self._name, text=data.decode("ascii")))

    def sign_certificate(self, tbs: bytes, issuer: x509.Certificate | None) -> bytes:
        text = None if issuer is None else certs.pem(issuer)
        return _signature(self._client.ask("certificate", self._name, tbs=base64.b64encode(tbs).decode(), issuer=text))


def _public(answer: dict[str, Any]) -> certs.PublicKey:
    key = load_der_public_key(base64.b64decode(str(answer["public"])))
    if not isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey):
        raise BadState("ca.key", "the signer has a kind of key that is not used here")
    return key


def _signature(answer: dict[str, Any]) -> bytes:
    return base64.b64decode(str(answer["signature"]))
