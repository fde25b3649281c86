"""`retinue run --as NAME -- CMD`: a program in a network namespace of its own, as an instance of the mesh.

    fork -> child: new namespaces, waits     parent: attach /proc/CHILD/ns/net, wait until active, SVID and hosts files
         -> child: mount hosts, exec CMD     parent: forward signals, keep the files fresh, detach at the end

The namespaces (network, mount) are the child's: they end with it, the agent notices (pidfd), and nothing is left after
any kill -9.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from identity.errors import BadInput, NoPrivilege, RetinueError

if TYPE_CHECKING:
    from identity.wire.local import InstanceRef

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
CLONE_NEWNS: Final = 0x00020000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000  # linux/mount.h
_PR_SET_PDEATHSIG: Final = 1
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1
FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH)
_FROM_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH})  # a terminal tells the whole group itself
REFRESH: Final = 30.0  # seconds between two looks at the SVID and the names
HOSTS: Final = "hosts"
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells have it


class CannotRun(BadInput):
    """The command exists but cannot be executed."""

    exit = NOT_EXECUTABLE


class CommandNotFound(CannotRun):
    """No such command."""

    exit = NOT_FOUND


@dataclass(frozen=True, slots=True)
class Child:
    """The waiting process. `go` takes its last instructions; `failed` says why it could not exec (empty: it did)."""

    pid: int
    go: int
    failed: int


def spawn(argv: Sequence[str]) -> Child:
    """Fork a process in a new network namespace that waits for `start`. Raises NoPrivilege, BadInput.

    Call it before there are threads.
    """
    if not argv:
        raise BadInput("usage", "no command to run", hint="retinue run --as NAME -- COMMAND")
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    go_r, go_w = os.pipe2(os.O_CLOEXEC)
    failed_r, failed_w = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            for fd in (ready_r, go_w, failed_r):
                os.close(fd)
            _child(argv, parent, ready_w, go_r, failed_w)
        os._exit(NOT_EXECUTABLE)
    for fd in (ready_w, go_r, failed_w):
        os.close(fd)
    with os.fdopen(ready_r, "rb") as ready:
        answer = ready.read().decode()
    if answer != "ready":
        os.waitpid(pid, 0)
        os.close(go_w)
        os.close(failed_r)
        raise NoPrivilege("run.namespace", f"cannot make a network namespace: {answer or 'the child died'}", hint="run as root (sudo)")
    return Child(pid, go_w, failed_r)


def _child(argv: Sequence[str], parent: int, ready: int, go: int, failed: int) -> NoReturn:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    try:
        if libc.unshare(CLONE_NEWNET | CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        loopback_up()
        # What is mounted here stays here; what the machine mounts later still shows.
        _mount(libc, b"none", b"/", _MS_REC | _MS_SLAVE)
    except OSError as e:
        os.write(ready, (e.strerror or "error").encode())
        os._exit(1)
    os.write(ready, b"ready")
    os.close(ready)
    with os.fdopen(go, "rb") as f:
        told = f.read()
    if not told:
        os._exit(1)  # the parent gave up
    orders = json.loads(told)
    environment = dict(os.environ) | orders["environment"]
    for number in (*FORWARDED, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    doing = "hosts"
    try:
        if orders["hosts"] is not None:
            _mount(libc, os.fsencode(orders["hosts"]), b"/etc/hosts", _MS_BIND)
        doing = "exec"
        os.execvpe(argv[0], list(argv), environment)  # noqa: S606 -- the command the user gave
    except OSError as e:
        os.write(failed, json.dumps([doing, e.errno, e.strerror]).encode())
        os._exit(NOT_FOUND if doing == "exec" and e.errno == errno.ENOENT else NOT_EXECUTABLE)


def _mount(libc: ctypes.CDLL, source: bytes, target: bytes, flags: int) -> None:
    """mount(2) without a type and data. Raises OSError."""
    if libc.mount(source, target, None, ctypes.c_ulong(flags), None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def loopback_up() -> None:
    """Bring `lo` of this namespace up (netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _IFF_UP))


