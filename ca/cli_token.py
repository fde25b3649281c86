"""`retinue-ca token`: how a host or sidecar gets in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, client, output_of, token_app
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput


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
    made = client(directory).post("/v1/tokens", request, Token)
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

    cliout.emit(data, output_of(output, as_json), human=human)
