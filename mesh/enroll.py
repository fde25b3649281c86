"""Joining a trust domain and staying in it: enrolment, renewal, and the directory that keeps both.

Files, all 0600 in a 0700 directory: endpoint.json (names, CA address, root fingerprint, sealed by the enrolment key),
tls.key, chain.pem, tunnel.key, enroll.key, bundle, record. They change together: a complete new set is written to a
directory of its own, renamed to ``.next``, and then moved into place; whoever opens the directory after a crash finishes
the move. Until that rename nothing has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field

from identity import certs
from identity.bundle import TrustBundle, open_bundle
from identity.enrollment import JoinToken, Offer, Proofs, prove
from identity.errors import BadInput, BadState, Conflict, NoPrivilege, NotVerified, TimedOut, Unreachable
from identity.keys import b64, ed25519_public, load_private, private_pem, unb64, write_secret, x25519_public
from identity.names import SpiffeId, TrustDomain
from identity.records import EndpointRecord
from identity.wire import parse
from identity.wire.enroll import (
    Challenge,
    ChallengeRequest,
    Cipher,
    EnrollReply,
    EnrollRequest,
    RenewReply,
    RenewRequest,
)
from mesh import policy_trust
from mesh.control import ClientFiles, ControlClient, RootPin, check_url
from mesh.device_join import Device
from mesh.state import check_dir, read_owned

STATE_VERSION: Final = 1
FILES: Final = ("tls.key", "chain.pem", "tunnel.key", "enroll.key", "bundle", "record", "endpoint.json")
KEY_FILES: Final = ("tls.key", "tunnel.key", "enroll.key")
MAX_UNDERLAY: Final = 16
_AGAIN: Final = "enrol again with a new token and --replace"
_SEAL: Final = b"retinue endpoint.json v1\0"

Clock = Callable[[], float]


class EndpointFile(BaseModel):
    """endpoint.json. `verified_at`: when everything beside it was last verified together (seconds since the epoch)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    version: Literal[1] = STATE_VERSION
    ca_url: str = Field(max_length=512)
    root_fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    trust_domain: str
    endpoint: str
    kind: Literal["host", "sidecar"]
    workload: str | None = None
    verified_at: int
    seal: str = ""

    def sealed_bytes(self) -> bytes:
        return _SEAL + self.model_dump_json(exclude={"seal"}).encode()


@dataclass(frozen=True, slots=True)
class Enrollment:
    """A complete enrolment, every part of it verified against the others. Keys are not in the repr."""

    directory: Path
    ca_url: str
    root_fingerprint: str
    trust_domain: TrustDomain
    endpoint: str
    kind: Literal["host", "sidecar"]
    workload: str | None
    svid: certs.Svid = field(repr=False)
    bundle: TrustBundle = field(repr=False)
    record: EndpointRecord
    record_envelope: str = field(repr=False)
    tunnel_key: X25519PrivateKey = field(repr=False)
    enroll_key: Ed25519PrivateKey = field(repr=False)
    verified_at: int

    @property
    def spiffe_id(self) -> SpiffeId:
        return SpiffeId.endpoint(self.trust_domain, self.endpoint, self.kind)

    @property
    def files(self) -> ClientFiles:
        """Chain and key for TLS."""
        return ClientFiles(self.directory / "chain.pem", self.directory / "tls.key")

    @property
    def tunnel_public(self) -> str:
        """The tunnel's public key as in records, b64; the record was verified to hold that of `tunnel_key`."""
        return self.record.tunnel_key

    def client(self, bundle: TrustBundle | None = None, *, clock: Clock = time.time) -> ControlClient:
        """A control-plane client with this identity; `bundle` is the newest known trust (default: the one stored)."""
        return ControlClient(self.ca_url, bundle or self.bundle, self.files, clock=clock)


# -- joining ----------------------------------------------------------------------------------------------------------