def start(child: Child, environment: Mapping[str, str], hosts: Path | None = None) -> None:
    """Let the child become the program, with `hosts` mounted over /etc/hosts when given. Raises CannotRun."""
    orders = {"environment": dict(environment), "hosts": None if hosts is None else str(hosts)}
    with contextlib.suppress(BrokenPipeError):
        os.write(child.go, json.dumps(orders).encode())
    os.close(child.go)
    with os.fdopen(child.failed, "rb") as f:
        said = f.read()
    if said:
        doing, number, why = json.loads(said)
        if doing == "hosts":
            raise CannotRun("run.hosts", f"cannot give the program its hosts file: {why}", hint="run with --no-names")
        error = CommandNotFound if number == errno.ENOENT else CannotRun
        raise error("run.exec", f"cannot run the command: {why}")


def abandon(child: Child) -> None:
    """End a child that never started, and collect it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child.pid, 0)


def exit_status(status: int) -> int:
    """Exit status for a wait status: 128 + n for signal n."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


async def run_as(
    child: Child, name: str, instance: int, agent_socket: Path, *, wait: float, svid: bool, names: bool = False
) -> int:
    """Attach the waiting child, start it when it is active, and stay until it ends: its exit status.

    `svid`: with certificate files; `names`: with an /etc/hosts of its own.

    Raises what the agent answered, TimedOut ``attach.timeout``, or CannotRun.
    """
    from identity.wire.local import Attach, InstanceRef
    from mesh import hosts_file, svid_files
    from mesh.cli_node import wait_active
    from mesh.local_client import LocalClient

    ref = InstanceRef(name=name, instance=instance)
    directory = svid_files.private_dir(agent_socket.parent, child.pid)
    try:
        async with LocalClient(agent_socket) as agent:
            request = Attach(name=name, instance=instance, netns=f"/proc/{child.pid}/ns/net")
            place = await wait_active(agent, request, wait)
            environment = {"RETINUE_WORKLOAD": name, "RETINUE_ADDRESSES": " ".join(place.addresses)}
            environment |= svid_files.api_environment(agent_socket.parent)
            if svid:
                files = await agent.svid(ref)
                svid_files.write(directory, files)
                environment |= svid_files.environment(directory, files)
            hosts = directory / HOSTS if names else None
            if hosts is not None:
                hosts_file.write(hosts, hosts_file.lines(await agent.snapshot()))
        _forward_signals(child.pid)
        start(child, environment, hosts)
        refresher = asyncio.create_task(_refresh(agent_socket, ref, directory, svid=svid))
        try:
            return await _ended(child.pid)
        finally:
            refresher.cancel()
    except BaseException:
        abandon(child)
        raise
    finally:
        svid_files.remove_dir(directory)
        with contextlib.suppress(RetinueError):
            async with LocalClient(agent_socket) as agent:
                await agent.detach(ref)


def _forward_signals(pid: int) -> None:
    terminal = sys.stdin is not None and sys.stdin.isatty()
    loop = asyncio.get_running_loop()
    for number in FORWARDED:
        if terminal and number in _FROM_TERMINAL:
            loop.add_signal_handler(number, lambda: None)
        else:
            loop.add_signal_handler(number, _kill, pid, number)


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def _ended(pid: int) -> int:
    fd = os.pidfd_open(pid)
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return exit_status(os.waitpid(pid, 0)[1])  # noqa: ASYNC222 -- it has ended: this does not block


async def _refresh(agent_socket: Path, ref: InstanceRef, directory: Path, *, svid: bool = True) -> None:
    """Keep the SVID and hosts files fresh. An agent that does not answer leaves them as they are."""
    from mesh import hosts_file, svid_files
    from mesh.local_client import LocalClient

    hosts = directory / HOSTS
    while True:
        await asyncio.sleep(REFRESH)
        with contextlib.suppress(RetinueError, OSError):
            async with LocalClient(agent_socket) as agent:
                if hosts.exists():
                    hosts_file.append(hosts, hosts_file.lines(await agent.snapshot()))
                if svid:
                    svid_files.write(directory, await agent.svid(ref))
