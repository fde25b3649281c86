"""SVID files for programs that read files: cert.pem (0644), key.pem (0600) and bundle.pem (0644) in a directory of their own.

A root that has expired is left out of bundle.pem. After a change a command may be run, or a signal sent to the process whose
number is in a file.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

from identity.errors import BadInput, BadState
from identity.keys import write_file, write_secret
from identity.wire.local import SvidFiles
from mesh.processes import process_start

CERT, KEY, BUNDLE = "cert.pem", "key.pem", "bundle.pem"
API_SOCKET = "workload.sock"  # in the run directory (mesh/workload_api.py)
RELOAD_TIMEOUT = 30.0  # seconds


def environment(directory: Path, files: SvidFiles) -> dict[str, str]:
    """What a program is told: where its files are and who it is."""
    return {
        "SVID_CERT": str(directory / CERT), "SVID_KEY": str(directory / KEY), "SVID_BUNDLE": str(directory / BUNDLE),
        "SPIFFE_ID": files.spiffe_id,
    }  # fmt: skip


def api_environment(run_dir: Path) -> dict[str, str]:
    """Where a program finds the Workload API (SPIFFE Workload Endpoint, section 4); nothing while there is none."""
    path = (run_dir / API_SOCKET).resolve()
    return {"SPIFFE_ENDPOINT_SOCKET": f"unix://{path}"} if path.is_socket() else {}


def write(directory: Path, files: SvidFiles) -> bool:
    """Bring the files up to date; True when something changed. Key before certificate, each whole or not at all.

    Raises BadState.
    """
    wanted = {KEY: files.key, CERT: files.certificate, BUNDLE: living(files.bundle, time.time())}
    changed = False
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in wanted.items():
            path = directory / name
            data = text.encode()
            if _same(path, data):
                continue
            changed = True
            if name == KEY:
                write_secret(path, data)
            else:
                write_file(path, data)
    except OSError as e:
        raise BadState("svid.write", f"cannot write SVID files to {directory}: {e.strerror}") from None
    return changed


def living(bundle: str, now: float) -> str:
    """The roots of a bundle that have not expired; all of them when none is left, for nothing is no bundle."""
    from identity import certs
    from identity.errors import NotVerified

    try:
        roots = certs.parse_chain(bundle)
    except NotVerified:
        return bundle  # not ours to judge here: it came verified
    kept = [root for root in roots if certs.not_after(root) > now]
    return "".join(map(certs.pem, kept or roots))


def check_signal(name: str) -> signal.Signals:
    """A signal by its name, with or without SIG. Raises BadInput ``svid.signal``."""
    try:
        return signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]
    except KeyError:
        raise BadInput("svid.signal", f"not a signal: {ascii(name)[:40]}", hint="use SIGHUP or SIGUSR1") from None


def send(pid_file: Path, number: signal.Signals) -> None:
    """Signal the process whose number is in a file: the number is looked up through a pidfd, so a process that ended is not
    taken for another. Raises BadInput ``svid.pid`` when there is none.
    """
    try:
        text = pid_file.read_text(encoding="ascii").split()
        pid = int(text[0])
        if pid < 2:
            raise ValueError
        fd = os.pidfd_open(pid)
    except (OSError, ValueError, IndexError):
        raise BadInput("svid.pid", f"{pid_file} does not name a running process") from None
    try:
        signal.pidfd_send_signal(fd, number)
    except OSError as e:
        raise BadInput("svid.pid", f"process {pid} cannot be signalled: {e.strerror}") from None
    finally:
        os.close(fd)


def remove(directory: Path) -> None:
    """Take the files away; what else is in the directory stays."""
    for name in (KEY, CERT, BUNDLE):
        (directory / name).unlink(missing_ok=True)


def private_dir(run_dir: Path, pid: int) -> Path:
    """Where the files of a program that `retinue run` started go; named so that leftovers can be told."""
    return run_dir / "run" / f"{pid}-{process_start(pid) or 0}"


def remove_dir(directory: Path) -> None:
    """Take a private directory away, files and all."""
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.parent.rmdir()  # when it was the last


def collect(run_dir: Path) -> None:
    """Take away the private directories of programs that have ended."""
    for directory in (run_dir / "run").glob("*-*"):
        pid, _, started = directory.name.partition("-")
        if pid.isdigit() and started.isdigit() and process_start(int(pid)) != int(started):
            remove_dir(directory)


def reload(command: str) -> None:
    """Run the command that makes a program read its files again. Raises BadInput ``svid.reload`` when it fails."""
    try:
        done = subprocess.run(shlex.split(command), stdin=subprocess.DEVNULL, timeout=RELOAD_TIMEOUT, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        raise BadInput("svid.reload", f"the reload command could not run: {type(e).__name__}") from None
    if done.returncode:
        raise BadInput("svid.reload", f"the reload command ended with status {done.returncode}")


def _same(path: Path, data: bytes) -> bool:
    try:
        return not path.is_symlink() and path.read_bytes() == data
    except OSError:
        return False