async def enroll(
    ca_url: str, token_text: str, state_dir: Path, underlay: Sequence[str], ciphers: Sequence[Cipher],
    *, replace: bool = False, clock: Clock = time.time, policy_authority: str | None = None,
    device: Device | None = None,
) -> Enrollment:  # fmt: skip
    """Join with a token: make all keys here, prove them, verify everything that comes back, store it as one.

    underlay: ``address:port`` hints where peers may reach this endpoint; ciphers: what its engine offers.
    A reply lost on the way is fetched again by running this once more with the same token within five minutes: the
    keys of the attempt are kept until it succeeded.
    device: a certificate of somebody else's as the evidence instead; the text is then a `device_pin`.
    policy_authority: fingerprint that the CA's policy authority must have (default: the one it shows is pinned).
    Raises BadInput ``token.malformed``, ``ca.url``, ``underlay.form``; Conflict ``enroll.exists``, ``enroll.running``;
    NotVerified ``ca.fingerprint`` and ``cert.*`` before anything secret was sent; what the CA answered; BadState.
    """
    token, url, hints = JoinToken.parse(token_text), check_url(ca_url), check_underlay(underlay)
    _make_dir(state_dir)
    with _sole(state_dir):
        with _locked(state_dir):
            finish(state_dir)
        if (state_dir / "endpoint.json").exists() and not replace:
            raise Conflict("enroll.exists", f"{state_dir} already holds an enrolment", hint="use --replace to give it up")
        keys = _pending_keys(state_dir, token)
        async with ControlClient(url, RootPin(token.root_fingerprint), clock=clock) as client:
            reply = await _ask(client, token, keys, hints, ciphers, device)
            trust_domain = client.server.spiffe_id.trust_domain
        files = _accept(reply, keys, url, token, trust_domain, int(clock()))
        _pin_authority(state_dir, trust_domain, reply.authority, policy_authority)
        _commit(state_dir, files)
        shutil.rmtree(state_dir / ".pending", ignore_errors=True)
    return load_enrollment(state_dir)


def _pin_authority(state_dir: Path, trust_domain: TrustDomain, chain: Sequence[str], fingerprint: str | None) -> None:
    """Who may sign policy, from now on. What this machine knew of the same trust domain is never given up for less."""
    try:
        known = policy_trust.load(state_dir, trust_domain.name)
    except BadState:
        if fingerprint is None:
            raise
        known = None  # of another trust domain, or damaged: the operator names what is right
    policy_trust.save(state_dir, policy_trust.pin(trust_domain.name, chain, fingerprint, known))


@dataclass(frozen=True, slots=True)
class _Keys:
    tls: ec.EllipticCurvePrivateKey
    tunnel: X25519PrivateKey
    enroll: Ed25519PrivateKey


async def _ask(
    client: ControlClient, token: JoinToken, keys: _Keys, underlay: Sequence[str], ciphers: Sequence[Cipher],
    device: Device | None,
) -> EnrollReply:  # fmt: skip
    try:
        return await _attempt(client, token, keys, underlay, ciphers, device)
    except (Unreachable, TimedOut) as e:
        if e.code not in {"ca.disconnected", "ca.timeout"}:
            raise
        # The reply may be what was lost; the CA repeats it to the same keys.
        return await _attempt(client, token, keys, underlay, ciphers, device)


async def _attempt(
    client: ControlClient, token: JoinToken, keys: _Keys, underlay: Sequence[str], ciphers: Sequence[Cipher],
    device: Device | None,
) -> EnrollReply:  # fmt: skip
    challenge = await client.post("/v1/enroll/challenge", ChallengeRequest(token_id=token.id), Challenge)
    offer = Offer(
        token_id=token.id, nonce=unb64(challenge.nonce), server_leaf=client.server_leaf,
        server_key=unb64(challenge.server_key, length=32), csr=certs.make_csr(keys.tls),
        tunnel_key=x25519_public(keys.tunnel), enroll_key=ed25519_public(keys.enroll),
        underlay=tuple(underlay), ciphers=tuple(ciphers),
    )  # fmt: skip
    request = _request(offer, prove(offer, token, keys.tunnel, keys.enroll))
    return await client.post("/v1/enroll", request if device is None else device.onto(request, offer), EnrollReply)


def _request(offer: Offer, proofs: Proofs) -> EnrollRequest:
    return EnrollRequest.model_validate({
        "token_id": offer.token_id, "nonce": b64(offer.nonce), "csr": offer.csr,
        "tunnel_key": b64(offer.tunnel_key), "enroll_key": b64(offer.enroll_key),
        "token_proof": b64(proofs.token), "tunnel_proof": b64(proofs.tunnel), "enroll_proof": b64(proofs.enroll),
        "underlay": list(offer.underlay), "ciphers": list(offer.ciphers),
    })  # fmt: skip


