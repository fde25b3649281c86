"""A PostgreSQL server of the distribution's for tests: private port, private data directory, fsync on, a user of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psycopg

_OWNERS = ("postgres", "nobody")


def programs() -> Path | None:
    """The directory of initdb and postgres, the newest of at least version 15; None when there is none."""
    found = [p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/postgres") if int(p.parts[-3]) >= 15]
    if found:
        return max(found, key=lambda p: int(p.parts[-2]))
    return Path(path).resolve().parent if (path := shutil.which("postgres")) and shutil.which("initdb") else None


@dataclass
class Server:
    """A server that can be stopped and started. `log` is its log file."""

    root: Path
    port: int
    bin: Path
    prefix: list[str]
    process: subprocess.Popen[bytes] | None = field(default=None)
    settings: tuple[str, ...] = ()  # NAME=VALUE

    @property
    def log(self) -> Path:
        return self.root / "log"

    def url(self, database: str) -> str:
        return f"postgresql://retinue@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, str(self.bin / "postgres"), "-D", str(self.root / "data"), "-p", str(self.port),
                 "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.root}", "-c", "fsync=on",
                 "-c", "max_connections=100", *(word for one in self.settings for word in ("-c", one))],
                stdout=log, stderr=log, cwd=self.root,
            )  # fmt: skip
        for _ in range(600):
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.05)
            else:
                return
        raise AssertionError(self.log.read_text())

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: fast shutdown; SIGQUIT: at once, as after a crash."""
        if self.process is not None:
            pid = int((self.root / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
            os.kill(pid, how)
            self.process.wait(60)
            self.process = None

    def standby(self, root: Path) -> Server:
        """A second server that follows this one, started; from then on a commit here waits until it has it, too."""
        owner = self.root.stat()
        root.mkdir(mode=0o700)
        os.chown(root, owner.st_uid, owner.st_gid)
        subprocess.run(
            [*self.prefix, str(self.bin / "pg_basebackup"), "-D", str(root / "data"), "-h", "127.0.0.1", "-p", str(self.port),
             "-U", "retinue", "-R", "-X", "stream", "-c", "fast"],
            check=True, capture_output=True, cwd=root,
        )  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        made = Server(root, port, self.bin, self.prefix)
        made.start()
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
        return made

    def promote(self) -> None:
        """Make a standby the primary; returns when it takes writes."""
        subprocess.run([*self.prefix, str(self.bin / "pg_ctl"), "promote", "-w", "-D", str(self.root / "data")],
                       check=True, capture_output=True, cwd=self.root)  # fmt: skip

    def database(self) -> str:
        """A new empty database; its address."""
        name = f"t{uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)


@contextmanager
def server() -> Iterator[Server]:
    """Start one; stop it and remove its files at the end."""
    found = programs()
    assert found is not None, "no PostgreSQL server (>= 15) is installed: apt-get install postgresql"
    root = Path(tempfile.mkdtemp(prefix="retinue-pg-", dir="/tmp"))
    prefix: list[str] = []
    if os.geteuid() == 0:
        owner = next(pwd.getpwnam(n) for n in _OWNERS if _known(n))
        os.chown(root, owner.pw_uid, owner.pw_gid)
        prefix = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Server(root, port, found, prefix)
    try:
        subprocess.run(
            [*prefix, str(found / "initdb"), "-D", str(root / "data"), "-U", "retinue", "-A", "trust", "-E", "UTF8",
             "--locale=C", "--no-sync"],
            check=True, capture_output=True, cwd=root,
        )  # fmt: skip
        made.start()
        yield made
    finally:
        made.stop(signal.SIGQUIT)
        shutil.rmtree(root, ignore_errors=True)


def _known(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
