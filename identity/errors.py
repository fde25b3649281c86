"""The one error tree: every refusal a person or a peer can meet.

    RetinueError
    +- BadInput          the request itself is wrong            exit 2   HTTP 400
    |  +- BadPolicy      a policy file, with file:line:column   exit 2   HTTP 400
    +- Refused           understood, and the answer is no       exit 1   HTTP 403
    |  +- NotVerified    signature, chain, proof, epoch         exit 1   HTTP 403
    +- NotFound          an unknown name                        exit 1   HTTP 404
    +- Conflict          taken name, lost race, wrong state     exit 1   HTTP 409
    +- Unreachable       no daemon, not enrolled                exit 3   HTTP 503
    +- NoPrivilege       root, capability or device missing     exit 4   HTTP 403
    +- TimedOut          no answer in the stated time           exit 5   HTTP 504
    +- BadState          a damaged or unsafe state file         exit 78  HTTP 500
    +- Bug               an invariant broke                     exit 70  HTTP 500

`code` is stable and documented (docs/reference/errors.md is generated from the calls); `hint` names the next
command. Messages never carry a secret.
"""

from __future__ import annotations

from typing import Any, ClassVar

EXIT_OK = 0


class RetinueError(Exception):
    """Base of every error shown to a user.

    code:    stable dotted identifier, e.g. ``token.used``
    message: what failed and why, one sentence
    hint:    what to do next, or empty
    """

    http: ClassVar[int] = 500
    exit: ClassVar[int] = 70

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def as_dict(self) -> dict[str, Any]:
        """The JSON form used on the wire and by ``-o json``; `exit` only where the HTTP status leaves it open."""
        out: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.hint:
            out["hint"] = self.hint
        if self.exit != _by_status(self.http).exit:
            out["exit"] = self.exit
        return out


class BadInput(RetinueError):
    http, exit = 400, 2


class BadPolicy(BadInput):
    """A policy file that cannot be accepted; position is 1-based, 0 when unknown."""

    def __init__(
        self, code: str, message: str, *, file: str = "<policy>", line: int = 0, column: int = 0, hint: str = ""
    ) -> None:
        super().__init__(code, message, hint=hint)
        self.file, self.line, self.column = file, line, column

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}" if self.line else f"{self.file}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "file": self.file, "line": self.line, "column": self.column}


class Refused(RetinueError):
    http, exit = 403, 1


class NotVerified(Refused):
    """A signature, certificate chain, proof of possession or epoch did not hold."""


class NotFound(RetinueError):
    http, exit = 404, 1


class Conflict(RetinueError):
    http, exit = 409, 1


class Unreachable(RetinueError):
    http, exit = 503, 3


class NoPrivilege(RetinueError):
    http, exit = 403, 4


class TimedOut(RetinueError):
    http, exit = 504, 5


class BadState(RetinueError):
    http, exit = 500, 78


class Bug(RetinueError):
    http, exit = 500, 70


_BY_HTTP: dict[int, type[RetinueError]] = {
    400: BadInput, 403: Refused, 404: NotFound, 409: Conflict, 503: Unreachable, 504: TimedOut
}  # fmt: skip

# Kinds that share their HTTP status with another one, by the exit status that goes over the wire.
_BY_EXIT: dict[tuple[int, int], type[RetinueError]] = {
    (kind.http, kind.exit): kind for kind in (NoPrivilege, BadState)
}  # fmt: skip


def _by_status(status: int) -> type[RetinueError]:
    return _BY_HTTP.get(status, Unreachable if status == 429 else Bug)


def from_wire(status: int, body: Any) -> RetinueError:
    """The error a server answered with, as an exception on the client's side.

    `body` is whatever JSON came back; anything unreadable becomes ``api.unexpected``.
    """
    cls = _by_status(status)
    if isinstance(body, dict) and isinstance(body.get("code"), str) and isinstance(body.get("message"), str):
        hint = body.get("hint")
        if type(body.get("exit")) is int:
            cls = _BY_EXIT.get((status, body["exit"]), cls)
        if cls is BadInput and isinstance(body.get("line"), int):
            column = body.get("column", 0)
            return BadPolicy(
                body["code"], body["message"], file=str(body.get("file", "<policy>")), line=body["line"],
                column=column if isinstance(column, int) else 0, hint=hint if isinstance(hint, str) else "",
            )  # fmt: skip
        return cls(body["code"], body["message"], hint=hint if isinstance(hint, str) else "")
    return cls("api.unexpected", f"the server answered HTTP {status} without a readable reason")