def _accept(
    reply: EnrollReply, keys: _Keys, url: str, token: JoinToken, trust_domain: TrustDomain, now: int
) -> dict[str, bytes]:
    """Verify every part of a reply and make the files. Raises NotVerified."""
    if reply.trust_domain != trust_domain.name:
        raise NotVerified("enroll.reply", "the CA answered for another trust domain than its certificate names")
    bundle = open_bundle(reply.bundle, token.root_fingerprint, trust_domain, now)
    name = SpiffeId.endpoint(trust_domain, reply.endpoint, reply.kind)
    _accept_identity(bundle, reply.chain, reply.record, keys.tls, keys.tunnel, name, now)
    about = EndpointFile(
        ca_url=url, root_fingerprint=token.root_fingerprint, trust_domain=trust_domain.name, endpoint=reply.endpoint,
        kind=reply.kind, workload=reply.workload, verified_at=now,
    )  # fmt: skip
    return {
        "tls.key": private_pem(keys.tls), "chain.pem": "".join(reply.chain).encode(),
        "tunnel.key": private_pem(keys.tunnel), "enroll.key": private_pem(keys.enroll), "bundle": reply.bundle.encode(),
        "record": reply.record.encode(), "endpoint.json": _seal(about, keys.enroll),
    }  # fmt: skip


def _accept_identity(
    bundle: TrustBundle, chain: Sequence[str], record: str, tls: ec.EllipticCurvePrivateKey, tunnel: X25519PrivateKey,
    name: SpiffeId, now: int,
) -> tuple[certs.Svid, EndpointRecord]:  # fmt: skip
    """A chain for our key and our name, and a record of our tunnel key. Raises NotVerified."""
    svid = bundle.verify_svid(list(chain), now, expect=name)
    if certs.spki(svid.public_key) != certs.spki(tls.public_key()):
        raise NotVerified("enroll.foreign_key", "the certificate is for a key that is not ours")
    known = bundle.verify(EndpointRecord, record)
    if (known.endpoint, known.kind) != (name.name, name.kind):
        raise NotVerified("enroll.foreign_record", f"the endpoint record is of {known.kind} {ascii(known.endpoint)[:80]}")
    if known.tunnel_key != b64(x25519_public(tunnel)):
        raise NotVerified("enroll.foreign_record", "the endpoint record holds a tunnel key that is not ours")
    return svid, known


def _seal(about: EndpointFile, key: Ed25519PrivateKey) -> bytes:
    seal = b64(key.sign(about.sealed_bytes()))
    return about.model_copy(update={"seal": seal}).model_dump_json(indent=1).encode() + b"\n"


def check_underlay(hints: Sequence[str]) -> list[str]:
    """``address:port`` hints, IPv6 in brackets, in their one form. Raises BadInput ``underlay.form``."""
    if len(hints) > MAX_UNDERLAY:
        raise BadInput("underlay.many", f"{len(hints)} underlay addresses; at most {MAX_UNDERLAY}")
    out = []
    for hint in hints:
        host, _, port = hint.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            address = ipaddress.ip_address(host[1:-1] if bracketed else host)
            number = int(port) if port.isascii() and port.isdigit() else 0
            if not 0 < number < 65536 or bracketed != (address.version == 6) or "%" in host:
                raise ValueError(hint)
            if address.is_unspecified or address.is_multicast:
                raise ValueError(hint)
        except ValueError:
            raise BadInput(
                "underlay.form", f"not an underlay address: {ascii(hint)[:80]}",
                hint="write 192.0.2.1:51820 or [2001:db8::1]:51820",
            ) from None  # fmt: skip
        out.append(f"[{address}]:{number}" if bracketed else f"{address}:{number}")
    return out


# -- renewal ----------------------------------------------------------------------------------------------------------


async def renew(
    enrollment: Enrollment, underlay: Sequence[str], ciphers: Sequence[Cipher],
    *, client: ControlClient | None = None, bundle: TrustBundle | None = None, clock: Clock = time.time,
) -> Enrollment:  # fmt: skip
    """A fresh certificate over a fresh TLS key; tunnel and enrolment keys stay. Stored as one, like an enrolment.

    bundle: the newest trust known (default: the stored one); client: one to use instead of making one.
    Raises NotVerified, or what the CA answered; the old certificate then stays in force.
    """
    hints, trust = check_underlay(underlay), bundle or enrollment.bundle
    tls = renewal_key(enrollment.directory)
    request = RenewRequest(csr=certs.make_csr(tls), underlay=hints, ciphers=list(ciphers))
    if client is not None:
        reply = await client.post("/v1/renew", request, RenewReply)
    else:
        async with enrollment.client(trust, clock=clock) as own:
            reply = await own.post("/v1/renew", request, RenewReply)
    return accept_renewal(enrollment, trust, reply, tls, int(clock()))


