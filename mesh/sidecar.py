"""`retinue-sidecar`: the command line. Everything it does is in mesh/companion.py and mesh/endpoint.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from identity.errors import BadInput
from mesh import daemon
from mesh.command import run_app

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    epilog="Example: retinue-sidecar --ca https://ca.example:8443 --token-file /run/secrets/token --svid-dir /run/svid"
)
def sidecar(
    ca: Annotated[str | None, typer.Option("--ca", metavar="URL", envvar="RETINUE_CA", help="https://HOST:PORT of the CA, for a first start with a token.")] = None,
    token_file: Annotated[
        str | None,
        typer.Option("--token-file", metavar="FILE", envvar="RETINUE_TOKEN_FILE", help="File with the join token; RETINUE_TOKEN instead."),
    ] = None,
    from_agent: Annotated[
        Path | None,
        typer.Option("--from-agent", metavar="SOCKET", envvar="RETINUE_FROM_AGENT", help="The host agent's agent.sock: ask it for a token."),
    ] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", metavar="NAME", envvar="RETINUE_WORKLOAD", help="The service's name, with --from-agent.")
    ] = None,
    underlay: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", envvar="RETINUE_UNDERLAY", help="ADDRESS:PORT[,ADDRESS:PORT] where peers reach it [found out].")
    ] = None,
    ready_port: Annotated[
        int, typer.Option(metavar="PORT", envvar="RETINUE_READY_PORT", min=0, max=65535, help="Port of /readyz and /livez on 127.0.0.1; 0 for none.")
    ] = 15020,
    svid_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", envvar="RETINUE_SVID_DIR", help="Keep cert.pem, key.pem and bundle.pem fresh here.")
    ] = None,
    reload: Annotated[
        str | None, typer.Option(metavar="COMMAND", envvar="RETINUE_RELOAD", help="Command to run when the files changed (no shell).")
    ] = None,
    renew_signal: Annotated[
        str | None, typer.Option(metavar="SIGNAL", envvar="RETINUE_RENEW_SIGNAL", help="Signal for the service when the files changed; needs --pid-file.")
    ] = None,
    pid_file: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="RETINUE_PID_FILE", help="File with the service's process number.")
    ] = None,
    state_dir: daemon.StateDirOption = daemon.STATE_DIR,
    run_dir: daemon.RunDirOption = daemon.RUN_DIR,
    interface: daemon.InterfaceOption = "rtn0",
    listen_port: daemon.PortOption = 51820,
    device: daemon.DeviceOption = "auto",
    engine: daemon.EngineOption = None,
    engine_options: daemon.EngineSwitchOption = None,
    mtu: daemon.MtuOption = 1420,
    lease: daemon.LeaseOption = 30.0,
    stale_max: daemon.StaleOption = 12 * 3600.0,
    clean_on_exit: daemon.CleanOption = False,
    forget_epochs: daemon.ForgetOption = False,
    log_level: daemon.LogOption = "info",
) -> None:  # fmt: skip
    """Run beside one service, in its network namespace, with a tunnel key and an identity of its own.

    At the first start it joins with a token (from a file, RETINUE_TOKEN, or the host's agent); later starts need
    nothing. The service may use the mesh once /readyz answers 200.
    """
    daemon.configure_logging(log_level)
    import asyncio

    from mesh.companion import SidecarConfig, serve_sidecar
    from mesh.endpoint import AgentConfig
    from mesh.svid_files import check_signal

    if (renew_signal is None) != (pid_file is None):
        raise BadInput("usage", "--renew-signal and --pid-file go together")
    daemon.harden()
    agent = AgentConfig(
        state_dir=state_dir, run_dir=run_dir, interface=daemon.check_interface(interface), listen_port=listen_port,
        device=daemon.check_device(device), engine=engine,
        engine_options=daemon.check_engine_options(engine_options), mtu=mtu, clean_on_exit=clean_on_exit, forget_epochs=forget_epochs,
        lease=lease, stale_max=stale_max,
    )  # fmt: skip
    hints = [hint.strip() for hint in underlay.split(",")] if underlay else []
    asyncio.run(serve_sidecar(SidecarConfig(
        agent=agent, ca=ca, token_file=token_file, from_agent=from_agent, workload=workload, underlay=tuple(hints),
        ready_port=ready_port, svid_dir=svid_dir, reload=reload,
        renew_signal=None if renew_signal is None else check_signal(renew_signal), pid_file=pid_file,
    )))  # fmt: skip


def main() -> None:
    """Console script ``retinue-sidecar``."""
    run_app(app, "retinue-sidecar")


if __name__ == "__main__":
    main()
