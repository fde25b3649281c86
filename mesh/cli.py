"""`retinue`: the root of the command line. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mesh.command import run_app, show_version

# Command groups that live elsewhere: name -> (module, attribute of its typer app, help).
ELSEWHERE = {
    "policy": ("mesh.cli_policy_sign", "app", "Check, test, explain and sign policy files; import foreign ones."),
}


class LazyGroup(TyperGroup):
    """Shows the groups of ELSEWHERE without importing them."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, attribute, text = ELSEWHERE[cmd_name]
        if self._listing:
            return typer.main.get_command(_stub(cmd_name, text))
        import importlib

        group = getattr(importlib.import_module(module), attribute)
        group.rich_markup_mode = None  # help in one form everywhere
        command = typer.main.get_command(group)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_commands(ctx, formatter)
        finally:
            self._listing = False


def _stub(name: str, text: str) -> typer.Typer:
    stub = typer.Typer(name=name, help=text)
    stub.callback()(lambda: None)
    return stub


app = typer.Typer(
    name="retinue", cls=LazyGroup, no_args_is_help=True, rich_markup_mode=None, add_completion=False,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    help="Tunnels that open only between identities that policy permits, and follow the workload.",
    epilog="Start with: retinue demo. Exit status: 0 yes, 1 no, 2 usage, 3 not reachable, 4 no privilege, 5 timeout, 78 bad state.",
)  # fmt: skip


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print the version.")] = False,
) -> None:
    """Nothing before the commands."""


@app.command(epilog="Example: sudo retinue demo --keep")
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab up afterwards, to look around.")] = False,
    pace: Annotated[float, typer.Option("--pace", metavar="SECONDS", min=0, help="Pause after each step, to read along.")] = 0.0,
    clean: Annotated[bool, typer.Option("--clean", help="Remove labs that were left up, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line; the last is the summary.")] = False,
) -> None:
    """Show the product's main job on real packets, in a lab of network namespaces (root)."""
    from mesh.demo import main as demo_main

    chosen = {"--keep": keep, "--clean": clean, "--json": as_json}
    status = demo_main([*(word for word, on in chosen.items() if on), "--pace", str(pace)])
    if status:
        raise typer.Exit(int(status))


def _register() -> None:
    from mesh import cli_flows, cli_node, cli_recovery, cli_run, cli_support

    cli_node.register(app)
    cli_flows.register(app)
    cli_run.register(app)
    cli_recovery.register(app)
    cli_support.register(app)


_register()


def main() -> None:
    """Console script ``retinue``."""
    run_app(app, "retinue")


if __name__ == "__main__":
    main()
