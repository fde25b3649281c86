"""`retinue-ca audit watch` and `audit prove`: what the transparency log says, checked here and not only asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, client, output_of
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, NotVerified


def register(app: typer.Typer) -> None:
    """Hang the commands into the audit group."""
    app.command("watch", epilog="Example: retinue-ca audit watch shop/api --state watch-shop-api.json")(watch)
    app.command("prove", epilog="Example: retinue-ca audit prove --certificate chain.pem")(prove)


def watch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A workload, an instance, a host or a SPIFFE ID.")],
    state: Annotated[Path | None, typer.Option("--state", metavar="FILE", help="Remember the tree between runs; later entries only.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop at the newest head.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How often to look.")] = 5.0,
    directory: Dir = DEFAULT_DIR,
) -> None:  # fmt: skip
    """Stream every certificate, placement and act about a name, one JSON object a line.

    The whole log is read and its tree made anew: an entry that was left out, changed or put in later ends it with status 1.
    """
    from ca import watch as watching

    monitor = watching.Monitor(watching.load(state) if state is not None else None)
    while True:
        found: dict[str, Any] = client(directory).raw("GET", "/v1/log", query={"first": monitor.size, "limit": watching.BATCH})
        if found["size"] > monitor.size and not found["entries"]:
            raise NotVerified("log.gap", f"the log leaves out entry {monitor.size}")
        for entry in monitor.take(map(watching.entry_of, found["entries"])):
            if watching.concerns(entry, name):
                print(json.dumps(watching.told(entry)), flush=True)
        if monitor.size < found["size"]:
            continue
        monitor.check(found["size"], found["root"])
        if state is not None:
            watching.save(state, monitor.seen)
        if once:
            cliout.note(f"{monitor.size} entries hold, head {monitor.size}:{monitor.root}")
            return
        time.sleep(every)


def prove(
    leaf: Annotated[str | None, typer.Option("--leaf", metavar="HASH", help="A leaf hash.")] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", metavar="FILE", help="A certificate of this CA (PEM).")] = None,
    record: Annotated[Path | None, typer.Option("--record", metavar="FILE", help="A signed record, as an endpoint keeps it.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Prove that something is in the log: its entry, place and path, verified here against the signed head."""
    from identity.merkle import verify_inclusion

    wanted = _leaf(leaf, certificate, record)
    found: dict[str, Any] = client(directory).raw("GET", "/v1/log/proof", query={"leaf": wanted})
    path = [bytes.fromhex(step) for step in found["path"]]
    verify_inclusion(bytes.fromhex(wanted), found["index"], found["size"], path, bytes.fromhex(found["root"]))

    def human() -> None:
        print(f"entry {found['index']} of {found['size']}: {found['entry']['kind']} {cliout.clean(found['entry']['subject'])}")
        print(f"proved under head {found['size']}:{found['root']}")

    cliout.emit(found, output_of(output, as_json), human=human)


def _leaf(leaf: str | None, certificate: Path | None, record: Path | None) -> str:
    from identity import certs
    from identity.transparency import about_certificate, certificate_leaf, record_leaf

    if sum(x is not None for x in (leaf, certificate, record)) != 1:
        raise BadInput("log.what", "one of --leaf, --certificate and --record says what to prove")
    if leaf is not None:
        return leaf.strip().lower()
    try:
        if record is not None:
            return record_leaf(record.read_text("ascii").strip()).hex()
        assert certificate is not None
        shown = certs.parse_chain(certificate.read_text("ascii"))[0]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput("log.file", f"cannot read that file: {getattr(e, 'strerror', None) or 'not text'}") from None
    kind = certs.claimed_id(shown).kind
    profile = {"host": "endpoint", "sidecar": "endpoint", "cp": "server", "admin": "admin"}.get(kind, "workload")
    return certificate_leaf(about_certificate(shown, profile)).hex()
