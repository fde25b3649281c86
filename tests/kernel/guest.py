"""The agent of the guest: runs commands for the host, one a TCP connection, on the link between the two.

A request is one JSON line ``{"argv", "env", "cwd", "stdin"}`` or ``{"poweroff": true}``. The answer is a JSON line
``{"line"}`` for every line of output as it comes, then ``{"rc", "err"}``. A closed connection kills its command.
Standard library only, without site: emulated start-up is slow.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Any

PORT = 7099


def watch(connection: socket.socket, process: subprocess.Popen[str]) -> None:
    """Kill the command when the host goes away."""
    with contextlib.suppress(OSError):
        while connection.recv(1024):
            pass
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def execute(connection: socket.socket, request: dict[str, Any]) -> None:
    def answer(**words: Any) -> None:
        connection.sendall(json.dumps(words).encode() + b"\n")

    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as given:
        given.write(request.get("stdin") or "")
        given.seek(0)
        try:
            process = subprocess.Popen(
                request["argv"], stdin=given, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                env={**os.environ, **(request.get("env") or {})}, cwd=request.get("cwd") or "/",
            )  # fmt: skip
        except OSError as e:
            answer(rc=127, err=str(e))
            return
        threading.Thread(target=watch, args=(connection, process), daemon=True).start()
        assert process.stdout
        for line in process.stdout:
            answer(line=line.rstrip("\n"))
        code = process.wait()
        errors.seek(0)
        answer(rc=code, err=errors.read()[-20000:])


def serve(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        request = json.loads(connection.makefile().readline())
        if request.get("poweroff"):
            os._exit(0)
        execute(connection, request)


def main() -> None:
    listener = socket.create_server((sys.argv[1], PORT))
    print(f"RETINUE-KERNEL ready {platform.release()}", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


main()
