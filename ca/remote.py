"""The command line's client of a CA elsewhere: HTTPS with an administrator's certificate, synchronous.

An administrator's directory (0700) holds admin.json (who, which trust domain, which server), key.pem (0600), chain.pem
and roots.pem. The server is checked against those roots, and has to be spiffe://TD/cp/ca, before anything is sent. A
certificate past half of its life is renewed by the way.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec

from ca.client import AdminClient, exchange
from identity import certs
from identity.errors import BadInput, BadState, NotVerified, RetinueError, Unreachable
from identity.keys import private_pem, write_file, write_secret
from identity.names import SpiffeId, TrustDomain
from identity.wire import Message, parse
from identity.wire.people import AdminCredential, AdminRenew

PREFIX: Final = "/admin"
MARK: Final = "admin.json"


@dataclass(frozen=True, slots=True)
class Identity:
    """An administrator's directory, read and checked. `server` is None when none was noted."""

    directory: Path
    trust_domain: TrustDomain
    spiffe_id: SpiffeId
    server: str | None
    roots: str
    not_before: int
    not_after: int

    @classmethod
    def load(cls, directory: Path) -> Identity:
        """Raises BadState ``admin.identity`` for a missing, damaged or unsafe directory."""
        hint = "make one with: retinue-ca admin add NAME --role ROLE --out DIR"
        try:
            for name in (".", "key.pem"):
                mode = stat.S_IMODE(os.stat(directory / name).st_mode)
                if mode & 0o077:
                    raise BadState("admin.identity", f"{directory / name} has mode {mode:04o}: others can reach it", hint="chmod go= it")
            said = json.loads((directory / MARK).read_text())
            trust_domain = TrustDomain(said["trust_domain"])
            chain = certs.parse_chain((directory / "chain.pem").read_text())
            roots = (directory / "roots.pem").read_text()
            return cls(
                directory, trust_domain, certs.claimed_id(chain[0]), said.get("server"), roots,
                certs.not_before(chain[0]), certs.not_after(chain[0]),
            )  # fmt: skip
        except OSError as e:
            raise BadState("admin.identity", f"cannot read {e.filename or directory}: {e.strerror}", hint=hint) from None
        except (ValueError, KeyError, TypeError, BadInput, NotVerified):
            raise BadState("admin.identity", f"{directory} is not an administrator's directory", hint=hint) from None


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key for a certificate."""
    return ec.generate_private_key(ec.SECP256R1())


def save(directory: Path, made: AdminCredential, key: ec.EllipticCurvePrivateKey | None, server: str | None) -> None:
    """Write what `Identity.load` reads; without a key, the one that is there stays. Raises BadState."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if key is not None:
            write_secret(directory / "key.pem", private_pem(key))
        write_file(directory / "chain.pem", "".join(made.chain).encode())
        write_file(directory / "roots.pem", made.roots.encode())
        mark = {"name": made.admin.name, "spiffe_id": made.admin.spiffe_id, "trust_domain": made.trust_domain, "server": server}
        write_file(directory / MARK, json.dumps(mark).encode(), 0o600)
    except OSError as e:
        raise BadState("admin.identity", f"cannot write {directory}: {e.strerror}") from None


