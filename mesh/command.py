"""Running a typer application: usage errors and exits in the one form all of Retinue's command lines have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import typer

from identity import cliout


def run_app(app: typer.Typer | Callable[..., Any], name: str, *, before: Callable[[], None] | None = None) -> NoReturn:
    """Run it and leave with the documented exit status. `before` runs inside the error mapping, first."""
    command = typer.main.get_command(app) if isinstance(app, typer.Typer) else app
    cliout.run_app(command, name, before=before)


def show_version(wanted: bool) -> None:
    """Callback of ``--version``."""
    if wanted:
        from importlib.metadata import version

        print(f"retinue {version('retinue')}")
        raise typer.Exit
