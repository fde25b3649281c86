"""What the command lines of `retinue-agent` and `retinue-sidecar` share: options, logging, hardening."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from identity.errors import BadInput

if TYPE_CHECKING:
    from mesh.alerts import Sink

STATE_DIR = Path("/var/lib/retinue")
RUN_DIR = Path("/run/retinue")

StateDirOption = Annotated[
    Path,
    typer.Option(
        "--state-dir", metavar="DIR", envvar="RETINUE_STATE_DIR", help="Keys, certificate and last verified state."
    ),
]
RunDirOption = Annotated[
    Path,
    typer.Option(
        "--run-dir", metavar="DIR", envvar="RETINUE_RUN_DIR", help="Directory of agent.sock and the engine's socket."
    ),
]
InterfaceOption = Annotated[str, typer.Option(metavar="NAME", envvar="RETINUE_INTERFACE", help="Name of the tunnel device.")]
PortOption = Annotated[
    int, typer.Option(metavar="PORT", envvar="RETINUE_LISTEN_PORT", min=1, max=65535, help="UDP port of the tunnel.")
]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", envvar="RETINUE_DEVICE", help="auto, userspace or kernel.")]
EngineOption = Annotated[
    Path | None, typer.Option(metavar="FILE", envvar="RETINUE_ENGINE", help="Path of the retinue-engine program.")
]
EngineSwitchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option", metavar="NAME[=N]",
        help="A switch of the engine, without its dashes: low-power, poll-us=0, no-udp-gso; may be given again. Holds from the engine's next start on.",
    ),
]  # fmt: skip
MtuOption = Annotated[
    int, typer.Option(metavar="BYTES", envvar="RETINUE_MTU", min=1280, max=65535, help="MTU of the tunnel device.")
]
LeaseOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", envvar="RETINUE_LEASE", min=1, help="Seconds without a heartbeat until `fence: strict` instances end."
    ),
]
StaleOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", envvar="RETINUE_STALE_MAX", min=1, help="Seconds without a heartbeat until all instances end."
    ),
]
LogOption = Annotated[
    str, typer.Option("--log-level", metavar="LEVEL", envvar="RETINUE_LOG_LEVEL", help="debug, info, warning or error.")
]
CleanOption = Annotated[
    bool,
    typer.Option(
        "--clean-on-exit", envvar="RETINUE_CLEAN_ON_EXIT", help="Take the data plane down at the end."
    ),
]
BrokerOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", envvar="RETINUE_BROKER", help="Socket of retinue-broker, which enters namespaces for an agent that is not root."
    ),
]
AlertOption = Annotated[
    list[str] | None,
    typer.Option(
        "--alert", metavar="NAME=URL", envvar="RETINUE_ALERT",
        help="Where alerts of a policy's sink go (page, log, webhook): https://..., unix:/PATH, syslog:/dev/log or syslog://HOST:PORT.",
    ),
]  # fmt: skip
ForgetOption = Annotated[
    bool,
    typer.Option(
        "--forget-epochs", help="Give up a damaged epochs.json (older placements could then be replayed)."
    ),
]


def check_alerts(given: list[str] | None) -> tuple[Sink, ...]:
    """The sinks of ``--alert``. Raises BadInput."""
    from mesh.alerts import Sink

    found = tuple(Sink.parse(one) for one in given or ())
    if len({sink.name for sink in found}) != len(found):
        raise BadInput("alert.sink", "one alert sink is given twice", hint="give each of page, log and webhook once")
    return found


def check_engine_options(given: list[str] | None) -> tuple[str, ...]:
    """The words of ``--engine-option`` as the engine's command line has them. Raises BadInput."""
    for word in given or ():
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}(=[0-9]{1,5})?", word):
            raise BadInput("usage", f"not a switch of the engine: {ascii(word)[:40]}",
                           hint="its name without dashes, such as low-power or poll-us=0; see retinue-engine --help")  # fmt: skip
    return tuple(f"--{word}" for word in given or ())


def configure_logging(level: str) -> None:
    """Structlog to stderr: one line of JSON an event, or plain columns on a terminal. Raises BadInput."""
    import logging

    import structlog

    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise BadInput(
            "usage", f"not a log level: {ascii(level)[:20]}", hint="use debug, info, warning or error"
        )
    terminal = sys.stderr.isatty()
    final: Any = (
        structlog.dev.ConsoleRenderer(colors=False) if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            final,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def check_device(device: str) -> Any:
    """Raises BadInput unless it is a known choice."""
    if device not in {"auto", "userspace", "kernel"}:
        raise BadInput("usage", f"not a device: {ascii(device)[:20]}", hint="use auto, userspace or kernel")
    return device


def check_interface(name: str) -> str:
    """A kernel interface name (15 bytes, no slash, no space). Raises BadInput."""
    if (
        not 1 <= len(name.encode()) <= 15
        or "/" in name
        or not name.isprintable()
        or " " in name
        or name in {".", ".."}
    ):
        raise BadInput(
            "usage", f"not an interface name: {ascii(name)[:40]}", hint="at most 15 characters, such as rtn0"
        )
    return name


def harden() -> None:
    """No core dumps and no ptrace by other users: keys are in this process (prctl(2), PR_SET_DUMPABLE). No system calls
    that it does not need, for it and what it starts (identity/confine.py).
    """
    import ctypes
    import resource

    from identity.confine import Bounds, enter

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)
    enter(Bounds(read=None))
