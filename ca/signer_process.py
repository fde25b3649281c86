"""The signer as a process of its own: it holds the keys, has no network, and does a closed set of typed things.

    API process  --unix socket-->  signer process: has, public, make, retire, certificate, record, token

It signs no bytes, it signs certificates, records and JWT-SVIDs: a certificate only when it keeps a profile (ca/signer.py's linter),
below the key asked for, and for an authority only over a key that is itself kept here; a record only of a type that the
key may sign, for this trust domain; a token only for a workload of it, from now on, for minutes. So whoever takes over the API can issue what the API could, but takes no key away and
makes no authority of their own; and every certificate and token is in the signer's own log. One line of JSON each way.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ca.keyring import KEY_TYPES, NAME, FileKeys, Keys
from ca.signer import draft_of
from identity import certs, jwt, records
from identity.certs import Profile
from identity.entries import EntriesRecord
from identity.errors import (
    BadInput,
    BadState,
    Bug,
    NoPrivilege,
    NotVerified,
    Refused,
    RetinueError,
    Unreachable,
)
from identity.keys import b64
from identity.names import TrustDomain
from identity.records import (
    BundleRecord,
    EndpointRecord,
    ForeignBundle,
    Heartbeat,
    Payload,
    PlacementRecord,
    PolicyRecord,
)
from identity.records_policy import AuthorityDocument, PartStatement
from identity.transparency import TreeHead

MAX_LINE: Final = 24 * 1024 * 1024  # a policy of the largest size, in base64
RATE, BURST = 2000.0, 10_000.0  # signatures a second, and at once
_UCRED: Final = struct.Struct("3i")
_TYPES: Final[dict[str, type[Payload]]] = {
    kind.typ: kind
    for kind in (
        BundleRecord, EndpointRecord, EntriesRecord, ForeignBundle, Heartbeat, PlacementRecord, PolicyRecord, TreeHead,
        AuthorityDocument, PartStatement,
    )
}  # fmt: skip
_PROFILES: Final = {
    "host": certs.ENDPOINT, "sidecar": certs.ENDPOINT, "wl": certs.WORKLOAD, "admin": certs.ADMIN,
}  # fmt: skip


class SignerDesk:
    """Judges and does one request. `log` is told of certificates, keys and refusals."""

    def __init__(
        self, keys: Keys, trust_domain: TrustDomain, log: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._keys, self._trust_domain, self.log, self._clock = keys, trust_domain, log, clock
        self._lock = threading.Lock()
        self._level, self._at = BURST, time.monotonic()

    def handle(self, request: dict[str, Any], who: str) -> dict[str, Any]:
        """The answer. Raises RetinueError."""
        acts = {
            "has": self._has, "public": self._public, "make": self._make, "retire": self._retire,
            "certificate": self._certificate, "record": self._record, "token": self._token,
        }  # fmt: skip
        act, name = request.get("op"), request.get("name")
        if act not in acts or not isinstance(name, str) or not NAME.fullmatch(name):
            raise BadInput("signer.request", "not a request that the signer knows")
        with self._lock:
            try:
                return acts[act](name, request, who)
            except RetinueError as e:
                self.log({"op": act, "name": name, "by": who, "refused": e.code})
                raise

    def _take(self) -> None:
        now = time.monotonic()
        self._level = min(BURST, self._level + (now - self._at) * RATE)
        self._at = now
        if self._level < 1:
            raise Unreachable("signer.rate", "the signer is asked for more than it allows", hint="wait a little")
        self._level -= 1

    # ---- keys

    def _has(self, name: str, _request: dict[str, Any], _who: str) -> dict[str, Any]:
        return {"has": self._keys.has(name)}

    def _public(self, name: str, _request: dict[str, Any], _who: str) -> dict[str, Any]:
        return {"public": _b64(certs.spki(self._keys.open(name).public_key))}

    def _make(self, name: str, request: dict[str, Any], who: str) -> dict[str, Any]:
        kind = KEY_TYPES[name.partition("-")[0]]
        if request.get("kind") != kind:
            raise BadInput("signer.request", f"a key of {name} is of type {kind}")
        public = self._keys.make(name, kind).public_key
        self.log({"op": "make", "name": name, "by": who})
        return {"public": _b64(certs.spki(public))}

    def _retire(self, name: str, _request: dict[str, Any], who: str) -> dict[str, Any]:
        if self._keys.has(name):
            self.log({"op": "retire", "name": name, "by": who})
            self._keys.destroy(name)
        return {}

    # ---- certificates

    def _certificate(self, name: str, request: dict[str, Any], who: str) -> dict[str, Any]:
        self._take()
        signer = self._keys.open(name)
        public = signer.public_key
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise Refused("signer.key", f"{name} signs no certificates")
        try:
            tbs = base64.b64decode(str(request.get("tbs")), validate=True)
            draft = x509.load_der_x509_certificate(draft_of(tbs, public))
            text = request.get("issuer")
            issuer = None if text is None else certs.parse_chain(str(text))[0]
        except (ValueError, NotVerified):
            raise BadInput("signer.request", "not a certificate to sign") from None
        if issuer is not None and certs.spki(_key_of(issuer)) != certs.spki(public):
            raise Refused("signer.issuer", f"the issuer given is not over the key of {name}")
        profile = self._profile(name, draft, issuer)
        try:
            certs.lint(draft, profile, issuer=issuer, trust_domain=self._trust_domain)
        except Bug as e:
            raise Refused("signer.profile", e.message) from None
        if draft.tbs_certificate_bytes != tbs:
            raise Refused("signer.profile", "the certificate is not in its one encoding")
        named = certs.revocation_id(draft)
        self.log({"op": "certificate", "name": name, "by": who, "profile": profile.name, "serial": f"{named.serial:x}",
                   "spki": named.spki, "names": _names(draft), "not_after": certs.not_after(draft)})  # fmt: skip
        return {"signature": _b64(signer.sign(tbs))}

    def _profile(self, name: str, draft: x509.Certificate, issuer: x509.Certificate | None) -> Profile:
        """Which kind of certificate is this; may this key sign it? Raises Refused."""
        kind = name.partition("-")[0]
        try:
            basic = draft.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound:
            raise Refused("signer.profile", "a certificate without basic constraints") from None
        if basic.ca:
            if kind != "root":
                raise Refused("signer.profile", f"{name} makes no authorities")
            mine = [n for n in ("root", "intermediate") if self._holds(n, draft)]
            if issuer is None and "root" in mine:
                return certs.ROOT
            if basic.path_length == 0 and mine:
                return certs.LINK if "root" in mine else certs.INTERMEDIATE
            raise Refused("signer.foreign", "an authority over a key that is not kept here")
        if kind != "intermediate":
            raise Refused("signer.profile", f"{name} signs authorities only")
        claimed = certs.claimed_id(draft)
        if claimed.kind == "cp":
            if claimed.segments == certs.SERVER_NAME:
                return certs.SERVER
            if len(claimed.segments) == 2 and self._holds(claimed.segments[1], draft):
                return certs.SIGNER
            raise Refused("signer.foreign", "a record key that is not kept here")
        if claimed.kind not in _PROFILES:
            raise Refused("signer.profile", f"{claimed} is a name of no profile")
        return _PROFILES[claimed.kind]

    def _holds(self, kind: str, draft: x509.Certificate) -> bool:
        """Is the draft's key one of ours, of this kind?"""
        wanted, number = certs.spki(_key_of(draft)), 1
        missing = 0
        while missing < 16:  # names are given in order; some may be gone
            name = kind if number == 1 else f"{kind}-{number}"
            if NAME.fullmatch(name) and self._keys.has(name):
                missing = 0
                if certs.spki(self._keys.open(name).public_key) == wanted:
                    return True
            else:
                missing += 1
            number += 1
        return False

    # ---- records

    def _record(self, name: str, request: dict[str, Any], _who: str) -> dict[str, Any]:
        self._take()
        signer, text = self._keys.open(name), request.get("text")
        if not isinstance(signer.public_key, Ed25519PublicKey) or not isinstance(text, str):
            raise Refused("signer.key", f"{name} signs no records")
        header, dot, _ = text.partition(".")
        kind = next((k for typ, k in _TYPES.items() if header == b64(records.header(typ))), None)
        if kind is None or not dot:
            raise Refused("signer.record", "not a record of a known type")
        role = "records" if kind.role == "records" else "policy"
        if name.partition("-")[0] != role:
            raise Refused("signer.record", f"{name} signs no {kind.typ} records")
        # The signature is yet to be made; what is read is what will be signed.
        records.unverified(kind, f"{text}.", trust_domain=self._trust_domain.name)
        return {"signature": _b64(signer.sign(text.encode("ascii")))}


    # ---- tokens

    def _token(self, name: str, request: dict[str, Any], who: str) -> dict[str, Any]:
        self._take()
        kind, _, kid = name.partition("-")
        if kind != "jwt":
            raise Refused("signer.key", f"{name} signs no tokens")
        signer, text = self._keys.open(name), request.get("text")
        if not isinstance(text, str):
            raise Refused("signer.token", "there is no text to sign")
        try:
            subject = jwt.unsigned(text, kid=kid, trust_domain=self._trust_domain, now=self._clock())
        except NotVerified as e:
            raise Refused("signer.token", e.message) from None
        self.log({"op": "token", "name": name, "by": who, "subject": str(subject)})
        return {"signature": _b64(signer.sign(text.encode("ascii")))}


