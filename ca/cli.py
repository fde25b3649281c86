"""`retinue-ca`: make a control plane, run it, administer it. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, BadState

if TYPE_CHECKING:
    from ca.client import AdminClient
    from identity.wire.admin import PolicyFileIn, PolicyReply, Workload

DEFAULT_DIR = Path("/var/lib/retinue-ca")
MAX_POLICY = 12 << 20  # bytes of a file
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


def _client(directory: Path, timeout: float = 30.0) -> AdminClient:
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


def _format(output: Output, as_json: bool) -> Output:
    return Output.JSON if as_json else output


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

    cliout.emit(data, _format(output, as_json), human=human)


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
    chosen = _format(output, as_json)

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

    found = _client(directory).get("/v1/info", Info)
    cliout.emit(
        found, _format(output, as_json), columns=("what", "value"), rows=list(found.model_dump().items())
    )


# ---- backup


@app.command(epilog="Example: retinue-ca backup /backups/ca-2031-02-11.db")
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; nothing is overwritten.")],
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Copy the registry to one file (0600) while the server runs.

    The file holds no private key: keep a copy of the directory's *.key, *.pem and authority.json in a safe place as well.
    """
    import time

    from ca import backup as backups

    done = backups.backup(directory, file, int(time.time()))

    def human() -> None:
        print(f"{done.file}: {done.trust_domain} at revision {done.revision}, {done.bytes} bytes")
        cliout.note("no private key is in it: copy the directory's *.key, *.pem and authority.json as well")

    cliout.emit(asdict(done), _format(output, as_json), human=human)


@app.command(epilog="Example: retinue-ca restore /backups/ca-2031-02-11.db --new-timeline")
def restore(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A file that retinue-ca backup made.")] = None,
    new_timeline: Annotated[bool, typer.Option("--new-timeline", help="Give up what was acknowledged after the backup.")] = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="PostgreSQL: the database was put back with its own tools.")] = False,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Put a backup in the place of the database, with the server stopped. The old database is kept beside it.

    The directory must hold the authority's files. With --new-timeline, every record is signed anew above all that was
    given out before, and endpoints follow to the restored state; what was done after the backup must be done again.
    """
    import time

    from ca import backup as backups
    from ca.serve import sole

    with sole(directory):
        if in_place and file is None and new_timeline:
            done = backups.continue_in_place(directory, int(time.time()))
        elif file is not None and not in_place:
            done = backups.restore(directory, file, int(time.time()), new_timeline=new_timeline)
        else:
            raise BadInput("restore.what", "restore a FILE, or with --in-place --new-timeline what is in PostgreSQL")

    def human() -> None:
        lost = "an unknown number of" if done.lost is None else str(done.lost)
        print(f"{done.trust_domain} restored at revision {done.revision}, timeline {done.timeline}; {lost} changes are lost")
        if done.replaced:
            print(f"the database before is kept as {done.replaced}")
        for host in done.revoked_hosts:
            print(f"was revoked, is not now: retinue-ca host revoke {cliout.clean(host)}")
        for key in done.revoked_instances:
            name, _, number = key.rpartition("/")
            print(f"was revoked, is not now: retinue-ca workload revoke {cliout.clean(name)} --instance {number}")
        for key in (*done.gone_hosts, *done.gone_instances):
            print(f"was added since the backup, is gone: {cliout.clean(key)}")
        if done.lost != 0 and not done.compared:
            print("the database before cannot be read: check for revocations made since the backup, and make them again")
        cliout.note(f"next: retinue-ca serve --dir {directory}")

    cliout.emit(asdict(done), _format(output, as_json), human=human)


# ---- tokens


@token_app.command(
    "create", epilog="Example: retinue-ca token create --host web-1 --ttl 600 --out web-1.token"
)
def token_create(
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="For the host of this name.")] = None,
    workload: Annotated[str | None, typer.Option("--workload", "--sidecar", metavar="NAME", help="For a sidecar of this workload.")] = None,
    ttl: Annotated[int, typer.Option(metavar="SECONDS", min=1, max=86400, help="Seconds until it expires.")] = 600,
    replace: Annotated[bool, typer.Option("--replace", help="The host may be enrolled already: it gets new keys.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the token to this file (0600), not to the terminal.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make a join token. It is a secret, good once, and shown this once."""
    from identity.keys import write_secret
    from identity.wire.admin import Token, TokenCreate

    request = TokenCreate(host=host, workload=workload, ttl=ttl, replace=replace)
    made = _client(directory).post("/v1/tokens", request, Token)
    data: dict[str, Any] = made.model_dump()
    if out is not None:
        try:
            write_secret(out, made.token.encode() + b"\n")
        except OSError as e:
            raise BadInput(
                "token.file", f"cannot write {out}: {e.strerror}", hint="the token is lost; make another"
            ) from None
        data["token"] = None
        data["file"] = str(out)

    def human() -> None:
        if out is None:
            print(made.token)
        cliout.note(f"for {made.kind} {made.endpoint}, good for {ttl} s, once")
        cliout.note(f"next: retinue enroll --ca https://HOST:PORT --token-file {out or '-'}")

    cliout.emit(data, _format(output, as_json), human=human)


