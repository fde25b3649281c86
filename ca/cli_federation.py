"""`retinue-ca federation`: other trust domains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, client, output_of
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput

if TYPE_CHECKING:
    from identity.wire.federation import FederationInfo

app = typer.Typer(help="Other trust domains whose identities are known here.", no_args_is_help=True, rich_markup_mode=None)

DomainArg = Annotated[str, typer.Argument(metavar="TRUST-DOMAIN", help="The other trust domain.")]


@app.command(epilog="Example: retinue-ca federation add other.example --url https://ca.other.example:8444/ --profile https_spiffe "
             "--endpoint-spiffe-id spiffe://other.example/cp/ca --bundle-file other.json")  # fmt: skip
def add(
    trust_domain: DomainArg,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="Where its bundle is served.")],
    profile: Annotated[Literal["https_web", "https_spiffe"], typer.Option("--profile", help="How that server is known: by a web certificate, or by its SVID.")],
    bundle_file: Annotated[Path, typer.Option("--bundle-file", metavar="FILE", help="Its bundle, as a person brought it.")],
    endpoint_spiffe_id: Annotated[str | None, typer.Option("--endpoint-spiffe-id", metavar="ID", help="The SPIFFE ID of that server (https_spiffe).")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Know another trust domain; its bundle is kept fresh from then on."""
    from identity.wire.federation import FederationAdd, FederationInfo

    try:
        bundle = bundle_file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput("federation.file", f"cannot read {bundle_file}: {getattr(e, 'strerror', 'not text')}") from None
    asked = FederationAdd(trust_domain=trust_domain, url=url, profile=profile, endpoint_id=endpoint_spiffe_id, bundle=bundle)
    _print([client(directory).post("/v1/federation", asked, FederationInfo)], output_of(output, as_json))


@app.command("list", epilog="Example: retinue-ca federation list")
def list_all(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every trust domain that is known, how fresh its bundle is, and why it could not be fetched."""
    from identity.wire.federation import FederationList

    _print(client(directory).get("/v1/federation", FederationList).federations, output_of(output, as_json))


@app.command(epilog="Example: retinue-ca federation refresh other.example")
def refresh(trust_domain: DomainArg, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Fetch its bundle now."""
    from identity.wire.federation import FederationInfo, FederationRef

    asked = FederationRef(trust_domain=trust_domain)
    _print([client(directory).post("/v1/federation/refresh", asked, FederationInfo)], output_of(output, as_json))


@app.command(epilog="Example: retinue-ca federation remove other.example")
def remove(trust_domain: DomainArg, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Believe nothing of it any more."""
    from identity.wire.federation import FederationInfo, FederationRef

    asked = FederationRef(trust_domain=trust_domain)
    _print([client(directory).post("/v1/federation/remove", asked, FederationInfo)], output_of(output, as_json))


@app.command(epilog="Example: retinue-ca federation bundle > prod.json")
def bundle(directory: Dir = DEFAULT_DIR) -> None:
    """Our own bundle as JSON, for the other side's --bundle-file."""
    from identity.bundle import open_bundle
    from identity.federation import make_bundle
    from identity.names import TrustDomain
    from identity.wire.admin import Info
    from identity.wire.recovery import BundleReply

    admin = client(directory)
    info = admin.get("/v1/info", Info)
    envelope = admin.get("/v1/federation/own", BundleReply).bundle
    trust = open_bundle(envelope, info.root_fingerprint, TrustDomain(info.trust_domain), time.time())
    print(make_bundle(trust.roots, trust.sequence, jwt_authorities=trust.jwt_authorities))


def _print(found: list[FederationInfo], chosen: Output) -> None:
    rows = [
        (f.trust_domain, f.profile, f.sequence, len(f.roots), f"{max(0, int(time.time()) - f.fetched_at)} s ago", f.error or "")
        for f in found
    ]
    data = [f.model_dump() for f in found]
    cliout.emit(data, chosen, columns=("trust domain", "profile", "sequence", "roots", "fetched", "error"), rows=rows)
