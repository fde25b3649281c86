"""The authority: roots, intermediates, record keys, and the certificates and records they sign.

Files in its directory (0700): NAME.pem and NAME.key of every member, the first of a kind named as the kind (root,
intermediate, records, policy; root.key may be taken offline), later ones with a number (intermediate-2); ROOT.links.pem;
server.pem server.key (TLS, made anew as needed); authority.json (written last: who is a member, see ca/keyring.py).
How members come and go is in ca/rotation.py. `now` is seconds since the epoch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from ca.keyring import GOOD, KEY_TYPES, KINDS, MANIFEST, FileKeys, Keys, Member, Ring
from ca.keystores import KeyPlace, SignerClient, keys_of, open_keys, write_place
from ca.signer import FileSigner, Signer, sign_certificate
from identity import certs, records
from identity.bundle import TrustBundle, open_bundle
from identity.certs import (
    ADMIN,
    ENDPOINT,
    INTERMEDIATE,
    ROOT,
    SERVER,
    SIGNER,
    WORKLOAD,
    IPAddress,
    Profile,
    PublicKey,
)
from identity.errors import BadState, Bug, Conflict, NotVerified
from identity.keys import write_file
from identity.names import SpiffeId, TrustDomain
from identity.records import BundleRecord, JwtAuthority, Payload, SignerChain, Taint

RECORD_KEY_LIFETIME: Final = 365 * certs.DAY


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Seconds that what is issued from now on lives; never longer than the profile says."""

    root: int = ROOT.lifetime
    intermediate: int = INTERMEDIATE.lifetime
    endpoint: int = ENDPOINT.lifetime
    workload: int = WORKLOAD.lifetime
    server: int = SERVER.lifetime
    signer: int = SIGNER.lifetime
    admin: int = ADMIN.lifetime
    record_key: int = RECORD_KEY_LIFETIME

    def of(self, profile: Profile) -> Profile:
        return replace(profile, lifetime=min(profile.lifetime, getattr(self, profile.name, profile.lifetime)))


@dataclass(frozen=True, slots=True)
class Issuing:
    """What is about to be signed. `issuer` is the issuer's key identifier (hex): (issuer, serial) names a certificate
    for ever; `spki` is the SHA-256 of the subject's key (hex); times are seconds since the epoch.
    """

    serial: int
    issuer: str
    spiffe_id: str
    profile: str
    spki: str
    not_before: int
    not_after: int


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """The control plane's own TLS identity. `certificate` holds leaf, intermediate and root: a client that knows only a
    fingerprint finds the root there.
    """

    certificate: Path
    key: Path
    leaf_der: bytes
    not_after: int


SerialHook = Callable[[Issuing], None]


def _no_record(_: Issuing) -> None:
    """For the certificates of the authority itself, made before there is a store."""


