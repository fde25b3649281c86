"""The userspace device: an engine process of its own behind the UAPI socket.

The process is launched detached and outlives the agent: a restarted agent finds it by its pid file (pid and start
time) and takes it over without touching traffic. When it dies, `on_exit` is called and `start` launches the next one.
Any engine with wireguard-go's command line will do (``PROGRAM -f IFNAME``); only ours gets our extension.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from identity.errors import NoPrivilege, NotFound, RetinueError, TimedOut, Unreachable
from identity.keys import write_file
from mesh.devices import DeviceConfig, DeviceState, PeerChange, PeerState, uapi
from mesh.plan import AES, CHACHA, Cipher

START_TIMEOUT: Final = 10.0  # seconds until a fresh engine answers
OURS: Final = "retinue-engine"
FALLBACK: Final = "wireguard-go"
_WELL_KNOWN: Final = Path("/var/run/wireguard")  # where engines that know no WG_UAPI_DIR put their socket
_LOG_LIMIT: Final = 1 << 20  # bytes; a longer log starts anew with the next engine


@dataclass(frozen=True, slots=True)
class Running:
    """An engine process. `started` is field 22 of /proc/PID/stat: with it a reused pid is not mistaken for it."""

    pid: int
    started: int


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, None when there is none (or only its remains)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def find_engine(wish: Path | None) -> Path:
    """The engine program: the wished one, ours, or wireguard-go. Raises NotFound."""
    if wish is not None:
        found = shutil.which(str(wish))
        if found is None:
            raise NotFound("device.no_engine", f"{wish} is not a program", hint="check --engine")
        return Path(found)
    for candidate in (str(Path(sys.executable).with_name(OURS)), OURS, FALLBACK):
        if found := shutil.which(candidate):
            return Path(found)
    raise NotFound("device.no_engine", "no tunnel engine is installed", hint=f"install {OURS} or {FALLBACK}")


async def version_of(program: Path) -> str | None:
    """Version of our engine, None for another one: only ours understands our extension. Raises Unreachable."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(program), "--version",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(START_TIMEOUT):
            out, _ = await process.communicate()
    except (OSError, TimeoutError) as e:
        raise Unreachable("device.engine_exited", f"{program} does not run ({type(e).__name__})") from None
    words = out.decode(errors="replace").split()
    return words[1][:40] if len(words) >= 2 and words[0] == OURS else None


def identity_of(program: Path) -> str:
    """What changes when a program is replaced: file, size and time of it and, for our script, of the native module."""
    paths = [program]
    if program.name == OURS and program.parent == Path(sys.executable).parent:
        spec = importlib.util.find_spec("mesh._native")
        paths += [Path(spec.origin)] if spec is not None and spec.origin else []
    found = [os.stat(path) for path in paths]
    return " ".join(f"{s.st_dev}.{s.st_ino}.{s.st_size}.{s.st_mtime_ns}" for s in found)