def renewal_key(state_dir: Path) -> ec.EllipticCurvePrivateKey:
    """The TLS key to ask a certificate for: that of an attempt whose reply was lost, or a new one, durable before use.

    The CA takes a second request with the same old certificate for a lost reply only when it is for the same key.
    """
    pending = state_dir / ".renewing.key"
    try:
        key = load_private(pending)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key
    except BadState:
        pass  # none, or torn: as good as none
    made = ec.generate_private_key(ec.SECP256R1())
    try:
        write_secret(pending, private_pem(made))
    except OSError as e:
        raise BadState("state.write", f"cannot write {state_dir}: {e.strerror}", hint="check the disk") from None
    return made


def accept_renewal(
    enrollment: Enrollment, trust: TrustBundle, reply: RenewReply, tls: ec.EllipticCurvePrivateKey, now: int
) -> Enrollment:
    """Verify a renewal and store it as one. Raises NotVerified, BadState; then nothing has changed."""
    newer = trust.accept_next(reply.bundle, now)
    _accept_identity(newer, reply.chain, reply.record, tls, enrollment.tunnel_key, enrollment.spiffe_id, now)
    prints = newer.fingerprints()
    pin = enrollment.root_fingerprint if enrollment.root_fingerprint in prints else min(prints)
    about = EndpointFile(
        ca_url=enrollment.ca_url, root_fingerprint=pin, trust_domain=enrollment.trust_domain.name,
        endpoint=enrollment.endpoint, kind=enrollment.kind, workload=enrollment.workload, verified_at=now,
    )  # fmt: skip
    with _sole(enrollment.directory):
        _commit(enrollment.directory, {
            "tls.key": private_pem(tls), "chain.pem": "".join(reply.chain).encode(), "bundle": reply.bundle.encode(),
            "record": reply.record.encode(), "endpoint.json": _seal(about, enrollment.enroll_key),
        })  # fmt: skip
        (enrollment.directory / ".renewing.key").unlink(missing_ok=True)
    return load_enrollment(enrollment.directory)


# -- the directory ----------------------------------------------------------------------------------------------------


def load_enrollment(state_dir: Path) -> Enrollment:
    """Read and verify an enrolment. An expired certificate is no error here: its machine may come back.

    Raises Unreachable ``enroll.missing`` when there is none; BadState ``state.*`` for files that are missing, damaged,
    altered, of another enrolment, or reachable by others; NoPrivilege.
    """
    try:
        there = state_dir.exists()
    except PermissionError:
        raise NoPrivilege("state.privilege", f"{state_dir} cannot be read", hint="run as root (sudo)") from None
    if not there:
        raise _missing(state_dir)
    check_dir(state_dir)
    with _locked(state_dir):
        finish(state_dir)
        raw = {name: read_owned(state_dir / name) for name in FILES}
        about = _about(state_dir, raw)
        keys = _load_keys(state_dir)
    _check_seal(about, keys.enroll, state_dir)
    part = "bundle"
    try:
        trust_domain = TrustDomain(about.trust_domain)
        bundle = open_bundle(_text(raw["bundle"]), about.root_fingerprint, trust_domain, about.verified_at)
        part = "chain.pem or record"
        name = SpiffeId.endpoint(trust_domain, about.endpoint, about.kind)
        envelope = _text(raw["record"])
        svid, record = _accept_identity(
            bundle, [_text(raw["chain.pem"])], envelope, keys.tls, keys.tunnel, name, about.verified_at
        )
    except (NotVerified, BadInput) as e:
        what = f"{part} in {state_dir}: {e.message}"
        if e.code.startswith("enroll.foreign") or e.code == "svid.name":
            raise BadState("state.foreign", what, hint=_AGAIN) from None
        raise BadState("state.altered", what, hint=_AGAIN) from None
    return Enrollment(
        state_dir, about.ca_url, about.root_fingerprint, trust_domain, about.endpoint, about.kind, about.workload, svid,
        bundle, record, envelope, keys.tunnel, keys.enroll, about.verified_at,
    )  # fmt: skip


