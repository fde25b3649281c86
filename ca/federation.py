"""Other trust domains: which are known, what their bundles were last, and how they are fetched.

Three things are told by a person and never learnt from the network: the trust domain, the address, the profile (SPIFFE
Federation, section 5). With https_spiffe the server must show the named SVID under the bundle known so far; with https_web
a web certificate of its host name. A bundle may only go on from the one before it: its sequence may not fall, and may not
stand still while its keys change. What cannot be fetched leaves what is known in force; nothing is ever added by an error.
"""

from __future__ import annotations

import http.client
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import structlog
from cryptography import x509
from sqlalchemy import Connection, delete, insert, select, update

from ca import audit, schema, transparency
from ca.store import Store
from identity import certs
from identity.errors import BadInput, Conflict, NotFound, NotVerified, RetinueError, Unreachable
from identity.federation import MAX_BUNDLE, ForeignRoots, parse_bundle
from identity.names import SpiffeId, TrustDomain
from identity.records import ForeignBundle
from identity.wire.federation import FederationAdd, FederationInfo

if TYPE_CHECKING:
    from ca.plane import Plane

log = structlog.get_logger("retinue.ca.federation")

TIMEOUT_S: Final = 10.0
MIN_WAIT_S: Final = 5.0  # between two fetches of one bundle, whatever its hint says
RETRY_S: Final = 60.0  # after a failure
_F: Final = schema.federations


@dataclass(frozen=True, slots=True)
class Federation:
    """One row. `bundle` is the other's JSON as it came."""

    trust_domain: str
    url: str
    profile: str
    endpoint_id: str | None
    bundle: str
    fetched_at: int
    error: str | None
    record: str | None

    @property
    def roots(self) -> ForeignRoots:
        return parse_bundle(self.bundle)

    def info(self) -> FederationInfo:
        known = self.roots
        return FederationInfo(
            trust_domain=self.trust_domain, url=self.url, profile=self.profile, endpoint_id=self.endpoint_id,
            sequence=known.sequence or 0, roots=[certs.fingerprint(r) for r in known.roots], fetched_at=self.fetched_at,
            hint=known.hint, error=self.error,
        )  # fmt: skip


def all_of(tx: Connection) -> list[Federation]:
    return [Federation(**row) for row in tx.execute(select(_F).order_by(_F.c.trust_domain)).mappings()]


def get(tx: Connection, trust_domain: str) -> Federation:
    """Raises NotFound ``federation.unknown``."""
    row = tx.execute(select(_F).where(_F.c.trust_domain == trust_domain)).mappings().first()
    if row is None:
        raise NotFound(
            "federation.unknown", f"there is no federation with {ascii(trust_domain)[:80]}", hint="see: retinue-ca federation list"
        )
    return Federation(**row)


# ---- by administrators


def add(plane: Plane, asked: FederationAdd, actor: str) -> FederationInfo:
    """Know another trust domain from now on. Raises BadInput, Conflict ``federation.exists``."""
    name = TrustDomain(asked.trust_domain).name
    if name == plane.trust_domain.name:
        raise BadInput("federation.own", "a trust domain does not federate with itself", hint="its bundle is in every host already")
    parts = urlsplit(asked.url)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.fragment:
        raise BadInput("federation.url", f"not an https address: {ascii(asked.url)[:80]}", hint="write https://HOST:PORT/PATH")
    if (asked.profile == "https_spiffe") != (asked.endpoint_id is not None):
        raise BadInput("federation.endpoint", "the SPIFFE ID of the bundle's server goes with https_spiffe, and only with it")
    if asked.endpoint_id is not None:
        served = SpiffeId.parse(asked.endpoint_id)
        if served.trust_domain.name != name:
            raise BadInput("federation.endpoint", f"{served} is not of {name}; a bundle serves itself here")
    roots = parse_bundle(asked.bundle)
    _check_roots(roots, TrustDomain(name), plane.clock())
    with plane.store.write() as tx:
        if tx.execute(select(_F.c.trust_domain).where(_F.c.trust_domain == name)).first() is not None:
            raise Conflict("federation.exists", f"{name} is known already", hint=f"retinue-ca federation remove {name}")
        tx.execute(insert(_F).values(
            trust_domain=name, url=asked.url, profile=asked.profile, endpoint_id=asked.endpoint_id, bundle=asked.bundle,
            fetched_at=plane.now,
        ))  # fmt: skip
        _publish(plane, tx, name, roots)
        audit.append(tx, plane.now, actor, "federation.add", name, url=asked.url, profile=asked.profile)
        return get(tx, name).info()


def remove(plane: Plane, trust_domain: str, actor: str) -> FederationInfo:
    """Believe nothing of another trust domain any more. Raises NotFound."""
    with plane.store.write() as tx:
        gone = get(tx, trust_domain)
        tx.execute(delete(_F).where(_F.c.trust_domain == trust_domain))
        plane.store.log(tx, plane.now, "federation", trust_domain)
        audit.append(tx, plane.now, actor, "federation.remove", trust_domain)
    return gone.info()


# ---- from the network


def due(plane: Plane, failed: dict[str, float], mono: float) -> list[Federation]:
    """Whose bundle is to be fetched now. `failed`: when a fetch failed last (monotonic seconds)."""
    with plane.store.read() as tx:
        known = all_of(tx)
    return [
        one for one in known
        if plane.now - one.fetched_at >= max(MIN_WAIT_S, one.roots.hint) and mono - failed.get(one.trust_domain, -RETRY_S) >= RETRY_S
    ]  # fmt: skip


