"""`retinue-ca signer`: the process that holds the keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ca.cli import app


def register() -> None:
    """Its command."""
    app.command(epilog="Example: retinue-ca signer --dir /var/lib/retinue-signer --socket /run/retinue-signer.sock --trust-domain prod.example")(signer)


def signer(
    directory: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Its keys (0700) and its log.")],
    socket_file: Annotated[Path, typer.Option("--socket", metavar="SOCKET", help="Where the CA asks.")],
    trust_domain: Annotated[str, typer.Option("--trust-domain", metavar="NAME", help="It signs for this trust domain only.")],
    allow_uid: Annotated[list[int] | None, typer.Option("--allow-uid", metavar="UID", help="User id of the CA; may be repeated. Its own without.")] = None,
    pkcs11: Annotated[Path | None, typer.Option("--pkcs11", metavar="MODULE", help="Root and intermediate keys are in a token, through this library.")] = None,
    token_label: Annotated[str, typer.Option("--token-label", metavar="LABEL", help="The PKCS#11 token.")] = "retinue",
    pin_file: Annotated[Path | None, typer.Option("--pin-file", metavar="FILE", help="A file (0600) with the token's PIN.")] = None,
) -> None:  # fmt: skip
    """Hold the keys of a CA in a process without a network, and sign by profile for the CA's process.

    Make the CA with: retinue-ca init --signer SOCKET. An existing CA's keys are moved by hand: DIR/*.key (not server.key).
    """
    import signal
    import threading

    from ca.keystores import key_place, keys_of
    from ca.serve import harden, notify
    from ca.signer_process import serve
    from identity.names import TrustDomain

    harden(*(() if pkcs11 is not None else (directory, socket_file.absolute().parent)))
    place = key_place(None, pkcs11, token_label, pin_file)
    keys = None if place is None else keys_of(place, directory)
    server = serve(directory, socket_file, TrustDomain(trust_domain), frozenset(allow_uid or [os.geteuid()]), keys)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"ready: signer of {trust_domain} on {socket_file}", flush=True)
    notify("READY=1")
    server.serve_forever()
    server.server_close()
    socket_file.unlink(missing_ok=True)
