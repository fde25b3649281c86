"""Processes of a lab: entering namespaces, starting, waiting for readiness, logs, stopping by pid."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from identity.errors import NoPrivilege, NotFound, RetinueError, TimedOut

NETNS_DIR: Final = Path("/run/netns")
CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
LOG_TAIL: Final = 4096  # bytes of a log shown in an error
# Every wait of a lab takes this many times as long: for an emulated machine.
PATIENCE: Final = float(os.environ.get("RETINUE_LAB_PATIENCE", "1"))
_MODULES: Final = {
    "retinue": "mesh.cli", "retinue-agent": "mesh.agent", "retinue-sidecar": "mesh.sidecar",
    "retinue-broker": "mesh.broker", "retinue-engine": "mesh.engine_daemon", "retinue-gateway": "gateway.daemon", "retinue-ca": "ca.cli",
}  # fmt: skip

T = TypeVar("T")


class ProcessFailed(RetinueError):
    """A process of the lab ended, or a command of it failed; the message carries its last words."""

    http, exit = 500, 1


def command(name: str) -> list[str]:
    """The argv of one of our console scripts: the installed one beside this interpreter, else the module itself."""
    script = Path(sys.executable).with_name(name)
    if script.exists():
        return [str(script)]
    return [sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}; from {_MODULES[name]} import main; sys.exit(main())"]


def base_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A small environment for child processes: no proxy, credential or coverage variables leak in by accident."""
    kept = {k: v for k, v in os.environ.items() if k in {"PATH", "HOME", "LANG", "LC_ALL", "TERM", "COVERAGE_PROCESS_START"}}
    kept["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    kept["PYTHONUNBUFFERED"] = "1"
    return kept | dict(extra or {})


def namespace_path(netns: str) -> Path:
    """The file of a named network namespace. Raises NotFound."""
    path = NETNS_DIR / netns
    if not path.exists():
        raise NotFound("lab.netns", f"no network namespace named {netns}")
    return path


def enter(netns: str) -> None:
    """Move the calling thread into a namespace, for good: only for threads made for it. Raises NoPrivilege."""
    fd = os.open(namespace_path(netns), os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, CLONE_NEWNET) != 0:
            raise NoPrivilege("lab.setns", f"cannot enter {netns}: {os.strerror(ctypes.get_errno())}", hint="run as root")
    finally:
        os.close(fd)


def in_netns(netns: str, fn: Callable[[], T]) -> T:
    """Run `fn` on a thread of its own inside a namespace; sockets that it makes stay there. Raises what `fn` raises."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            enter(netns)
            result.append(fn())
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=body, name=f"netns-{netns}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def inside(netns: str | None, argv: Sequence[str]) -> list[str]:
    """The argv that runs `argv` inside a namespace; nsenter executes it, so the pid stays the one we started."""
    return list(argv) if netns is None else ["nsenter", f"--net={namespace_path(netns)}", "--", *argv]


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5) field 22): with the pid it names a process for good."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


class Process:
    """One child of the lab. Output goes to `<log>.out` and `<log>.err`; READY=1 is awaited on its NOTIFY_SOCKET."""

    def __init__(
        self, argv: Sequence[str], *, name: str, log: Path, notify: Path,
        netns: str | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.argv = name, list(argv)
        self.out, self.err = log.with_name(log.name + ".out"), log.with_name(log.name + ".err")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify_path = notify
        notify.unlink(missing_ok=True)
        self._notify.bind(str(notify))
        try:
            with self.out.open("ab") as out, self.err.open("ab") as err:
                self._popen = subprocess.Popen(
                    inside(netns, argv), stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd,
                    env=base_env({"NOTIFY_SOCKET": str(notify), **(env or {})}), start_new_session=True,
                )  # fmt: skip
        except BaseException:
            self._notify.close()
            notify.unlink(missing_ok=True)
            raise
        self.pid = self._popen.pid
        self.started = start_time(self.pid)

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def output(self) -> str:
        """Everything written to standard output so far."""
        return self.out.read_text(errors="replace")

    def tail(self) -> str:
        """The end of its standard error, or else of its output."""
        for path in (self.err, self.out):
            data = path.read_bytes()[-LOG_TAIL:].decode(errors="replace").strip()
            if data:
                return data
        return "(it wrote nothing)"

    def wait_ready(self, timeout: float = 15.0) -> None:
        """Block until READY=1. Raises ProcessFailed when it ended first, TimedOut after `timeout` seconds."""
        deadline = time.monotonic() + timeout * PATIENCE
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(self._notify, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            while True:
                events = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
                if self._notify.fileno() in events:
                    if b"READY=1" in self._notify.recv(65536).split(b"\n"):
                        return
                elif pidfd in events:
                    raise ProcessFailed("lab.process", f"{self.name} ended with status {self._popen.wait()}: {self.tail()}")
                else:
                    raise TimedOut("lab.ready", f"{self.name} was not ready within {timeout:g} s: {self.tail()}")
        finally:
            os.close(pidfd)

    def wait(self, timeout: float = 15.0) -> int:
        """Exit status. Raises TimedOut."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimedOut("lab.process", f"{self.name} still runs after {timeout:g} s") from None

    def send(self, signum: int) -> None:
        """A signal to this process alone; nothing when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signum)

    def stop(self, timeout: float = 5.0) -> int:
        """SIGTERM, then SIGKILL after `timeout` seconds; reaps it and returns the exit status."""
        self.send(signal.SIGTERM)
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return self.kill()
        finally:
            self.close()

    def kill(self) -> int:
        """SIGKILL and reap."""
        self.send(signal.SIGKILL)
        code = self._popen.wait()
        self.close()
        return code

    def close(self) -> None:
        """Release the notify socket; the process is left alone."""
        if self._notify.fileno() != -1:  # once: a successor may listen at the same path
            self._notify.close()
            self._notify_path.unlink(missing_ok=True)


def run(
    argv: Sequence[str], *, netns: str | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None,
    stdin: str | None = None, timeout: float = 30.0, codes: Sequence[int] = (0,),
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """One command to its end, output as text. Raises ProcessFailed for a status not in `codes`, or TimedOut."""
    try:
        done = subprocess.run(
            inside(netns, argv), env=base_env(env), cwd=cwd, capture_output=True, timeout=timeout * PATIENCE, text=True, check=False,
            input=stdin or "",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimedOut("lab.command", f"{Path(argv[0]).name} took longer than {timeout:g} s") from None
    if done.returncode not in codes:
        words = " ".join(Path(a).name if i == 0 else a for i, a in enumerate(argv) if i == 0 or len(a) < 60)
        raise ProcessFailed("lab.command", f"{words}: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-LOG_TAIL:]}")
    return done


def ip_batch(lines: Sequence[str], *, netns: str | None = None) -> None:
    """Several `ip` commands in one process. Raises ProcessFailed with the first complaint."""
    argv = ["ip", *([] if netns is None else ["-n", netns]), "-batch", "-"]
    done = subprocess.run(argv, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessFailed("lab.ip", f"ip: {done.stderr.strip()}")
