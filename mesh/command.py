"""Running a typer application: usage errors and exits in the one form all of Retinue's command lines have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import typer
from typer._click.exceptions import ClickException, UsageError

from identity import cliout
from identity.errors import BadInput


def run_app(app: typer.Typer, name: str, *, before: Callable[[], None] | None = None) -> NoReturn:
    """Run it and leave with the documented exit status. `before` runs inside the error mapping, first."""

    def body() -> None:
        if before is not None:
            before()
        try:
            status = app(prog_name=name, standalone_mode=False)
        except UsageError as e:
            where = e.ctx.command_path if e.ctx is not None else name
            raise BadInput("usage", e.format_message(), hint=f"see: {where} --help") from None
        except ClickException as e:
            raise BadInput("usage", e.format_message()) from None
        except typer.Abort:
            raise KeyboardInterrupt from None
        if isinstance(status, int) and status:
            sys.exit(status)

    cliout.run(body)