def take(plane: Plane, trust_domain: str, text: str, actor: str) -> FederationInfo:
    """A bundle that was fetched, from a server that was verified. Raises BadInput, NotVerified ``federation.sequence``."""
    fresh = parse_bundle(text)
    _check_roots(fresh, TrustDomain(trust_domain), plane.clock())
    with plane.store.write() as tx:
        known = get(tx, trust_domain)
        old = known.roots
        same = (fresh.roots, fresh.jwt_authorities) == (old.roots, old.jwt_authorities)
        before, after = old.sequence or 0, fresh.sequence or 0
        if after < before or (after == before and not same):
            raise NotVerified(
                "federation.sequence", f"the bundle of {trust_domain} says sequence {after} after {before}",
                hint="an older bundle, or one that changed without saying so; what was known stays",
            )  # fmt: skip
        tx.execute(
            update(_F).where(_F.c.trust_domain == trust_domain).values(bundle=text, fetched_at=plane.now, error=None)
        )
        if not same:
            _publish(plane, tx, trust_domain, fresh)
            audit.append(tx, plane.now, actor, "federation.change", trust_domain, sequence=after, roots=len(fresh.roots))
        return get(tx, trust_domain).info()


def note(plane: Plane, trust_domain: str, error: RetinueError) -> None:
    """A fetch failed; what is known stays."""
    with plane.store.write() as tx:
        tx.execute(update(_F).where(_F.c.trust_domain == trust_domain).values(error=f"{error.code}: {error.message}"[:512]))


def _publish(plane: Plane, tx: Connection, name: str, roots: ForeignRoots) -> None:
    record = ForeignBundle(
        trust_domain=plane.trust_domain.name, foreign=name, sequence=roots.sequence or 0, issued=plane.now,
        roots=[certs.pem(r) for r in roots.roots], jwt_authorities=list(roots.jwt_authorities),
    )  # fmt: skip
    envelope = plane.sign(record)
    tx.execute(update(_F).where(_F.c.trust_domain == name).values(record=envelope))
    transparency.record(tx, plane.now, "federation", name, envelope)
    Store.log(tx, plane.now, "federation", name)


def _check_roots(known: ForeignRoots, trust_domain: TrustDomain, now: float) -> None:
    for root in known.roots:
        try:
            certs.check_foreign_root(root, trust_domain, now)
        except NotVerified as e:
            raise BadInput("federation.root", f"a root of {trust_domain} is not acceptable: {e.message}") from None


def fetch(one: Federation, now: float, *, web_roots: str | None = None) -> str:
    """The other's bundle, over a connection that is verified by its profile; no redirect is followed, no certificate of
    ours shown. `web_roots`: PEM file instead of the system's. Raises Unreachable, NotVerified.
    """
    parts = urlsplit(one.url)
    assert parts.hostname is not None
    context = _context(one, web_roots)
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=TIMEOUT_S, context=context)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        connection.connect()
        if one.profile == "https_spiffe":
            assert isinstance(connection.sock, ssl.SSLSocket)
            _check_server(one, connection.sock, now)
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers={"Accept": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise Unreachable("federation.status", f"{one.url} answered {response.status}")
        chunks: list[bytes] = []
        while chunk := response.read1(65536):
            chunks.append(chunk)
            if sum(map(len, chunks)) > MAX_BUNDLE or time.monotonic() > deadline:
                raise Unreachable("federation.large", f"{one.url} sends too much, or too slowly")
        return b"".join(chunks).decode("utf-8", "strict")
    except ssl.SSLCertVerificationError as e:
        raise NotVerified("federation.server", f"the server of {one.url} is not to be believed: {e.verify_message}") from None
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as e:
        raise Unreachable("federation.fetch", f"{one.url} cannot be fetched ({type(e).__name__})") from None
    finally:
        connection.close()


def _context(one: Federation, web_roots: str | None) -> ssl.SSLContext:
    if one.profile == "https_web":
        context = ssl.create_default_context(cafile=web_roots)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # `_check_server` is the check
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _check_server(one: Federation, sock: ssl.SSLSocket, now: float) -> None:
    """The server's SVID, under the bundle known so far, before a byte is asked. Raises NotVerified."""
    sent: Any = sock._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]  # public from Python 3.13
    chain = certs.parse_der_chain([ssl.PEM_cert_to_DER_cert(c.public_bytes()) for c in sent])
    verify_foreign(chain, one.roots.roots, TrustDomain(one.trust_domain), now, expect=one.endpoint_id)


def verify_foreign(
    chain: tuple[x509.Certificate, ...], roots: tuple[x509.Certificate, ...], trust_domain: TrustDomain, now: float,
    *, expect: str | None = None,
) -> SpiffeId:  # fmt: skip
    """The identity of another domain's SVID, under that domain's roots alone. Raises NotVerified."""
    found = certs.verify_chain(chain, roots, trust_domain, now, profile=certs.FOREIGN).spiffe_id
    if expect is not None and str(found) != expect:
        raise NotVerified("federation.server", f"the server is {found}, not {expect}")
    return found


def own_bundle(plane: Plane, hint: int) -> str:
    """What this trust domain shows others."""
    from identity.federation import make_bundle

    with plane.store.read() as tx:
        sequence = int(plane.store.get(tx, "bundle_sequence") or 0)
    return make_bundle(plane.trust.roots, sequence, hint, plane.authority.jwt_authorities())

