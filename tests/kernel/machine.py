"""A guest with the distribution's kernel under software emulation, on a tap device in a namespace of its own.

    +-- namespace ----------+                 +-- guest ---------------+
    | 10.97.0.1 fd97::1 tap |---- virtio ----| eth0 10.97.0.2 fd97::2 |
    | retinue-engine        |                 | kernel WireGuard       |
    +-----------------------+                 +------------------------+
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mesh import netns

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "RETINUE-KERNEL "
PORT = 7099  # as in guest.py
LIMIT = 2400  # seconds the guest may live; it powers itself off then
SILENCE = 900  # seconds a command in it may say nothing
BOOT = 180  # seconds until it answers


class Command:
    """A command in the guest; its output comes line by line. `rc` and `err` are there after `wait`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._answers = connection.makefile()
        self.rc: int | None = None
        self.err = ""
        self.lines: list[str] = []

    def readline(self) -> str | None:
        """The next line, None at the end."""
        while self.rc is None:
            text = self._answers.readline()
            if not text:
                raise ConnectionError("the guest went away")
            answer = json.loads(text)
            if "rc" in answer:
                self.rc, self.err = answer["rc"], answer["err"]
                break
            self.lines.append(answer["line"])
            return self.lines[-1]
        return None

    def wait(self) -> int:
        while self.readline() is not None:
            pass
        assert self.rc is not None
        return self.rc

    def hang_up(self) -> None:
        """Close the connection, which kills the command, also under a reader in another thread."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._answers.close()
        self._connection.close()


def _sweep() -> None:
    """Namespaces of runs that were killed."""
    for line in subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0] if line.split() else ""
        if name.startswith("rtkl-") and not Path("/proc", name.removeprefix("rtkl-")).exists():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Machine:
    """The running guest. `kernel` is its version; `console` what it said."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.ns = f"rtkl-{os.getpid()}"
        self.here, self.there = ("10.97.0.1", "fd97::1"), ("10.97.0.2", "fd97::2")
        self.kernel = ""
        self.console: list[str] = []
        self.boot_seconds = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._ready = threading.Event()
        self._reader: threading.Thread | None = None

    def sh(self, *argv: str, stdin: str | None = None) -> str:
        """Run in the namespace on the host."""
        done = subprocess.run(["ip", "netns", "exec", self.ns, *argv], check=False, capture_output=True, text=True, input=stdin, timeout=60)
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
        return done.stdout

    def __enter__(self) -> Machine:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _boot(self) -> None:
        _sweep()
        subprocess.run(["ip", "netns", "add", self.ns], check=True)
        self.sh("ip", "link", "set", "lo", "up")
        self.sh("ip", "tuntap", "add", "dev", "tap0", "mode", "tap")
        self.sh("ip", "address", "add", f"{self.here[0]}/24", "dev", "tap0")
        self.sh("ip", "address", "add", f"{self.here[1]}/64", "dev", "tap0", "nodad")
        self.sh("ip", "link", "set", "tap0", "up")
        parameters = {
            "ADDRESS4": f"{self.there[0]}/24", "ADDRESS6": f"{self.there[1]}/64", "LIMIT": str(LIMIT),
            "PYTHON": sys.executable, "AGENT": str(Path(__file__).with_name("guest.py")),
            "GUEST_PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        }  # fmt: skip
        text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in parameters.items())
        started = time.monotonic()
        self._process = subprocess.Popen(
            # It ends with us, however we end.
            ["ip", "netns", "exec", self.ns, "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64",
             # Hardware virtualisation is not there in most runners, and hangs in some.
             "-accel", "tcg,thread=multi", "-machine", "pc", "-cpu", "max,la57=off", "-smp", "2", "-m", "1024",
             "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
             "-kernel", str(self.image / "vmlinuz"), "-initrd", str(self.image / "initrd"),
             "-append", f"console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr retinue={base64.b64encode(text.encode()).decode()}",
             "-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no",
             "-device", "virtio-net-pci,netdev=net,romfile=",
             "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
             "-device", "virtio-9p-pci,fsdev=host,mount_tag=host"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(BOOT)
        assert self.kernel, f"the guest did not come up within {BOOT} s; its last words:\n" + "\n".join(self.console[-30:])
        self.boot_seconds = time.monotonic() - started

    def _read(self) -> None:
        assert self._process
        assert self._process.stdout
        for line in self._process.stdout:
            said = line.strip()
            self.console.append(said)
            # The console's first line may carry what the firmware left on it.
            if f"{MARK}ready " in said:
                self.kernel = said.rpartition("ready ")[2]
                self._ready.set()
        self._ready.set()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if self.kernel and process.poll() is None:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired), self._connect() as connection:
                    connection.sendall(b'{"poweroff": true}\n')
                    process.wait(15)
            if process.poll() is None:
                process.kill()
            process.wait()
            if self._reader is not None:
                self._reader.join(5)
            assert process.stdout
            process.stdout.close()
        subprocess.run(["ip", "netns", "del", self.ns], check=False, capture_output=True)

    # ---- commands in the guest

    def _connect(self) -> socket.socket:
        connection = netns.inside(self.ns, socket.socket)
        connection.settimeout(SILENCE)
        connection.connect((self.there[0], PORT))
        return connection

    def start(self, *argv: str, env: Mapping[str, str] | None = None, stdin: str | None = None) -> Command:
        """Start a command in the guest, in the repository."""
        connection = self._connect()
        request: dict[str, Any] = {"argv": argv, "env": dict(env or {}), "cwd": str(REPOSITORY), "stdin": stdin}
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Command(connection)

    def run(self, *argv: str, stdin: str | None = None) -> str:
        """Output of a command in the guest."""
        with self.start(*argv, stdin=stdin) as command:
            assert command.wait() == 0, f"{' '.join(argv)}: {command.err}"
            return "\n".join(command.lines)

    def try_(self, *argv: str) -> int:
        """Exit status of a command in the guest."""
        with self.start(*argv) as command:
            return command.wait()
