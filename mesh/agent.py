"""`retinue-agent`: the command line. Everything it does is in mesh/endpoint.py."""

from __future__ import annotations

import typer

from mesh import daemon
from mesh.command import run_app

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: retinue-agent --state-dir /var/lib/retinue --run-dir /run/retinue")
def agent(
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
    broker: daemon.BrokerOption = None,
    alert: daemon.AlertOption = None,
    log_level: daemon.LogOption = "info",
) -> None:
    """Run this host's part of the mesh: tunnels, firewall and identities, from the signed state of the CA.

    What was verified last is restored from disk and applied before the network is asked. When the agent ends, or
    is killed, traffic goes on under the rules in force; `retinue down` takes everything away.
    """
    daemon.configure_logging(log_level)
    import asyncio

    from mesh.endpoint import AgentConfig, serve

    daemon.harden()
    asyncio.run(serve(AgentConfig(
        state_dir=state_dir, run_dir=run_dir, interface=daemon.check_interface(interface), listen_port=listen_port,
        device=daemon.check_device(device), engine=engine,
        engine_options=daemon.check_engine_options(engine_options), mtu=mtu, clean_on_exit=clean_on_exit, forget_epochs=forget_epochs,
        lease=lease, stale_max=stale_max, broker=broker, alerts=daemon.check_alerts(alert),
    )))  # fmt: skip


def main() -> None:
    """Console script ``retinue-agent``."""
    run_app(app, "retinue-agent")


if __name__ == "__main__":
    main()