def _about(state_dir: Path, raw: Mapping[str, bytes | None]) -> EndpointFile:
    missing = [name for name in FILES if raw[name] is None]
    if len(missing) == len(FILES):
        raise _missing(state_dir)
    if missing:
        raise BadState("state.partial", f"{state_dir} lacks {', '.join(missing)}", hint=_AGAIN)
    try:
        return parse(EndpointFile, raw["endpoint.json"] or b"")
    except BadInput as e:
        raise BadState("state.endpoint", f"{state_dir / 'endpoint.json'} is damaged ({e})", hint=_AGAIN) from None


def _missing(state_dir: Path) -> Unreachable:
    return Unreachable(
        "enroll.missing", f"this machine is not enrolled: {state_dir} holds no enrolment",
        hint="run: retinue enroll --ca https://HOST:PORT --token-file FILE",
    )  # fmt: skip


def _check_seal(about: EndpointFile, key: Ed25519PrivateKey, state_dir: Path) -> None:
    try:
        key.public_key().verify(unb64(about.seal), about.sealed_bytes())
    except (InvalidSignature, BadInput):
        raise BadState(
            "state.altered", f"{state_dir / 'endpoint.json'} was changed, or belongs to another enrolment", hint=_AGAIN
        ) from None


def _load_keys(directory: Path) -> _Keys:
    try:
        tls, tunnel, enroll_key = (load_private(directory / name) for name in KEY_FILES)
    except BadState as e:
        raise BadState(e.code, e.message, hint=e.hint or _AGAIN) from None
    if not (
        isinstance(tls, ec.EllipticCurvePrivateKey)
        and isinstance(tunnel, X25519PrivateKey)
        and isinstance(enroll_key, Ed25519PrivateKey)
    ):
        raise BadState("state.key", f"a key file in {directory} holds another kind of key than it should", hint=_AGAIN)
    return _Keys(tls, tunnel, enroll_key)


def _text(data: bytes | None) -> str:
    try:
        return (data or b"").decode("ascii").strip()
    except UnicodeDecodeError:
        raise NotVerified("state.text", "not text") from None


def _make_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise BadState("state.dir", f"cannot make {path}: {e.strerror}") from None
    check_dir(path)


def _pending_keys(state_dir: Path, token: JoinToken) -> _Keys:
    """The keys of this attempt: those of an earlier attempt with the same token, or new ones, durable before use."""
    pending = state_dir / ".pending"
    mark = hashlib.sha256(f"{token.id}.{token.root_fingerprint}".encode()).hexdigest().encode()
    try:
        if read_owned(pending / "token") == mark:
            return _load_keys(pending)
    except BadState:
        pass  # torn or unreadable: as good as none
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(mode=0o700)
    keys = _Keys(
        ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    )
    write_secret(pending / "tls.key", private_pem(keys.tls))
    write_secret(pending / "tunnel.key", private_pem(keys.tunnel))
    write_secret(pending / "enroll.key", private_pem(keys.enroll))
    write_secret(pending / "token", mark)
    return keys


def _commit(state_dir: Path, files: Mapping[str, bytes]) -> None:
    """Replace several files as one. The rename to ``.next`` is the moment it happens."""
    try:
        for old in state_dir.glob(".new-*"):
            shutil.rmtree(old, ignore_errors=True)
        staging = state_dir / f".new-{os.urandom(4).hex()}"
        staging.mkdir(mode=0o700)
        for name, data in files.items():
            write_secret(staging / name, data)
        with _locked(state_dir):
            finish(state_dir)
            os.rename(staging, state_dir / ".next")
            _sync(state_dir)
            finish(state_dir)
    except OSError as e:
        raise BadState("state.write", f"cannot write {state_dir}: {e.strerror}", hint="check the disk") from None


def finish(state_dir: Path) -> None:
    """Complete a change that was decided (``.next`` exists) and perhaps interrupted. Nothing to do is the usual case."""
    coming = state_dir / ".next"
    if not coming.is_dir():
        return
    for name in FILES:
        if (coming / name).exists():
            os.rename(coming / name, state_dir / name)
    _sync(state_dir)
    coming.rmdir()
    _sync(state_dir)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _sole(state_dir: Path) -> Iterator[None]:
    """One enrolment or renewal at a time in one directory. Raises Conflict ``enroll.running``."""
    fd = os.open(state_dir / ".enroll.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict("enroll.running", f"another process is enrolling into {state_dir}") from None
        yield
    finally:
        os.close(fd)


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Readers and the short move into place take turns; held for file operations only."""
    fd = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
