from __future__ import annotations

import asyncio
import json
import os
import socket
import sys

import pytest
import structlog

from identity.errors import BadInput, BadState, TimedOut, Unreachable
from mesh import command, daemon, down, sd_notify
from mesh.health import Health


@pytest.fixture
def logging_restored():
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("logging_restored")
def test_logs_are_lines_of_json_off_a_terminal(capsys):
    daemon.configure_logging("warning")
    log = structlog.get_logger("x")
    log.info("not shown")
    log.warning("shown", name="a\x1b[31m\nb")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["name"] == "a\x1b[31m\nb"
    assert "\x1b" not in line
    with pytest.raises(BadInput):
        daemon.configure_logging("loud")


@pytest.mark.parametrize("name", ["", "a/b", "sixteencharacters", "a b", ".", "..", "a\n"])
def test_interface_names(name):
    with pytest.raises(BadInput):
        daemon.check_interface(name)
    assert daemon.check_interface("rtn0") == "rtn0"


def test_switches_of_the_engine() -> None:
    assert daemon.check_engine_options(None) == ()
    assert daemon.check_engine_options(["no-avx512", "poll-us=0"]) == ("--no-avx512", "--poll-us=0")
    for bad in ("--low-power", "rtn0 x", "", "poll-us=", "poll-us=x", "a\n"):
        with pytest.raises(BadInput):
            daemon.check_engine_options([bad])


def test_devices():
    assert daemon.check_device("kernel") == "kernel"
    with pytest.raises(BadInput):
        daemon.check_device("magic")


def test_hardening_ends_core_dumps():
    code = "import resource, ctypes; from mesh.daemon import harden; harden(); print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3))"
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(0, 0) 0\n"


def test_the_service_manager_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sd_notify.notify("READY=1")
    for address in (str(tmp_path / "notify"), "@retinue-test-" + os.urandom(4).hex()):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not sd_notify.notify("READY=1")  # nobody listens
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.bind(address.replace("@", "\0", 1))
            assert sd_notify.notify("READY=1")
            assert s.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:1:2")
    assert not sd_notify.notify("READY=1")


def test_conditions():
    health = Health()
    health.put("b.warn", "warning", "w")
    health.put("c.info", "info", "i")
    health.put("a.error", "error", "e")
    health.put("b.warn", "warning", "w2")
    assert [(c.code, c.text) for c in health.conditions()] == [("a.error", "e"), ("b.warn", "w2"), ("c.info", "i")]
    health.put("b.other", "info", "o")
    health.clear_prefix("b.", keep={"b.warn"})
    assert "b.warn" in health
    assert "b.other" not in health
    health.clear("b.warn")
    health.clear("b.warn")
    assert "b.warn" not in health


# ---- run_app


def run(app, *argv, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    with pytest.raises(SystemExit) as left:
        command.run_app(app, "x")
    return int(left.value.code or 0)


def test_every_way_out_of_a_command(monkeypatch, capsys):
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def body(how: str) -> None:
        match how:
            case "no":
                raise typer.Exit(1)
            case "abort":
                raise typer.Abort
            case "error":
                raise Unreachable("a.b", "text", hint="do this")
            case "bug":
                raise ZeroDivisionError

    statuses = {how: run(app, how, monkeypatch=monkeypatch) for how in ("yes", "no", "abort", "error", "bug")}
    assert statuses == {"yes": 0, "no": 1, "abort": 130, "error": 3, "bug": 70}
    err = capsys.readouterr().err
    assert "error[a.b]: text\nhint: do this\n" in err
    assert "Traceback" not in err
    assert run(app, monkeypatch=monkeypatch) == 2
    assert "see: x --help" in capsys.readouterr().err


# ---- down


class Gone:
    """An agent that ends, or does not, when told."""

    removes = True

    def __init__(self, path) -> None:
        self.path = path

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def down(self, *, clean: bool) -> None:
        if not self.path.exists():
            raise Unreachable("agent.unreachable", "no")
        if self.removes:
            asyncio.get_running_loop().call_later(0.01, self.path.unlink)


class Plane:
    stopped: list[bool]

    def __init__(self, config) -> None:
        assert config.interface == "rtn0"

    async def stop(self, *, clean: bool) -> None:
        type(self).stopped.append(clean)


async def test_down_waits_for_the_agent_or_does_it_itself(tmp_path, private_dir, monkeypatch):
    monkeypatch.setattr(down, "LocalClient", Gone)
    monkeypatch.setattr("mesh.dataplane.DataPlane", Plane)
    Plane.stopped = []
    path = tmp_path / "agent.sock"
    for clean in (True, False):
        path.write_text("")
        assert "the agent ended" in await down.take_down(path, private_dir, "rtn0", clean=clean)
        assert not path.exists()
    assert "no agent was running" in await down.take_down(path, private_dir, "rtn0", clean=True)
    assert "no agent was running" in await down.take_down(path, tmp_path / "none", "rtn0", clean=True)
    assert Plane.stopped == [True, True]
    with pytest.raises(Unreachable):
        await down.take_down(path, private_dir, "rtn0", clean=False)
    private_dir.chmod(0o755)
    with pytest.raises(BadState):
        await down.take_down(path, private_dir, "rtn0", clean=True)
    path.write_text("")
    monkeypatch.setattr(Gone, "removes", False)
    monkeypatch.setattr(down, "WAIT", 0.1)
    with pytest.raises(TimedOut):
        await down.take_down(path, private_dir, "rtn0", clean=True)
