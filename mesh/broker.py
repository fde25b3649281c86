"""`retinue-broker`: enters the network namespaces of workloads for an agent that has only CAP_NET_ADMIN.

To enter a namespace takes CAP_SYS_ADMIN, to look at another user's process CAP_SYS_PTRACE. The agent, which speaks with
the network, has neither: it asks this process, which has no network and knows three requests (identity/wire/broker.py).
A taken-over agent gains through it: handles of network namespaces and the addresses of the device of ours in them.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import structlog
import typer

from identity.confine import Bounds, enter
from identity.errors import BadInput, BadState, Bug, NotFound, Refused, RetinueError, Unreachable, from_wire
from identity.wire import parse
from identity.wire.broker import MAX_PACKET, Answer, Configure, LinkAddress, Open, Side, parse_request
from mesh import netns
from mesh.command import run_app
from mesh.daemon import LogOption, configure_logging
from mesh.inside import Direct, Places
from mesh.sd_notify import notify

SOCKET: Final = Path("/run/retinue-broker/broker.sock")
MAX_CALLERS: Final = 16  # at a time; the agent has one to three
PATIENCE: Final = 10.0  # seconds for a request to arrive, and for an answer
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred

log = structlog.get_logger("retinue.broker")


# ---- the agent's side


class Brokered:
    """mesh.inside.Places by way of the broker at `path`. Blocks; a connection a request."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, path: Path) -> int:
        """For mesh.netns.open_with. Raises what the broker says, Unreachable when there is none."""
        _, fds = self._ask(Open(place=str(path)))
        if len(fds) != 1:
            raise Unreachable("broker.answer", "the broker gave no namespace")
        return fds[0]

    def mac(self, place: str) -> str | None:
        return self._ask(LinkAddress(place=place))[0].mac

    def configure(self, side: Side, *, add: bool) -> None:
        self._ask(Configure(side=side, add=add))

    def _ask(self, request: Open | LinkAddress | Configure) -> tuple[Answer, list[int]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as s:
            s.settimeout(PATIENCE)
            try:
                s.connect(str(self.path))
                s.send(request.model_dump_json().encode())
                packet, fds, _, _ = socket.recv_fds(s, MAX_PACKET, 1)
            except OSError as e:
                raise Unreachable(
                    "broker.gone", f"no broker at {self.path}: {e.strerror or 'no answer'}",
                    hint="start retinue-broker, or run the agent as root without --broker",
                ) from None  # fmt: skip
        try:
            for fd in fds:
                os.set_inheritable(fd, False)
            answer = parse(Answer, packet)
            if answer.error is not None:
                raise from_wire(answer.status, answer.error)
        except RetinueError:
            for fd in fds:
                os.close(fd)
            raise
        return answer, list(fds)


def use(path: Path) -> Places:
    """Make this process open namespaces through the broker, and return who works in them."""
    brokered = Brokered(path)
    netns.open_with(brokered.open)
    return brokered


# ---- the broker's side


class Broker:
    """Serves one user. `places` does the work."""

    def __init__(self, listener: socket.socket, uid: int, places: Places | None = None) -> None:
        self._listener, self._uid = listener, uid
        self._places = Direct() if places is None else places
        self._room = threading.BoundedSemaphore(MAX_CALLERS)

    def serve(self) -> None:
        """Until the listener is closed."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(PATIENCE)
                pid, uid, _ = _CREDENTIALS.unpack(
                    connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                )
                if uid not in {0, self._uid}:
                    log.warning("a caller was refused", pid=pid, uid=uid)
                    return
                packet = connection.recv(MAX_PACKET + 1)
                answer, fds = self._answer(packet, pid)
                with contextlib.suppress(OSError):
                    socket.send_fds(connection, [answer.model_dump_json().encode()], fds)
                for fd in fds:
                    os.close(fd)
        except OSError:
            pass  # it went away
        finally:
            self._room.release()

    def _answer(self, packet: bytes, pid: int) -> tuple[Answer, list[int]]:
        try:
            if len(packet) > MAX_PACKET:
                raise BadInput("broker.request", "the request is too large")
            request = parse_request(packet)
            if isinstance(request, Open):
                return Answer(), [open_namespace(netns.path_of(request.place))]
            if isinstance(request, LinkAddress):
                return Answer(mac=self._places.mac(self._foreign(request.place, pid))), []
            self._foreign(request.side.netns, pid)
            self._places.configure(request.side, add=request.add)
            return Answer(), []
        except RetinueError as e:
            return Answer(status=e.http, error=e.as_dict()), []
        except Exception as e:
            log.exception("a request failed")
            return Answer(status=500, error=Bug("bug", f"the broker failed: {type(e).__name__}").as_dict()), []

    @staticmethod
    def _foreign(place: str, pid: int) -> str:
        """Never the namespace of the caller itself: that one it manages with its own privileges."""
        own = os.stat(f"/proc/{pid}/ns/net")
        with netns.opened(place) as fd:
            if os.path.samestat(os.fstat(fd), own):
                raise Refused("netns.own", "that is the network namespace of the agent itself")
        return place


def open_namespace(path: Path) -> int:
    """A descriptor of the network namespace at a path. Nothing else is ever opened for reading: a device or FIFO named
    here would act on that. Raises NotFound, BadInput.
    """
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as e:
        raise NotFound("netns.unknown", f"no network namespace {ascii(str(path))[:80]}: {e.strerror}") from None
    try:
        if os.fstat(handle).st_dev != os.stat("/proc/self/ns/net").st_dev:  # nsfs: no other file is there
            raise BadInput("netns.kind", f"{ascii(str(path))[:80]} is not a network namespace")
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(handle)
    if not netns.is_network(fd):
        os.close(fd)
        raise BadInput("netns.kind", f"{ascii(str(path))[:80]} is not a network namespace")
    return fd


def listen(path: Path, uid: int) -> socket.socket:
    """The socket, for that user alone. Raises BadState."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    old = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        s.bind(str(path))
        os.chown(path, uid, -1)
    except OSError as e:
        s.close()
        raise BadState("broker.socket", f"cannot make {path}: {e.strerror}", hint="choose another --socket") from None
    finally:
        os.umask(old)
    s.listen(MAX_CALLERS)
    return s


def user_id(name: str) -> int:
    """A user's number by name or number. Raises BadInput."""
    try:
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise BadInput("broker.user", f"there is no user {ascii(name)[:40]}", hint="give the user the agent runs as") from None


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: retinue-broker --user retinue   (then: retinue-agent --broker /run/retinue-broker/broker.sock)")
def broker(
    user: Annotated[str, typer.Option(metavar="USER", help="The user the agent runs as; nobody else is answered.")],
    path: Annotated[Path, typer.Option("--socket", metavar="PATH", help="Where to listen.")] = SOCKET,
    log_level: LogOption = "info",
) -> None:
    """Enter network namespaces for an agent that runs without the privilege to.

    Needs CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_NET_ADMIN, and no network.
    """
    configure_logging(log_level)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    enter(Bounds(read=None))
    listener = listen(path, user_id(user))
    done = threading.Event()
    _on_signals(done.set)
    threading.Thread(target=Broker(listener, user_id(user)).serve, daemon=True).start()
    notify(f"READY=1\nSTATUS=listening at {path}")
    done.wait()
    path.unlink(missing_ok=True)


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def main() -> None:
    """Console script ``retinue-broker``."""
    run_app(app, "retinue-broker")


if __name__ == "__main__":
    main()