class UserspaceDevice:
    """See mesh.devices.Device."""

    kind: Literal["userspace", "kernel"] = "userspace"

    def __init__(self, config: DeviceConfig, *, on_exit: Callable[[], None] | None = None) -> None:
        self.config = config
        self.on_exit = on_exit
        self.program: Path | None = None
        self.version: str | None = None
        self.running: Running | None = None
        self.held_back: str | None = None  # why the installed engine could not take over from the running one
        self._identity: str | None = None  # of the running program; None when its agent wrote none
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd: int | None = None

    @property
    def ciphers(self) -> tuple[Cipher, ...]:
        """Only our engine knows AES-256-GCM."""
        return (CHACHA,) if self.version is None else (AES, CHACHA)

    # ---- paths

    @property
    def _pid_file(self) -> Path:
        return self.config.run_dir / f"engine-{self.config.interface}.json"

    @property
    def log_file(self) -> Path:
        return self.config.run_dir / f"engine-{self.config.interface}.log"

    @property
    def socket(self) -> Path:
        """The UAPI socket: in the run directory, or where wireguard-go insists on having it."""
        name = f"{self.config.interface}.sock"
        if self.program is not None and self.program.name == FALLBACK:
            return _WELL_KNOWN / name
        return self.config.run_dir / name

    # ---- life

    async def start(self) -> bool:
        self.config.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        adopted = await self._adopt()
        if not adopted:
            await self._launch()
        self._watch()
        if adopted:
            await self._try_upgrade()
        await self._give_key(await uapi.get(self.socket))
        return adopted

    async def _give_key(self, state: DeviceState) -> None:
        """Hand over key, port and mark where they differ. A set that changes nothing is not sent."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        from identity.keys import b64, x25519_public

        raw = self.config.private_key()
        public = b64(x25519_public(X25519PrivateKey.from_private_bytes(raw)))
        port = self.config.listen_port if state.listen_port != self.config.listen_port else None
        mark = self.config.fwmark if state.fwmark != self.config.fwmark else None
        key = raw if state.public_key != public else None
        if key is not None or port is not None or mark is not None:
            await uapi.apply(self.socket, uapi.set_request(private_key=key, listen_port=port, fwmark=mark))

    def _saved(self) -> tuple[Running, Path, str | None, str | None] | None:
        """The engine of the pid file, when that process still lives."""
        try:
            saved = json.loads(self._pid_file.read_text())
            running, program = Running(int(saved["pid"]), int(saved["started"])), Path(str(saved["program"]))
            version = None if saved["version"] is None else str(saved["version"])
            identity = str(saved["identity"]) if saved.get("identity") else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if start_time(running.pid) != running.started else (running, program, version, identity)

    async def _try_upgrade(self) -> None:
        try:
            await self.upgrade()
            self.held_back = None
        except RetinueError as e:
            self.held_back = e.message

    async def upgrade(self) -> bool:
        """Let the installed engine go on in the place of the running one, without a lost packet; False when it is the same.

        Raises RetinueError when that does not work out; then the running engine goes on as it was.
        """
        old = self.running
        if old is None or self.version is None:
            return False
        program = find_engine(self.config.engine)
        version, identity = await version_of(program), identity_of(program)
        if version is None or (version, identity) == (self.version, self._identity):
            return False
        return await self._hand_over(program, version, identity)

    async def _hand_over(self, program: Path, version: str, identity: str) -> bool:
        child = self._spawn(program, "--take-over")
        new = Running(child.pid, start_time(child.pid) or 0)
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        old = self.running
        assert old is not None
        # The old one ends at the moment at which the new one owns the tunnel, not before.
        self._unwatch()
        try:
            while start_time(old.pid) == old.started:
                if self._child is not None:
                    self._child.poll()
                if child.poll() is not None:
                    raise Unreachable("device.upgrade", f"the installed engine did not take over: {self._last_words() or 'no word'}",
                                      hint="the running engine goes on; see its log")  # fmt: skip
                if asyncio.get_running_loop().time() > deadline:
                    raise TimedOut("device.upgrade", f"the installed engine did not take over within {START_TIMEOUT:.0f} s",
                                   hint="the running engine goes on; see its log")  # fmt: skip
                await asyncio.sleep(0.01)
        except BaseException:
            if start_time(old.pid) == old.started:
                child.kill()
                child.wait()
                self._watch()
                raise
        if self._child is not None:
            self._child.wait()
        self.program, self.version, self._identity, self.running, self._child = program, version, identity, new, child
        self._record()
        self._watch()
        await uapi.get(self.socket)
        return True

    def left_running(self) -> bool:
        """Is there an engine of an earlier agent?"""
        return self._saved() is not None

    async def _adopt(self) -> bool:
        saved = self._saved()
        if saved is None:
            return False
        self.running, self.program, self.version, self._identity = saved
        try:
            await uapi.get(self.socket)
        except RetinueError:
            await self._kill()  # it lives but does not answer: a fresh one is better
            return False
        return True

    async def _launch(self) -> None:
        self.program = find_engine(self.config.engine)
        self.version = await version_of(self.program)
        # A socket left by a killed engine would look like an engine that does not answer.
        self.socket.unlink(missing_ok=True)
        self._identity = identity_of(self.program)
        self._child = self._spawn(self.program)
        pid = self._child.pid
        self.running = Running(pid, start_time(pid) or 0)
        try:
            await self._answers()
        except BaseException:
            await self._kill()
            raise
        self._record()

    def _spawn(self, program: Path, *options: str) -> subprocess.Popen[bytes]:
        env = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "WG_UAPI_DIR": str(self.config.run_dir),
            "WG_PROCESS_FOREGROUND": "1",
            "LOG_LEVEL": os.environ.get("RETINUE_ENGINE_LOG", "error"),
        }
        if self.version is not None:
            options = (*self.config.engine_options, *options)
        env |= {k: v for k, v in os.environ.items() if k.startswith("RETINUE_ENGINE_")}
        with contextlib.suppress(OSError):
            if self.log_file.stat().st_size > _LOG_LIMIT:
                self.log_file.unlink()
        with open(self.log_file, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            return subprocess.Popen(
                [str(program), "-f", *options, self.config.interface], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=env, cwd="/", start_new_session=True, close_fds=True,
            )  # fmt: skip

    def _record(self) -> None:
        assert self.running is not None
        saved = {
            "pid": self.running.pid, "started": self.running.started, "program": str(self.program), "version": self.version,
            "identity": self._identity,
        }  # fmt: skip
        write_file(self._pid_file, json.dumps(saved).encode(), 0o600)

    async def _answers(self) -> None:
        """Wait until the fresh engine answers. Raises NoPrivilege, Unreachable (it exited), TimedOut."""
        assert self._child is not None
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        while True:
            if self._child.poll() is not None:
                said = self._last_words()
                cls = NoPrivilege if "permitted" in said or "/dev/net/tun" in said else Unreachable
                raise cls("device.engine_exited", f"{self.program} exited with {self._child.returncode}: {said or 'no word'}",
                          hint=f"see {self.log_file}")  # fmt: skip
            if self.socket.exists():
                with contextlib.suppress(RetinueError):
                    await uapi.get(self.socket)
                    return
            if asyncio.get_running_loop().time() > deadline:
                raise TimedOut("device.engine_start", f"{self.program} did not answer within {START_TIMEOUT:.0f} s",
                               hint=f"see {self.log_file}")  # fmt: skip
            await asyncio.sleep(0.01)

    def _last_words(self) -> str:
        try:
            lines = self.log_file.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:200] if lines else ""

    def _watch(self) -> None:
        """Notice the end of the process at once, child or not."""
        assert self.running is not None
        self._unwatch()
        try:
            self._pidfd = os.pidfd_open(self.running.pid)
        except ProcessLookupError:
            asyncio.get_running_loop().call_soon(self._exited)
            return
        asyncio.get_running_loop().add_reader(self._pidfd, self._exited)

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _exited(self) -> None:
        self._unwatch()
        if self._child is not None:
            self._child.poll()
        self.running = None
        if self.on_exit is not None:
            self.on_exit()

    async def _kill(self) -> None:
        running, self.running = self.running, None
        self._unwatch()
        if running is not None and start_time(running.pid) == running.started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGTERM)
            for _ in range(100):
                if start_time(running.pid) != running.started:
                    break
                if self._child is not None:
                    self._child.poll()
                await asyncio.sleep(0.02)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.pid, signal.SIGKILL)
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(2)
            self._child = None

    async def stop(self, *, clean: bool) -> None:
        if clean:
            if self.running is None:
                await self._adopt()  # what an agent that is gone left running
            await self._kill()
            self.socket.unlink(missing_ok=True)
            self._pid_file.unlink(missing_ok=True)
        else:
            self._unwatch()
            if self._child is not None:
                # It is meant to outlive us: without this the interpreter warns about a child still running.
                self._child.returncode = 0
                self._child = None

    # ---- work

    async def read(self) -> DeviceState:
        return await uapi.get(self.socket)

    async def counters(self) -> Mapping[str, PeerState]:
        return (await self.read()).peers

    async def apply(self, changes: Iterable[PeerChange]) -> None:
        await uapi.apply(self.socket, uapi.set_request(changes, ciphers=self.version is not None))

    def describe(self) -> str:
        name = self.program.name if self.program is not None else "no engine"
        return f"userspace ({name}{' ' + self.version if self.version else ''})"