# ---- hosts


@host_app.command("list", epilog="Example: retinue-ca host list -o json")
def host_list(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every host and sidecar that is or was enrolled."""
    from identity.wire.admin import HostList

    found = _client(directory).get("/v1/hosts", HostList).hosts
    rows = [
        (
            h.name,
            h.kind,
            h.state,
            "yes" if h.connected else "no",
            h.revision,
            ", ".join(h.underlay),
            _when(h.svid_expires),
        )
        for h in found
    ]
    cliout.emit(found, _format(output, as_json),
                columns=("name", "kind", "state", "connected", "revision", "underlay", "svid until"), rows=rows)  # fmt: skip


@host_app.command("revoke", epilog="Example: retinue-ca host revoke web-1")
def host_revoke(
    name: Name, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """Revoke a host with its sidecars: certificates, tunnel keys, placements. Its workloads become unplaced."""
    from identity.wire.admin import Host, HostRef

    done = _client(directory).post("/v1/hosts/revoke", HostRef(name=name), Host)
    cliout.emit(done, _format(output, as_json), human=lambda: print(f"{cliout.clean(done.name)} is revoked"))


# ---- workloads


@workload_app.command(
    "add", epilog="Example: retinue-ca workload add shop/api --host web-1 --label role=api --label env=prod"
)
def workload_add(
    name: Name,
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="Place it there; without, a sidecar or a move places it.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="A certified label; repeat it.")] = None,
    fence: Annotated[str, typer.Option(metavar="FENCE", help="available, or strict: goes dark when the CA is not heard.")] = "available",
    replica: Annotated[bool, typer.Option("--replica", help="Another instance of a workload that exists.")] = False,
    ends_at: Annotated[str | None, typer.Option("--ends-at", metavar="TIME|+DURATION", help="When it is over: 2031-02-11T08:00:00Z, or +30m, +8h, +7d.")] = None,
    ends_with: Annotated[str | None, typer.Option("--ends-with", metavar="WORKLOAD", help="It is over when this workload has no instance left.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Create an instance of a workload identity and place it."""
    from ca.cli_entry import parse_end
    from identity.labels import parse_labels
    from identity.wire.admin import Workload, WorkloadAdd

    request = WorkloadAdd(
        name=name, host=host, labels=parse_labels(label or ()), fence=_fence(fence), replica=replica, ends_with=ends_with,
        **parse_end(ends_at),
    )  # fmt: skip
    show_workload(_client(directory).post("/v1/workloads", request, Workload), _format(output, as_json))


def _fence(text: str) -> Literal["available", "strict"]:
    if text == "available":
        return "available"
    if text == "strict":
        return "strict"
    raise BadInput("workload.fence", f"not a fence: {ascii(text)[:40]}", hint="use available or strict")


@workload_app.command("list", epilog="Example: retinue-ca workload list -o jsonl")
def workload_list(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every instance: where it is, at which epoch, with which addresses."""
    from identity.wire.admin import WorkloadList

    found = _client(directory).get("/v1/workloads", WorkloadList).workloads
    cliout.emit(found, _format(output, as_json), columns=_WORKLOAD, rows=[_workload_row(w) for w in found])


_WORKLOAD = ("name", "instance", "state", "host", "epoch", "addresses", "labels", "ends")


def _workload_row(w: Workload) -> tuple[object, ...]:
    labels = " ".join(f"{k}={v}" for k, v in w.labels.items())
    ends = " or ".join(t for t in (w.ends_at and _when(w.ends_at), w.ends_with and f"with {w.ends_with}") if t)
    return (w.name, w.instance, w.state, w.host, w.epoch, " ".join(w.addresses), labels, ends or "never")


def show_workload(w: Workload, output: Output) -> None:
    """One instance."""
    cliout.emit(w, output, columns=_WORKLOAD, rows=[_workload_row(w)])


@workload_app.command("revoke", epilog="Example: retinue-ca workload revoke shop/api --instance 1")
def workload_revoke(
    name: Name,
    instance: Instance = 0,
    directory: Dir = DEFAULT_DIR,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Revoke one instance for ever; open connections of it are cut everywhere."""
    from identity.wire.admin import Workload, WorkloadRef

    done = _client(directory).post(
        "/v1/workloads/revoke", WorkloadRef(name=name, instance=instance), Workload
    )
    show_workload(done, _format(output, as_json))


# ---- policy


@policy_app.command("apply", epilog="Example: retinue-ca policy apply shop.yaml --dry-run")
def policy_apply(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Policy files; together they are the policy.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, test and diff it; change nothing.")] = False,
    author: Annotated[str, typer.Option(metavar="NAME", help="Who wrote it, for the history.")] = "",
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Put a policy in force, when its own tests pass. Prints the pairs that gain and lose."""
    from identity.wire.admin import PolicyApply, PolicyReply

    texts, parts = policy_files(files)
    request = PolicyApply(files=texts, dry_run=dry_run, author=author, parts=parts)
    done = _client(directory).post("/v1/policy", request, PolicyReply, timeout=120)

    def human() -> None:
        print_difference(done.gained, done.lost)
        print(
            f"{'would be' if not done.applied else 'in force:'} revision {done.revision}, digest {done.digest[:16]}"
        )

    cliout.emit(done, _format(output, as_json), human=human)


def policy_files(files: list[Path]) -> tuple[list[PolicyFileIn], list[str]]:
    """Policy files as they are, or the files and signed parts of a bundle. Raises BadInput."""
    from identity.wire.admin import PolicyFileIn
    from policy.bundle import is_bundle, read_bundle

    texts = [_read(f) for f in files]
    if any(map(is_bundle, texts)):
        if len(files) != 1:
            raise BadInput("bundle.alone", "a signed bundle stands alone", hint="give the bundle only")
        found = read_bundle(str(files[0]), texts[0])
        return [PolicyFileIn(name=name, text=text) for name, text in found.files], found.texts()
    # The digest covers names: what a file is called counts, not where it lies, unless two are called the same.
    plain = len({f.name for f in files}) == len(files)
    return [PolicyFileIn(name=f.name if plain else f.as_posix(), text=t) for f, t in zip(files, texts, strict=True)], []


def print_difference(gained: list[dict[str, Any]], lost: list[dict[str, Any]]) -> None:
    """Pairs that gain and lose, for people."""
    for sign, pairs in (("+", gained), ("-", lost)):
        for pair in pairs:
            print(f"{sign} {pair['src']} -> {pair['dst']}  {pair['ports']}")
    if not gained and not lost:
        print("no pair gains or loses anything")


def _read(path: Path) -> str:
    from policy.texts import decode

    try:
        with path.open("rb") as f:
            data = f.read(MAX_POLICY + 1)
    except OSError as e:
        raise BadInput("policy.file", f"cannot read {path}: {e.strerror}", hint="name policy files, or one signed bundle") from None
    if len(data) > MAX_POLICY:
        raise BadInput("policy.file", f"{path} is larger than {MAX_POLICY} bytes", hint="split the policy into files by scope")
    return decode(data, str(path))


@policy_app.command("show", epilog="Example: retinue-ca policy show --revision 3")
def policy_show(
    revision: Annotated[int | None, typer.Option(metavar="N", min=1, help="An older revision.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write its files to this folder as well.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """The files of the policy in force, or of an older revision."""
    from identity.wire.admin import PolicyReply

    found = _client(directory).get("/v1/policy", PolicyReply, {"revision": revision})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for file in found.files:
            (out / Path(file.name).name).write_text(file.text)

    def human() -> None:
        _policy_head(found)
        for file in found.files:
            print(f"# ---- {cliout.clean(file.name)}")
            print("\n".join(cliout.clean(line) for line in file.text.splitlines()))

    cliout.emit(found, _format(output, as_json), human=human)


def _policy_head(found: PolicyReply) -> None:
    print(
        f"# revision {found.revision}, {_when(found.issued)}, by {cliout.clean(found.author)}, digest {found.digest}"
    )


@policy_app.command("history", epilog="Example: retinue-ca policy history")
def policy_history(
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """Every revision, newest first."""
    found = _client(directory).raw("GET", "/v1/policy/history")["revisions"]
    cliout.emit(found, _format(output, as_json), columns=("revision", "issued", "author", "how", "digest"),
                rows=[(r["revision"], _when(r["issued"]), r["author"], r["kind"], r["digest"]) for r in found])  # fmt: skip


@app.command(epilog="Example: retinue-ca explain shop/web shop/api 8080")
def explain(
    src: Annotated[str, typer.Argument(metavar="SRC", help="The workload that asks; or the word identity.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked, or whose identity it is.")],
    port: Annotated[int | None, typer.Argument(metavar="PORT", help="A port of --proto.")] = None,
    proto: Annotated[str, typer.Option(metavar="PROTO", help="tcp, udp, sctp, icmp or a number.")] = "tcp",
    instance: Instance = 0,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Why one workload may or may not reach another, and what would change it.

    retinue-ca explain identity NAME: who has that identity, by which proof, since when and until when.
    """
    if src == "identity" and port is None:
        from ca.cli_entry import explain_identity

        explain_identity(_client(directory), dst, instance, _format(output, as_json))
        return
    from identity.wire.admin import ExplainReply

    found = _client(directory).get(
        "/v1/explain", ExplainReply, {"src": src, "dst": dst, "proto": proto, "port": port}
    )

    def human() -> None:
        print(f"{found.verdict.upper()}  {cliout.clean(found.reason)}")
        if found.audited:
            print(f"  audit: will be denied by {cliout.clean(str(found.would_deny))} when the audit ends")
        for one in found.conditions:
            print(f"  limit: {cliout.clean(one)}")
        for miss in found.near_misses:
            print(f"  nearly: {cliout.clean(miss)}")
        if found.smallest_change:
            print(f"  would flip it: {cliout.clean(found.smallest_change)}")

    cliout.emit(found, _format(output, as_json), human=human)


# ---- audit


@audit_app.command("list", epilog="Example: retinue-ca audit list --subject shop/api/0 -o jsonl")
def audit_list(
    subject: Annotated[str | None, typer.Option(metavar="NAME", help="Only entries about this.")] = None,
    after: Annotated[int, typer.Option(metavar="N", min=0, help="Only entries after this number.")] = 0,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many.")] = 1000,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Who did what, when, and with which outcome, oldest first."""
    query = {"subject": subject, "after": after, "limit": limit}
    found = _client(directory).raw("GET", "/v1/audit", query=query)["entries"]
    cliout.emit(found, _format(output, as_json), columns=("seq", "at", "actor", "action", "subject", "outcome"),
                rows=[(e["seq"], _when(e["at"]), e["actor"], e["action"], e["subject"], e["outcome"]) for e in found])  # fmt: skip


@audit_app.command("verify", epilog="Example: retinue-ca audit verify --head 4711:HASH")
def audit_verify(
    head: Annotated[str | None, typer.Option(metavar="SIZE:HASH", help="A head noted earlier: the log must still continue it.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make the whole log again from its entries and compare. Note the head it prints, and give it next time."""
    size, _, root = (head or ":").partition(":")
    if head is not None and not (size.isdigit() and root):
        raise BadInput("log.head", f"not a head of the log: {ascii(head)[:100]}", hint="write SIZE:HASH, as audit verify prints it")
    query = {"size": size, "root": root} if head is not None else {}
    found = _client(directory, 300.0).raw("GET", "/v1/audit/verify", query=query)
    cliout.emit(
        found,
        _format(output, as_json),
        human=lambda: print(f"{found['size']} entries hold, head {found['size']}:{found['root']}"),
    )


def _when(seconds: int) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


client, output_of, when = _client, _format, _when  # for the command groups in modules of their own


def _register() -> None:
    from ca import (
        cli_authority,
        cli_entry,
        cli_federation,
        cli_host,
        cli_log,
        cli_policy,
        cli_signer,
        cli_store,
    )

    app.add_typer(cli_authority.app, name="authority")
    app.add_typer(cli_entry.app, name="entry")
    cli_host.register()
    app.add_typer(cli_federation.app, name="federation")
    from ca import cli_move

    cli_move.register()
    from ca import cli_orchestrator

    app.add_typer(cli_orchestrator.app, name="orchestrator")
    cli_signer.register()
    from ca import cli_admin

    app.add_typer(cli_admin.app, name="admin")
    app.command("approve", epilog="Example: retinue-ca approve a-0123456789")(cli_admin.approve)
    app.command("approvals", epilog="Example: retinue-ca approvals")(cli_admin.approvals)
    cli_log.register(audit_app)
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