def _names(draft: x509.Certificate) -> list[str]:
    found = draft.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return found.get_values_for_type(x509.UniformResourceIdentifier)


def _key_of(cert: x509.Certificate) -> certs.PublicKey:
    key = cert.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey):
        raise Refused("signer.key", "a kind of key that is not used here")
    return key


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ---- the process


class RetiringKeys(FileKeys):
    """Keys that are given up are moved aside: the process that asks is not to be able to destroy the authority."""

    def destroy(self, name: str) -> None:
        path = self._path(name)
        if path.exists():
            os.rename(path, path.with_name(f"retired-{int(time.time())}-{os.urandom(2).hex()}-{path.name}"))


class SignerServer(socketserver.ThreadingUnixStreamServer):
    """Listens on a socket file; `uids` may ask."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: Path, desk: SignerDesk, uids: frozenset[int]) -> None:
        self.desk, self.uids = desk, uids
        path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            super().__init__(str(path), _Connection)
        finally:
            os.umask(old)
        # Anybody may connect; the kernel's word on who it is decides.
        os.chmod(path, 0o666)  # noqa: S103 -- the peer's credentials are the lock, not the mode


class _Connection(socketserver.StreamRequestHandler):
    server: SignerServer

    def handle(self) -> None:
        pid, uid, _ = _UCRED.unpack(self.request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        who = f"uid {uid} pid {pid}"
        if uid not in self.server.uids:
            # What was asked is taken from the socket first: closing over unread bytes would also throw away the answer.
            self.request.settimeout(1.0)
            with contextlib.suppress(OSError):
                self.rfile.readline(65536)
            self.server.desk.log({"op": "connect", "by": who, "refused": "signer.user"})
            self._say(NoPrivilege("signer.user", f"user id {uid} may not ask the signer"))
            return
        while line := self.rfile.readline(MAX_LINE + 1):
            try:
                if len(line) > MAX_LINE:
                    raise BadInput("signer.request", "the request is too large")
                request = json.loads(line)
                if not isinstance(request, dict):
                    raise BadInput("signer.request", "not a request")
                answer: dict[str, Any] = self.server.desk.handle(request, who)
            except RetinueError as e:
                self._say(e)
                continue
            except (ValueError, RecursionError):
                self._say(BadInput("signer.request", "not JSON"))
                return
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _say(self, error: RetinueError) -> None:
        self.wfile.write(json.dumps({"http": error.http, "error": error.as_dict()}).encode() + b"\n")


def serve(directory: Path, path: Path, trust_domain: TrustDomain, uids: frozenset[int], keys: Keys | None = None) -> SignerServer:
    """A server that is listening; `serve_forever` runs it. Raises BadState for an unusable directory or socket."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if directory.stat().st_mode & 0o077:
            raise BadState("signer.mode", f"{directory} can be used by others", hint=f"chmod 700 {directory}")
        fd = os.open(directory / "signer.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise BadState("signer.dir", f"cannot use {directory}: {e.strerror}") from None

    def log(about: dict[str, Any]) -> None:
        # Before the signature: what cannot be logged is not signed.
        os.write(fd, json.dumps({"at": round(time.time(), 3), **about}).encode() + b"\n")

    try:
        return SignerServer(path, SignerDesk(keys or RetiringKeys(directory), trust_domain, log), uids)
    except OSError as e:
        os.close(fd)
        raise BadState("signer.socket", f"cannot listen on {path}: {e.strerror}") from None

