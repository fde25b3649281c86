"""`retinue rebootstrap`: believe another root, by a fingerprint that a person brought."""

from __future__ import annotations

from typing import Annotated

import typer

from identity import cliout
from identity.cliout import Output
from mesh.cli_node import STATE_DIR, Format, Json, StateDirOpt


def register(app: typer.Typer) -> None:
    """Its command."""
    app.command(epilog="Example: retinue rebootstrap --root-fp 3f5c...e1")(rebootstrap)


def rebootstrap(
    root_fp: Annotated[str, typer.Option("--root-fp", metavar="FINGERPRINT", help="SHA-256 of the new root, as `retinue-ca info` prints it.")],
    ca: Annotated[str | None, typer.Option("--ca", metavar="URL", help="Where the CA is now; the stored address otherwise.")] = None,
    state_dir: StateDirOpt = STATE_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Come back to a CA whose root was replaced while this machine was away, with the keys and the name it has.

    Only for a root that no root known here vouches for; everything else heals by itself. It counts as one recovery.
    Restart the agent afterwards.
    """
    import asyncio

    from mesh.recovery import rebootstrap as run

    done = asyncio.run(run(state_dir, root_fp, ca_url=ca))
    data = {"endpoint": done.endpoint, "root_fingerprint": done.root_fingerprint, "expires": done.svid.not_after}
    cliout.emit(data, Output.JSON if as_json else output, human=lambda: print(f"{done.endpoint} is back under root {done.root_fingerprint}"))
