"""`retinue-ca`: make a control plane, run it, administer it. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, BadState

if TYPE_CHECKING:
    from ca.client import AdminClient

DEFAULT_DIR = Path("/var/lib/retinue-ca")
START_S = 3.0  # seconds a starting server is waited for

app = typer.Typer(
    name="retinue-ca", help="The Retinue control plane: certificate authority, registry and change feed.",
    no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: retinue-ca init --trust-domain prod.example. Exit status: 0 yes, 1 no, 2 usage, 3 no server, "
    "4 no privilege, 5 timeout, 78 bad state.",
)  # fmt: skip


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"retinue-ca {version('retinue')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")] = False,
    server: Annotated[str | None, typer.Option("--server", metavar="URL", envvar="RETINUE_CA_SERVER", help="https://HOST:PORT of a CA elsewhere.")] = None,
    admin_identity: Annotated[Path | None, typer.Option("--admin-identity", metavar="DIR", envvar="RETINUE_ADMIN_IDENTITY", help="An administrator's directory, for a CA elsewhere.")] = None,
) -> None:  # fmt: skip
    """Where the CA is, when it is not on this machine."""
    del version  # its callback has answered
    _elsewhere.clear()
    if admin_identity is not None:
        _elsewhere.extend((admin_identity, server))
    elif server is not None:
        raise BadInput("usage", "--server needs --admin-identity DIR", hint="on the CA's own machine root needs neither")


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


token_app = _group("token", "Join tokens: how a host or sidecar gets in.")
host_app = _group("host", "Hosts and sidecars that have enrolled.")
workload_app = _group("workload", "Workload identities and where they are.")
policy_app = _group("policy", "The policy in force and its history.")
audit_app = _group("audit", "The audit trail.")

Dir = Annotated[Path, typer.Option("--dir", metavar="DIR", envvar="RETINUE_CA_DIR", help="The CA's directory.")]
Format = Annotated[Output, typer.Option("-o", "--output", help="table, json, jsonl or yaml.")]
Json = Annotated[bool, typer.Option("--json", help="The same as -o json.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]
Instance = Annotated[int, typer.Option("--instance", metavar="N", min=0, help="Which instance.")]


_elsewhere: list[Any] = []  # an administrator's directory and perhaps an address, for a CA on another machine


def client(directory: Path, timeout: float = 30.0) -> AdminClient:
    """Whom to ask: the server on this directory, or the one that --server names."""
    from ca.client import AdminClient

    if _elsewhere:
        from ca.remote import Identity, RemoteClient

        return RemoteClient(Identity.load(_elsewhere[0]), _elsewhere[1], timeout=timeout)
    _await_start(directory)
    return AdminClient(directory, timeout=timeout)


def administrator() -> Path | None:
    """The administrator's directory that `--admin-identity` names; None for the local socket."""
    return _elsewhere[0] if _elsewhere else None


def _await_start(directory: Path) -> None:
    """Give a server that was only just put in the background (`serve &`) the moment it needs to listen."""
    import socket
    import time

    from ca.client import socket_path

    path, deadline = str(socket_path(directory)), time.monotonic() + START_S
    while os.path.exists(directory / "ca.db"):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
            except OSError:
                pass  # the real request will say what it is
            return


def output_of(output: Output, as_json: bool) -> Output:
    """The output that was asked for."""
    return Output.JSON if as_json else output


def when(seconds: int) -> str:
    """A time, for people."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


# ---- the server


@app.command(epilog="Example: retinue-ca init --dir /var/lib/retinue-ca --trust-domain prod.example")
def init(
    trust_domain: Annotated[str, typer.Option("--trust-domain", metavar="NAME", help="Name of the trust domain, e.g. prod.example.")],
    directory: Dir = DEFAULT_DIR,
    store: Annotated[str | None, typer.Option("--store", metavar="URL", help="postgresql://user@host/database instead of SQLite; no password here.")] = None,
    store_file: Annotated[Path | None, typer.Option("--store-file", metavar="FILE", help="A file (0600) with that address; may hold a password. Also: RETINUE_CA_STORE.")] = None,
    signer: Annotated[Path | None, typer.Option("--signer", metavar="SOCKET", help="Have the keys made and kept by the signer process on this socket.")] = None,
    pkcs11: Annotated[Path | None, typer.Option("--pkcs11", metavar="MODULE", help="Have root and intermediate keys made and kept in a token, through this library.")] = None,
    token_label: Annotated[str, typer.Option("--token-label", metavar="LABEL", help="The PKCS#11 token.")] = "retinue",
    pin_file: Annotated[Path | None, typer.Option("--pin-file", metavar="FILE", help="A file (0600) with the token's PIN.")] = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make a new control plane: root, intermediate, record keys, database."""
    import time

    from ca import postgres
    from ca.keystores import key_place
    from ca.plane import Plane
    from identity.names import TrustDomain

    place = key_place(signer, pkcs11, token_label, pin_file)
    try:
        address = postgres.chosen(store, store_file)
        authority = Plane.create(directory, TrustDomain(trust_domain), time.time(), address=address, place=place)
    except OSError as e:
        raise BadState(
            "ca.dir", f"cannot write {directory}: {e.strerror}", hint="choose another --dir, or run as root"
        ) from None
    data = {
        "dir": str(directory),
        "trust_domain": trust_domain,
        "root_fingerprint": authority.root_fingerprint,
    }

    def human() -> None:
        print(f"Control plane of {trust_domain} made in {directory}")
        print(f"Root fingerprint {authority.root_fingerprint}")
        cliout.note(f"next: retinue-ca serve --dir {directory}")
        cliout.note(f"      keep {directory}/root.key offline once everything works")

    cliout.emit(data, output_of(output, as_json), human=human)


