"""`retinue run`: a program as an instance of the mesh."""

from __future__ import annotations

from typing import Annotated

import typer

from identity import cliout
from mesh.cli_node import Instance, RunDir


def register(app: typer.Typer) -> None:
    """Put the command under `app`."""
    app.command(
        context_settings={"allow_interspersed_args": False}, epilog="Example: retinue run --as web -- curl http://api:8080/"
    )(run)


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND [ARG]...", help="The program and its arguments.")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="The workload to be, such as web or shop/api.")],
    instance: Instance = 0,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, help="Seconds to wait until the instance is active here.")] = 15.0,
    no_svid: Annotated[bool, typer.Option("--no-svid", help="Without certificate files.")] = False,
    no_names: Annotated[bool, typer.Option("--no-names", help="Leave /etc/hosts as it is.")] = False,
    run_dir: RunDir = None,
) -> None:
    """Run a program in a network namespace of its own, as an instance that is placed on this host.

    It starts once the instance is active, sees only the mesh, and finds its certificate in SVID_CERT, SVID_KEY and
    SVID_BUNDLE, or asks the SPIFFE Workload API at SPIFFE_ENDPOINT_SOCKET. Its exit status is passed on; signals reach
    it; when it ends, nothing stays behind.

    Its /etc/hosts, seen by nobody else, names the workloads that policy lets it or its neighbours here talk to: shop/api
    is api.shop and api.shop.TRUST-DOMAIN. A name that becomes known later is added within half a minute.
    """
    import asyncio

    from mesh import run as running
    from mesh.local_client import socket_path

    child = running.spawn(command)
    status = asyncio.run(
        running.run_as(child, name, instance, socket_path(run_dir), wait=wait, svid=not no_svid, names=not no_names)
    )
    if status > 128:
        cliout.note(f"{command[0]} ended by signal {status - 128}")
    if status:
        raise typer.Exit(status)
