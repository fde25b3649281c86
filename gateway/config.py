"""The gateway's configuration: one strict TOML file. Unknown keys, unknown values and unsafe key files are refused.

    agent = "/run/retinue/agent.sock"      # local API of the agent on this host
    state_dir = "/var/lib/retinue"         # whose enrolment pins the root of trust
    health = "127.0.0.1:8089"              # /healthz, apart from the public listeners

    [[listen]]
    address = "[::]:8443"
    certificate = "server.pem"             # relative to this file
    key = "server.key"
    client_ca = ["partners.pem"]           # besides the trust domain's own roots
    # or: federation = "other.example"     # client certificates of that trust domain, and of no other

    [[caller]]                             # an outside caller = a registered workload placed on this host
    workload = "partner/acme"
    token_sha256 = ["<hex>"]               # of the bearer token
    spki_sha256 = ["<hex>"]                # of the client certificate's public key
    spiffe_id = ["spiffe://..."]           # of a client certificate of this trust domain
    federated = ["spiffe://other.example/shop/*"]  # of one of a trust domain that ours federates with

    [[route]]
    host = "shop.example"                  # optional; exact
    path = "/api/"
    workload = "shop/api"
    port = 8080
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from identity.errors import BadInput, BadState, RetinueError
from identity.names import SpiffeId, TrustDomain, workload_path
from policy import foreign

MAX_CONFIG = 1 << 20  # bytes
HEX64 = re.compile(r"[0-9a-f]{64}")
HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]+\]")


def _workload(text: str) -> str:
    workload_path(text)
    return text


def _hex64(text: str) -> str:
    if not HEX64.fullmatch(text):
        raise ValueError("not a SHA-256 in 64 lower-case hex digits")
    return text


def _spiffe(text: str) -> str:
    return str(SpiffeId.parse(text))


def _federated(text: str) -> str:
    foreign.selector(text)
    return text


def _trust_domain(text: str) -> str:
    return TrustDomain(text).name


def _path(text: str) -> str:
    if not text.startswith("/") or re.search(r"//|/\.\.?(/|$)|[%?#\\\s]", text):
        raise ValueError("a path prefix starts with '/' and has no '%', '?', '#', '//' or dot segment")
    return text


def _host(text: str) -> str:
    if not HOST.fullmatch(text):
        raise ValueError("not a lower-case host name without port")
    return text


def _address(text: str) -> str:
    split_address(text)
    return text


def _posix(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


Workload = Annotated[str, AfterValidator(_workload)]
Digest = Annotated[str, AfterValidator(_hex64)]
File = Annotated[Path, BeforeValidator(_posix)]
Address = Annotated[str, AfterValidator(_address)]
Port = Annotated[int, Field(ge=1, le=65535)]
Wait = Annotated[float, Field(gt=0, le=3600)]  # seconds


def split_address(text: str) -> tuple[str, int]:
    """``ADDRESS:PORT`` with a literal address, IPv6 in brackets. Raises BadInput."""
    host, colon, port = text.rpartition(":")
    try:
        if not colon or not port.isdigit() or not 0 <= int(port) <= 65535:
            raise ValueError
        if host.startswith("[") != (":" in host):
            raise ValueError
        return str(ipaddress.ip_address(host.strip("[]"))), int(port)
    except ValueError:
        raise BadInput(
            "gateway.address", f"not an address and port: {ascii(text)[:80]}", hint="write 0.0.0.0:8443 or [::]:8443"
        ) from None


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Listen(_Section):
    """A public listener: TLS, or with `plaintext` for use behind something that ends TLS (then bearer tokens only).

    federation: it takes client certificates of this other trust domain. Each has a listener of its own, so that no two
    trust domains ever meet in one store, in the TLS library's neither.
    """

    address: Address
    certificate: File | None = None
    key: File | None = None
    client_ca: list[File] = []
    plaintext: bool = False
    federation: Annotated[str, AfterValidator(_trust_domain)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.plaintext and (self.certificate or self.key or self.client_ca or self.federation):
            raise ValueError("a plaintext listener has no certificate, key, client_ca or federation")
        if self.federation and self.client_ca:
            raise ValueError("a listener of a federation has no client_ca: its roots are that trust domain's alone")
        if not self.plaintext and not (self.certificate and self.key):
            raise ValueError("a listener needs certificate and key, or plaintext = true")
        return self


class Caller(_Section):
    """How one outside caller proves itself, and the registered workload that it then is."""

    workload: Workload
    instance: int = Field(default=0, ge=0)
    token_sha256: list[Digest] = []
    spki_sha256: list[Digest] = []
    spiffe_id: list[Annotated[str, AfterValidator(_spiffe)]] = []
    federated: list[Annotated[str, AfterValidator(_federated)]] = []

    @model_validator(mode="after")
    def _provable(self) -> Self:
        if not (self.token_sha256 or self.spki_sha256 or self.spiffe_id or self.federated):
            raise ValueError("a caller needs token_sha256, spki_sha256, spiffe_id or federated")
        return self


class Route(_Section):
    """Requests for a host and below a path go to a workload's port. `timeout`: seconds without a byte from it."""

    host: Annotated[str, AfterValidator(_host)] | None = None
    path: Annotated[str, AfterValidator(_path)] = "/"
    workload: Workload
    port: Port
    strip_prefix: bool = False
    family: Literal["any", "ipv4", "ipv6"] = "any"
    timeout: Wait = 60.0
    max_body: int = Field(default=16 * 1024 * 1024, ge=0)  # bytes
    max_message: int = Field(default=1024 * 1024, ge=1)  # bytes of one WebSocket message

    def match(self, host: str, path: str) -> bool:
        """Is a request for this host and (decoded) path ours? A prefix ends at a segment."""
        if self.host is not None and self.host != host:
            return False
        return path == self.path or path.startswith(self.path if self.path.endswith("/") else self.path + "/")