@app.command(epilog="Example: retinue-ca serve --dir /var/lib/retinue-ca --listen [::]:8443")
def serve(
    directory: Dir = DEFAULT_DIR,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="HOST:PORT for the endpoints; port 0 picks a free one.")] = "[::]:8443",
    heartbeat: Annotated[float, typer.Option(metavar="SECONDS", min=0.05, max=10.0, help="Seconds between signed heartbeats.")] = 2.0,
    host_life: Annotated[int, typer.Option(metavar="SECONDS", min=5, max=86400, help="Life of the certificates of hosts and sidecars.")] = 86400,
    workload_life: Annotated[int, typer.Option(metavar="SECONDS", min=5, max=14400, help="Life of the certificates of workloads.")] = 14400,
    lease: Annotated[float, typer.Option(metavar="SECONDS", min=1, max=3600, help="The agents' --lease: when a strict identity without a heartbeat is dark.")] = 30.0,
    stale_max: Annotated[float, typer.Option(metavar="SECONDS", min=1, max=30 * 86400, help="The agents' --stale-max: the same for any identity.")] = 43200.0,
    issuer_life: Annotated[int, typer.Option(metavar="SECONDS", min=60, max=7776000, help="Life of intermediates; six times that of what they issue at least.")] = 7776000,
    bundle_endpoint: Annotated[str | None, typer.Option("--bundle-endpoint", metavar="HOST:PORT", help="Serve our bundle to other trust domains there.")] = None,
    bundle_cert: Annotated[Path | None, typer.Option("--bundle-cert", metavar="FILE", help="A web certificate for it (https_web), PEM; our own SVID without.")] = None,
    bundle_key: Annotated[Path | None, typer.Option("--bundle-key", metavar="FILE", help="Its key.")] = None,
    web_roots: Annotated[Path | None, typer.Option("--web-roots", metavar="FILE", help="What web certificates of others are checked by; the system's without.")] = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Run the control plane until SIGTERM. Prints one line when it is ready."""
    import asyncio

    from ca.authority import Lifetimes
    from ca.federation_service import WebIdentity
    from ca.keystores import writable
    from ca.moves import Leases
    from ca.serve import Options, Running, harden, set_up_logs
    from ca.serve import serve as run

    set_up_logs()
    harden(*writable(directory))
    chosen = output_of(output, as_json)

    def ready(server: Running) -> None:
        plane = server.service.plane
        fingerprint = plane.authority.root_fingerprint
        if chosen is Output.TABLE:
            print(f"ready: {plane.trust_domain} on https://{server.listen}, root {fingerprint}", flush=True)
            return
        import json

        print(json.dumps({"event": "ready", "listen": server.listen, "trust_domain": str(plane.trust_domain),
                          "root_fingerprint": fingerprint, "admin": str(server.admin), "bundle": server.bundle}), flush=True)  # fmt: skip

    if (bundle_cert is None) != (bundle_key is None):
        raise BadInput("serve.bundle", "a certificate goes with its key", hint="give both --bundle-cert and --bundle-key")
    web = WebIdentity(bundle_cert, bundle_key) if bundle_cert is not None and bundle_key is not None else None
    signer = min(30 * 86400, max(30, issuer_life // 3))
    lives = Lifetimes(endpoint=host_life, workload=workload_life, intermediate=issuer_life, server=host_life, signer=signer)
    upkeep = max(1.0, min(3600.0, host_life / 24, issuer_life / 60))
    options = Options(
        directory, listen, heartbeat, lifetimes=lives, upkeep=upkeep, leases=Leases(lease, stale_max),
        bundle_listen=bundle_endpoint, bundle_identity=web, web_roots=web_roots,
    )  # fmt: skip
    asyncio.run(run(options, ready))


@app.command(epilog="Example: retinue-ca info -o json")
def info(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """What runs on a directory: trust domain, position, address, root fingerprint."""
    from identity.wire.admin import Info

    found = client(directory).get("/v1/info", Info)
    cliout.emit(
        found, output_of(output, as_json), columns=("what", "value"), rows=list(found.model_dump().items())
    )


# ---- the other commands


def _register() -> None:
    """Every command of the other modules; most join their group when they are imported."""
    from ca import (
        cli_admin,
        cli_audit,  # noqa: F401  # joins its group
        cli_authority,
        cli_backup,  # noqa: F401  # joins its group
        cli_entry,
        cli_explain,  # noqa: F401  # joins its group
        cli_federation,
        cli_host,  # noqa: F401  # joins its group
        cli_move,
        cli_orchestrator,
        cli_policy,
        cli_signer,
        cli_store,
        cli_token,  # noqa: F401  # joins its group
    )

    app.add_typer(cli_authority.app, name="authority")
    app.add_typer(cli_entry.app, name="entry")
    app.add_typer(cli_federation.app, name="federation")
    cli_move.register()
    app.add_typer(cli_orchestrator.app, name="orchestrator")
    cli_signer.register()
    app.add_typer(cli_admin.app, name="admin")
    app.command("approve", epilog="Example: retinue-ca approve a-0123456789")(cli_admin.approve)
    app.command("approvals", epilog="Example: retinue-ca approvals")(cli_admin.approvals)
    cli_store.register(app)
    cli_policy.register()


if __name__ != "__main__":  # then the groups would import a second copy of this module
    _register()


def main() -> None:
    """The console script."""
    cliout.run_app(typer.main.get_command(app), "retinue-ca")


if __name__ == "__main__":
    from ca.cli import main as _main

    _main()