class Authority:
    """Signs by profile. `record_serial` is called before every signature, so that the store has the serial first."""

    def __init__(
        self, directory: Path, ring: Ring, keys: Keys, *, record_serial: SerialHook = _no_record,
        lifetimes: Lifetimes | None = None,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.ring = ring
        self.keys = keys
        self.trust_domain = ring.trust_domain
        self.record_serial = record_serial
        self.lifetimes = lifetimes or Lifetimes()
        self.jwt_authorities: Callable[[], list[JwtAuthority]] = list  # what the bundle says of the JWT profile
        self.earliest: Callable[[SpiffeId], int] = lambda _: 0  # what a name was given before this time is revoked
        self._chains: dict[str, tuple[x509.Certificate, ...]] = {}
        self._signers: dict[str, Signer] = {}
        self._read_at: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"Authority({self.trust_domain}, {self.directory})"

    # -- making and opening -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, directory: Path, trust_domain: TrustDomain, now: float, *, place: KeyPlace | None = None,
        lifetimes: Lifetimes | None = None,
    ) -> Authority:  # fmt: skip
        """A new authority in an empty or missing directory. `place`: where its keys are made (default: files there).

        Raises Conflict ``ca.exists`` when one is there, BadState ``ca.partial`` for the remains of one.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
        if (directory / MANIFEST).exists():
            raise Conflict("ca.exists", f"{directory} already holds an authority", hint="choose another --dir")
        if (directory / "root.pem").exists() or (directory / "intermediate.key").exists():
            raise BadState(
                "ca.partial", f"{directory} holds parts of an authority but not all of one",
                hint="restore authority.json from a backup, or choose another --dir",
            )  # fmt: skip
        staging = directory / f".init-{os.urandom(4).hex()}"
        staging.mkdir(mode=0o700)
        try:
            keys = keys_of(place, staging) if place else FileKeys(staging)
            try:
                _populate(staging, trust_domain, now, keys, lifetimes)
            finally:
                _close(keys)
            names = sorted(p.name for p in staging.iterdir())
            for name in sorted(names, key=lambda n: n == MANIFEST):
                os.rename(staging / name, directory / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if place is not None:
            write_place(directory, place)
        return cls.load(directory, now, lifetimes=lifetimes)

    @classmethod
    def load(
        cls, directory: Path, now: float, *, record_serial: SerialHook = _no_record, keys: Keys | None = None,
        lifetimes: Lifetimes | None = None, upkeep: bool = True,
    ) -> Authority:  # fmt: skip
        """Open an authority and, with `upkeep`, renew what is due (see `maintain`). Raises BadState ``ca.*`` or ``state.*``."""
        ring = Ring.load(directory)
        self = cls(directory, ring, keys or open_keys(directory), record_serial=record_serial, lifetimes=lifetimes)
        self._read(now)
        if upkeep:
            self.maintain(now)
            self._check(now)
        return self

    def close(self) -> None:
        """Let go of the place where the keys are."""
        _close(self.keys)

    def refresh(self, now: float) -> bool:
        """Take over what another process changed in the directory. True when there was something."""
        if self._stamp() == self._read_at:
            return False
        before = (self.ring, self._chains, self._signers, self._read_at)
        try:
            self.ring = Ring.load(self.directory)
            self._read(now)
        except BaseException:
            self.ring, self._chains, self._signers, self._read_at = before  # what could be used goes on
            raise
        return True

    def _stamp(self) -> tuple[int, int]:
        found = (self.directory / MANIFEST).stat()
        return found.st_mtime_ns, found.st_ino

    def _read(self, now: float) -> None:
        self._read_at = self._stamp()
        self._chains, self._signers = {}, {}
        self._finish_old_renewal()
        for member in self.ring.members:
            if member.state in GOOD:
                path = self.directory / f"{member.name}.pem"
                chain = _read_chain(path)
                self._chains[member.name] = chain if KEY_TYPES[member.kind] == "ed25519" else (_one(chain, path),)
        try:
            certs.check_root(self.root, self.trust_domain, now)
        except NotVerified as e:
            raise BadState("ca.root", f"{self.ring.active('root').name}.pem in {self.directory}: {e.message}") from None
        for kind in KINDS:
            member = self.ring.active(kind)
            if kind == "root" and not self.keys.has(member.name):
                continue  # kept offline
            if certs.spki(self.signer(member.name).public_key) != certs.spki(_key(self._chains[member.name][0])):
                raise BadState("ca.key", f"{self.directory}/{member.name}.key is not the key of {member.name}.pem")

    def _finish_old_renewal(self) -> None:
        """Version 1 replaced the intermediate in place: after a crash its key says which certificate is in force."""
        path, coming = self.directory / "intermediate.pem", self.directory / "intermediate.next.pem"
        if coming.exists():
            if certs.spki(_key(_one(_read_chain(coming), coming))) == certs.spki(self.signer("intermediate").public_key):
                os.rename(coming, path)
            else:
                coming.unlink()

    def _check(self, now: float) -> None:
        try:
            self.trust_bundle(0, now)
        except NotVerified as e:
            raise BadState("ca.chain", f"the certificates in {self.directory} do not hold together: {e.message}") from None

    def save(self, ring: Ring) -> None:
        """Make a changed ring the one in force."""
        ring.save(self.directory)
        self.ring, self._read_at = ring, self._stamp()

    # -- what it says about itself ------------------------------------------------------------------------------------

    @property
    def root(self) -> x509.Certificate:
        """The root that signs."""
        return self.certificate(self.ring.active("root").name)

    @property
    def intermediate(self) -> x509.Certificate:
        """The intermediate that issues."""
        return self.certificate(self.ring.active("intermediate").name)

    @property
    def root_fingerprint(self) -> str:
        """Lower-case hex SHA-256 of the active root's DER: the pin in join tokens."""
        return certs.fingerprint(self.root)

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """Every root that is good."""
        return tuple(self.certificate(m.name) for m in self.ring.of("root", GOOD))

    def certificate(self, name: str) -> x509.Certificate:
        """Of a member that is good. Raises BadState ``ca.certificate``."""
        return self.chain(name)[0]

    def chain(self, name: str) -> tuple[x509.Certificate, ...]:
        """A member's own certificate; with a record key, its intermediate too."""
        if name not in self._chains:
            raise BadState("ca.certificate", f"the authority holds no certificate of {name}")
        return self._chains[name]

    def signer(self, name: str) -> Signer:
        """A member's key. Raises BadState ``state.key*``."""
        if name not in self._signers:
            self._signers[name] = self.keys.open(name)
        return self._signers[name]

    @staticmethod
    def signer_key(cert: x509.Certificate) -> PublicKey:
        """The key of a certificate of ours. Raises BadState ``ca.key``."""
        return _key(cert)

    def adopt(self, name: str, signer: Signer, chain: Sequence[x509.Certificate]) -> None:
        """Keep a new certificate of a member, durably."""
        write_file(self.directory / f"{name}.pem", "".join(map(certs.pem, chain)).encode())
        self._chains[name], self._signers[name] = tuple(chain), signer

    def forget(self, name: str) -> None:
        """Destroy a member's key and drop its certificate. What vouches for it stays: it leads on to its successors."""
        self.keys.destroy(name)
        self._chains.pop(name, None)
        self._signers.pop(name, None)
        (self.directory / f"{name}.pem").unlink(missing_ok=True)

    def links(self, now: float) -> list[x509.Certificate]:
        """Certificates by which roots vouch for each other."""
        found: list[x509.Certificate] = []
        for member in self.ring.of("root"):
            path = self.directory / f"{member.name}.links.pem"
            if path.exists():
                found += [c for c in _read_chain(path) if certs.not_before(c) <= now < certs.not_after(c)]
        return found

    def trust_bundle(self, sequence: int, now: float, blocked: Sequence[str] = ()) -> TrustBundle:
        """`bundle`, opened as an endpoint would open it. Raises NotVerified."""
        return open_bundle(self.bundle(sequence, now, blocked), self.root_fingerprint, self.trust_domain, now)

    def bundle(self, sequence: int, now: float, blocked: Sequence[str] = ()) -> str:
        """The trust bundle's envelope. `blocked`: entries of identity.revocation beside those of revoked members."""
        living = [r for r in self.roots if certs.not_before(r) <= now < certs.not_after(r)]
        issuers = {self.certificate(m.name) for m in self.ring.of("intermediate", GOOD)}
        signers = [
            SignerChain(role="records" if m.kind == "records" else "policy", chain=[certs.pem(c) for c in self.chain(m.name)])
            for m in (*self.ring.of("records", GOOD), *self.ring.of("policy", GOOD))
            if self.chain(m.name)[1] in issuers and now < certs.not_after(self.chain(m.name)[0])
        ]
        tainted = [
            Taint(key=certs.revocation_id(self.certificate(m.name)).spki, since=m.since, until=m.until)
            for m in self.ring.members
            if m.state == "tainted"
        ]
        revoked = [f"key:{m.key}" for m in self.ring.members if m.state == "revoked" and now < m.ends]
        record = BundleRecord(
            trust_domain=self.trust_domain.name, sequence=sequence, roots=[certs.pem(r) for r in living], signers=signers,
            issued=int(now), links=[certs.pem(c) for c in self.links(now)], tainted=tainted, revoked=[*revoked, *blocked],
            jwt_authorities=self.jwt_authorities(),
        )  # fmt: skip
        return self.sign_record(record)

    def sign_record(self, payload: Payload) -> str:
        """Seal a payload with the key of its role. Raises BadInput ``record.large``, Bug for another trust domain."""
        if payload.trust_domain != self.trust_domain.name:
            raise Bug("record.trust_domain", f"a {payload.typ} record of {payload.trust_domain} is not ours to sign")
        return records.sign(payload, self.signer(self.ring.active("records" if payload.role == "records" else "policy").name))

    # -- certificates -------------------------------------------------------------------------------------------------

    def issue_endpoint(self, csr_pem: str, spiffe_id: SpiffeId, now: float) -> list[str]:
        """A chain (PEM, leaf first, no root) for a host or sidecar. The request gives its key only.

        Raises BadInput ``csr.*``.
        """
        return self._issue(ENDPOINT, certs.csr_key(csr_pem), spiffe_id, now)

    def issue_admin(self, csr_pem: str, spiffe_id: SpiffeId, now: float) -> list[str]:
        """A chain for an administrator. Raises BadInput ``csr.*``."""
        return self._issue(ADMIN, certs.csr_key(csr_pem), spiffe_id, now)

    def issue_workload(
        self, csr_pem: str, spiffe_id: SpiffeId, addresses: Iterable[IPAddress], now: float, *, lifetime: int | None = None
    ) -> list[str]:
        """A chain for a workload instance with its overlay addresses as IP names, for at most `lifetime` seconds.

        Raises BadInput ``csr.*``.
        """
        profile = WORKLOAD if lifetime is None else replace(WORKLOAD, lifetime=max(1, min(lifetime, WORKLOAD.lifetime)))
        return self._issue(profile, certs.csr_key(csr_pem), spiffe_id, now, addresses)

    def server_chain(self, now: float) -> ServerIdentity:
        """The control plane's TLS identity, a new key and certificate whenever less than half the lifetime is left."""
        path, key_path = self.directory / "server.pem", self.directory / "server.key"
        present = self._present_server(path, key_path, now)
        if present is not None and present.not_after - now > self.lifetimes.of(SERVER).lifetime / 2:
            return present
        key = ec.generate_private_key(ec.SECP256R1())
        name = SpiffeId(self.trust_domain, certs.SERVER_NAME)
        chain = self._issue(SERVER, key.public_key(), name, now)
        FileSigner.create(key_path, key)
        write_file(path, "".join([*chain, certs.pem(self.root)]).encode())
        made = self._present_server(path, key_path, now)
        if made is None:
            raise Bug("ca.server", "the server certificate just written cannot be read")
        return made

    def _present_server(self, path: Path, key_path: Path, now: float) -> ServerIdentity | None:
        try:
            chain, key = _read_chain(path), FileSigner.load(key_path)
        except BadState:
            return None  # missing, or torn by a crash: it is made anew
        if certs.spki(_key(chain[0])) != certs.spki(key.public_key):
            return None
        if chain[1:] != (self.intermediate, self.root) or now < certs.not_before(chain[0]):
            return None  # of another authority or intermediate, or made before the clock was set back
        return ServerIdentity(path, key_path, chain[0].public_bytes(Encoding.DER), certs.not_after(chain[0]))

    def _issue(
        self, profile: Profile, key: PublicKey, spiffe_id: SpiffeId, now: float, addresses: Iterable[IPAddress] = ()
    ) -> list[str]:
        if certs.not_after(self.intermediate) <= now:
            raise BadState(
                "ca.intermediate_expired", "the intermediate certificate has expired",
                hint="bring root.key back to the CA directory and start it again",
            )  # fmt: skip
        if now < certs.not_before(self.intermediate):
            raise BadState(
                "ca.clock", "this machine's clock is behind the making of the intermediate certificate",
                hint="set the clock right",
            )  # fmt: skip
        profile = self.lifetimes.of(profile)
        builder = certs.build(
            profile, key=key, trust_domain=self.trust_domain, spiffe_id=spiffe_id, issuer=self.intermediate,
            serial=_serial(), now=now, addresses=addresses, earliest=self.earliest(spiffe_id),
        )  # fmt: skip
        leaf = sign_certificate(
            builder, self.signer(self.ring.active("intermediate").name), profile, issuer=self.intermediate, trust_domain=self.trust_domain,
            announce=_announce(self.record_serial, profile),
        )  # fmt: skip
        return [certs.pem(leaf), certs.pem(self.intermediate)]

    def certify(self, name: str, now: float) -> None:
        """A certificate for a record key, under the intermediate that issues."""
        member, signer = self.ring.get(name), self.signer(name)
        chain = self._issue(SIGNER, signer.public_key, SpiffeId(self.trust_domain, ("cp", member.kind)), now)
        self.adopt(name, signer, certs.parse_chain(chain))

    def sign_authority(self, profile: Profile, signer: Signer, now: float, issuer: str | None) -> x509.Certificate:
        """A certificate of a root (`issuer` None), an intermediate or a link, by the named root."""
        by = None if issuer is None else self.certificate(issuer)
        shortened = self.lifetimes.of(profile)
        builder = certs.build(
            shortened, key=signer.public_key, trust_domain=self.trust_domain, spiffe_id=None, issuer=by, serial=_serial(), now=now
        )
        return sign_certificate(
            builder, signer if issuer is None else self.signer(issuer), shortened, issuer=by, trust_domain=self.trust_domain,
            announce=_announce(_no_record if issuer is None else self.record_serial, shortened),
        )  # fmt: skip

    # -- upkeep -------------------------------------------------------------------------------------------------------

    def maintain(self, now: float) -> bool:
        """What is due by time: members prepared, activated and forgotten, certificates of record keys renewed.

        True when the bundle changed and must be published again.
        """
        from ca import rotation  # it works on this class

        return rotation.by_time(self, now)


