"""The authority: root, intermediate, record keys, and the certificates and records they sign.

Files in its directory (0700): root.pem root.key (may be taken offline), intermediate.pem intermediate.key,
records.pem records.key, policy.pem policy.key, server.pem server.key (TLS, made anew as needed), authority.json
(written last: the mark of a complete authority). `now` is seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from ca.signer import FileSigner, Signer, sign_certificate
from identity import certs, records
from identity.bundle import TrustBundle, open_bundle
from identity.certs import (
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
from identity.errors import BadInput, BadState, Bug, Conflict, NotVerified
from identity.keys import write_file, write_secret
from identity.names import SpiffeId, TrustDomain
from identity.records import BundleRecord, JwtAuthority, Payload, SignerChain

STATE_VERSION = 1


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
        self, directory: Path, trust_domain: TrustDomain, root: x509.Certificate, *, record_serial: SerialHook = _no_record
    ) -> None:
        self.directory = directory
        self.trust_domain = trust_domain
        self.root = root
        self.record_serial = record_serial
        self.jwt_authorities: Callable[[], list[JwtAuthority]] = list  # what the bundle says of the JWT profile
        self.intermediate: x509.Certificate
        self._intermediate_key: Signer
        self._record_keys: dict[str, Signer] = {}
        self._record_chains: dict[str, tuple[x509.Certificate, ...]] = {}

    def __repr__(self) -> str:
        return f"Authority({self.trust_domain}, {self.directory})"

    # -- making and opening -----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, directory: Path, trust_domain: TrustDomain, now: float) -> Authority:
        """A new authority in an empty or missing directory.

        Raises Conflict ``ca.exists`` when one is there, BadState ``ca.partial`` for the remains of one.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
        if (directory / "authority.json").exists():
            raise Conflict("ca.exists", f"{directory} already holds an authority", hint="choose another --dir")
        if (directory / "root.pem").exists() or (directory / "intermediate.key").exists():
            raise BadState(
                "ca.partial", f"{directory} holds parts of an authority but not all of one",
                hint="restore authority.json from a backup, or choose another --dir",
            )  # fmt: skip
        staging = directory / f".init-{os.urandom(4).hex()}"
        staging.mkdir(mode=0o700)
        try:
            _populate(staging, trust_domain, now)
            names = sorted(p.name for p in staging.iterdir())
            for name in sorted(names, key=lambda n: n == "authority.json"):
                os.rename(staging / name, directory / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return cls.load(directory, now)

    @classmethod
    def load(cls, directory: Path, now: float, *, record_serial: SerialHook = _no_record) -> Authority:
        """Open an authority and renew what is due (see `maintain`). Raises BadState ``ca.*`` or ``state.*``."""
        trust_domain = _read_state(directory)
        root = _one(_read_chain(directory / "root.pem"), directory / "root.pem")
        try:
            certs.check_root(root, trust_domain, now)
        except NotVerified as e:
            raise BadState("ca.root", f"{directory / 'root.pem'}: {e.message}") from None
        self = cls(directory, trust_domain, root, record_serial=record_serial)
        self._load_intermediate()
        for role in certs.SIGNER_ROLES:
            self._record_keys[role] = FileSigner.load(directory / f"{role}.key")
            self._record_chains[role] = _read_chain(directory / f"{role}.pem")
        self.maintain(now)
        self._check(now)
        return self

    def _load_intermediate(self) -> None:
        path, coming = self.directory / "intermediate.pem", self.directory / "intermediate.next.pem"
        self._intermediate_key = FileSigner.load(self.directory / "intermediate.key")
        mine = certs.spki(self._intermediate_key.public_key)
        if coming.exists():
            # A crash between the new key and its certificate: the key says which certificate is in force.
            if certs.spki(_key(_one(_read_chain(coming), coming))) == mine:
                os.rename(coming, path)
            else:
                coming.unlink()
        self.intermediate = _one(_read_chain(path), path)
        if certs.spki(_key(self.intermediate)) != mine:
            raise BadState("ca.key", f"{self.directory}/intermediate.key is not the key of intermediate.pem")

    def _check(self, now: float) -> None:
        for role, chain in self._record_chains.items():
            if certs.spki(_key(chain[0])) != certs.spki(self._record_keys[role].public_key):
                raise BadState("ca.key", f"{self.directory}/{role}.key is not the key of {role}.pem")
        try:
            self.trust_bundle(0, now)
        except NotVerified as e:
            raise BadState("ca.chain", f"the certificates in {self.directory} do not hold together: {e.message}") from None

    # -- what it says about itself ------------------------------------------------------------------------------------

    @property
    def root_fingerprint(self) -> str:
        """Lower-case hex SHA-256 of the root's DER: the pin in join tokens."""
        return certs.fingerprint(self.root)

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        return (self.root,)

    def trust_bundle(self, sequence: int, now: float) -> TrustBundle:
        """`bundle`, opened as an endpoint would open it. Raises NotVerified."""
        return open_bundle(self.bundle(sequence, now), self.root_fingerprint, self.trust_domain, now)

    def bundle(self, sequence: int, now: float) -> str:
        """The trust bundle's envelope."""
        signers = [
            SignerChain(role="records" if role == "records" else "policy", chain=[certs.pem(c) for c in chain])
            for role, chain in self._record_chains.items()
        ]
        record = BundleRecord(
            trust_domain=self.trust_domain.name, sequence=sequence, roots=[certs.pem(self.root)], signers=signers,
            issued=int(now), jwt_authorities=self.jwt_authorities(),
        )  # fmt: skip
        return self.sign_record(record)

    def sign_record(self, payload: Payload) -> str:
        """Seal a payload with the key of its role. Raises BadInput ``record.large``, Bug for another trust domain."""
        if payload.trust_domain != self.trust_domain.name:
            raise Bug("record.trust_domain", f"a {payload.typ} record of {payload.trust_domain} is not ours to sign")
        return records.sign(payload, self._record_keys[payload.role])

    # -- certificates -------------------------------------------------------------------------------------------------

    def issue_endpoint(self, csr_pem: str, spiffe_id: SpiffeId, now: float) -> list[str]:
        """A chain (PEM, leaf first, no root) for a host or sidecar. The request gives its key only.

        Raises BadInput ``csr.*``.
        """
        return self._issue(ENDPOINT, certs.csr_key(csr_pem), spiffe_id, now)

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
        if present is not None and present.not_after - now > certs.SERVER_LIFETIME / 2:
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
        if chain[-1] != self.root or now < certs.not_before(chain[0]):
            return None  # of another authority, or made before the clock was set back
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
        builder = certs.build(
            profile, key=key, trust_domain=self.trust_domain, spiffe_id=spiffe_id, issuer=self.intermediate,
            serial=_serial(), now=now, addresses=addresses,
        )  # fmt: skip
        leaf = sign_certificate(
            builder, self._intermediate_key, profile, issuer=self.intermediate, trust_domain=self.trust_domain,
            announce=_announce(self.record_serial, profile),
        )  # fmt: skip
        return [certs.pem(leaf), certs.pem(self.intermediate)]

    # -- upkeep -------------------------------------------------------------------------------------------------------

    def maintain(self, now: float) -> bool:
        """Renew what has passed half of its life: the intermediate (when root.key is here) and the record keys'
        certificates. True when the bundle changed and must be published again.
        """
        if self._due(self.intermediate, now) and (self.directory / "root.key").exists():
            self._renew_intermediate(now)
        changed = False
        for role in certs.SIGNER_ROLES:
            if self._due(self._record_chains[role][0], now) and certs.not_after(self.intermediate) > now:
                key = self._record_keys[role].public_key
                chain = self._issue(SIGNER, key, SpiffeId(self.trust_domain, ("cp", role)), now)
                write_file(self.directory / f"{role}.pem", "".join(chain).encode())
                self._record_chains[role] = certs.parse_chain(chain)
                changed = True
        return changed

    @staticmethod
    def _due(cert: x509.Certificate, now: float) -> bool:
        return now >= (certs.not_before(cert) + certs.not_after(cert)) / 2

    def _renew_intermediate(self, now: float) -> None:
        root_key = FileSigner.load(self.directory / "root.key")
        key = ec.generate_private_key(ec.SECP256R1())
        cert = _make_intermediate(self.trust_domain, self.root, root_key, key.public_key(), now, self.record_serial)
        coming = self.directory / "intermediate.next.pem"
        write_file(coming, certs.pem(cert).encode())
        self._intermediate_key = FileSigner.create(self.directory / "intermediate.key", key)
        os.rename(coming, self.directory / "intermediate.pem")
        self.intermediate = cert


def _populate(directory: Path, trust_domain: TrustDomain, now: float) -> None:
    root_private = ec.generate_private_key(ec.SECP384R1())
    root_key = FileSigner.create(directory / "root.key", root_private)
    builder = certs.build(
        ROOT, key=root_key.public_key, trust_domain=trust_domain, spiffe_id=None, issuer=None,
        serial=_serial(), now=now,
    )  # fmt: skip
    root = sign_certificate(
        builder, root_key, ROOT, issuer=None, trust_domain=trust_domain, announce=_announce(_no_record, ROOT)
    )
    write_file(directory / "root.pem", certs.pem(root).encode())
    self = Authority(directory, trust_domain, root)
    private = ec.generate_private_key(ec.SECP256R1())
    self._intermediate_key = FileSigner.create(directory / "intermediate.key", private)
    self.intermediate = _make_intermediate(trust_domain, root, root_key, private.public_key(), now, _no_record)
    write_file(directory / "intermediate.pem", certs.pem(self.intermediate).encode())
    for role in certs.SIGNER_ROLES:
        key = FileSigner.create(directory / f"{role}.key", Ed25519PrivateKey.generate())
        chain = self._issue(SIGNER, key.public_key, SpiffeId(trust_domain, ("cp", role)), now)
        write_file(directory / f"{role}.pem", "".join(chain).encode())
    state = {"version": STATE_VERSION, "trust_domain": trust_domain.name, "created": int(now)}
    write_secret(directory / "authority.json", json.dumps(state).encode())


def _make_intermediate(
    trust_domain: TrustDomain, root: x509.Certificate, root_key: Signer, key: PublicKey, now: float, hook: SerialHook
) -> x509.Certificate:
    builder = certs.build(
        INTERMEDIATE, key=key, trust_domain=trust_domain, spiffe_id=None, issuer=root, serial=_serial(), now=now
    )
    return sign_certificate(
        builder, root_key, INTERMEDIATE, issuer=root, trust_domain=trust_domain, announce=_announce(hook, INTERMEDIATE)
    )


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


def _read_state(directory: Path) -> TrustDomain:
    path = directory / "authority.json"
    try:
        state = json.loads(path.read_bytes())
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise BadState("ca.version", f"{path} is not of version {STATE_VERSION}")
        return TrustDomain(str(state["trust_domain"]))
    except FileNotFoundError:
        raise BadState(
            "ca.missing", f"there is no authority in {directory}",
            hint="run: retinue-ca init --dir DIR --trust-domain NAME",
        ) from None  # fmt: skip
    except (OSError, ValueError, KeyError, BadInput):
        raise BadState("ca.state", f"{path} cannot be read") from None


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
