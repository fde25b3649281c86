"""`retinue support`: a file for whoever helps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from identity import cliout
from identity.cliout import Output
from mesh.cli_node import STATE_DIR, Format, Json, RunDir, StateDirOpt


def register(app: typer.Typer) -> None:
    """Its command."""
    app.command(epilog="Example: sudo retinue support --out support.tar.gz")(support)


def support(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A new file (0600); nothing is overwritten.")] = Path("retinue-support.tar.gz"),
    log: Annotated[list[Path] | None, typer.Option("--log", metavar="FILE", help="The end of this log, too; may be repeated. Without: the journal of our units.")] = None,
    run_dir: RunDir = None, state_dir: StateDirOpt = STATE_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Gather status, doctor, versions, network state and the ends of logs into one file, without keys, tokens and passwords.

    It names hosts, workloads and addresses: it is for people whom you would let see those. Works without a running agent.
    """
    import asyncio

    from mesh.local_client import socket_path
    from mesh.support import bundle

    names = asyncio.run(bundle(state_dir, socket_path(run_dir), log or [], out))
    chosen = Output.JSON if as_json else output
    cliout.emit({"file": str(out), "members": names}, chosen, human=lambda: print(f"{out}: {len(names)} files, secrets removed; read it before you pass it on"))