class Limits(_Section):
    """What one client connection may cost. Times in seconds, sizes in bytes."""

    handshake: Wait = 10.0
    header: Wait = 15.0
    idle: Wait = 75.0
    connect: Wait = 5.0
    header_bytes: int = Field(default=16 * 1024, ge=1024, le=1 << 20)
    connections: int = Field(default=10_000, ge=1)


class Config(_Section):
    """The whole file. `trust_domain` and `root_fingerprint` replace what `state_dir` pins, when both are given."""

    agent: File = Path("/run/retinue/agent.sock")
    state_dir: File = Path("/var/lib/retinue")
    trust_domain: str | None = None
    root_fingerprint: Digest | None = None
    health: Address | None = None
    drain: Annotated[float, Field(ge=0, le=3600)] = 10.0  # seconds
    explain: Literal["full", "brief"] = "full"  # how much of the reason an outside caller is told
    listen: list[Listen] = Field(min_length=1)
    caller: list[Caller] = []
    route: list[Route] = Field(min_length=1)
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.trust_domain is None) != (self.root_fingerprint is None):
            raise ValueError("trust_domain and root_fingerprint belong together")
        _unique("listen.address", [x.address for x in self.listen if not x.address.endswith(":0")])
        _unique("caller", [f"{c.workload}/{c.instance}" for c in self.caller])
        for kind in ("token_sha256", "spki_sha256", "spiffe_id", "federated"):
            _unique(kind, [proof for c in self.caller for proof in getattr(c, kind)])
        _unique("route", [f"{r.host or '*'}{r.path}" for r in self.route])
        return self

    def find_route(self, host: str, path: str) -> Route | None:
        """The most specific route: one that names the host before one that does not, then the longest path."""
        found = [r for r in self.route if r.match(host, path)]
        return max(found, key=lambda r: (r.host is not None, len(r.path)), default=None)


def _unique(what: str, values: list[str]) -> None:
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{what} {twice[0]} is given twice")


_SECTIONS: dict[str, type[_Section]] = {"listen": Listen, "caller": Caller, "route": Route, "limits": Limits}


def parse_config(text: str, *, file: str = "gateway.toml", base: Path | None = None) -> Config:
    """Parse and check; relative paths are taken from `base`. Raises BadInput ``gateway.config`` naming the key."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise BadInput("gateway.config", f"{file}: not TOML: {e}") from None
    try:
        config = Config.model_validate(data)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        raise _complaint(file, first["type"], first["loc"], first["msg"]) from None
    except RetinueError as e:
        raise BadInput("gateway.config", f"{file}: {e.message}", hint=e.hint) from None
    return _absolute(config, base) if base is not None else config


def load_config(path: Path) -> Config:
    """Read a file. Raises BadInput, or BadState for a key file that others can read."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BadInput("gateway.config", f"cannot read {path}: {e.strerror}", hint="give it with --config FILE") from None
    if len(data) > MAX_CONFIG:
        raise BadInput("gateway.config", f"{path} is larger than {MAX_CONFIG} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadInput("gateway.config", f"{path} is not UTF-8") from None
    config = parse_config(text, file=str(path), base=path.resolve().parent)
    for listen in config.listen:
        _check_key(listen.key)
    return config


def _check_key(path: Path | None) -> None:
    if path is None:
        return
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as e:
        raise BadInput("gateway.key", f"cannot read the key {path}: {e.strerror}") from None
    if mode & 0o077:
        raise BadState("gateway.key_mode", f"{path} has mode {mode:04o}: others can read it", hint=f"chmod 600 {path}")


def _complaint(file: str, kind: str, loc: tuple[int | str, ...], message: str) -> BadInput:
    where = "".join(f"[{p + 1}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    if kind != "extra_forbidden":
        return BadInput("gateway.config", f"{file}: {where + ': ' if where else ''}{message.removeprefix('Value error, ')}")
    section = _SECTIONS.get(str(loc[0]), Config) if len(loc) > 1 else Config
    known = sorted(section.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return BadInput("gateway.config", f"{file}: unknown key {where}", hint=hint)


def _absolute(config: Config, base: Path) -> Config:
    def one(path: Path | None) -> Path | None:
        return None if path is None else base / path

    listen = [
        x.model_copy(update={"certificate": one(x.certificate), "key": one(x.key), "client_ca": [base / p for p in x.client_ca]})
        for x in config.listen
    ]
    return config.model_copy(update={"agent": base / config.agent, "state_dir": base / config.state_dir, "listen": listen})
