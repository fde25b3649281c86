"""The command line's client of a running CA: JSON over its unix socket, synchronous, standard library only."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

from identity.errors import BadInput, NoPrivilege, TimedOut, Unreachable, from_wire
from identity.wire import Message, parse

M = TypeVar("M", bound=Message)

SOCKET: Final = "admin.sock"
MAX_PATH: Final = 107  # bytes of sun_path without its NUL, unix(7)
DEFAULT_S: Final = 30.0
MAX_LINE: Final = 1 << 20  # bytes


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def socket_path(directory: Path) -> Path:
    """Where the server of a directory listens. Raises BadInput when the kernel could not take the path."""
    path = directory / SOCKET
    if len(os.fsencode(path)) > MAX_PATH:
        raise BadInput(
            "ca.path", f"{path} is too long for a unix socket ({MAX_PATH} bytes)", hint="use a shorter --dir"
        )
    return path


class AdminClient:
    """One CA, by its directory. Every method raises RetinueError only."""

    def __init__(self, directory: Path, *, timeout: float = DEFAULT_S) -> None:
        self.directory = directory
        self._timeout = timeout

    def get(self, path: str, kind: type[M], query: Mapping[str, object] | None = None) -> M:
        """GET, parsed. `query` values that are None are left out."""
        return parse(kind, json.dumps(self.raw("GET", path, query=query)))

    def post(self, path: str, message: Message, kind: type[M], *, timeout: float | None = None) -> M:
        """POST, parsed."""
        return parse(kind, json.dumps(self.raw("POST", path, message, timeout=timeout)))

    def lines(self, path: str, message: Message, *, timeout: float) -> Iterator[dict[str, Any]]:
        """POST; the lines of the answer as they come. `timeout`: seconds between two of them."""
        connection = self._connection(timeout)
        with self._failures(timeout):
            try:
                yield from exchange_lines(connection, self._prefix + path, message)
            finally:
                connection.close()

    _prefix = ""

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        return _Connection(str(socket_path(self.directory)), timeout)

    def raw(
        self, method: str, path: str, message: Message | None = None,
        *, query: Mapping[str, object] | None = None, timeout: float | None = None,
    ) -> Any:  # fmt: skip
        """One exchange; the JSON of the answer."""
        connection = self._connection(timeout or self._timeout)
        with self._failures(timeout or self._timeout):
            try:
                return exchange(connection, method, path, message, query)
            finally:
                connection.close()

    @contextmanager
    def _failures(self, timeout: float) -> Iterator[None]:
        """What can go wrong with a connection, as errors of ours."""
        try:
            yield
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise Unreachable(
                "ca.down",
                f"no CA is running on {self.directory}",
                hint=f"start it: retinue-ca serve --dir {self.directory}",
            ) from None
        except PermissionError:
            raise NoPrivilege(
                "admin.user",
                f"{self.directory / SOCKET} may be used by root and the CA's own user only",
                hint="run it as root",
            ) from None
        except TimeoutError:
            raise TimedOut("ca.slow", f"the CA did not answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable(
                "ca.lost", f"the CA ended the connection ({type(e).__name__})", hint="see its log"
            ) from None


def exchange_lines(connection: http.client.HTTPConnection, path: str, message: Message) -> Iterator[dict[str, Any]]:
    """One request and the objects of its answer, a line each. Raises what the CA answered, OSError, HTTPException."""
    connection.request("POST", path, body=message.model_dump_json().encode(), headers={"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        _answer(response.status, response.read())
    while line := response.readline(MAX_LINE):
        try:
            parsed = json.loads(line)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise Unreachable("ca.answer", "the CA's answer cannot be read")
        yield parsed


def exchange(
    connection: http.client.HTTPConnection, method: str, path: str, message: Message | None, query: Mapping[str, object] | None
) -> Any:
    """One request and the JSON of its answer. Raises what the CA answered, OSError, HTTPException."""
    given = {k: v for k, v in (query or {}).items() if v is not None}
    connection.request(
        method, f"{path}?{urlencode(given)}" if given else path, body=message.model_dump_json().encode() if message else None,
        headers={"Content-Type": "application/json"} if message else {},
    )  # fmt: skip
    response = connection.getresponse()
    return _answer(response.status, response.read())


def _answer(status: int, data: bytes) -> Any:
    try:
        parsed = json.loads(data)
    except ValueError:
        parsed = None
    if status != 200:
        raise from_wire(status, parsed)
    if parsed is None:
        raise Unreachable("ca.answer", "the CA's answer cannot be read")
    return parsed