def check_server(url: str) -> tuple[str, int]:
    """Host and port of ``https://HOST:PORT``. Raises BadInput ``ca.url``."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "https" or not parts.hostname or parts.path not in {"", "/"} or parts.query or parts.username or port == 0:
        raise BadInput("ca.url", f"not the address of a CA: {ascii(url)[:120]}", hint="write https://HOST:PORT")
    return parts.hostname, port or 443


class _Connection(http.client.HTTPSConnection):
    """Checks who the server is before the first request is written."""

    def __init__(self, host: str, port: int, timeout: float, context: ssl.SSLContext, check: Callable[[ssl.SSLSocket], None]) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._check = check

    def connect(self) -> None:
        super().connect()
        assert isinstance(self.sock, ssl.SSLSocket)
        self._check(self.sock)


class RemoteClient(AdminClient):
    """One CA, by its address and an administrator's directory. Every method raises RetinueError only."""

    def __init__(self, identity: Identity, server: str | None = None, *, timeout: float = 30.0) -> None:
        url = server or identity.server
        if url is None:
            raise BadInput("ca.url", "which CA?", hint="give --server https://HOST:PORT")
        super().__init__(identity.directory, timeout=timeout)
        self._host, self._port = check_server(url)
        self._url, self._identity = url, identity

    def raw(
        self, method: str, path: str, message: Message | None = None,
        *, query: Mapping[str, object] | None = None, timeout: float | None = None,
    ) -> Any:  # fmt: skip
        """One exchange; the JSON of the answer."""
        self._renew()
        return self._ask(method, path, message, query, timeout)

    def _ask(
        self, method: str, path: str, message: Message | None, query: Mapping[str, object] | None, timeout: float | None
    ) -> Any:
        seconds = timeout or self._timeout
        connection = self._connection(seconds)
        with self._failures(seconds):
            try:
                return exchange(connection, method, PREFIX + path, message, query)
            finally:
                connection.close()

    _prefix = PREFIX

    def lines(self, path: str, message: Message, *, timeout: float) -> Iterator[dict[str, Any]]:
        """POST; the lines of the answer as they come."""
        self._renew()
        yield from super().lines(path, message, timeout=timeout)

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        return _Connection(self._host, self._port, timeout, self._context(), self._server_is_ours)

    @contextmanager
    def _failures(self, timeout: float) -> Iterator[None]:
        try:
            yield
        except RetinueError:
            raise
        except TimeoutError:
            raise Unreachable("ca.slow", f"{self._url} did not answer within {timeout:g} s") from None
        except ssl.SSLError as e:
            why = str(getattr(e, "reason", None) or "the handshake failed").lower().replace("_", " ")
            raise Unreachable("ca.tls", f"no TLS connection to {self._url}: {why}", hint="is it this CA, and is the certificate still good?") from None
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable("ca.unreachable", f"cannot reach {self._url} ({type(e).__name__})", hint="is the CA running and reachable?") from None

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the name is a SPIFFE ID: `_server_is_ours`
        context.verify_mode = ssl.CERT_REQUIRED
        directory = self._identity.directory
        try:
            context.load_verify_locations(cadata=self._identity.roots)
            context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
        except (OSError, ValueError):
            raise BadState("admin.identity", f"cannot use {directory}/chain.pem with {directory}/key.pem") from None
        return context

    def _server_is_ours(self, sock: ssl.SSLSocket) -> None:
        """OpenSSL led the chain to our roots; our own rules and the name are checked here. Raises NotVerified."""
        inner: Any = sock._sslobj  # type: ignore[attr-defined]  # the public call is of Python 3.13
        sent = [ssl.PEM_cert_to_DER_cert(cert.public_bytes()) for cert in inner.get_unverified_chain() or ()]
        roots = certs.parse_chain(self._identity.roots)
        svid = certs.verify_chain(certs.parse_der_chain(sent), roots, self._identity.trust_domain, time.time())
        if svid.spiffe_id != SpiffeId(self._identity.trust_domain, certs.SERVER_NAME):
            raise NotVerified("ca.name", f"the server is {svid.spiffe_id}, not the control plane")

    def _renew(self) -> None:
        """Renew our certificate past half of its life. What fails now is tried at the next command."""
        mine, now = self._identity, time.time()
        if now < (mine.not_before + mine.not_after) / 2:
            return
        self._check_living()
        with suppress(RetinueError):
            self.renew()

    def renew(self) -> AdminCredential:
        """A new key and certificate now. Raises BadState ``admin.expired``, and what the CA answered: then the old ones stay."""
        self._check_living()
        mine, key = self._identity, new_key()
        answer = self._ask("POST", "/v1/admins/renew", AdminRenew(csr=certs.make_csr(key)), None, None)
        made = parse(AdminCredential, json.dumps(answer))
        save(mine.directory, made, key, mine.server)
        self._identity = Identity.load(mine.directory)
        return made

    def _check_living(self) -> None:
        mine = self._identity
        if time.time() >= mine.not_after:
            name = mine.spiffe_id.name
            raise BadState(
                "admin.expired", f"the certificate of {mine.spiffe_id} has expired",
                hint=f"retinue-ca admin request --out {mine.directory} > {name}.csr; then, with two ca-admins or as root on the CA's "
                f"machine: retinue-ca admin certify {name} --csr {name}.csr --out DIR, and put what it writes beside key.pem",
            )  # fmt: skip