def _close(keys: Keys) -> None:
    if isinstance(keys, SignerClient):
        keys.close()


def _populate(
    directory: Path, trust_domain: TrustDomain, now: float, keys: Keys, lifetimes: Lifetimes | None
) -> None:
    ring = Ring(trust_domain, int(now), ())
    self = Authority(directory, ring, keys, lifetimes=lifetimes)
    for kind in KINDS:
        self.ring = self.ring.put(Member(kind, kind, "active", int(now), int(now)))
        signer = keys.make(kind, KEY_TYPES[kind])
        self._signers[kind] = signer
        if kind == "root":
            self.adopt(kind, signer, [self.sign_authority(ROOT, signer, now, None)])
        elif kind == "intermediate":
            self.adopt(kind, signer, [self.sign_authority(INTERMEDIATE, signer, now, "root")])
        else:
            self.certify(kind, now)
    self.save(self.ring)


def _announce(hook: SerialHook, profile: Profile) -> Callable[[x509.Certificate], None]:
    def announce(draft: x509.Certificate) -> None:
        named = certs.revocation_id(draft)
        uri = draft.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        spiffe_id = uri.get_values_for_type(x509.UniformResourceIdentifier)[0]
        hook(Issuing(
            named.serial, named.issuer, spiffe_id, profile.name, named.spki, certs.not_before(draft), certs.not_after(draft)
        ))  # fmt: skip

    return announce


def _serial() -> int:
    """159 bits of which 158 are random: the length never tells, and the DER has always 20 bytes."""
    return x509.random_serial_number() | 1 << 158


def _key(cert: x509.Certificate) -> PublicKey:
    key = cert.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey):
        raise BadState("ca.key", "a certificate of the authority has a kind of key that is not used here")
    return key


def _read_chain(path: Path) -> tuple[x509.Certificate, ...]:
    try:
        chain = certs.parse_chain(path.read_text("ascii"))
    except (OSError, UnicodeDecodeError) as e:
        raise BadState("ca.certificate", f"cannot read {path}: {getattr(e, 'strerror', None) or 'not PEM'}") from None
    except NotVerified as e:
        raise BadState("ca.certificate", f"{path}: {e.message}") from None
    return chain


def _one(chain: Sequence[x509.Certificate], path: Path) -> x509.Certificate:
    if len(chain) != 1:
        raise BadState("ca.certificate", f"{path} must hold one certificate, not {len(chain)}")
    return chain[0]
